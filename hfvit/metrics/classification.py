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
    """An `evaluate.Metric` defined here: `evaluate.load("accuracy")` would fetch a script from the Hub.

    `compute(predictions=logits, references=labels)` takes logits `(images, classes)` and class indices `(images,)`.
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
    """Metrics of logits `(images, classes)` against class indices `(images,)`; plain Python values throughout."""
    log_probabilities = log_softmax(logits.astype(np.float64), axis=1)
    predicted = log_probabilities.argmax(axis=1)
    correct = predicted == labels
    count, hits = len(labels), int(correct.sum())
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
    """The 95 % interval of `hits / count` (Wilson's)."""
    interval = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    return [float(interval.low), float(interval.high)]


def calibration(confidence: np.ndarray, correct: np.ndarray) -> tuple[list[dict], float]:
    """Reliability bins and the expected calibration error over `CALIBRATION_BINS` equal-width bins of confidence.

    Guo et al., https://arxiv.org/abs/1706.04599, equation 3.
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
    """The `compute_metrics` of a Trainer: hfvit's scalar metrics, and those of a user's own function.

    Args:
        compute_metrics: `EvalPrediction -> dict`; None for hfvit's metrics alone.
        labels: class names in the order of the logits.
    """
    own = trainer_metrics(labels)
    if compute_metrics is None:
        return own
    return lambda prediction: own(prediction) | compute_metrics(prediction)


def trainer_metrics(labels: list[str]):
    """The `compute_metrics` of a Trainer: the scalars of `ImageClassificationMetric`."""
    metric = ImageClassificationMetric(labels)

    def compute_metrics(prediction) -> dict[str, float]:
        computed = metric.compute(predictions=prediction.predictions, references=prediction.label_ids)
        return {key: computed[key] for key in SCALAR_METRICS}

    return compute_metrics
