"""Load train, validation and test splits and check their columns and labels."""

import functools
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Image, IterableDataset, List, ReadInstruction, Value
from PIL import Image as PILImage

from hfvit.data.decode import unreadable_rows
from hfvit.data.folders import BAD_IMAGE, canonical_split, no_split_error
from hfvit.data.groups import joined_with_files, number_groups, targets_of_groups, usual_group_column
from hfvit.data.labels import (
    SingleLabel,
    as_in_training,
    check_column,
    class_counts,
    is_constant,
    read_class_names,
    read_column,
    similar_names,
    targets_of,
)
from hfvit.data.local import LocalData, open_local
from hfvit.data.multilabel import MultiLabel, flag_columns, list_item, stratified_folds, stratified_rows
from hfvit.data.references import check_cards
from hfvit.data.tables import LABEL_NAMES, as_images, root_cause, usual_columns
from hfvit.errors import DataError, RecipeError, nearest, one_line, printable
from hfvit.recipe.arguments import DEFAULT_TEST_SPLIT, MULTI_LABEL, SINGLE_LABEL, DataArguments
from hfvit.utils.formatting import counted, shortened
from hfvit.utils.hub_ids import folder_or_hub_id, is_local

FEW_VALIDATION_IMAGES = 30
HELD_OUT = " held out"  # suffix of `source` of a held-out split

logger = logging.getLogger(__name__)


def find_image_column(features: datasets.Features) -> str:
    """Return the only column of type `Image`; raise `DataError` for none or several."""
    found = [name for name, feature in features.items() if isinstance(feature, Image)]
    if len(found) == 1:
        return found[0]
    problem = f"several image columns ({', '.join(found)})" if found else f"no image column ({shortened([*features])})"
    raise DataError(f"image_column: the data set has {problem}. Pass the one to use.")


def find_label_column(features: datasets.Features) -> str:
    """Return the label column.

    It has the type `ClassLabel`, a list of it, or a usual name and integers, strings or lists.
    """

    def is_class(feature) -> bool:
        return isinstance(feature, ClassLabel) or isinstance(list_item(feature), ClassLabel)

    found = [name for name, feature in features.items() if is_class(feature)]
    if not found:
        usual = usual_columns(features, LABEL_NAMES)
        found = [name for name in usual if isinstance(features[name], Value) or list_item(features[name]) is not None]
    if not found:
        found = [name for name, feature in features.items() if list_item(feature) is not None]
    preferred = usual_columns(found, LABEL_NAMES)
    if len(found) == 1 or preferred:
        return (preferred or found)[0]
    typed = [f"{name}: {features[name]}" for name in usual_columns(features, LABEL_NAMES)]
    others = shortened(typed or [*features])
    problem = f"several label columns ({', '.join(found)})" if found else f"no label column ({others})"
    raise DataError(f"label_column: the data set has {problem}. Pass the one to use.")


def find_labels(
    split: Dataset | IterableDataset, data: DataArguments | None = None, image_column: str | None = None
) -> SingleLabel | MultiLabel:
    """Find the label columns, and whether an image can have several labels.

    Args:
        split: training split.
        data: `label_column`, `problem_type` and `label_separator`. Default: find them by type.
        image_column: column to ignore.

    Returns:
        The labels of a single-label or multi-label classification.

    Raises:
        DataError: the columns are ambiguous, or do not match `problem_type`.
    """
    columns = data.label_columns if data else []
    problem_type = data.problem_type if data else None
    separator = data.label_separator if data else None
    if not columns:
        try:
            columns = [find_label_column(split.features)]
        except DataError as error:
            is_table = isinstance(split, Dataset)
            columns, are_labels = flag_columns(split, data, image_column) if is_table else ([], False)
            if not columns or not are_labels:
                found = f" Columns of 0 and 1 are {', '.join(columns)}: --label_column {' '.join(columns[:3])}."
                raise DataError(f"{error}{found if columns else ''}") from None
    several = len(columns) > 1 or list_item(split.features.get(columns[0])) is not None
    if several and problem_type == SINGLE_LABEL:
        raise DataError(
            f"label_column: '{columns[0]}' has several labels per image, but problem_type is {SINGLE_LABEL}. Omit"
            " problem_type."
        )
    if several or problem_type == MULTI_LABEL or separator:
        return MultiLabel(columns, separator)
    return SingleLabel(columns[0])


def check_image_column(split: Dataset | IterableDataset, name: str, column: str) -> None:
    """Check that a split has an image column.

    Args:
        split: split to check.
        name: name of the split, for messages.
        column: name of the column, which must be of type `Image`.

    Raises:
        DataError: the column does not exist or has another type.
    """
    check_column(split, name, "image_column", column)
    if not isinstance(split.features[column], Image):
        raise DataError(f"image_column: column '{column}' of split '{name}' must have images.")


