"""Compare an export with its checkpoint on photographs of odd sizes."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import Image

from hfvit.artifacts.export_record import ImageParity
from hfvit.errors import ModelError, wrap_library_errors
from hfvit.export.onnx_file import mapped_file
from hfvit.inference.classifier import Classifier, load_classifier

# (height, width) in pixels, of both orientations.
SIZES = ((91, 331), (405, 233), (97, 131), (217, 426), (333, 499), (499, 271), (129, 90), (375, 251))
# Allowed difference of a logit, relative to the spread of the checkpoint's logits (the largest minus the smallest).
LIMITS = {"fp32": 1e-3, "fp16": 2e-2}
# Rounding errors in float32, relative to max(1, largest logit).
ROUNDING = 1e-4
TEXT = "a photograph"  # of each image, for image-text models
FEW = 2  # photographs to compare the logits of, where more would not tell more


def photographs() -> list[Image.Image]:
    """Cut scikit-learn's two photographs to images of `SIZES`."""
    from sklearn.datasets import load_sample_image  # slow to import

    landscapes = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    cut = []
    for index, (height, width) in enumerate(SIZES):
        photograph = landscapes[index % 2]
        if height > width:
            photograph = photograph.transpose(Image.Transpose.ROTATE_90)
        left = (photograph.width - width) // 3
        top = (photograph.height - height) // 3
        cut.append(photograph.crop((left, top, left + width, top + height)))
    return cut


class PhotographLogits:
    """Pixel values and logits of `photographs` by a checkpoint.

    Logits are computed when they are needed first.

    Args:
        classifier: the checkpoint.

    Attributes:
        images: the photographs.
        pixel_values: (images, channels, height, width) float32; None if the image processor returns several sizes,
            while a traced graph needs one.
    """

    def __init__(self, classifier: Classifier):
        self.classifier = classifier
        self.images = photographs()
        pixel_values = [classifier.pixel_values([image]) for image in self.images]
        has_one_size = len({values.shape for values in pixel_values}) == 1
        self.pixel_values = np.concatenate(pixel_values) if has_one_size else None
        self._logits: dict[int, np.ndarray] = {}

    def __call__(self, rows: list[int]) -> np.ndarray:
        """Return logits (rows, classes) of the photographs with these indices."""
        missing = [row for row in rows if row not in self._logits]
        if missing:
            computed = _run(self.classifier, self.pixel_values[missing])
            self._logits.update(zip(missing, computed, strict=True))
        return np.stack([self._logits[row] for row in rows])


def check_images(
    checkpoint: PhotographLogits, path: Path, dtype: str | None, atol: float | None, name: str
) -> ImageParity:
    """Compare logits with the checkpoint's, preprocessing included.

    All photographs are preprocessed. The logits are compared of those whose pixel values differ, and of `FEW` others.

    Args:
        checkpoint: pixel values, of one size, and logits of the checkpoint.
        path: exported file with the other files of its folder beside it.
        dtype: precision of the file; only fp32 and fp16 have a limit, not None.
        atol: largest difference of a logit. Default: that of `LIMITS`.
        name: file name for messages.

    Raises:
        ModelError: the logits differ by more than the limit.
    """
    with mapped_file(path) if path.suffix == ".onnx" else nullcontext(path) as file:
        export = load_classifier(file, device="cpu", prepack=path.suffix != ".onnx")
    if export.backend.takes_pixels:
        rows = list(range(len(SIZES)))
        logits = export.logits(checkpoint.images)
    else:
        pixel_values = export.pixel_values(checkpoint.images)
        rows = rows_to_compare(pixel_values, checkpoint.pixel_values)
        logits = _run(export, pixel_values[rows])
    wanted = checkpoint(rows)
    worst = _difference(logits, wanted)
    spread = float(np.ptp(wanted))
    limit = atol
    if atol is None and dtype in LIMITS:
        limit = max(LIMITS[dtype] * spread, ROUNDING * max(1.0, float(np.abs(wanted).max())))
    if limit is not None and not worst <= limit:  # `not <=` also rejects NaN
        raise ModelError(
            f"{name}: on photographs, a logit differs from the checkpoint's by {worst:.2g} (allowed: {limit:.2g}; the"
            f" logits spread over {spread:.3g}). No file was written. Pass --atol to allow more, or another --dtype."
        )
    result = ImageParity(
        sizes=list(SIZES),
        max_abs_difference=worst,
        spread=spread,
        same_class=float((logits.argmax(axis=1) == wanted.argmax(axis=1)).mean()),
        atol=limit,
    )
    if dtype == "fp32" and export.processor is not None and not export.backend.takes_pixels:
        result.stock_max_abs_difference = _stock_difference(export, checkpoint, path)
    return result


def rows_to_compare(pixel_values: np.ndarray, wanted: np.ndarray) -> list[int]:
    """Return the indices of images that differ, and of `FEW` that do not."""
    different, equal = [], []
    for row, pair in enumerate(zip(pixel_values, wanted, strict=True)):
        (equal if np.array_equal(*pair) else different).append(row)
    return sorted([*different, *equal[:FEW]])


def _run(classifier: Classifier, pixel_values: np.ndarray) -> np.ndarray:
    """Return logits of pixel values, with `TEXT` for an image-text model."""
    if classifier.text_reader:
        return classifier.run({"pixel_values": pixel_values, **classifier.text_reader([TEXT] * len(pixel_values))})
    return classifier.run(pixel_values)


def _difference(logits: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(logits - wanted).max())


def _stock_difference(export: Classifier, checkpoint: PhotographLogits, path: Path) -> float:
    """Return the largest difference of a logit with the stock image processor.

    It has its default backend. The photographs are the `FEW` ones whose pixel values differ most.
    """
    from transformers import AutoImageProcessor

    with wrap_library_errors(ModelError, f"{path.name}: the stock image processor failed"):
        processor = AutoImageProcessor.from_pretrained(path.parent, trust_remote_code=False)
        pixels = [processor(image, return_tensors="pt")["pixel_values"].numpy() for image in checkpoint.images]
    pixel_values = np.concatenate(pixels)
    rows = list(range(len(pixels)))
    if pixel_values.shape == checkpoint.pixel_values.shape:
        differences = np.abs(pixel_values - checkpoint.pixel_values).mean(axis=(1, 2, 3))
        rows = sorted(np.argsort(-differences, kind="stable")[:FEW].tolist())
    return _difference(_run(export, pixel_values[rows]), checkpoint(rows))
