"""Energy score, to tell images that are unlike the training data."""

import numpy as np

from hfvit.artifacts.run_sections import OutOfDistribution
from hfvit.metrics.classification import log_normalizers

KEPT = 0.95  # fraction of the validation images below the threshold


def energy(logits: np.ndarray, multi_label: bool) -> np.ndarray:
    """Compute the energy `(images,)`, higher for images unlike the training data.

    It is minus the log-sum-exp of the logits (Liu et al. 2020, https://arxiv.org/abs/2010.03759); with several labels
    per image, minus the sum of the softplus of the logits (Wang et al. 2021, https://arxiv.org/abs/2109.14162).

    Args:
        logits: `(images, classes)`.
        multi_label: whether images have several labels.
    """
    if multi_label:
        return -np.logaddexp(0, logits.astype(np.float64)).sum(axis=1)
    return -log_normalizers(logits)


def fit_out_of_distribution(logits: np.ndarray, multi_label: bool = False) -> OutOfDistribution:
    """Choose the energy that `KEPT` of the validation images do not exceed.

    Args:
        logits: of the validation split `(images, classes)`.
        multi_label: whether images have several labels.
    """
    threshold = float(np.quantile(energy(logits, multi_label), KEPT))
    return OutOfDistribution(
        score="energy", threshold=threshold, kept=KEPT, fitted_on="validation", images=len(logits)
    )
