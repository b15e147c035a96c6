"""Parse a recipe file and command-line overrides; warn about unused options."""

import argparse
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from hfvit.errors import RecipeError, one_line
from hfvit.recipe.arguments import (
    DEFAULT_TEST_FRACTION,
    DEFAULT_TEST_SPLIT,
    SINGLE_LABEL,
    AugmentationArguments,
    DataArguments,
    FinetuningArguments,
    ModelArguments,
    RunArguments,
)
from hfvit.recipe.files import find_recipe, read_yaml
from hfvit.recipe.optimizers import has_adam_options
from hfvit.recipe.other_names import OTHER_NAMES, key_hint
from hfvit.recipe.training_args import WITHOUT_EFFECT, WITHOUT_OPTIONS, WITHOUT_WARMUP, HFViTTrainingArguments
from hfvit.utils.credentials import mask_values
from hfvit.utils.files import expand_user
from hfvit.utils.hub_ids import is_local


def _is_local_data(dataset_name: str) -> bool:
    return dataset_name == "digits" or is_local(dataset_name)


class Need(NamedTuple):
    """Condition on which options have an effect.

    Args:
        keys: names of the options, separated by spaces.
        need: the condition as text, after "only used".
        met: the condition as a function of all options.
    """

    keys: str
    need: str
    met: Callable[[Mapping[str, Any]], Any]


# Only the first unmet need of a key is reported.
NEEDS = (
    Need(
        "lora_rank lora_alpha lora_dropout lora_targets", "with finetuning=lora", lambda v: v["finetuning"] == "lora"
    ),
    Need("probe_c probe_passes", "with finetuning=linear_probe", lambda v: v["finetuning"] == "linear_probe"),
    Need(
        "learning_rate weight_decay layer_decay num_train_epochs max_steps warmup_steps lr_scheduler_type optim"
        " max_grad_norm label_smoothing_factor multi_label_loss drop_rate attn_drop_rate drop_path_rate"
        " patch_drop_rate mix_off_epochs repeated_augmentation early_stopping_patience nan_policy nan_lr_factor"
        " nan_max_rewinds eval_steps save_steps save_strategy keep_checkpoints lr_scheduler_kwargs optim_args"
        " adam_beta1 adam_beta2 adam_epsilon",
        "with finetuning=full or lora",
        lambda v: v["finetuning"] != "linear_probe",
    ),
    Need(
        "crop_scale crop_ratio crop_padding crop_padding_mode horizontal_flip vertical_flip policy"
        " rand_augment_magnitude rand_augment_num_ops color_jitter",
        "with probe_passes above 0",
        lambda v: v["finetuning"] != "linear_probe" or v["probe_passes"] > 0,
    ),
    Need(
        "multi_label_loss",
        "with several labels per image",
        lambda v: v["problem_type"] != SINGLE_LABEL,
    ),
    Need("head_templates", "with head_from_text", lambda v: v["head_from_text"]),
    Need("distillation distillation_alpha distillation_temperature", "with teacher", lambda v: v["teacher"]),
    Need("distillation_temperature", "with distillation=soft", lambda v: v["distillation"] == "soft"),
    Need(
        "text_encoder_revision fusion fusion_layers max_text_length", "with text_encoder", lambda v: v["text_encoder"]
    ),
    Need("fusion_layers", "with fusion=cross_attention", lambda v: v["fusion"] == "cross_attention"),
    Need("model_revision", "with model_name_or_path", lambda v: v["model_name_or_path"]),
    Need(
        "validation_fraction",
        "without validation_split and folds",
        lambda v: not (v["validation_split"] or v["folds"]),
    ),
    Need("shuffle_buffer_size stream_evaluation", "with streaming=true", lambda v: v["streaming"]),
    Need("test_fraction", "with streaming=false", lambda v: not v["streaming"]),
    Need("dataset_revision", "with a data set on the Hub", lambda v: not _is_local_data(v["dataset_name"])),
    Need(
        "dataset_config_name",
        "with a data set on the Hub or a folder",
        lambda v: not _is_local_data(v["dataset_name"]) or os.path.isdir(expand_user(v["dataset_name"])),
    ),
    Need(
        "rand_augment_magnitude rand_augment_num_ops",
        "with policy=rand_augment",
        lambda v: v["policy"] == "rand_augment",
    ),
    Need("crop_padding_mode", "with crop_padding", lambda v: v["crop_padding"]),
    Need(
        "mix_off_epochs",
        "with mixup_alpha, cutmix_alpha or random_erasing",
        lambda v: v["mixup_alpha"] or v["cutmix_alpha"] or v["random_erasing"],
    ),
    Need(
        "warmup_steps",
        "with a schedule that has a warmup, such as constant_with_warmup",
        lambda v: v["lr_scheduler_type"] not in WITHOUT_WARMUP,
    ),
    Need(
        "lr_scheduler_kwargs",
        "with a schedule that has options",
        lambda v: v["lr_scheduler_type"] not in WITHOUT_OPTIONS,
    ),
    Need(
        "adam_beta1 adam_beta2 adam_epsilon",
        "with an optim of the Adam family of transformers",
        lambda v: has_adam_options(v["optim"]),
    ),
    Need("adam_epsilon", "with an optim that has an epsilon, unlike Lion", lambda v: "lion" not in v["optim"]),
    Need("nan_lr_factor nan_max_rewinds", "with nan_policy=rewind", lambda v: v["nan_policy"] == "rewind"),
    Need("eval_steps", "with eval_strategy=steps", lambda v: v["eval_strategy"] == "steps"),
    Need("save_steps", "with save_strategy=steps", lambda v: v["save_strategy"] == "steps"),
    *(Need(" ".join(keys), need, lambda v: False) for need, keys in WITHOUT_EFFECT.items()),
    Need(  # logging_steps is the default of eval_steps
        "logging_steps",
        "with logging_strategy=steps",
        lambda v: "steps" in (v["logging_strategy"], v["eval_strategy"]),
    ),
)


