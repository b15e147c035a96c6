"""Batched augmentation: crop, flips, policy, color jitter and normalization."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfvit.transforms.auto_augment import JITTER_UNIFORMS, Stage, color_jitter_stages, num_uniforms, sample_stages
from hfvit.transforms.functional import FAMILIES, IDENTITY, OPERATIONS, Constants, parameters_of
from hfvit.transforms.resize import crop_padded, resize_boxes
from hfvit.utils.counter_rng import uniform

ATTEMPTS = 10  # to sample a crop within its image, as in torchvision
CROP_UNIFORMS = 2 * ATTEMPTS + 2  # random numbers per image
VERTICAL_UNIFORM = 2**20  # far from those of policies and random erasing, so that runs without it stay the same


class Augmentation:
    """Augment batches: random crop, flips, policy, color jitter, normalization.

    Args:
        image_size: (height, width) in pixels of the pixel values.
        mean: mean of each channel, in [0, 1].
        std: standard deviation of each channel, in [0, 1].
        interpolation: one of `resize.FILTERS`; any of Pillow's for batches of `crops`.
        crop_scale: smallest and largest fraction of the image area that a crop covers.
        crop_ratio: smallest and largest aspect ratio (width / height) of a crop.
        horizontal_flip: probability of a horizontal flip.
        vertical_flip: probability of a vertical flip.
        policy: one of `recipe.arguments.POLICIES`, applied before the resize.
        rand_augment_magnitude: magnitude of the policy `rand_augment`, 0 to 10.
        rand_augment_num_ops: number of operations of the policy `rand_augment`.
        color_jitter: largest change of brightness, contrast and saturation, as a fraction; after the policy.
        crop_padding: resize complete images, pad them with so many pixels on each side, and crop them to `image_size`,
            instead of the random resized crop; 0 is off.
        crop_padding_mode: one of `recipe.arguments.PADDING_MODES`.
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
        vertical_flip: float = 0.0,
        policy: str = "basic",
        rand_augment_magnitude: float = 9.0,
        rand_augment_num_ops: int = 2,
        color_jitter: float = 0.0,
        crop_padding: int = 0,
        crop_padding_mode: str = "constant",
    ):
        self.image_size = tuple(image_size)
        self.interpolation = interpolation
        self.crop_scale = tuple(crop_scale)
        self.crop_ratio = tuple(crop_ratio)
        self.horizontal_flip = horizontal_flip
        self.vertical_flip = vertical_flip
        self.policy = policy
        self.magnitude = rand_augment_magnitude
        self.num_ops = rand_augment_num_ops
        self.color_jitter = color_jitter
        self.crop_padding = crop_padding
        self.crop_padding_mode = crop_padding_mode
        self.mean = torch.tensor(mean).view(3, 1, 1) * 255.0
        self.std = torch.tensor(std).view(3, 1, 1) * 255.0
        self.scale = 1.0 / self.std
        self.shift = -self.mean / self.std
        self.constants = Constants(self.mean)

    @classmethod
    def from_config(cls, data_config: dict[str, Any], **changes) -> "Augmentation":
        """Create it with size, interpolation, mean and std of timm's `data_config`."""
        return cls(
            data_config["input_size"][-2:],
            data_config["mean"],
            data_config["std"],
            data_config["interpolation"],
            **changes,
        )

    def to(self, device: torch.device) -> "Augmentation":
        """Move the constants to `device`; moving them in each batch would synchronize."""
        for name in ("mean", "std", "scale", "shift"):
            setattr(self, name, getattr(self, name).to(device))
        self.constants = Constants(self.mean).to(device)
        return self

    def sample_crops(self, seeds: np.ndarray, heights, widths) -> tuple[np.ndarray, np.ndarray]:
        """Sample crops and flips.

        Args:
            seeds: seed of each image (images,), uint64.
            heights: heights of the images in pixels (images,), or one for all.
            widths: widths of the images in pixels (images,), or one for all.

        Returns:
            Boxes (images, 4) of top, left, height, width in integer pixels (complete images with `crop_padding`), and
            flips (images, 2) bool, horizontal and vertical.
        """
        u = uniform(seeds, CROP_UNIFORMS + 1)
        if self.crop_padding:
            boxes = np.stack(np.broadcast_arrays(np.zeros(len(u)), 0, heights, widths), axis=1)
        else:
            boxes = random_boxes(u[:, :-1], heights, widths, self.crop_scale, self.crop_ratio)
        vertical = uniform(seeds, 1, start=VERTICAL_UNIFORM)[:, 0] if self.vertical_flip else np.ones(len(u))
        return boxes, np.stack([u[:, -1] < self.horizontal_flip, vertical < self.vertical_flip], axis=1)

    def sample_changes(self, seeds: np.ndarray, height: int, width: int) -> dict[str, Any]:
        """Sample the part of a plan that is applied to crops.

        Args:
            seeds: seed of each image (images,), uint64.
            height: height of the images in pixels.
            width: width of the images in pixels.

        Returns:
            The passes of `operations`, and with `crop_padding` the `offsets` (images, 2) of top and left.
        """
        changes = {"operations": self.sample_operations(seeds, height, width)}
        if self.crop_padding:
            offsets = np.floor(uniform(seeds, 2) * (2 * self.crop_padding + 1))
            changes["offsets"] = torch.from_numpy(offsets.astype(np.int64))
        return changes

    def sample_operations(self, seeds: np.ndarray, height: int, width: int) -> list[dict[str, Any]]:
        """Sample the operations of the policy and of color jitter.

        Args:
            seeds: seed of each image (images,), uint64.
            height: height of the images in pixels.
            width: width of the images in pixels.

        Returns:
            The passes of `plan_passes`.
        """
        u = uniform(seeds, num_uniforms(self.policy, self.num_ops), start=CROP_UNIFORMS + 1)
        # Blur is measured in pixels of the model's input.
        ratio = min(1.0, min(height, width) / min(self.image_size))
        stages = []
        for names, magnitudes in sample_stages(self.policy, u, self.magnitude, self.num_ops):
            stages.append((names, np.where(names == "gaussian_blur", magnitudes * ratio, magnitudes)))
        if self.color_jitter:
            jitter = uniform(seeds, JITTER_UNIFORMS, start=VERTICAL_UNIFORM + 1)
            stages += color_jitter_stages(jitter, self.color_jitter)
        return plan_passes(stages, height, width)

    def sample(self, seeds: np.ndarray, height: int, width: int) -> dict[str, Any]:
        """Sample the plan of a batch: all random decisions, as tensors.

        Args:
            seeds: seed of each image (images,), uint64.
            height: height of the images in pixels.
            width: width of the images in pixels.

        Returns:
            `boxes` (images, 4), `flips` (images, 2) and those of `sample_changes`.
        """
        boxes, flips = self.sample_crops(seeds, height, width)
        return {
            "boxes": torch.from_numpy(boxes.astype(np.float32)),
            "flips": torch.from_numpy(flips),
            **self.sample_changes(seeds, height, width),
        }

    def __call__(self, batch: dict[str, Any], dtype: torch.dtype = torch.float32) -> Tensor:
        """Compute pixel values (batch, 3, height, width).

        Args:
            batch: `plan` of `sample`, and `images` or (already cropped) `crops` (batch, height, width, 3) uint8.
            dtype: type of the result and of the resize; colors are changed in float32.
        """
        plan = batch["plan"]
        resize = "images" in batch
        levels = batch["images" if resize else "crops"].permute(0, 3, 1, 2)
        levels = levels.to(torch.float32, memory_format=torch.contiguous_format)
        for step in plan["operations"]:
            levels = self._apply(step, levels)
        pixels = levels.mul_(self.scale).add_(self.shift).to(dtype)  # in place, as page faults of a new buffer cost
        flips = plan["flips"] if resize else None  # crops are flipped
        if resize and not (self.crop_padding and pixels.shape[2:] == self.image_size):
            # Equivalent to normalization after the resize (linear, weights sum to one), with fewer pixels.
            pixels = resize_boxes(pixels, plan["boxes"], flips, self.image_size, self.interpolation)
            flips = None
        if self.crop_padding:
            black = self.shift
            pixels = crop_padded(
                pixels, plan["offsets"], self.crop_padding, self.crop_padding_mode, fill=black, flips=flips
            )
        return pixels

    def _apply(self, step: dict[str, Any], levels: Tensor) -> Tensor:
        """Reorder the images, and apply the operations of a pass to slices in place."""
        levels = levels.index_select(0, step["order"])
        start = 0
        for family, count in step["counts"].items():
            images = slice(start, start + count)
            FAMILIES[family](levels[images], step["parameters"][images], self.constants)
            start += count
        return levels