def check_columns(
    split: Dataset | IterableDataset,
    name: str,
    image_column: str,
    labels: SingleLabel | MultiLabel,
    text_column: str | None = None,
) -> None:
    """Check that the columns exist and have images, labels and texts.

    Args:
        split: split to check.
        name: name of the split, for messages.
        image_column: column of type `Image`.
        labels: labels from `find_labels`.
        text_column: column of texts. Default: images only.

    Raises:
        DataError: a column does not exist or has another type.
    """
    check_image_column(split, name, image_column)
    if text_column is not None:
        _check_text_column(split, name, text_column, labels)
    labels.check(split, name)


def _check_text_column(split: Dataset, name: str, column: str, labels: SingleLabel | MultiLabel) -> None:
    check_column(split, name, "text_column", column)
    text = split.features[column]
    if not isinstance(text, Value) or text.dtype not in ("string", "large_string"):
        raise DataError(f"text_column: column '{column}' of split '{name}' must have strings, got {text}.")
    if column == labels.name:
        raise DataError(f"text_column: must not be the label column, got '{column}'.")


def undecoded(split: Dataset, image_column: str, text_column: str | None = None) -> Dataset:
    """Select the columns `image` (undecoded), `row` and `text`.

    Args:
        split: split with any columns.
        image_column: column of images.
        text_column: column of texts. Default: none.

    Returns:
        A split whose column `row` is the index in `split`.
    """
    names = {image_column: "image"} | ({text_column: "text"} if text_column else {})
    table = split.select_columns(list(names)).cast_column(image_column, Image(decode=False))
    changed = {old: new for old, new in names.items() if old != new}
    table = table.rename_columns(changed) if changed else table
    return table.add_column("row", np.arange(len(table)))


def standardize(split: Dataset, image_column: str, targets: np.ndarray, text_column: str | None = None) -> Dataset:
    """Select the columns of `undecoded`, and add the column `label`.

    Args:
        split: split with any columns.
        image_column: column of images.
        targets: class indices `(rows,)`, or 0 and 1 `(rows, classes)`.
        text_column: column of texts. Default: none.

    Returns:
        A split whose column `label` is the class index, or a list of 0 and 1.
    """
    table = undecoded(split, image_column, text_column)
    if targets.ndim == 1:
        return table.add_column("label", targets.astype(np.int64))
    return table.add_column("label", targets.tolist(), feature=List(Value("uint8"), length=targets.shape[1]))


DIGITS = "digits"


@dataclass
class ImageSplits:
    """The splits of a data set, with the same class indices.

    Attributes:
        train: training split.
        validation: split that selects the checkpoint.
        test: split that is evaluated once, None without one.
        sources: name of the original split of each role, except for a stream.
        whole: complete original split of each role, before images are held out, except for a stream.
        metadata: description of the data set for run.json.
    """

    train: Dataset | IterableDataset
    validation: Dataset | IterableDataset
    test: Dataset | IterableDataset | None
    sources: dict[str, str]
    whole: dict[str, Dataset]
    metadata: dict
    kind: SingleLabel | MultiLabel

    @property
    def labels(self) -> list[str]:
        """Return the class names in the order of the logits."""
        return self.metadata["labels"]

    @property
    def image_column(self) -> str:
        """Return the column of the images."""
        return self.metadata["image_column"]

    @property
    def label_column(self) -> str | list[str]:
        """Return the column or columns of the labels."""
        return self.metadata["label_column"]

    @property
    def problem_type(self) -> str:
        """Return the problem type, as in the configurations of transformers."""
        return self.metadata.get("problem_type", SINGLE_LABEL)

    def __getitem__(self, role: str) -> Dataset | IterableDataset:
        return {"train": self.train, "validation": self.validation, "test": self.test}[role]

    def describe(self) -> str:
        """Return a line with the columns and the number of images of each split."""
        sizes = ", ".join(
            f"{name} {'?' if metadata['rows'] is None else format(metadata['rows'], ',')}"
            for name, metadata in self.metadata["splits"].items()
        )
        return (
            f"{self.metadata['dataset_name']}: images from column '{self.image_column}',"
            f" {self.kind.describe(len(self.labels))}; {sizes} images"
        )