def ignored_options(keys: Iterable[str], values: Mapping[str, Any]) -> str | None:
    """Return a warning about options without effect, None if there are none.

    Args:
        keys: names of the options that were set.
        values: values of all options.
    """
    ignored: dict[str, list[str]] = {}
    for key in keys:
        unmet = _unmet_need(key, values)
        if unmet:
            ignored.setdefault(unmet, []).append(key)
    if not ignored:
        return None
    listed = "; ".join(f"{', '.join(names)} (only used {need})" for need, names in ignored.items())
    return f"Ignored options: {listed}."


def _unmet_need(key: str, values: Mapping[str, Any]) -> str | None:
    """Return the condition of an option that is not met, None if it has an effect."""
    return next((need.need for need in NEEDS if key in need.keys.split() and not need.met(values)), None)


SECRETS = re.compile(r"token", re.IGNORECASE)
NEGATIVE_NUMBER = re.compile(r"-\d*\.?\d+")  # other words with a dash are options to argparse
_SECTIONS = (ModelArguments, FinetuningArguments, DataArguments, AugmentationArguments, HFViTTrainingArguments)
_FIELDS = {field.name: field for section in _SECTIONS for field in dataclasses.fields(section)}
_HINTS = {name: hint for section in _SECTIONS for name, hint in get_type_hints(section).items()}
EXPECTATION = ("expected_accuracy", "expected_accuracy_measured")
# Options that a resolved recipe does not have, and that each of several runs gets from the command line.
PASSED_ON = ("quiet", "verbose", "json_log", "allow_changed_data")
STARTS = ("model_name_or_path", "architecture")  # either on the command line overrides both in the file
# Fields of TrainingArguments that recipe.yaml has even at their defaults.
_ALWAYS_RESOLVED = (
    "learning_rate", "weight_decay", "num_train_epochs", "max_steps", "optim", "max_grad_norm", "seed", "output_dir",
    "per_device_train_batch_size", "per_device_eval_batch_size", "lr_scheduler_type", "warmup_steps", "eval_strategy",
    "save_strategy", "save_total_limit", "load_best_model_at_end", "metric_for_best_model", "dataloader_num_workers",
    "ddp_find_unused_parameters", "remove_unused_columns", "logging_nan_inf_filter",
    "restore_callback_states_from_checkpoint", "resume_from_checkpoint", "push_to_hub", "hub_strategy", "report_to",
)  # fmt: skip
NULLS = ("none", "null")  # what a command line writes for null
_WORDS = {int: "an integer", float: "a number", string_to_bool: "true or false"}


