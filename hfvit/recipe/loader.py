"""Parse a recipe file and command-line overrides; warn about unused options."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from hfvit.errors import RecipeError, nearest, one_line
from hfvit.recipe.arguments import (
    AugmentationArguments,
    DataArguments,
    FinetuningArguments,
    ModelArguments,
    RunArguments,
)
from hfvit.recipe.files import find_recipe, read_yaml
from hfvit.recipe.training_args import HFViTTrainingArguments


class Need(NamedTuple):
    """`keys` have an effect only where `met` holds, which `need` says as a recipe would."""

    keys: str
    need: str
    met: Callable[[Mapping[str, Any]], Any]


def _augments(values: Mapping[str, Any]) -> bool:
    return values["finetuning"] != "linear_probe" or values["probe_passes"] > 0


# The first need of a key that is not met is the one that is told.
NEEDS = (
    Need("lora_rank lora_alpha lora_dropout lora_targets", "finetuning: lora", lambda v: v["finetuning"] == "lora"),
    Need("probe_c probe_passes", "finetuning: linear_probe", lambda v: v["finetuning"] == "linear_probe"),
    Need(
        "learning_rate weight_decay layer_decay num_train_epochs max_steps warmup_steps lr_scheduler_type optim"
        " max_grad_norm label_smoothing_factor drop_rate attn_drop_rate drop_path_rate mix_off_epochs"
        " repeated_augmentation early_stopping_patience nan_policy nan_lr_factor nan_max_rewinds eval_steps save_steps"
        " save_strategy keep_checkpoints",
        "finetuning: full or lora",
        lambda v: v["finetuning"] != "linear_probe",
    ),
    Need(
        "crop_scale crop_ratio horizontal_flip policy rand_augment_magnitude rand_augment_num_ops",
        "probe_passes above 0",
        _augments,
    ),
    Need("head_templates", "head_from_text", lambda v: v["head_from_text"]),
    Need("distillation distillation_alpha distillation_temperature", "teacher", lambda v: v["teacher"]),
    Need("distillation_temperature", "distillation: soft", lambda v: v["distillation"] == "soft"),
    Need("text_encoder_revision fusion fusion_layers max_text_length", "text_encoder", lambda v: v["text_encoder"]),
    Need("fusion_layers", "fusion: cross_attention", lambda v: v["fusion"] == "cross_attention"),
    Need("model_revision", "model_name_or_path", lambda v: v["model_name_or_path"]),
    Need("validation_fraction", "no validation_split", lambda v: not v["validation_split"]),
    Need("shuffle_buffer_size", "streaming: true", lambda v: v["streaming"]),
    Need(
        "rand_augment_magnitude rand_augment_num_ops",
        "policy: rand_augment",
        lambda v: v["policy"] == "rand_augment",
    ),
    Need(
        "mix_off_epochs",
        "mixup_alpha, cutmix_alpha or random_erasing",
        lambda v: v["mixup_alpha"] or v["cutmix_alpha"] or v["random_erasing"],
    ),
    Need("nan_lr_factor nan_max_rewinds", "nan_policy: rewind", lambda v: v["nan_policy"] == "rewind"),
    Need("eval_steps", "eval_strategy: steps", lambda v: v["eval_strategy"] == "steps"),
    Need("save_steps", "save_strategy: steps", lambda v: v["save_strategy"] == "steps"),
    Need(  # where eval_steps is not given, it is logging_steps
        "logging_steps",
        "logging_strategy: steps",
        lambda v: "steps" in (v["logging_strategy"], v["eval_strategy"]),
    ),
)


def without_effect(given: Iterable[str], values: Mapping[str, Any]) -> str | None:
    """A sentence about the keys of `given` that have no effect beside `values`, which holds all keys; else None."""
    idle: dict[str, list[str]] = {}
    for key in given:
        unmet = next((need.need for need in NEEDS if key in need.keys.split() and not need.met(values)), None)
        if unmet:
            idle.setdefault(unmet, []).append(key)
    if not idle:
        return None
    told = "; ".join(f"{', '.join(keys)} (needs {need})" for need, keys in idle.items())
    return f"Set without any effect: {told}."


SECRETS = re.compile(r"token", re.IGNORECASE)
_SECTIONS = (ModelArguments, FinetuningArguments, DataArguments, AugmentationArguments, HFViTTrainingArguments)
_FIELDS = {field.name: field for section in _SECTIONS for field in dataclasses.fields(section)}
_HINTS = {name: hint for section in _SECTIONS for name, hint in get_type_hints(section).items()}
EXPECTATION = ("expected_accuracy", "expected_accuracy_measured")
STARTS = ("model_name_or_path", "architecture")  # one on the command line takes the place of the other in the file
# Of TrainingArguments' fields, those that a reader of recipe.yaml wants to see even at their defaults.
_ALWAYS_RESOLVED = ("learning_rate", "weight_decay", "num_train_epochs", "max_steps", "optim", "max_grad_norm", "seed")


@dataclass
class Recipe:
    """A resolved recipe: five checked configurations and the values that made them."""

    model: ModelArguments
    finetuning: FinetuningArguments
    data: DataArguments
    augmentation: AugmentationArguments
    training: HFViTTrainingArguments
    source: Path
    values: dict[str, Any]
    idle: str | None = None  # what was set without any effect, in words

    def to_yaml(self) -> str:
        """The recipe as resolved: running it again is the same run. Tokens are left out."""
        return yaml.safe_dump(self.values, sort_keys=False, allow_unicode=True)

    @property
    def checkpoints(self) -> dict[str, str | None]:
        """Option -> the checkpoint that it names, of all checkpoints that a run reads."""
        return {
            "model_name_or_path": self.model.model_name_or_path,
            "text_encoder": self.model.text_encoder,
            "teacher": self.finetuning.teacher,
            "head_from_text": self.finetuning.head_from_text,
        }

    def pin(self, dataset_commit: str | None) -> None:
        """Resolve the data set's branch to the commit that was loaded; None for what has no commits."""
        if dataset_commit:
            self.values["dataset_revision"] = dataset_commit

    def fit(self, images: int) -> None:
        """Fit batch, evaluation and logging steps to a training split that is smaller than the recipe expects.

        Args:
            images: of the training split.
        """
        for key, value in self.training.fit(images).items():
            self.values[key] = value
        self.augmentation.check_against(self.training)