def load_whole_splits(data: DataArguments, seed: int = 42, local: LocalData | None = None) -> ImageSplits:
    """Load and check all splits of a data set completely.

    Without `validation_split`, a split with a usual name is used, or `validation_fraction` of the training split is
    held out, stratified by class. For local images without splits, `test_fraction` is held out, too.

    Args:
        data: data options of the recipe.
        seed: seed of held-out images, and of the images that `max_*_samples` selects.
        local: local data set, if already open.

    Returns:
        The splits.

    Raises:
        DataError: the data set cannot be used for training.
    """
    local = local or open_source(data)
    loaded = {"train": load_split(data, data.train_split, "train_split", local)}
    names = choose_splits(data, split_names(loaded["train"], data, local), local)
    for role, name in names.items():
        if role != "train":
            loaded[role] = load_split(data, name, f"{role}_split", local)
    features = loaded["train"].features
    image_column = data.image_column or find_image_column(features)
    text_column = data.text_column
    kind = find_labels(loaded["train"], data, image_column)
    drop_without_label_column(data, names, loaded, kind)
    for role, split in loaded.items():
        check_columns(split, names[role], image_column, kind, text_column)
    _check_overlap(names, {role: _lengths(split, local) for role, split in loaded.items()})

    raw_labels = {role: kind.read(split) for role, split in loaded.items()}
    _drop_unlabeled(data, names, raw_labels, loaded, kind)
    class_names = read_class_names(data)
    raw_labels = labels_as_in_training(kind, raw_labels, loaded, names, class_names)
    labels, targets = kind.encode(features, raw_labels, names, class_names)
    groups = number_groups(loaded, names, data.group_column) if data.group_column else {}
    labeled = [kind.name] if isinstance(kind.name, str) else kind.name
    usual_group = None if data.group_column else usual_group_column(loaded["train"], (text_column, *labeled))
    commit = dataset_commit(file["filename"] for file in loaded["train"].cache_files)
    loaded = {role: standardize(split, image_column, targets[role], text_column) for role, split in loaded.items()}
    left_out = {role: _left_out(local, names[role]) for role in loaded}
    if local:
        local.log()
    if data.on_bad_image == "skip":
        for role in loaded:
            loaded[role] = skip_bad_images(loaded[role], names[role], left_out[role])
    files = _number_files(loaded, local)
    _warn_about_shared_files(loaded, files)
    whole = dict(loaded)
    sources = {role: names[role] for role in loaded}
    units = files["train"]
    if groups:
        groups = {role: numbers[read_column(loaded[role], "row").to_numpy()] for role, numbers in groups.items()}
        _warn_about_shared_groups(str(data.group_column), groups)
        units = joined_with_files(groups["train"], units)
    held_out = _hold_out_splits(data, seed, local, loaded, names, kind, units)
    if held_out and usual_group:
        logger.warning(
            "%s: images with the same value of column '%s' may be in training and held-out images, so that results are"
            " too good. Pass --group_column %s to hold them out together.",
            " and ".join(held_out), usual_group, usual_group,
        )  # fmt: skip
    for role in held_out:
        sources[role] = data.train_split
        whole[role] = whole["train"]
    if is_constant(targets_of(loaded["train"])):
        raise DataError(f"train_split: must have two or more classes, got only one in '{data.train_split}'.")
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples, "test": data.max_eval_samples}
    loaded = {role: at_most(split, limits[role], seed) for role, split in loaded.items()}

    roles = [role for role in ("train", "validation", "test") if role in loaded]
    shown = {role: (names[role], len(loaded[role]), loaded[role]._fingerprint) for role in roles}
    metadata = data_metadata(data, commit, image_column, kind, labels, shown)
    for role, fraction in held_out.items():
        metadata["splits"][role]["held_out"] = fraction
    for role, counts in left_out.items():
        if counts:
            metadata["splits"][role]["left_out"] = counts
    if local and local.left_out.counts():
        metadata["left_out"] = local.left_out.counts()
    return ImageSplits(
        train=loaded["train"],
        validation=loaded["validation"],
        test=loaded.get("test"),
        sources={role: sources[role] for role in loaded},
        whole=whole,
        metadata=metadata,
        kind=kind,
    )


def open_source(data: DataArguments) -> LocalData | None:
    """Open a local data set, None for digits and for data sets that `datasets` loads."""
    return None if data.dataset_name == DIGITS else open_local(data)


