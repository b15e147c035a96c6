"""Select example images, mistakes and explanation maps for the report."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedConfig

from hfvit.artifacts.constants import MISTAKES_FILE
from hfvit.artifacts.run_record import write_examples
from hfvit.artifacts.run_sections import ExampleImage, ExampleImages
from hfvit.data.dataset import ImageDataset
from hfvit.data.samplers import occurrences
from hfvit.data.text import TEXT_INPUTS
from hfvit.errors import one_line
from hfvit.metrics.classification import log_normalizers
from hfvit.metrics.label_errors import WEAK_MODEL, confident_disagreements
from hfvit.metrics.multilabel import DEFAULT_THRESHOLD, decisions, probabilities_of
from hfvit.models.explain import explain
from hfvit.utils.csv_files import write_csv

logger = logging.getLogger(__name__)

MAX_MISTAKES = 16
MAX_MAPS = 8
MAX_PIXELS = 224  # longer side of a saved image
NO_LABEL = "none"


def _probability(logits: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return the probability of one class of each image `(images,)`."""
    own = logits[np.arange(len(logits)), classes].astype(np.float64)
    return np.exp(own - log_normalizers(logits))


def likely_label_errors(
    predicted: np.ndarray, confidence: np.ndarray, labels: np.ndarray, label_probability: np.ndarray
) -> np.ndarray:
    """Return the indices of likely label errors, the most likely first.

    These are confident disagreements of a model with the labels of images that it was not trained on. A model that
    predicts few labels correctly cannot judge them, and has none.

    Args:
        predicted: predicted class of each image `(images,)`.
        confidence: probability of the predicted class.
        labels: class of each image.
        label_probability: probability of that class.
    """
    if not len(labels) or (predicted == labels).mean() < WEAK_MODEL:
        return np.empty(0, np.int64)
    found = confident_disagreements(predicted, confidence, labels, label_probability)
    return found[np.argsort((label_probability - confidence)[found], kind="stable")]


def images_of_all_classes(labels: np.ndarray, count: int = MAX_MAPS) -> np.ndarray:
    """Return the indices of images of as many classes as possible.

    With more classes than `count`, these are the first images of classes at equal distances; with fewer classes, also
    second images, and so on.
    """
    order = np.argsort(labels, kind="stable")
    classes = np.unique(labels)
    rank = occurrences(labels[order])  # 0 for the first image of its class, 1 for the second, ...
    if len(classes) > count:
        chosen = classes[np.linspace(0, len(classes) - 1, count).astype(int)]
        return order[(rank == 0) & np.isin(labels[order], chosen)]
    return order[np.argsort(rank, kind="stable")][:count]


class ClassAnswers:
    """Answers of a single-label classifier.

    Args:
        logits: `(images, classes)`.
        labels: class indices `(images,)`.
        names: class names.

    Attributes:
        wrong: indices of the mistakes, the most confident first.
        label_errors: indices of `likely_label_errors`.
        of_all_classes: indices of images of as many classes as possible.
    """

    def __init__(self, logits: np.ndarray, labels: np.ndarray, names: Sequence[str]):
        self.labels = labels
        self.names = names
        self.predicted = logits.argmax(axis=1)
        self.confidence = _probability(logits, self.predicted)
        wrong = np.flatnonzero(self.predicted != labels)
        self.wrong = wrong[np.argsort(-self.confidence[wrong], kind="stable")]
        self.label_errors = likely_label_errors(self.predicted, self.confidence, labels, _probability(logits, labels))
        self.of_all_classes = images_of_all_classes(labels)

    def describe(self, place: int) -> dict[str, Any]:
        """Return the class, the predicted class and its probability of an image."""
        return {
            "true": self.names[self.labels[place]],
            "predicted": self.names[self.predicted[place]],
            "confidence": float(self.confidence[place]),
        }


class LabelAnswers:
    """Answers of a multi-label classifier.

    Mistakes are sorted by the largest distance of a wrong label's probability to its threshold.

    Args:
        logits: `(images, classes)`.
        targets: 0 and 1, `(images, classes)`.
        names: class names.
        thresholds: thresholds of the probabilities `(classes,)`. Default: 0.5.
    """

    def __init__(
        self, logits: np.ndarray, targets: np.ndarray, names: Sequence[str], thresholds: Sequence[float] | None = None
    ):
        self.names = np.array(names)
        self.probabilities = probabilities_of(logits)
        self.targets = targets.astype(bool)
        self.predicted = decisions(self.probabilities, thresholds).astype(bool)
        limits = np.full(len(names), DEFAULT_THRESHOLD) if thresholds is None else np.asarray(thresholds)
        self.beyond = np.where(self.predicted != self.targets, np.abs(self.probabilities - limits), -1.0)
        worst = self.beyond.max(axis=1)
        wrong = np.flatnonzero(worst >= 0)
        self.wrong = wrong[np.argsort(-worst[wrong], kind="stable")]
        self.label_errors = np.empty(0, np.int64)
        shown = np.flatnonzero(self.targets.any(axis=1))
        shown = shown if len(shown) else np.arange(len(targets))
        self.of_all_classes = shown[images_of_all_classes(self.targets[shown].argmax(axis=1))]

    def describe(self, place: int) -> dict[str, Any]:
        """Return labels, predicted labels and confidence of an image.

        The confidence is that of the worst mistake, without a mistake that of the least certain label.
        """
        confidences = np.where(self.predicted[place], self.probabilities[place], 1 - self.probabilities[place])
        beyond = self.beyond[place]
        label = beyond.argmax() if beyond.max() >= 0 else confidences.argmin()
        return {
            "true": self._shown(self.targets[place]),
            "predicted": self._shown(self.predicted[place]),
            "confidence": float(confidences[label]),
        }

    def _shown(self, has: np.ndarray) -> str:
        return ", ".join(self.names[has]) or NO_LABEL


