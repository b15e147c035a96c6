"""Change the input size of a timm model; switch its dynamic image size."""

import json
from numbers import Integral
from typing import Any

import torch
from timm.layers import Format, PatchEmbed
from timm.models import get_model_args
from torch import nn

from hfvit.errors import ModelError, one_line
from hfvit.utils.eval_mode import eval_mode


def check_image_size(image_size: Any) -> None:
    """Raise `TypeError` or `ValueError` unless an image size is a positive integer."""
    if isinstance(image_size, bool) or not isinstance(image_size, Integral):
        raise TypeError(f"image_size: must be an integer, both height and width in pixels, got {image_size!r}.")
    if image_size < 1:
        raise ValueError(f"image_size: must be a positive integer, got {image_size}.")


def resize_input(timm_model: nn.Module, image_size: int) -> dict[str, Any]:
    """Change the image size of a timm model.

    Args:
        timm_model: a network with `set_input_size`.
        image_size: height and width in pixels.

    Returns:
        Other arguments that `timm.create_model` needs to rebuild it: windows scale with the patch grid (Swin, MaxViT).
    """
    before = get_model_args(timm_model)
    timm_model.set_input_size(img_size=(image_size, image_size))
    after = get_model_args(timm_model)
    changed = {key: value for key, value in after.items() if key != "img_size" and before.get(key) != value}
    return json.loads(json.dumps(changed))  # tuples become lists, as in config.json


def check_patches(timm_model: nn.Module, image_size: int) -> None:
    """Raise `ModelError` when the model's patches do not tile an image of this size."""
    embed = getattr(timm_model, "patch_embed", None)
    patch = getattr(embed, "patch_size", None)
    patch = patch[0] if isinstance(patch, tuple) else patch
    padding = getattr(getattr(embed, "proj", None), "padding", 0)
    is_padded = padding not in (0, (0, 0))  # PVT v2: overlapping patches of an image of any size
    if patch and not is_padded and image_size % patch:
        down = image_size - image_size % patch
        raise ModelError(
            f"image_size: must be a multiple of the patch size {patch}, got {image_size}. Use {down or patch} or"
            f" {down + patch}."
        )


@torch.no_grad()
def check_computes(timm_model: nn.Module, image_size: int) -> None:
    """Raise `ModelError` when a new model fails on an image of this size.

    timm's EfficientFormer accepts `img_size`, but its attention biases are those of 224 px.
    """
    parameter = next(timm_model.parameters())
    try:
        with eval_mode(timm_model):
            timm_model(torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype))
    except RuntimeError as error:
        raise ModelError(
            f"image_size: {type(timm_model).__name__} cannot compute images of {image_size} px:"
            f" {one_line(error)[:200]}. Omit image_size."
        ) from None


def can_be_dynamic(network: nn.Module) -> bool:
    """Return whether timm supports `dynamic_img_size` (ViT, DeiT, EVA, Swin)."""
    return type(getattr(network, "patch_embed", None)) is PatchEmbed and hasattr(network, "dynamic_img_size")


def set_dynamic(network: nn.Module, on: bool) -> None:
    """Switch `dynamic_img_size` of a built network, as timm's constructors set it.

    When on, position embeddings are resampled to each batch's patch grid, and window masks follow it.
    """
    embed = network.patch_embed
    network.dynamic_img_size = on
    embed.strict_img_size = not on
    if hasattr(network, "_pos_embed"):  # takes a patch grid when on; Swin always does
        embed.flatten = not on
        embed.output_fmt = Format.NHWC if on else Format.NCHW
    for module in network.modules():
        if hasattr(module, "dynamic_mask"):
            module.dynamic_mask = on
        if hasattr(module, "_use_cached_embed"):  # rotary embeddings of a fixed grid
            module._use_cached_embed = not on
