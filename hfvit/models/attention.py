"""Record attention weights of timm models; attention rollout."""

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


def attention_rollout(attentions: tuple[torch.Tensor, ...], grid: tuple[int, int]) -> torch.Tensor:
    """How much of each patch reaches the classifier: `(batch, rows, columns)`, each map's sum 1.

    Args:
        attentions: of each block `(batch, heads, tokens, tokens)`; tokens before the patches are class token and
            registers. Half of each block is its residual, so the maps are averaged with the identity and multiplied
            (Abnar and Zuidema, https://arxiv.org/abs/2005.00928).
        grid: rows and columns of patches.

    What is read is the row of the class token, or without one the mean over the patches. Raises `ModelError` where the
    tokens are not these patches all the way (windows, merged or dropped tokens).
    """
    patches, tokens = grid[0] * grid[1], attentions[0].shape[-1]
    if any(layer.shape[-2:] != (tokens, tokens) for layer in attentions) or tokens < patches:
        raise ModelError("the tokens are not the same in all blocks, so their attention cannot be followed to patches")
    rollout = torch.eye(tokens, device=attentions[0].device).expand(len(attentions[0]), tokens, tokens)
    for layer in attentions:
        rollout = (0.5 * layer.float().mean(dim=1) + 0.5 * torch.eye(tokens, device=layer.device)) @ rollout
    prefix = tokens - patches
    seen = (rollout[:, 0] if prefix else rollout.mean(dim=1))[:, prefix:]
    return (seen / seen.sum(dim=1, keepdim=True)).view(-1, *grid)
