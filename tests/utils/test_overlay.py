"""Overlay of relevance maps."""

import numpy as np

from hfvit.utils.overlay import enlarged, highlight


def test_enlarged_repeats_pixels():
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert (enlarged(image, 6)[::3, ::3] == image).all()
    assert enlarged(image, 6).shape == (6, 6, 3)
    assert enlarged(image, 1) is not None
    assert enlarged(image, 1).shape == image.shape


def test_highlight_colors_the_relevant_part():
    image = np.full((8, 8, 3), 100, np.uint8)
    relevance = np.zeros((2, 2), np.float32)
    relevance[0, 0] = 1
    shown = highlight(image, relevance)
    assert np.ptp(shown[7, 7]) < 5
    assert shown[0, 0, 0] > 180 > shown[0, 0, 1] > shown[0, 0, 2]
