"""`quantize_onnx`: INT8 for ONNX Runtime or TensorRT."""

import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from hfvit.errors import DataError, ModelError, nearest, wrap_library_errors
from hfvit.export.int8_kernels import int8_graph
from hfvit.utils.files import temporary_file
from hfvit.utils.quiet import log_level

MODES = ("int8", "int8-dynamic")
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
    """Write the INT8 version of the float32 graph `source` to `target`, one file, and return how it was made.

    Args:
        mode: "int8" fixes the ranges of activations from `calibration`; "int8-dynamic" finds them anew for each batch.
        runtime: "onnxruntime" takes unsigned activations and signed weights (U8S8); "tensorrt" symmetric ones (S8S8),
            as its parser demands, and float biases.
        calibration: batches `(batch, 3, height, width)` float32, as the graph's input takes them; some 32 images.

    Raises `ModelError` for a graph that cannot be quantised and `DataError` for unusable calibration images, and then
    leaves nothing under `target`.
    """
    _check_choice("mode", mode, MODES)
    _check_choice("runtime", runtime, RUNTIMES)
    if runtime == "tensorrt" and mode == "int8-dynamic":
        raise ModelError("TensorRT has no dynamic INT8: quantise with mode int8 and calibration images.")
    source, target = Path(source), Path(target)
    model = load_float_graph(source)
    if mode == "int8" and calibration is None:
        raise DataError("Static INT8 needs calibration images; give some, or take mode int8-dynamic.")
    batches = Batches(model, calibration) if mode == "int8" else None
    # ONNX Runtime logs its steps through the root logger.
    with log_level(None, logging.ERROR), tempfile.TemporaryDirectory(prefix="hfvit_int8_") as folder:
        if runtime == "tensorrt":
            quantized, facts = qdq(source, Path(folder), batches, symmetric=True)
        else:
            quantized, facts = int8_graph(model, batches)
    save_in_one_file(quantized, target)
    if batches is not None:
        facts |= {"calibration_method": "MinMax, mean over batches", "calibration_images": batches.images}
    return {
        "tool": f"onnxruntime {onnxruntime.__version__}",
        "mode": mode,
        "runtime": runtime,
        **facts,
        "weights": "int8 symmetric, one scale per output channel",
        "kept_float": ["attention products", "LayerNorm", "Softmax", "GELU", *(["Conv"] * (runtime == "onnxruntime"))],
    }


def qdq(source: Path, folder: Path, batches: "Batches", *, symmetric: bool) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """QuantizeLinear and DequantizeLinear around every product with a weight: ONNX's own operators alone.

    `folder` takes intermediate files. TensorRT wants `symmetric` activations, and quantises convolutions too; ONNX
    Runtime would run a convolution with float output in float anyway.
    """
    prepared, quantized = folder / "prepared.onnx", folder / "quantized.onnx"
    quant_pre_process(str(source), str(prepared))
    excluded = attention_products(onnx.load(prepared))
    types = [*LINEAR, "Conv"] if symmetric else list(LINEAR)
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
    model = onnx.load(quantized)
    constant = constants(model)
    products = sum(has_weight(node, constant) for node in model.graph.node)
    return model, {
        "method": "static, QuantizeLinear and DequantizeLinear",
        "activations": "int8 symmetric" if symmetric else "uint8",
        "integer_products": products,
        "float_products": len(excluded),
    }


def load_float_graph(path: Path) -> onnx.ModelProto:
    """The graph at `path`, checked: one float32 picture input `(batch, 3, height, width)`, products with weights."""
    if not path.is_file():
        raise ModelError(f"There is no file {path}.")
    with wrap_library_errors(ModelError, f"{path} is no ONNX file", limit=300):
        model = onnx.load(path)
    inputs = [value for value in model.graph.input if value.name not in {w.name for w in model.graph.initializer}]
    kinds = [(value.type.tensor_type.elem_type, len(value.type.tensor_type.shape.dim)) for value in inputs]
    if kinds != [(onnx.TensorProto.FLOAT, 4)]:
        raise ModelError(
            f"{path}: INT8 is made from a float32 graph with one input (batch, 3, height, width); this one has"
            f" {', '.join(value.name for value in inputs) or 'no input'}. Export it with dtype fp32 and without"
            " preprocessing."
        )
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear", "MatMulInteger") for node in model.graph.node):
        raise ModelError(f"{path} is quantised already; start from the float32 graph.")
    if not any(has_weight(node, constants(model)) for node in model.graph.node):
        raise ModelError(f"{path} has no matrix product with a weight: there is nothing to quantise.")
    return model


def constants(model: onnx.ModelProto) -> set[str]:
    """Names of all tensors that no input changes."""
    names = {weight.name for weight in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" or (node.input and all(name in names for name in node.input if name)):
            names.update(node.output)
    return names


def has_weight(node: onnx.NodeProto, constant: set[str]) -> bool:
    """Whether a product has a constant operand; attention products have none."""
    return node.op_type in LINEAR and any(name in constant for name in node.input[:2])


def attention_products(model: onnx.ModelProto) -> list[str]:
    """Names of the products of two activations."""
    constant = constants(model)
    return [node.name for node in model.graph.node if node.op_type in LINEAR and not has_weight(node, constant)]


class Batches(CalibrationDataReader):
    """Calibration batches for ONNX Runtime's calibrator, each checked against the graph's input.

    The first batch is read at once, so that a mistake shows before the long work.
    """

    def __init__(self, model: onnx.ModelProto, batches: Iterable[np.ndarray]):
        self.input = model.graph.input[0]
        self.batches = iter(batches)
        self.images = 0
        self.first = self._next()
        if self.first is None:
            raise DataError("There are no calibration images.")

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch, self.first = (self.first, None) if self.first is not None else (self._next(), None)
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
                f"Calibration batches must be float32 {tuple(dims)}, as the graph's input; one is {batch.dtype}"
                f" {batch.shape}."
            )
        if not np.isfinite(batch).all():
            raise DataError("A calibration batch holds NaN or infinite values.")
        return batch


def save_in_one_file(model: onnx.ModelProto, target: Path) -> None:
    """Check the graph and write it under a temporary name, then rename; nothing of this machine's paths goes along."""
    del model.graph.value_info[:]  # the float graph's: fused and integer operators leave some of them wrong
    for node in model.graph.node:
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    onnx.checker.check_model(model)
    with temporary_file(target) as temporary:
        onnx.save(model, temporary)


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ModelError(f"{name}: '{value}' is not one of {', '.join(known)}.{nearest(value, known)}")
