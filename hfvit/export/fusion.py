"""Fuse an ONNX graph for ONNX Runtime on CPU."""

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes
from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

from hfvit.export.graph import (
    MICROSOFT,
    RESHAPES,
    Linear,
    add_linear,
    add_node,
    columns,
    constant,
    cpu_session,
    linears,
    other_input,
    remove_unused_nodes,
    replace,
    single_consumer,
    weight,
)


def fuse(model: ir.Model) -> None:
    """Fuse operators in place; only ONNX Runtime can run the model afterwards."""
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    remove_no_op_masks(model)
    fuse_for_onnxruntime(model, "cpu")
    model.graph.opset_imports[MICROSOFT] = 1
    split_skip_layer_norms(model)
    fold_layer_scale(model)
    fuse_attention_projections(model)
    prune_last_block_tokens(model)
    remove_unused_nodes(model)


def remove_no_op_masks(model: ir.Model) -> None:
    """Remove attention masks without effect (Add of zeros, Where of all-false).

    transformers 5.23 exports one that depends on the batch size only, and is a constant for a fixed one; it is
    evaluated for two batch sizes.
    """
    if any(not isinstance(size, int) for value in model.graph.inputs for size in value.shape[1:]):
        return
    independent = _input_independent_values(model)

    def may_be_mask(value: ir.Value) -> bool:
        return value in independent or _is_zero_mask(value)

    adds = [(n, i) for n in model.graph if n.op_type == "Add" for i in (0, 1) if may_be_mask(n.inputs[i])]
    wheres = [(n, 0) for n in model.graph if n.op_type == "Where" and may_be_mask(n.inputs[0])]
    if not adds and not wheres:
        return
    masks = {n.inputs[i].name for n, i in adds + wheres if n.inputs[i] in independent}
    kept = {n: n.inputs[1 - i] for n, i in adds} | {n: n.inputs[2] for n, _ in wheres}
    measured = [_evaluate_masks(model, masks, kept, batch) for batch in (2, 3)]
    for node, index in adds + wheres:
        same_shape = all(
            np.array_equal(run[f"{node.outputs[0].name}.shape"], run[f"{kept[node].name}.shape"]) for run in measured
        )
        mask = node.inputs[index]
        if same_shape and (mask not in independent or not any(run[mask.name].any() for run in measured)):
            node.outputs[0].replace_all_uses_with(kept[node], replace_graph_outputs=True)
    remove_unused_nodes(model)


def _is_zero_mask(value: ir.Value) -> bool:
    """Return whether a value is a constant of zeros with more axes than a bias."""
    array = constant(value)
    return array is not None and array.ndim >= 3 and not array.any()


def _input_independent_values(model: ir.Model) -> set[ir.Value]:
    """Return computed values that do not depend on the content of the inputs."""
    dependent = set(model.graph.inputs)
    independent = set()
    for node in model.graph:
        depends = node.op_type != "Shape" and any(value in dependent for value in node.inputs)
        (dependent if depends else independent).update(node.outputs)
    return independent


def _evaluate_masks(
    model: ir.Model, masks: set[str], kept: dict[ir.Node, ir.Value], batch: int
) -> dict[str, np.ndarray]:
    """Return the values of `masks`, and the shapes of outputs and kept operands."""
    proto = ir.to_proto(model)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in masks)
    for name in {value.name for node, value in kept.items()} | {node.outputs[0].name for node in kept}:
        proto.graph.node.append(onnx.helper.make_node("Shape", [name], [f"{name}.shape"]))
        proto.graph.output.append(onnx.ValueInfoProto(name=f"{name}.shape"))
    session = cpu_session(proto)
    feeds = {}
    for value in session.get_inputs():
        shape = [batch if not isinstance(size, int) else size for size in value.shape]
        feeds[value.name] = np.zeros(shape, np.float32)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def split_skip_layer_norms(model: ir.Model) -> None:
    """Split SkipLayerNormalization into Add and LayerNormalization (3x as fast)."""
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
    remove_unused_nodes(model)


def fold_layer_scale(model: ir.Model) -> None:
    """Fold a constant factor of a linear layer's output (LayerScale) into its weights."""
    for linear in linears(model):
        scaling = single_consumer(linear.output, "Mul")
        factor = constant(other_input(scaling, linear.output)) if scaling is not None else None
        if factor is None or factor.size not in (1, linear.kernel.shape[1]) or factor.shape[-1:] != (factor.size,):
            continue
        factor = factor.reshape(-1)
        name = linear.node.inputs[1].name
        scaled = add_linear(model, scaling, linear.x, linear.kernel * factor, linear.full_bias() * factor, name)
        replace(scaling.outputs[0], scaled)
    remove_unused_nodes(model)