def choose_splits(data: DataArguments, available: Sequence[str], local: LocalData | None) -> dict[str, str]:
    """Choose the splits for training, validation and test.

    Args:
        data: data options of the recipe. Without `validation_split`, a split with a usual name is used; the default
            `test_split` may be missing.
        available: names of the splits, empty if unknown.
        local: local data set, whose `validation` can be called `val`, or None.

    Returns:
        The name of the split by role.

    Raises:
        DataError: there are several validation splits.
    """
    resolve = local.resolve if local else str
    names = {"train": resolve(data.train_split)}
    taken = [names["train"], *([resolve(data.test_split)] if data.test_split else [])]
    bases = {part.split("[")[0] for name in taken for part in name.split("+")}
    if data.validation_split:
        names["validation"] = resolve(data.validation_split)
    else:
        usual = [name for name in available if canonical_split(name) == "validation" and name not in bases]
        if len(usual) > 1:
            raise DataError(f"validation_split: there are several ({', '.join(usual)}). Pass one.")
        if usual and data.folds:
            logger.info("validation: split '%s' of the data set is not used with folds", usual[0])
        elif usual:
            names["validation"] = usual[0]
            logger.info("validation: split '%s' of the data set; validation_fraction is not used", usual[0])
    if data.test_split == DEFAULT_TEST_SPLIT:
        if DEFAULT_TEST_SPLIT not in available:
            return names
        if DEFAULT_TEST_SPLIT in names.values():
            role = next(role for role, name in names.items() if name == DEFAULT_TEST_SPLIT)
            logger.warning("test: none, because split '%s' is the %s split", DEFAULT_TEST_SPLIT, role)
            return names
    if data.test_split:
        names["test"] = resolve(data.test_split)
    return names


def split_names(train: Dataset, data: DataArguments, local: LocalData | None) -> list[str]:
    """Return the names of all splits of the data set.

    Args:
        train: training split.
        data: data options of the recipe.
        local: local data set. Default: loaded by `datasets`.
    """
    if data.dataset_name == DIGITS:
        return list(digits())
    return list(local.splits) if local else list(train.info.splits or {})


def _lengths(split: Dataset, local: LocalData | None) -> dict[str, int]:
    if local:
        return local.lengths()
    return {name: info.num_examples for name, info in (split.info.splits or {}).items()}


def _check_overlap(names: Mapping[str, str], lengths: Mapping[str, Mapping[str, int]]) -> None:
    """Raise `DataError` if two splits overlap.

    Args:
        names: split or slice by role.
        lengths: number of rows by role and original split.
    """
    ranges: dict[str, list] = {}
    for role, name in names.items():
        try:
            ranges[role] = ReadInstruction.from_spec(name).to_absolute(dict(lengths[role]))
        except (ValueError, AttributeError):
            continue  # a name that `datasets` does not parse, such as night-shots
    order = list(ranges)
    for index, role in enumerate(order):
        for other in order[:index]:
            common = sum(
                max(0, min(a.to, b.to) - max(a.from_, b.from_))
                for a in ranges[role] for b in ranges[other] if a.splitname == b.splitname
            )  # fmt: skip
            if common:
                raise DataError(
                    f"{role}_split: '{names[role]}' has {common:,} images in common with {other}_split"
                    f" '{names[other]}'. Pass slices that do not overlap, such as train[:90%] and train[90%:]."
                )


def _default_roles(data: DataArguments) -> list[str]:
    """Return the roles whose splits the recipe does not name."""
    chosen = {"validation": data.validation_split is None, "test": data.test_split == DEFAULT_TEST_SPLIT}
    return [role for role, is_default in chosen.items() if is_default]


def drop_without_label_column(
    data: DataArguments,
    names: dict[str, str],
    loaded: dict[str, Dataset] | dict[str, IterableDataset],
    kind: SingleLabel | MultiLabel,
) -> None:
    """Remove splits without label column that the recipe does not name.

    The test files of competitions have none. One with another usual name is kept, and so an error later.

    Args:
        data: data options of the recipe.
        names: names of the splits by role, changed in place.
        loaded: splits by role, changed in place.
        kind: labels from `find_labels`.
    """
    columns = {kind.name} if isinstance(kind.name, str) else set(kind.name)
    for role in _default_roles(data):
        found = loaded[role].features if role in loaded else columns
        if columns.isdisjoint(found) and not usual_columns(found, LABEL_NAMES):
            logger.warning("%s: split '%s' has no label column and is not used", role, names[role])
            del names[role], loaded[role]


def _drop_unlabeled(
    data: DataArguments,
    names: dict[str, str],
    raw_labels: dict[str, list],
    loaded: dict[str, Dataset],
    kind: SingleLabel | MultiLabel,
) -> None:
    """Remove a validation or test split without labels that the recipe does not name.

    Args:
        data: data options of the recipe.
        names: names of the splits by role, changed in place.
        raw_labels: labels by role, changed in place.
        loaded: splits by role, changed in place.
        kind: labels from `find_labels`.
    """
    for role in _default_roles(data):
        if role in loaded and kind.is_unlabeled(raw_labels[role]):
            logger.warning("%s: split '%s' has no labels and is not used", role, names[role])
            for known in (names, raw_labels, loaded):
                del known[role]


