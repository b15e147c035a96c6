"""Recipe arguments for data, augmentation, model, fine-tuning and run (no torch)."""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hfvit.errors import HFViTError, RecipeError

logger = logging.getLogger(__name__)

CROP_MODES = ("squash", "center")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
NAN_POLICIES = ("stop", "rewind")
BAD_IMAGES = ("error", "skip")
PADDING_MODES = ("constant", "reflect")  # as in torchvision
POLICIES = ("basic", "trivial_augment", "rand_augment", "three_augment")
TTA = ("flip",)  # test-time augmentations
GREEDY = "greedy"
SOUPS = (GREEDY, "uniform")

# Names of transformers' `problem_type`.
SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL)

# Optional: a data set without this split is not an error.
DEFAULT_TEST_SPLIT = "test"
DEFAULT_TEST_FRACTION = 0.1

# Arguments of timm.create_model with which it loads weights from a URL, a repository or a file.
WEIGHT_ARGS = (
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn",
    "pretrained_model_args", "checkpoint_path", "cache_dir",
)  # fmt: skip

# Metrics with one number, for training curves and metric_for_best_model.
SCALAR_METRICS = ("accuracy", "top5_accuracy", "macro_f1", "loss", "ece", "balanced_accuracy", "mcc")
RANKING_METRICS = ("auc", "average_precision")  # only logged where metric_for_best_model is one, as they take longer
MULTI_LABEL_METRICS = ("map", "micro_f1", "macro_f1", "exact_match", "loss")  # of multi-label data


