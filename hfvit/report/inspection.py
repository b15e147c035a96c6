"""Describe a data set as text and HTML, with a starting recipe (`hfvit inspect`)."""

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
from hfvit.data.inspect import (
    Duplicates,
    ImageName,
    Inspection,
    LabelCheck,
    Opened,
    inspect_data,
    open_data,
)
from hfvit.data.labels import read_column, targets_of
from hfvit.data.starting_recipe import accelerator, data_size, is_data_set
from hfvit.errors import DataError, printable
from hfvit.evaluation.label_errors import find_label_errors, open_as_trained
from hfvit.metrics.label_errors import WEAK_MODEL
from hfvit.recipe.arguments import DataArguments
from hfvit.recipe.starting import recipe_text, starting_recipe, yaml_line
from hfvit.utils.files import write_text
from hfvit.utils.formatting import aligned, shortened
from hfvit.utils.markup import html_environment

DEFAULT_SEED = 42  # of a recipe
CLASSES_IN_TEXT = 20
CLASSES_IN_PAGE = 200
SAMPLES = 8  # of each class in the page
GROUPS_IN_PAGE = 50
SUSPECTS_IN_PAGE = 60
NAMES_IN_TEXT = 5
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
        The description of the data set, with the starting recipe.

    Raises:
        DataError: the data set has an unknown layout, or cannot be used for training.
        ModelError: the run cannot be loaded.
    """
    opened = open_data(DataArguments(dataset_name=str(dataset), **fields), seed)
    size = data_size(opened)
    has_gpu, has_bf16 = accelerator()
    values = starting_recipe(size, str(dataset), has_gpu=has_gpu, has_bf16=has_bf16, from_scratch=from_scratch)
    options = fields | ({"seed": seed} if seed != DEFAULT_SEED else {})
    values |= options
    text = recipe_text(values, size)
    if recipe:
        _check_not_edited(Path(recipe), text)
    held_out = {key: values[key] for key in ("validation_fraction", "test_split") if key in values}
    if held_out:  # the starting recipe holds out other images than the defaults
        opened = open_data(dataclasses.replace(opened.data, **held_out), seed)
    label_check = None
    if run:
        as_trained = open_as_trained(run, dataset, **fields)
        opened = as_trained or opened
        label_check = find_label_errors(run, opened, as_trained is not None, show_progress)
    inspection = inspect_data(opened, label_check, show_progress)
    inspection.recipe = values
    inspection.command = next_command(str(dataset), from_scratch, recipe, options)
    if recipe:
        write_text(recipe, text)
    if html:
        write_text(html, page(inspection, opened))
    return inspection


def _check_not_edited(recipe: Path, text: str) -> None:
    """Raise `DataError` if `recipe` exists with other content than `text`."""
    try:
        is_edited = recipe.exists() and recipe.read_text(encoding="utf-8") != text
    except ValueError:  # not UTF-8
        is_edited = True
    if is_edited:
        raise DataError(f"--recipe: {recipe} exists with other content. Choose another file, or delete it.")


def next_command(
    dataset: str, from_scratch: bool = False, recipe: str | Path | None = None, fields: Mapping[str, Any] | None = None
) -> str:
    """Return the command that trains on the data set.

    Args:
        dataset: data set as on the command line.
        from_scratch: train without pretrained weights.
        recipe: file with the starting recipe. Default: `hfvit train` creates the recipe.
        fields: other options.
    """
    if recipe:
        return shlex.join(["hfvit", "train", str(recipe)])
    if not is_data_set(dataset):  # a name of the Hub without its owner, which may be that of a recipe
        return f"hfvit inspect {shlex.quote(dataset)} --recipe my_recipe.yaml && hfvit train my_recipe.yaml"
    words = ["hfvit", "train", dataset]
    for key, value in (fields or {}).items():
        texts = value if isinstance(value, list) else [{None: "none", True: "true", False: "false"}.get(value, value)]
        words += [f"--{key}", *map(str, texts)]
    return shlex.join([*words, *(["--from_scratch"] if from_scratch else [])])


# Text


def describe(inspection: Inspection) -> str:
    """Format the result as plain text for a terminal."""
    parts = [_head(inspection), _class_table(inspection)]
    for title, lines in (("Warnings", inspection.warnings), ("Notes", inspection.notes)):
        if lines:
            parts.append("\n".join([f"{title}:", *(f"  - {printable(line)}" for line in lines)]))
    for title, names in (("Cannot be decoded", inspection.unreadable), ("Of one color", inspection.uniform)):
        if names:
            parts.append("\n".join([f"{title}:", *_listed(names)]))
    for title, groups in (
        ("In two splits", inspection.leaks), ("Duplicates with different labels", inspection.conflicts)
    ):  # fmt: skip
        if groups:
            parts.append("\n".join([f"{title}:", *_listed_groups(groups)]))
    if inspection.label_check:
        parts.append(_suspects(inspection.label_check))
    parts.append("\n".join(["Starting recipe:", *(f"  {yaml_line(*item)}" for item in inspection.recipe.items())]))
    parts.append(f"Next: {printable(inspection.command)}")
    return "\n\n".join(parts)


def _head(inspection: Inspection) -> str:
    rows = [
        ("data set", printable(inspection.dataset_name)),
        ("format", printable(inspection.layout)),
        ("columns", printable(f"images from {inspection.image_column}, classes from {inspection.label_columns}")),
    ]
    for role, split in inspection.splits.items():
        source = "" if split.source == role else f" ({printable(split.source)})"
        rows.append((role, f"{split.images:,} images{source}"))
    sizes = inspection.images
    if sizes:
        low, middle, high = zip(sizes.width, sizes.height, strict=True)
        shown = f"{middle[0]}x{middle[1]}"
        if low != high:
            shown = f"{low[0]} to {high[0]} wide, {low[1]} to {high[1]} high, median {shown}"
        rows.append(("pixels", shown))
        rows.append(("modes", _counts(sizes.modes)))
        rows.append(("formats", _counts(sizes.formats)))
    exact = sum(group.kind == "exact" for group in inspection.duplicates)
    near = len(inspection.duplicates) - exact
    rows.append(("duplicates", f"{exact:,} groups of the same file, {near:,} of near duplicates"))
    left_out = {reason: len(names) for reason, names in inspection.left_out.items()}
    if left_out:
        rows.append(("left out", _counts(left_out)))
        rows += [
            ("", printable(f"{reason}: {shortened(names, NAMES_IN_TEXT)}"))
            for reason, names in inspection.left_out.items()
        ]
    return "\n".join(aligned(rows))


def _counts(counts: Mapping[str, int]) -> str:
    return printable(", ".join(f"{name} {count:,}" for name, count in counts.items()))


def _class_table(inspection: Inspection) -> str:
    splits = inspection.splits
    total = {label: sum(split.classes[label] for split in splits.values()) for label in inspection.labels}
    labels = sorted(inspection.labels, key=lambda label: -total[label])
    skipped = max(0, len(labels) - CLASSES_IN_TEXT)
    if skipped:
        labels = [*labels[: CLASSES_IN_TEXT // 2], None, *labels[-CLASSES_IN_TEXT // 2 :]]
    rows = [("class", *splits)]
    for label in labels:
        if label is None:
            rows.append((f"... {skipped:,} more", *("" for _ in splits)))
        else:
            rows.append((printable(label), *(f"{split.classes[label]:,}" for split in splits.values())))
    ratio = f"; the largest has {inspection.imbalance:g} times the training images of the smallest"
    head = f"{len(inspection.labels):,} classes{ratio if inspection.imbalance > 1 else ''}:"
    return "\n".join([head, *(f"  {line}" for line in aligned(rows))])


def _listed(images: list[ImageName]) -> list[str]:
    reasons = [f": {image.reason}" if image.reason else "" for image in images]
    return _first([f"{image.name}{reason}" for image, reason in zip(images, reasons, strict=True)])


def _listed_groups(groups: list[Duplicates]) -> list[str]:
    return _first([f"{group.kind}: {', '.join(map(_with_label, group.images))}" for group in groups])


def _first(lines: list[str]) -> list[str]:
    more = [f"  ... {len(lines) - NAMES_IN_TEXT:,} more"] if len(lines) > NAMES_IN_TEXT else []
    return [*(f"  {printable(line)}" for line in lines[:NAMES_IN_TEXT]), *more]


def _with_label(image: ImageName) -> str:
    return f"{image.name} ({image.split}, {image.label})"


def _suspects(check: LabelCheck) -> str:
    weak = f"; below {WEAK_MODEL:.0%}, a model cannot judge them" if check.agreement < WEAK_MODEL else ""
    head = f"Suspicious labels ({printable(check.source)}; {check.agreement:.0%} of the labels predicted{weak}):"
    rows = [("image", "label", "predicted")]
    for suspect in check.suspects[: 2 * NAMES_IN_TEXT]:
        rows.append(
            (
                printable(suspect.image.name),
                f"{printable(suspect.image.label)} {suspect.label_probability:.2f}",
                f"{printable(suspect.predicted)} {suspect.probability:.2f}",
            )
        )
    if len(rows) == 1:
        return f"{head} none"
    more = len(check.suspects) - 2 * NAMES_IN_TEXT
    return "\n".join([head, *(f"  {line}" for line in aligned(rows)), *([f"  ... {more:,} more"] if more > 0 else [])])


# Page


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
