"""Flexible patch sizes (FlexiViT, https://arxiv.org/abs/2212.08013)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from timm.layers import PatchEmbed
from timm.layers.patch_embed import PatchEmbedResamplerFixedOrigSize
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback

from hfvit.errors import ModelError
from hfvit.models.image_size import can_be_dynamic, set_dynamic
from hfvit.utils.counter_rng import sample_seeds, uniform

ROW = np.array([2**62])  # outside any data set, so that the random stream is independent


class FlexiblePatchEmbed(nn.Module):
    """Embed patches of random size in training, of the original size in evaluation.

    It shares the parameters, and their names, of the replaced timm `PatchEmbed`.

    Args:
        embed: patch embedding to replace.
        patch_sizes: patch sizes in pixels to sample from.
    """

    def __init__(self, embed: PatchEmbed, patch_sizes: list[int]):
        super().__init__()
        self.proj = embed.proj
        self.norm = embed.norm
        self.patch_size = embed.patch_size
        self.img_size = embed.img_size
        self.grid_size = embed.grid_size
        self.num_patches = embed.num_patches
        self.patch_sizes = patch_sizes
        self.current_size = self.patch_size[0]
        self.resampler = PatchEmbedResamplerFixedOrigSize(tuple(self.patch_size))

    def sample(self, seed: int, step: int) -> None:
        """Sample the patch size of an optimizer step.

        It depends on seed and step only, so that resumed runs and all processes agree.
        """
        u = float(uniform(sample_seeds(seed, step, ROW), 1)[0, 0])
        self.current_size = self.patch_sizes[int(u * len(self.patch_sizes))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed pixels (batch, 3, height, width) as (batch, rows, columns, features)."""
        size = self.current_size if self.training else self.patch_size[0]
        # Autocast would round the resampled weights.
        with torch.autocast(x.device.type, enabled=False):
            weight = self.resampler(self.proj.weight, [size, size])
        return self.norm(F.conv2d(x, weight, self.proj.bias, stride=size).permute(0, 2, 3, 1))


class PatchSizeCallback(TrainerCallback):
    """Sample the patch size before each optimizer step."""

    def __init__(self, embed: FlexiblePatchEmbed):
        self.embed = embed

    def on_step_begin(self, args, state, control, **kwargs):
        self.embed.sample(args.seed, state.global_step)


def train_patch_sizes(model, patch_sizes: list[int]) -> None:
    """Train a model with random patch sizes; its checkpoints keep its own patch size.

    `patch_size_callbacks` returns the callback that samples them.

    Args:
        model: a `TimmWrapperForImageClassification`, changed in place.
        patch_sizes: patch sizes in pixels.

    Raises:
        ModelError: the network does not support it, or a size does not tile the images.
    """
    network = model.timm_model
    _check_family(network, "patch_sizes")
    for size in patch_sizes:
        _check_tiles("patch_sizes", network, size)
    set_dynamic(network, True)
    network.patch_embed = FlexiblePatchEmbed(network.patch_embed, patch_sizes)


def patch_size_callbacks(model) -> list[PatchSizeCallback]:
    """Return the callback of `train_patch_sizes`, none for a fixed patch size."""
    embed = _flexible_embed(model)
    return [PatchSizeCallback(embed)] if embed else []


def _flexible_embed(model) -> FlexiblePatchEmbed | None:
    embed = getattr(getattr(model, "timm_model", None), "patch_embed", None)
    return embed if isinstance(embed, FlexiblePatchEmbed) else None


@contextmanager
def smallest_patch_size(model) -> Iterator[None]:
    """Use the smallest patch size within the context, which needs the most memory."""
    embed = _flexible_embed(model)
    if embed is None:
        yield
        return
    before = embed.current_size
    embed.current_size = min(embed.patch_sizes)
    try:
        yield
    finally:
        embed.current_size = before


def set_patch_size(model, patch_size: int) -> None:
    """Resample a trained model to another patch size in pixels, updating its config."""
    network = model.timm_model if hasattr(model, "timm_model") else model
    _check_family(network, "patch_size")
    _check_tiles("patch_size", network, patch_size)
    network.set_input_size(patch_size=(patch_size, patch_size))
    model.config.model_args = {**(model.config.model_args or {}), "patch_size": patch_size}


def _check_family(network: nn.Module, key: str) -> None:
    if not can_be_dynamic(network) or not hasattr(network, "_pos_embed"):
        raise ModelError(f"{key}: requires timm's ViT, DeiT, FlexiViT, DINOv2 or EVA, got {type(network).__name__}.")


def _check_tiles(key: str, network: nn.Module, patch_size: int) -> None:
    side = math.gcd(*network.patch_embed.img_size)
    if patch_size < 2 or side % patch_size:
        fits = ", ".join(str(size) for size in range(4, side + 1) if side % size == 0)
        raise ModelError(f"{key}: must divide the image size {side}, got {patch_size}. Use one of {fits}.")