@dataclass
class Recipe:
    """Hold the checked sections of a resolved recipe, and its values.

    Args:
        model: network, image size and freezing.
        finetuning: fine-tuning method.
        data: data set, splits and preprocessing.
        augmentation: augmentation of training images.
        training: training arguments.
        source: recipe file.
        values: resolved values for recipe.yaml.
        ignored: warning about options without effect, or None.
    """

    model: ModelArguments
    finetuning: FinetuningArguments
    data: DataArguments
    augmentation: AugmentationArguments
    training: HFViTTrainingArguments
    source: Path
    values: dict[str, Any]
    ignored: str | None = None

    @property
    def unused(self) -> list[str]:
        """Return the keys that have no effect with the values of the others."""
        sections = (self.model, self.finetuning, self.data, self.augmentation, self.training)
        values = _values(sections)
        return [key for key in self.values if key in values and _unmet_need(key, values)]

    def to_yaml(self) -> str:
        """Return the resolved recipe, which repeats the run, without tokens."""
        return yaml.safe_dump(mask_values(self.values), sort_keys=False, allow_unicode=True)

    @property
    def repeated_by(self) -> str | None:
        """Return the key by which the recipe describes several runs, None for one run."""
        if self.training.seeds:
            return "seeds"
        return "folds" if self.data.folds and self.data.fold is None else None

    def check_is_one_run(self) -> None:
        """Raise `RecipeError` if the recipe describes several runs."""
        if self.repeated_by:
            raise RecipeError(f"{self.repeated_by}: only available in `hfvit train`. Omit it for a single run.")

    @property
    def checkpoints(self) -> dict[str, str | None]:
        """Return all checkpoints that a run reads, by option."""
        return {
            "model_name_or_path": self.model.model_name_or_path,
            "text_encoder": self.model.text_encoder,
            "teacher": self.finetuning.teacher,
            "head_from_text": self.finetuning.head_from_text,
        }

    def pin(self, dataset_commit: str | None, label_separator: str | None = None) -> None:
        """Record what was found in the loaded data set, so that the recipe reads it alike.

        Args:
            dataset_commit: commit of a data set on the Hub.
            label_separator: separator of labels in strings.
        """
        if dataset_commit:
            self.values["dataset_revision"] = dataset_commit
        if label_separator:
            self.values["label_separator"] = label_separator

    def fit_problem(self, problem_type: str, metrics: Sequence[str], default_metric: str) -> None:
        """Check the recipe for a problem type, and set metric_for_best_model.

        Args:
            problem_type: problem type of the data.
            metrics: names of the computed metrics.
            default_metric: metric to use instead of accuracy.

        Raises:
            RecipeError: an option does not support the problem type.
        """
        self.finetuning.check_problem(problem_type)
        self.values |= self.training.fit_metric(metrics, default_metric)

    def fit(self, images: int) -> None:
        """Reduce batch, evaluation and logging steps for a small training split.

        Args:
            images: number of training images.
        """
        self.values |= self.training.fit(images)
        self.augmentation.check_against(self.training)


class _RecipeParser(HfArgumentParser):
    """Raise `RecipeError` for errors; argparse would print the usage of 200 options."""

    def error(self, message):
        raise RecipeError(re.sub(r"^argument --(\w+)\S*: ", r"\1: ", message).rstrip(".") + ".")


def build_parser() -> HfArgumentParser:
    """Build a parser with every key of a recipe as an option."""
    parser = _RecipeParser(
        _SECTIONS,
        prog="hfvit/train.py RECIPE",
        allow_abbrev=False,
        description="Train from a recipe: a shipped name or a YAML file. Options override the values of the file.",
    )
    for action in parser._actions:
        if action.dest in _FIELDS and action.nargs != 0:
            action.type = _value_type(action, _may_be_null(action.dest))
            if action.choices:  # checked by the type function
                action.metavar = f"{{{','.join(map(str, action.choices))}}}"
                action.choices = None
    return parser


