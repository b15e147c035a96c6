"""Token merging for trained ViTs (ToMe, https://arxiv.org/abs/2210.09461)."""

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.nn import functional as F

from hfvit.errors import ModelError


class MergingBlocks(nn.Sequential):
    """Merge `r` patch tokens in each block of a timm ViT, between attention and MLP.

    Args:
        blocks: blocks of the ViT.
        r: number of tokens to merge per block.
        prefix: number of class and register tokens, which are never merged.
        restore: copy merged tokens back to each patch at the end, so that pooling over patches keeps their weights.
    """

    def __init__(self, blocks: nn.Sequential, r: int, prefix: int, restore: bool):
        super().__init__(*blocks)
        self.r = r
        self.prefix = prefix
        self.restore = restore

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the blocks on tokens (batch, tokens, features), merging them."""
        sizes = None  # number of patches merged into each token, (batch, tokens, 1)
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)  # index of each original token
        for block in self:
            update, keys = attention(block.attn, block.norm1(x), sizes)
            x = x + block.ls1(update)
            r = min(self.r, (x.shape[1] - self.prefix) // 2)
            if r > 0:
                sizes = torch.ones_like(x[..., :1]) if sizes is None else sizes
                order, target = match(keys[:, self.prefix :], r)
                if self.restore:
                    positions = positions_after_merge(order, target, x.shape[1], self.prefix).gather(1, positions)
                x, sizes = merge(x, sizes, order, target, self.prefix)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1])) if self.restore else x


def attention(layer: Attention, x: torch.Tensor, sizes: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Run timm's attention with proportional attention (equation 1 of the paper).

    Args:
        layer: attention layer of a timm ViT block.
        x: tokens (batch, tokens, features).
        sizes: number of patches in each token (batch, tokens, 1), whose logarithm is added to the scores; None for 1.

    Returns:
        The output, and the keys averaged over heads (batch, tokens, head_dim).
    """
    batch, tokens, _ = x.shape
    qkv = layer.qkv(x).reshape(batch, tokens, 3, layer.num_heads, layer.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q = layer.q_norm(q)
    k = layer.k_norm(k)
    bias = None if sizes is None else sizes.log().transpose(1, 2)[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    out = layer.norm(out.transpose(1, 2).reshape(batch, tokens, layer.attn_dim))
    if layer.gate is not None:
        out = out * layer.gate(x).sigmoid()
    return layer.proj(out), k.mean(dim=1)


def match(keys: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Match even patches to their most similar odd patches (bipartite soft matching).

    Args:
        keys: (batch, patches, features).
        r: number of pairs.

    Returns:
        `order` (batch, even patches), the even patches by decreasing similarity, of which the first `r` merge; and
        `target` (batch, r), the odd patches that they merge into.
    """
    keys = F.normalize(keys, dim=-1)
    similarity = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    best, partner = similarity.max(dim=-1)
    order = best.topk(best.shape[1], dim=-1).indices
    return order, partner.gather(1, order[:, :r])


def merge(
    x: torch.Tensor, sizes: torch.Tensor, order: torch.Tensor, target: torch.Tensor, prefix: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge matched tokens into means weighted by size.

    Args:
        x: tokens (batch, tokens, features).
        sizes: number of patches in each token (batch, tokens, 1).
        order: even patches by decreasing similarity, of `match`.
        target: odd patches to merge into, of `match`.
        prefix: number of class and register tokens.

    Returns:
        Tokens and sizes: prefix tokens, remaining even patches, odd patches.
    """
    weighted = torch.cat([x * sizes, sizes], dim=-1)
    patches = weighted[:, prefix:]
    r = target.shape[1]
    features = weighted.shape[-1]
    even = patches[:, ::2].gather(1, order[..., None].expand(-1, -1, features))
    odd = patches[:, 1::2].scatter_add(1, target[..., None].expand(-1, -1, features), even[:, :r])
    total = torch.cat([weighted[:, :prefix], even[:, r:], odd], dim=1)
    return total[..., :-1] / total[..., -1:], total[..., -1:]


def positions_after_merge(order: torch.Tensor, target: torch.Tensor, tokens: int, prefix: int) -> torch.Tensor:
    """Return the index of each token after `merge`.

    Args:
        order: even patches by decreasing similarity, of `match`.
        target: odd patches to merge into, of `match`.
        tokens: number of tokens before the merge.
        prefix: number of class and register tokens.

    Returns:
        Indices (batch, tokens).
    """
    batch, even = order.shape
    left = even - target.shape[1]
    steps = torch.arange(max(left, tokens), device=order.device).expand(batch, -1)
    evens = torch.cat([target + left, steps[:, :left]], dim=1)  # in the order of `order`
    evens = torch.zeros_like(evens).scatter(1, order, evens)
    odds = left + steps[:, : tokens - prefix - even]
    odds = F.pad(odds, (0, even - odds.shape[1]))  # an odd number of patches has one more even patch
    patches = torch.stack([evens, odds], dim=2).flatten(1)[:, : tokens - prefix]
    return torch.cat([steps[:, :prefix], patches + prefix], dim=1)


def apply_token_merging(model, r: int) -> None:
    """Merge `r` patches in each block of a classifier; weights keep their names.

    Raises:
        ModelError: the network is not a plain timm ViT, or `r` is out of range.
    """
    network = getattr(model, "timm_model", None)
    blocks = getattr(network, "blocks", ())
    plain = all(type(block) is Block and type(block.attn) is Attention for block in blocks)
    if not isinstance(network, VisionTransformer) or not plain:
        kind = type(model if network is None else network).__name__
        raise ModelError(
            f"merge_tokens: requires the blocks of timm's plain ViT (ViT, DeiT, DINOv2, FlexiViT, SigLIP), got {kind}."
        )
    patches = network.patch_embed.num_patches
    if not 0 < r <= patches // 2:
        raise ModelError(
            f"merge_tokens: must be between 1 and {patches // 2}, half of the {patches} patches, got {r}."
        )
    network.blocks = MergingBlocks(blocks, r, network.num_prefix_tokens, network.global_pool != "token")
