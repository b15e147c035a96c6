"""Batched augmentation and preprocessing against torchvision, timm and the image processor."""

import numpy as np
import pytest
import torch
from helpers.launches import Launches
from helpers.operations import apply
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv
from transformers import TimmWrapperImageProcessor

from hfvit.recipe.arguments import PADDING_MODES, POLICIES
from hfvit.transforms.augmentation import (
    ATTEMPTS,
    CROP_UNIFORMS,
    VERTICAL_UNIFORM,
    Augmentation,
    plan_passes,
    random_boxes,
)
from hfvit.transforms.auto_augment import JITTER_UNIFORMS, color_jitter_stages, num_uniforms, sample_stages
from hfvit.transforms.preprocessing import Preprocessing
from hfvit.utils.counter_rng import sample_seeds, uniform

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
CFG = {"input_size": [3, 24, 24], "mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 1.0}


def random_images(count=6, height=32, width=32):
    rng = np.random.default_rng(2)
    return torch.from_numpy(rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def seeds(count=6):
    return sample_seeds(0, 0, np.arange(count))


def augmentation(**changes):
    return Augmentation((48, 48), MEAN, STD, **changes)


def normalized(levels):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (levels / 255 - mean) / std


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_augmentation_basic_equals_torchvision_with_the_same_crops(interpolation):
    augment, images = augmentation(interpolation=interpolation, crop_scale=(0.3, 1.0)), random_images()
    plan = augment.sample(seeds(), 32, 32)
    assert 0 < plan["flips"][:, 0].sum() < 6
    actual = augment({"images": images, "plan": plan})
    assert actual.shape == (6, 3, 48, 48)
    assert actual.is_contiguous()
    for image, box, flips, got in zip(images, plan["boxes"].int().tolist(), plan["flips"], actual, strict=True):
        mode = tv.InterpolationMode(interpolation)
        expected = tv.resized_crop(image.permute(2, 0, 1).float(), *box, [48, 48], mode, antialias=True)
        expected = normalized(flipped(expected, flips))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def flipped(image, flips):
    """Flip as torchvision, by a row of `flips`."""
    image = tv.horizontal_flip(image) if flips[0] else image
    return tv.vertical_flip(image) if flips[1] else image


@pytest.mark.parametrize("size", [(48, 48), (40, 56)])
def test_vertical_flip_equals_torchvision_and_changes_nothing_else(size):
    images = random_images(40)
    config = CFG | {"input_size": [3, *size]}
    augment = Augmentation.from_config(config, vertical_flip=0.5)
    plan = augment.sample(seeds(40), 32, 32)
    without = Augmentation.from_config(config).sample(seeds(40), 32, 32)
    assert torch.equal(plan["boxes"], without["boxes"])
    assert torch.equal(plan["flips"][:, 0], without["flips"][:, 0])
    assert not without["flips"][:, 1].any()
    assert 10 < plan["flips"][:, 1].sum() < 30
    assert 0 < (plan["flips"][:, 0] & plan["flips"][:, 1]).sum() < 20
    actual = augment({"images": images, "plan": plan})
    mode = tv.InterpolationMode.BICUBIC
    for image, box, flips, got in zip(images, plan["boxes"].int().tolist(), plan["flips"], actual, strict=True):
        expected = tv.resized_crop(image.permute(2, 0, 1).float(), *box, list(size), mode, antialias=True)
        torch.testing.assert_close(got, normalized(flipped(expected, flips)), atol=1e-4, rtol=1e-4)


def test_color_jitter_equals_torchvisions_operations_in_its_order():
    augment = augmentation(color_jitter=0.4, horizontal_flip=0.0, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    images = random_images(30, 48, 48)
    plan = augment.sample(seeds(30), 48, 48)
    actual = augment({"images": images, "plan": plan})
    stages = color_jitter_stages(uniform(seeds(30), JITTER_UNIFORMS, start=VERTICAL_UNIFORM + 1), 0.4)
    factors = np.stack([magnitudes for _, magnitudes in stages])
    assert 0.6 <= factors.min() < 0.65
    assert 1.35 < factors.max() <= 1.4
    operations = {
        "brightness": tv.adjust_brightness, "contrast": tv.adjust_contrast, "saturation": tv.adjust_saturation
    }  # fmt: skip
    for row in range(30):
        expected = images[row].permute(2, 0, 1).float() / 255
        for names, magnitudes in stages:
            expected = operations[names[row]](expected, float(magnitudes[row]))
        torch.testing.assert_close(actual[row], normalized(255 * expected), atol=2e-3, rtol=1e-3)


def padded_crop(image, offset, padding, mode):
    """Crop as torchvision's `RandomCrop(padding=...)`, which draws the offset."""
    height, width = image.shape[-2:]
    return tv.crop(tv.pad(image, [padding] * 4, fill=0, padding_mode=mode), *offset, height, width)


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_padded_crop_has_the_pixels_of_torchvision(mode):
    augment = augmentation(crop_padding=5, crop_padding_mode=mode, vertical_flip=0.4)
    images = random_images(12, 48, 48)
    plan = augment.sample(seeds(12), 48, 48)
    actual = augment({"images": images, "plan": plan})
    assert actual.is_contiguous()
    for image, offset, flips, got in zip(images, plan["offsets"].tolist(), plan["flips"], actual, strict=True):
        expected = flipped(padded_crop(image.permute(2, 0, 1), offset, 5, mode), flips).float()
        assert torch.equal(got, expected.mul_(augment.scale).add_(augment.shift))


def test_padded_crop_of_smaller_images_resizes_them_first():
    augment, images = augmentation(crop_padding=6), random_images(12)
    plan = augment.sample(seeds(12), 32, 32)
    unpadded = augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    resized = unpadded({"images": images, "plan": plan})
    actual = augment({"images": images, "plan": plan})
    for image, offset, got in zip(resized, plan["offsets"].tolist(), actual, strict=True):
        expected = padded_crop(image - augment.shift, offset, 6, "constant") + augment.shift  # black is 0 in between
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_padded_crop_has_every_offset():
    offsets = augmentation(crop_padding=2).sample(seeds(1000), 48, 48)["offsets"]
    assert {tuple(offset) for offset in offsets.tolist()} == {(top, left) for top in range(5) for left in range(5)}


@pytest.mark.parametrize("policy", POLICIES)
def test_augmentation_with_policy_applies_its_operations_in_order(policy):
    augment, images = augmentation(policy=policy), random_images(40)
    plan = augment.sample(seeds(40), 32, 32)
    stages = sample_stages(policy, uniform(seeds(40), num_uniforms(policy, 2), start=CROP_UNIFORMS + 1), 9.0, 2)
    before = images.clone()
    actual = augment({"images": images, "plan": plan})
    assert torch.equal(images, before)
    fill = torch.tensor(MEAN).view(3, 1, 1) * 255
    for row in range(40):
        levels = images[row : row + 1].permute(0, 3, 1, 2).float()
        for names, magnitudes in stages:
            ratio = 32 / 48 if names[row] == "gaussian_blur" else 1.0  # in pixels of the model's input
            levels = apply(names[row], levels, magnitudes[row : row + 1] * ratio, fill)
        box, flips = plan["boxes"][row].int().tolist(), plan["flips"][row]
        mode = tv.InterpolationMode.BICUBIC
        expected = tv.resized_crop(levels[0], *box, [48, 48], mode, antialias=True)
        expected = normalized(flipped(expected, flips))
        torch.testing.assert_close(actual[row], expected, atol=2e-4, rtol=1e-3)


def test_passes_keep_the_order_of_each_images_operations():
    names = ("equalize", "equalize", "rotate", "invert", "identity", "equalize", "identity", "invert", "contrast")
    rng = np.random.default_rng(0)
    stages = [(rng.permutation(names), rng.uniform(0.1, 0.9, len(names))) for _ in range(3)]
    stages[0] = (np.array(names), stages[0][1])
    stages[1] = (np.roll(names, 1), stages[1][1])  # equalize after equalize
    images = random_images(len(names)).permute(0, 3, 1, 2).float()
    expected = images.clone()
    for row in range(len(names)):
        for chosen, magnitudes in stages:
            expected[row : row + 1] = apply(chosen[row], expected[row : row + 1], magnitudes[row : row + 1])
    actual = images
    augment = Augmentation((32, 32), (0, 0, 0), STD)
    for step in plan_passes(stages, 32, 32):
        actual = augment._apply(step, actual)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("most", "changes"),
    [
        (60, {}),
        (120, {"policy": "trivial_augment"}),
        (150, {"policy": "rand_augment"}),
        (40, {"crop_padding": 4, "image_size": (64, 64)}),
    ],
)
def test_augmentation_launches_few_operators(most, changes):
    augment = Augmentation(**{"image_size": (48, 48), "mean": MEAN, "std": STD, **changes})
    images = random_images(128, 64, 64)
    counts = []
    for epoch in range(8):
        plan = augment.sample(sample_seeds(0, epoch, np.arange(128)), 64, 64)
        with torch.no_grad(), Launches() as launches:
            augment({"images": images, "plan": plan}, torch.bfloat16)
        counts.append(launches.count)
    assert np.median(counts) <= most


def test_augmentation_of_an_image_depends_on_its_seed_only():
    augment, images = augmentation(policy="trivial_augment"), random_images(12)
    full = augment({"images": images, "plan": augment.sample(seeds(12), 32, 32)})
    for rows in (slice(0, 4), slice(4, 12)):
        alone = augment({"images": images[rows], "plan": augment.sample(seeds(12)[rows], 32, 32)})
        torch.testing.assert_close(alone, full[rows], atol=1e-5, rtol=1e-5)


def test_augmentation_of_crops_only_normalizes():
    augment, crops = augmentation(), random_images(4, 48, 48)
    actual = augment({"crops": crops, "plan": {"operations": augment.sample_operations(seeds(4), 48, 48)}})
    torch.testing.assert_close(actual, normalized(crops.permute(0, 3, 1, 2).float()), atol=1e-5, rtol=1e-5)


def test_augmentation_in_bf16_is_close_to_float32():
    augment, images = augmentation(), random_images()
    batch = {"images": images, "plan": augment.sample(seeds(), 32, 32)}
    half = augment(batch, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert (half.float() - augment(batch)).abs().mean() < 0.01


def test_random_boxes_equal_torchvisions(monkeypatch):
    """Compare with torchvision's sampling from the same uniform random numbers."""
    u = uniform(seeds(300), 2 * ATTEMPTS + 2)
    scale, ratio = (0.4, 1.0), (0.5, 2.0)
    for height, width in ((32, 32), (20, 70), (90, 25), (10, 200)):
        boxes = random_boxes(u, height, width, scale, ratio)
        transform = v2.RandomResizedCrop(24, scale=scale, ratio=ratio)
        image = Image.new("RGB", (width, height))
        for row, box in zip(u, boxes, strict=True):
            # torchvision's order: scale and ratio of each attempt, then top and left.
            numbers = iter([value for attempt in range(ATTEMPTS) for value in (row[attempt], row[ATTEMPTS + attempt])])
            offsets = iter(row[-2:])

            def randint(low, high, size, offsets=offsets):
                return torch.tensor([int(low + (high - low) * next(offsets))])

            with monkeypatch.context() as patch:
                patch.setattr(torch, "empty", lambda size, numbers=numbers: _Uniform(numbers))
                patch.setattr(torch, "randint", randint)
                params = transform.make_params([image])
            assert box.tolist() == [params["top"], params["left"], params["height"], params["width"]]


class _Uniform:
    """Replace `torch.empty(1)`, whose `uniform_` torchvision samples from."""

    def __init__(self, numbers):
        self.numbers = numbers

    def uniform_(self, low, high):
        return torch.tensor([float(low) + (float(high) - float(low)) * next(self.numbers)])


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("shape", [(32, 32), (21, 20), (17, 64)])
def test_preprocessing_equals_the_image_processor(shape, interpolation, mode, crop_pct):
    cfg = {**CFG, "crop_pct": crop_pct, "interpolation": interpolation, "crop_mode": mode}
    images, processor = random_images(3, *shape), TimmWrapperImageProcessor(pretrained_cfg=cfg)
    actual = Preprocessing(resolve_data_config(cfg))({"images": images})
    expected = torch.stack([processor(Image.fromarray(i.numpy()))["pixel_values"][0] for i in images])
    assert torch.equal(actual, expected)


def test_preprocessing_of_crops_equals_timms_transform():
    image = Image.fromarray(random_images(1, 50, 40)[0].numpy())
    config = resolve_data_config({**CFG, "crop_pct": 0.9})
    crop = create_transform(**config, use_prefetcher=True)(image).permute(1, 2, 0)[None]
    expected = create_transform(**config)(image)[None]
    assert torch.equal(Preprocessing(config)({"crops": crop}), expected)


@pytest.mark.parametrize("changes", [{"crop_mode": "border"}, {"interpolation": "nearest"}, {"crop_pct": 1.2}])
def test_geometry_of_unsupported_transform_is_none(changes):
    config = {**resolve_data_config(CFG), **changes}
    assert Preprocessing(config).geometry(32, 32) is None


def test_geometry_of_shrinking_height_is_none():
    preprocessing = Preprocessing(resolve_data_config(CFG))
    assert preprocessing.geometry(40, 31) is None
    assert preprocessing.geometry(40, 40) is not None
    assert preprocessing.geometry(20, 31) is not None