def labels_as_in_training(
    kind: SingleLabel | MultiLabel,
    raw_labels: Mapping[str, list],
    loaded: Mapping[str, Dataset | IterableDataset],
    names: Mapping[str, str],
    class_names: Sequence[str] | None,
) -> dict[str, list]:
    """Convert the labels of all splits to the type of the labels of `train`.

    Args:
        kind: labels from `find_labels`.
        raw_labels: labels by role.
        loaded: splits by role.
        names: names of the splits by role, for messages.
        class_names: class names that the recipe declares, or None.
    """
    train = kind.type_of(loaded["train"].features)
    return {
        role: as_in_training(values, kind.type_of(loaded[role].features), train, names[role], class_names)
        for role, values in raw_labels.items()
    }


def _left_out(local: LocalData | None, name: str) -> dict[str, int]:
    """Return the number of files that are left out of a split, by reason."""
    return local.left_out.counts(local.resolve(name).split("[")[0]) if local else {}


def skip_bad_images(split: Dataset, name: str, left_out: dict[str, int]) -> Dataset:
    """Remove the images that cannot be decoded, and log them.

    Args:
        split: columns `image` (undecoded) and `row`.
        name: name of the split.
        left_out: number of left out files by reason; the number of removed images is added.

    Returns:
        The split without these images.

    Raises:
        DataError: no image can be decoded.
    """
    bad = unreadable_rows(split, name)
    if not bad:
        return split
    if len(bad) == len(split):
        raise DataError(f"on_bad_image: none of the {len(split):,} images of split '{name}' can be decoded.")
    shown = "; ".join(list(bad.values())[:3]) + ("; ..." if len(bad) > 3 else "")
    logger.warning("%s: skipped %d of %d images that cannot be decoded: %s", name, len(bad), len(split), shown)
    left_out[BAD_IMAGE] = len(bad)
    return split.select([row for row in range(len(split)) if row not in bad])


def _hold_out_splits(
    data: DataArguments,
    seed: int,
    local: LocalData | None,
    loaded: dict[str, Dataset],
    names: dict[str, str],
    kind: SingleLabel | MultiLabel,
    units: np.ndarray,
) -> dict[str, float]:
    """Hold out validation and test images if the data set has no such splits.

    The choice depends only on the data and the seed, not on whether the test images are used. Rows of the same file
    or group stay together.

    Args:
        data: data options of the recipe.
        seed: seed of the choice.
        local: local data set. Default: loaded by `datasets`.
        loaded: splits by role, changed in place.
        names: names of the splits by role, changed in place.
        kind: labels from `find_labels`, for the stratification.
        units: number of the file or group of each training row.

    Returns:
        The fraction of the training split by role.
    """
    fractions = _held_out_fractions(data, local, loaded)
    whole = loaded["train"]
    all_units = units
    for role, fraction in fractions.items():
        train = loaded["train"]
        remaining = 1.0 if len(fractions) == 1 or role == "validation" else 1 - fractions["validation"]
        targets = targets_of(train)
        try:
            if data.group_column:
                unit, group_targets = targets_of_groups(targets, units)
                _, held_out = stratified_rows(group_targets, fraction / remaining, seed)
            else:
                first, unit = _first_rows(units)
                held_out = kind.hold_out(targets[first], fraction / remaining, seed)
        except ValueError as error:
            raise DataError(
                f"{role}_fraction: no image of split '{data.train_split}' can be held out, because {error}"
                f" ({len(train)} images). Add images, or pass a {role}_split."
            ) from None
        is_held_out = np.isin(unit, held_out)
        loaded["train"] = train.select(np.flatnonzero(~is_held_out))
        units = units[~is_held_out]
        loaded[role] = train.select(np.flatnonzero(is_held_out))
        names[role] = f"{data.train_split}, {fraction:g}{HELD_OUT}"
    if data.fold is not None:
        # The test images are those of a run without folds.
        rest = np.ones(len(whole), bool)
        if "test" in fractions:
            rest = ~_is_in(whole, loaded["test"])
        loaded["train"], loaded["validation"] = _hold_out_fold(
            data, seed, whole.select(np.flatnonzero(rest)), kind, all_units[rest]
        )
        names["validation"] = f"{data.train_split}, fold {data.fold} of {data.folds}{HELD_OUT}"
        fractions["validation"] = 1 / data.folds
    if data.group_column:
        for role in fractions:
            held_out = all_units[_is_in(whole, loaded[role])]
            logger.info(
                "%s: %d of %d images are held out, those of %d of %d groups",
                role, len(held_out), len(whole), len(np.unique(held_out)), len(np.unique(all_units)),
            )  # fmt: skip
    if "test" in fractions and data.test_split is None:
        logger.info(
            "test_fraction: %d images are held out and not evaluated, because there is no test_split",
            len(loaded.pop("test")),
        )
        del names["test"], fractions["test"]
    return fractions


