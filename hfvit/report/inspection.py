"""Inspect a data set, with an HTML page and a starting recipe (`hfvit inspect`)."""

import base64
import dataclasses
import io
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import StrictUndefined
from PIL import Image

from hfvit.data.decode import decode
from hfvit.data.inspect import Opened, inspect_data, open_data
from hfvit.data.inspection import Duplicates, ImageName, Inspection
from hfvit.data.labels import read_column, targets_of
from hfvit.data.starting_recipe import accelerator, data_size, is_data_set
from hfvit.errors import DataError, RecipeError
from hfvit.evaluation.label_errors import find_label_errors, open_as_trained
from hfvit.metrics.label_errors import WEAK_MODEL
from hfvit.recipe.arguments import DataArguments
from hfvit.recipe.other_names import key_hint
from hfvit.recipe.starting import recipe_text, starting_recipe, yaml_line
from hfvit.utils.checks import SAVE_DATASET, check_integer, check_name
from hfvit.utils.files import expand_user, write_text
from hfvit.utils.markup import html_environment

DEFAULT_SEED = 42  # of a recipe
CLASSES_IN_PAGE = 200
SAMPLES = 8  # of each class in the page
GROUPS_IN_PAGE = 50
SUSPECTS_IN_PAGE = 60
SIDE = 96  # of a sample, in pixels


def inspect(
    dataset: str | Path,
    *,
    run: str | Path | None = None,
    html: str | Path | None = None,
    recipe: str | Path | None = None,
    from_scratch: bool = False,
    seed: int = DEFAULT_SEED,
    show_progress: bool = False,
    **fields: Any,
) -> Inspection:
    """Inspect a data set before training, as `hfvit inspect` does.

    Args:
        dataset: folder, table, archive or Hub id, as `dataset_name` of a recipe.
        run: trained run, to find suspicious labels. Default: do not search for them.
        html: file to write an HTML page with samples of each class to. Default: none.
        recipe: file to write the starting recipe to. Default: none.
        from_scratch: create a recipe of a small model without pretrained weights.
        seed: seed of held-out images.
        show_progress: show progress bars on standard error.
        **fields: other keys of `DataArguments`, such as `label_column="species"` or `class_names=[...]`.

    Returns:
        The description of the data set, with the starting recipe. `print` shows what `hfvit inspect` does.

    Raises:
        DataError: the data set has an unknown layout, or cannot be used for training.
        ModelError: the run cannot be loaded.
        RecipeError: a key is unknown, or has a wrong value.
    """
    check_name("dataset", dataset, SAVE_DATASET)
    check_integer("seed", seed, 0, optional=False)
    arguments = _data_arguments(dataset, fields)
    for option, file in (("html", html), ("recipe", recipe)):
        if file is not None and expand_user(file).is_dir():  # before what may take minutes
            raise DataError(f"{option}: must be a file, but {str(file) or '.'} is a folder.")
    opened = open_data(arguments, seed)
    size = data_size(opened)
    has_gpu, has_bf16 = accelerator()
    values = starting_recipe(size, str(dataset), has_gpu=has_gpu, has_bf16=has_bf16, from_scratch=from_scratch)
    options = fields | ({"seed": seed} if seed != DEFAULT_SEED else {})
    values |= options
    text = recipe_text(values, size)
    if recipe is not None:
        _check_not_edited(expand_user(recipe), text)
    held_out = {key: values[key] for key in ("validation_fraction", "test_split") if key in values}
    if held_out:  # the starting recipe holds out other images than the defaults
        opened = open_data(dataclasses.replace(opened.data, **held_out), seed)
    label_check = None
    if run is not None:
        as_trained = open_as_trained(run, dataset, **fields)
        opened = as_trained or opened
        label_check = find_label_errors(run, opened, as_trained is not None, show_progress)
    inspection = inspect_data(opened, label_check, show_progress)
    inspection.recipe = values
    inspection.command = next_command(str(dataset), from_scratch, recipe, options)
    if recipe is not None:
        write_text(expand_user(recipe), text)
    if html is not None:
        write_text(expand_user(html), page(inspection, opened))
    return inspection


def _data_arguments(dataset: str | Path, fields: Mapping[str, Any]) -> DataArguments:
    """Return the arguments of a data set.

    Args:
        dataset: its `dataset_name`.
        fields: further keys.

    Raises:
        RecipeError: a key is unknown, or its value has another type.
    """
    known = [each.name for each in dataclasses.fields(DataArguments) if each.name != "dataset_name"]
    for key in fields:
        if key not in known:
            raise RecipeError(f"{key}: unknown key.{key_hint(key, known)}")
    try:
        return DataArguments(dataset_name=str(dataset), **fields)
    except (TypeError, AttributeError) as error:
        raise RecipeError(f"{', '.join(fields)}: must have values of the types in a recipe ({error}).") from None