def fuse_attention_projections(model: ir.Model) -> None:
    """Fuse MultiHeadAttention and its projections into Attention (no copies)."""
    for node in list(model.graph):
        if node.op_type != "MultiHeadAttention" or any(value is not None for value in node.inputs[3:]):
            continue
        found = [columns(model, value) for value in node.inputs[:3]]
        projections = [Linear.producing(origin) for origin, _ in found] if all(found) else []
        if len(projections) != 3 or None in projections or len({id(p.x) for p in projections}) != 1:
            continue
        kernels = [p.kernel[:, which] for p, (_, which) in zip(projections, found, strict=True)]
        biases = [p.full_bias()[which] for p, (_, which) in zip(projections, found, strict=True)]
        heads = node.attributes.get_int("num_heads")
        width = kernels[0].shape[1]
        if any(kernel.shape[1] != width for kernel in kernels) or projections[0].x.shape is None:
            continue
        scale = node.attributes.get_float("scale", 0.0)
        if scale:  # Attention always divides by the square root of the head dimension
            root = (width // heads) ** 0.5
            kernels[0] = kernels[0] * scale * root
            biases[0] = biases[0] * scale * root
        kernel = weight(model, "attention.weight", np.concatenate(kernels, axis=1))
        bias = weight(model, "attention.bias", np.concatenate(biases))
        inputs = [projections[0].x, kernel, bias]
        output = add_node(node, "Attention", inputs, domain=MICROSOFT, num_heads=heads)
        output.shape = ir.Shape([*projections[0].x.shape[:2], width])
        output.dtype = projections[0].x.dtype
        replace(node.outputs[0], output)
        remove_identity_reshapes(model, output)
    remove_unused_nodes(model)


def remove_identity_reshapes(model: ir.Model, value: ir.Value) -> None:
    """Remove chains of reshapes and transposes that together are the identity."""
    waiting = [value]
    while waiting:
        for use in list(waiting.pop().uses()):
            if use.node.op_type in RESHAPES and len(use.node.outputs) == 1:
                moved = use.node.outputs[0]
                waiting.append(moved)
                found = columns(model, moved) if moved.shape is not None and len(moved.shape) == 3 else None
                if found and found[0] is value and np.array_equal(found[1], np.arange(value.shape[2])):
                    moved.replace_all_uses_with(value, replace_graph_outputs=True)


def prune_last_block_tokens(model: ir.Model) -> None:
    """Compute only the class token in the last block if the head reads no other token.

    Key and value still use every token; the layers after them work on each token separately.
    """
    for node in list(model.graph):
        if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 1:
            continue
        states = node.inputs[0]
        index = constant(node.inputs[1])
        if index is None or index.ndim or index < 0 or not _has_tokens(states) or len(list(states.uses())) > 1:
            continue
        attention = next((n for n in reversed(model.graph) if n.op_type == "Attention"), None)
        if attention is None or len(attention.inputs) != 3:
            continue
        token = _SingleToken(model, int(index), ancestors(attention.inputs[0])).of(states)
        node.replace_input_with(0, token)
        node.replace_input_with(1, weight(model, "first", np.array(0, np.int64)))
    remove_unused_nodes(model)


def ancestors(value: ir.Value) -> set[ir.Value]:
    """Return `value` and all values that it is computed from."""
    found = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if value is None or value in found:
            continue
        found.add(value)
        if value.producer() is not None:
            waiting.extend(value.producer().inputs)
    return found


class _SingleToken:
    """Recompute (batch, tokens, width) values for one token, as (batch, 1, width).

    Args:
        model: graph to add nodes to.
        index: index of the token.
        all_tokens: values that keep every token; the token is sliced from them.
    """

    def __init__(self, model: ir.Model, index: int, all_tokens: set[ir.Value]):
        self.model = model
        self.index = index
        self.all_tokens = all_tokens
        self.known: dict[ir.Value, ir.Value] = {}

    def of(self, value: ir.Value) -> ir.Value:
        if value not in self.known:
            self.known[value] = self._computed(value)
        return self.known[value]

    def _computed(self, value: ir.Value) -> ir.Value:
        node = value.producer()
        follow = value not in self.all_tokens and _has_tokens(value)
        if follow and node.op_type == "Attention" and node.domain == MICROSOFT and len(node.inputs) == 3:
            new = self._attention(node)
        elif follow and self._is_tokenwise(node):
            inputs = [v if constant(v) is not None else self.of(v) for v in node.inputs]
            attributes = {name: attribute.value for name, attribute in node.attributes.items()}
            new = add_node(node, node.op_type, inputs, domain=node.domain, **attributes)
        else:
            new = self._slice(value)
        new.dtype = value.dtype
        new.shape = None if value.shape is None else ir.Shape([value.shape[0], 1, value.shape[2]])
        return new

    def _is_tokenwise(self, node: ir.Node) -> bool:
        if node.op_type in ("Gelu", "BiasGelu"):
            return True
        if node.op_type == "LayerNormalization":
            return node.attributes.get_int("axis", -1) in (-1, 2)
        if node.op_type == "MatMul":
            return Linear.from_node(node) is not None
        if node.op_type not in ("Add", "Mul"):
            return False
        return all(constant(v).ndim <= 1 if constant(v) is not None else _has_tokens(v) for v in node.inputs)

    def _slice(self, value: ir.Value) -> ir.Value:
        bounds = {"start": self.index, "stop": self.index + 1, "axis": 1}
        inputs = [weight(self.model, f"token.{name}", np.array([number])) for name, number in bounds.items()]
        node = ir.node("Slice", [value, *inputs])
        value.producer().graph.insert_after(value.producer(), node)
        return node.outputs[0]

    def _attention(self, node: ir.Node) -> ir.Value:
        x = node.inputs[0]
        kernel = constant(node.inputs[1])
        bias = constant(node.inputs[2])
        width = kernel.shape[1] // 3
        query = add_linear(self.model, node, self.of(x), kernel[:, :width], bias[:width], "token.query")
        key_value = add_linear(self.model, node, x, kernel[:, width:], bias[width:], "token.key_value")
        split = ir.node("Split", [key_value], attributes={"axis": -1, "num_outputs": 2}, num_outputs=2)
        for output in split.outputs:
            output.dtype = x.dtype
            output.shape = x.shape
        node.graph.insert_before(node, split)
        heads = node.attributes.get_int("num_heads")
        return add_node(node, "MultiHeadAttention", [query, *split.outputs], domain=MICROSOFT, num_heads=heads)


def _has_tokens(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 3
