"""Create the starting recipe of `hfvit train DATASET`."""

import logging
import os
import tempfile
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset, DatasetDict
from transformers.utils import cached_file

from hfvit.artifacts.constants import RECIPE_FILE
from hfvit.data.decode import image_size
from hfvit.data.folders import ARCHIVE_EXTENSIONS, TABLE_EXTENSIONS, extension
from hfvit.data.inspect import Opened, open_data, split_class_counts
from hfvit.data.splits import DIGITS
from hfvit.errors import DataError, ModelError, RecipeError, one_line
from hfvit.recipe.files import is_recipe_name
from hfvit.recipe.loader import Recipe, as_options, load_recipe
from hfvit.recipe.starting import DataSize, starting_recipe
from hfvit.utils.checks import SAVE_DATASET, check_name
from hfvit.utils.files import expand_user
from hfvit.utils.hub_ids import is_hub_id, is_local
from hfvit.utils.quiet import log_level, quiet_run

FROM_SCRATCH = "__from_scratch"  # the option, with underscores instead of dashes
STARTING_RECIPE = "starting_recipe.yaml"
SAMPLED = 500  # images to estimate the image size from


def find_and_load(argv: list[str]) -> Recipe:
    """Load a recipe, or create the starting recipe of a data set.

    Args:
        argv: `RECIPE [--key value ...]`, or `DATASET [--from_scratch] [--key value ...]`, where `DATASET` is a folder,
            table, archive or Hub id, or `digits`.
    """
    words = [word for word in argv if word.replace("-", "_") != FROM_SCRATCH]
    from_scratch = len(words) < len(argv)
    if words and is_data_set(words[0]):
        return load_starting_recipe(words[0], words[1:], from_scratch)
    if from_scratch:
        name = words[0] if words else ""
        raise RecipeError(f"--from_scratch: needs a data set, got the recipe '{name}'. Pass --architecture instead.")
    return load_recipe(words)


def load_given(
    recipe: str | Path | Mapping[str, Any], fields: Mapping[str, Any], from_scratch: bool = False
) -> Recipe:
    """Load a recipe that is given in Python.

    Args:
        recipe: name of a shipped recipe, YAML file, a dict with the keys of a recipe, or a data set.
        fields: keys of the recipe to override.
        from_scratch: train a small model without pretrained weights, for a data set in place of a recipe.
    """
    if not isinstance(recipe, Mapping):
        check_name("recipe", recipe, f"{SAVE_DATASET} HFViTTrainer takes it as it is.")
    fields = {key: _as_yaml_value(key, value) for key, value in fields.items()}
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(recipe, Mapping):
            path = Path(folder) / RECIPE_FILE
            values = {str(key): _as_yaml_value(key, value) for key, value in recipe.items()}
            path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
            recipe = path
        scratch = ["--from_scratch"] if from_scratch else []
        try:
            return find_and_load([str(recipe), *scratch, *as_options(fields)])
        except RecipeError as error:  # a dict has no file
            path = f"{folder}{os.sep}{RECIPE_FILE}"
            raise RecipeError(str(error).removeprefix(f"{path}: ").replace(f" '{path}'", "")) from None


