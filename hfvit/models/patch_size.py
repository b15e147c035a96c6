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
from hfvit.utils.counter_rng import image_seeds, uniforms

ROW = np.array([2**62])  # a row of no data set: these draws have a stream of their own


class FlexiblePatchEmbed(nn.Module):
    """timm's `PatchEmbed` at a patch size that changes from batch to batch; in evaluation at its own.

    Its parameters are those of the embedding that it stands for, names included. Pixels `(batch, 3, height, width)`
    become `(batch, rows, columns, features)`.
    """

    def __init__(self, embed: PatchEmbed, patch_sizes: list[int]):
        super().__init__()
        self.proj, self.norm = embed.proj, embed.norm
        self.patch_size, self.img_size, self.grid_size = embed.patch_size, embed.img_size, embed.grid_size
        self.num_patches = embed.num_patches
        self.patch_sizes = patch_sizes
        self.drawn = self.patch_size[0]
        self.resampler = PatchEmbedResamplerFixedOrigSize(tuple(self.patch_size))

    def draw(self, seed: int, step: int) -> None:
        """Take the patch size of an optimizer step: a function of `(seed, step)`, so that a resumed run and all
        processes agree."""
        share = float(uniforms(image_seeds(seed, step, ROW), 1)[0, 0])
        self.drawn = self.patch_sizes[int(share * len(self.patch_sizes))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = self.drawn if self.training else self.patch_size[0]
        # The resampling is a product, which autocast would round.
        with torch.autocast(x.device.type, enabled=False):
            weight = self.resampler(self.proj.weight, [size, size])
        return self.norm(F.conv2d(x, weight, self.proj.bias, stride=size).permute(0, 2, 3, 1))


class PatchSizeDraws(TrainerCallback):
    """Draws the patch size before each optimizer step."""

    def __init__(self, embed: FlexiblePatchEmbed):
        self.embed = embed

    def on_step_begin(self, args, state, control, **kwargs):
        self.embed.draw(args.seed, state.global_step)


def train_patch_sizes(model, patch_sizes: list[int]) -> PatchSizeDraws:
    """Let `model` (a `TimmWrapperForImageClassification`) train at these patch sizes, in pixels.

    Returns the callback that draws them. What the model saves stays a stock checkpoint of its own patch size. Raises
    `ModelError` for a family that cannot, or where a size does not tile the images.
    """
    network = model.timm_model
    _check_family(network, "patch_sizes")
    for size in patch_sizes:
        _check_tiles("patch_sizes", network, size)
    set_dynamic(network, True)
    network.patch_embed = FlexiblePatchEmbed(network.patch_embed, patch_sizes)
    return PatchSizeDraws(network.patch_embed)


def patch_size_callbacks(model) -> list[PatchSizeDraws]:
    """Return the callback that draws the patch sizes of `train_patch_sizes`; none for a model of one patch size."""
    embed = _flexible_embed(model)
    return [PatchSizeDraws(embed)] if embed else []


def _flexible_embed(model) -> FlexiblePatchEmbed | None:
    embed = getattr(getattr(model, "timm_model", None), "patch_embed", None)
    return embed if isinstance(embed, FlexiblePatchEmbed) else None


@contextmanager
def most_patches(model) -> Iterator[None]:
    """Within, a model of `train_patch_sizes` works at its smallest patches, which need the most memory."""
    embed = _flexible_embed(model)
    if embed is None:
        yield
        return
    drawn, embed.drawn = embed.drawn, min(embed.patch_sizes)
    try:
        yield
    finally:
        embed.drawn = drawn


def set_patch_size(model, patch_size: int) -> None:
    """Resample a trained model to another patch size in pixels; `model.config` then says so."""
    network = model.timm_model if hasattr(model, "timm_model") else model
    _check_family(network, "patch_size")
    _check_tiles("patch_size", network, patch_size)
    network.set_input_size(patch_size=(patch_size, patch_size))
    model.config.model_args = {**(model.config.model_args or {}), "patch_size": patch_size}


def _check_family(network: nn.Module, key: str) -> None:
    if not can_be_dynamic(network) or not hasattr(network, "_pos_embed"):
        raise ModelError(
            f"{key}: not for this family: the patches of {type(network).__name__} cannot change; timm's ViT, DeiT,"
            " FlexiViT, DINOv2 and EVA can."
        )


def _check_tiles(key: str, network: nn.Module, patch_size: int) -> None:
    side = math.gcd(*network.patch_embed.img_size)
    if patch_size < 2 or side % patch_size:
        fits = ", ".join(str(size) for size in range(4, side + 1) if side % size == 0)
        raise ModelError(f"{key}: patches of {patch_size} px do not tile {side} px; use one of {fits}.")
