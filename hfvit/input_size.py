"""The image size that a timm model takes, in pixels: changed by timm's own rules, held against its patches."""

import json
from typing import Any

from timm.models import get_model_args
from torch import nn

from hfvit.errors import ModelError


def resize_input(timm_model: nn.Module, image_size: int) -> dict[str, Any]:
    """Let timm change its model's image size in pixels; returns what else its `create_model` needs from then on.

    Windows keep their share of the patch grid (Swin, MaxViT), so that a model built anew from the size alone would
    have others than these weights.
    """
    before = get_model_args(timm_model)
    timm_model.set_input_size(img_size=(image_size, image_size))
    after = get_model_args(timm_model)
    changed = {key: value for key, value in after.items() if key != "img_size" and before.get(key) != value}
    return json.loads(json.dumps(changed))  # as config.json will hold them: lists


def check_patches(timm_model: nn.Module, image_size: int) -> None:
    """Raise `ModelError` when the model's patches do not tile an image of this size."""
    patch = getattr(getattr(timm_model, "patch_embed", None), "patch_size", None)
    patch = patch[0] if isinstance(patch, tuple) else patch
    if patch and image_size % patch:
        down = image_size - image_size % patch
        raise ModelError(
            f"image_size: {image_size} is no multiple of the patch size {patch};"
            f" use {down or patch} or {down + patch}."
        )