def _as_yaml_value(key: str, value: Any) -> Any:
    """Convert paths, enums, NumPy's values and tuples to values of YAML.

    Raises:
        RecipeError: YAML has no such value.
    """
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        value = value.tolist()
    elif isinstance(value, Enum):
        value = value.value
    elif isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, list | tuple):
        return [_as_yaml_value(key, item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _as_yaml_value(key, item) for name, item in value.items()}
    advice = f" {SAVE_DATASET} HFViTTrainer takes it as it is." if isinstance(value, Dataset | DatasetDict) else ""
    raise RecipeError(
        f"{key}: must be text, a number, true, false or null, or a list or dict of them, got"
        f" {type(value).__name__}.{advice}"
    )


def is_data_set(name: str) -> bool:
    """Return whether `name` is a data set instead of a recipe.

    Data sets are a folder without recipe.yaml, a table, an archive, a Hub id, or `digits`.
    """
    if not name or is_recipe_name(name):  # an empty name would be the current folder
        return False
    path = expand_user(name)
    if os.path.isdir(path):  # False where `Path.is_dir` raises: a name too long, no permission
        return not (path / RECIPE_FILE).is_file()
    if os.path.isfile(path):
        return extension(path.name) in (*TABLE_EXTENSIONS, *ARCHIVE_EXTENSIONS)
    return name == DIGITS or is_hub_id(name)


def load_starting_recipe(dataset: str, options: list[str], from_scratch: bool = False) -> Recipe:
    """Load the recipe that `hfvit inspect` suggests for a data set.

    Args:
        dataset: folder, table, archive or Hub id.
        options: `--key value ...`, which override the recipe.
        from_scratch: train a small model without pretrained weights.

    Returns:
        The starting recipe with the options.

    Raises:
        DataError: the data set cannot be used for training.
        ModelError: the pretrained weights are not available.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / STARTING_RECIPE
        first = {"dataset_name": dataset, "architecture": "vit_tiny_patch16_224", "output_dir": folder}
        path.write_text(yaml.safe_dump(first), encoding="utf-8")
        given = load_recipe([str(path), *options])
        if given.data.streaming:
            raise RecipeError("--streaming: not available with a data set instead of a recipe. Pass a recipe.")
        # The training logs the same warnings again.
        with quiet_run(given.training.verbose, with_bars=True), log_level("hfvit", logging.ERROR):
            opened = open_data(given.data, given.training.seed)
            size = data_size(opened)
        has_gpu, has_bf16 = accelerator()
        has_gpu &= not given.training.use_cpu
        values = starting_recipe(
            size, dataset, has_gpu=has_gpu, has_bf16=has_gpu and has_bf16, from_scratch=from_scratch
        )
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        recipe = load_recipe([str(path), *options])
    check_weights(recipe)
    return recipe


def check_weights(recipe: Recipe) -> None:
    """Raise `ModelError` if pretrained weights are neither cached nor downloadable."""
    name = recipe.model.model_name_or_path
    if not name or is_local(name):
        return
    try:
        cached_file(name, "config.json", revision=recipe.model.model_revision)
    except OSError as error:
        raise ModelError(
            f"model_name_or_path: the pretrained weights {name} are not on this machine and cannot be downloaded"
            f" ({one_line(error).partition('. ')[0]}). Connect to the network, pass a local folder as"
            " --model_name_or_path, or pass --from_scratch to train a small model without pretrained weights."
        ) from None


def data_size(opened: Opened) -> DataSize:
    """Measure class counts and image sizes, without decoding pixels."""
    splits = opened.splits
    held_out = {role: metadata.get("held_out") for role, metadata in splits.metadata["splits"].items()}
    counts = sum(split_class_counts(splits, role) for role in splits.sources if role == "train" or held_out[role])
    images = sum(len(splits[role]) for role in splits.sources if role == "train" or held_out[role])
    local = opened.local
    return DataSize(
        images=images,
        smallest_class=int(counts[counts > 0].min()),
        largest_class=int(counts.max()),
        classes=len(splits.labels),
        side=_typical_side(splits.train),
        validation=0 if held_out["validation"] else len(splits.validation),
        holds_out_test=bool(local and not local.is_split),
        is_multi_label=np.asarray(splits.train[:1]["label"]).ndim == 2,
    )


def _typical_side(split: Dataset) -> int:
    rows = np.unique(np.linspace(0, len(split) - 1, min(SAMPLED, len(split))).astype(int))
    sides = []
    for row in rows:
        try:
            sides.append(min(image_size(split[int(row)]["image"], "train", int(row))))
        except DataError:
            continue
    return int(np.median(sides)) if sides else 224


def accelerator() -> tuple[bool, bool]:
    """Return whether there is a GPU, and whether it supports bfloat16."""
    if not torch.cuda.is_available():
        return torch.accelerator.is_available(), False
    return True, torch.cuda.is_bf16_supported()
