"""Temperature scaling (Guo et al., https://arxiv.org/abs/1706.04599)."""

from collections.abc import Iterator, Sequence

import numpy as np

from hfvit.artifacts.run_sections import CalibratedSplit, CalibrationBin, Temperature
from hfvit.metrics.classification import calibration, log_normalizers

MIN_TEMPERATURE = 0.05
MAX_TEMPERATURE = 20.0
FOLDS = 5


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    """Compute the mean negative log-likelihood.

    Args:
        logits: `(images, classes)`.
        labels: class indices `(images,)`.
        temperature: divides the logits.
    """
    own = logits[np.arange(len(labels)), labels].astype(np.float64) / temperature
    return float((log_normalizers(logits, temperature) - own).mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """Find the temperature with the smallest negative log-likelihood.

    The likelihood is convex in 1 / temperature, so there is only one minimum.

    Args:
        logits: `(images, classes)`.
        labels: class indices `(images,)`.

    Returns:
        The temperature, None if there is no minimum between the bounds: every image is classified correctly, or the
        logits do not depend on the class.
    """
    from scipy.optimize import minimize_scalar

    if (logits.argmax(axis=1) == labels).all():  # a lower temperature is always better
        return None
    bounds = np.log([MIN_TEMPERATURE, MAX_TEMPERATURE])
    found = minimize_scalar(
        lambda log: negative_log_likelihood(logits, labels, float(np.exp(log))), bounds=bounds, method="bounded",
        options={"xatol": 1e-6},
    )  # fmt: skip
    at_a_bound = np.abs(found.x - bounds).min() < 1e-3
    return None if at_a_bound else float(np.exp(found.x))


def calibrate(results: dict[str, tuple[np.ndarray, np.ndarray]]) -> Temperature:
    """Fit the temperature on the validation split and evaluate every split with it.

    The metrics of the validation split are cross-fitted, so that no image is used for the fit and for the result.

    Args:
        results: split -> (logits, labels), with the key `validation`.
    """
    logits, labels = results["validation"]
    value = fit_temperature(logits, labels)
    found = Temperature(value=value, fitted_on="validation", images=len(labels), reason=None, splits={})
    if value is None:
        if (logits.argmax(axis=1) == labels).all():
            found.reason = "every validation image is classified correctly, so there is no best temperature"
        else:
            found.reason = f"the best temperature is not between {MIN_TEMPERATURE:g} and {MAX_TEMPERATURE:g}"
        return found
    folds = min(FOLDS, len(labels))
    if folds > 1:
        found.folds = folds
    for role, (logits, labels) in results.items():
        parts = [(np.arange(len(labels)), value)]
        if role == "validation" and folds > 1:
            parts = list(cross_fitted(logits, labels, folds))
        found.splits[role] = _calibrated(logits, labels, parts)
    return found


def cross_fitted(logits: np.ndarray, labels: np.ndarray, folds: int) -> Iterator[tuple[np.ndarray, float]]:
    """Fit the temperature of each fold on the other folds.

    Args:
        logits: `(images, classes)`.
        labels: class indices `(images,)`.
        folds: number of folds.

    Yields:
        Rows of a fold and their temperature, 1 where none can be fitted.
    """
    from sklearn.model_selection import KFold

    for others, rows in KFold(folds, shuffle=True, random_state=0).split(labels):
        yield rows, fit_temperature(logits[others], labels[others]) or 1.0


def _calibrated(logits: np.ndarray, labels: np.ndarray, parts: Sequence[tuple[np.ndarray, float]]) -> CalibratedSplit:
    """Compute the metrics of a split whose rows have different temperatures."""
    predicted = logits.argmax(axis=1)
    confidence = np.empty(len(labels))
    loss = 0.0
    for rows, temperature in parts:
        highest = logits[rows, predicted[rows]].astype(np.float64) / temperature
        confidence[rows] = np.exp(highest - log_normalizers(logits[rows], temperature))
        loss += negative_log_likelihood(logits[rows], labels[rows], temperature) * len(rows) / len(labels)
    bins, ece = calibration(confidence, predicted == labels)
    return CalibratedSplit(loss=loss, ece=ece, calibration=[CalibrationBin.from_json(each) for each in bins])