def _may_be_null(key: str) -> bool:
    return type(None) in get_args(_HINTS[key])


def _value_type(action: argparse.Action, may_be_null: bool) -> Callable[[str], Any]:
    """Combine an action's type and choices; `none` and `null` are null."""
    convert = action.type
    choices = action.choices

    def parse(text: str) -> Any:
        if text.lower() in NULLS and action.default != "none":
            if may_be_null:
                return None
            raise argparse.ArgumentTypeError(f"cannot be null, got '{text}'. Omit it for its default")
        try:
            value = convert(text)
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            words = _WORDS.get(convert, "a valid value")
            raise argparse.ArgumentTypeError(f"must be {words}, got '{text}'") from None
        if choices and value not in choices:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(map(str, choices))}, got '{text}'")
        return value

    return parse


def load_recipe(argv: list[str]) -> Recipe:
    """Read `RECIPE [--key value ...]`.

    Args:
        argv: name of a shipped recipe or YAML file, then options that override the file.

    Raises:
        RecipeError: an unknown key or invalid value. The message begins with the option, or with file and key.
    """
    parser = build_parser()
    if not argv or argv[0].startswith("-"):
        if argv and argv[0] in ("-h", "--help"):
            parser.parse_args(argv)
        raise RecipeError("RECIPE: missing. Pass a YAML file or a recipe of `hfvit recipes`.")
    source = find_recipe(argv[0])
    takes_list = {action.dest: action.nargs == "+" for action in parser._actions if action.dest != "help"}
    file_values = read_recipe(source, takes_list)

    # The parser reads values of the file like options: it converts what YAML 1.1 misreads (1e-4 as a string, `no` as
    # False), checks each once, and later words (the command line) win.
    parser.set_defaults(**{key: None for key, value in file_values.items() if value is None})
    try:
        typed = [word for key, value in file_values.items() if value is not None for word in _as_option(key, value)]
        from_file = _parse(parser, typed)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None
    options = _given_options(parser, argv[1:])
    try:
        namespace = _parse(parser, argv[1:], typed)
    except RecipeError as error:
        raise _located(error, source, options) from None
    for selected, other in (STARTS, STARTS[::-1]):
        if selected in options and other not in options:
            setattr(namespace, other, None)

    try:
        sections = _build_sections(parser, namespace)
    except RecipeError as error:
        raise _located(error, source, options, in_file=_fails_with(parser, from_file, str(error))) from None

    _check_replaced(options, *sections)
    given = file_values | {key: value for key, value in vars(namespace).items() if vars(from_file).get(key) != value}
    # A resolved recipe has every key, so only values of the file other than the defaults count as set.
    intended = [key for key in file_values if vars(from_file)[key] != parser.get_default(key)]
    ignored = ignored_options(dict.fromkeys([*intended, *options]), _values(sections))
    return Recipe(*sections, source, _resolved(*sections, typed=vars(namespace), given=given), ignored)


def _values(sections: Iterable[Any]) -> dict[str, Any]:
    """Return the values of all keys of a recipe."""
    return {key: value for section in sections for key, value in vars(section).items() if key in _FIELDS}


def _parse(parser: HfArgumentParser, words: list[str], defaults: Sequence[str] = ()) -> argparse.Namespace:
    """Parse options after those of `defaults`; raise `RecipeError` for unknown ones."""
    namespace, unknown = parser.parse_known_args([*defaults, *words])
    if unknown:
        name = unknown[0].partition("=")[0]
        if not name.startswith("--"):
            raise RecipeError(_unexpected_word(unknown[0], words))
        raise RecipeError(f"{name}: unknown option.{key_hint(name[2:].replace('-', '_'), _FIELDS, '--')}")
    for key, value in vars(namespace).items():
        if isinstance(value, list) and None in value:
            if len(value) > 1:
                raise RecipeError(f"{key}: none must be the only value, got {len(value)} values.")
            setattr(namespace, key, None)
    return namespace


