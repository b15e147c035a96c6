"""Rows of a split -> pictures -> items for the Trainer, and the order they are drawn in.

Images are decoded here, row by row, so that a bad one is named by split and row, and so that the colour conversion is
the one serving uses.
"""

import io
import warnings
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import torch
from datasets import Dataset
from PIL import Image as PILImage
from PIL import ImageOps

from hfvit.errors import DataError, one_line


def to_rgb(image: PILImage.Image) -> PILImage.Image:
    """Any PIL image as RGB, upright by its EXIF orientation, as transformers' `load_image` does for serving.

    Pillow, and with it `load_image`, clips deeper greys at 255. Here 16-bit ones are divided by their range, 32-bit
    integers too when they exceed 8 bits, and floating-point ones are spread over their own.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        low, high = 0.0, 65535.0
        if image.mode == "F":
            low, high = values.min(), values.max()
        elif image.mode == "I" and values.max() <= 255:
            high = 255.0
        image = PILImage.fromarray(((values - low) * (255.0 / max(high - low, 1e-9))).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


@contextmanager
def seeded(*entropy: int):
    """Draw from torch's CPU generator as if freshly seeded with `entropy`, then put its state back."""
    state = torch.get_rng_state()
    # Not torch.manual_seed: that queues a call for every device, once an image.
    torch.default_generator.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))
    try:
        yield
    finally:
        torch.set_rng_state(state)


class ImageDataset(torch.utils.data.Dataset):
    """Items `{"pixel_values": (3, height, width) float32, "labels": int}` of one split of `data.load_splits`.

    `name` is the data set's own split, and the column `row` the row in it, so that an error names both as the user
    would look them up.

    Indexed by a row, or by `(epoch, row)` as `EpochSampler` yields it: the transform then draws from a generator
    seeded by (seed, epoch, row), so that an image is augmented alike on one process or four, with or without workers,
    in an unbroken run or a resumed one.
    """

    def __init__(self, split: Dataset, transform: Callable, name: str, seed: int = 0):
        self.split, self.transform, self.name, self.seed = split, transform, name, seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int | tuple[int, int]) -> dict:
        epoch, row = index if isinstance(index, tuple) else (0, index)
        example = self.split[int(row)]
        image = self.decode(example["image"], example["row"])
        with seeded(self.seed, epoch, row):
            pixel_values = self.transform(image)
        return {"pixel_values": pixel_values, "labels": example["label"]}

    def decode(self, encoded: dict | None, row: int) -> PILImage.Image:
        """The row's picture as RGB; `DataError` names the row of a file that is no picture."""
        try:
            source = io.BytesIO(encoded["bytes"]) if encoded.get("bytes") else encoded["path"]
            with warnings.catch_warnings():
                # A picture beyond Pillow's limit of pixels is refused, not only warned about.
                warnings.simplefilter("error", PILImage.DecompressionBombWarning)
                with PILImage.open(source) as image:
                    return to_rgb(image)
        except Exception as error:
            file = f" ({encoded['path']})" if encoded and encoded.get("path") else ""
            raise DataError(
                f"Split '{self.name}', row {row}{file}: not a readable picture ({type(error).__name__}:"
                f" {one_line(error)}); mend or remove it."
            ) from None


class EpochSampler(torch.utils.data.Sampler):
    """Shuffled `(epoch, row)` pairs, a whole number of global batches an epoch.

    The order depends on (seed, epoch) alone, so every process and a resumed run draw the same one. The rows that do
    not fill a global batch sit out that epoch, which makes batch 8 the same as 2 x 4 accumulated or on 2 processes.
    """

    def __init__(self, rows: int, global_batch_size: int, seed: int):
        self.rows, self.global_batch_size, self.seed = rows, global_batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows - self.rows % self.global_batch_size

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)[: len(self)]
        return ((self.epoch, int(row)) for row in order)