def _check_not_edited(recipe: Path, text: str) -> None:
    """Raise `DataError` if `recipe` exists with other content than `text`."""
    try:
        is_edited = recipe.exists() and recipe.read_text(encoding="utf-8") != text
    except ValueError:  # not UTF-8
        is_edited = True
    if is_edited:
        raise DataError(f"--recipe: {recipe} exists with other content. Choose another file, or delete it.")


def next_command(dataset: str, from_scratch: bool, recipe: str | Path | None, fields: Mapping[str, Any]) -> str:
    """Return the command that trains on the data set.

    Args:
        dataset: data set as on the command line.
        from_scratch: train without pretrained weights.
        recipe: file with the starting recipe, None if `hfvit train` creates the recipe.
        fields: other options.
    """
    if recipe:
        return shlex.join(["hfvit", "train", str(recipe)])
    if not is_data_set(dataset):  # a name of the Hub without its owner, which may be that of a recipe
        return f"hfvit inspect {shlex.quote(dataset)} --recipe my_recipe.yaml && hfvit train my_recipe.yaml"
    words = ["hfvit", "train", dataset]
    for key, value in fields.items():
        texts = value if isinstance(value, list) else [{None: "none", True: "true", False: "false"}.get(value, value)]
        words += [f"--{key}", *map(str, texts)]
    return shlex.join([*words, *(["--from_scratch"] if from_scratch else [])])


def page(inspection: Inspection, opened: Opened) -> str:
    """Render the result as an offline HTML page with samples of each class.

    Args:
        inspection: result of `inspect_data`.
        opened: data set to take the samples from.
    """
    environment = html_environment(
        Path(__file__).parent, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["count"] = lambda number: f"{number:,}"
    by_row = {role: _positions(opened, role) for role in opened.splits.sources}
    return environment.get_template("inspection.html").render(
        inspection=inspection,
        classes=_class_samples(inspection, opened),
        leaks=[_group(opened, by_row, group) for group in inspection.leaks[:GROUPS_IN_PAGE]],
        conflicts=[_group(opened, by_row, group) for group in inspection.conflicts[:GROUPS_IN_PAGE]],
        suspects=[
            {"suspect": suspect, "image": _of_name(opened, by_row, suspect.image)}
            for suspect in (inspection.label_check.suspects if inspection.label_check else [])[:SUSPECTS_IN_PAGE]
        ],
        recipe=[yaml_line(*item) for item in inspection.recipe.items()],
        skipped=max(0, len(inspection.labels) - CLASSES_IN_PAGE),
        enough=WEAK_MODEL,
    )


def _positions(opened: Opened, role: str) -> dict[int, int]:
    return {row: position for position, row in enumerate(read_column(opened.splits[role], "row").to_numpy().tolist())}


def _class_samples(inspection: Inspection, opened: Opened) -> list[dict[str, Any]]:
    """Return the classes with counts and samples, of the training split if possible."""
    splits = opened.splits
    found: list[dict[str, Any]] = []
    labels = {role: targets_of(splits[role]) for role in splits.sources}
    for index, name in enumerate(inspection.labels[:CLASSES_IN_PAGE]):
        samples: list[str] = []
        for role, values in labels.items():
            rows = np.flatnonzero(values[:, index] if values.ndim == 2 else values == index)
            chosen = rows[np.unique(np.linspace(0, max(0, len(rows) - 1), SAMPLES).astype(int))] if len(rows) else rows
            for row in chosen[: SAMPLES - len(samples)]:
                image = _thumbnail(opened, role, int(row))
                samples += [image] if image else []
        counts = {role: split.classes[name] for role, split in inspection.splits.items()}
        found.append({"name": name, "counts": counts, "samples": samples})
    return found


def _group(opened: Opened, by_row: dict[str, dict[int, int]], group: Duplicates) -> dict[str, Any]:
    images = [{"name": image, "image": _of_name(opened, by_row, image)} for image in group.images[:SAMPLES]]
    return {"kind": group.kind, "images": images}


def _of_name(opened: Opened, by_row: dict[str, dict[int, int]], name: ImageName) -> str | None:
    return _thumbnail(opened, name.split, by_row[name.split][name.row])


def _thumbnail(opened: Opened, role: str, position: int) -> str | None:
    """Return an image as a data URI, None if it cannot be decoded."""
    try:
        image = decode(opened.splits[role][position]["image"], role, position)
    except DataError:
        return None
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
