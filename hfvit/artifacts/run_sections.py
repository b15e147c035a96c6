"""Sections of run.json: model, data, metrics, training, calibration, example images."""

from dataclasses import dataclass, field
from typing import Any

from hfvit.artifacts.json_record import OPTIONAL, Record


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
    """The model.

    `is_local` is whether `base_model` was a local folder, None if that was not recorded.
    """

    architecture: str
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
    """One split.

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

    `selected_by` is the split that selected the checkpoint.
    """

    dataset_name: str
    is_local: bool | None = None
    dataset_config_name: str | None
    dataset_revision: str | None
    dataset_commit: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    text_column: str | None = field(default=None, metadata=OPTIONAL)
    labels: list[str]
    splits: dict[str, Split]
    selected_by: str | None
    left_out: dict[str, int] | None = field(default=None, metadata=OPTIONAL)

    @property
    def commit(self) -> str | None:
        """The commit that was loaded, or the revision in the recipe if it is unknown."""
        return self.dataset_commit or self.dataset_revision


@dataclass(kw_only=True)
class Seeds(Record):
    """Seeds of the run."""

    seed: int
    data_seed: int | None
    full_determinism: bool


@dataclass(kw_only=True)
class CalibrationBin(Record):
    """One bin of the reliability diagram: mean confidence, accuracy, number of images."""

    confidence: float
    accuracy: float
    images: int


@dataclass(kw_only=True)
class ClassMetrics(Record):
    """Metrics of one class; `images` is the number of images of the class."""

    label: str
    precision: float
    recall: float
    f1: float
    images: int


@dataclass(kw_only=True)
class SplitMetrics(Record):
    """Metrics of one split (`metrics.classification`)."""

    accuracy: float
    accuracy_interval: tuple[float, float]
    top5_accuracy: float
    macro_f1: float
    loss: float
    ece: float
    images: int
    per_class: list[ClassMetrics]
    confusion_matrix: list[list[int]]
    calibration: list[CalibrationBin]


@dataclass(kw_only=True)
class Probe(Record):
    """A linear probe: validation metrics for each C, and the selected C."""

    features: int
    rows: int
    c: list[float]
    best_c: float
    selected_by: str
    validation: list[dict[str, float]]


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


@dataclass(kw_only=True)
class CalibratedSplit(Record):
    """Metrics of a split after temperature scaling."""

    loss: float
    ece: float
    calibration: list[CalibrationBin]


@dataclass(kw_only=True)
class Temperature(Record):
    """Fitted temperature; if `value` is None, `reason` is the reason."""

    value: float | None
    fitted_on: str
    images: int
    reason: str | None
    splits: dict[str, CalibratedSplit]


@dataclass(kw_only=True)
class ExampleImage(Record):
    """One image of examples.npz: row in the split, true and predicted class."""

    row: int
    true: str
    predicted: str
    confidence: float


@dataclass(kw_only=True)
class ExampleImages(Record):
    """Images of examples.npz.

    `attention_left_out` is the reason why there are no attention maps.
    """

    split: str
    mistakes: list[ExampleImage]
    attention: list[ExampleImage] = field(default_factory=list)
    attention_left_out: str | None = None
