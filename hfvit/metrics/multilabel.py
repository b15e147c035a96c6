"""Compute multi-label metrics (mAP, F1, per-class scores) and fit thresholds."""

import numpy as np
from scipy.special import expit

from hfvit.recipe.arguments import MULTI_LABEL_METRICS

DEFAULT_THRESHOLD = 0.5
RESAMPLES = (100, 1000)  # smallest and largest number of bootstrap resamples
WORK = 2e8  # largest product of images, classes and resamples above 100 resamples
CURVE_POINTS = 51


def probabilities_of(logits: np.ndarray) -> np.ndarray:
    """Compute the sigmoid of logits in float64, 0 for NaN."""
    return np.nan_to_num(expit(logits.astype(np.float64)), nan=0.0)


def binary_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Compute the mean binary cross-entropy over images and classes."""
    logits = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # for NaN logits
        return float((np.logaddexp(0.0, logits) - targets * logits).mean())


def multilabel_scalars(logits: np.ndarray, targets: np.ndarray, thresholds: np.ndarray | None = None) -> dict:
    """Compute the scalar metrics (`MULTI_LABEL_METRICS`).

    Args:
        logits: `(images, classes)`.
        targets: 0 and 1, `(images, classes)`.
        thresholds: thresholds of the probabilities `(classes,)`. Default: 0.5.
    """
    from sklearn.metrics import f1_score

    probabilities = probabilities_of(logits)
    targets = np.asarray(targets, dtype=np.int64)
    predicted = decisions(probabilities, thresholds)
    found = {
        "map": _mean(average_precisions(probabilities, targets)),
        "micro_f1": float(f1_score(targets.ravel(), predicted.ravel(), zero_division=0)),
        "macro_f1": float(_macro_f1((targets * predicted).sum(axis=0), (targets + predicted).sum(axis=0))),
        "exact_match": float((predicted == targets).all(axis=1).mean()),
        "loss": binary_cross_entropy(logits, targets),
    }
    return {key: found[key] for key in MULTI_LABEL_METRICS}


def multilabel_metrics(
    logits: np.ndarray,
    targets: np.ndarray,
    names: list[str],
    thresholds: np.ndarray | None = None,
) -> dict:
    """Compute all metrics with bootstrap intervals, as Python values for JSON.

    Args:
        logits: `(images, classes)`.
        targets: 0 and 1, `(images, classes)`.
        names: class names.
        thresholds: thresholds of the probabilities `(classes,)`. Default: 0.5.
    """
    probabilities = probabilities_of(logits)
    targets = np.asarray(targets, dtype=np.int64)
    thresholds = np.full(len(names), DEFAULT_THRESHOLD) if thresholds is None else np.asarray(thresholds)
    predicted = decisions(probabilities, thresholds)
    precisions = average_precisions(probabilities, targets)
    per_class = [
        {
            "label": name,
            "images": int(targets[:, index].sum()),
            "average_precision": None if np.isnan(precisions[index]) else float(precisions[index]),
            "threshold": float(thresholds[index]),
            **_class_scores(targets[:, index], predicted[:, index]),
            "curve": curve(probabilities[:, index], targets[:, index]),
        }
        for index, name in enumerate(names)
    ]
    return {
        "images": len(targets),
        "labels_per_image": float(targets.sum(axis=1).mean()),
        **multilabel_scalars(logits, targets, thresholds),
        **bootstrap_intervals(probabilities, targets, predicted),
        "per_class": per_class,
        "curve": curve(probabilities.ravel(), targets.ravel()),
    }


def decisions(probabilities: np.ndarray, thresholds: np.ndarray | None = None) -> np.ndarray:
    """Compare probabilities `(images, classes)` with thresholds, 0.5 by default."""
    return (probabilities >= (DEFAULT_THRESHOLD if thresholds is None else np.asarray(thresholds))).astype(np.int64)


def average_precisions(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Compute the average precision `(classes,)`, NaN for a class without images."""
    from sklearn.metrics import average_precision_score

    return np.array(
        [
            average_precision_score(targets[:, index], probabilities[:, index]) if targets[:, index].any() else np.nan
            for index in range(targets.shape[1])
        ]
    )


