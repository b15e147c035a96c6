"""Compare an ONNX file with the PyTorch model."""

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

# Largest difference of a logit from PyTorch's float32, as a share of the largest logit (or of 1 if that is smaller).
DEFAULT_ATOL = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}
# 8-bit levels by which a resize inside the graph may differ from the processor's own at any pixel. Pillow and
# torchvision, with fixed-point weights and passes in an order that follows the size, differ as much from each other;
# another filter or size, or a crop one pixel beside, differs by dozens.
MAX_LEVELS = 2.0
# What INT8 may change of the logits without `--atol`: the norm of the difference over that of the logits' deviations
# from their mean. A working graph has a few percent, noise 1.4.
MAX_RELATIVE_ERROR = 0.5
PICTURE_SIZES = ((97, 131), (40, 33), (301, 223))


def tolerance(dtype: str, atol: float | None) -> dict:
    """What `check_parity` holds a file to: a user's `atol` as it is, or a default that scales with the logits."""
    if atol is not None:
        return {"atol": atol, "scaled": False}
    return {"relative": MAX_RELATIVE_ERROR} if dtype == "int8" else {"atol": DEFAULT_ATOL[dtype], "scaled": True}


def check_onnx(path: Path) -> None:
    """Raise `ModelError` unless the file is a valid ONNX model."""
    with wrap_library_errors(ModelError, "The exported graph is not valid ONNX", limit=300):
        onnx.checker.check_model(str(path), full_check=True)


@torch.inference_mode()
def check_parity(
    path: Path, model: torch.nn.Module, shape: tuple[int, int, int], batch_sizes: list[int], limit: dict, what: str
) -> Parity:
    """Compare ONNX Runtime with PyTorch on random pixel values; `ModelError` when they differ beyond `limit`."""
    runtime = cpu_session(path)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    logits, expected = [], []
    for batch_size in batch_sizes:
        pixel_values = torch.randn((batch_size, *shape), generator=generator)
        feed = {"pixel_values": pixel_values, **compared_texts(model, batch_size, generator)}
        expected.append(model(**{key: values.to(device) for key, values in feed.items()}).logits.float().cpu().numpy())
        logits.append(runtime.run(["logits"], {key: values.numpy() for key, values in feed.items()})[0])
        if logits[-1].shape != expected[-1].shape:
            raise ModelError(f"{what}: logits of shape {logits[-1].shape} where PyTorch gives {expected[-1].shape}.")
    logits, expected = np.concatenate(logits), np.concatenate(expected)
    worst, largest = float(np.abs(logits - expected).max()), float(np.abs(expected).max())
    deviation = float(np.linalg.norm(expected - expected.mean(axis=1, keepdims=True)))
    relative = float(np.linalg.norm(logits - expected)) / max(deviation, 1e-6)
    atol = limit.get("atol")
    if atol is not None and limit["scaled"]:
        atol *= max(1.0, largest)
    if not worst <= (atol if atol is not None else np.finfo(np.float32).max):  # NaN is no small difference either
        raise ModelError(
            f"{what}: a logit differs from PyTorch's by {worst:.2g}"
            + (f" where {atol:.2g} is allowed" if atol is not None else "")
            + ", so the file was not kept. Allow more with --atol, or choose another --dtype or --opset."
        )
    if relative > limit.get("relative", np.inf):
        raise ModelError(
            f"{what}: the logits differ from PyTorch's by {relative:.0%} of their spread ({limit['relative']:.0%}"
            f" allowed; {worst:.2g} at most), so the file was not kept. Calibrate with pictures like those that it"
            " will see, or allow more with --atol."
        )
    return Parity(
        batch_sizes=batch_sizes,
        max_abs_difference=worst,
        max_abs_logit=largest,
        relative_error=relative,
        atol=atol,
    )


def check_pixels(path: Path, core: Path, processor, batch_sizes: list[int], what: str) -> PreprocessingParity:
    """Compare a graph that does its own preprocessing with the image processor, at several picture sizes.

    The steps alone must give the processor's pixel values within `MAX_LEVELS`; the whole graph must give what `core`,
    the same graph without them, makes of these pixel values.
    """
    opset = next(entry.version for entry in onnx.load(core, load_external_data=False).opset_import if not entry.domain)
    steps = cpu_session(preprocessing_graph(processor, opset))
    whole, rest = cpu_session(path), cpu_session(core)
    rng = np.random.default_rng(0)
    levels = share = difference = 0.0
    level = _one_level(image_steps(processor))
    for batch_size, (height, width) in product(batch_sizes, PICTURE_SIZES):
        pixels = _pictures(rng, batch_size, height, width)
        expected = processor([Image.fromarray(picture) for picture in pixels], return_tensors="pt")["pixel_values"]
        (pixel_values,) = steps.run(None, {"pixels": pixels})
        if pixel_values.shape != tuple(expected.shape):
            raise ModelError(f"{what}: pixel values {pixel_values.shape}, the processor's {tuple(expected.shape)}.")
        off = np.abs(pixel_values - expected.numpy()) / level
        levels, share = max(levels, float(off.max())), max(share, float((off > 0.5).mean()))
        logits = [part.run(["logits"], feed)[0] for part, feed in (
            (whole, {"pixels": pixels}), (rest, {"pixel_values": pixel_values}),
        )]  # fmt: skip
        difference = max(difference, float(np.abs(logits[0] - logits[1]).max()))
    if levels > MAX_LEVELS + 0.01 or not difference <= 1e-3:
        raise ModelError(
            f"{what}: the preprocessing inside the graph differs from the image processor by up to {levels:.2f} levels"
            f" of 255, at {share:.1%} of the pixels (logits by {difference:.2g}), so the file was not kept. Export"
            " without --with_preprocessing."
        )
    return PreprocessingParity(picture_sizes=list(PICTURE_SIZES), max_levels=levels, share_off=share)


def _pictures(rng: np.random.Generator, batch_size: int, height: int, width: int) -> np.ndarray:
    """Noise over a gradient, `(batch, height, width, 3)` uint8: every level, sharp and smooth."""
    ramp = np.linspace(0, 155, width, dtype=np.float32)[None, None, :, None]
    return (ramp + rng.integers(0, 101, (batch_size, height, width, 3))).astype(np.uint8)


def _one_level(steps: ImageSteps) -> np.ndarray:
    """What one of 255 levels is worth in pixel values, `(1, 3, 1, 1)`."""
    std = steps.std or (1.0, 1.0, 1.0)
    return np.float32(steps.scale if steps.scale is not None else 1.0) / np.float32(std).reshape(1, 3, 1, 1)
