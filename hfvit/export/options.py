"""Options of the export commands that have an effect only with others."""

import argparse
from collections.abc import Iterable
from numbers import Integral
from typing import Any

from hfvit.errors import ModelError

CALIBRATED = ("int8", "fp8")  # modes of quantization with calibration images
CALIBRATION = ("calibration_dataset", "calibration_split", "calibration_samples")
GATE = ("max_accuracy_drop", "min_agreement", "gate_samples")
# Defaults of options whose parsed default is None, so that a given value can be told from it.
CALIBRATION_SAMPLES = 128
MAX_ACCURACY_DROP = 0.5
GATE_SAMPLES = 5000
OPSETS = (18, 19, 20, 21, 22, 23)
# Options of `export onnx` that the commands for other formats do not have, and their values there.
ONNX_ONLY = {"optimize": False, "with_preprocessing": False, "batch_size": 1, "no_dynamic_axes": False}
HALF_OPSET = 19  # the first one with Q/DQ of fp16 and of FP8


def as_onnx_options(options: argparse.Namespace, target: str, **values: Any) -> argparse.Namespace:
    """Convert the options of a command for another format to those of `export onnx`.

    Args:
        options: parsed options.
        target: runtime of the files: openvino, executorch or tensorrt.
        **values: options to replace or to add.
    """
    return argparse.Namespace(**{"quantize": None, **vars(options), **ONNX_ONLY, "target": target, **values})


def refuse_unused(options: argparse.Namespace, names: Iterable[str], reason: str) -> None:
    """Raise `ModelError` for a given option that would have no effect.

    Args:
        options: parsed options; None is one that was not given.
        names: names of the options to check.
        reason: why they would have no effect, such as "only used with --quantize".
    """
    for name in names:
        if (value := getattr(options, name)) is not None:
            raise ModelError(f"--{name}: {reason}, got {value}. Omit it.")


def check_opset(opset: int | None, quantized_for_tensorrt: bool = False) -> None:
    """Check the ONNX opset of an export.

    Args:
        opset: ONNX opset, None for the exporter's default.
        quantized_for_tensorrt: whether the graph is a quantized one for TensorRT.

    Raises:
        ModelError: the opset is not supported.
    """
    if opset is not None and (opset not in OPSETS or not isinstance(opset, Integral)):
        raise ModelError(f"opset: must be an integer between {OPSETS[0]} and {OPSETS[-1]}, got {opset!r}.")
    if opset is not None and quantized_for_tensorrt:
        check_half_opset(opset)


def check_half_opset(opset: int) -> None:
    """Raise `ModelError` if a quantized graph for TensorRT cannot have an ONNX opset."""
    if opset < HALF_OPSET:
        raise ModelError(
            f"opset: must be {HALF_OPSET} or above for a quantized graph for TensorRT, got {opset}. Omit opset."
        )


def check_gate(options: argparse.Namespace, files_in_bf16: bool = False) -> None:
    """Raise `ModelError` for a limit of the accuracy gate that applies to no file.

    Args:
        options: parsed options.
        files_in_bf16: whether all files are ONNX files in bf16.
    """
    if options.no_gate:
        refuse_unused(options, GATE, "not used with --no_gate")
    if files_in_bf16:
        refuse_unused(options, GATE, "not used with --dtype bf16, which ONNX Runtime cannot compute in on CPUs")
