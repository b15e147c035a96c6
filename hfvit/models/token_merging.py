"""Token merging for trained ViTs (ToMe, https://arxiv.org/abs/2210.09461)."""

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.nn import functional as F

from hfvit.errors import ModelError


class MergingBlocks(nn.Sequential):
    """The blocks of a timm ViT, with `r` patches merged in each between attention and MLP.

    Prefix tokens (class, registers) are never merged. With `restore` every patch is given back at the end, as a copy
    of what it was merged into, so that a mean or an attention over patches weighs them as before.
    """

    def __init__(self, blocks: nn.Sequential, r: int, prefix: int, restore: bool):
        super().__init__(*blocks)
        self.r, self.prefix, self.restore = r, prefix, restore

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens `(batch, tokens, features)` -> the same, fewer unless `restore`."""
        sizes = None  # patches that each token stands for, (batch, tokens, 1)
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)  # where each first token is now
        for block in self:
            update, keys = attention(block.attn, block.norm1(x), sizes)
            x = x + block.ls1(update)
            r = min(self.r, (x.shape[1] - self.prefix) // 2)
            if r > 0:
                sizes = torch.ones_like(x[..., :1]) if sizes is None else sizes
                order, target = match(keys[:, self.prefix :], r)
                if self.restore:
                    places = places_after(order, target, x.shape[1], self.prefix).gather(1, places)
                x, sizes = merge(x, sizes, order, target, self.prefix)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1])) if self.restore else x


def attention(layer: Attention, x: torch.Tensor, sizes: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """timm's attention with `log sizes` added to the scores (proportional attention, equation 1 of the paper).

    Returns what it gives and the mean of its heads' keys `(batch, tokens, head_dim)`.
    """
    batch, tokens, _ = x.shape
    qkv = layer.qkv(x).reshape(batch, tokens, 3, layer.num_heads, layer.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = layer.q_norm(q), layer.k_norm(k)
    bias = None if sizes is None else sizes.log().transpose(1, 2)[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    out = layer.norm(out.transpose(1, 2).reshape(batch, tokens, layer.attn_dim))
    if layer.gate is not None:
        out = out * layer.gate(x).sigmoid()
    return layer.proj(out), k.mean(dim=1)


def match(keys: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bipartite soft matching: of patches 0, 2, 4, ... the `r` that are most alike to one of patches 1, 3, 5, ...

    `keys` are `(batch, patches, features)`. Returns `order` `(batch, even patches)`, the even patches by falling
    similarity, of which the first `r` shall merge, and `target` `(batch, r)`, with which of the odd ones.
    """
    keys = F.normalize(keys, dim=-1)
    similarity = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    best, partner = similarity.max(dim=-1)
    order = best.topk(best.shape[1], dim=-1).indices
    return order, partner.gather(1, order[:, :r])


def merge(
    x: torch.Tensor, sizes: torch.Tensor, order: torch.Tensor, target: torch.Tensor, prefix: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their sizes after `match`: means of what merges, weighted by size.

    First the prefix tokens, then the even patches that are left, then the odd ones.
    """
    weighted = torch.cat([x * sizes, sizes], dim=-1)
    patches, r, features = weighted[:, prefix:], target.shape[1], weighted.shape[-1]
    even = patches[:, ::2].gather(1, order[..., None].expand(-1, -1, features))
    odd = patches[:, 1::2].scatter_add(1, target[..., None].expand(-1, -1, features), even[:, :r])
    total = torch.cat([weighted[:, :prefix], even[:, r:], odd], dim=1)
    return total[..., :-1] / total[..., -1:], total[..., -1:]


def places_after(order: torch.Tensor, target: torch.Tensor, tokens: int, prefix: int) -> torch.Tensor:
    """Where `merge` puts each of its `tokens`: `(batch, tokens)` indices."""
    (batch, even), left = order.shape, order.shape[1] - target.shape[1]
    steps = torch.arange(max(left, tokens), device=order.device).expand(batch, -1)
    evens = torch.cat([target + left, steps[:, :left]], dim=1)  # in the order of `order`
    evens = torch.zeros_like(evens).scatter(1, order, evens)
    odds = left + steps[:, : tokens - prefix - even]
    odds = F.pad(odds, (0, even - odds.shape[1]))  # of an odd number of patches the last one is even
    patches = torch.stack([evens, odds], dim=2).flatten(1)[:, : tokens - prefix]
    return torch.cat([steps[:, :prefix], patches + prefix], dim=1)


def merge_in_blocks(model, r: int) -> None:
    """Let a loaded classifier merge `r` patches in each block; its weights and their names stay as they are.

    Raises `ModelError` for a family other than timm's plain ViT, or for a rate that leaves nothing to merge.
    """
    network = getattr(model, "timm_model", None)
    blocks = getattr(network, "blocks", ())
    plain = all(type(block) is Block and type(block.attn) is Attention for block in blocks)
    if not isinstance(network, VisionTransformer) or not plain:
        kind = type(model if network is None else network).__name__
        raise ModelError(
            f"merge_tokens: not for this family: {kind} has other blocks than timm's plain ViT (ViT, DeiT, DINOv2,"
            " FlexiViT, SigLIP)."
        )
    patches = network.patch_embed.num_patches
    if not 0 < r <= patches // 2:
        raise ModelError(f"merge_tokens: {r} is none of 1 to {patches // 2}, half of the {patches} patches.")
    network.blocks = MergingBlocks(blocks, r, network.num_prefix_tokens, network.global_pool != "token")