def _unexpected_word(word: str, words: list[str]) -> str:
    """Describe a word that belongs to no option.

    Args:
        word: the word, such as `epochs=3`, or `64` of `--image_size 32 64`.
        words: all words of the command line.
    """
    name, equals, value = word.partition("=")
    if equals:
        key = name if name in _FIELDS else OTHER_NAMES.get(name, "key")
        return f"{name}: unexpected argument '{word}'. Write options as --{key} {value}."
    is_value = [each.startswith("--") and "=" not in each for each in ["", *words]]  # of the option before
    place = next((i for i, each in enumerate(words) if each == word and not is_value[i]), 0)
    options = [each.partition("=")[0] for each in words[:place] if each.startswith("--")]
    if options:
        return f"{options[-1]}: takes one value, but '{word}' follows it. Omit '{word}'."
    return f"{name}: unexpected argument. Write options as --key value."


def _given_options(parser: HfArgumentParser, words: list[str]) -> list[str]:
    """Return the keys of known options in `words`."""
    names = [word.partition("=")[0] for word in words]
    return [parser._option_string_actions[name].dest for name in names if name in parser._option_string_actions]


def _build_sections(parser: HfArgumentParser, namespace: argparse.Namespace) -> tuple:
    """Build the sections of a recipe; raise `RecipeError` for invalid values."""
    try:
        sections = parser.parse_dict(vars(namespace))
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:
        # remaining checks of TrainingArguments and accelerate
        raise RecipeError(one_line(error)) from None
    model, finetuning, data, augmentation, training = sections
    augmentation.check_against(training)
    finetuning.check_against(model, data, augmentation, training)
    model.check_texts(data, augmentation)
    if training.save_predictions and data.streaming:
        raise RecipeError("save_predictions: not available with streaming. Set it to false.")
    _check_repetition(data, training)
    return sections


def _check_repetition(data: DataArguments, training: HFViTTrainingArguments) -> None:
    """Raise `RecipeError` for options that several runs of a recipe do not support."""
    if training.seeds and data.folds:
        raise RecipeError("seeds, folds: must not both be set. Omit one of them.")
    key = "seeds" if training.seeds else "folds"
    if not training.seeds and (data.folds is None or data.fold is not None):
        return
    if training.push_at_end:
        raise RecipeError(f"push_to_hub: not available with {key}. Push one of the runs with `hfvit push`.")
    if training.resume_from_checkpoint not in (None, "auto"):
        raise RecipeError(
            f"resume_from_checkpoint: must be auto with {key}, which resumes all runs, got"
            f" '{training.resume_from_checkpoint}'."
        )


def _check_replaced(options: list[str], *sections) -> None:
    """Raise `RecipeError` for an option that several runs replace.

    A file may have it for a single run.

    Args:
        options: keys of the options that were passed.
        *sections: sections of the recipe.
    """
    _, _, data, _, training = sections
    if training.seeds and "seed" in options:
        raise RecipeError(f"--seed: not available with seeds, got {training.seed}. Omit one of them.")
    if data.folds and data.fold is None and "test_split" in options and data.test_split:
        raise RecipeError(
            f"--test_split: not available with folds, which have no test split, got '{data.test_split}'. Omit it."
        )


def _fails_with(parser: HfArgumentParser, namespace: argparse.Namespace, message: str) -> bool:
    """Return whether these values alone raise an error with this message."""
    try:
        _build_sections(parser, namespace)
    except RecipeError as error:
        return str(error) == message
    return False


def _located(error: RecipeError, source: Path, options: list[str], in_file: bool = False) -> RecipeError:
    """Name the options (with `--`) or the file that an error is about."""
    head, colon, rest = str(error).partition(": ")
    keys = head.split(", ")
    if colon and set(keys) & set(options):
        return RecipeError(f"{', '.join(f'--{key}' if key in options else key for key in keys)}: {rest}")
    return RecipeError(f"{source}: {error}" if in_file else str(error))


