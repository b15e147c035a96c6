"""Sections of run.json: model, data, metrics, training, calibration, examples."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np

from hfvit.artifacts.json_record import LARGEST_COUNT, OPTIONAL, Count, FieldError, Record, Share, shown


@dataclass(kw_only=True)
class TextModel(Record):
    """Text encoder and fusion of an image and text model."""

    text_encoder: str
    is_local: bool
    model_type: str
    fusion: str
    max_text_length: int
    parameters: int


@dataclass(kw_only=True)
class Model(Record):
    """Architecture and size of the model.

    `architecture` is the name in timm that the network was built from, with `model_args`, and `description` what was
    built. `is_local` is whether `base_model` was a local folder, None if that was not recorded.
    """

    architecture: str
    description: str | None = field(default=None, metadata=OPTIONAL)
    model_args: dict[str, Any] | None = field(default=None, metadata=OPTIONAL)
    base_model: str | None
    is_local: bool | None = None
    base_license: str | None = None
    texts: TextModel | None = field(default=None, metadata=OPTIONAL)
    image_size: tuple[int, int]
    parameters: int
    trained_parameters: int
    preprocessing: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Split(Record):
    """Source and size of one split.

    `source` is the split of the data set, `rows` its number of images (None for a stream of unknown length),
    `held_out` the fraction of the source that was held out for it, `left_out` the number of files by reason.
    """

    source: str
    rows: int | None
    fingerprint: str | None = None
    empty_texts: int | None = field(default=None, metadata=OPTIONAL)
    longest_texts: int | None = field(default=None, metadata=OPTIONAL)
    input: str | None = field(default=None, metadata=OPTIONAL)
    held_out: float | None = field(default=None, metadata=OPTIONAL)
    left_out: dict[str, int] | None = field(default=None, metadata=OPTIONAL)


@dataclass(kw_only=True)
class Data(Record):
    """Data set and splits by role.

    `selected_by` is the split that selected the checkpoint. `problem_type` is None for single-label data.
    """

    dataset_name: str
    is_local: bool | None = None
    dataset_config_name: str | None
    dataset_revision: str | None
    dataset_commit: str | None = None
    image_column: str | None = None
    label_column: list[str] | str | None = None
    problem_type: str | None = field(default=None, metadata=OPTIONAL)
    text_column: str | None = field(default=None, metadata=OPTIONAL)
    labels: list[str]
    splits: dict[str, Split]
    selected_by: str | None
    left_out: dict[str, int] | None = field(default=None, metadata=OPTIONAL)

    @property
    def commit(self) -> str | None:
        """Return the commit that was loaded, or the recipe's revision if it is unknown."""
        return self.dataset_commit or self.dataset_revision


@dataclass(kw_only=True)
class Seeds(Record):
    """Seeds of the run."""

    seed: int
    data_seed: int | None
    full_determinism: bool


@dataclass(kw_only=True)
class CalibrationBin(Record):
    """Bin of the reliability diagram: mean confidence, accuracy, number of images."""

    confidence: Share
    accuracy: Share
    images: Count


@dataclass(kw_only=True)
class ClassMetrics(Record):
    """Metrics of one class; `images` is the number of images of the class."""

    label: str
    precision: Share
    recall: Share
    f1: Share
    images: Count


