"""Recipe arguments for data, augmentation, model, fine-tuning and run; imports no torch."""

import json
from dataclasses import dataclass, field
from typing import Any

from hfvit.errors import RecipeError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
NAN_POLICIES = ("stop", "rewind")
BAD_IMAGES = ("error", "skip")
POLICIES = ("basic", "trivial_augment", "rand_augment", "three_augment")

# Used where there is one: it is no error when the data set has none.
DEFAULT_TEST_SPLIT = "test"
DEFAULT_TEST_FRACTION = 0.1

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
    test_split: str | None = _field(
        DEFAULT_TEST_SPLIT, "Split evaluated once, at the end; never used to select anything."
    )
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
    test_fraction: float | None = _field(
        None, "Fraction of local images without splits to hold out as test split; 0.1, or 0 without test_split."
    )
    class_names: list[str] | None = field(
        default=None,
        metadata={"help": "Class names in the order of integer labels, or a text file with one name a line."},
    )
    on_bad_image: str = _field(
        "error",
        f"What an image that cannot be decoded does, one of {', '.join(BAD_IMAGES)}: skip counts and names it.",
    )
    allow_outside_paths: bool = _field(
        False, "Allow rows of tables to name images outside the folder of the table; only for tables that you trust."
    )

    def __post_init__(self):
        if not self.dataset_name:
            raise RecipeError("dataset_name: missing; give a Hub id, a local folder, or 'digits'.")
        _check(0.0 < self.validation_fraction < 1.0, "validation_fraction", self.validation_fraction, "0 < f < 1")
        _check_positive("max_train_samples", self.max_train_samples)
        _check_positive("max_eval_samples", self.max_eval_samples)
        _check_positive("shuffle_buffer_size", self.shuffle_buffer_size)
        _check_fraction("test_fraction", self.test_fraction)
        _check(self.on_bad_image in BAD_IMAGES, "on_bad_image", self.on_bad_image, f"one of {', '.join(BAD_IMAGES)}")
        self._check_roles()
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

    @property
    def held_out_for_test(self) -> float:
        """Fraction of local images without splits that is held out for a test."""
        if self.test_fraction is not None:
            return self.test_fraction
        return DEFAULT_TEST_FRACTION if self.test_split else 0.0

    def _check_roles(self) -> None:
        """Refuse one split in two roles; the default test split gives way (`data.splits`)."""
        if self.validation_split and self.validation_split == self.train_split:
            raise RecipeError(
                f"validation_split: '{self.validation_split}' is the training split. Name another, or leave it out to"
                " hold images out."
            )
        if self.test_split in (None, DEFAULT_TEST_SPLIT):
            return
        for role, name in (("training", self.train_split), ("validation", self.validation_split)):
            if self.test_split == name:
                raise RecipeError(f"test_split: '{name}' is the {role} split. Name another, or none.")

    def _check_streaming(self) -> None:
        """What a stream rules out and the recipe alone tells."""
        if not self.validation_split:
            raise RecipeError(
                "streaming: a fraction cannot be held out of a stream; name the validation_split that selects."
            )
        if self.on_bad_image == "skip":
            raise RecipeError("on_bad_image: a stream cannot skip images. Set it to error, or streaming to false.")
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