def fit_thresholds(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Fit the threshold of each class with the largest F1.

    A threshold is the mean of two adjacent probabilities, and the one closest to 0.5 of several with the same F1. A
    class with no image or all images gets 0.5.

    Args:
        probabilities: `(images, classes)` of the validation split.
        targets: 0 and 1, `(images, classes)`.

    Returns:
        Thresholds `(classes,)`.
    """
    from sklearn.metrics import precision_recall_curve

    found = np.full(targets.shape[1], DEFAULT_THRESHOLD)
    for index in range(len(found)):
        truth = targets[:, index]
        if not 0 < truth.sum() < len(truth):
            continue
        precision, recall, values = precision_recall_curve(truth, probabilities[:, index])
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        between = (values + np.append(0.0, values[:-1])) / 2
        best = between[f1[:-1] >= f1[:-1].max() - 1e-12]
        found[index] = best[np.argmin(np.abs(best - DEFAULT_THRESHOLD))]
    return found


def curve(probabilities: np.ndarray, truth: np.ndarray) -> list[list[float]]:
    """Return at most `CURVE_POINTS` points [recall, precision], by increasing recall."""
    from sklearn.metrics import precision_recall_curve

    if not truth.any():
        return []
    precision, recall, _ = precision_recall_curve(truth, probabilities)
    rising = recall[::-1]
    places = np.unique(np.searchsorted(rising, np.linspace(0, 1, CURVE_POINTS))).clip(max=len(rising) - 1)
    return [[round(float(rising[place]), 4), round(float(precision[::-1][place]), 4)] for place in places]


def bootstrap_intervals(
    probabilities: np.ndarray, targets: np.ndarray, predicted: np.ndarray, seed: int = 0
) -> dict[str, list[float]]:
    """Compute 95 % percentile bootstrap intervals of mAP, micro F1 and macro F1.

    Args:
        probabilities: `(images, classes)`.
        targets: 0 and 1, `(images, classes)`.
        predicted: 0 and 1, `(images, classes)`.
        seed: seed of the bootstrap.
    """
    images, classes = targets.shape
    resamples = int(np.clip(WORK / (images * classes), *RESAMPLES))
    rng = np.random.default_rng(seed)
    hits = (targets * predicted).astype(np.float32)
    present = targets.astype(np.float32)
    claimed = predicted.astype(np.float32)
    scores: dict[str, list[np.ndarray]] = {"map": [], "micro_f1": [], "macro_f1": []}
    step = int(np.clip(4e6 // images, 1, resamples))
    for start in range(0, resamples, step):
        draws = (rng.integers(0, images, images) for _ in range(min(step, resamples - start)))
        weights = np.stack([np.bincount(drawn, minlength=images) for drawn in draws]).astype(np.float32)
        true, total = weights @ hits, weights @ present + weights @ claimed
        scores["micro_f1"].append(2 * true.sum(axis=1) / np.maximum(total.sum(axis=1), 1))
        scores["macro_f1"].append(_macro_f1(true, total))
        scores["map"].append(_weighted_map(probabilities, targets, weights))
    return {
        f"{key}_interval": np.percentile(np.concatenate(values), (2.5, 97.5)).tolist()
        for key, values in scores.items()
    }


def weighted_average_precisions(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Compute the average precision of one class for several weights of the images.

    Args:
        scores: `(images,)`.
        truth: 0 and 1, `(images,)`.
        weights: `(resamples, images)`.

    Returns:
        Average precision `(resamples,)`, NaN without positives.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # equal scores are one point of the curve
    ordered = weights[:, order]
    seen = np.cumsum(ordered, axis=1)[:, ends]
    true = np.cumsum(ordered * truth[order], axis=1)[:, ends]
    steps = np.diff(true, axis=1, prepend=0)
    positives = true[:, -1]
    sums = (steps * true / np.maximum(seen, 1e-12)).sum(axis=1)
    return np.where(positives > 0, sums / np.maximum(positives, 1e-12), np.nan)


def _weighted_map(probabilities: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    sums = np.zeros(len(weights))
    counts = np.zeros(len(weights))
    for index in np.flatnonzero(targets.any(axis=0)):
        found = weighted_average_precisions(probabilities[:, index], targets[:, index], weights)
        sums += np.nan_to_num(found)
        counts += ~np.isnan(found)
    return sums / np.maximum(counts, 1)


def _macro_f1(true: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Compute the mean F1 of the classes with labels or predictions, 0 without any.

    Args:
        true: numbers of correct predictions `(..., classes)`.
        total: numbers of labels and predictions `(..., classes)`.
    """
    return (2 * true / np.maximum(total, 1)).sum(axis=-1) / np.maximum((total > 0).sum(axis=-1), 1)


def _class_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(truth, predicted, average="binary", zero_division=0)
    return {"precision": float(precision), "recall": float(recall), "f1": float(f1)}


def _mean(values: np.ndarray) -> float:
    """Compute the mean of the values that are not NaN, 0 without any."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else 0.0