@dataclass(kw_only=True)
class ConfusionMatrix(Record):
    """Nonzero cells of a confusion matrix.

    `true` and `predicted` are class indices, `counts` the numbers of images. The dense matrix of
    version 0.1 can be read, too.
    """

    classes: Count
    true: list[int]
    predicted: list[int]
    counts: list[int]

    @classmethod
    def _parse(cls, content: Any) -> Self:
        return super()._parse(_sparse(content) if isinstance(content, list) else content)

    def check(self) -> None:
        for name, limit in (("true", self.classes), ("predicted", self.classes), ("counts", LARGEST_COUNT)):
            values = getattr(self, name)
            if len(values) != len(self.counts):
                raise FieldError(name, f"must have {len(self.counts)} items, got {len(values)}")
            if values and not (min(values) >= 0 and max(values) < limit):
                raise FieldError(name, f"must be integers from 0 to {limit - 1}")

    def dense(self, most: int | None = None) -> np.ndarray:
        """Return counts `(classes, classes)`, with the true classes as rows.

        Args:
            most: largest number of rows. With more classes, adjacent ones are summed.
        """
        group = 1 if most is None else -(-self.classes // most)
        rows = -(-self.classes // group)
        matrix = np.zeros((rows, rows), dtype=np.int64)
        places = [np.asarray(indices, dtype=np.int64) // group for indices in (self.true, self.predicted)]
        np.add.at(matrix, tuple(places), np.asarray(self.counts, dtype=np.int64))
        return matrix


def _sparse(matrix: list) -> dict[str, Any]:
    """Return the nonzero cells of a dense matrix; raise `FieldError` if it is not one."""
    classes = len(matrix)
    for row, values in enumerate(matrix):
        if not isinstance(values, list) or len(values) != classes:
            raise FieldError(f"[{row}]", f"must be a list of {classes}, got {shown(values)}")
        for column, value in enumerate(values):
            if type(value) is not int:
                raise FieldError(f"[{row}][{column}]", f"must be an integer, got {shown(value)}")
    cells = [(row, column, value) for row, values in enumerate(matrix) for column, value in enumerate(values) if value]
    true, predicted, counts = ([*column] for column in zip(*cells, strict=True)) if cells else ([], [], [])
    return {"classes": classes, "true": true, "predicted": predicted, "counts": counts}


class Score(NamedTuple):
    """Main metric of a split with its 95 % interval; `key` is its name in logs."""

    key: str
    name: str
    value: float
    interval: tuple[float, float]

    @property
    def title(self) -> str:
        """Return the name at the start of a line: Accuracy, Micro F1, mAP."""
        return self.name if self.name == "mAP" else self.name[0].upper() + self.name[1:]


@dataclass(kw_only=True)
class SplitMetrics(Record):
    """Metrics of one split (`metrics.classification`), None if not computed.

    With two classes, `roc_curve` has points (false positive rate, true positive rate) and `precision_recall_curve`
    points (recall, precision) of the second class.
    """

    accuracy: Share
    accuracy_interval: tuple[Share, Share]
    balanced_accuracy: Share | None = field(default=None, metadata=OPTIONAL)
    top5_accuracy: Share
    macro_f1: Share
    mcc: float | None = field(default=None, metadata=OPTIONAL)
    auc: Share | None = field(default=None, metadata=OPTIONAL)
    average_precision: Share | None = field(default=None, metadata=OPTIONAL)
    loss: float
    ece: Share
    images: Count
    per_class: list[ClassMetrics]
    confusion_matrix: ConfusionMatrix
    calibration: list[CalibrationBin]
    roc_curve: list[tuple[Share, Share]] | None = field(default=None, metadata=OPTIONAL)
    precision_recall_curve: list[tuple[Share, Share]] | None = field(default=None, metadata=OPTIONAL)

    def check(self) -> None:
        if self.confusion_matrix.classes != len(self.per_class):
            raise FieldError("confusion_matrix", f"must have the {len(self.per_class)} classes of per_class")

    @property
    def score(self) -> Score:
        return Score("accuracy", "accuracy", self.accuracy, self.accuracy_interval)

    def index_entries(self) -> list[tuple[str, str, float]]:
        """Return type, name and value of the metrics in a model card's `model-index`."""
        return [("accuracy", "Accuracy", self.accuracy), ("f1", "Macro F1", self.macro_f1)]

    def columns(self) -> dict[str, str]:
        """Return the cells of a table row by column heading."""
        top5 = {"top-5": f"{self.top5_accuracy:.2%}"} if len(self.per_class) > 5 else {}
        return {
            "images": f"{self.images:,}",
            "accuracy": f"{self.accuracy:.2%}",
            "95 % interval": "{:.2%} - {:.2%}".format(*self.accuracy_interval),
            **top5,
            "macro F1": f"{self.macro_f1:.4f}",
            "loss": f"{self.loss:.4f}",
            "ECE": f"{self.ece:.4f}",
        }

    def further_columns(self) -> dict[str, str]:
        """Return metrics that count all classes alike, if they were computed."""
        values = {
            "balanced accuracy": self.balanced_accuracy,
            "AUC": self.auc,
            "average precision": self.average_precision,
        }
        return {name: f"{value:.4f}" for name, value in values.items() if value is not None}


@dataclass(kw_only=True)
class LabelMetrics(Record):
    """Metrics of one class of a multi-label classification.

    `average_precision` is None if no image has the label. `curve` has points (recall, precision) of the
    precision-recall curve.
    """

    label: str
    images: Count
    average_precision: Share | None
    threshold: float
    precision: Share
    recall: Share
    f1: Share
    curve: list[tuple[Share, Share]]

    def check(self) -> None:
        """Raise `FieldError` for a class with images and without average precision."""
        if self.images and self.average_precision is None:
            raise FieldError("average_precision", "must be a number for a class with images, got None")


@dataclass(kw_only=True)
class MultiLabelMetrics(Record):
    """Multi-label metrics of one split (metrics/multilabel.py).

    Precision, recall, F1 and `exact_match` are computed with the thresholds in `per_class`.
    """

    images: Count
    labels_per_image: float
    map: Share
    map_interval: tuple[Share, Share]
    micro_f1: Share
    micro_f1_interval: tuple[Share, Share]
    macro_f1: Share
    macro_f1_interval: tuple[Share, Share]
    exact_match: Share
    loss: float
    per_class: list[LabelMetrics]
    curve: list[tuple[Share, Share]]

    @property
    def score(self) -> Score:
        return Score("map", "mAP", self.map, self.map_interval)

    def index_entries(self) -> list[tuple[str, str, float]]:
        """Return type, name and value of the metrics in a model card's `model-index`."""
        return [("map", "mAP", self.map), ("f1", "Micro F1", self.micro_f1), ("f1", "Macro F1", self.macro_f1)]

    def further_columns(self) -> dict[str, str]:
        """Return no metrics besides `columns`."""
        return {}

    def columns(self) -> dict[str, str]:
        """Return the cells of a table row by column heading."""
        return {
            "images": f"{self.images:,}",
            "mAP": f"{self.map:.4f}",
            "95 % interval": "{:.4f} - {:.4f}".format(*self.map_interval),
            "micro F1": f"{self.micro_f1:.4f}",
            "macro F1": f"{self.macro_f1:.4f}",
            "exact match": f"{self.exact_match:.2%}",
            "loss": f"{self.loss:.4f}",
        }


@dataclass(kw_only=True)
class Thresholds(Record):
    """Probability thresholds of the classes, in the order of the logits."""

    values: list[Share]
    fitted_on: str
    images: Count


@dataclass(kw_only=True)
class Probe(Record):
    """Linear probe: the selected C, an inverse regularization strength.

    Attributes:
        features: number of features of an image.
        rows: number of training rows, augmented copies included.
        c: strengths that were tried, ascending.
        best_c: the selected one.
        selected_by: validation metric of the selection.
        validation: metrics of each C on the validation split.
    """

    features: int
    rows: int
    c: list[float]
    best_c: float
    selected_by: str
    validation: list[dict[str, float]]

    def check(self) -> None:
        if len(self.validation) != len(self.c):
            raise FieldError("validation", f"must have {len(self.c)} items, got {len(self.validation)}")
        for place, scores in enumerate(self.validation):
            if "loss" not in scores:
                raise FieldError(f"validation[{place}].loss")
        if not all(value > 0 for value in (*self.c, self.best_c)):
            raise FieldError("c", f"must be numbers above 0, got {shown([*self.c, self.best_c])}")


@dataclass(kw_only=True)
class SoupMember(Record):
    """Candidate for a soup: name, and score on the validation split."""

    name: str
    score: float
    is_used: bool


@dataclass(kw_only=True)
class Soup(Record):
    """Mean of the weights of several models (`models.soup`).

    Attributes:
        kind: "greedy" or "uniform".
        metric: name of the scores.
        members: the models that were tried.
        score: score of the mean.
        before: score of the weights that the mean was to replace, None without such weights.
        is_used: whether it replaced them.
    """

    kind: str
    metric: str
    members: list[SoupMember]
    score: float
    before: float | None = field(default=None, metadata=OPTIONAL)
    is_used: bool = True

    @property
    def used(self) -> list[str]:
        """Return the names of the models in the mean."""
        return [member.name for member in self.members if member.is_used]


@dataclass(kw_only=True)
class Training(Record):
    """Length, speed and selection of the training.

    `best_step` is None if no checkpoint was selected.
    """

    steps: int
    epochs: float | None
    best_step: int | None
    best_metric: float | None = None
    best_metric_name: str | None
    seconds: float
    images_per_second: float
    data_wait: float
    mfu: float | None = field(default=None, metadata=OPTIONAL)
    mfu_datasheet: float | None = field(default=None, metadata=OPTIONAL)
    peak_memory_gib: float | None = field(default=None, metadata=OPTIONAL)
    flops_per_image: float | None = None
    peak_flops: float | None = None
    resumed_at_step: int
    precision: str
    processes: int
    data_workers: int | None = None
    per_device_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    per_device_eval_batch_size: int | None = None
    probe: Probe | None = field(default=None, metadata=OPTIONAL)
    soup: Soup | None = field(default=None, metadata=OPTIONAL)


@dataclass(kw_only=True)
class CalibratedSplit(Record):
    """Metrics of a split after temperature scaling."""

    loss: float
    ece: float
    calibration: list[CalibrationBin]


@dataclass(kw_only=True)
class Temperature(Record):
    """Fitted temperature; if `value` is None, `reason` is the reason.

    In `splits`, images of the split `fitted_on` are calibrated with the temperature of other images, by
    cross-validation in `folds` folds. In records without `folds`, they are those that it was fitted on.
    """

    value: float | None
    fitted_on: str
    images: int
    reason: str | None
    splits: dict[str, CalibratedSplit]
    folds: Count | None = field(default=None, metadata=OPTIONAL)


@dataclass(kw_only=True)
class OutOfDistribution(Record):
    """Threshold of the energy, above which an image is unlike the training data.

    `kept` is the fraction of the `images` of the split `fitted_on` that do not exceed it.
    """

    score: str
    threshold: float
    kept: Share
    fitted_on: str
    images: Count


@dataclass(kw_only=True)
class ExampleImage(Record):
    """Image of a split: row there, true and predicted class.

    `row` is None if unknown, of a stream with `max_eval_samples`. `file` is the path of the image relative to the data
    set, None for images in tables.
    """

    row: int | None
    true: str
    predicted: str
    confidence: float
    file: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(kw_only=True)
class ExampleImages(Record):
    """Images of examples.npz.

    Attributes:
        split: split of the images.
        mistakes: most confident mistakes, without `label_errors`.
        wrong: number of all mistakes, which are in mistakes.csv.
        label_errors: images whose label is likely to be wrong.
        explanations: images with explanation maps.
        explanation_method: name of the method.
        explanations_left_out: reason why there are no explanation maps.
    """

    split: str
    mistakes: list[ExampleImage]
    wrong: Count | None = field(default=None, metadata=OPTIONAL)
    label_errors: list[ExampleImage] = field(default_factory=list)
    explanations: list[ExampleImage] = field(default_factory=list)
    explanation_method: str | None = None
    explanations_left_out: str | None = None

    @classmethod
    def _parse(cls, content: Any) -> Self:
        if isinstance(content, dict) and "attention_left_out" in content and "explanations" not in content:
            content = {  # hfvit 0.1 drew attention rollout
                **{key: value for key, value in content.items() if not key.startswith("attention")},
                "explanations": content.get("attention", []),
                "explanation_method": "Attention rollout",
                "explanations_left_out": content["attention_left_out"],
            }
        return super()._parse(content)