@dataclass
class RunArguments:
    """Run: what hfvit adds to transformers' TrainingArguments."""

    global_batch_size: int = _field(
        128, "Images per optimizer step over all processes; accumulation is derived from it."
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
    allow_changed_data: bool = _field(
        False, "Resume although the data set changed and validation images may have been trained on."
    )
    keep_checkpoints: bool = _field(False, "Keep checkpoint-* (optimizer state included) after a finished run.")
    expected_accuracy: list[float] | None = field(
        default=None,
        metadata={"help": "Lowest and highest test accuracy in percent that hfvit verify expects; trains nothing."},
    )
    expected_accuracy_measured: bool = _field(
        True,
        "Whether a run stands behind expected_accuracy; below a guess hfvit verify does not fail.",
    )

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
        expected = self.expected_accuracy
        is_range = expected is None or (len(expected) == 2 and 0.0 <= expected[0] <= expected[1] <= 100.0)
        _check(is_range, "expected_accuracy", expected, "two percentages from 0 to 100, the lower first")
        for key in ("seed", "data_seed"):
            value = getattr(self, key)
            _check(value is None or 0 <= value < 2**32, key, value, "a whole number from 0 to 4,294,967,295")
        _check(self.nan_policy in NAN_POLICIES, "nan_policy", self.nan_policy, f"one of {', '.join(NAN_POLICIES)}")
        _check(0.0 < self.nan_lr_factor <= 1.0, "nan_lr_factor", self.nan_lr_factor, "0 < factor <= 1")
        _check_positive("nan_max_rewinds", self.nan_max_rewinds)
        metric = self.metric_for_best_model
        known = metric is None or metric.removeprefix("eval_") in SCALAR_METRICS
        _check(known, "metric_for_best_model", metric, f"one of {', '.join(SCALAR_METRICS)}")


METHODS = ("full", "lora", "linear_probe")
BALANCES = ("none", "sample", "weight")
DISTILLATIONS = ("soft", "hard")


@dataclass
class FinetuningArguments:
    """Fine-tuning: which weights learn, and from what."""

    finetuning: str = _field(
        "full",
        f"One of {', '.join(METHODS)}: all weights that `freeze` leaves, low-rank adapters and the head (needs peft),"
        " or a classifier that is solved on features extracted once.",
    )
    lora_rank: int = _field(8, "Rank of LoRA's matrices.")
    lora_alpha: float | None = _field(None, "LoRA's update is scaled by alpha / rank; twice the rank when not given.")
    lora_dropout: float = _field(0.0, "Dropout before LoRA's matrices.")
    lora_targets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers with a LoRA, by the last part of their name (qkv proj fc1 fc2); those of every attention"
            " when not given."
        },
    )
    probe_c: list[float] = field(
        default_factory=lambda: [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0],
        metadata={"help": "Inverse strengths of the probe's L2 penalty; the best on the validation split is taken."},
    )
    probe_passes: int = _field(
        0, "Augmented copies of each training image for the probe; 0 takes each image once, as evaluation sees it."
    )
    head_from_text: str | None = _field(
        None,
        "CLIP or SigLIP checkpoint whose image tower model_name_or_path is: the head starts from the classes' names.",
    )
    head_templates: list[str] = field(
        default_factory=lambda: ["a photo of a {}."],
        metadata={"help": "Sentences for head_from_text, with {} in the place of a class's name; averaged."},
    )
    class_balance: str = _field(
        "none",
        f"For classes of unequal size, one of {', '.join(BALANCES)}: draw every class as often, or weight the loss by"
        " the inverse of a class's share.",
    )
    teacher: str | None = _field(None, "Checkpoint of a larger model of the same classes to distil from.")
    distillation: str = _field(
        "soft", f"What the teacher says, one of {', '.join(DISTILLATIONS)}: its probabilities, or its decision."
    )
    distillation_alpha: float = _field(0.5, "Share of the teacher in the loss; the labels have the rest.")
    distillation_temperature: float = _field(2.0, "Softens both probabilities of soft distillation; 1 is as they are.")
    progressive_image_size: list[int] | None = field(
        default=None,
        metadata={
            "help": "Image sizes in pixels, ascending, that training begins with: an equal part of the steps each, and"
            " the last part at image_size."
        },
    )

    def __post_init__(self):
        for key, allowed in (("finetuning", METHODS), ("class_balance", BALANCES), ("distillation", DISTILLATIONS)):
            _check(getattr(self, key) in allowed, key, getattr(self, key), f"one of {', '.join(allowed)}")
        for key in ("lora_rank", "lora_alpha", "distillation_temperature"):
            _check_positive(key, getattr(self, key))
        _check_fraction("lora_dropout", self.lora_dropout)
        _check(0.0 <= self.distillation_alpha <= 1.0, "distillation_alpha", self.distillation_alpha, "0 to 1")
        _check(bool(self.probe_c) and min(self.probe_c) > 0, "probe_c", self.probe_c, "numbers above 0")
        whole = bool(self.head_templates) and all(text.count("{}") == 1 for text in self.head_templates)
        _check(whole, "head_templates", self.head_templates, "sentences with {} once in each")
        sizes = self.progressive_image_size
        ascend = sizes is None or (bool(sizes) and sizes == sorted(set(sizes)) and sizes[0] > 0)
        _check(ascend, "progressive_image_size", sizes, "ascending sizes, such as [96, 160]")
        _check(self.probe_passes >= 0, "probe_passes", self.probe_passes, "0 or more")

    def check_against(self, model, data, augmentation, training) -> None:
        """Raise `RecipeError` for what the recipe's other sections rule out."""
        if self.finetuning != "full":
            self._refuse(bool(model.freeze), "freeze", "which says itself what does not train; leave freeze out")
            self._refuse(bool(model.text_encoder), "text_encoder", "which is for images alone")
            self._refuse(bool(model.patch_sizes), "patch_sizes", "which has one patch size")
            self._refuse(not model.model_name_or_path, "architecture", "which leaves pretrained weights as they are")
        if self.finetuning == "linear_probe":
            mixes = bool(augmentation.mixup_alpha or augmentation.cutmix_alpha or augmentation.random_erasing)
            self._refuse(mixes, "mixup_alpha, cutmix_alpha, random_erasing", "which is solved on whole images")
            self._refuse(data.streaming, "streaming", "which needs every image at once")
            self._refuse(bool(self.teacher), "teacher", "which is solved on the labels")
            self._refuse(self.class_balance == "sample", "class_balance", "which draws nothing; use weight")
            self._refuse(training.ema_decay is not None, "ema_decay", "which takes no steps")
            self._refuse(bool(self.head_from_text), "head_from_text", "which solves for the head")
        if self.head_from_text and (model.text_encoder or not model.model_name_or_path):
            raise RecipeError(
                "head_from_text: it needs model_name_or_path, the image tower of that pair, and no text_encoder."
            )
        if self.progressive_image_size:
            others = {"text_encoder": model.text_encoder, "patch_sizes": model.patch_sizes}
            others["finetuning: linear_probe"] = self.finetuning == "linear_probe"
            for other in (key for key, given in others.items() if given):
                raise RecipeError(f"progressive_image_size: not with {other}; leave one of them out.")
        if self.teacher and model.text_encoder:
            raise RecipeError("teacher: a teacher sees images alone; not with text_encoder.")
        if self.class_balance != "none" and data.streaming:
            raise RecipeError(f"class_balance: {self.class_balance} needs the labels of every image; not of a stream.")

    def _refuse(self, condition: bool, key: str, why: str) -> None:
        if condition:
            raise RecipeError(f"{key}: not with finetuning: {self.finetuning}, {why}.")


