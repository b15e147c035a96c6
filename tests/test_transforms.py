"""Preprocessing: evaluation is serving's, training is torchvision's own operations."""

import numpy as np
import pytest
import torch
from conftest import coloured_image
from torchvision.transforms import v2
from transformers import TimmWrapperImageProcessor

from hfvit.images import seeded
from hfvit.transforms import eval_transform, train_transform

CFG = {"input_size": [3, 24, 24], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bicubic"}


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_equals_the_saved_processor(crop_pct, interpolation):
    cfg = {**CFG, "crop_pct": crop_pct, "interpolation": interpolation}
    image = coloured_image(0, np.random.default_rng(1), size=40).resize((50, 40))
    processor = TimmWrapperImageProcessor(pretrained_cfg=cfg)
    assert torch.equal(eval_transform(cfg)(image), processor(image)["pixel_values"][0])


def test_training_equals_torchvision_with_the_same_draws():
    image = coloured_image(2, np.random.default_rng(1), size=40)
    transform = train_transform(CFG, (0.5, 1.0), (0.75, 4 / 3), horizontal_flip=0.5)
    for draw in range(8):
        with seeded(draw):
            actual = transform(image)
        with seeded(draw):
            top, left, height, width = v2.RandomResizedCrop.make_params(
                v2.RandomResizedCrop(24, scale=(0.5, 1.0)), [image]
            ).values()
            flipped = torch.rand(1) < 0.5
        expected = image.crop((left, top, left + width, top + height)).resize((24, 24), resample=3)
        expected = torch.from_numpy(np.asarray(expected).copy()).permute(2, 0, 1) / 255
        expected = expected.flip(-1) if flipped else expected
        expected = (expected - torch.tensor(CFG["mean"])[:, None, None]) / torch.tensor(CFG["std"])[:, None, None]
        torch.testing.assert_close(actual, expected)
