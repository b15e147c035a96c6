"""TrivialAugment, RandAugment and ThreeAugment policies."""

from collections.abc import Callable

import numpy as np
from scipy.special import ndtri

from hfvit.transforms.functional import MAX_BLUR

Stage = tuple[np.ndarray, np.ndarray]  # names and magnitudes, (images,) each
# Magnitude of an operation as a function of the level (0 to 1), and the center for a random sign (None: no sign).
Space = dict[str, tuple[Callable[[np.ndarray], np.ndarray], float | None]]

BINS = 31
LEVELS = 10.0  # maximum of timm's magnitudes
NOISE = 0.5  # standard deviation of RandAugment's magnitude on that scale
JITTER = 0.3  # of ThreeAugment
JITTER_UNIFORMS = 6  # random numbers per image


def _times(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda level: factor * level


def _nothing(level: np.ndarray) -> np.ndarray:
    return np.zeros_like(level)


# torchvision's TrivialAugmentWide; its translations of 32 pixels as a fraction of a 224-pixel image.
TRIVIAL: Space = {
    "identity": (_nothing, None),
    "shear_x": (_times(0.99), 0.0),
    "shear_y": (_times(0.99), 0.0),
    "translate_x": (_times(32 / 224), 0.0),
    "translate_y": (_times(32 / 224), 0.0),
    "rotate": (_times(135.0), 0.0),
    "brightness": (_times(0.99), 1.0),
    "saturation": (_times(0.99), 1.0),
    "contrast": (_times(0.99), 1.0),
    "sharpness": (_times(0.99), 1.0),
    "posterize": (lambda level: np.round(8 - 6 * level), None),
    "solarize": (lambda level: 255 * (1 - level), None),
    "autocontrast": (_nothing, None),
    "equalize": (_nothing, None),
}
# timm's "increasing" operations of RandAugment.
RAND: Space = {
    "autocontrast": (_nothing, None),
    "equalize": (_nothing, None),
    "invert": (_nothing, None),
    "rotate": (_times(30.0), 0.0),
    "posterize": (lambda level: 4 - np.floor(4 * level), None),
    "solarize": (lambda level: 256 - np.floor(256 * level), None),
    "solarize_add": (lambda level: np.floor(110 * level), None),
    "saturation": (_times(0.9), 1.0),
    "contrast": (_times(0.9), 1.0),
    "brightness": (_times(0.9), 1.0),
    "sharpness": (_times(0.9), 1.0),
    "shear_x": (_times(0.3), 0.0),
    "shear_y": (_times(0.3), 0.0),
    "translate_x": (_times(0.45), 0.0),
    "translate_y": (_times(0.45), 0.0),
}


def num_uniforms(policy: str, num_ops: int) -> int:
    """Return how many uniform random numbers an image needs for `policy`."""
    return {"basic": 0, "trivial_augment": 3, "rand_augment": 4 * num_ops, "three_augment": 2 + JITTER_UNIFORMS}[
        policy
    ]


def sample_stages(policy: str, u: np.ndarray, magnitude: float, num_ops: int) -> list[Stage]:
    """Sample one operation per image and stage.

    Args:
        policy: "basic", "trivial_augment", "rand_augment" or "three_augment".
        u: uniform random numbers (images, num_uniforms(policy, num_ops)).
        magnitude: magnitude of `rand_augment`, 0 to 10.
        num_ops: number of operations of `rand_augment`.

    Returns:
        The names and magnitudes (images,) of each stage.
    """
    if policy == "trivial_augment":
        return [_choose(TRIVIAL, u[:, 0], np.floor(u[:, 1] * BINS) / (BINS - 1), u[:, 2])]
    if policy == "rand_augment":
        return [_rand_augment_stage(u[:, 4 * n : 4 * n + 4], magnitude) for n in range(num_ops)]
    if policy == "three_augment":
        return _three_augment(u)
    return []


def color_jitter_stages(u: np.ndarray, strength: float) -> list[Stage]:
    """Sample torchvision's `ColorJitter` of brightness, contrast and saturation.

    Args:
        u: uniform random numbers (images, JITTER_UNIFORMS).
        strength: factors are from `1 - strength` to `1 + strength`.
    """
    order = np.argsort(u[:, :3], axis=1)
    factors = 1.0 + strength * (2.0 * u[:, 3:] - 1.0)
    names = np.array(["brightness", "contrast", "saturation"])
    return [(names[order[:, n]], factors[:, n]) for n in range(3)]


def _choose(space: Space, which: np.ndarray, level: np.ndarray, sign: np.ndarray) -> Stage:
    """Choose one operation per image with equal probability, at `level`."""
    names = np.array(list(space))[np.floor(which * len(space)).astype(int)]
    magnitudes = np.zeros(len(level))
    for name, (magnitude, center) in space.items():
        chosen = names == name
        value = magnitude(level[chosen])
        magnitudes[chosen] = value if center is None else center + np.where(sign[chosen] < 0.5, -value, value)
    return names, magnitudes


def _rand_augment_stage(u: np.ndarray, magnitude: float) -> Stage:
    """Sample a stage of timm's `rand-mM-mstd0.5-inc1`, applied with probability 0.5.

    Cubuk et al., https://arxiv.org/abs/1909.13719.
    """
    level = np.clip(magnitude + NOISE * ndtri(u[:, 1]), 0.0, LEVELS) / LEVELS
    names, magnitudes = _choose(RAND, u[:, 0], level, u[:, 2])
    return np.where(u[:, 3] < 0.5, names, "identity"), magnitudes


def _three_augment(u: np.ndarray) -> list[Stage]:
    """Sample one of gray, solarize and blur, then color jitter in random order.

    Touvron et al., DeiT III, https://arxiv.org/abs/2204.07118.
    """
    names = np.array(["grayscale", "solarize", "gaussian_blur"])[np.floor(u[:, 0] * 3).astype(int)]
    magnitudes = np.where(names == "gaussian_blur", 0.1 + (MAX_BLUR - 0.1) * u[:, 1], 128.0)
    return [(names, magnitudes), *color_jitter_stages(u[:, 2:], JITTER)]
