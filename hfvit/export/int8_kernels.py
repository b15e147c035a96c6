"""INT8 graph with ONNX Runtime's fused integer kernels."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from hfvit.export.fusion import fuse
from hfvit.export.graph import (
    MICROSOFT,
    Linear,
    add_node,
    constant,
    cpu_session,
    linears,
    remove_unused_nodes,
    replace,
    weight,
)

Batches = Iterable[dict[str, np.ndarray]]
Ranges = dict[str, tuple[float, float]]
REDUCTIONS = ("ReduceMin", "ReduceMax")


def int8_graph(model: onnx.ModelProto, batches: Batches | None) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Fuse and quantize a float32 graph for ONNX Runtime on CPUs.

    Args:
        model: float32 graph.
        batches: calibration batches for static ranges of activations; None computes the range of each batch.

    Returns:
        The INT8 graph, and a description for export.json.
    """
    graph = ir.from_proto(model)
    fuse(graph)
    split_bias_gelus(graph)
    ranges = None if batches is None else measure_ranges(graph, batches)
    products = quantize_products(graph, ranges)
    return ir.to_proto(graph), {
        "method": "dynamic, fused" if ranges is None else "static, fused",
        "activations": "uint8, range of each batch" if ranges is None else "uint8",
        "integer_products": products,
        "float_products": sum(node.op_type in ("MatMul", "Gemm") for node in graph.graph),
    }


def split_bias_gelus(model: ir.Model) -> None:
    """Split BiasGelu into Add and Gelu, as integer products add the bias at no cost."""
    for node in list(model.graph):
        if node.op_type == "BiasGelu":
            x, bias = node.inputs
            total = add_node(node, "Add", [x, bias], like=x)
            replace(node.outputs[0], add_node(node, "Gelu", [total], domain=MICROSOFT, like=x))
    remove_unused_nodes(model)


def attentions(model: ir.Model) -> list[ir.Node]:
    """Return the fused Attention nodes with constant weights."""
    nodes = [node for node in model.graph if node.op_type == "Attention" and node.domain == MICROSOFT]
    return [node for node in nodes if constant(node.inputs[1]) is not None]


def measure_ranges(model: ir.Model, batches: Batches) -> Ranges:
    """Return each activation's (min, max) by its name, averaged over batches."""
    inputs = [linear.x for linear in linears(model)] + [node.inputs[0] for node in attentions(model)]
    names = list(dict.fromkeys(value.name for value in inputs))
    proto = ir.to_proto(model)
    for name in names:
        for reduction in REDUCTIONS:
            output = f"{name}.{reduction}"
            proto.graph.node.append(onnx.helper.make_node(reduction, [name], [output], keepdims=0))
            proto.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, []))
    session = cpu_session(proto)
    wanted = [f"{name}.{reduction}" for name in names for reduction in REDUCTIONS]
    means = np.mean([session.run(wanted, batch) for batch in batches], axis=0).reshape(-1, 2)
    return {name: (float(low), float(high)) for name, (low, high) in zip(names, means, strict=True)}


def quantize_products(model: ir.Model, ranges: Ranges | None) -> int:
    """Replace matrix products with weights by integer ones, in place.

    Args:
        model: fused float32 graph.
        ranges: (min, max) of each activation; None computes the range of each batch.

    Returns:
        The number of integer products.
    """
    activations = _Activations(model, ranges)
    nodes = attentions(model)
    layers = linears(model)
    for node in nodes:
        replace(node.outputs[0], _integer_attention(model, node, activations))
    for linear in layers:
        if ranges is None:
            integer, scales, bias = _integer_weights(model, linear)
            operator = "DynamicQuantizeMatMul"
            inputs = [linear.x, integer, scales, None, bias]
        else:
            x, scale, zero_point = activations.quantized(linear.x)
            integer, scales, bias = _integer_weights(model, linear)
            operator = "MatMulIntegerToFloat"
            inputs = [x, integer, scale, scales, zero_point, None, bias]
        last = linear.output.producer()
        replace(linear.output, add_node(last, operator, inputs, domain=MICROSOFT, like=linear.output))
    remove_unused_nodes(model)
    return len(nodes) + len(layers)


def quantize_kernel(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize weights (in, out) to symmetric int8, one scale per output channel.

    CPUs without VNNI add the products of two adjacent inputs in 16 bits, which saturate: 255 * (127 + 127) is above
    2^15 - 1. The scales are such that the weights of two adjacent inputs add up to at most 128 in either direction, so
    that all CPUs compute the same. `reduce_range` of ONNX Runtime avoids this with 7 bits for all weights.
    """
    pairs = np.pad(kernel, ((0, len(kernel) % 2), (0, 0))).reshape(-1, 2, kernel.shape[1])
    largest = np.maximum(np.maximum(pairs, 0).sum(axis=1), np.maximum(-pairs, 0).sum(axis=1)).max(axis=0)
    scales = np.maximum(largest, np.float32(1e-12)) / np.float32(127)  # rounding adds at most 1 to the sum of a pair
    return np.round(kernel / scales).astype(np.int8), scales


def _integer_weights(model: ir.Model, linear: Linear) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    name = linear.node.inputs[1].name
    integer, scales = quantize_kernel(linear.kernel)
    bias = None if linear.bias is None else weight(model, f"{name}.bias", linear.bias)
    return weight(model, f"{name}.int8", integer), weight(model, f"{name}.scale", scales), bias


def _integer_attention(model: ir.Model, node: ir.Node, activations: "_Activations") -> ir.Value:
    """Insert QAttention: integer projections, float products of query, key and value."""
    name = node.inputs[1].name
    heads = node.attributes.get_int("num_heads")
    integer, scales = quantize_kernel(constant(node.inputs[1]))
    zeros = weight(model, f"{name}.zero_point", np.zeros(len(scales), np.int8))
    integer, scales = weight(model, f"{name}.int8", integer), weight(model, f"{name}.scale", scales)
    x, scale, zero_point = activations.quantized(node.inputs[0])
    inputs = [x, integer, node.inputs[2], scale, scales, None, zero_point, zeros]
    return add_node(node, "QAttention", inputs, domain=MICROSOFT, like=node.outputs[0], num_heads=heads)


class _Activations:
    """Quantize each activation once, for all products that read it."""

    def __init__(self, model: ir.Model, ranges: Ranges | None):
        self.model = model
        self.ranges = ranges
        self.known: dict[str, list[ir.Value]] = {}

    def quantized(self, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Return `x` as uint8, its scale and its zero point."""
        if x.name not in self.known:
            dynamic = self.ranges is None
            node = ir.node("DynamicQuantizeLinear", [x], num_outputs=3) if dynamic else self._static(x)
            x.producer().graph.insert_after(x.producer(), node)
            outputs = [*node.outputs, *node.inputs[1:]]
            for value, dtype in zip(outputs, (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8), strict=True):
                value.dtype = dtype
            self.known[x.name] = outputs
        return self.known[x.name]

    def _static(self, x: ir.Value) -> ir.Node:
        low, high = self.ranges[x.name]
        low = min(low, 0.0)  # zero must be exactly representable
        high = max(high, 0.0)
        scale = max(high - low, 1e-12) / 255
        scale_value = weight(self.model, f"{x.name}.scale", np.array(scale, np.float32))
        zero_point = weight(self.model, f"{x.name}.zero_point", np.array(round(-low / scale), np.uint8))
        return ir.node("QuantizeLinear", [x, scale_value, zero_point])
