"""Policies against the operations and magnitudes of torchvision and timm."""

from collections import Counter

import numpy as np
import pytest
from timm.data import auto_augment
from torchvision.transforms import v2

from hfvit.recipe.arguments import POLICIES
from hfvit.transforms.auto_augment import RAND, TRIVIAL, num_uniforms, sample_stages
from hfvit.transforms.functional import IDENTITY, OPERATIONS
from hfvit.utils.counter_rng import sample_seeds, uniform

# hfvit's names of torchvision's and timm's operations.
TORCHVISION = {
    "Identity": "identity", "ShearX": "shear_x", "ShearY": "shear_y", "TranslateX": "translate_x",
    "TranslateY": "translate_y", "Rotate": "rotate", "Brightness": "brightness", "Color": "saturation",
    "Contrast": "contrast", "Sharpness": "sharpness", "Posterize": "posterize", "Solarize": "solarize",
    "AutoContrast": "autocontrast", "Equalize": "equalize",
}  # fmt: skip
TIMM = {
    "AutoContrast": "autocontrast", "Equalize": "equalize", "Invert": "invert", "Rotate": "rotate",
    "PosterizeIncreasing": "posterize", "SolarizeIncreasing": "solarize", "SolarizeAdd": "solarize_add",
    "ColorIncreasing": "saturation", "ContrastIncreasing": "contrast", "BrightnessIncreasing": "brightness",
    "SharpnessIncreasing": "sharpness", "ShearX": "shear_x", "ShearY": "shear_y", "TranslateXRel": "translate_x",
    "TranslateYRel": "translate_y",
}  # fmt: skip


def sample(policy, images=4000, magnitude=9.0, num_ops=2):
    u = uniform(sample_seeds(0, 0, np.arange(images)), num_uniforms(policy, num_ops))
    return sample_stages(policy, u, magnitude, num_ops)


def value(space, name, level):
    magnitude, center = space[name]
    return float(magnitude(np.array([level]))[0]), center


@pytest.mark.parametrize("policy", POLICIES)
def test_sample_stages_names_known_operations(policy):
    for names, magnitudes in sample(policy):
        assert set(names) <= {IDENTITY, *OPERATIONS}
        assert np.isfinite(magnitudes).all()


def test_trivial_augment_equals_torchvisions_space():
    space = v2.TrivialAugmentWide._AUGMENTATION_SPACE
    assert {TORCHVISION[name] for name in space} == set(TRIVIAL)
    for name, (magnitudes, signed) in space.items():
        ours = TORCHVISION[name]
        theirs = magnitudes(31, 224, 224)
        assert (TRIVIAL[ours][1] is not None) == signed
        if theirs is None:
            continue
        # Pixels to fractions of a 224-pixel image, and fractions of the range to levels of 255.
        unit = {"translate_x": 1 / 224, "translate_y": 1 / 224, "solarize": 255.0}.get(ours, 1.0)
        for bin in (0, 7, 19, 30):
            assert value(TRIVIAL, ours, bin / 30)[0] == pytest.approx(float(theirs[bin]) * unit, abs=1e-5)


def test_rand_augment_equals_timms_space(monkeypatch):
    assert {TIMM[name] for name in auto_augment._RAND_INCREASING_TRANSFORMS} == set(RAND)
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: value)
    for name, ours in TIMM.items():
        level_to_argument = auto_augment.LEVEL_TO_ARG[name]
        for level in (0.0, 3.0, 8.5, 10.0):
            if level_to_argument is None:
                continue
            expected = level_to_argument(level, {})[0]
            magnitude, center = value(RAND, ours, level / 10)
            assert (center or 0.0) + magnitude == pytest.approx(expected, abs=1e-6)


def test_trivial_augment_samples_operations_uniformly_with_both_signs():
    ((names, magnitudes),) = sample("trivial_augment", 14_000)
    counts = Counter(names)
    assert set(counts) == set(TRIVIAL)
    assert all(850 < count < 1150 for count in counts.values())
    rotations = magnitudes[names == "rotate"]
    assert -135 <= rotations.min() < -100 < 100 < rotations.max() <= 135
    assert abs(np.sign(rotations).mean()) < 0.15
    assert len(np.unique(np.abs(rotations).round(6))) == 31


def test_rand_augment_applies_half_of_its_operations():
    stages = sample("rand_augment", 15_000, magnitude=6.0, num_ops=3)
    assert len(stages) == 3
    for names, magnitudes in stages:
        assert 0.47 < (names != "identity").mean() < 0.53
        levels = np.abs(magnitudes[names == "rotate"]) / 30 * 10
        assert levels.mean() == pytest.approx(6.0, abs=0.1)
        assert levels.std() == pytest.approx(0.5, abs=0.1)
    assert (stages[0][0] != stages[1][0]).any()


def test_three_augment_samples_one_of_three_and_jitters_in_random_order():
    first, *jitter = sample("three_augment", 9000)
    assert all(2700 < count < 3300 for count in Counter(first[0]).values())
    assert set(first[0]) == {"grayscale", "solarize", "gaussian_blur"}
    assert (first[1][first[0] == "solarize"] == 128).all()
    sigmas = first[1][first[0] == "gaussian_blur"]
    assert 0.1 <= sigmas.min() < 0.2 < 1.9 < sigmas.max() <= 2.0
    orders = Counter(zip(*(names for names, _ in jitter), strict=True))
    assert len(orders) == 6
    assert all(len(set(order)) == 3 for order in orders)
    factors = np.concatenate([magnitudes for _, magnitudes in jitter])
    assert 0.7 <= factors.min() < 0.72 < 1.28 < factors.max() <= 1.3


def test_basic_has_no_operations():
    assert sample("basic") == []
    assert num_uniforms("basic", 2) == 0
