"""Temperature scaling (Guo et al., https://arxiv.org/abs/1706.04599)."""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from hfvit.artifacts.run_sections import CalibratedSplit, CalibrationBin, Temperature
from hfvit.metrics.classification import calibration

LOWEST, HIGHEST = 0.05, 20.0


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over logits `(images, classes)` of minus the logarithm of the probability of `labels` `(images,)`."""
    return float(-log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels].mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """The temperature of the smallest negative log-likelihood; None where there is none between the bounds.

    That is so where every image is right, which no confidence is too high for, or where the logits tell nothing. The
    likelihood is convex in 1 / temperature, so the minimum found is the only one.
    """
    if (logits.argmax(axis=1) == labels).all():  # the likelihood only rises as the temperature falls
        return None
    bounds = np.log([LOWEST, HIGHEST])
    found = minimize_scalar(
        lambda log: negative_log_likelihood(logits / np.exp(log), labels), bounds=bounds, method="bounded",
        options={"xatol": 1e-6},
    )  # fmt: skip
    at_a_bound = np.abs(found.x - bounds).min() < 1e-3
    return None if at_a_bound else float(np.exp(found.x))


def calibrate(results: dict[str, tuple[np.ndarray, np.ndarray]]) -> Temperature:
    """Fit the temperature on the validation split and measure every split with it.

    Args:
        results: (logits, labels) by split, of which `validation` fits.
    """
    logits, labels = results["validation"]
    value = fit_temperature(logits, labels)
    found = Temperature(value=value, fitted_on="validation", images=len(labels), reason=None, splits={})
    if value is None:
        right = bool((logits.argmax(axis=1) == labels).all())
        found.reason = (
            "every validation image is classified correctly, so no temperature is the best"
            if right
            else f"the best temperature lies outside {LOWEST:g} to {HIGHEST:g}"
        )
        return found
    for role, (logits, labels) in results.items():
        log_probabilities = log_softmax(logits.astype(np.float64) / value, axis=1)
        correct = log_probabilities.argmax(axis=1) == labels
        bins, ece = calibration(np.exp(log_probabilities.max(axis=1)), correct)
        found.splits[role] = CalibratedSplit(
            loss=negative_log_likelihood(logits / value, labels),
            ece=ece,
            calibration=[CalibrationBin.from_json(each) for each in bins],
        )
    return found
