"""Batched training augmentation: random resized crop, flip, policy and normalisation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfvit.transforms.auto_augment import draw_stages, uniforms_needed
from hfvit.transforms.functional import GEOMETRIC, OPS
from hfvit.transforms.resize import resize_boxes
from hfvit.utils.counter_rng import uniforms

ATTEMPTS = 10  # of a random crop to lie within its image, as in torchvision
CROP_UNIFORMS = 2 * ATTEMPTS + 2


class Augmentation:
    """Random resized crop, horizontal flip, a policy of policies.py, normalisation.

    Args:
        image_size: height and width of the pixel values.
        mean, std: of each channel, in [0, 1].
        interpolation: one of `resize.FILTERS`, or for `crops` any of Pillow's.
        crop_scale: smallest and largest share of the area that a crop covers.
        crop_ratio: narrowest and widest shape (width / height) of a crop.
        horizontal_flip: probability of a mirrored image.
        policy: one of config.py's POLICIES. Its operations work on the image before it is resized, where it is small.
        rand_augment_magnitude, rand_augment_num_ops: of policy `rand_augment`.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
        crop_scale: Sequence[float] = (0.8, 1.0),
        crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
        horizontal_flip: float = 0.5,
        policy: str = "basic",
        rand_augment_magnitude: float = 9.0,
        rand_augment_num_ops: int = 2,
    ):
        self.image_size, self.interpolation = tuple(image_size), interpolation
        self.crop_scale, self.crop_ratio, self.horizontal_flip = tuple(crop_scale), tuple(crop_ratio), horizontal_flip
        self.policy, self.magnitude, self.num_ops = policy, rand_augment_magnitude, rand_augment_num_ops
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) * 255.0 for values in (mean, std))
        self.scale, self.shift = 1.0 / self.std, -self.mean / self.std

    @classmethod
    def from_config(cls, data_config: dict[str, Any], **changes) -> "Augmentation":
        """Size, filter, mean and deviation from timm's `data_config`: those that evaluation has."""
        return cls(
            data_config["input_size"][-2:],
            data_config["mean"],
            data_config["std"],
            data_config["interpolation"],
            **changes,
        )

    def to(self, device: torch.device) -> "Augmentation":
        """Keep the constants on `device`; moving them at each batch would make the processor wait for it."""
        for name in ("mean", "std", "scale", "shift"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def draw_crops(self, seeds: np.ndarray, heights, widths) -> tuple[np.ndarray, np.ndarray]:
        """Boxes `(images, 4)` (top, left, height, width, whole pixels) and flips `(images,)` of images so large."""
        u = uniforms(seeds, CROP_UNIFORMS + 1)
        boxes = random_boxes(u[:, :-1], heights, widths, self.crop_scale, self.crop_ratio)
        return boxes, u[:, -1] < self.horizontal_flip

    def draw_operations(self, seeds: np.ndarray, side: int) -> list[dict[str, Any]]:
        """The stages of the policy for images whose shorter side has `side` pixels.

        A stage is `index` and `magnitude`, the images that are changed and how strongly, sorted by operation, and
        `counts`, how many each operation has. Two tensors, however many operations: each is a copy to the device.
        """
        u = uniforms(seeds, uniforms_needed(self.policy, self.num_ops), start=CROP_UNIFORMS + 1)
        shrunk = min(1.0, side / min(self.image_size))  # a blur's unit is a pixel of the model's input
        stages = []
        for names, magnitudes in draw_stages(self.policy, u, self.magnitude, self.num_ops):
            magnitudes = np.where(names == "gaussian_blur", magnitudes * shrunk, magnitudes).astype(np.float32)
            order = np.argsort(names, kind="stable")
            order = order[names[order] != "identity"]
            found, counts = np.unique(names[order], return_counts=True)
            stages.append(
                {
                    "index": torch.from_numpy(order),
                    "magnitude": torch.from_numpy(magnitudes[order]),
                    "counts": dict(zip(found.tolist(), counts.tolist(), strict=True)),
                }
            )
        return stages

    def draw(self, seeds: np.ndarray, height: int, width: int) -> dict[str, Any]:
        """Everything random about a batch of `images` of one size, as tensors that travel with it."""
        boxes, flips = self.draw_crops(seeds, height, width)
        return {
            "boxes": torch.from_numpy(boxes.astype(np.float32)),
            "flips": torch.from_numpy(flips),
            "operations": self.draw_operations(seeds, min(height, width)),
        }

    def __call__(self, batch: dict[str, Any], dtype: torch.dtype = torch.float32) -> Tensor:
        """Pixel values `(batch, 3, *image_size)` of a drawn batch, computed in `dtype` once the colors are done."""
        plan, resize = batch["plan"], "images" in batch
        levels = batch["images" if resize else "crops"].permute(0, 3, 1, 2)
        levels = levels.to(torch.float32, memory_format=torch.contiguous_format)
        for stage in plan["operations"]:
            levels = self._apply(stage, levels)
        pixels = levels.mul_(self.scale).add_(self.shift).to(dtype)  # in place: a second buffer costs its page faults
        if not resize:
            return pixels
        # A resize is linear and its weights sum to one: to normalise the few pixels before it is the same.
        return resize_boxes(pixels, plan["boxes"], plan["flips"], self.image_size, self.interpolation)

    def _apply(self, stage: dict[str, Any], levels: Tensor) -> Tensor:
        """Change the images of a stage in place, a group for each operation."""
        counts = list(stage["counts"].values())
        groups = zip(stage["counts"], stage["index"].split(counts), stage["magnitude"].split(counts), strict=True)
        for name, index, magnitude in groups:
            chosen = levels.index_select(0, index)
            if name in GEOMETRIC:  # what comes into view from outside is the mean color
                changed = OPS[name](chosen - self.mean, magnitude) + self.mean
            else:
                changed = OPS[name](chosen, magnitude)
            levels.index_copy_(0, index, changed)
        return levels


def random_boxes(u: np.ndarray, heights, widths, scale: Sequence[float], ratio: Sequence[float]) -> np.ndarray:
    """torchvision's RandomResizedCrop: boxes `(images, 4)`, top, left, height, width in whole pixels.

    `u`: uniform numbers `(images, CROP_UNIFORMS)`. The first attempt that lies within its image is taken, or else
    the largest centred box whose shape is allowed.
    """
    heights, widths = (np.broadcast_to(np.asarray(sides, dtype=np.float64), len(u)) for sides in (heights, widths))
    area = (heights * widths)[:, None] * (scale[0] + (scale[1] - scale[0]) * u[:, :ATTEMPTS])
    low, high = np.log(ratio)
    shape = np.exp(low + (high - low) * u[:, ATTEMPTS : 2 * ATTEMPTS])
    tried_widths, tried_heights = np.round(np.sqrt(area * shape)), np.round(np.sqrt(area / shape))
    fits = (tried_widths > 0) & (tried_widths <= widths[:, None])
    fits &= (tried_heights > 0) & (tried_heights <= heights[:, None])
    first, image = fits.argmax(axis=1), np.arange(len(u))
    # The fallback: the whole image, narrowed to the nearest shape allowed.
    own_shape = widths / heights
    box_heights = np.where(own_shape < ratio[0], np.round(widths / ratio[0]), heights)
    box_widths = np.where(own_shape > ratio[1], np.round(heights * ratio[1]), widths)
    found = fits.any(axis=1)
    box_heights = np.where(found, tried_heights[image, first], box_heights)
    box_widths = np.where(found, tried_widths[image, first], box_widths)
    top = np.where(found, np.floor(u[:, -2] * (heights - box_heights + 1)), (heights - box_heights) // 2)
    left = np.where(found, np.floor(u[:, -1] * (widths - box_widths + 1)), (widths - box_widths) // 2)
    return np.stack([top, left, box_heights, box_widths], axis=1)
