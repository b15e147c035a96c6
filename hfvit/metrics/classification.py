"""Accuracy, top-5, macro F1, per-class scores, confusion matrix and ECE."""

import tempfile
from collections.abc import Callable

import datasets
import evaluate
import numpy as np
from scipy.special import log_softmax
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from hfvit.recipe.arguments import SCALAR_METRICS

CALIBRATION_BINS = 15


class ImageClassificationMetric(evaluate.Metric):
    """Classification metrics as an `evaluate.Metric`.

    `compute(predictions=logits, references=labels)` takes logits `(images, classes)` and class indices `(images,)`.
    Unlike `evaluate.load("accuracy")`, it needs no script from the Hub.
    """

    def __init__(self, labels: list[str], **kwargs):
        self.labels = labels
        try:
            super().__init__(keep_in_memory=True, **kwargs)
        except OSError:  # evaluate makes a folder in its cache, in which nothing is written then (0.4)
            super().__init__(keep_in_memory=True, **{**kwargs, "cache_dir": tempfile.gettempdir()})

    def _info(self):
        return evaluate.MetricInfo(
            description="Accuracy with its 95 % interval, top-5, macro F1, per-class scores, confusion, calibration.",
            citation="",
            inputs_description="predictions: logits (images, classes); references: class indices (images,).",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        return classification_metrics(np.asarray(predictions), np.asarray(references), self.labels)


def classification_metrics(logits: np.ndarray, labels: np.ndarray, names: list[str]) -> dict:
    """Compute the metrics of a split, as plain Python values.

    Args:
        logits: `(images, classes)`.
        labels: class indices `(images,)`.
        names: class names.
    """
    log_probabilities = log_softmax(logits.astype(np.float64), axis=1)
    predicted = log_probabilities.argmax(axis=1)
    correct = predicted == labels
    count = len(labels)
    hits = int(correct.sum())
    top5 = np.argsort(-log_probabilities, axis=1, kind="stable")[:, :5]
    classes = np.arange(len(names))
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=0
    )
    bins, ece = calibration(np.exp(log_probabilities.max(axis=1)), correct)
    return {
        "accuracy": hits / count,
        "accuracy_interval": accuracy_interval(hits, count),
        "top5_accuracy": float((top5 == labels[:, None]).any(axis=1).mean()),
        "macro_f1": float(f1.mean()),
        "loss": float(-log_probabilities[np.arange(count), labels].mean()),
        "ece": ece,
        "images": count,
        "per_class": [
            {"label": name, "precision": float(p), "recall": float(r), "f1": float(f), "images": int(n)}
            for name, p, r, f, n in zip(names, precision, recall, f1, support, strict=True)
        ],
        "confusion_matrix": confusion_matrix(labels, predicted, labels=classes).tolist(),
        "calibration": bins,
    }


def accuracy_interval(hits: int, count: int) -> list[float]:
    """Return the 95 % interval of the accuracy `hits / count` (Wilson)."""
    interval = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    return [float(interval.low), float(interval.high)]


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


def with_scalar_metrics(compute_metrics: Callable | None, labels: list[str]) -> Callable:
    """Create `compute_metrics` of a Trainer: hfvit's scalar metrics and the user's.

    Args:
        compute_metrics: function of the user, `EvalPrediction -> dict`, or None.
        labels: class names in the order of the logits.
    """
    own = trainer_metrics(labels)
    if compute_metrics is None:
        return own
    return lambda prediction: own(prediction) | compute_metrics(prediction)


def trainer_metrics(labels: list[str]):
    """Create `compute_metrics` of a Trainer from `ImageClassificationMetric`."""
    metric = ImageClassificationMetric(labels)

    def compute_metrics(prediction) -> dict[str, float]:
        computed = metric.compute(predictions=prediction.predictions, references=prediction.label_ids)
        return {key: computed[key] for key in SCALAR_METRICS}

    return compute_metrics