FUSIONS = ("cross_attention", "concatenation")


@dataclass
class TextArguments:
    """What joins a text encoder to the image model; needs text_column."""

    text_encoder: str | None = _field(
        None, "Text encoder of transformers, with its tokenizer, that reads text_column: a folder or a Hub id."
    )
    text_encoder_revision: str | None = _field(None, "Branch, tag or commit of text_encoder on the Hub.")
    fusion: str = _field("cross_attention", f"How image and text are joined, one of {', '.join(FUSIONS)}.")
    fusion_layers: int = _field(2, "Blocks of cross_attention.")
    max_text_length: int = _field(64, "Tokens of a text that are read; longer texts are cut.")

    def check_texts(self, data: DataArguments, augmentation: AugmentationArguments) -> None:
        """Raise `RecipeError` for what a model that reads texts rules out, or lacks."""
        if (self.text_encoder is None) != (data.text_column is None):
            given, lacks = ("text_encoder", "text_column") if self.text_encoder else ("text_column", "text_encoder")
            raise RecipeError(f"{given}: given without {lacks}; a model that reads texts needs both.")
        if self.text_encoder is None:
            return
        _check(self.fusion in FUSIONS, "fusion", self.fusion, f"one of {', '.join(FUSIONS)}")
        _check_positive("fusion_layers", self.fusion_layers)
        _check_positive("max_text_length", self.max_text_length)
        if data.streaming:
            raise RecipeError("streaming: texts are read from a whole data set only; set streaming to false.")
        for key in ("mixup_alpha", "cutmix_alpha"):
            if getattr(augmentation, key):
                raise RecipeError(f"{key}: a mixture of two images has no text of its own; set it to 0.")


