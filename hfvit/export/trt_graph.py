"""An ONNX file as TensorRT will take it: its precision, its input and output, and what the parser would not read."""

from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from hfvit.errors import ModelError, one_line

FLOATS = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
FP8 = {TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FNUZ, TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E5M2FNUZ}
PRODUCTS = ("MatMul", "Gemm", "Conv")
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
EXPORT = "optimum-cli export onnx --model MODEL"


@dataclass(frozen=True)
class GraphFacts:
    """`dtype` is what the products with weights compute in; `image` is (channels, height, width).

    `batch` is the only batch size that the graph takes, or None when its batch axis is free.
    """

    dtype: str
    input: str
    output: str
    image: tuple[int, int, int]
    classes: int
    batch: int | None


def read_graph(path: Path) -> GraphFacts:
    """The facts of the file at `path`; raises `ModelError` for one that no engine can be built from."""
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's own exceptions share no class
        raise ModelError(f"{path} is no ONNX file: {one_line(error)[:300]}") from None
    _check_operators(path, model)
    weights = {weight.name: weight.data_type for weight in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    shapes = [[dim.dim_value or None for dim in value.type.tensor_type.shape.dim] for value in inputs]
    kinds = [value.type.tensor_type.elem_type for value in inputs]
    if kinds == [TensorProto.UINT8]:
        raise ModelError(
            f"{path} takes raw pictures of any size, which no optimisation profile describes; export it without"
            " --with-preprocessing."
        )
    if len(inputs) != 1 or kinds[0] not in FLOATS or len(shapes[0]) != 4 or None in shapes[0][1:]:
        names = ", ".join(value.name for value in inputs) or "no input"
        raise ModelError(
            f"{path} is no image classifier with one input (batch, channels, height, width) whose image size is"
            f" fixed: it takes {names} {shapes}."
        )
    outputs = list(model.graph.output)
    output = next((value for value in outputs if value.name == "logits"), outputs[0])
    shape = [dim.dim_value for dim in output.type.tensor_type.shape.dim]
    if len(shape) != 2 or not shape[1]:
        raise ModelError(f"{path} gives {output.name} {shape}, where (batch, classes) is expected.")
    batch, *image = shapes[0]
    return GraphFacts(_dtype(model, weights), inputs[0].name, output.name, tuple(image), shape[1], batch)


def _check_operators(path: Path, model: onnx.ModelProto) -> None:
    """Name the first node that is ONNX Runtime's own, or whose 8-bit values are not symmetric."""
    values = {weight.name: weight for weight in model.graph.initializer}
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise ModelError(
                f"{path}: {_named(node)} is an operator of {node.domain}, which ONNX Runtime alone knows. Take the"
                f" file of {EXPORT}, without --optimize (for INT8 with --quantize int8 --target tensorrt)."
            )
        if node.op_type in ("MatMulInteger", "ConvInteger", "DynamicQuantizeLinear", "QLinearMatMul", "QLinearConv"):
            raise ModelError(f"{path}: {_named(node)} is INT8 for ONNX Runtime. {_int8_again()}")
        if node.op_type in QUANTIZERS and len(node.input) > 2 and node.input[2] in values:
            zero = onnx.numpy_helper.to_array(values[node.input[2]])
            if zero.dtype == "uint8" or zero.astype("float32").any():
                raise ModelError(
                    f"{path}: {_named(node)} is not symmetric (its zero point is {zero.dtype}, {zero.ravel()[0]}), and"
                    f" TensorRT takes symmetric INT8 only. {_int8_again()}"
                )


def _dtype(model: onnx.ModelProto, weights: dict[str, int]) -> str:
    """The precision of products with weights: that of Q/DQ pairs where there are any, else of most weights."""
    if any(node.op_type in QUANTIZERS for node in model.graph.node):
        return "fp8" if any(kind in FP8 for kind in weights.values()) else "int8"
    counts = dict.fromkeys(FLOATS.values(), 0)
    ranks = {weight.name: len(weight.dims) for weight in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in PRODUCTS:
            for name in node.input:
                if weights.get(name) in FLOATS and ranks[name] > 1:
                    counts[FLOATS[weights[name]]] += 1
    return max(counts, key=counts.get)


def _named(node: onnx.NodeProto) -> str:
    return f"the node {node.name or node.output[0]} ({node.op_type})"


def _int8_again() -> str:
    return f"Make it with {EXPORT} --quantize int8 --target tensorrt."
