"""Batched resizing against Pillow and torchvision."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from hfvit.transforms.resize import FILTERS, filter_weights, resize_as_pillow, resize_boxes

RNG = np.random.default_rng(0)


def random_images(count=3, height=32, width=32):
    return torch.from_numpy(RNG.integers(0, 256, (count, 3, height, width), dtype=np.uint8))


BOXES = [(0, 0, 32, 32), (3, 5, 20, 27), (10, 0, 9, 32)]


@pytest.mark.parametrize("size", [(224, 224), (32, 32), (12, 20)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_boxes_equals_torchvision(interpolation, size):
    images = random_images().float()
    flips = torch.tensor([[False, False], [True, False], [True, True]])
    resized = resize_boxes(images, torch.tensor(BOXES), flips, size, interpolation)
    for image, (top, left, height, width), (horizontal, vertical), actual in zip(
        images, BOXES, flips, resized, strict=True
    ):
        mode = tv.InterpolationMode(interpolation)
        expected = tv.resized_crop(image, top, left, height, width, list(size), mode, antialias=True)
        expected = expected.flip(-1) if horizontal else expected
        expected = expected.flip(-2) if vertical else expected
        torch.testing.assert_close(actual, expected, atol=2e-3, rtol=0)  # of 255 levels


@pytest.mark.parametrize(
    ("shape", "resized"),
    [
        ((32, 32), (224, 224)),
        ((32, 32), (33, 21)),
        ((50, 50), (40, 40)),
        ((96, 96), (37, 37)),
        ((30, 47), (64, 100)),
        ((20, 100), (64, 31)),
        ((96, 64), (224, 224)),
    ],
)
@pytest.mark.parametrize("interpolation", FILTERS)
def test_resize_as_pillow_equals_pillow(interpolation, resized, shape):
    images = random_images(2, *shape)
    crop = (1, 2, resized[0] - 3, resized[1] - 4)
    actual = resize_as_pillow(images, resized, crop, interpolation)
    for image, got in zip(images, actual, strict=True):
        pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
        pillow = pillow.resize(resized[::-1], Image.Resampling[interpolation.upper()])
        expected = np.asarray(pillow)[1 : 1 + crop[2], 2 : 2 + crop[3]]
        assert np.array_equal(got.permute(1, 2, 0).numpy(), expected)


def test_filter_weights_sum_to_one_within_the_box():
    start, length = torch.tensor([0.0, 4.0]), torch.tensor([16.0, 3.0])
    for interpolation in FILTERS:
        weights = filter_weights(start, length, 16, 24, interpolation)
        assert weights.shape == (2, 24, 16)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 24))
        assert weights[1, :, :4].abs().max() == weights[1, :, 7:].abs().max() == 0


def test_resize_boxes_in_bf16_is_close_to_float32():
    images = random_images(8).float()
    boxes, flips = torch.tensor([[2, 3, 28, 25]] * 8), torch.zeros(8, 2, dtype=torch.bool)
    full = resize_boxes(images, boxes, flips, (64, 64), "bicubic")
    half = resize_boxes(images.bfloat16(), boxes, flips, (64, 64), "bicubic").float()
    assert (half - full).abs().mean() < 1.0
