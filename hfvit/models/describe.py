"""Describe the architecture of a network in words."""

import re

from torch import nn


def describe_architecture(network: nn.Module) -> str:
    """Return the name and the size of a timm network, such as it was built.

    Of a Vision Transformer, these are its patches, blocks, width and heads, which may differ from those of the timm
    name that it was built from.
    """
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(network).__name__)
    blocks = getattr(network, "blocks", None)
    patch_size = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    heads = getattr(getattr(blocks[0], "attn", None), "num_heads", None) if blocks else None
    width = getattr(network, "embed_dim", None)
    if not patch_size or not heads or not isinstance(width, int) or hasattr(network, "stages"):
        return name
    side = patch_size if isinstance(patch_size, int) else patch_size[0]
    text = f"{name} with patches of {side} px, {len(blocks)} blocks of width {width}, {heads} heads"
    registers = getattr(network, "num_reg_tokens", 0)
    return f"{text}, {registers} registers" if registers else text
