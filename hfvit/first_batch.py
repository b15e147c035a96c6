"""What the first images of a training tell about the data, before hours are spent on it."""

import logging

import numpy as np
import torch

from hfvit.errors import DataError

logger = logging.getLogger(__name__)

FLAT = 1e-3  # pixel values (about one deviation of the data wide) that differ by less are one colour
ENOUGH = 16  # labels that are all the same by chance less often than anyone trains


def check_pixels(pixel_values: torch.Tensor) -> None:
    """Raise `DataError` when images `(batch, 3, height, width)` are not finite, or each is of one colour."""
    if not torch.isfinite(pixel_values).all():
        raise DataError(
            "the first training batch has pixel values that are not finite; look at image_mean and image_std (a"
            " deviation close to 0), or at the model's own preprocessing."
        )
    flat = (pixel_values.amax((2, 3)) - pixel_values.amin((2, 3))).amax(1) < FLAT
    count, images = int(flat.sum()), len(flat)
    if count == images > 1:
        raise DataError(
            f"all {images} images of the first training batch are of one colour each; look at the pictures of the"
            " data set, and at image_column."
        )
    if count > images // 2:
        logger.warning("%d of the %d images of the first training batch are of one colour each.", count, images)


def check_labels(labels: np.ndarray, names: list[str]) -> None:
    """Raise `DataError` when all training images `(images,)` are of one class of several."""
    if len(names) > 1 and (labels == labels[0]).all():
        raise DataError(
            f"all {len(labels)} training images are of class '{names[labels[0]]}', one of {len(names)}: look at"
            " train_split (a slice of a sorted split has its first class only) and label_column."
        )


def check_stream_labels(labels: torch.Tensor, names: list[str], repeats: int) -> None:
    """Warn when the first images `(batch,)` of a stream are of one class: nobody knows whether the others are.

    Each image comes `repeats` times in a row.
    """
    drawn = labels[::repeats]
    if len(names) > 1 and len(drawn) >= ENOUGH and (drawn == drawn[0]).all():
        logger.warning(
            "The first %d images of the stream are all of class '%s'. Files that are sorted by class need a"
            " shuffle_buffer_size larger than a class, or must be shuffled before they are written.",
            len(drawn),
            names[int(drawn[0])],
        )
