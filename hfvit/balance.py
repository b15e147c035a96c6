"""Classes of unequal size: a sampler that draws every class as often, and weights for the loss."""

import numpy as np

from hfvit.images import EpochSampler


class BalancedSampler(EpochSampler):
    """An `EpochSampler` that draws every class equally often, and within a class every image equally often.

    Both hold to within one draw an epoch. As with `EpochSampler`, the order depends on (seed, epoch) alone; an image
    that comes several times in an epoch is augmented each time anew. An epoch is as long as without balance.

    Args:
        labels: class indices `(rows,)`.
    """

    def __init__(self, labels: np.ndarray, global_batch_size: int, seed: int, repeats: int = 1):
        super().__init__(len(labels), global_batch_size, seed, repeats)
        self.by_class = [np.flatnonzero(labels == label) for label in np.unique(labels)]

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        draws = -(-len(self) // self.repeats)
        shares = np.full(len(self.by_class), draws // len(self.by_class))
        shares[rng.permutation(len(shares))[: draws % len(shares)]] += 1
        drawn = [_cycled(rows, share, rng) for rows, share in zip(self.by_class, shares, strict=True)]
        order = rng.permutation(np.concatenate(drawn))
        rows = np.repeat(order, self.repeats)[: len(self)]
        # The n-th time that a row comes in this epoch is a draw of its own, unlike any of another epoch.
        return zip((self.epoch * len(self) + occurrences(rows)).tolist(), rows.tolist(), strict=True)


def _cycled(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of `rows`: each once in random order, then all again in another order, and so on."""
    rounds = -(-count // len(rows))
    return np.concatenate([rng.permutation(rows) for _ in range(rounds)] or [rows[:0]])[:count]


def occurrences(values: np.ndarray) -> np.ndarray:
    """How often each value has come before it in `values`."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    counted = np.arange(len(values)) - np.repeat(starts, np.diff(np.r_[starts, len(values)]))
    result = np.empty(len(values), dtype=np.int64)
    result[order] = counted
    return result


def class_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """Weights `(classes,)` inversely proportional to a class's images, 1 on average over the images.

    A class without images has weight 0.
    """
    counts = np.bincount(labels, minlength=classes)
    present = counts > 0
    return np.where(present, len(labels) / (present.sum() * np.maximum(counts, 1)), 0.0)
