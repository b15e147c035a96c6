"""Apply the user's transform to PIL images, in the data loader's workers."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from hfvit.data.decode import decode
from hfvit.errors import DataError, one_line
from hfvit.transforms.augmentation import Augmentation


class TransformReader:
    """Decodes images and applies a transform that replaces hfvit's augmentation.

    The random generators are seeded for each image, so that the result does not depend on the number of processes and
    workers, or on a resume.

    Args:
        split: data set with the columns `image` (undecoded) and `row`; see `data.splits.undecoded`.
        name: name of the split, for messages.
        transform: a callable on an RGB PIL image, such as `torchvision.transforms.v2.Compose` or
            `timm.data.create_transform`, or an albumentations transform. It returns an image of the model's size: a
            float tensor `(3, height, width)`, taken as normalized pixel values, or a PIL image, a uint8 tensor
            `(3, height, width)` or a uint8 array `(height, width, 3)`, which are normalized afterwards.
    """

    def __init__(self, split: Dataset, name: str, transform: Callable):
        self.split = split
        self.name = name
        self.transform = transform

    def for_training(self, rows: np.ndarray, seeds: np.ndarray, augmentation: Augmentation) -> dict[str, Any]:
        """Return `pixel_values` `(batch, 3, height, width)` and an empty `plan`.

        Args:
            rows: rows of the split.
            seeds: one seed per image.
            augmentation: source of the image size, mean and standard deviation.
        """
        images = self.split[rows.tolist()]
        values = []
        for image, row, seed in zip(images["image"], images["row"], seeds, strict=True):
            decoded = decode(image, self.name, row)
            with seeded(int(seed)):
                values.append(self._apply(decoded, row, int(seed), augmentation))
        return {"pixel_values": torch.stack(values), "plan": {}}

    def _apply(self, image: Image.Image, row: int, seed: int, augmentation: Augmentation) -> torch.Tensor:
        try:
            if type(self.transform).__module__.split(".")[0] == "albumentations":
                if hasattr(self.transform, "set_random_state"):
                    # albumentations 2 draws from its own generators, not from the global ones.
                    self.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
                result = self.transform(image=np.asarray(image))["image"]
            else:
                result = self.transform(image)
        except Exception as error:
            raise DataError(
                f"train_transforms: failed on row {row} of split '{self.name}' ({type(error).__name__}:"
                f" {one_line(error)})."
            ) from error
        if isinstance(result, Image.Image):
            result = np.array(result.convert("RGB"))
        if isinstance(result, np.ndarray):
            result = torch.from_numpy(np.require(result, requirements="W"))
            result = result.permute(2, 0, 1) if result.ndim == 3 else result
        shape = tuple(result.shape) if isinstance(result, torch.Tensor) else None
        if shape != (3, *augmentation.image_size):
            height, width = augmentation.image_size
            raise DataError(
                f"train_transforms: must return an image, array or tensor of {height}x{width} pixels with 3 channels,"
                f" got {f'shape {shape}' if shape else type(result).__name__}. End the transform with a resize or crop"
                " to the model's image size."
            )
        if result.dtype == torch.uint8:
            return (result.float() - augmentation.mean.view(3, 1, 1)) / augmentation.std.view(3, 1, 1)
        return result.float()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch in a block, then restore them."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