class _RecipeParser(HfArgumentParser):
    """Says what is wrong as a `RecipeError`; argparse would print the usage of two hundred options."""

    def error(self, message):
        raise RecipeError(re.sub(r"^argument --(\w+)\S*: ", r"\1: ", message) + ".")


def build_parser() -> HfArgumentParser:
    """Every key of a recipe as an option; `--help` prints them all."""
    return _RecipeParser(
        _SECTIONS,
        prog="hfvit/train.py RECIPE",
        allow_abbrev=False,
        description="Train from a recipe: a shipped name or a YAML file. Options given here beat the file's values.",
    )


def load_recipe(argv: list[str]) -> Recipe:
    """Read `RECIPE [--key value ...]`; raises `RecipeError` for an unknown key or a value that is not allowed."""
    parser = build_parser()
    if not argv or argv[0].startswith("-"):
        if argv and argv[0] in ("-h", "--help"):
            parser.parse_args(argv)
        raise RecipeError("Name a recipe first: a YAML file or one of the names that `hfvit recipes` lists.")
    source = find_recipe(argv[0])
    takes_list = {action.dest: action.nargs == "+" for action in parser._actions if action.dest != "help"}
    file_values = read_recipe(source, takes_list)

    # Each value goes through the parser as if it had been typed. That coerces what YAML 1.1 misreads (1e-4 is a
    # string to it, `no` is False), checks it once, and lets the command line, which comes last, win.
    parser.set_defaults(**{key: None for key, value in file_values.items() if value is None})
    typed = [word for key, value in file_values.items() if value is not None for word in _as_option(key, value)]
    try:
        from_file = parser.parse_args(typed)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None
    namespace, unknown = parser.parse_known_args([*typed, *argv[1:]])
    if unknown:
        key = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
        raise RecipeError(f"{unknown[0]}: unknown option.{nearest(key, takes_list)}")
    options = [word[2:].partition("=")[0].replace("-", "_") for word in argv[1:] if word.startswith("--")]
    for taken, left in (STARTS, STARTS[::-1]):
        if taken in options and left not in options:
            setattr(namespace, left, None)

    try:
        sections = parser.parse_dict(vars(namespace))
        model, finetuning, data, augmentation, training = sections
        augmentation.check_against(training)
        finetuning.check_against(model, data, augmentation, training)
        model.check_texts(data, augmentation)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        # TrainingArguments' own checks raise these, and accelerate's.
        raise RecipeError(f"{source}: {one_line(error)}") from None

    given = {**file_values, **_changed(vars(from_file), vars(namespace))}
    # A resolved recipe holds every key: of a file's, those that are not at their defaults were meant.
    meant = [key for key in file_values if vars(from_file)[key] != parser.get_default(key)]
    in_force = {key: getattr(section, key) for section in sections for key in vars(section) if key in _FIELDS}
    idle = without_effect(dict.fromkeys([*meant, *options]), in_force)
    return Recipe(*sections, source, _resolved(*sections, typed=vars(namespace), given=given), idle)


