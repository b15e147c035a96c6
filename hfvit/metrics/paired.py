"""Compare two classifiers on the same images: test, interval and sample size."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
LARGEST_SAMPLE = 10_000_000  # images; differences that need more are not worth telling apart
BOOTSTRAP_RESAMPLES = 1000


@dataclass(frozen=True)
class PairedCounts:
    """Count images by which of two classifiers is right.

    Args:
        both: images that both classify correctly.
        lost: images that only the first one classifies correctly.
        gained: images that only the second one classifies correctly.
        neither: images that none classifies correctly.
    """

    both: float
    lost: float
    gained: float
    neither: float

    @classmethod
    def of(cls, first: np.ndarray, second: np.ndarray) -> "PairedCounts":
        """Count from whether each image is classified correctly (images,)."""
        both = int((first & second).sum())
        return cls(both, int(first.sum()) - both, int(second.sum()) - both, int((~first & ~second).sum()))

    @property
    def images(self) -> float:
        return self.both + self.lost + self.gained + self.neither

    def scaled(self, images: float) -> "PairedCounts":
        """Return the counts with the same proportions for another number of images."""
        factor = images / self.images
        return PairedCounts(self.both * factor, self.lost * factor, self.gained * factor, self.neither * factor)

    def p_value(self) -> float:
        """Compute the two-sided p-value of the exact test of McNemar.

        The test is described in https://doi.org/10.1007/BF02295996.
        """
        from scipy.stats import binomtest  # slow to import

        changed = self.lost + self.gained
        return 1.0 if not changed else float(binomtest(int(self.lost), int(changed)).pvalue)

    def loss_interval(self) -> tuple[float, float]:
        """Compute the interval of the first accuracy minus the second one.

        It is method 10 of Newcombe (1998), Statistics in Medicine 17, 2635-2650: the Wilson intervals of both
        accuracies, combined with their correlation.
        """
        n = self.images
        first = (self.both + self.lost) / n
        second = (self.both + self.gained) / n
        first_low, first_high = _wilson(first, n)
        second_low, second_high = _wilson(second, n)
        phi = self._correlation()
        below = _combined(first - first_low, second_high - second, phi)
        above = _combined(first_high - first, second - second_low, phi)
        loss = (self.lost - self.gained) / n
        return max(loss - below, -1.0), min(loss + above, 1.0)

    def _correlation(self) -> float:
        """Compute phi with Newcombe's continuity correction, 0 if an accuracy is 0 or 1."""
        margins = (self.both + self.lost) * (self.gained + self.neither)
        margins *= (self.both + self.gained) * (self.lost + self.neither)
        if not margins:
            return 0.0
        product = self.both * self.neither - self.lost * self.gained
        corrected = max(product - self.images / 2, 0.0) if product > 0 else product
        return corrected / math.sqrt(margins)

    def images_needed(self, allowed: float) -> int | None:
        """Return the smallest number of images that would decide about a loss.

        The proportions are taken to be the same.

        Args:
            allowed: largest allowed loss, 0 to 1; decided is an interval of the loss that does not contain it.

        Returns:
            The number, or None above `LARGEST_SAMPLE`.
        """

        def decides(images: float) -> bool:
            low, high = self.scaled(images).loss_interval()
            return low > allowed or high <= allowed

        low = self.images
        high = low
        while not decides(high):
            low, high = high, 2 * high
            if high > LARGEST_SAMPLE:
                return None
        while high - low > 1e-3:
            middle = (low + high) / 2
            low, high = (low, middle) if decides(middle) else (middle, high)
        return math.ceil(high)


def bootstrap_loss(first: np.ndarray, second: np.ndarray, targets: np.ndarray) -> tuple[tuple[float, float], float]:
    """Compare the micro F1 of two multi-label classifiers by a paired bootstrap.

    Images are resampled rather than labels, as the labels of an image are not independent (Efron and Tibshirani, 1993,
    chapters 13 and 16).

    Args:
        first: decisions 0 and 1 (images, classes).
        second: decisions 0 and 1 (images, classes).
        targets: labels 0 and 1 (images, classes).

    Returns:
        The percentile interval of the first micro F1 minus the second one, and the two-sided p-value of no difference.
    """
    hits = np.stack([(decided * targets).sum(axis=1) for decided in (first, second)], axis=1)
    sums = np.stack([decided.sum(axis=1) + targets.sum(axis=1) for decided in (first, second)], axis=1)
    rng = np.random.default_rng(0)
    losses = np.empty(BOOTSTRAP_RESAMPLES)
    for index in range(BOOTSTRAP_RESAMPLES):
        drawn = rng.integers(0, len(targets), len(targets))
        scores = 2 * hits[drawn].sum(axis=0) / np.maximum(sums[drawn].sum(axis=0), 1)
        losses[index] = scores[0] - scores[1]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(losses, (tail, 100 - tail))
    p_value = min(1.0, 2 * min((losses <= 0).mean(), (losses >= 0).mean()))
    return (float(low), float(high)), float(p_value)


def _wilson(share: float, count: float) -> tuple[float, float]:
    """Compute the Wilson interval of a proportion; unlike `binomtest`, of any count."""
    z2 = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) ** 2
    center = share + z2 / (2 * count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2)))
    return (center - half) / (1 + z2 / count), (center + half) / (1 + z2 / count)


def _combined(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(one**2 - 2 * phi * one * other + other**2, 0.0))