def plan_passes(stages: list[Stage], height: int, width: int) -> list[dict[str, Any]]:
    """Order the operations of a batch so that few kernels compute them.

    In a pass, images are sorted by family of operations, so that each family is one slice. Equalization, with most
    kernels, has passes of its own between the others, which images from two stages share.

    Args:
        stages: stages of `sample_stages`.
        height: height of the images in pixels.
        width: width of the images in pixels.

    Returns:
        Passes with `order` (places of the images in the order of the pass before), `counts` (changed images by family,
        in this order) and `parameters` (of each of them). The last one restores the order of the batch.
    """
    last = np.full(len(stages[0][0]) if stages else 0, -1)  # pass of the previous operation of each image
    planned = {}
    for names, magnitudes in stages:
        changed = names != IDENTITY
        # Even passes for all families but one, odd passes for equalization.
        earliest = last + 1
        parity = (names == "equalize").astype(int)
        numbers = np.where(changed, earliest + (earliest % 2 != parity), last)
        for number in np.unique(numbers[changed]):
            planned.setdefault(int(number), []).append((changed & (numbers == number), names, magnitudes))
        last = numbers
    passes = []
    current = np.arange(len(last))  # image at each place
    for number in sorted(planned):
        chosen = np.full(len(last), IDENTITY, dtype=object)
        magnitude = np.zeros(len(last))
        for images, names, magnitudes in planned[number]:
            chosen[images] = names[images]
            magnitude[images] = magnitudes[images]
        passes.append(_pass(chosen[current], magnitude[current], height, width))
        current = current[passes[-1]["order"].numpy()]
    if passes:
        passes.append({"order": torch.from_numpy(np.argsort(current)), "counts": {}, "parameters": torch.zeros(0)})
    return passes


