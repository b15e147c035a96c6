"""Apply one operation of an augmentation policy to a batch."""

import numpy as np
import torch

from hfvit.transforms.functional import FAMILIES, IDENTITY, OPERATIONS, Constants, parameters_of


def apply(name, images, magnitudes, fill=None):
    """Return changed copies of images (batch, 3, height, width), 0 to 255.

    Uncovered pixels are `fill` or black.
    """
    changed = images.clone()
    if name != IDENTITY:
        parameters = parameters_of(name, np.asarray(magnitudes), *images.shape[-2:])
        constants = Constants(torch.zeros(3, 1, 1) if fill is None else fill)
        FAMILIES[OPERATIONS[name][0]](changed, torch.from_numpy(parameters), constants)
    return changed