@dataclass
class ModelArguments(TextArguments):
    """Model: which network, at which image size, with which parts trained, and with which reader of texts."""

    model_name_or_path: str | None = _field(
        None, "Pretrained timm checkpoint: a Hub id (timm/vit_base_patch16_224.augreg_in21k) or a local folder."
    )
    architecture: str | None = _field(
        None, "timm model name (vit_tiny_patch16_224) trained from scratch; instead of model_name_or_path."
    )
    model_args: dict | str | None = _field(
        None, "Further keyword arguments of timm.create_model, as a mapping (JSON on the command line)."
    )
    model_revision: str | None = _field(None, "Branch, tag or commit of model_name_or_path on the Hub.")
    image_size: int | None = _field(
        None, "Height and width in pixels that the model sees; position embeddings are resampled to it."
    )
    patch_sizes: list[int] | None = field(
        default=None,
        metadata={
            "help": "Patch sizes in pixels to train at, one drawn for each optimizer step; what is saved has the"
            " model's own."
        },
    )
    drop_rate: float | None = _field(
        None, "Dropout before the classifier; proj_drop_rate in model_args is that of the blocks."
    )
    attn_drop_rate: float | None = _field(None, "Dropout of attention weights.")
    drop_path_rate: float | None = _field(None, "Stochastic depth at the last block, falling to 0 at the first.")
    freeze: str | None = _field(
        None, "Part that does not train: 'backbone' (linear probe), or N for the stem and the first N blocks."
    )

    def __post_init__(self):
        if (self.model_name_or_path is None) == (self.architecture is None):
            raise RecipeError(
                "model_name_or_path, architecture: give exactly one (a checkpoint to start from, or a model to train)."
            )
        if isinstance(self.model_args, str):
            try:
                self.model_args = json.loads(self.model_args)
            except json.JSONDecodeError as error:
                raise RecipeError(f"model_args: not valid JSON ({error}); write it like '{{\"depth\": 8}}'.") from None
        _check(
            self.model_args is None or isinstance(self.model_args, dict),
            "model_args",
            self.model_args,
            "a mapping such as {depth: 8}",
        )
        if "img_size" in (self.model_args or {}):
            raise RecipeError(
                "model_args: give the size as image_size, which preprocessing follows too, not img_size."
            )
        _check_positive("image_size", self.image_size)
        sizes = self.patch_sizes
        _check(sizes is None or len(set(sizes)) > 1, "patch_sizes", sizes, "two or more sizes, such as [8, 16, 32]")
        for key in ("drop_rate", "attn_drop_rate", "drop_path_rate"):
            _check_fraction(key, getattr(self, key))
        if self.freeze in ("none", "no", ""):
            self.freeze = None
        valid = self.freeze in (None, "backbone") or (str(self.freeze).isdigit() and int(self.freeze) > 0)
        _check(valid, "freeze", self.freeze, "nothing, 'backbone', or the number of blocks to freeze")

    @property
    def timm_kwargs(self) -> dict[str, Any]:
        """What timm.create_model gets: `model_args` plus the drop rates that were given."""
        rates = ("drop_rate", "attn_drop_rate", "drop_path_rate")
        given = {key: getattr(self, key) for key in rates if getattr(self, key) is not None}
        return {**(self.model_args or {}), **given}
