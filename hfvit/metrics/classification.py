"""Single-label metrics: accuracy, F1, ranking metrics, confusion matrix, ECE."""

from collections.abc import Iterator

import numpy as np

CALIBRATION_BINS = 15
BLOCK_LOGITS = 2**17  # of a block of float64, which stays in a core's cache
RANKED_COLUMNS = 64  # classes whose scores are held as float32 at once
CURVE_POINTS = 200
MOST_RANKED = 2**30  # logits; ranking more would take longer than the evaluation itself


def classification_metrics(logits: np.ndarray, labels: np.ndarray, names: list[str], ranked: bool = True) -> dict:
    """Compute the metrics of a split, as plain Python values.

    Args:
        logits: float `(images, classes)`.
        labels: class indices `(images,)`.
        names: class names.
        ranked: compute `auc` and `average_precision`, too. They are None for more than `MOST_RANKED` logits.
    """
    from sklearn.metrics import precision_recall_fscore_support  # takes a second, which start-up does not need

    normalizers = log_normalizers(logits)
    predicted = logits.argmax(axis=1)
    correct = predicted == labels
    count = len(labels)
    hits = int(correct.sum())
    each = np.arange(count)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=np.arange(len(names)), zero_division=0
    )
    known = support + np.bincount(predicted, minlength=len(names)) > 0  # as in scikit-learn's macro average
    confidence = np.exp(logits[each, predicted].astype(np.float64) - normalizers)
    bins, ece = calibration(confidence, correct)
    is_ranked = ranked and logits.size <= MOST_RANKED
    auc, average_precision = ranking_metrics(logits, labels, normalizers) if is_ranked else (None, None)
    return {
        "accuracy": hits / count,
        "accuracy_interval": accuracy_interval(hits, count),
        "balanced_accuracy": float(recall[support > 0].mean()),
        "top5_accuracy": float((label_ranks(logits, labels) < 5).mean()),
        "macro_f1": float(f1[known].mean()),
        "mcc": matthews_correlation(labels, predicted, len(names)),
        "auc": auc,
        "average_precision": average_precision,
        "loss": float((normalizers - logits[each, labels]).mean()),
        "ece": ece,
        "images": count,
        "per_class": [
            {"label": name, "precision": float(p), "recall": float(r), "f1": float(f), "images": int(n)}
            for name, p, r, f, n in zip(names, precision, recall, f1, support, strict=True)
        ],
        "confusion_matrix": sparse_confusion(labels, predicted, len(names)),
        "calibration": bins,
        **(two_class_curves(logits, labels) if ranked and len(names) == 2 else {}),
    }


def two_class_curves(logits: np.ndarray, labels: np.ndarray) -> dict[str, list]:
    """Compute the ROC and the precision-recall curve of the second class.

    Args:
        logits: `(images, 2)`.
        labels: class indices `(images,)`.

    Returns:
        `roc_curve` and `precision_recall_curve` of `SplitMetrics`, empty if a class has no images.
    """
    from sklearn.metrics import precision_recall_curve, roc_curve

    if len(np.unique(labels)) < 2:
        return {}
    scores = logits[:, 1].astype(np.float64) - logits[:, 0]
    false_positives, true_positives, _ = roc_curve(labels, scores)
    precision, recall, _ = precision_recall_curve(labels, scores)
    return {
        "roc_curve": thinned(false_positives, true_positives),
        "precision_recall_curve": thinned(recall[::-1], precision[::-1]),
    }


def thinned(x: np.ndarray, y: np.ndarray) -> list[list[float]]:
    """Return at most `CURVE_POINTS` points of a curve, with both ends."""
    chosen = np.unique(np.linspace(0, len(x) - 1, CURVE_POINTS).round().astype(int))
    return np.column_stack([x, y])[chosen].tolist()


def row_blocks(logits: np.ndarray) -> Iterator[slice]:
    """Yield slices of rows with about `BLOCK_LOGITS` numbers each."""
    rows = max(1, BLOCK_LOGITS // max(1, logits.shape[1]))
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)


