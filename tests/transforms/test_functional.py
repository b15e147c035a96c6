"""Image operations against torchvision and timm."""

import math

import numpy as np
import pytest
import torch
from helpers.operations import apply
from PIL import Image, ImageFilter
from timm.data import auto_augment
from torchvision.transforms.v2 import functional as tv

from hfvit.transforms.functional import OPERATIONS

SIDE = 33


def random_images(count):
    """Return smooth images, in which subpixel shifts show."""
    rng = np.random.default_rng(1)
    small = rng.integers(0, 256, (count, 9, 9, 3), dtype=np.uint8)
    images = [np.asarray(Image.fromarray(image).resize((SIDE, SIDE + 7), 3)) for image in small]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()


def affine(image, angle=0.0, translate=(0, 0), shear=(0.0, 0.0), center=None):
    return tv.affine(image, angle, list(translate), 1.0, list(shear), tv.InterpolationMode.BILINEAR, center=center)


def degrees(shear):
    return math.degrees(math.atan(shear))


def on_unit(function):
    """Scale to torchvision's range of float images, 0 to 1."""
    return lambda image, magnitude: function(image / 255, magnitude) * 255


REFERENCE = {
    "identity": lambda image, m: image,
    "grayscale": lambda image, m: tv.rgb_to_grayscale(image, 3),
    "brightness": on_unit(tv.adjust_brightness),
    "contrast": on_unit(tv.adjust_contrast),
    "saturation": on_unit(tv.adjust_saturation),
    "invert": on_unit(lambda image, m: tv.invert(image)),
    "posterize": lambda image, m: tv.posterize(image.byte(), int(m)).float(),
    "solarize": lambda image, m: tv.solarize(image.byte(), int(m)).float(),
    "autocontrast": on_unit(lambda image, m: tv.autocontrast(image)),
    "equalize": lambda image, m: tv.equalize(image.byte()).float(),
    "gaussian_blur": lambda image, m: tv.gaussian_blur(image, [13, 13], [m, m]),
    "shear_x": lambda image, m: affine(image, shear=(degrees(m), 0.0), center=[0, 0]),
    "shear_y": lambda image, m: affine(image, shear=(0.0, degrees(m)), center=[0, 0]),
    "translate_x": lambda image, m: affine(image, translate=(m * image.shape[-1], 0)),
    "translate_y": lambda image, m: affine(image, translate=(0, m * image.shape[-2])),
    "rotate": lambda image, m: tv.rotate(image, m, tv.InterpolationMode.BILINEAR),
}
MAGNITUDES = {
    "brightness": (0.1, 0.7, 1.0, 1.9),
    "contrast": (0.1, 0.7, 1.0, 1.9),
    "saturation": (0.1, 0.7, 1.0, 1.9),
    "posterize": (1, 2, 4, 8),
    "solarize": (0, 64, 128, 255),
    "gaussian_blur": (0.1, 0.5, 1.3, 2.0),
    "shear_x": (-0.9, -0.2, 0.3, 0.99),
    "shear_y": (-0.9, -0.2, 0.3, 0.99),
    "translate_x": (-5 / SIDE, -1 / SIDE, 3 / SIDE, 9 / SIDE),
    "translate_y": (-5 / (SIDE + 7), -1 / (SIDE + 7), 3 / (SIDE + 7), 9 / (SIDE + 7)),
    "rotate": (-135.0, -20.0, 30.0, 90.0),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_operation_equals_torchvision(name):
    magnitudes = MAGNITUDES.get(name, (0.0,) * 4)
    images = random_images(4)
    changed = apply(name, images, magnitudes)
    for image, magnitude, actual in zip(images, magnitudes, changed, strict=True):
        torch.testing.assert_close(actual, REFERENCE[name](image, magnitude), atol=0.02, rtol=0)
    if name in MAGNITUDES:
        assert not torch.equal(changed, images)


def test_sharpness_equals_torchvision_within_rounding():
    images = random_images(4)
    magnitudes = (0.1, 0.7, 1.0, 1.9)
    changed = apply("sharpness", images, magnitudes)
    for image, magnitude, actual in zip(images, magnitudes, changed, strict=True):
        expected = tv.adjust_sharpness(image.byte(), magnitude).float()
        assert (actual - expected).abs().max() <= 1.0


def test_solarize_add_equals_timm():
    images = random_images(3)
    changed = apply("solarize_add", images, [0.0, 37.0, 110.0])
    for image, amount, actual in zip(images, (0, 37, 110), changed, strict=True):
        pillow = Image.fromarray(image.byte().permute(1, 2, 0).numpy())
        expected = np.asarray(auto_augment.solarize_add(pillow, amount))
        assert np.array_equal(actual.permute(1, 2, 0).numpy(), expected)


def test_shear_x_has_pillows_direction():
    """shear_x at +m is AutoAugment's `transform(AFFINE, (1, m, 0, 0, 1, 0))`."""
    image = random_images(1)
    pillow = Image.fromarray(image[0].byte().permute(1, 2, 0).numpy())
    expected = np.asarray(auto_augment.shear_x(pillow, 0.3, resample=Image.BILINEAR)).astype(float)
    actual = apply("shear_x", image, [0.3])[0].permute(1, 2, 0).numpy()
    assert np.abs(actual - expected)[2:-2, 2:-12].max() < 2.0


def test_gaussian_blur_is_close_to_pillow():
    image = random_images(1)
    pillow = Image.fromarray(image[0].byte().permute(1, 2, 0).numpy())
    expected = np.asarray(pillow.filter(ImageFilter.GaussianBlur(1.5))).astype(float)
    actual = apply("gaussian_blur", image, [1.5])[0].permute(1, 2, 0).numpy()
    assert np.abs(actual - expected)[6:-6, 6:-6].max() < 4.0


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_does_not_depend_on_the_batch(name):
    images = random_images(3)
    magnitudes = [MAGNITUDES.get(name, (0.5,) * 4)[1]] * 3
    together = apply(name, images, magnitudes)
    for index in range(3):
        alone = apply(name, images[index : index + 1], magnitudes[:1])
        torch.testing.assert_close(together[index : index + 1], alone)
