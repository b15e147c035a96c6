"""INT8 for ONNX Runtime: integer products of the fused graph, in the kernels that take a float bias and give float.

A QDQ graph leaves ONNX Runtime 1.32 with a separate bias, and its attention unfused; these operators of its own have
neither. Activations are unsigned, weights signed: the pair whose kernel uses VNNI (S8S8 is ten times slower).
"""

from collections.abc import Iterable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from hfvit.export.fuse import MICROSOFT, add_node, clean, constant, fuse, linears, replace, weight

Ranges = dict[str, tuple[float, float]]
# (scale, zero point, quantised value) of an activation
Quantized = tuple[ir.Value, ir.Value, ir.Value]


def int8_graph(
    model: onnx.ModelProto, batches: Iterable[dict[str, np.ndarray]] | None
) -> tuple[onnx.ModelProto, dict]:
    """The fused INT8 version of a float32 graph, and what it is; ranges from `batches`, or (None) of each batch run."""
    graph = ir.from_proto(model)
    fuse(graph)
    split_bias_gelus(graph)
    products = make_integer(graph, None if batches is None else measure_ranges(graph, batches))
    return ir.to_proto(graph), {
        "method": "dynamic, fused" if batches is None else "static, fused",
        "activations": "uint8, range of each batch" if batches is None else "uint8",
        "integer_products": products,
        "float_products": sum(n.op_type in ("MatMul", "Gemm") for n in graph.graph),
    }


def product_inputs(model: ir.Model) -> list[str]:
    """Names of the activations that a weight multiplies."""
    return list(
        dict.fromkeys([linear.x.name for linear in linears(model)] + [n.inputs[0].name for n in _attentions(model)])
    )


def measure_ranges(model: ir.Model, batches: Iterable[dict[str, np.ndarray]]) -> Ranges:
    """Least and greatest value of every product's activation: the mean over batches of each batch's own."""
    proto = ir.to_proto(model)
    names = product_inputs(model)
    for name in names:
        for kind in ("ReduceMin", "ReduceMax"):
            proto.graph.node.append(onnx.helper.make_node(kind, [name], [f"{name}.{kind}"], keepdims=0))
            proto.graph.output.append(onnx.helper.make_tensor_value_info(f"{name}.{kind}", onnx.TensorProto.FLOAT, []))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = [f"{name}.{kind}" for name in names for kind in ("ReduceMin", "ReduceMax")]
    means = np.mean([session.run(wanted, batch) for batch in batches], axis=0).reshape(-1, 2)
    return {name: (float(low), float(high)) for name, (low, high) in zip(names, means, strict=True)}


def make_integer(model: ir.Model, ranges: Ranges | None) -> int:
    """Replace the products by integer ones, with fixed `ranges` or (None) those of each batch; how many."""
    activation = _Static(model, ranges) if ranges is not None else _Dynamic()
    count = 0
    for node in _attentions(model):
        x, kernel, bias = node.inputs[0], constant(node.inputs[1]), node.inputs[2]
        scale, zero_point, quantized = activation(x, node)
        integer, scales = quantize_kernel(kernel)
        kernel_inputs = [
            weight(model, f"{node.inputs[1].name}.int8", integer),
            bias,
            scale,
            weight(model, f"{node.inputs[1].name}.scale", scales),
        ]
        output = add_node(
            node,
            "QAttention",
            [
                quantized,
                *kernel_inputs,
                None,
                zero_point,
                weight(model, f"{node.inputs[1].name}.zero", np.zeros(integer.shape[1], np.int8)),
            ],
            domain=MICROSOFT,
            like=node.outputs[0],
            num_heads=node.attributes.get_int("num_heads"),
        )
        replace(node.outputs[0], output)
        count += 1
    for linear in linears(model):
        name = linear.node.inputs[1].name
        integer, scales = quantize_kernel(linear.kernel)
        integer, scales = weight(model, f"{name}.int8", integer), weight(model, f"{name}.scale", scales)
        bias = None if linear.bias is None else weight(model, f"{name}.bias", linear.bias)
        before = linear.output.producer()
        if ranges is None:
            inputs, kind = [linear.x, integer, scales, None, bias], "DynamicQuantizeMatMul"
        else:
            scale, zero_point, quantized = activation(linear.x, before)
            inputs, kind = [quantized, integer, scale, scales, zero_point, None, bias], "MatMulIntegerToFloat"
        replace(linear.output, add_node(before, kind, inputs, domain=MICROSOFT, like=linear.output))
        count += 1
    clean(model)
    return count


def split_bias_gelus(model: ir.Model) -> None:
    """BiasGelu -> Add and Gelu: the integer product adds the bias for nothing."""
    for node in list(model.graph):
        if node.op_type == "BiasGelu":
            x, bias = node.inputs
            total = add_node(node, "Add", [x, bias], like=x)
            replace(node.outputs[0], add_node(node, "Gelu", [total], domain=MICROSOFT, like=x))
    clean(model)


def quantize_kernel(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`(in, out)` -> int8 and one scale an output channel; symmetric, so that zero stays zero."""
    scales = np.maximum(np.abs(kernel).max(axis=0), 1e-12) / 127
    return np.round(kernel / scales).astype(np.int8), scales.astype(np.float32)


def _attentions(model: ir.Model) -> list[ir.Node]:
    return [
        n
        for n in model.graph
        if n.op_type == "Attention" and n.domain == MICROSOFT and constant(n.inputs[1]) is not None
    ]


class _Static:
    def __init__(self, model: ir.Model, ranges: Ranges):
        self.model, self.ranges, self.known = model, ranges, {}

    def __call__(self, x: ir.Value, before: ir.Node) -> Quantized:
        if x.name not in self.known:
            low, high = self.ranges[x.name]
            low, high = min(low, 0.0), max(high, 0.0)
            scale = np.float32(max(high - low, 1e-12) / 255)
            scale_value = weight(self.model, f"{x.name}.scale", np.array(scale))
            zero_point = weight(self.model, f"{x.name}.zero_point", np.array(round(-low / scale), np.uint8))
            node = ir.node("QuantizeLinear", [x, scale_value, zero_point])
            node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.UINT8, x.shape
            x.producer().graph.insert_after(x.producer(), node)
            self.known[x.name] = scale_value, zero_point, node.outputs[0]
        return self.known[x.name]


class _Dynamic:
    def __call__(self, x: ir.Value, before: ir.Node) -> Quantized:
        node = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
        before.graph.insert_before(before, node)
        quantized, scale, zero_point = node.outputs
        quantized.dtype, scale.dtype, zero_point.dtype = ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8
        return scale, zero_point, quantized
