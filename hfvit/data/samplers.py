"""Reproducible epoch and class-balanced samplers."""

import numpy as np
import torch


class EpochSampler(torch.utils.data.Sampler):
    """Shuffled `(draw, row)` pairs, a whole number of global batches an epoch.

    The order depends on (seed, epoch) alone, so every process and a resumed run draw the same one. The rows that do
    not fill a global batch sit out that epoch, which makes batch 8 the same as 2 x 4 accumulated or on 2 processes.

    With `repeats`, an epoch of the same length holds fewer images, each that many times in a row, augmented each time
    anew (repeated augmentation; Hoffer et al., https://arxiv.org/abs/1901.09335).
    """

    def __init__(self, rows: int, global_batch_size: int, seed: int, repeats: int = 1):
        self.rows, self.global_batch_size, self.seed, self.repeats = rows, global_batch_size, seed, repeats
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows - self.rows % self.global_batch_size

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)
        rows = np.repeat(order, self.repeats)[: len(self)].tolist()
        first = self.epoch * self.repeats
        return ((first + place % self.repeats, row) for place, row in enumerate(rows))


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
