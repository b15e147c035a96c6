"""Counter-based random numbers: a function of (seed, epoch, row), without generator state."""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def image_seeds(seed: int, epoch: int | np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The seeds `(images,)` uint64 of the images at `rows` in `epoch` (one for all, or one each)."""
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(seed % 2**64) + GOLDEN)
        state = _mix(state ^ (np.asarray(epoch).astype(np.uint64) + np.uint64(1)) * GOLDEN)
        return _mix(state ^ (np.asarray(rows).astype(np.uint64) + np.uint64(1)) * GOLDEN)


def uniforms(seeds: np.ndarray, count: int, start: int = 0) -> np.ndarray:
    """`(images, count)` float64 in [0, 1): the numbers from the `start`-th on of each image."""
    with np.errstate(over="ignore"):
        counters = np.arange(start + 1, start + count + 1, dtype=np.uint64) * GOLDEN
        bits = _mix(seeds[:, None] + counters)
    return (bits >> np.uint64(11)) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of the output depends on every bit of the input."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