def _field(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


def _check(condition: bool, key: str, value: Any, allowed: str) -> None:
    if not condition:
        raise RecipeError(f"{key}: must be {allowed}, got {value!r}.")


def _check_fraction(key: str, value: float | None) -> None:
    _check(value is None or 0.0 <= value < 1.0, key, value, "at least 0 and below 1")


def _check_positive(key: str, value: int | float | None) -> None:
    _check(value is None or 0 < value < float("inf"), key, value, "a positive, finite number")


def _check_choice(key: str, value: Any, choices: Iterable[str]) -> None:
    _check(value in choices, key, value, f"one of {', '.join(choices)}")


def check_network(
    architecture: Any, model_args: Any, error: type[HFViTError] = RecipeError, source: str | None = None
) -> None:
    """Refuse values with which `timm.create_model` would load other weights.

    Args:
        architecture: model name in timm, not one that names a repository or folder (`hf-hub:...`, `local-dir:...`).
        model_args: further arguments of `timm.create_model`, a mapping or None.
        error: exception type to raise.
        source: checkpoint that has the values, for the message.

    Raises:
        HFViTError: one of the values is not allowed.
    """
    start = f"{source}: " if source else ""
    if isinstance(architecture, str) and ":" in architecture:
        raise error(f"{start}architecture: must be a model name in timm, got {architecture!r}.")
    wrong = [key for key in WEIGHT_ARGS if isinstance(model_args, dict) and key in model_args]
    if wrong:
        remedy = "Remove it." if source else "Set model_name_or_path to fine-tune a pretrained model."
        raise error(f"{start}model_args: must not load weights, got {wrong[0]}={model_args[wrong[0]]!r}. {remedy}")


@dataclass
class DataArguments:
    """Data set, splits and preprocessing."""

    dataset_name: str | None = _field(
        None,
        "Images with labels: a Hub id, a local folder (such as FOLDER/train/CLASS/image.jpg), or 'digits' (comes with"
        " scikit-learn).",
    )
    dataset_config_name: str | None = _field(None, "Configuration of the data set, if it has several.")
    dataset_revision: str | None = _field(None, "Branch, tag or commit of the data set on the Hub.")
    image_column: str | None = _field(None, "Name of the image column. Default: found by its type.")
    label_column: list[str] | str | None = _field(
        None, "Name of the label column, or of several columns of 0 and 1, one per class. Default: by type.", nargs="+"
    )
    problem_type: str | None = _field(
        None,
        f"Labels of an image: {' (one) or '.join(PROBLEM_TYPES)} (any number). Default: found by the type of the label"
        " column.",
    )
    label_separator: str | None = _field(
        None,
        "Separator of labels in a column of strings, such as '|'. Default: with"
        f" problem_type={MULTI_LABEL} the one of | ; , that occurs.",
    )
    group_column: str | None = _field(
        None,
        "Name of the column with the group of each image, such as the patient. Images of a group are held out"
        " together, also in folds.",
    )
    text_column: str | None = _field(
        None, "Name of the column with a text for each image. Only used with text_encoder."
    )
    train_split: str = _field("train", "Split to train on. Slices such as train[:1000] are allowed.")
    validation_split: str | None = _field(
        None, "Split that selects the best checkpoint. Default: validation_fraction of the training split."
    )
    test_split: str | None = _field(
        DEFAULT_TEST_SPLIT,
        "Split to evaluate once, after training; it never selects anything. none: train without a test set.",
    )
    validation_fraction: float = _field(
        0.1,
        "Fraction of the training split to hold out for validation, above 0 and below 1; stratified. Only used without"
        " validation_split and folds.",
    )
    folds: int | None = _field(
        None,
        "Cross-validation: train once for each fold of the training split, in output_dir/fold_N, and validate on that"
        " fold; stratified, and without test split.",
    )
    fold: int | None = _field(None, "Train with this fold only, 0 to folds - 1. Only used with folds.")
    max_train_samples: int | None = _field(
        None, "Maximum number of training images, sampled with seed (of a stream the first ones). Default: all."
    )
    max_eval_samples: int | None = _field(
        None,
        "Maximum number of images of each evaluation split, sampled with seed (of a stream the first ones of each"
        " shard). Default: all.",
    )
    streaming: bool = _field(
        False, "Read the splits while training, for data larger than the disk. Needs validation_split."
    )
    stream_evaluation: bool = _field(
        True,
        "Read the evaluation splits in each evaluation; false: load them once, into the cache of datasets. Only used"
        " with streaming=true.",
    )
    shuffle_buffer_size: int = _field(
        10000, "Shuffle buffer size, in images per process. Only used with streaming=true."
    )
    crop_pct: float | None = _field(
        None,
        "Fraction of each resized side that evaluation's center crop keeps, above 0 and at most 1. Default: the"
        " pretrained model's.",
    )
    crop_mode: str = _field(
        "squash",
        f"Resize of the evaluation: {', '.join(CROP_MODES)}. squash: to an exact size, which every client of an export"
        " computes alike; center: the shorter side, which keeps the aspect ratio and cuts off the rest.",
    )
    interpolation: str | None = _field(
        None, f"Resize filter: {', '.join(INTERPOLATIONS)}. Default: the pretrained model's."
    )
    image_mean: list[float] | None = _field(
        None, "Mean of the red, green and blue channel, 0 to 1. Default: the pretrained model's."
    )
    image_std: list[float] | None = _field(
        None, "Standard deviation of the three channels, above 0 and at most 1. Default: the pretrained model's."
    )
    test_fraction: float | None = _field(
        None, "Fraction of local images without splits to hold out as test split; 0.1, or 0 without test_split."
    )
    class_names: list[str] | None = _field(
        None, "Class names in the order of integer labels, a text file with one name per line, or their number."
    )
    on_bad_image: str = _field(
        "error",
        f"On an image that cannot be decoded: {', '.join(BAD_IMAGES)}. skip: continue, and report number and names.",
    )
    allow_outside_paths: bool = _field(
        False, "Allow rows of tables to name images outside the folder of the table; only for tables that you trust."
    )

    def __post_init__(self):
        if not self.dataset_name:
            raise RecipeError("dataset_name: missing. Pass a Hub id, a local folder, or 'digits'.")
        if isinstance(self.label_column, list) and len(self.label_column) == 1:
            self.label_column = self.label_column[0]
        self._check_problem_type()
        fraction = self.validation_fraction
        _check(0.0 < fraction < 1.0, "validation_fraction", fraction, "above 0 and below 1")
        _check_positive("max_train_samples", self.max_train_samples)
        _check_positive("max_eval_samples", self.max_eval_samples)
        _check_positive("shuffle_buffer_size", self.shuffle_buffer_size)
        _check_fraction("test_fraction", self.test_fraction)
        _check_choice("on_bad_image", self.on_bad_image, BAD_IMAGES)
        self._check_roles()
        self._check_folds()
        if self.streaming:
            self._check_streaming()
        crop_pct = self.crop_pct
        _check(crop_pct is None or 0.0 < crop_pct <= 1.0, "crop_pct", crop_pct, "above 0 and at most 1")
        _check_choice("crop_mode", self.crop_mode, CROP_MODES)
        if self.interpolation is not None:
            _check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        for key in ("image_mean", "image_std"):
            value = getattr(self, key)
            _check(value is None or len(value) == 3, key, value, "three numbers, one per channel")
        mean = self.image_mean
        std = self.image_std
        # A common mistake is the scale from 0 to 255.
        _check(mean is None or all(0 <= number <= 1 for number in mean), "image_mean", mean, "numbers from 0 to 1")
        _check(std is None or all(0 < number <= 1 for number in std), "image_std", std, "above 0 and at most 1")

    @property
    def held_out_for_test(self) -> float:
        """Return the fraction of local images without splits to hold out for testing."""
        if self.test_fraction is not None:
            return self.test_fraction
        return DEFAULT_TEST_FRACTION if self.test_split else 0.0

    @property
    def label_columns(self) -> list[str]:
        """Return the names of the label columns, none if they are found by type."""
        if isinstance(self.label_column, list):
            return self.label_column
        return [self.label_column] if self.label_column else []

    def _check_problem_type(self) -> None:
        """Raise `RecipeError` for label options that conflict with `problem_type`."""
        if self.problem_type is not None:
            _check_choice("problem_type", self.problem_type, PROBLEM_TYPES)
        columns = self.label_columns
        _check(len(set(columns)) == len(columns), "label_column", columns, "different columns")
        if self.problem_type == SINGLE_LABEL:
            for key, given in (("label_separator", self.label_separator), ("label_column", len(columns) > 1)):
                if given:
                    raise RecipeError(
                        f"{key}: several labels per image are not available with problem_type={SINGLE_LABEL}. Omit one"
                        " of them."
                    )
        separator = self.label_separator
        _check(separator != "", "label_separator", separator, "the text between labels")
        if separator and len(columns) > 1:
            raise RecipeError(f"label_separator: requires one label column, got {len(columns)}. Omit it.")

    def _check_roles(self) -> None:
        """Raise `RecipeError` for a split in two roles, except for the default test split."""
        if self.validation_split and self.validation_split == self.train_split:
            raise RecipeError(
                f"validation_split: must differ from train_split, got '{self.validation_split}'. Omit it to hold out"
                " validation_fraction."
            )
        if self.test_split in (None, DEFAULT_TEST_SPLIT):
            return
        for role, name in (("training", self.train_split), ("validation", self.validation_split)):
            if self.test_split == name:
                raise RecipeError(
                    f"test_split: must differ from the {role} split, got '{name}'. Pass none to omit it."
                )

    def _check_folds(self) -> None:
        """Raise `RecipeError` for options that cross-validation does not support."""
        if self.folds is None:
            if self.fold is not None:
                raise RecipeError(f"fold: requires folds, got {self.fold}. Set folds, too, or omit fold.")
            return
        _check(self.folds >= 2, "folds", self.folds, "at least 2")
        _check(self.fold is None or 0 <= self.fold < self.folds, "fold", self.fold, f"from 0 to {self.folds - 1}")
        if self.validation_split:
            raise RecipeError(
                f"validation_split: not available with folds, got '{self.validation_split}'. Omit it, and pass"
                f" --train_split {self.train_split}+{self.validation_split} to use its images, too."
            )
        if self.streaming:
            raise RecipeError("streaming: not available with folds. Set streaming to false.")

    def _check_streaming(self) -> None:
        """Raise `RecipeError` for splits that do not work with streaming."""
        if not self.validation_split:
            raise RecipeError("streaming: requires validation_split, as no fraction can be held out of a stream.")
        if self.problem_type == MULTI_LABEL or self.label_separator or len(self.label_columns) > 1:
            raise RecipeError("streaming: not available with several labels per image. Set streaming to false.")
        if self.group_column:
            raise RecipeError("group_column: not available with streaming, which holds out no images. Omit it.")
        if self.on_bad_image == "skip":
            raise RecipeError("on_bad_image: must be error with streaming, got 'skip'.")
        for key in ("train_split", "validation_split", "test_split"):
            name = getattr(self, key) or ""
            if "[" in name or "+" in name:
                limit = "max_train_samples" if key == "train_split" else "max_eval_samples"
                raise RecipeError(
                    f"{key}: must be a complete split with streaming, got '{name}'. Limit its images with {limit}."
                )
        for key in ("validation_split", "test_split"):
            if getattr(self, key) == self.train_split:
                raise RecipeError(f"{key}: must differ from the streamed training split, got '{self.train_split}'.")


DEFAULT_CROP_SCALE = (0.8, 1.0)
DEFAULT_CROP_RATIO = (0.75, 4 / 3)


@dataclass
class AugmentationArguments:
    """Random changes of training images."""

    crop_scale: list[float] = field(
        default_factory=lambda: list(DEFAULT_CROP_SCALE),
        metadata={"help": "Smallest and largest fraction of the image's area that a random crop covers."},
    )
    crop_ratio: list[float] = field(
        default_factory=lambda: list(DEFAULT_CROP_RATIO),
        metadata={"help": "Smallest and largest aspect ratio (width / height) of a random crop."},
    )
    crop_padding: int = _field(
        0,
        "Padded random crop instead of crop_scale and crop_ratio: pad the image on each side with so many pixels, and"
        " crop it to the image size. 4 is common for images of 32 pixels. 0: off.",
    )
    crop_padding_mode: str = _field(
        "constant", f"Padding: {' (black) or '.join(PADDING_MODES)}. Only used with crop_padding."
    )
    horizontal_flip: float = _field(0.5, "Probability of a horizontal flip, 0 to 1.")
    vertical_flip: float = _field(
        0.0, "Probability of a vertical flip, 0 to 1, for images without an upper side, as from above or a microscope."
    )
    policy: str = _field(
        "basic", f"Auto-augmentation policy: {', '.join(POLICIES)}. basic: random crop and flip only."
    )
    rand_augment_magnitude: float = _field(
        9.0, "Magnitude of RandAugment, 0 to 10 (timm's scale). Only used with policy=rand_augment."
    )
    rand_augment_num_ops: int = _field(
        2, "Operations per image of RandAugment, each with probability 0.5. Only used with policy=rand_augment."
    )
    color_jitter: float = _field(
        0.0,
        "Color jitter: largest change of brightness, contrast and saturation, 0 to 1, such as 0.4. 0: off. Not with"
        " policy=three_augment, which has its own.",
    )
    mixup_alpha: float = _field(0.0, "Mixup: blend pairs of images with a weight from Beta(alpha, alpha). 0: off.")
    cutmix_alpha: float = _field(
        0.0, "CutMix: paste a box of one image into another, its area from Beta(alpha, alpha). 0: off."
    )
    random_erasing: float = _field(0.0, "Probability of random erasing (a box is replaced by noise), 0 to 1.")
    mix_off_epochs: float = _field(
        0, "Number of final epochs without mixup, CutMix and random erasing, fewer than those of the run."
    )
    repeated_augmentation: int = _field(
        1, "Repeated augmentation: augmented copies of each image in a batch; an epoch has fewer different images."
    )

    def __post_init__(self):
        for key in ("crop_scale", "crop_ratio"):
            value = getattr(self, key)
            ascends = len(value) == 2 and 0 < value[0] <= value[1] < float("inf")
            _check(ascends, key, value, "two positive numbers, the smaller one first")
        _check(self.crop_scale[1] <= 1.0, "crop_scale", self.crop_scale, "two fractions of the area, at most 1")
        _check(self.crop_padding >= 0, "crop_padding", self.crop_padding, "at least 0")
        _check_choice("crop_padding_mode", self.crop_padding_mode, PADDING_MODES)
        for key, default in (("crop_scale", DEFAULT_CROP_SCALE), ("crop_ratio", DEFAULT_CROP_RATIO)):
            value = getattr(self, key)
            if self.crop_padding and tuple(value) != default:
                raise RecipeError(
                    f"crop_padding: replaces the random resized crop, but {key} is set, got {value}. Omit {key} (on"
                    f" the command line: --{key} {default[0]} {default[1]}), or set crop_padding to 0."
                )
        _check_choice("policy", self.policy, POLICIES)
        magnitude = self.rand_augment_magnitude
        _check(0.0 <= magnitude <= 10.0, "rand_augment_magnitude", magnitude, "between 0 and 10")
        for key in ("horizontal_flip", "vertical_flip", "random_erasing", "color_jitter"):
            _check(0.0 <= getattr(self, key) <= 1.0, key, getattr(self, key), "between 0 and 1")
        if self.color_jitter and self.policy == "three_augment":
            raise RecipeError(
                f"color_jitter: must be 0 with policy=three_augment, which jitters colors by 0.3, got"
                f" {self.color_jitter}. Omit it, or change policy."
            )
        for key in ("mixup_alpha", "cutmix_alpha", "mix_off_epochs"):
            _check(0.0 <= getattr(self, key) < float("inf"), key, getattr(self, key), "a finite number, at least 0")
        for key in ("rand_augment_num_ops", "repeated_augmentation"):
            _check_positive(key, getattr(self, key))

    def check_against(self, training) -> None:
        """Raise `RecipeError` for options that the training arguments do not allow."""
        batch_size = training.per_device_train_batch_size
        if (self.mixup_alpha or self.cutmix_alpha) and batch_size % 2:
            raise RecipeError(
                f"mixup_alpha, cutmix_alpha: require an even number of images per device, got {batch_size}. Change"
                " global_batch_size or per_device_train_batch_size."
            )
        epochs = training.epochs
        if not epochs or epochs > self.mix_off_epochs:
            return
        advice = "Set it to 0 to keep mixup, CutMix and random erasing on."
        if training.max_steps > 0:  # a trial run
            logger.warning(
                "mix_off_epochs: %g, but max_steps are only %.3g epochs. %s", self.mix_off_epochs, epochs, advice
            )
            return
        raise RecipeError(
            f"mix_off_epochs: must be below the {epochs:g} epochs of the run (num_train_epochs), got"
            f" {self.mix_off_epochs:g}. {advice}"
        )


@dataclass
class RunArguments:
    """Training options that transformers' TrainingArguments does not have."""

    global_batch_size: int = _field(
        128,
        "Images per optimizer step over all processes; with per_device_train_batch_size it determines gradient"
        " accumulation.",
    )
    layer_decay: float = _field(
        1.0, "Layer-wise learning rate decay: factor from each layer to the one below, above 0 and at most 1. 1: off."
    )
    ema_decay: float | None = _field(
        None,
        "Decay of the exponential moving average (EMA) of the weights, which is evaluated and saved; reduced in short"
        " runs. At least 0 and below 1. Default: no EMA.",
    )
    swa_start: float | None = _field(
        None,
        "Stochastic weight averaging (SWA): fraction of the run, at least 0 and below 1, after which the weights of"
        " all steps are averaged with equal weight; the average is evaluated and saved. Default: no SWA.",
    )
    soup: str | None = _field(
        None,
        f"Average the weights of the kept checkpoints at the end: {', '.join(SOUPS)}. greedy: those that do not make"
        " the validation score worse; uniform: all. Used if it is at least as good. Default: no soup.",
    )
    channels_last: bool = _field(
        False,
        "Train and evaluate convolutions in the memory format channels_last (NHWC).",
    )
    early_stopping_patience: int | None = _field(
        None, "Stop after this many evaluations without a better metric_for_best_model. Default: off."
    )
    eval_tta: str | None = _field(
        None,
        f"Test-time augmentation of all evaluations: {', '.join(TTA)}. flip: mean of the logits of an image and its"
        " mirror image, in twice the time; probe_c is chosen without it. Default: none.",
    )
    nan_policy: str = _field(
        "stop",
        "On a NaN or infinite loss or gradient: stop (end the run) or rewind (continue from the last checkpoint).",
    )
    nan_lr_factor: float = _field(
        0.5,
        "Factor of the learning rate after each rewind, above 0 and at most 1. Only used with nan_policy=rewind.",
    )
    nan_max_rewinds: int = _field(3, "Rewinds before the run stops. Only used with nan_policy=rewind.")
    seeds: list[int] | None = _field(
        None,
        "Train once for each seed, in output_dir/seed_N, and report mean and standard deviation: seeds"
        " such as 0 1 2, or their number (3 for 0 1 2), instead of seed.",
    )
    overwrite_output_dir: bool = _field(
        False, "Delete the run in output_dir and start a new one; other files are kept."
    )
    allow_changed_data: bool = _field(
        False, "Resume although the data set changed, so that validation images may have been trained on."
    )
    keep_checkpoints: bool = _field(False, "Keep checkpoint-* (with optimizer state) after the run is finished.")
    save_predictions: bool = _field(
        False, "Write the probabilities of all validation and test images to predictions.parquet."
    )
    plots: bool = _field(True, "Draw figures of the run to output_dir/plots. `hfvit report` draws them later.")
    quiet: bool = _field(False, "Print warnings and errors only.")
    verbose: bool = _field(False, "Also print messages, warnings and progress bars of libraries.")
    json_log: str | None = _field(
        None, "File to append progress, evaluations, warnings and results to, one JSON object per line."
    )
    expected_accuracy: list[float] | None = _field(
        None, "Lowest and highest test accuracy in percent for hfvit verify; does not affect training."
    )
    expected_accuracy_measured: bool = _field(
        True,
        "Whether expected_accuracy was measured; if false, hfvit verify does not fail below it.",
    )

    @property
    def seed_list(self) -> list[int]:
        """Return the seeds to train with, none for a single run."""
        seeds = self.seeds or []
        return list(range(seeds[0])) if len(seeds) == 1 else seeds

    def check(self) -> None:
        """Raise `RecipeError` for a value out of range."""
        for key in ("global_batch_size", "early_stopping_patience", "nan_max_rewinds"):
            _check_positive(key, getattr(self, key))
        for key in ("layer_decay", "nan_lr_factor"):
            _check(0.0 < getattr(self, key) <= 1.0, key, getattr(self, key), "above 0 and at most 1")
        _check_fraction("ema_decay", self.ema_decay)
        _check_choice("nan_policy", self.nan_policy, NAN_POLICIES)
        _check_fraction("swa_start", self.swa_start)
        if self.soup is not None:
            _check_choice("soup", self.soup, SOUPS)
        if self.eval_tta is not None:
            _check_choice("eval_tta", self.eval_tta, TTA)
        _check(not (self.quiet and self.verbose), "quiet", True, "false with verbose")
        seeds = self.seeds
        if seeds and len(seeds) == 1:
            _check(seeds[0] >= 2, "seeds", seeds[0], "at least 2, or several seeds")
        elif seeds is not None:
            allowed = "different integers from 0 to 4,294,967,295, or their number"
            _check(len(set(seeds)) == len(seeds) > 0 and all(0 <= n < 2**32 for n in seeds), "seeds", seeds, allowed)
        expected = self.expected_accuracy
        is_range = expected is None or (len(expected) == 2 and 0.0 <= expected[0] <= expected[1] <= 100.0)
        _check(is_range, "expected_accuracy", expected, "two percentages from 0 to 100, the lower first")


@dataclass
class TrainerArguments:
    """Common options of transformers' TrainingArguments, with hfvit's defaults."""

    output_dir: str | None = _field(None, "Folder for the model, reports and checkpoints; created, one per run.")
    num_train_epochs: float = _field(3.0, "Number of passes over the training images, fractions allowed.")
    max_steps: int = _field(-1, "Number of optimizer steps, instead of num_train_epochs. -1: off.")
    learning_rate: float = _field(5e-5, "Peak learning rate, reached after warmup.")
    lr_scheduler_type: str = _field(
        "cosine", "Learning rate schedule: cosine, linear, constant_with_warmup, warmup_stable_decay, polynomial, ..."
    )
    warmup_steps: float = _field(0.05, "Warmup, in optimizer steps; below 1 a fraction of the run.")
    weight_decay: float = _field(0.0, "Weight decay of weight matrices; biases and norms have none.")
    label_smoothing_factor: float = _field(0.0, "Label smoothing, at least 0 and below 1.")
    max_grad_norm: float = _field(1.0, "Clip gradients to this norm. 0: off.")
    optim: str = _field(
        "adamw_torch_fused", "Optimizer: adamw_torch_fused, sgd, adafactor, ...; timm/NAME for one of timm."
    )
    seed: int = _field(42, "Seed of initialization, order, augmentation and held-out images, 0 to 4,294,967,295.")
    per_device_train_batch_size: int | None = _field(
        None,
        "Images per device in one forward pass; the rest of global_batch_size is accumulated. Default: all of it.",
    )
    per_device_eval_batch_size: int = _field(64, "Images per device in evaluation.")
    eval_strategy: str = _field("epoch", "When to evaluate on the validation split: epoch, steps or no.")
    eval_steps: float | None = _field(
        None,
        "Optimizer steps between evaluations; below 1 a fraction of the run. Only used with eval_strategy=steps."
        " Default: logging_steps.",
    )
    metric_for_best_model: str | None = _field(
        "accuracy",
        f"Validation metric that selects the best checkpoint: {', '.join((*SCALAR_METRICS, *RANKING_METRICS))}. With"
        f" several labels per image: {', '.join(MULTI_LABEL_METRICS)} (map instead of accuracy).",
    )
    load_best_model_at_end: bool = _field(True, "End with the weights of the best checkpoint, not the last one.")
    logging_steps: float = _field(500, "Optimizer steps between logged losses; below 1 a fraction of the run.")
    report_to: str | None = _field("none", "Experiment tracker: none, tensorboard, wandb, trackio, ...")
    save_strategy: str | None = _field(
        None, "When to save a checkpoint: epoch, steps, best or no. Default: with every evaluation."
    )
    save_steps: float = _field(
        500, "Optimizer steps between checkpoints; below 1 a fraction of the run. Only used with save_strategy=steps."
    )
    save_total_limit: int | None = _field(2, "Checkpoints to keep, the best one included. none: all.")
    resume_from_checkpoint: str | None = _field(
        None, "Checkpoint to resume from: 'auto' for the newest complete one in output_dir, or a folder."
    )
    bf16: bool = _field(False, "Train in bfloat16 mixed precision: GPUs from Ampere on, CPUs with AVX-512 or AMX.")
    fp16: bool = _field(False, "Train in float16 mixed precision. Needs a GPU; prefer bf16 where it is supported.")
    torch_compile: bool = _field(False, "Compile the model with torch.compile.")
    activation_checkpointing: bool | None = _field(
        None,
        "Recompute activations in the backward pass: less memory, slower steps. Default: off.",
        nargs="?",
        const=True,
    )
    use_cpu: bool = _field(False, "Train on the CPU even if there is a GPU.")
    dataloader_num_workers: int | None = _field(
        None, "Processes per device that read images. Default: chosen from the images and the cores."
    )
    full_determinism: bool = _field(False, "Use deterministic algorithms only; slower on GPUs.")
    push_to_hub: bool = _field(
        False, "Push the finished run to hub_model_id, as `hfvit push` does. Needs hub_model_id."
    )
    hub_model_id: str | None = _field(None, "Repository on the Hub to push to: user/name.")
    hub_private_repo: bool | None = _field(
        None, "Create the repository as private. Default: the setting of its owner."
    )
    hub_revision: str | None = _field(None, "Branch to push to. Default: main.")


METHODS = ("full", "lora", "linear_probe")
MULTI_LABEL_LOSSES = ("bce", "asymmetric")
BALANCES = ("none", "sample", "weight")
FEATURE = "feature"
DISTILLATIONS = ("soft", "hard", FEATURE)


@dataclass
class FinetuningArguments:
    """Fine-tuning method, class imbalance and distillation."""

    finetuning: str = _field(
        "full",
        f"Fine-tuning method: {', '.join(METHODS)}. full: all weights except frozen ones; lora: low-rank adapters and"
        " the head (needs peft); linear_probe: logistic regression on features of the frozen backbone.",
    )
    lora_rank: int = _field(8, "Rank of the LoRA matrices. Only used with finetuning=lora.")
    lora_alpha: float | None = _field(None, "LoRA scales its update by alpha / rank. Default: twice the rank.")
    lora_dropout: float = _field(0.0, "Dropout before the LoRA matrices, at least 0 and below 1.")
    lora_targets: list[str] | None = _field(
        None,
        "Layers with LoRA, by the last part of their names, such as qkv proj fc1 fc2. Default: all"
        " attention projections.",
    )
    probe_c: list[float] = field(
        default_factory=lambda: [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0],
        metadata={
            "help": "Inverse L2 penalties to try for the linear probe; the validation split selects one. Only used"
            " with finetuning=linear_probe."
        },
    )
    probe_passes: int = _field(
        0, "Augmented copies of each training image for the linear probe. 0: each image once, not augmented."
    )
    head_from_text: str | None = _field(
        None,
        "CLIP or SigLIP checkpoint with the image tower of model_name_or_path: initialize the head with text"
        " embeddings of the class names.",
    )
    head_templates: list[str] = field(
        default_factory=lambda: ["a photo of a {}."],
        metadata={"help": "Prompts for head_from_text, with {} for the class name; their embeddings are averaged."},
    )
    class_balance: str = _field(
        "none",
        f"For class imbalance: {', '.join(BALANCES)}. sample: sample all classes equally often; weight: weight the"
        " loss by inverse class frequency.",
    )
    multi_label_loss: str = _field(
        "bce",
        f"Loss of multi-label training: {', '.join(MULTI_LABEL_LOSSES)}. bce: binary cross-entropy; asymmetric:"
        " lower weight of easy negatives (arXiv 2009.14119).",
    )
    teacher: str | None = _field(
        None,
        "Checkpoint of a timm model to distill from: a folder or a Hub id; with the same classes, unless"
        " distillation=feature.",
    )
    distillation: str = _field(
        "soft",
        f"Target of distillation: {', '.join(DISTILLATIONS)}. soft: the teacher's probabilities; hard: its predicted"
        " class; feature: its pooled features, by a linear projection of the student's. Only used with teacher.",
    )
    distillation_alpha: float = _field(0.5, "Weight of the distillation loss, 0 to 1; cross-entropy has 1 - alpha.")
    distillation_temperature: float = _field(2.0, "Temperature of both logits with distillation=soft.")
    progressive_image_size: list[int] | None = _field(
        None,
        "Progressive resizing: ascending image sizes in pixels to train with before image_size, such as 96"
        " 160, each for an equal part of the steps.",
    )
    train_image_size: int | None = _field(
        None,
        "Image size in pixels of training, or of its last part, if smaller than image_size, which evaluation and the"
        " saved model use (FixRes).",
    )

    def __post_init__(self):
        choices = {
            "finetuning": METHODS,
            "class_balance": BALANCES,
            "distillation": DISTILLATIONS,
            "multi_label_loss": MULTI_LABEL_LOSSES,
        }
        for key, allowed in choices.items():
            _check_choice(key, getattr(self, key), allowed)
        for key in ("lora_rank", "lora_alpha", "distillation_temperature"):
            _check_positive(key, getattr(self, key))
        _check_fraction("lora_dropout", self.lora_dropout)
        alpha = self.distillation_alpha
        _check(0.0 <= alpha <= 1.0, "distillation_alpha", alpha, "between 0 and 1")
        positive = bool(self.probe_c) and all(0 < number < float("inf") for number in self.probe_c)
        _check(positive, "probe_c", self.probe_c, "one or more positive, finite numbers")
        valid = bool(self.head_templates) and all(text.count("{}") == 1 for text in self.head_templates)
        _check(valid, "head_templates", self.head_templates, "prompts, each with one {}")
        sizes = self.progressive_image_size
        ascend = sizes is None or (bool(sizes) and sizes == sorted(set(sizes)) and sizes[0] > 0)
        _check(ascend, "progressive_image_size", sizes, "ascending sizes in pixels, such as [96, 160]")
        _check_positive("train_image_size", self.train_image_size)
        if sizes and self.train_image_size:
            above = self.train_image_size > sizes[-1]
            _check(above, "train_image_size", self.train_image_size, f"above {sizes[-1]}, the last progressive size")
        _check(self.probe_passes >= 0, "probe_passes", self.probe_passes, "at least 0")

    def check_against(self, model, data, augmentation, training) -> None:
        """Raise `RecipeError` for conflicts with other sections of the recipe.

        Args:
            model: `ModelArguments`.
            data: `DataArguments`.
            augmentation: `AugmentationArguments`.
            training: `HFViTTrainingArguments`.
        """
        if self.finetuning != "full":
            self._reject(bool(model.freeze), "freeze", "The method freezes the backbone itself. Omit freeze")
            self._reject(bool(model.text_encoder), "text_encoder", "Use finetuning=full")
            self._reject(bool(model.patch_sizes), "patch_sizes", "Use finetuning=full")
            # The mean of low-rank factors is not the factors of the mean.
            self._reject(training.soup is not None, "soup", "It averages all weights of checkpoints. Omit soup")
            is_untrained = not model.model_name_or_path
            self._reject(is_untrained, "architecture", "Set model_name_or_path to a pretrained model instead")
        if self.finetuning == "linear_probe":
            for key in ("mixup_alpha", "cutmix_alpha", "random_erasing"):
                self._reject(bool(getattr(augmentation, key)), key, "Set it to 0")
            self._reject(data.streaming, "streaming", "The probe needs all images at once. Set it to false")
            self._reject(bool(self.teacher), "teacher", "Omit teacher")
            self._reject(self.class_balance == "sample", "class_balance", "Use weight")
            self._reject(training.ema_decay is not None, "ema_decay", "There are no optimizer steps. Omit ema_decay")
            self._reject(training.swa_start is not None, "swa_start", "There are no optimizer steps. Omit swa_start")
            self._reject(bool(self.head_from_text), "head_from_text", "The probe fits the head. Omit head_from_text")
        if self.head_from_text and (model.text_encoder or not model.model_name_or_path):
            raise RecipeError(
                "head_from_text: requires model_name_or_path, the image tower of that checkpoint, and no text_encoder."
            )
        others = {"text_encoder": model.text_encoder, "patch_sizes": model.patch_sizes}
        others["finetuning=linear_probe"] = self.finetuning == "linear_probe"
        for key in ("progressive_image_size", "train_image_size"):
            for other in (other for other, is_set in others.items() if is_set and getattr(self, key)):
                raise RecipeError(f"{key}: not available with {other}. Omit one of them.")
        if self.teacher and model.text_encoder:
            raise RecipeError("teacher: not available with text_encoder. Omit one of them.")
        if self.class_balance != "none" and data.streaming:
            raise RecipeError(f"class_balance: must be none with streaming, got '{self.class_balance}'.")

    def check_problem(self, problem_type: str) -> None:
        """Raise `RecipeError` for options that multi-label data do not support."""
        if problem_type != MULTI_LABEL:
            return
        if self.class_balance == "sample":
            raise RecipeError(
                "class_balance: must be none or weight with several labels per image, got 'sample'. Such an image has"
                " no single class to sample it by."
            )
        if self.head_from_text:
            raise RecipeError("head_from_text: not available with several labels per image. Omit it.")

    def _reject(self, condition: bool, key: str, remedy: str) -> None:
        if condition:
            raise RecipeError(f"{key}: not available with finetuning={self.finetuning}. {remedy}.")


DROP_RATES = ("drop_rate", "attn_drop_rate", "drop_path_rate", "patch_drop_rate")
FUSIONS = ("cross_attention", "concatenation")


@dataclass
class TextArguments:
    """Text encoder of image-text models; needs text_column."""

    text_encoder: str | None = _field(
        None, "Text encoder of transformers, with its tokenizer, for text_column: a folder or a Hub id."
    )
    text_encoder_revision: str | None = _field(None, "Branch, tag or commit of text_encoder on the Hub.")
    fusion: str = _field(
        "cross_attention", f"How image and text are combined: {', '.join(FUSIONS)}. Only used with text_encoder."
    )
    fusion_layers: int = _field(2, "Number of cross-attention blocks. Only used with fusion=cross_attention.")
    max_text_length: int = _field(64, "Tokens that a text is truncated to. Only used with text_encoder.")

    def check_texts(self, data: DataArguments, augmentation: AugmentationArguments) -> None:
        """Raise `RecipeError` for options that image-text models do not support, or lack."""
        if (self.text_encoder is None) != (data.text_column is None):
            if data.text_column:
                raise RecipeError("text_column: requires text_encoder. Set both, or neither.")
            raise RecipeError("text_encoder: requires text_column. Set both, or neither.")
        if self.text_encoder is None:
            return
        _check_choice("fusion", self.fusion, FUSIONS)
        _check_positive("fusion_layers", self.fusion_layers)
        _check_positive("max_text_length", self.max_text_length)
        if data.streaming:
            raise RecipeError("streaming: not available with text_encoder. Set streaming to false.")
        for key in ("mixup_alpha", "cutmix_alpha"):
            if getattr(augmentation, key):
                raise RecipeError(f"{key}: must be 0 with text_encoder, got {getattr(augmentation, key)}.")


@dataclass
class ModelArguments(TextArguments):
    """Network, image size and frozen layers."""

    model_name_or_path: str | None = _field(
        None, "Pretrained timm model to fine-tune: a Hub id (timm/vit_base_patch16_224.augreg_in21k) or a folder."
    )
    architecture: str | None = _field(
        None, "timm model name (vit_tiny_patch16_224) to train from scratch, instead of model_name_or_path."
    )
    model_args: dict | str | None = _field(
        None, "Further arguments of timm.create_model: a mapping, on the command line JSON ('{\"depth\": 8}')."
    )
    model_revision: str | None = _field(None, "Branch, tag or commit of model_name_or_path on the Hub.")
    image_size: int | None = _field(
        None, "Height and width of the model's input, in pixels. Default: the pretrained model's."
    )
    patch_sizes: list[int] | None = _field(
        None, "FlexiViT: patch sizes in pixels, sampled in each optimizer step; the saved model keeps its own."
    )
    drop_rate: float | None = _field(
        None, "Dropout before the classifier, at least 0 and below 1 (proj_drop_rate in model_args: in the blocks)."
    )
    attn_drop_rate: float | None = _field(None, "Dropout of attention weights, at least 0 and below 1.")
    drop_path_rate: float | None = _field(
        None, "Stochastic depth of the last block, at least 0 and below 1; linearly less for earlier blocks."
    )
    patch_drop_rate: float | None = _field(
        None, "Fraction of the patches that a training step leaves out, at least 0 and below 1; off in evaluation."
    )
    freeze: str | None = _field(
        None, "Part to freeze: 'backbone' (all but the head), or N (stem and first N blocks). Default: nothing."
    )

    def __post_init__(self):
        if (self.model_name_or_path is None) == (self.architecture is None):
            raise RecipeError(
                "model_name_or_path, architecture: exactly one is required. Pass a pretrained model to fine-tune, or a"
                " model name to train from scratch."
            )
        if isinstance(self.model_args, str):
            try:
                self.model_args = json.loads(self.model_args)
            except json.JSONDecodeError as error:
                raise RecipeError(f"model_args: not valid JSON ({error}). Write it like '{{\"depth\": 8}}'.") from None
        _check(
            self.model_args is None or isinstance(self.model_args, dict),
            "model_args",
            self.model_args,
            "a mapping such as {depth: 8}",
        )
        if "num_classes" in (self.model_args or {}):
            raise RecipeError("model_args: must not have num_classes. The classes are those of the data set.")
        if "img_size" in (self.model_args or {}):
            raise RecipeError("model_args: must not have img_size. Set image_size, which preprocessing also uses.")
        check_network(self.architecture, self.model_args)
        _check_positive("image_size", self.image_size)
        sizes = self.patch_sizes
        several = sizes is None or len(set(sizes)) > 1
        _check(several, "patch_sizes", sizes, "two or more sizes in pixels, such as [8, 16, 32]")
        for key in DROP_RATES:
            _check_fraction(key, getattr(self, key))
        if self.freeze in ("none", "no", ""):
            self.freeze = None
        valid = self.freeze in (None, "backbone") or (str(self.freeze).isdecimal() and int(self.freeze) > 0)
        _check(valid, "freeze", self.freeze, "'backbone', a number of blocks, or none")

    @property
    def timm_kwargs(self) -> dict[str, Any]:
        """Return the arguments of timm.create_model: `model_args` and drop rates."""
        rates = {key: getattr(self, key) for key in DROP_RATES if getattr(self, key) is not None}
        return {**(self.model_args or {}), **rates}
