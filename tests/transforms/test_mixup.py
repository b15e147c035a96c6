"""Mixup, CutMix and random erasing against timm, with preserved generator states."""

import random

import numpy as np
import pytest
import torch
from helpers.launches import Launches
from timm.data import Mixup, random_erasing

from hfvit.training.losses import cross_entropy
from hfvit.transforms.mixup import ERASING_UNIFORMS, FIRST_UNIFORM, BatchMixing, random_rectangles
from hfvit.utils.counter_rng import sample_seeds, uniform

SEEDS = sample_seeds(0, 0, np.arange(8))
LABELS = torch.arange(8) % 3


def images():
    return torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_batch_mixing_equals_timms_mixup():
    mixing = BatchMixing(3, mixup_alpha=0.8, cutmix_alpha=1.0)
    pixel_values, targets = mixing(images(), LABELS, SEEDS)
    np.random.seed(int(SEEDS[0] >> np.uint64(32)))
    expected, expected_targets = Mixup(0.8, 1.0, label_smoothing=0.0, num_classes=3)(images(), LABELS)
    assert torch.equal(pixel_values, expected)
    assert torch.equal(targets, expected_targets)
    assert not torch.equal(pixel_values, images())
    torch.testing.assert_close(targets.sum(1), torch.ones(8))


def test_mixing_several_labels_mixes_them_as_the_pixels():
    labels = torch.nn.functional.one_hot(LABELS, 4).float()
    for options in ({"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}):
        pixel_values, targets = BatchMixing(4, **options)(images(), labels, SEEDS)
        expected, expected_targets = BatchMixing(4, **options)(images(), LABELS, SEEDS)  # of one class an image
        assert torch.equal(pixel_values, expected)
        torch.testing.assert_close(targets, expected_targets)
    several = torch.rand(8, 4, generator=torch.Generator().manual_seed(2)).round()
    _, weights = BatchMixing(8, mixup_alpha=0.8)(images(), torch.arange(8), SEEDS)
    torch.testing.assert_close(BatchMixing(4, mixup_alpha=0.8)(images(), several, SEEDS)[1], weights @ several)
    assert torch.equal(BatchMixing(4, random_erasing=0.5)(images(), several, SEEDS)[1], several)


def test_cross_entropy_label_smoothing_equals_timms_mixup():
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    _, targets = BatchMixing(3, mixup_alpha=0.8)(images(), LABELS, SEEDS)
    np.random.seed(int(SEEDS[0] >> np.uint64(32)))
    _, smoothed = Mixup(0.8, label_smoothing=0.1, num_classes=3)(images(), LABELS)
    torch.testing.assert_close(cross_entropy(logits, targets, 0.1), cross_entropy(logits, smoothed))


def test_batch_mixing_alternates_mixup_and_cutmix():
    mixing = BatchMixing(3, mixup_alpha=0.8, cutmix_alpha=1.0)
    boxes = 0
    for epoch in range(20):
        pixel_values, _ = mixing(images(), LABELS, sample_seeds(0, epoch, np.arange(8)))
        unchanged = (pixel_values == images()).float().mean()
        boxes += bool(unchanged > 0.01)  # mixup blends every pixel
    assert 3 < boxes < 17


def test_batch_mixing_erases_by_image_seed():
    mixing = BatchMixing(3, random_erasing=0.7)
    erased, labels = mixing(images(), LABELS, SEEDS)
    assert torch.equal(labels, LABELS)
    changed = erased != images()
    assert 2 <= changed.flatten(1).any(1).sum() <= 7
    halves = [mixing(images()[rows], LABELS[rows], SEEDS[rows])[0] for rows in (slice(0, 4), slice(4, 8))]
    assert torch.equal(torch.cat(halves), erased)
    u = uniform(SEEDS, ERASING_UNIFORMS, start=FIRST_UNIFORM)
    for mask, (top, left, bottom, right) in zip(changed, random_rectangles(u[:, :-1], 0.7, 16, 16), strict=True):
        expected = torch.zeros(3, 16, 16, dtype=torch.bool)
        expected[:, top:bottom, left:right] = True
        assert torch.equal(mask, expected)
    both, _ = BatchMixing(3, mixup_alpha=0.8, random_erasing=0.7)(images(), LABELS, SEEDS)
    assert torch.equal(both, BatchMixing(3, mixup_alpha=0.8)(erased, LABELS, SEEDS)[0])


def test_erased_pixels_are_normal_noise():
    seeds = sample_seeds(1, 0, np.arange(64))
    zeros = torch.full((64, 3, 64, 64), 9.0)
    erased, _ = BatchMixing(3, random_erasing=1.0)(zeros, torch.zeros(64, dtype=torch.long), seeds)
    noise = erased[erased != 9.0]
    assert abs(float(noise.mean())) < 0.02
    assert float(noise.std()) == pytest.approx(1.0, abs=0.02)
    center = erased[erased[:, 0, 32, 32] != 9.0, 0, 32, 32]
    assert len(center.unique()) == len(center) > 5  # another one for each image


def test_random_rectangles_equal_timms(monkeypatch):
    """Compare with timm's sampling from the same uniform random numbers."""
    u = uniform(sample_seeds(0, 0, np.arange(200)), ERASING_UNIFORMS - 1)
    found = random_rectangles(u, 0.6, 40, 24)
    assert 80 < found.any(axis=1).sum() < 160
    for row, (top, left, bottom, right) in zip(u, found, strict=True):
        # timm's order: erase or not, area and ratio of each attempt, then top and left.
        shapes = iter([value for attempt in range(10) for value in (row[1 + attempt], row[11 + attempt])])
        places = iter(row[-2:])
        monkeypatch.setattr(random_erasing.random, "random", lambda row=row: row[0])
        monkeypatch.setattr(
            random_erasing.random, "uniform", lambda low, high, shapes=shapes: low + (high - low) * next(shapes)
        )
        monkeypatch.setattr(
            random_erasing.random, "randint", lambda low, high, places=places: int((high + 1) * next(places))
        )
        image = torch.full((3, 40, 24), 9.0)
        random_erasing.RandomErasing(0.6, mode="pixel", device="cpu")(image)
        expected = torch.zeros(3, 40, 24, dtype=torch.bool)
        expected[:, top:bottom, left:right] = True
        assert torch.equal(image != 9.0, expected)


def test_erasing_launches_few_operators():
    pixel_values, seeds = torch.zeros(128, 3, 32, 32), sample_seeds(0, 0, np.arange(128))
    mixing = BatchMixing(3, random_erasing=0.5)
    mixing(pixel_values, torch.zeros(128), seeds)
    with Launches() as launches:
        mixing(pixel_values, torch.zeros(128), seeds)
    assert launches.count <= 20


def test_batch_mixing_preserves_global_generators():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    BatchMixing(3, mixup_alpha=0.8, random_erasing=1.0)(images(), LABELS, SEEDS)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_batch_mixing_without_options_is_false():
    assert not BatchMixing(3)
    assert BatchMixing(3, random_erasing=0.1)
    assert BatchMixing(3, cutmix_alpha=1.0)
