"""Record attention weights of timm models; attention rollout."""

from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from hfvit.errors import ModelError


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


def attention_rollout(attentions: tuple[torch.Tensor, ...], grid: tuple[int, int]) -> torch.Tensor:
    """Compute attention rollout (Abnar and Zuidema, https://arxiv.org/abs/2005.00928).

    Each block's mean over heads is averaged with the identity (the residual), and the blocks are multiplied. The map
    is the row of the class token, or the mean over patches for models without one.

    Args:
        attentions: weights of each block (batch, heads, tokens, tokens); class and register tokens come first.
        grid: (rows, columns) of patches.

    Returns:
        Maps (batch, rows, columns) that sum to 1.

    Raises:
        ModelError: the number of tokens changes between blocks (windows, merged or dropped tokens).
    """
    patches = grid[0] * grid[1]
    tokens = attentions[0].shape[-1]
    if any(layer.shape[-2:] != (tokens, tokens) for layer in attentions) or tokens < patches:
        raise ModelError("attention rollout requires the same tokens in all blocks")
    rollout = torch.eye(tokens, device=attentions[0].device).expand(len(attentions[0]), tokens, tokens)
    for layer in attentions:
        rollout = (0.5 * layer.float().mean(dim=1) + 0.5 * torch.eye(tokens, device=layer.device)) @ rollout
    prefix = tokens - patches
    maps = (rollout[:, 0] if prefix else rollout.mean(dim=1))[:, prefix:]
    return (maps / maps.sum(dim=1, keepdim=True)).view(-1, *grid)
