"""`quantize_onnx`: INT8 for ONNX Runtime or TensorRT, FP8 for TensorRT."""

import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from hfvit.errors import DataError, ModelError, nearest, wrap_library_errors
from hfvit.export.fp8 import to_fp8
from hfvit.export.half_precision import to_half, wide_values
from hfvit.export.int8_kernels import int8_graph
from hfvit.export.options import check_half_opset
from hfvit.utils.checks import check_name, checked_file
from hfvit.utils.files import expand_user, temporary_file
from hfvit.utils.quiet import log_level

MODES = ("int8", "int8-dynamic", "fp8")
RUNTIMES = ("onnxruntime", "tensorrt")
LINEAR = ("MatMul", "Gemm")


def quantize_onnx(
    source: str | Path,
    target: str | Path,
    *,
    mode: str = "int8",
    runtime: str = "onnxruntime",
    calibration: Iterable[np.ndarray] | None = None,
) -> dict[str, Any]:
    """Quantize a float32 ONNX file to INT8 or FP8.

    Args:
        source: float32 ONNX file.
        target: ONNX file to write.
        mode: "int8" or "fp8" (E4M3) for static ranges of activations from `calibration`, "int8-dynamic" for the range
            of each batch.
        runtime: "onnxruntime" for unsigned activations and signed weights (U8S8), "tensorrt" for symmetric ones (S8S8)
            and float biases, as its parser requires, with all else but LayerNorm and Softmax in fp16. "fp8" needs
            "tensorrt", "int8-dynamic" "onnxruntime".
        calibration: batches (batch, 3, height, width) float32; about 32 images suffice.

    Returns:
        A description of the quantization for export.json.

    Raises:
        ModelError: the graph cannot be quantized; no file is written.
        DataError: the calibration batches are not usable; no file is written.
        TypeError: a path is of another type.
    """
    _check_choice("mode", mode, MODES)
    _check_choice("runtime", runtime, RUNTIMES)
    if runtime == "tensorrt" and mode == "int8-dynamic":
        raise ModelError("mode: must be int8 or fp8 for TensorRT, got 'int8-dynamic'. Pass calibration images.")
    if runtime == "onnxruntime" and mode == "fp8":
        raise ModelError("runtime: must be tensorrt for mode fp8, got 'onnxruntime', which has no FP8 arithmetic.")
    check_name("source", source)
    source = expand_user(source)
    target = checked_file("target", target)
    model = load_float_graph(source)
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    if runtime == "tensorrt":
        check_half_opset(opset)
    is_static = mode != "int8-dynamic"
    if is_static and calibration is None:
        raise DataError(f"calibration: required for mode {mode}, got None. Pass batches, or mode int8-dynamic.")
    batches = Batches(model, calibration) if is_static else None
    # ONNX Runtime logs its steps through the root logger.
    with log_level(None, logging.ERROR), tempfile.TemporaryDirectory(prefix="hfvit_int8_") as folder:
        if runtime == "tensorrt":
            quantized, details = quantize_qdq(source, Path(folder), batches, symmetric=True, fp8=mode == "fp8")
            quantized, wide = rest_in_half(quantized, batches)
            details |= {"float_type": "fp16, LayerNorm and Softmax fp32", "float32_values": wide}
        else:
            quantized, details = int8_graph(model, batches)
    save_in_one_file(quantized, target)
    if batches is not None:
        details |= {"calibration_method": "MinMax, mean over batches", "calibration_images": batches.images}
    return {
        "tool": f"onnxruntime {onnxruntime.__version__}",
        "mode": mode,
        "runtime": runtime,
        **details,
        "weights": f"{mode.removesuffix('-dynamic')} symmetric, one scale per output channel",
        "kept_float": [
            "attention products",
            "LayerNorm",
            "Softmax",
            "GELU",
            *(["Conv"] * (runtime == "onnxruntime" or mode == "fp8")),
        ],
    }


