"""Counter-based random numbers: dependence on (seed, epoch, row), distribution."""

import numpy as np
from scipy.stats import chisquare, kstest, pearsonr

from hfvit.utils.counter_rng import sample_seeds, uniform


def test_uniform_does_not_depend_on_the_batch():
    content = uniform(sample_seeds(1, 2, np.arange(10)), 5)
    assert np.array_equal(uniform(sample_seeds(1, 2, np.array([7])), 5)[0], content[7])
    assert np.array_equal(uniform(sample_seeds(1, 2, np.arange(10)), 2, start=3), content[:, 3:])


def test_sample_seeds_depend_on_seed_epoch_and_row():
    base = sample_seeds(1, 2, np.array([3]))
    for other in (
        sample_seeds(2, 2, np.array([3])),
        sample_seeds(1, 3, np.array([3])),
        sample_seeds(1, 2, np.array([4])),
    ):
        assert other != base
    seeds = np.concatenate([sample_seeds(seed, epoch, np.arange(1000)) for seed in range(5) for epoch in range(5)])
    assert len(np.unique(seeds)) == 25_000


def test_sample_seeds_accept_an_epoch_per_row():
    mixed = sample_seeds(0, np.array([4, 5]), np.array([9, 9]))
    assert mixed[0] == sample_seeds(0, 4, np.array([9]))[0]
    assert mixed[1] == sample_seeds(0, 5, np.array([9]))[0]


def test_uniform_is_uniform_and_independent():
    """The thresholds reject 1 in 1000 good generators; the seeds are fixed."""
    u = uniform(sample_seeds(0, 0, np.arange(20_000)), 4)
    assert 0 <= u.min() < u.max() < 1
    for column in u.T:
        assert kstest(column, "uniform").pvalue > 1e-3
    neighbors = [
        (u[:, 0], u[:, 1]),
        (u[:-1, 0], u[1:, 0]),
        (u[:, 0], uniform(sample_seeds(0, 1, np.arange(20_000)), 1)[:, 0]),
    ]
    for a, b in neighbors:
        assert pearsonr(a, b).pvalue > 1e-3
        counts, *_ = np.histogram2d(a, b, bins=10)
        assert chisquare(counts.ravel()).pvalue > 1e-3
