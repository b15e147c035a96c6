"""Recipe arguments for data, augmentation, model, fine-tuning and run; imports no torch."""

from dataclasses import dataclass, field
from typing import Any

from hfvit.errors import RecipeError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
NAN_POLICIES = ("stop", "rewind")
POLICIES = ("basic", "trivial_augment", "rand_augment", "three_augment")

# The metrics that are one number: what a training curve shows and what can select a checkpoint.
SCALAR_METRICS = ("accuracy", "top5_accuracy", "macro_f1", "loss", "ece")


def _field(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _check(condition: bool, key: str, value: Any, allowed: str) -> None:
    if not condition:
        raise RecipeError(f"{key}: {value!r} is not allowed; it takes {allowed}.")


def _check_fraction(key: str, value: float | None) -> None:
    _check(value is None or 0.0 <= value < 1.0, key, value, "a number from 0 to below 1")


def _check_positive(key: str, value: int | float | None) -> None:
    _check(value is None or value > 0, key, value, "a number above 0")


@dataclass
class DataArguments:
    """Data: which images, which split does what, and how an image is presented to the model."""

    dataset_name: str | None = _field(
        None,
        "Hub id, local folder (datasets' layouts, imagefolder included), or 'digits' (shipped with scikit-learn).",
    )
    dataset_config_name: str | None = _field(None, "Configuration of the data set, where it has several.")
    dataset_revision: str | None = _field(None, "Branch, tag or commit of the data set on the Hub.")
    image_column: str | None = _field(None, "Image column; found by its feature type when not given.")
    label_column: str | None = _field(None, "Label column; found by its feature type when not given.")
    text_column: str | None = _field(None, "Column of texts that go with the images; needs text_encoder.")
    train_split: str = _field("train", "Split to train on; slices such as train[:1000] work.")
    validation_split: str | None = _field(
        None, "Split that selects the best checkpoint; without one, validation_fraction of train is held out."
    )
    test_split: str | None = _field("test", "Split evaluated once, at the end; never used to select anything.")
    validation_fraction: float = _field(0.1, "Share of train held out (stratified, seeded) when there is no split.")
    max_train_samples: int | None = _field(
        None, "Use at most this many training images (a seeded random choice; of a stream the first)."
    )
    max_eval_samples: int | None = _field(None, "Use at most this many images of each evaluation split.")
    streaming: bool = _field(
        False, "Read the training split as it is trained on, for sets larger than the disk; needs validation_split."
    )
    shuffle_buffer_size: int = _field(
        10000, "Images that each process keeps in memory to draw from; only a stream needs it."
    )
    crop_pct: float | None = _field(
        None, "Share of the resized image that evaluation's centre crop keeps; the pretrained model's when not given."
    )
    interpolation: str | None = _field(
        None, f"Resize filter, one of {', '.join(INTERPOLATIONS)}; the pretrained model's when not given."
    )
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Mean of each channel, in [0, 1]; the pretrained model's when not given."}
    )
    image_std: list[float] | None = field(
        default=None, metadata={"help": "Standard deviation of each channel; the pretrained model's when not given."}
    )

    def __post_init__(self):
        if not self.dataset_name:
            raise RecipeError("dataset_name is missing: give a Hub id, a local folder, or 'digits'.")
        _check(0.0 < self.validation_fraction < 1.0, "validation_fraction", self.validation_fraction, "0 < f < 1")
        _check_positive("max_train_samples", self.max_train_samples)
        _check_positive("max_eval_samples", self.max_eval_samples)
        _check_positive("shuffle_buffer_size", self.shuffle_buffer_size)
        if self.streaming:
            self._check_streaming()
        _check(self.crop_pct is None or 0.0 < self.crop_pct <= 1.0, "crop_pct", self.crop_pct, "0 < share <= 1")
        _check(
            self.interpolation is None or self.interpolation in INTERPOLATIONS,
            "interpolation",
            self.interpolation,
            f"one of {', '.join(INTERPOLATIONS)}",
        )
        for key in ("image_mean", "image_std"):
            value = getattr(self, key)
            _check(value is None or len(value) == 3, key, value, "three numbers, one a channel")
        _check(self.image_std is None or min(self.image_std) > 0, "image_std", self.image_std, "numbers above 0")

    def _check_streaming(self) -> None:
        """What a stream rules out and the recipe alone tells."""
        if not self.validation_split:
            raise RecipeError(
                "streaming: a fraction cannot be held out of a stream; name the validation_split that selects."
            )
        for key in ("train_split", "validation_split", "test_split"):
            name = getattr(self, key) or ""
            if "[" in name or "+" in name:
                limit = "max_train_samples" if key == "train_split" else "max_eval_samples"
                raise RecipeError(
                    f"{key}: '{name}' cannot be streamed; name a whole split, and limit it with {limit}."
                )
        for key in ("validation_split", "test_split"):
            if getattr(self, key) == self.train_split:
                raise RecipeError(f"{key}: '{self.train_split}' is the streamed training split; name another.")

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What overrides the pretrained model's preprocessing, under timm's names."""
        return {
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
            "mean": self.image_mean,
            "std": self.image_std,
        }

    @property
    def loading(self) -> dict[str, Any]:
        """The arguments of `data.load_splits`, or with `streaming` of `stream_source.stream_splits`."""
        keys = ("dataset_name", "dataset_config_name", "dataset_revision", "image_column", "label_column")
        keys += ("train_split", "validation_split", "test_split", "max_train_samples", "max_eval_samples")
        if not self.streaming:
            keys += ("validation_fraction", "text_column")
        return {key: getattr(self, key) for key in keys}


@dataclass
class AugmentationArguments:
    """Augmentation: what is random about a training image."""

    crop_scale: list[float] = field(
        default_factory=lambda: [0.8, 1.0],
        metadata={"help": "Smallest and largest share of the image's area that a training crop covers."},
    )
    crop_ratio: list[float] = field(
        default_factory=lambda: [0.75, 4 / 3], metadata={"help": "Narrowest and widest shape of a training crop."}
    )
    horizontal_flip: float = _field(0.5, "Probability of a mirrored training image.")
    policy: str = _field(
        "basic", f"Further changes of each image, one of {', '.join(POLICIES)}; basic is crop and flip alone."
    )
    rand_augment_magnitude: float = _field(9.0, "Strength of rand_augment's operations, from 0 to 10 (timm's scale).")
    rand_augment_num_ops: int = _field(2, "Operations of rand_augment in a row, each applied to half of the images.")
    mixup_alpha: float = _field(0.0, "Mixes pairs of images (mixup), share drawn from Beta(alpha, alpha); 0 is off.")
    cutmix_alpha: float = _field(0.0, "Pastes a box of one image into another (CutMix); 0 is off.")
    random_erasing: float = _field(0.0, "Probability that a box of the image becomes noise.")
    mix_off_epochs: float = _field(0, "Last epochs that go without mixup, CutMix and random erasing.")
    repeated_augmentation: int = _field(
        1, "How often in a row an image is drawn, augmented each time anew; an epoch then sees as many fewer."
    )

    def __post_init__(self):
        for key in ("crop_scale", "crop_ratio"):
            value = getattr(self, key)
            _check(len(value) == 2 and 0 < value[0] <= value[1], key, value, "two numbers, smallest first, above 0")
        _check(self.crop_scale[1] <= 1.0, "crop_scale", self.crop_scale, "shares of the area, at most 1")
        _check(self.policy in POLICIES, "policy", self.policy, f"one of {', '.join(POLICIES)}")
        _check(
            0.0 <= self.rand_augment_magnitude <= 10.0,
            "rand_augment_magnitude",
            self.rand_augment_magnitude,
            "0 to 10",
        )
        for key in ("horizontal_flip", "random_erasing"):
            _check(0.0 <= getattr(self, key) <= 1.0, key, getattr(self, key), "0 to 1")
        for key in ("mixup_alpha", "cutmix_alpha", "mix_off_epochs"):
            _check(0.0 <= getattr(self, key) < float("inf"), key, getattr(self, key), "a number of 0 or more")
        for key in ("rand_augment_num_ops", "repeated_augmentation"):
            _check_positive(key, getattr(self, key))

    def check_against(self, training) -> None:
        """Raise `RecipeError` for what the batch and the length of `training` (its arguments) rule out."""
        held = training.per_device_train_batch_size
        if (self.mixup_alpha or self.cutmix_alpha) and held % 2:
            raise RecipeError(
                f"mixup_alpha, cutmix_alpha: images are mixed in pairs, and a device holds {held} at once; choose"
                " global_batch_size and per_device_train_batch_size so that it holds an even number."
            )
        if training.max_steps <= 0 and 0 < training.num_train_epochs <= self.mix_off_epochs:
            raise RecipeError(
                f"mix_off_epochs: {self.mix_off_epochs:g} of {training.num_train_epochs:g} epochs leave nothing mixed."
            )

    @property
    def image_changes(self) -> dict[str, Any]:
        """The arguments of `augment.Augmentation` that a recipe gives."""
        keys = ("crop_scale", "crop_ratio", "horizontal_flip", "policy")
        keys += ("rand_augment_magnitude", "rand_augment_num_ops")
        return {key: getattr(self, key) for key in keys}

    @property
    def mixing(self) -> dict[str, Any]:
        """The arguments of `mixing.BatchMixing` that a recipe gives."""
        keys = ("mixup_alpha", "cutmix_alpha", "random_erasing")
        return {**{key: getattr(self, key) for key in keys}, "off_epochs": self.mix_off_epochs}


@dataclass
class RunArguments:
    """Run: what hfvit adds to transformers' TrainingArguments."""

    global_batch_size: int = _field(
        128, "Images per optimiser step over all processes; accumulation is derived from it."
    )
    layer_decay: float = _field(1.0, "Factor of the learning rate from each layer to the one below; 1 is off.")
    ema_decay: float | None = _field(
        None, "Decay of the moving average of the weights that is evaluated and saved; shortened for short runs."
    )
    early_stopping_patience: int | None = _field(
        None, "Stop after this many evaluations without a better metric_for_best_model."
    )
    nan_policy: str = _field(
        "stop",
        "What a NaN or infinite loss or gradient does: stop ends the run, rewind goes back to the last checkpoint.",
    )
    nan_lr_factor: float = _field(0.5, "rewind multiplies the learning rate by this, each time.")
    nan_max_rewinds: int = _field(3, "How often rewind may go back before the run is stopped.")
    overwrite_output_dir: bool = _field(
        False, "Discard the run that output_dir already holds and start anew; files of your own there stay."
    )
    keep_checkpoints: bool = _field(False, "Keep checkpoint-* (optimiser state included) after a finished run.")

    def check(self) -> None:
        """Raise `RecipeError` for a value out of range (TrainingArguments owns `__post_init__`)."""
        _check_positive("global_batch_size", self.global_batch_size)
        _check(0.0 < self.layer_decay <= 1.0, "layer_decay", self.layer_decay, "0 < factor <= 1")
        _check_fraction("ema_decay", self.ema_decay)
        _check_positive("early_stopping_patience", self.early_stopping_patience)
        for key in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            _check_positive(key, getattr(self, key))
        for key in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"):
            value = getattr(self, key)
            _check(0.0 <= value < float("inf"), key, value, "a finite number of 0 or more")
        _check_fraction("label_smoothing_factor", self.label_smoothing_factor)
        for key in ("seed", "data_seed"):
            value = getattr(self, key)
            _check(value is None or 0 <= value < 2**32, key, value, "a whole number from 0 to 4,294,967,295")
        _check(self.nan_policy in NAN_POLICIES, "nan_policy", self.nan_policy, f"one of {', '.join(NAN_POLICIES)}")
        _check(0.0 < self.nan_lr_factor <= 1.0, "nan_lr_factor", self.nan_lr_factor, "0 < factor <= 1")
        _check_positive("nan_max_rewinds", self.nan_max_rewinds)
        metric = self.metric_for_best_model
        known = metric is None or metric.removeprefix("eval_") in SCALAR_METRICS
        _check(known, "metric_for_best_model", metric, f"one of {', '.join(SCALAR_METRICS)}")
