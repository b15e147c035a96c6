"""Energy score against torch."""

import numpy as np
import pytest
import torch

from hfvit.metrics.out_of_distribution import energy, fit_out_of_distribution


@pytest.mark.parametrize("multi_label", [False, True])
def test_energy_equals_torch(multi_label):
    logits = np.random.default_rng(0).normal(0, 1000, (50, 7)).astype(np.float32)
    tensor = torch.from_numpy(logits).double()
    expected = torch.nn.functional.softplus(tensor).sum(1) if multi_label else tensor.logsumexp(1)
    assert energy(logits, multi_label) == pytest.approx(-expected.numpy(), abs=1e-5)


@pytest.mark.parametrize("multi_label", [False, True])
def test_threshold_keeps_most_validation_images(multi_label):
    logits = np.random.default_rng(0).normal(size=(1000, 5))
    found = fit_out_of_distribution(logits, multi_label)
    assert (energy(logits, multi_label) <= found.threshold).mean() == pytest.approx(0.95, abs=1e-3)
    assert found.images == 1000
    flat = np.full((1, 5), -20.0)
    assert energy(flat, multi_label)[0] > found.threshold