@np.errstate(invalid="ignore")  # for NaN and infinite logits
def log_normalizers(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Compute the log-sum-exp of `logits / temperature`, float64 `(images,)`."""
    normalizers = np.empty(len(logits))
    for rows in row_blocks(logits):
        block = logits[rows].astype(np.float64)
        block /= temperature
        highest = block.max(axis=1)
        block -= highest[:, None]
        np.exp(block, out=block)
        normalizers[rows] = highest + np.log(block.sum(axis=1))
    return normalizers


def label_ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute the rank of each image's label by logit, 0 for the largest.

    Of equal logits, the lower index ranks first; a NaN ranks last.
    """
    ranks = np.empty(len(logits), dtype=np.int64)
    for rows in row_blocks(logits):
        block = logits[rows]
        own = block[np.arange(len(block)), labels[rows], None]
        ranks[rows] = np.count_nonzero(block > own, axis=1)
        equal = block == own
        for row in np.flatnonzero(np.count_nonzero(equal, axis=1) > 1):
            ranks[rows.start + row] += np.count_nonzero(equal[row, : labels[rows.start + row]])
        ranks[rows][np.isnan(own[:, 0])] = logits.shape[1]
    return ranks


@np.errstate(invalid="ignore")  # for infinite logits
def ranking_metrics(
    logits: np.ndarray, labels: np.ndarray, normalizers: np.ndarray
) -> tuple[float | None, float | None]:
    """Compute macro ROC AUC and average precision, one class against the rest.

    Scores are log-probabilities in float32, of which NaN is the lowest. For each class, only scores above the lowest
    one of its own images are sorted. Classes with no image or all images are left out.

    Args:
        logits: float `(images, classes)`.
        labels: class indices `(images,)`.
        normalizers: result of `log_normalizers`.

    Returns:
        (AUC, average precision), None without classes.
    """
    count, classes = logits.shape
    by_class = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[by_class], np.arange(classes + 1))
    areas, precisions = [], []
    for first in range(0, classes, RANKED_COLUMNS):
        columns = logits[:, first : first + RANKED_COLUMNS]
        scores = np.empty(columns.shape[::-1], dtype=np.float32)
        for rows in row_blocks(columns):
            scores[:, rows] = (columns[rows] - normalizers[rows, None]).T
        scores[np.isnan(scores)] = -np.inf
        for index, column in enumerate(scores, first):
            own = np.sort(column[by_class[starts[index] : starts[index + 1]]])
            others = count - len(own)
            if not len(own) or not others:
                continue
            highest = np.sort(column[column >= own[0]])
            at_least = len(highest) - np.searchsorted(highest, own, "left")
            above = len(highest) - np.searchsorted(highest, own, "right")
            own_at_least = len(own) - np.searchsorted(own, own, "left")
            own_above = len(own) - np.searchsorted(own, own, "right")
            # For each image of the class: number of other images with a higher score, and half of those with the same.
            higher = (at_least - own_at_least + above - own_above) / 2
            areas.append(1 - float(higher.mean()) / others)
            precisions.append(float((own_at_least / np.maximum(at_least, 1)).mean()))
    if not areas:
        return None, None
    return float(np.mean(areas)), float(np.mean(precisions))


def matthews_correlation(labels: np.ndarray, predicted: np.ndarray, classes: int) -> float:
    """Compute the multi-class Matthews correlation (Gorodkin, 2004), 0 if undefined.

    scikit-learn's function needs a dense confusion matrix, 4 GB for 21,841 classes.

    Args:
        labels: class indices `(images,)`.
        predicted: predicted class indices `(images,)`.
        classes: number of classes.
    """
    true = np.bincount(labels, minlength=classes).astype(np.float64)
    found = np.bincount(predicted, minlength=classes).astype(np.float64)
    count = float(len(labels))
    covariance = float((labels == predicted).sum()) * count - true @ found
    spread = np.sqrt((count**2 - true @ true) * (count**2 - found @ found))
    return float(covariance / spread) if spread else 0.0


def sparse_confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> dict:
    """Compute the nonzero cells of the confusion matrix, for `ConfusionMatrix`.

    Args:
        labels: class indices `(images,)`.
        predicted: predicted class indices `(images,)`.
        classes: number of classes.
    """
    cells, counts = np.unique(labels.astype(np.int64) * classes + predicted, return_counts=True)
    return {
        "classes": classes,
        "true": (cells // classes).tolist(),
        "predicted": (cells % classes).tolist(),
        "counts": counts.tolist(),
    }


def accuracy_interval(hits: int, count: int) -> list[float]:
    """Return the 95 % interval of the accuracy `hits / count` (Wilson)."""
    from scipy.stats import binomtest

    interval = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    return [float(interval.low), float(interval.high)]


@np.errstate(invalid="ignore")  # for NaN logits
def calibration(confidence: np.ndarray, correct: np.ndarray) -> tuple[list[dict], float]:
    """Compute reliability bins and the expected calibration error (ECE).

    The bins are `CALIBRATION_BINS` intervals of confidence with equal width (Guo et al., equation 3,
    https://arxiv.org/abs/1706.04599).

    Args:
        confidence: largest probability of each image, `(images,)`.
        correct: whether the prediction is correct, `(images,)`.

    Returns:
        (bins that are not empty, ECE).
    """
    index = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    bins = [
        {
            "confidence": float(confidence[index == b].mean()),
            "accuracy": float(correct[index == b].mean()),
            "images": int((index == b).sum()),
        }
        for b in np.unique(index)
    ]
    ece = sum(b["images"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(confidence)
    return bins, float(ece)
