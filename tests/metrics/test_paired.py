"""Paired comparison of two classifiers: test, interval, sample size."""

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.metrics import f1_score

from hfvit.metrics.paired import PairedCounts, bootstrap_loss


def test_loss_interval_equals_published_values():
    """Newcombe (1998, table III) and Fagerland et al. (2014, airway hyper-responsiveness)."""
    assert PairedCounts(36, 12, 2, 0).loss_interval() == pytest.approx((0.0569, 0.3404), abs=1e-4)
    assert PairedCounts(1, 1, 7, 12).loss_interval() == pytest.approx((-0.507, -0.026), abs=1e-3)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (3, 0), (5, 0), (6, 0), (9, 2), (2, 9), (40, 20)])
def test_p_value_is_that_of_a_fair_coin(lost, gained):
    changed = lost + gained
    extreme = max(lost, gained)
    tail = sum(binom.pmf(k, changed, 0.5) for k in range(extreme, changed + 1))
    assert PairedCounts(100, lost, gained, 5).p_value() == pytest.approx(min(1.0, 2 * tail))


def test_loss_interval_covers_the_true_loss():
    """Draw tables with 5 % lost and 3 % gained: about 95 % of the intervals have the loss of 2 %."""
    rng = np.random.default_rng(0)
    tables = rng.multinomial(300, [0.8, 0.05, 0.03, 0.12], size=1000)
    intervals = [PairedCounts(*map(int, table)).loss_interval() for table in tables]
    covered = np.mean([low <= 0.02 <= high for low, high in intervals])
    assert 0.93 < covered < 0.98


def test_counts_are_those_of_the_images():
    first = np.array([True, True, True, False, False])
    second = np.array([True, False, True, True, False])
    assert PairedCounts.of(first, second) == PairedCounts(2, 1, 1, 1)


@pytest.mark.parametrize("counts", [(150, 3, 0, 0), (120, 0, 0, 33), (120, 2, 2, 33), (900, 60, 10, 30)])
def test_images_needed_is_the_smallest_number_that_decides(counts):
    allowed = 0.005
    table = PairedCounts(*counts)

    def decides(images):
        low, high = table.scaled(images).loss_interval()
        return low > allowed or high <= allowed

    needed = table.images_needed(allowed)
    assert decides(needed)
    assert needed == table.images or not decides(needed - 1)


def test_images_needed_for_exactly_the_allowed_loss_is_unlimited():
    assert PairedCounts(9000, 60, 10, 930).images_needed(0.005) is None


def test_bootstrap_loss_surrounds_the_difference_of_micro_f1():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, (400, 5))
    first = np.where(rng.random(targets.shape) < 0.05, 1 - targets, targets)
    second = np.where(rng.random(targets.shape) < 0.15, 1 - targets, targets)
    (low, high), p_value = bootstrap_loss(first, second, targets)
    loss = f1_score(targets, first, average="micro") - f1_score(targets, second, average="micro")
    assert low < loss < high
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(1000):
        rows = rng.integers(0, 400, 400)
        truth, *decided = (labels[rows] for labels in (targets, first, second))
        one, other = (2 * (each * truth).sum() / (each.sum() + truth.sum()) for each in decided)
        losses.append(one - other)
    assert (low, high) == pytest.approx(tuple(np.percentile(losses, (2.5, 97.5))))
    assert p_value < 0.01
    assert bootstrap_loss(first, first, targets) == ((0.0, 0.0), 1.0)
