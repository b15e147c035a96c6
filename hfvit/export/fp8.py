"""FP8 Q/DQ graph for TensorRT."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnxruntime.quantization.quant_utils import TENSOR_NAME_QUANT_SUFFIX

from hfvit.export.graph import constant, remove_unused_nodes, weight

FP8 = ir.DataType.FLOAT8E4M3FN
INT8_MAX = 127
FP8_MAX = 448


def to_fp8(quantized: Path, source: Path) -> onnx.ModelProto:
    """Convert symmetric INT8 Q/DQ pairs to FP8 (E4M3).

    ONNX Runtime's quantizer scales FP8 values by their standard deviation, which clips the outliers of ViTs.

    Args:
        quantized: graph of ONNX Runtime's quantizer, whose scales are 1/127 of the largest magnitude.
        source: its source, with the float weights.
    """
    model = ir.load(quantized)
    weights = {name: constant(value) for name, value in ir.load(source).graph.initializers.items()}
    done: dict[str, ir.Value] = {}

    def converted(value: ir.Value, array: np.ndarray) -> ir.Value:
        if value.name not in done:
            done[value.name] = weight(model, f"{value.name}.fp8", array)
        return done[value.name]

    for node in model.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        x, scale, zero_point = node.inputs
        scales = constant(scale) * np.float32(INT8_MAX / FP8_MAX)
        if constant(x) is not None:
            array = weights[x.name.removesuffix(TENSOR_NAME_QUANT_SUFFIX)]
            axis = node.attributes.get_int("axis", 1)
            shape = [-1 if index == axis and scales.ndim else 1 for index in range(array.ndim)]
            node.replace_input_with(0, converted(x, (array / scales.reshape(shape)).astype(FP8.numpy())))
        node.replace_input_with(1, converted(scale, scales))
        node.replace_input_with(2, converted(zero_point, np.zeros(scales.shape, FP8.numpy())))
        if node.op_type == "QuantizeLinear":
            node.outputs[0].dtype = FP8
    remove_unused_nodes(model)
    return ir.to_proto(model)