def _held_out_fractions(
    data: DataArguments, local: LocalData | None, loaded: Mapping[str, Dataset]
) -> dict[str, float]:
    """Return the fraction of the training split to hold out for each role.

    The validation images of a fold are not included.

    Args:
        data: data options of the recipe.
        local: local data set. Default: loaded by `datasets`.
        loaded: splits by role.
    """
    fractions: dict[str, float] = {}
    if "validation" not in loaded:
        fractions["validation"] = data.validation_fraction
    if local and not local.is_split and "test" not in loaded and "[" not in data.train_split:
        if data.held_out_for_test:
            fractions["test"] = data.held_out_for_test
    elif data.test_fraction and data.test_split:
        logger.warning(
            "test_fraction: ignored, as it applies to local images without splits and a whole train_split only"
        )
    if sum(fractions.values()) >= 1:
        raise RecipeError(
            "test_fraction: validation_fraction and test_fraction must be below 1 together, got"
            f" {fractions['validation']:g} and {fractions['test']:g}. Decrease one of them."
        )
    if data.fold is not None and "test" not in fractions:
        del fractions["validation"]
    return fractions


def _is_in(split: Dataset, other: Dataset) -> np.ndarray:
    """Return whether each row of `split` is in `other`, a selection of it, `(rows,)`."""
    rows, others = (read_column(part, "row").to_numpy() for part in (split, other))
    return np.isin(rows, others)


def _hold_out_fold(
    data: DataArguments, seed: int, split: Dataset, kind: SingleLabel | MultiLabel, units: np.ndarray
) -> tuple[Dataset, Dataset]:
    """Return the images outside and inside the fold of a recipe.

    Args:
        data: data options of the recipe, with `folds` and `fold`.
        seed: seed of the folds.
        split: images of all folds.
        kind: labels from `find_labels`, for the stratification.
        units: number of the file or group of each row.
    """
    targets = targets_of(split)
    try:
        if data.group_column:
            unit, group_targets = targets_of_groups(targets, units)
            held_out = stratified_folds(group_targets, data.folds, seed)[data.fold]
        else:
            first, unit = _first_rows(units)
            held_out = kind.folds(targets[first], data.folds, seed)[data.fold]
    except ValueError as error:
        raise DataError(
            f"folds: split '{data.train_split}' cannot be divided into {data.folds} folds ({one_line(error)}). Use"
            " fewer folds."
        ) from None
    is_held_out = np.isin(unit, held_out)
    return split.select(np.flatnonzero(~is_held_out)), split.select(np.flatnonzero(is_held_out))


