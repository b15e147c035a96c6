"""`optimum-cli export openvino`: export, quantize with NNCF, validate and save."""

import logging
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import Dim

from hfvit.artifacts.artifact import OPENVINO_SUFFIX
from hfvit.artifacts.export_folder import PACKAGES, file_digest
from hfvit.artifacts.export_record import ExportedFile
from hfvit.errors import DataError, ModelError, wrap_library_errors
from hfvit.export.onnx import (
    BATCH_AXIS,
    CHECKED_BATCHES,
    TRACED_BATCH,
    configured_image_size,
    exporting,
    in_eval_mode,
    input_channels,
    input_tensor,
)
from hfvit.export.parity import check_parity, tolerance
from hfvit.export.pipeline import Export
from hfvit.inference.openvino_backend import PRECISION_HINT, load_openvino
from hfvit.utils.environment import installed_versions
from hfvit.utils.files import commit_file, file_sha256
from hfvit.utils.optional import import_optional
from hfvit.utils.quiet import log_level, silenced

DTYPES = ("fp32", "fp16", "bf16")
# Precision of the computation; fp16 is that of the stored weights only, since CPUs do not compute in it.
HINTS = {"fp32": "f32", "fp16": "f32", "bf16": "bf16"}
# DINOv2-S at 224 px, difference of the logits relative to their spread: 7.0 % on 96 images and 17 % on noise, which
# the ranges do not cover; with INT8 attention and NNCF's alpha of 0.95 9.8 and 64 %, at about the same speed in bf16.
SMOOTH_QUANT_ALPHA = 0.5


def openvino_file(dtype: str = "fp32", quantize: str | None = None) -> str:
    """Return the file name of an OpenVINO variant.

    The default of optimum-intel is `openvino_model.xml`.

    Args:
        dtype: fp32, fp16 or bf16.
        quantize: int8 or None.
    """
    kind = quantize or (None if dtype == "fp32" else dtype)
    return f"openvino_model{f'_{kind}' if kind else ''}{OPENVINO_SUFFIX}"


@in_eval_mode
def export_openvino(
    model: torch.nn.Module,
    path: str | Path,
    *,
    dtype: str = "fp32",
    calibration: list[np.ndarray] | None = None,
    atol: float | None = None,
    image_size: tuple[int, int] | None = None,
    verbose: bool = False,
) -> ExportedFile:
    """Export an image classifier to OpenVINO and compare it with PyTorch.

    The graph maps `pixel_values` (batch_size, channels, height, width) to `logits` (batch_size, classes), both float32
    for any `dtype`.

    Args:
        model: image classifier in float32.
        path: .xml file to write; the weights are written to the .bin file beside it.
        dtype: "fp32"; "fp16" for weights stored in fp16; "bf16" for this, and computation in bf16 on CPUs that support
            it.
        calibration: batches (1, channels, height, width) float32 to quantize to INT8 with: NNCF's preset for
            transformers with SmoothQuant. `dtype` is then the precision of the remaining operators.
        atol: largest difference of a logit from PyTorch's; the default depends on `dtype` and the largest logit.
        image_size: (height, width) in pixels; None reads it from the model's configuration.
        verbose: show the exporter's output and warnings.

    Returns:
        The record of the file for export.json.

    Raises:
        ModelError: OpenVINO or NNCF is not installed, the model cannot be exported, or the logits differ from
            PyTorch's.
        DataError: there are no calibration images.
    """
    openvino = load_openvino()
    path = Path(path)
    if dtype not in DTYPES:
        raise ModelError(f"dtype: must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if calibration is not None:
        load_nncf()
        if not calibration:
            raise DataError("calibration: must have at least one batch, got none.")
    shape = (input_channels(model), *(image_size or configured_image_size(model)))
    program = _trace(model, shape, verbose)
    if calibration is not None:
        program = _quantize(program, calibration, verbose)
    program.set_rt_info(HINTS[dtype], list(PRECISION_HINT))
    openvino.save_model(program, path, compress_to_fp16=dtype != "fp32")
    kind = dtype if calibration is None else "int8"
    parity = check_parity(path, model, shape, CHECKED_BATCHES, tolerance(kind, atol), path.name)
    weights = path.with_suffix(".bin")
    digest = file_digest(path)
    return ExportedFile(
        sha256=digest["sha256"],
        bytes=digest["bytes"] + weights.stat().st_size,
        weights_sha256=file_sha256(weights),
        dtype=kind,
        versions=installed_versions(PACKAGES),
        input=input_tensor(shape, None, with_preprocessing=False),
        optimized=False,
        with_preprocessing=False,
        quantization=None if calibration is None else _describe(dtype, len(calibration)),
        parity=parity,
    )


def _describe(dtype: str, images: int) -> dict[str, Any]:
    """Return the record of a quantization."""
    return {
        "tool": f"nncf {version('nncf')}",
        "mode": "int8",
        "runtime": "openvino",
        "method": "static, preset for transformers with SmoothQuant",
        "remaining_operators": dtype,
        "kept_float": ["attention products", "LayerNorm", "Softmax", "GELU"],
        "calibration_images": images,
    }


def _trace(model: torch.nn.Module, shape: tuple[int, int, int], verbose: bool):
    """Export a model with transformers to an `openvino.Model`.

    Args:
        model: image classifier in float32.
        shape: (channels, height, width) of the pixel values.
        verbose: show the exporter's output and warnings.
    """
    from transformers.exporters import OpenVINOConfig, OpenVINOExporter

    device = next(model.parameters()).device
    pixel_values = torch.zeros((TRACED_BATCH, *shape), device=device)
    config = OpenVINOConfig(dynamic_shapes={"pixel_values": {0: Dim(BATCH_AXIS, min=1)}})
    with exporting(model, "OpenVINO", verbose):
        program = OpenVINOExporter().export(model, {"pixel_values": pixel_values}, config=config).program
    results = [result for result in program.get_results() if "logits" in result.input_value(0).get_names()]
    if not results:
        raise ModelError("The model must be an image classifier with the output logits.")
    program = load_openvino().Model(results, program.get_parameters(), "image_classifier")  # without other outputs
    program.reshape({"pixel_values": [-1, *shape]})  # the exporter leaves height and width dynamic
    return program


def _quantize(program, calibration: list[np.ndarray], verbose: bool):
    """Quantize the products with weights of an `openvino.Model` to INT8.

    Args:
        program: float32 model.
        calibration: batches (1, channels, height, width) float32.
        verbose: show NNCF's output and warnings.
    """
    nncf = load_nncf()
    with (
        silenced(verbose),
        log_level("nncf", logging.ERROR),
        wrap_library_errors(ModelError, "NNCF cannot quantize the model", limit=300),
    ):
        return nncf.quantize(
            program,
            nncf.Dataset(calibration),
            subset_size=len(calibration),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=attention_products(program), validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                # 7 bits for all weights: CPUs without VNNI add two products in 16 bits, which saturate with 8.
                overflow_fix=nncf.OverflowFix.ENABLE,
                smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=SMOOTH_QUANT_ALPHA),
            ),
        )


