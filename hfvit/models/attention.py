"""Fused attention and attention weights of timm models."""

from contextlib import ExitStack, contextmanager

import torch
from timm.models.xcit import XCA
from torch import nn

from hfvit.errors import ModelError

MAX_UNFUSED_PATCHES = 600  # with 1,024, unfused attention is not faster, and needs much more memory


def unfuse_slow_attention(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Disable fused attention for training where it is slower.

    On CPUs in bfloat16, the backward pass of PyTorch's fused kernel (`scaled_dot_product_attention`) is slow, unless
    there are many patches.

    Args:
        model: module that contains layers of timm.
        device: device of the training.
        dtype: type of its matrix products, None for float32.
    """
    if device.type != "cpu" or dtype != torch.bfloat16:
        return
    counts = [getattr(layer, "num_patches", None) for layer in model.modules()]
    if max((count for count in counts if isinstance(count, int)), default=0) > MAX_UNFUSED_PATCHES:
        return
    for layer in model.modules():
        if hasattr(layer, "fused_attn"):
            layer.fused_attn = False


@contextmanager
def unfused_window_attention(model: nn.Module):
    """Disable fused attention in Hiera's windows, whose 5-D tensors ONNX lacks."""
    layers = [module for module in model.modules() if getattr(module, "use_mask_unit_attn", False)]
    with ExitStack() as stack:
        for layer in layers:
            _unfuse(layer, stack)
        yield


def _unfuse(layer: nn.Module, stack: ExitStack) -> None:
    if hasattr(layer, "fused_attn"):
        stack.callback(setattr, layer, "fused_attn", layer.fused_attn)
        layer.fused_attn = False


@contextmanager
def recorded_attention(timm_model: nn.Module):
    """Yield a list that collects the attention weights of forward passes.

    timm's fused attention is disabled meanwhile, as it does not compute the weights.

    Raises:
        ModelError: the model has no plain attention blocks.
    """
    layers = [block.attn for block in getattr(timm_model, "blocks", ()) if hasattr(block, "attn")]
    layers = [layer for layer in layers if hasattr(layer, "fused_attn") and hasattr(layer, "attn_drop")]
    layers = [layer for layer in layers if not isinstance(layer, XCA)]  # attention between channels
    if not layers:
        raise ModelError(
            "output_attentions: requires plain attention blocks (ViT, DeiT, BEiT, EVA, DINOv2), got"
            f" {type(timm_model).__name__}."
        )
    maps: list[torch.Tensor] = []
    with ExitStack() as stack:
        for layer in layers:
            _unfuse(layer, stack)
            hook = layer.attn_drop.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
            stack.callback(hook.remove)
        yield maps