def _first_rows(files: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first row of each file, and the index of each row's file."""
    _, first, index = np.unique(files, return_index=True, return_inverse=True)
    return first, index


def _number_files(splits: Mapping[str, Dataset], local: LocalData | None) -> dict[str, np.ndarray]:
    """Number the image files of splits, in the order of their first rows.

    Args:
        splits: splits from `standardize` by role.
        local: local data set, with its links.

    Returns:
        The number of each row's file `(rows,)` by role. Images that are not in files have negative numbers.
    """
    links = local.links if local else {}
    known: dict[Any, int] = {}
    found: dict[str, np.ndarray] = {}
    for role, split in splits.items():
        # Of all rows before a selection, so that bytes are not copied.
        if not any(chunk.field("bytes").null_count for chunk in split.data.column("image").chunks):
            end = -sum(map(len, found.values()))
            found[role] = np.arange(end - len(split), end)
            continue
        keys = []
        for chunk in read_column(split, "image").chunks:
            has_bytes = chunk.field("bytes").is_valid().to_pylist()
            for path, is_embedded in zip(chunk.field("path").to_pylist(), has_bytes, strict=True):
                has_file = path is not None and not is_embedded
                keys.append(_normalized_path(links.get(path, path)) if has_file else (role, len(keys)))
        found[role] = np.array([known.setdefault(key, len(known)) for key in keys])
    return found


def _normalized_path(path: str) -> str:
    """Normalize a path, fast for one that is normalized."""
    return os.path.normpath(path) if "./" in path or "//" in path else path


def _warn_about_shared_files(splits: Mapping[str, Dataset], files: Mapping[str, np.ndarray]) -> None:
    """Warn about image files in several rows of a split, or in `train` and another.

    Args:
        splits: splits from `standardize` by role.
        files: number of each row's file by role, from `_number_files`.
    """
    for role, split in splits.items():
        repeated = np.setdiff1d(np.arange(len(split)), _first_rows(files[role])[0])
        if len(repeated):
            logger.warning(
                "%s: %d of %d rows have the image file of an earlier row, such as %s",
                role,
                len(repeated),
                len(split),
                _file_name(split, repeated[0]),
            )
        shared = np.flatnonzero(np.isin(files[role], files["train"])) if role != "train" else ()
        if len(shared):
            logger.warning(
                "%s: %d of %d rows have an image file of the training split, such as %s. Its results are too good.",
                role,
                len(shared),
                len(split),
                _file_name(split, shared[0]),
            )


def _warn_about_shared_groups(column: str, groups: Mapping[str, np.ndarray]) -> None:
    """Warn about groups that are in `train` and another split.

    Args:
        column: column of the groups.
        groups: number of each row's group by role.
    """
    for role, numbers in groups.items():
        shared = int(np.isin(numbers, groups["train"]).sum()) if role != "train" else 0
        if shared:
            logger.warning(
                "%s: %d of %d rows have a value of column '%s' that is in the training split, too. Its results are too"
                " good.",
                role, shared, len(numbers), column,
            )  # fmt: skip


def _file_name(split: Dataset, row: int) -> str:
    return printable(split[int(row)]["image"]["path"])


def warn_about_sizes(splits: ImageSplits) -> None:
    """Warn about few validation images, classes without images, and similar names."""
    labels = splits.labels
    if similar := similar_names(labels):
        logger.warning("train: the classes %r and %r differ in case or spaces only", *similar)
    counts = {role: class_counts(targets_of(splits[role]), len(labels)) for role in splits.sources}
    if "train" in counts:
        missing = [labels[index] for index in np.flatnonzero(counts["train"] == 0)]
        if missing:
            logger.warning("train: %d of %d classes have no images: %s", len(missing), len(labels), shortened(missing))
        single = [labels[index] for index in np.flatnonzero(counts["train"] == 1)]
        if single:
            logger.warning("train: %d of %d classes have one image: %s", len(single), len(labels), shortened(single))
    if "validation" not in counts:
        return
    validation = counts["validation"]
    images = len(splits["validation"])
    if images < FEW_VALIDATION_IMAGES:
        logger.warning(
            "validation: only %s to select the checkpoint. With fewer than %d, the selection is mostly random.",
            counted(images, "image"),
            FEW_VALIDATION_IMAGES,
        )
    present = counts["train"] > 0 if "train" in counts else np.ones(len(labels), dtype=bool)
    missing = [labels[index] for index in np.flatnonzero((validation == 0) & present)]
    if missing:
        logger.warning(
            "validation: %d of %d classes have no images: %s", len(missing), len(labels), shortened(missing)
        )


def data_metadata(
    data: DataArguments,
    commit: str | None,
    image_column: str,
    kind: SingleLabel | MultiLabel,
    labels: list[str],
    splits: dict[str, tuple[str, int | None, str]],
) -> dict:
    """Describe a data set for run.json.

    Args:
        data: name, configuration and revision of the data set.
        commit: commit of a data set on the Hub, None otherwise.
        image_column: column of the images.
        kind: labels from `find_labels`.
        labels: class names in the order of the logits.
        splits: (source, number of rows or None if unknown, fingerprint) by role.
    """
    name = data.dataset_name
    here = name != DIGITS and is_local(name)
    columns = {"image_column": image_column, "label_column": kind.name}
    if data.text_column:
        columns["text_column"] = data.text_column
    if kind.problem_type != SINGLE_LABEL:
        columns["problem_type"] = kind.problem_type
    return {
        "dataset_name": name,
        "is_local": here,
        "dataset_config_name": data.dataset_config_name,
        "dataset_revision": data.dataset_revision,
        "dataset_commit": None if here else commit,
        **columns,
        "labels": labels,
        "splits": {
            role: {"source": source, "rows": rows, "fingerprint": fingerprint}
            for role, (source, rows, fingerprint) in splits.items()
        },
    }


def load_split(data: DataArguments, split: str, option: str = "split", local: LocalData | None = None) -> Dataset:
    """Load one split of a data set.

    Args:
        data: data options of the recipe, whose splits are ignored.
        split: split, slice, or sum of them, as in `datasets.load_dataset`.
        option: option with the split, for messages.
        local: local data set, if already open.

    Returns:
        The rows of the split; images in files are not decoded.

    Raises:
        DataError: the split does not exist, is empty or cannot be loaded.
    """
    name = data.dataset_name
    if name == DIGITS:
        splits = digits()
        if split not in splits:
            raise no_split_error(option, f"'{DIGITS}'", split, splits)
        return splits[split]
    local = local or open_source(data)
    if local:
        return local.load(split, option)
    origin = folder_or_hub_id(name, DataError, "dataset_name")
    check_cards(origin, data.allow_outside_paths, data.dataset_revision)
    try:
        # datasets 5 does not run code of a data set.
        dataset = datasets.load_dataset(origin, data.dataset_config_name, split=split, revision=data.dataset_revision)
    except Exception as error:
        raise not_loaded_error(data, split, error, option) from error
    if not isinstance(dataset, Dataset):
        raise DataError(f"{option}: must be one split, got '{split}' of {name}.")
    if len(dataset) == 0:
        raise DataError(f"{option}: split '{split}' of {name} is empty.")
    return images_of_rows(dataset, data, split)


def images_of_rows(dataset: Dataset, data: DataArguments, split: str) -> Dataset:
    """Convert an image column of bytes to images, and check that rows have no paths.

    Args:
        dataset: result of `datasets.load_dataset`.
        data: `image_column` and `allow_outside_paths`.
        split: name of the split, for messages.

    Returns:
        The converted rows.

    Raises:
        DataError: a row has a path.
    """
    if is_folder_builder(dataset.builder_name):
        return dataset  # datasets found the files itself
    found = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    column = data.image_column or (found[0] if len(found) == 1 else None)
    if column is None:
        return dataset
    converted = as_images(dataset, column, split, None, data.allow_outside_paths)
    return dataset if column in found else converted


def is_folder_builder(name: str | None) -> bool:
    """Return whether a builder of `datasets` only reads paths that it found itself."""
    return name == "imagefolder"  # not webdataset, whose archives may contain any path


def dataset_commit(files: Iterable[str]) -> str | None:
    """Return the Hub commit in the paths of cached files, None without one."""
    found = (re.search(r"[/\\]([0-9a-f]{40})(?:[/\\]|$)", file) for file in files)
    return next((match[1] for match in found if match), None)


def not_loaded_error(data: DataArguments, split: str, error: Exception, option: str) -> DataError:
    """Create the error for a split that `datasets` cannot load.

    Args:
        data: data options of the recipe.
        split: split that cannot be loaded.
        error: exception of `datasets`.
        option: option with the split.
    """
    name = data.dataset_name
    cause = root_cause(error)
    reason = one_line(error)
    if "corresponds to no data" in reason:  # message of datasets for an empty slice or table
        return DataError(f"{option}: split '{split}' of {name} is empty.")
    try:
        available = datasets.get_dataset_split_names(name, data.dataset_config_name)
    except Exception:
        available = None
    plain = split.split("[")[0]
    if available and plain not in available:
        return no_split_error(option, name, split, available)
    folders = [path.name for path in Path().iterdir() if os.path.isdir(path)] if "/" not in name else []
    hint = nearest(name, folders)
    no_folder = "" if is_local(name) else f"no local folder {name}, and "
    return DataError(
        f"dataset_name: {no_folder}split '{split}' of {name} cannot be loaded ({type(cause).__name__}:"
        f" {one_line(cause)}).{hint}"
    )


@functools.cache
def digits() -> dict[str, Dataset]:
    """Load scikit-learn's 1,797 digits (8x8) as splits train (80 %) and test (20 %)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    features = datasets.Features({"image": Image(), "label": ClassLabel(names=[str(n) for n in bunch.target_names])})
    train, test = train_test_split(np.arange(len(pixels)), test_size=0.2, stratify=bunch.target, random_state=0)
    return {
        split: Dataset.from_dict(
            {"image": [PILImage.fromarray(pixels[i]) for i in rows], "label": bunch.target[rows].tolist()},
            features=features,
        )
        for split, rows in (("train", np.sort(train)), ("test", np.sort(test)))
    }


def at_most(split: Dataset, limit: int | None, seed: int) -> Dataset:
    """Select a random subset of a split.

    Args:
        split: split to reduce.
        limit: largest number of rows, None for no limit.
        seed: seed of the choice.

    Returns:
        The rows in their original order.
    """
    if limit is None or limit >= len(split):
        return split
    rows = np.random.default_rng(seed).permutation(len(split))[:limit]
    return split.select(np.sort(rows))
