"""Batched evaluation preprocessing, bit-exact with the saved image processor."""

from typing import Any

import torch
from torch import Tensor

from hfvit.transforms.resize import FILTERS, resize_as_pillow


class Preprocessing:
    """Resize, center crop and normalize batches, bit-exact with the image processor.

    Args:
        data_config: preprocessing of the model, from `timm.data.resolve_data_config`.
    """

    def __init__(self, data_config: dict[str, Any]):
        self.image_size = tuple(data_config["input_size"][-2:])
        self.interpolation = data_config["interpolation"]
        self.crop_pct = data_config["crop_pct"]
        self.crop_mode = data_config["crop_mode"]
        self.mean = torch.tensor(data_config["mean"]).view(3, 1, 1)
        self.std = torch.tensor(data_config["std"]).view(3, 1, 1)

    def to(self, device: torch.device) -> "Preprocessing":
        """Move the constants to `device`."""
        self.mean = self.mean.to(device)
        self.std = self.std.to(device)
        return self

    def geometry(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int, int, int]] | None:
        """Compute the resized (height, width) and the crop (top, left, height, width).

        Returns None for what `resize.resize_as_pillow` does not support: other filters, padding, and non-square images
        that shrink in height.
        """
        crop_height, crop_width = self.image_size
        if self.interpolation not in FILTERS:
            return None
        full = tuple(int(side / self.crop_pct) for side in self.image_size)
        if self.crop_mode == "squash":
            resized = full
        elif self.crop_mode == "center" and full[0] == full[1]:
            short = min(height, width)
            long = max(height, width)
            longer = int(full[0] * long / short)
            resized = (full[0], longer) if height <= width else (longer, full[0])
        else:
            return None
        squares = height == width and resized[0] == resized[1]
        if resized[0] < crop_height or resized[1] < crop_width or (resized[0] < height and not squares):
            return None
        top, left = (round((size - crop) / 2.0) for size, crop in zip(resized, self.image_size, strict=True))
        return resized, (top, left, crop_height, crop_width)

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """Compute pixel values (batch, 3, height, width) float32 of `images` or `crops`."""
        if "crops" in batch:
            crops = batch["crops"].permute(0, 3, 1, 2)
            levels = crops.to(torch.float32, memory_format=torch.contiguous_format)
        else:
            images = batch["images"].permute(0, 3, 1, 2)
            levels = resize_as_pillow(images, *self.geometry(*images.shape[-2:]), self.interpolation)
        return levels.div_(255.0).sub_(self.mean).div_(self.std)
