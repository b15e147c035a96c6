"""Compare an ONNX file with the PyTorch model."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import torch
from PIL import Image

from hfvit.artifacts.export_record import Parity, PreprocessingParity
from hfvit.errors import ModelError, wrap_library_errors
from hfvit.export.graph import cpu_session
from hfvit.export.preprocessing import preprocessing_graph
from hfvit.export.processor_steps import ImageSteps, image_steps
from hfvit.export.text_inputs import compared_texts

# Allowed difference of a logit from PyTorch's in float32, relative to max(1, largest logit).
DEFAULT_ATOL = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}
# Allowed difference of a resize in the graph from the image processor, in levels of 255. The graph equals Pillow 12;
# Pillow 13 resizes some images down before across, and torchvision rounds the weights otherwise. A wrong filter, size
# or crop differs by dozens.
MAX_LEVELS = 2.0
# Default limit for INT8 and FP8: norm of the difference over the norm of the logits' deviations from their mean, or of
# the logits of a single class, where that is above 1 per logit. A correct graph has a few percent, noise 1.4.
MAX_RELATIVE_ERROR = 0.5
IMAGE_SIZES = ((97, 131), (40, 33), (301, 223))


def tolerance(dtype: str, atol: float | None) -> dict:
    """Return the limits for `check_parity`, from `atol` or the default of `dtype`."""
    if atol is not None:
        return {"atol": atol, "scaled": False}
    if dtype in DEFAULT_ATOL:
        return {"atol": DEFAULT_ATOL[dtype], "scaled": True}
    return {"relative": MAX_RELATIVE_ERROR}


def check_onnx(path: Path) -> None:
    """Raise `ModelError` unless the file is a valid ONNX model."""
    with wrap_library_errors(ModelError, "The exported graph is not valid ONNX", limit=300):
        onnx.checker.check_model(str(path), full_check=True)


@torch.inference_mode()
def check_parity(
    path: Path, model: torch.nn.Module, shape: tuple[int, int, int], batch_sizes: list[int], limit: dict, name: str
) -> Parity:
    """Compare the logits of ONNX Runtime and PyTorch on random pixel values.

    Args:
        path: ONNX file.
        model: PyTorch model in float32.
        shape: (channels, height, width) of the pixel values.
        batch_sizes: batch sizes to compare.
        limit: allowed differences, of `tolerance`.
        name: file name for messages.

    Raises:
        ModelError: the logits differ by more than `limit`.
    """
    runtime = cpu_session(path, prepack=False)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    logits = []
    expected = []
    for batch_size in batch_sizes:
        pixel_values = torch.randn((batch_size, *shape), generator=generator)
        feed = {"pixel_values": pixel_values, **compared_texts(model, batch_size, generator)}
        expected.append(model(**{key: values.to(device) for key, values in feed.items()}).logits.float().cpu().numpy())
        logits.append(runtime.run(["logits"], {key: values.numpy() for key, values in feed.items()})[0])
        if logits[-1].shape != expected[-1].shape:
            raise ModelError(f"{name}: logits must have the shape {expected[-1].shape}, got {logits[-1].shape}.")
    logits = np.concatenate(logits)
    expected = np.concatenate(expected)
    worst = float(np.abs(logits - expected).max())
    largest = float(np.abs(expected).max())
    if expected.shape[1] == 1:  # its deviation from the mean of all classes is 0
        deviation = max(float(np.linalg.norm(expected)), math.sqrt(len(expected)))
    else:
        deviation = float(np.linalg.norm(expected - expected.mean(axis=1, keepdims=True)))
    relative = float(np.linalg.norm(logits - expected)) / max(deviation, 1e-6)
    atol = limit.get("atol")
    if atol is not None and limit["scaled"]:
        atol *= max(1.0, largest)
    if not worst <= (atol if atol is not None else np.finfo(np.float32).max):  # `not <=` also rejects NaN
        raise ModelError(
            f"{name}: a logit differs from PyTorch's by {worst:.2g}"
            + (f" (allowed: {atol:.2g})" if atol is not None else "")
            + ". No file was written. Pass --atol to allow more, or another --dtype or --opset."
        )
    if relative > limit.get("relative", np.inf):
        raise ModelError(
            f"{name}: the logits differ from PyTorch's by {relative:.0%} of their spread (allowed:"
            f" {limit['relative']:.0%}; largest difference: {worst:.2g}). No file was written. Calibrate with images"
            " of the target domain, or pass --atol to allow more."
        )
    return Parity(
        batch_sizes=batch_sizes,
        max_abs_difference=worst,
        max_abs_logit=largest,
        relative_error=relative,
        atol=atol,
    )


def check_pixels(path: Path, core: Path, processor, batch_sizes: list[int], name: str) -> PreprocessingParity:
    """Compare preprocessing inside a graph with the image processor.

    The pixel values must agree within `MAX_LEVELS`, and the logits must equal those of `core` for these pixel values.

    Args:
        path: ONNX file with preprocessing.
        core: the same graph without preprocessing.
        processor: image processor.
        batch_sizes: batch sizes to compare.
        name: file name for messages.

    Raises:
        ModelError: pixel values or logits differ.
    """
    opset = next(entry.version for entry in onnx.load(core, load_external_data=False).opset_import if not entry.domain)
    steps = cpu_session(preprocessing_graph(processor, opset))
    full_session = cpu_session(path)
    core_session = cpu_session(core)
    rng = np.random.default_rng(0)
    levels = fraction = difference = 0.0
    level = _one_level(image_steps(processor))
    for batch_size, (height, width) in product(batch_sizes, IMAGE_SIZES):
        pixels = _random_images(rng, batch_size, height, width)
        expected = processor([Image.fromarray(image) for image in pixels], return_tensors="pt")["pixel_values"]
        (pixel_values,) = steps.run(None, {"pixels": pixels})
        if pixel_values.shape != tuple(expected.shape):
            raise ModelError(
                f"{name}: pixel values must have the shape {tuple(expected.shape)}, got {pixel_values.shape}."
            )
        off = np.abs(pixel_values - expected.numpy()) / level
        levels = float(np.maximum(levels, off.max()))
        fraction = max(fraction, float((off > 0.5).mean()))
        (logits,) = full_session.run(["logits"], {"pixels": pixels})
        (core_logits,) = core_session.run(["logits"], {"pixel_values": pixel_values})
        difference = float(np.maximum(difference, np.abs(logits - core_logits).max()))  # `max` would drop NaN
    if not (levels <= MAX_LEVELS + 0.01 and difference <= 1e-3):  # also of NaN
        raise ModelError(
            f"{name}: the preprocessing in the graph differs from the image processor by up to {levels:.2f} levels of"
            f" 255, at {fraction:.1%} of the pixels (logits by {difference:.2g}). No file was written. Export it"
            " without --with_preprocessing."
        )
    return PreprocessingParity(picture_sizes=list(IMAGE_SIZES), max_levels=levels, share_off=fraction)


def _random_images(rng: np.random.Generator, batch_size: int, height: int, width: int) -> np.ndarray:
    """Return noise over a gradient as uint8 images (batch, height, width, 3)."""
    ramp = np.linspace(0, 155, width, dtype=np.float32)[None, None, :, None]
    return (ramp + rng.integers(0, 101, (batch_size, height, width, 3))).astype(np.uint8)


def _one_level(steps: ImageSteps) -> np.ndarray:
    """Return the size of one of 255 levels in pixel values, (1, 3, 1, 1)."""
    std = steps.std or (1.0, 1.0, 1.0)
    return np.float32(steps.scale if steps.scale is not None else 1.0) / np.float32(std).reshape(1, 3, 1, 1)
