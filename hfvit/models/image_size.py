"""Change the input size of a timm model; switch its dynamic image size."""

import json
from typing import Any

from timm.layers import Format, PatchEmbed
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


def can_be_dynamic(network: nn.Module) -> bool:
    """Whether timm has a dynamic image size for `network`: its ViT, DeiT, EVA and Swin families do."""
    return type(getattr(network, "patch_embed", None)) is PatchEmbed and hasattr(network, "dynamic_img_size")


def set_dynamic(network: nn.Module, on: bool) -> None:
    """Set what timm sets for `dynamic_img_size` when it builds a network; no checkpoint holds any of it.

    When on, positions are resampled to the patches that a batch has, with their gradient, and windows masked for them.
    """
    embed = network.patch_embed
    network.dynamic_img_size, embed.strict_img_size = on, not on
    if hasattr(network, "_pos_embed"):  # it takes a grid of patches then; Swin takes one always
        embed.flatten, embed.output_fmt = not on, Format.NHWC if on else Format.NCHW
    for module in network.modules():
        if hasattr(module, "dynamic_mask"):
            module.dynamic_mask = on
        if hasattr(module, "_use_cached_embed"):  # rotary positions: those of one grid, or of any
            module._use_cached_embed = not on