def attention_products(program) -> list[str]:
    """Return the names of the products of two activations in an `openvino.Model`."""
    names = []
    for node in program.get_ops():
        operands = [value.get_source_output().get_node().get_type_name() for value in node.inputs()]
        is_product = node.get_type_name() == "MatMul" and "Constant" not in operands
        if is_product or node.get_type_name() == "ScaledDotProductAttention":
            names.append(node.get_friendly_name())
    return names


def load_nncf():
    """Import NNCF.

    Raises:
        ModelError: NNCF is not installed.
    """
    return import_optional("nncf", "openvino", "INT8", ModelError)


class OpenVINOExport(Export):
    """Run `export openvino` with the model and the record of each exported file."""

    def float_files(self, staging: Path) -> None:
        """Export the float file."""
        name = openvino_file(self.options.dtype)
        self.log(f"exporting {name}")
        self.files[name] = self.export_file(staging / name)

    def quantized_file(self, staging: Path, calibration) -> None:
        """Quantize to INT8; other operators stay in the float file's precision."""
        name = openvino_file(quantize="int8")
        self.log(f"quantizing {name} with {len(calibration)} calibration images")
        self.files[name] = self.export_file(staging / name, list(self.batches(calibration)))
        self.files[name].calibration = calibration.record

    def export_file(self, path: Path, calibration: list[np.ndarray] | None = None) -> ExportedFile:
        """Export one file.

        Args:
            path: .xml file to write.
            calibration: calibration batches of an INT8 file.
        """
        options = self.options
        return export_openvino(
            self.model,
            path,
            dtype=options.dtype,
            calibration=calibration,
            atol=options.atol,
            image_size=self.shape[1:],
            verbose=options.verbose,
        )

    def batches(self, calibration) -> Iterator[np.ndarray]:
        """Yield pixel values (1, 3, height, width) of calibration images for NNCF."""
        for batch in super().batches(calibration):
            yield from np.split(batch, len(batch))

    def save(self, staging: Path) -> None:
        """Rename the weights into the output folder, then the files that read them."""
        for name in self.kept:
            weights = Path(name).with_suffix(".bin")
            (self.folder / name).unlink(missing_ok=True)  # otherwise, it would read the new weights
            commit_file(staging / weights, self.folder / weights)
        super().save(staging)
