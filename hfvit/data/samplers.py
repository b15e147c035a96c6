"""Reproducible samplers: shuffled and class-balanced."""

import numpy as np
import torch

from hfvit.data.labels import rows_by_class


class EpochSampler(torch.utils.data.Sampler):
    """Sampler of shuffled `(draw, row)` pairs.

    The order depends only on seed and epoch, so that all processes and a resumed run have the same order. Rows that do
    not fill the last global batch are dropped for the epoch, so that a batch of 8 equals 2 accumulated batches of 4 or
    2 processes with 4.

    Args:
        rows: number of images.
        global_batch_size: images per optimizer step, over all processes.
        seed: seed of the order.
        repeats: number of differently augmented copies of an image in a row; an epoch then has as many fewer images
            (repeated augmentation; Hoffer et al., https://arxiv.org/abs/1901.09335).
    """

    def __init__(self, rows: int, global_batch_size: int, seed: int, repeats: int = 1):
        self.rows = rows
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.repeats = repeats
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which changes the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows - self.rows % self.global_batch_size

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)
        rows = np.repeat(order, self.repeats)[: len(self)].tolist()
        first = self.epoch * self.repeats
        return ((first + place % self.repeats, row) for place, row in enumerate(rows))


class BalancedSampler(EpochSampler):
    """`EpochSampler` that samples all classes equally often.

    Within a class, all images are sampled equally often, too. The numbers differ by at most one per epoch. An image
    that is sampled several times in an epoch is augmented differently each time. The length of an epoch is that of
    `EpochSampler`.

    Args:
        labels: class indices `(rows,)`.
        global_batch_size: images per optimizer step, over all processes.
        seed: seed of the order.
        repeats: number of differently augmented copies of an image in a row.
    """

    def __init__(self, labels: np.ndarray, global_batch_size: int, seed: int, repeats: int = 1):
        super().__init__(len(labels), global_batch_size, seed, repeats)
        self.by_class = rows_by_class(labels)

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        draws = -(-len(self) // self.repeats)
        counts = np.full(len(self.by_class), draws // len(self.by_class))
        counts[rng.permutation(len(counts))[: draws % len(counts)]] += 1
        sampled = [_cycle(rows, count, rng) for rows, count in zip(self.by_class, counts, strict=True)]
        order = rng.permutation(np.concatenate(sampled))
        rows = np.repeat(order, self.repeats)[: len(self)]
        # A different draw number for each occurrence of a row, in all epochs.
        return zip((self.epoch * len(self) + occurrences(rows)).tolist(), rows.tolist(), strict=True)


def _cycle(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return `count` rows: all rows in random order, then again in another order, ..."""
    rounds = -(-count // len(rows))
    return np.concatenate([rng.permutation(rows) for _ in range(rounds)] or [rows[:0]])[:count]


def occurrences(values: np.ndarray) -> np.ndarray:
    """Count how often each value occurs before its position in `values`."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    counted = np.arange(len(values)) - np.repeat(starts, np.diff(np.r_[starts, len(values)]))
    result = np.empty(len(values), dtype=np.int64)
    result[order] = counted
    return result