def answers_of(
    logits: np.ndarray, targets: np.ndarray, names: Sequence[str], config: PreTrainedConfig
) -> ClassAnswers | LabelAnswers:
    """Create the answers of a model.

    Args:
        logits: `(images, classes)`.
        targets: class indices `(images,)`, or 0 and 1 `(images, classes)`.
        names: class names.
        config: configuration of the model, with its thresholds.
    """
    if targets.ndim == 1:
        return ClassAnswers(logits, targets, names)
    return LabelAnswers(logits, targets, names, getattr(config, "thresholds", None))


class Examples:
    """Example images of one split for the report.

    Args:
        role: `test` or `validation`.
        dataset: the split as evaluation reads it, or its first images, to choose the examples from.
        rows: row of each image in the data set's split, `(images,)`. None if unknown.
        answers: predictions of the model, from `answers_of`.
        file_of: function from the position of an image to its file in the data set. Default: no files.
    """

    def __init__(
        self,
        role: str,
        dataset: ImageDataset,
        rows: Sequence[int] | None,
        answers: ClassAnswers | LabelAnswers,
        file_of: Callable[[int], str | None] | None = None,
    ):
        self.dataset = dataset
        self.rows = rows
        self.answers = answers
        self.file_of = file_of
        readable = len(dataset)
        self.explained = answers.of_all_classes
        if readable < len(answers.predicted):
            self.explained = images_of_all_classes(answers.labels[:readable])
        mistakes = answers.wrong[~np.isin(answers.wrong, answers.label_errors)]
        mistakes = mistakes[mistakes < readable][:MAX_MISTAKES]
        label_errors = answers.label_errors[answers.label_errors < readable][:MAX_MISTAKES]
        self.record = ExampleImages(
            split=role,
            mistakes=self._describe(mistakes),
            wrong=len(answers.wrong),
            label_errors=self._describe(label_errors),
        )
        self.arrays = {"mistakes": self._read_images(mistakes), "label_errors": self._read_images(label_errors)}

    def add_explanations(self, model, preprocessing, device: torch.device, is_sharded: bool = False) -> None:
        """Add explanation maps of the predicted classes, or the reason why there are none.

        Args:
            model: trained model, on `device`.
            preprocessing: module that maps a uint8 batch to pixel values.
            device: device of the model.
            is_sharded: whether the weights are sharded over processes (FSDP, ZeRO-3), which is not supported.
        """
        batch = self.dataset.__getitems__(list(self.explained))
        found = None
        reason = None
        if is_sharded:
            reason = "the weights are sharded over processes"
        elif any(name in batch for name in TEXT_INPUTS):
            reason = "not supported for image and text models"
        else:
            try:
                found = explain(model, preprocessing({name: value.to(device) for name, value in batch.items()}))
            except Exception as error:  # from any timm model; a failure here must not fail the run
                reason = one_line(error).removeprefix("explanation maps: ").rstrip(".")
        if found is None:
            logger.info("No explanation maps: %s", reason)
            self.record.explanations_left_out = reason
            return
        self.record.explanation_method = found.method
        self.record.explanations = self._describe(self.explained)
        self.arrays |= {"explanations": self._read_images(self.explained), "explanation_maps": found.maps}

    def write(self, output_dir: str | Path) -> None:
        """Write images and maps to `examples.npz`, all mistakes to `mistakes.csv`."""
        write_examples(output_dir, self.arrays)
        header = ("split", "row", "file", "true", "predicted", "confidence", "likely_label_error")
        suspected = set(self.answers.label_errors.tolist())
        found = ((index, self._describe([index])[0]) for index in self.answers.wrong.tolist())
        write_csv(
            Path(output_dir) / MISTAKES_FILE,
            header,
            (
                (self.record.split, "" if e.row is None else e.row, e.file or "", e.true, e.predicted,
                 f"{e.confidence:.6f}", "yes" if index in suspected else "no")
                for index, e in found
            ),
        )  # fmt: skip

    def _describe(self, indices: Sequence[int]) -> list[ExampleImage]:
        return [
            ExampleImage(
                row=None if self.rows is None else int(self.rows[index]),
                file=self.file_of(int(index)) if self.file_of else None,
                **self.answers.describe(index),
            )
            for index in indices
        ]

    def _read_images(self, indices: np.ndarray) -> np.ndarray:
        """Read images as evaluation does: uint8 `(images, height, width, 3)`."""
        if not len(indices):
            return np.empty((0, 1, 1, 3), np.uint8)
        read = self.dataset.reader.for_evaluation(np.asarray(indices))
        images = next(iter(read.values())).numpy()
        height, width = images.shape[1:3]
        if max(height, width) > MAX_PIXELS:
            size = [max(1, round(side * MAX_PIXELS / max(height, width))) for side in (width, height)]
            images = np.stack([np.asarray(Image.fromarray(image).resize(size)) for image in images])
        return images
