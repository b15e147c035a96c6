"""Attention weights of timm's plain transformer blocks, which timm itself does not return."""

from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from hfvit.errors import ModelError


@contextmanager
def unfused_windows(model: nn.Module):
    """Let Hiera's windows, a fifth dimension, be products and softmax: ONNX has fused attention for four only."""
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
    """Collect softmaxed attention weights while the body runs, with timm's unfused attention."""
    layers = [block.attn for block in getattr(timm_model, "blocks", ()) if hasattr(block, "attn")]
    layers = [layer for layer in layers if hasattr(layer, "fused_attn") and hasattr(layer, "attn_drop")]
    if not layers:
        raise ModelError(
            f"output_attentions: not for this family: {type(timm_model).__name__} has no plain attention blocks to"
            " record; ViT, DeiT, BEiT, EVA and DINOv2 have."
        )
    maps: list[torch.Tensor] = []
    with ExitStack() as stack:
        for layer in layers:
            _unfuse(layer, stack)
            hook = layer.attn_drop.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
            stack.callback(hook.remove)
        yield maps