def quantize_qdq(
    source: Path, folder: Path, batches: "Batches", *, symmetric: bool, fp8: bool = False
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Insert Q/DQ pairs around every matrix product with weights.

    Args:
        source: float32 ONNX file.
        folder: folder for intermediate files.
        batches: calibration batches.
        symmetric: symmetric activations and quantized convolutions, for TensorRT; ONNX Runtime would run convolutions
            with float output in float.
        fp8: FP8 instead of INT8, for symmetric activations; convolutions stay in float, as 3 bits of mantissa are few
            for pixel values.

    Returns:
        The graph with standard ONNX operators, and a description for export.json.
    """
    prepared = folder / "prepared.onnx"
    quantized = folder / "quantized.onnx"
    quant_pre_process(str(source), str(prepared))
    excluded = attention_products(onnx.load(prepared))
    types = [*LINEAR, "Conv"] if symmetric and not fp8 else list(LINEAR)
    quantize_static(
        prepared,
        quantized,
        batches,
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=types,
        per_channel=True,
        activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=excluded,
        extra_options={
            "ActivationSymmetric": symmetric,
            "WeightSymmetric": True,
            "CalibMovingAverage": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": types,
        },
    )
    model = to_fp8(quantized, prepared) if fp8 else onnx.load(quantized)
    constant = constants(model)
    products = sum(has_weight(node, constant) for node in model.graph.node)
    return model, {
        "method": "static, QuantizeLinear and DequantizeLinear",
        "activations": f"{'fp8' if fp8 else 'int8'} symmetric" if symmetric else "uint8",
        "integer_products": products,
        "float_products": len(excluded),
    }


def rest_in_half(model: onnx.ModelProto, batches: "Batches") -> tuple[onnx.ModelProto, int]:
    """Convert the rest of a Q/DQ graph to fp16, except for LayerNorm and Softmax.

    A strongly typed engine computes the products of attention in the type of the graph.

    Args:
        model: graph of `quantize_qdq`.
        batches: calibration batches, whose first one tells the ranges of values.

    Returns:
        The graph, and the number of values that stay in float32 because fp16 may not hold them.
    """
    graph = onnx_ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True))
    wide = wide_values(graph, [{batches.input.name: batches.sample}])
    to_half(graph, "fp16", wide)
    return onnx_ir.to_proto(graph), len(wide)


def load_float_graph(path: Path) -> onnx.ModelProto:
    """Load a float32 graph with one input (batch, 3, height, width).

    Raises:
        ModelError: the file is missing, not float32, already quantized, or has nothing to quantize.
    """
    if not path.is_file():
        raise ModelError(f"{path}: file not found.")
    with wrap_library_errors(ModelError, f"{path} is not a valid ONNX file", limit=300):
        model = onnx.load(path)
    inputs = [value for value in model.graph.input if value.name not in {w.name for w in model.graph.initializer}]
    kinds = [(value.type.tensor_type.elem_type, len(value.type.tensor_type.shape.dim)) for value in inputs]
    if kinds != [(onnx.TensorProto.FLOAT, 4)]:
        raise ModelError(
            f"{path}: must have one float32 input (batch, 3, height, width), got"
            f" {', '.join(value.name for value in inputs) or 'no input'}. Export it with dtype fp32 and without"
            " preprocessing."
        )
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear", "MatMulInteger") for node in model.graph.node):
        raise ModelError(f"{path} is already quantized. Pass the float32 file.")
    if not any(has_weight(node, constants(model)) for node in model.graph.node):
        raise ModelError(f"{path} has no matrix product with weights, so there is nothing to quantize.")
    return model


def constants(model: onnx.ModelProto) -> set[str]:
    """Return the names of all tensors that do not depend on the inputs."""
    names = {weight.name for weight in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" or (node.input and all(name in names for name in node.input if name)):
            names.update(node.output)
    return names


def has_weight(node: onnx.NodeProto, constant: set[str]) -> bool:
    """Return whether a matrix product has a constant operand."""
    return node.op_type in LINEAR and any(name in constant for name in node.input[:2])


def attention_products(model: onnx.ModelProto) -> list[str]:
    """Return the names of the matrix products of two activations."""
    constant = constants(model)
    return [node.name for node in model.graph.node if node.op_type in LINEAR and not has_weight(node, constant)]


class Batches(CalibrationDataReader):
    """Feed checked calibration batches to ONNX Runtime.

    The first batch is read in the constructor, so that errors appear before the long work.
    """

    def __init__(self, model: onnx.ModelProto, batches: Iterable[np.ndarray]):
        if isinstance(batches, str) or not isinstance(batches, Iterable):
            raise DataError(f"calibration: must be a list or generator of batches, got {batches!r}.")
        self.input = model.graph.input[0]
        self.batches = iter(batches)
        self.images = 0
        self.first = self._next()
        self.sample = self.first
        if self.first is None:
            raise DataError("calibration: must have at least one batch, got none.")

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch by input name, None at the end."""
        batch = self.first if self.first is not None else self._next()
        self.first = None
        if batch is None:
            return None
        self.images += len(batch)
        return {self.input.name: batch}

    def _next(self) -> np.ndarray | None:
        batch = next(self.batches, None)
        if batch is None:
            return None
        batch = np.asarray(batch)
        dims = [dim.dim_value or dim.dim_param or "?" for dim in self.input.type.tensor_type.shape.dim]
        fits = batch.ndim == len(dims) and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(dims, batch.shape, strict=True)
        )
        if batch.dtype != np.float32 or not fits or not len(batch):
            raise DataError(
                f"calibration: batches must be float32 {tuple(dims)}, as the graph's input, got {batch.dtype}"
                f" {batch.shape}."
            )
        if not np.isfinite(batch).all():
            raise DataError("calibration: values must be finite, got NaN or infinity.")
        return batch


def save_in_one_file(model: onnx.ModelProto, target: Path) -> None:
    """Check a graph and write it atomically, without metadata (local paths)."""
    del model.graph.value_info[:]  # fused and integer operators invalidate shapes of the float graph
    for node in model.graph.node:
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    onnx.checker.check_model(model)
    with temporary_file(target) as temporary:
        onnx.save(model, temporary)


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ModelError(f"{name}: must be one of {', '.join(known)}, got {value!r}.{nearest(str(value), known)}")
