"""timm's dynamic image size, switched in a built network: how many patches there are may change in training."""

from timm.layers import Format, PatchEmbed
from torch import nn


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
