"""Overlay of a relevance map on an image."""

import numpy as np
from PIL import Image

COLOR = (230, 110, 0)  # RGB of relevant parts
STRENGTH = 0.8  # opacity where the relevance is largest
_LUMA = (0.299, 0.587, 0.114)  # as Pillow converts to gray


def highlight(image: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """Color the relevant parts of an image, and show the others in gray.

    Args:
        image: uint8 `(height, width, 3)`.
        relevance: `(rows, columns)`, 0 to 1.

    Returns:
        uint8 `(height, width, 3)`.
    """
    size = (image.shape[1], image.shape[0])
    smooth = Image.fromarray(relevance.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    opacity = STRENGTH * np.asarray(smooth).clip(0, 1)[..., None]
    gray = (image @ np.array(_LUMA))[..., None]
    return (gray * (1 - opacity) + np.array(COLOR) * opacity).round().astype(np.uint8)


def enlarged(image: np.ndarray, side: int) -> np.ndarray:
    """Repeat the pixels of a small image to a longer side of about `side` pixels."""
    factor = max(1, side // max(image.shape[:2]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)
