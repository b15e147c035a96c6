"""PIL image -> normalised float tensor, for training and for evaluation."""

from collections.abc import Sequence

import torch
from timm.data import create_transform, resolve_data_config
from torchvision.transforms import v2


def eval_transform(pretrained_cfg: dict):
    """The serving transform: what transformers' `TimmWrapperImageProcessor` builds from the same `pretrained_cfg`.

    Maps an RGB PIL image to `(3, height, width)` float32.
    """
    return create_transform(**resolve_data_config(pretrained_cfg), is_training=False)


def train_transform(
    pretrained_cfg: dict, crop_scale: Sequence[float], crop_ratio: Sequence[float], horizontal_flip: float
):
    """Random resized crop, horizontal flip and normalisation; draws from torch's global generator only.

    Size, filter, mean and standard deviation are evaluation's, from the same `pretrained_cfg`.
    """
    data_config = resolve_data_config(pretrained_cfg)
    return v2.Compose(
        [
            v2.RandomResizedCrop(
                data_config["input_size"][-2:],
                scale=tuple(crop_scale),
                ratio=tuple(crop_ratio),
                interpolation=v2.InterpolationMode(data_config["interpolation"]),
            ),
            v2.RandomHorizontalFlip(horizontal_flip),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(data_config["mean"]), list(data_config["std"])),
        ]
    )
