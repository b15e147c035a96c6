"""Two ways to join an image and a text: cross-attention between their tokens, and late fusion of their summaries."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

HEAD_DIM = 64  # of an attention head, at least
MLP_RATIO = 4


class CrossAttention(nn.Module):
    """A pre-norm residual block: image tokens attend to text tokens (Vaswani et al.,
    https://arxiv.org/abs/1706.03762), then each goes through a small network of its own."""

    def __init__(self, image_dim: int, text_dim: int):
        super().__init__()
        self.heads = head_count(image_dim)
        self.image_norm, self.text_norm = nn.LayerNorm(image_dim), nn.LayerNorm(text_dim)
        self.query, self.key_value = nn.Linear(image_dim, image_dim), nn.Linear(text_dim, 2 * image_dim)
        self.output = nn.Linear(image_dim, image_dim)
        self.mlp_norm = nn.LayerNorm(image_dim)
        self.mlp = nn.Sequential(
            nn.Linear(image_dim, MLP_RATIO * image_dim), nn.GELU(), nn.Linear(MLP_RATIO * image_dim, image_dim)
        )

    def forward(self, image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Image tokens `(batch, image tokens, image_dim)`, changed by text tokens `(batch, tokens, text_dim)`.

        `mask`: `(batch, tokens)` bool, False where a text is padded; each row has a True.
        """
        query = self._by_head(self.query(self.image_norm(image)))
        key, value = (self._by_head(part) for part in self.key_value(self.text_norm(text)).chunk(2, dim=-1))
        found = scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
        image = image + self.output(found.transpose(1, 2).flatten(2))
        return image + self.mlp(self.mlp_norm(image))

    def _by_head(self, tokens: Tensor) -> Tensor:
        """`(batch, tokens, dim)` -> `(batch, heads, tokens, dim / heads)`"""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Concatenation(nn.Module):
    """Late fusion: the pooled image beside the mean of the text's tokens, through one hidden layer.

    Without that layer a class could not depend on how image and text go together, only on each by itself.
    """

    def __init__(self, image_dim: int, text_dim: int):
        super().__init__()
        self.image_norm, self.text_norm = nn.LayerNorm(image_dim), nn.LayerNorm(text_dim)
        self.hidden = nn.Linear(image_dim + text_dim, image_dim)

    def forward(self, image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """`(batch, image_dim)` of a pooled image `(batch, image_dim)` and text tokens `(batch, tokens, text_dim)`.

        `mask` as for `CrossAttention`.
        """
        weights = mask.unsqueeze(-1).to(text.dtype)
        mean = (text * weights).sum(dim=1) / weights.sum(dim=1)
        both = torch.cat([self.image_norm(image), self.text_norm(mean)], dim=-1)
        return nn.functional.gelu(self.hidden(both))


def head_count(dim: int) -> int:
    """Attention heads of `dim` channels: as many as divide it with `HEAD_DIM` channels or more each."""
    return next(heads for heads in range(max(1, dim // HEAD_DIM), 0, -1) if dim % heads == 0)