def _pass(names: np.ndarray, magnitudes: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """Sort the images of a pass by family, unchanged ones last.

    Args:
        names: operation of each image (images,).
        magnitudes: magnitude of each image (images,).
        height: height of the images in pixels.
        width: width of the images in pixels.
    """
    order, parameters, counts = [], [], {}
    for name, (family, _) in OPERATIONS.items():  # sorted by family
        images = np.flatnonzero(names == name)
        if len(images):
            order.append(images)
            parameters.append(parameters_of(name, magnitudes[images], height, width))
            counts[family] = counts.get(family, 0) + len(images)
    order.append(np.flatnonzero(names == IDENTITY))
    return {
        "order": torch.from_numpy(np.concatenate(order)),
        "counts": counts,
        "parameters": torch.from_numpy(np.concatenate(parameters)),
    }


def random_boxes(u: np.ndarray, heights, widths, scale: Sequence[float], ratio: Sequence[float]) -> np.ndarray:
    """Sample boxes like torchvision's `RandomResizedCrop`.

    The first attempt within the image is used, else the largest centered box with an allowed aspect ratio.

    Args:
        u: uniform random numbers (images, CROP_UNIFORMS).
        heights: heights of the images in pixels (images,), or one for all.
        widths: widths of the images in pixels (images,), or one for all.
        scale: smallest and largest fraction of the area.
        ratio: smallest and largest aspect ratio (width / height).

    Returns:
        Boxes (images, 4) of top, left, height, width in integer pixels.
    """
    heights, widths = (np.broadcast_to(np.asarray(sides, dtype=np.float64), len(u)) for sides in (heights, widths))
    area = (heights * widths)[:, None] * (scale[0] + (scale[1] - scale[0]) * u[:, :ATTEMPTS])
    low, high = np.log(ratio)
    shape = np.exp(low + (high - low) * u[:, ATTEMPTS : 2 * ATTEMPTS])
    tried_widths = np.round(np.sqrt(area * shape))
    tried_heights = np.round(np.sqrt(area / shape))
    fits = (tried_widths > 0) & (tried_widths <= widths[:, None])
    fits &= (tried_heights > 0) & (tried_heights <= heights[:, None])
    first = fits.argmax(axis=1)
    image = np.arange(len(u))
    # Fallback: the full image, cut to the nearest allowed aspect ratio.
    own_shape = widths / heights
    box_heights = np.where(own_shape < ratio[0], np.round(widths / ratio[0]), heights)
    box_widths = np.where(own_shape > ratio[1], np.round(heights * ratio[1]), widths)
    found = fits.any(axis=1)
    box_heights = np.where(found, tried_heights[image, first], box_heights)
    box_widths = np.where(found, tried_widths[image, first], box_widths)
    top = np.where(found, np.floor(u[:, -2] * (heights - box_heights + 1)), (heights - box_heights) // 2)
    left = np.where(found, np.floor(u[:, -1] * (widths - box_widths + 1)), (widths - box_widths) // 2)
    return np.stack([top, left, box_heights, box_widths], axis=1)