def read_recipe(path: Path, takes_list: dict[str, bool]) -> dict[str, Any]:
    """Read keys and values of a recipe file.

    Args:
        path: recipe file.
        takes_list: whether each known key has a list.

    Raises:
        RecipeError: the file is not a flat mapping of known keys.
    """
    try:
        values = read_yaml(path)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: must be a mapping of `key: value` lines, got {type(values).__name__}.")
    for key, value in values.items():
        if key not in takes_list:
            raise RecipeError(f"{path}: {key}: unknown key.{key_hint(str(key), takes_list)}")
        if value is None and not _may_be_null(key):
            raise RecipeError(f"{path}: {key}: cannot be null. Omit the line for its default.")
        if isinstance(value, list) and not takes_list[key]:
            raise RecipeError(f"{path}: {key}: must be one value, got the list {value}.")
    return values


def as_options(fields: Mapping[str, Any]) -> list[str]:
    """Convert keys and values to command-line words, None to `none`."""
    words: list[str] = []
    for key, value in fields.items():
        if key not in _FIELDS:
            raise RecipeError(f"{key}: unknown key.{key_hint(key, _FIELDS)}")
        if isinstance(value, tuple):
            value = list(value)
        words += _as_option(key, "none" if value is None else value)
    return words


def _as_option(key: str, value: Any) -> list[str]:
    if isinstance(value, list):
        for item in value:
            _check_item(key, item)
        return [f"--{key}", *map(str, value)]
    if isinstance(value, dict):
        try:
            return [f"--{key}={json.dumps(value)}"]
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{key}: must have names, numbers and text only: {one_line(error)}.") from None
    if value is False and str in (_HINTS[key], *get_args(_HINTS[key])):
        return [f"--{key}=no"]  # YAML 1.1's reading of a bare `no`
    return [f"--{key}={value}"]


def _check_item(key: str, item: Any) -> None:
    """Raise `RecipeError` for a list item that options cannot have."""
    if isinstance(item, bool):
        raise RecipeError(
            f"{key}: must have text or numbers, got {item}. Put it in quotes, as YAML reads yes, no, on and off as"
            " true and false."
        )
    if isinstance(item, dict | list):
        raise RecipeError(f"{key}: must have text or numbers, got {item}. Put text with special characters in quotes.")
    if isinstance(item, str) and item.startswith("-") and not NEGATIVE_NUMBER.fullmatch(item):
        advice = " Write the names to a text file, and pass it." if key == "class_names" else ""
        raise RecipeError(f"{key}: must not start with '-', got '{item}'.{advice}")


def without_test_split(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of a recipe without test split.

    Its images stay excluded from training.
    """
    changed = {**values, "test_split": None}
    if values.get("test_split", DEFAULT_TEST_SPLIT) and values.get("test_fraction") is None:
        changed["test_fraction"] = DEFAULT_TEST_FRACTION
    return changed


def default_of(key: str) -> Any:
    """Return the default of a recipe key, None for an unknown key."""
    field = _FIELDS.get(key)
    if field is None:
        return None
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _resolved(*sections, typed: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return hfvit's fields, and those of TrainingArguments that are common or set."""
    *own_sections, training = sections
    own = {key: value for section in own_sections for key, value in dataclasses.asdict(section).items()}
    own |= {field.name: getattr(training, field.name) for field in dataclasses.fields(RunArguments)}
    theirs = {key: typed[key] for key in (*_ALWAYS_RESOLVED, *given) if key not in own}
    # Omitted: actions that a repeated run must not repeat, such as pushing, and the expected accuracy, which other
    # options change.
    omitted = (
        "overwrite_output_dir", "resume_from_checkpoint", "push_to_hub", "seeds", *PASSED_ON, *EXPECTATION,
    )  # fmt: skip
    return {
        key: value
        for key, value in {**own, **theirs}.items()
        if key not in omitted
        and not key.startswith("hub_")
        and not SECRETS.search(key)
        and not (value is None and _FIELDS[key].default is None)  # null only if it is not the default
    }
