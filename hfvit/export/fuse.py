"""`fuse`: a float32 graph rewritten for ONNX Runtime's CPU kernels, computing exactly the same.

transformers' fusions come first (attention, GELU). What follows are the steps that they lack, and two of theirs undone
because the fused kernel is the slower one (onnxruntime 1.32).
"""

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import common as passes
from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

MICROSOFT = "com.microsoft"
MOVES = ("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Split", "Identity", "Gather", "Flatten")


def fuse(model: ir.Model) -> None:
    """Rewrite `model` in place; it runs on ONNX Runtime alone afterwards."""
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    fuse_for_onnxruntime(model, "cpu")
    model.graph.opset_imports[MICROSOFT] = 1
    unfuse_skip_norms(model)
    fold_scales(model)
    fuse_projections(model)
    drop_unread_tokens(model)
    clean(model)


def clean(model: ir.Model) -> None:
    """Drop what nobody reads, and name what is left."""
    passes.RemoveUnusedNodesPass()(model)
    passes.NameFixPass()(model)


def constant(value: ir.Value | None) -> np.ndarray | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def weight(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """A new initializer; `name` gets a number where it is taken."""
    initializers = model.graph.initializers
    unique = name if name not in initializers else f"{name}_{len(initializers)}"
    array = np.array(array, order="C")  # ascontiguousarray would turn a scalar into a vector
    value = ir.Value(name=unique, const_value=ir.tensor(array, name=unique), shape=ir.Shape(array.shape))
    value.dtype = ir.DataType.from_numpy(array.dtype)
    model.graph.register_initializer(value)
    return value


def add_node(before: ir.Node, op_type: str, inputs, *, domain: str = "", like: ir.Value | None = None, **attributes):
    """The output of a new node, inserted before another; `like` gives its type and shape."""
    node = ir.node(op_type, inputs, attributes=attributes, domain=domain)
    node.outputs[0].dtype = ir.DataType.FLOAT if like is None else like.dtype
    node.outputs[0].shape = None if like is None else like.shape
    before.graph.insert_before(before, node)
    return node.outputs[0]


def replace(old: ir.Value, new: ir.Value) -> None:
    """Everyone who reads `old` reads `new`, under its name; a graph output keeps its type."""
    old.name, new.name = f"{old.name}.replaced", old.name
    if old.is_graph_output():
        new.shape, new.dtype = old.shape, old.dtype
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    """The node that alone reads `value`, when it is an `op_type`."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != op_type:
        return None
    return uses[0].node


def other_input(node: ir.Node, value: ir.Value) -> ir.Value:
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


class Linear:
    """`x @ kernel + bias`: a MatMul or Gemm with a constant matrix, and the constant that is added to it."""

    def __init__(self, node: ir.Node, kernel: np.ndarray, bias: np.ndarray | None, output: ir.Value):
        self.node, self.kernel, self.bias, self.output = node, kernel, bias, output
        self.x = node.inputs[0]

    @classmethod
    def at(cls, node: ir.Node) -> "Linear | None":
        kernel = constant(node.inputs[1]) if node.op_type in ("MatMul", "Gemm") and node.domain == "" else None
        if kernel is None or kernel.ndim != 2 or constant(node.inputs[0]) is not None:
            return None
        if node.op_type == "Gemm":
            return cls._gemm(node, kernel)
        addition = only_reader(node.outputs[0], "Add")
        bias = constant(other_input(addition, node.outputs[0])) if addition is not None else None
        if bias is None or bias.size != kernel.shape[1] or bias.shape[-1] != bias.size:
            return cls(node, kernel, None, node.outputs[0])
        return cls(node, kernel, bias.reshape(-1), addition.outputs[0])

    @classmethod
    def _gemm(cls, node: ir.Node, kernel: np.ndarray) -> "Linear | None":
        plain = node.attributes.get_float("alpha", 1.0) == node.attributes.get_float("beta", 1.0) == 1.0
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        kernel = kernel.T if node.attributes.get_int("transB", 0) else kernel
        unknown_bias = len(node.inputs) > 2 and (bias is None or bias.size != kernel.shape[1])
        if not plain or node.attributes.get_int("transA", 0) or unknown_bias:
            return None
        return cls(node, kernel, None if bias is None else bias.reshape(-1), node.outputs[0])

    @classmethod
    def making(cls, value: ir.Value | None) -> "Linear | None":
        """The linear whose output, bias included, is `value`."""
        node = value.producer() if value is not None else None
        if node is not None and node.op_type == "Add":
            products = [v.producer() for v in node.inputs if v is not None and v.producer() is not None]
            node = products[0] if len(products) == 1 else None
        linear = cls.at(node) if node is not None else None
        return linear if linear is not None and linear.output is value else None

    def full_bias(self) -> np.ndarray:
        return np.zeros(self.kernel.shape[1], self.kernel.dtype) if self.bias is None else self.bias


def linears(model: ir.Model) -> list[Linear]:
    return [linear for node in model.graph if (linear := Linear.at(node)) is not None]


def add_linear(model: ir.Model, before: ir.Node, x: ir.Value, kernel, bias, name: str) -> ir.Value:
    """MatMul and Add of new weights."""
    product = add_node(before, "MatMul", [x, weight(model, f"{name}.weight", kernel)])
    output = add_node(before, "Add", [product, weight(model, f"{name}.bias", bias)])
    product.shape = output.shape = None if x.shape is None else ir.Shape([*x.shape[:-1], kernel.shape[1]])
    return output


def unfuse_skip_norms(model: ir.Model) -> None:
    """SkipLayerNormalization -> Add and LayerNormalization, which together take a fourth of its time on a CPU."""
    for node in list(model.graph):
        if node.op_type != "SkipLayerNormalization" or any(output.uses() for output in node.outputs[1:3]):
            continue
        x, skip, scale, shift, bias = [*node.inputs, None, None][:5]
        total = add_node(node, "Add", [x, skip], like=x)
        total = total if bias is None else add_node(node, "Add", [total, bias], like=x)
        epsilon = node.attributes.get_float("epsilon", 1e-12)
        inputs = [total, scale] if shift is None else [total, scale, shift]
        norm = add_node(node, "LayerNormalization", inputs, like=x, axis=-1, epsilon=epsilon)
        if len(node.outputs) > 3:
            replace(node.outputs[3], total)
        replace(node.outputs[0], norm)
    clean(model)


def fold_scales(model: ir.Model) -> None:
    """A constant that multiplies a linear's output (LayerScale) goes into the linear's weights."""
    for linear in linears(model):
        scaling = only_reader(linear.output, "Mul")
        factor = constant(other_input(scaling, linear.output)) if scaling is not None else None
        if factor is None or factor.size not in (1, linear.kernel.shape[1]) or factor.shape[-1:] != (factor.size,):
            continue
        factor = factor.reshape(-1)
        name = linear.node.inputs[1].name
        scaled = add_linear(model, scaling, linear.x, linear.kernel * factor, linear.full_bias() * factor, name)
        replace(scaling.outputs[0], scaled)
    clean(model)


def columns(model: ir.Model, value: ir.Value) -> tuple[ir.Value, np.ndarray] | None:
    """`(origin, columns)` when `value[b, t, :]` is `origin[b, t, columns]`, whatever moves lie between.

    The moves are run on numbered elements, so that every layout of query, key and value is recognised by what it does.
    """
    nodes, origin = [], value
    while (node := origin.producer()) is not None and node.op_type in MOVES and node.domain == "":
        if any(constant(extra) is None for extra in node.inputs[1:] if extra is not None):
            return None
        nodes.insert(0, node)
        origin = node.inputs[0]
    shape = None if origin.shape is None else list(origin.shape)
    if shape is None or len(shape) != 3 or not all(isinstance(size, int) for size in shape[1:]):
        return None
    numbered = np.arange(2 * shape[1] * shape[2], dtype=np.float64).reshape(2, *shape[1:])
    moved = _run(model.graph.opset_imports[""], nodes, origin, value, numbered) if nodes else numbered
    if moved.shape[:2] != numbered.shape[:2] or moved.ndim != 3:
        return None
    found = moved[0, 0].astype(int)
    return (origin, found) if found.max() < shape[2] and np.array_equal(moved, numbered[..., found]) else None


def _run(opset: int, nodes: list[ir.Node], origin: ir.Value, value: ir.Value, data: np.ndarray) -> np.ndarray:
    weights = {v.name: v for node in nodes for v in node.inputs[1:] if v is not None}
    graph = onnx.helper.make_graph(
        [ir.to_proto(node) for node in nodes],
        "moves",
        [onnx.helper.make_tensor_value_info(origin.name, onnx.TensorProto.DOUBLE, data.shape)],
        [onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.DOUBLE, None)],
        [onnx.numpy_helper.from_array(constant(v), name) for name, v in weights.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    return ReferenceEvaluator(model).run(None, {origin.name: data})[0]


def fuse_projections(model: ir.Model) -> None:
    """MultiHeadAttention and the projections of its query, key and value -> Attention, which copies none of them."""
    for node in list(model.graph):
        if node.op_type != "MultiHeadAttention" or any(value is not None for value in node.inputs[3:]):
            continue
        found = [columns(model, value) for value in node.inputs[:3]]
        projections = [Linear.making(origin) for origin, _ in found] if all(found) else []
        if len(projections) != 3 or None in projections or len({id(p.x) for p in projections}) != 1:
            continue
        kernels = [p.kernel[:, which] for p, (_, which) in zip(projections, found, strict=True)]
        biases = [p.full_bias()[which] for p, (_, which) in zip(projections, found, strict=True)]
        heads = node.attributes.get_int("num_heads")
        width = kernels[0].shape[1]
        if any(kernel.shape[1] != width for kernel in kernels) or projections[0].x.shape is None:
            continue
        scale = node.attributes.get_float("scale", 0.0)
        if scale:  # Attention always divides by the root of the head's width
            kernels[0], biases[0] = (part * scale * (width // heads) ** 0.5 for part in (kernels[0], biases[0]))
        kernel = weight(model, "attention.weight", np.concatenate(kernels, axis=1).astype(np.float32))
        bias = weight(model, "attention.bias", np.concatenate(biases).astype(np.float32))
        inputs = [projections[0].x, kernel, bias]
        output = add_node(node, "Attention", inputs, domain=MICROSOFT, num_heads=heads)
        output.shape = ir.Shape([*projections[0].x.shape[:2], width])
        replace(node.outputs[0], output)
        drop_idle_moves(model, output)
    clean(model)


def drop_idle_moves(model: ir.Model, value: ir.Value) -> None:
    """Readers of reshaped `value` whose reshapes, all together, change nothing read `value` itself."""
    waiting = [value]
    while waiting:
        for use in list(waiting.pop().uses()):
            if use.node.op_type in MOVES and len(use.node.outputs) == 1:
                moved = use.node.outputs[0]
                waiting.append(moved)
                found = columns(model, moved) if moved.shape is not None and len(moved.shape) == 3 else None
                if found and found[0] is value and np.array_equal(found[1], np.arange(value.shape[2])):
                    moved.replace_all_uses_with(value, replace_graph_outputs=True)


def drop_unread_tokens(model: ir.Model) -> None:
    """Where the head reads the class token alone, the last block computes that token alone.

    Its key and value still take every token; the rest of the block is a chain of steps that treat each token by itself.
    """
    for node in list(model.graph):
        if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 1:
            continue
        index, states = constant(node.inputs[1]), node.inputs[0]
        if index is None or index.ndim or states.shape is None or len(states.shape) != 3:
            continue
        attention = next((n for n in reversed(model.graph) if n.op_type == "Attention"), None)
        if attention is None or len(attention.inputs) != 3:
            continue
        one = _TokenOnly(model, int(index), needed_for(attention.inputs[0])).of(states)
        node.replace_input_with(0, one)
        node.replace_input_with(1, weight(model, "first", np.array(0, np.int64)))
    clean(model)


def needed_for(value: ir.Value) -> set[ir.Value]:
    """`value` and everything that it is computed from."""
    needed, waiting = set(), [value]
    while waiting:
        value = waiting.pop()
        if value is None or value in needed:
            continue
        needed.add(value)
        if value.producer() is not None:
            waiting.extend(value.producer().inputs)
    return needed


class _TokenOnly:
    """Recomputes values `(batch, tokens, width)` for one token, `(batch, 1, width)`; cuts it from those in `whole`."""

    def __init__(self, model: ir.Model, index: int, whole: set[ir.Value]):
        self.model, self.index, self.whole, self.known = model, index, whole, {}

    def of(self, value: ir.Value) -> ir.Value:
        if value not in self.known:
            self.known[value] = self._computed(value)
        return self.known[value]

    def _computed(self, value: ir.Value) -> ir.Value:
        node = value.producer()
        follow = value not in self.whole and value.shape is not None and len(value.shape) == 3
        if follow and node.op_type == "Attention" and node.domain == MICROSOFT and len(node.inputs) == 3:
            new = self._attention(node)
        elif follow and self._is_of_each_token(node):
            inputs = [v if constant(v) is not None else self.of(v) for v in node.inputs]
            attributes = {name: attribute.value for name, attribute in node.attributes.items()}
            new = add_node(node, node.op_type, inputs, domain=node.domain, **attributes)
        else:
            new = self._slice(value)
        new.dtype = value.dtype
        new.shape = None if value.shape is None else ir.Shape([value.shape[0], 1, value.shape[2]])
        return new

    def _is_of_each_token(self, node: ir.Node) -> bool:
        if node.op_type in ("Gelu", "BiasGelu"):
            return True
        if node.op_type == "LayerNormalization":
            return node.attributes.get_int("axis", -1) in (-1, 2)
        if node.op_type == "MatMul":
            return Linear.at(node) is not None
        if node.op_type not in ("Add", "Mul"):
            return False
        shapes = [v.shape for v in node.inputs]
        constants = [constant(v) for v in node.inputs]
        return all(
            c.ndim <= 1 if c is not None else s is not None and len(s) == 3
            for c, s in zip(constants, shapes, strict=True)
        )

    def _slice(self, value: ir.Value) -> ir.Value:
        bounds = {"start": self.index, "stop": self.index + 1, "axis": 1}
        inputs = [weight(self.model, f"token.{name}", np.array([number])) for name, number in bounds.items()]
        node = ir.node("Slice", [value, *inputs])
        value.producer().graph.insert_after(value.producer(), node)
        return node.outputs[0]

    def _attention(self, node: ir.Node) -> ir.Value:
        x, kernel, bias = node.inputs[0], constant(node.inputs[1]), constant(node.inputs[2])
        width = kernel.shape[1] // 3
        query = add_linear(self.model, node, self.of(x), kernel[:, :width], bias[:width], "token.query")
        both = add_linear(self.model, node, x, kernel[:, width:], bias[width:], "token.key_value")
        split = ir.node("Split", [both], attributes={"axis": -1, "num_outputs": 2}, num_outputs=2)
        for output in split.outputs:
            output.dtype, output.shape = ir.DataType.FLOAT, x.shape
        node.graph.insert_before(node, split)
        heads = node.attributes.get_int("num_heads")
        return add_node(node, "MultiHeadAttention", [query, *split.outputs], domain=MICROSOFT, num_heads=heads)
