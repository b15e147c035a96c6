"""Counter-based random numbers, a function of (seed, epoch, row) without state."""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def sample_seeds(seed: int, epoch: int | np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Compute the seed of each sample.

    Args:
        seed: seed of the run.
        epoch: epoch, one for all samples or (samples,).
        rows: dataset rows (samples,).

    Returns:
        Seeds (samples,) uint64.
    """
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(seed % 2**64) + GOLDEN)
        state = _mix(state ^ (np.asarray(epoch).astype(np.uint64) + np.uint64(1)) * GOLDEN)
        return _mix(state ^ (np.asarray(rows).astype(np.uint64) + np.uint64(1)) * GOLDEN)


def uniform(seeds: np.ndarray, count: int, start: int = 0) -> np.ndarray:
    """Compute uniform random numbers.

    Args:
        seeds: seeds (samples,) of `sample_seeds`.
        count: how many numbers per sample.
        start: index of the first number in the sample's stream.

    Returns:
        Numbers (samples, count) float64 in [0, 1).
    """
    with np.errstate(over="ignore"):
        counters = np.arange(start + 1, start + count + 1, dtype=np.uint64) * GOLDEN
        bits = _mix(seeds[:, None] + counters)
    return (bits >> np.uint64(11)) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's finalizer (https://doi.org/10.1145/2660193.2660195)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
