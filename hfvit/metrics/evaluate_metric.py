"""The classification metrics as an `evaluate.Metric`, whose import takes a second."""

import tempfile

import datasets
import evaluate
import numpy as np

from hfvit.metrics.classification import classification_metrics


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

    def compute(self, *, predictions=None, references=None, **kwargs):
        """Compute the metrics, without a copy of logits that are passed at once."""
        if predictions is None or references is None or kwargs or self.writer is not None:  # after add_batch()
            return super().compute(predictions=predictions, references=references, **kwargs)
        return self._compute(predictions, references)

    def _compute(self, predictions, references):
        return classification_metrics(np.asarray(predictions), np.asarray(references), self.labels)