def read_recipe(path: Path, takes_list: dict[str, bool]) -> dict[str, Any]:
    """The file's keys and values as YAML gives them; `RecipeError` when it is not a flat mapping of known keys.

    `takes_list` holds the known keys, and whether each takes a list.
    """
    try:
        values = read_yaml(path)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping of `key: value` lines; this file holds {type(values).__name__}."
        )
    for key, value in values.items():
        if key not in takes_list:
            raise RecipeError(f"{path}: {key}: unknown key.{nearest(str(key), takes_list)}")
        if value is None and type(None) not in get_args(_HINTS[key]):
            raise RecipeError(f"{path}: {key}: cannot be null; leave the line out for its default.")
        if isinstance(value, list) and not takes_list[key]:
            raise RecipeError(f"{path}: {key}: takes one value, not the list {value}.")
    return values


def as_options(fields: Mapping[str, Any]) -> list[str]:
    """Command-line words for keys of a recipe; None becomes `none`, and a path its text."""
    words: list[str] = []
    for key, value in fields.items():
        if key not in _FIELDS:
            raise RecipeError(f"{key}: unknown key.{nearest(key, _FIELDS)}")
        if isinstance(value, tuple):
            value = list(value)
        words += _as_option(key, "none" if value is None else value)
    return words


def _as_option(key: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    if isinstance(value, dict):
        try:
            return [f"--{key}={json.dumps(value)}"]
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{key}: only names, numbers and text are taken in it: {one_line(error)}.") from None
    if value is False and str in (_HINTS[key], *get_args(_HINTS[key])):
        return [f"--{key}=no"]  # YAML 1.1's reading of a bare `no`
    return [f"--{key}={value}"]


def _changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in after.items() if before.get(key) != value}


def _resolved(*sections, typed: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """hfvit's own fields in full; of TrainingArguments' the usual ones and those that were given."""
    *own_sections, training = sections
    own = {key: value for section in own_sections for key, value in dataclasses.asdict(section).items()}
    own |= {field.name: getattr(training, field.name) for field in dataclasses.fields(RunArguments)}
    redefined = [name for name in HFViTTrainingArguments.__annotations__ if name not in own]
    theirs = {key: typed[key] for key in (*_ALWAYS_RESOLVED, *redefined, *given) if key not in own}
    # Acts, not properties of the run: repeating it must not push over its repository. The expected accuracy is that of
    # the recipe as it stands, not of a run with other options.
    moment = (
        "overwrite_output_dir", "allow_changed_data", "resume_from_checkpoint", "push_to_hub", *EXPECTATION,
    )  # fmt: skip
    return {
        key: value
        for key, value in {**own, **theirs}.items()
        if key not in moment
        and not key.startswith("hub_")
        and not SECRETS.search(key)
        and not (value is None and _FIELDS[key].default is None)  # null only where that is not the default
    }
