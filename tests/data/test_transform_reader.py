"""Transforms with random generators of their own."""

import random

import numpy as np
import pytest
import torch
from helpers.images import colored_split

from hfvit.data.splits import undecoded
from hfvit.data.transform_reader import TransformReader
from hfvit.transforms.augmentation import Augmentation
from hfvit.utils.counter_rng import sample_seeds


class Brightness:
    """Transform like those of albumentations 2, which global seeds do not reach."""

    __module__ = "albumentations.augmentations.pixel"

    def __init__(self):
        self.set_random_state(np.random.default_rng(), random.Random())

    def set_random_state(self, random_generator, py_random):
        self.random_generator = random_generator
        self.py_random = py_random

    def __call__(self, image):
        change = int(self.random_generator.integers(60)) + self.py_random.randrange(60)
        return {"image": image // 2 + np.uint8(change)}


def albumentations_brightness():
    albumentations = pytest.importorskip("albumentations")
    return albumentations.Compose([albumentations.RandomBrightnessContrast(p=1.0)])


@pytest.mark.parametrize("create", [Brightness, albumentations_brightness])
def test_generators_of_albumentations_are_seeded_for_each_image(create):
    augmentation = Augmentation((16, 16), (0.5,) * 3, (0.5,) * 3)
    split = undecoded(colored_split(6, 1), "img")
    seeds = sample_seeds(0, 1, np.arange(6))

    def read(rows):
        reader = TransformReader(split, "train", create())
        return reader.for_training(np.array(rows), seeds[rows], augmentation)["pixel_values"]

    together = read([0, 1, 2, 3, 4, 5])
    assert torch.equal(torch.cat([read([4, 1]), read([0])]), together[[4, 1, 0]])
    same_image = TransformReader(split, "train", create()).for_training(np.zeros(6, int), seeds, augmentation)
    assert len(same_image["pixel_values"].flatten(1).mean(1).unique()) > 3


def test_global_generators_are_seeded_for_each_image_and_restored():
    augmentation = Augmentation((16, 16), (0.5,) * 3, (0.5,) * 3)
    seeds = sample_seeds(0, 1, np.arange(6))

    def brightness(image):
        change = random.randrange(60) + np.random.randint(60) + int(torch.randint(60, (1,)))
        return np.asarray(image) // 4 + np.uint8(change)

    reader = TransformReader(undecoded(colored_split(6, 1), "img"), "train", brightness)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    together = reader.for_training(np.arange(6), seeds, augmentation)["pixel_values"]
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(reader.for_training(np.array([4]), seeds[[4]], augmentation)["pixel_values"], together[[4]])
