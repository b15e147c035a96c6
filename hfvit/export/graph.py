"""Helpers to read and rewrite an `onnx_ir` graph."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import common as passes

MICROSOFT = "com.microsoft"
MOVES = ("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Split", "Identity", "Gather", "Flatten")


def cpu_session(model: Path | onnx.ModelProto) -> onnxruntime.InferenceSession:
    """To check or measure something; ONNX Runtime's warnings about unused and unsaid shapes are of no use then."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


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

    @property
    def x(self) -> ir.Value:
        return self.node.inputs[0]

    @classmethod
    def at(cls, node: ir.Node) -> "Linear | None":
        kernel = constant(node.inputs[1]) if node.op_type in ("MatMul", "Gemm") and node.domain == "" else None
        if kernel is None or kernel.ndim != 2 or constant(node.inputs[0]) is not None:
            return None
        if node.op_type == "Gemm":
            return cls._gemm(node, kernel)
        addition = only_reader(node.outputs[0], "Add")
        bias = constant(other_input(addition, node.outputs[0])) if addition is not None else None
        if bias is None or bias.size != kernel.shape[1] or bias.shape[-1:] != (bias.size,):
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
    product.dtype = output.dtype = x.dtype
    product.shape = output.shape = None if x.shape is None else ir.Shape([*x.shape[:-1], kernel.shape[1]])
    return output


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
