"""Encode multi-label targets: lists, 0/1 columns, strings with a separator."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, IterableDataset, LargeList, List, Value

from hfvit.data.labels import CLASS_TYPES, SEPARATORS, check_column, column_values, encode_labels, is_list_text
from hfvit.data.tables import split_columns
from hfvit.errors import DataError
from hfvit.recipe.arguments import MULTI_LABEL, DataArguments
from hfvit.utils.formatting import counted, shortened

FLAGS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}
FLAG_TYPES = ("bool", "int", "uint", "float", "double", "string", "large_string")

logger = logging.getLogger(__name__)


def list_item(feature: Any) -> Any:
    """Return the type of the items of a list of classes, None for other types."""
    if not isinstance(feature, List | LargeList):
        return None
    item = feature.feature
    is_class = isinstance(item, ClassLabel) or (isinstance(item, Value) and item.dtype.startswith(CLASS_TYPES))
    return item if is_class else None


def as_flag(value: Any) -> bool | None:
    """Convert a value of a 0/1 column to a boolean, None for other values."""
    if isinstance(value, bool | int | float):
        return bool(value) if value in (0, 1) else None
    return FLAGS.get(value.strip().lower()) if isinstance(value, str) else None


def flag_columns(dataset: Dataset, data: DataArguments | None, image_column: str | None) -> tuple[list[str], bool]:
    """Find the columns with only 0 and 1, or false and true.

    Args:
        dataset: training split.
        data: data options of the recipe, or None.
        image_column: column of images.

    Returns:
        (two or more columns or none, whether all others have images, texts, groups or splits).
    """
    others = {image_column, *split_columns(dataset.features)}
    if data:
        others |= {data.text_column, data.group_column}
    found = []
    for name, feature in dataset.features.items():
        if name in others or not isinstance(feature, Value) or not feature.dtype.startswith(FLAG_TYPES):
            continue
        if as_flag(dataset[name][0]) is not None and all(as_flag(value) is not None for value in dataset[name][:]):
            found.append(name)
    found = found if len(found) > 1 else []
    return found, {*found, *others} >= set(dataset.features)


def stratified_rows(targets: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose rows to hold out by iterative stratification.

    Each class has about the same fraction in both parts, and at least one image if it has two or more. The images of
    the rarest class are assigned first (Sechidis et al. 2011, https://doi.org/10.1007/978-3-642-23808-6_10).

    Args:
        targets: 0 and 1, `(rows, classes)`.
        fraction: fraction of the rows to hold out.
        seed: seed of the order of the rows.

    Returns:
        (rows to keep, rows to hold out).

    Raises:
        ValueError: no row can be held out.
    """
    rows = len(targets)
    order = np.random.default_rng(seed).permutation(rows)
    fractions = np.array([1 - fraction, fraction])
    counts = targets.sum(axis=0, dtype=np.int64)
    wanted = fractions[:, None] * counts
    several = counts > 1
    wanted[1, several] = np.maximum(wanted[1, several], 1.0)
    room = fractions * rows
    room[1] = max(1.0, round(room[1]))
    part = np.full(rows, -1)
    left = counts.copy()
    while (left > 0).any():
        rarest = int(np.where(left > 0, left, rows + 1).argmin())
        for row in order[(targets[order, rarest] == 1) & (part[order] < 0)]:
            stays, goes = wanted[:, rarest]
            chosen = int(np.argmax(room)) if stays == goes else int(goes > stays)
            part[row] = chosen
            own = targets[row] == 1
            wanted[chosen, own] -= 1
            room[chosen] -= 1
            left[own] -= 1
    for row in order[part[order] < 0]:  # images of no class
        part[row] = int(np.argmax(room))
        room[part[row]] -= 1
    kept, held_out = np.flatnonzero(part == 0), np.flatnonzero(part == 1)
    if not len(kept) or not len(held_out):
        raise ValueError("each class has only one image or group")
    return kept, held_out


def stratified_folds(targets: np.ndarray, count: int, seed: int) -> list[np.ndarray]:
    """Divide rows into folds by iterative stratification, one fold after the other.

    Args:
        targets: 0 and 1, `(rows, classes)`.
        count: number of folds.
        seed: seed of the order of the rows.

    Returns:
        The rows of each fold, see `stratified_rows`.

    Raises:
        ValueError: there are too few rows.
    """
    rest = np.arange(len(targets))
    folds = []
    for left in range(count, 1, -1):
        kept, held_out = stratified_rows(targets[rest], 1 / left, seed + len(folds))
        folds.append(rest[held_out])
        rest = rest[kept]
    return [*folds, rest]


class MultiLabel:
    """Label columns of a multi-label classification, with 0/1 targets.

    Args:
        columns: one column of lists, single classes or strings with a separator; or several columns of 0 and 1, whose
            names are the classes.
        separator: separator of strings, None for the one of `SEPARATORS` that occurs.
    """

    problem_type = MULTI_LABEL

    def __init__(self, columns: Sequence[str], separator: str | None):
        self.columns = list(columns)
        self.separator = separator

    @property
    def name(self) -> str | list[str]:
        """Return the label column or columns, as in a recipe."""
        return self.columns[0] if len(self.columns) == 1 else self.columns

    def describe(self, classes: int) -> str:
        """Describe the label columns for the log."""
        if len(self.columns) == 1:
            return f"{classes} classes, several for an image, from column '{self.columns[0]}'"
        return f"{classes} classes, several for an image, from the 0/1 columns {shortened(self.columns)}"

    def check(self, split: Dataset | IterableDataset, name: str) -> None:
        """Raise `DataError` if split `name` does not have a column, or it has no labels."""
        for column in self.columns:
            check_column(split, name, "label_column", column)
        kinds = [split.features[column] for column in self.columns]
        if len(kinds) == 1:
            kind = kinds[0]
            known = list_item(kind) is not None or isinstance(kind, ClassLabel)
            known = known or (isinstance(kind, Value) and kind.dtype.startswith(CLASS_TYPES))
            if not known:
                raise DataError(
                    f"label_column: column '{self.columns[0]}' of split '{name}' must have labels, got {kind}."
                )
            if self.separator and not isinstance(kind, Value):
                raise DataError(
                    f"label_separator: column '{self.columns[0]}' of split '{name}' must have strings, got {kind}."
                    " Omit it."
                )
        for column, kind in zip(self.columns, kinds, strict=True):
            if len(kinds) > 1 and not (isinstance(kind, Value) and kind.dtype.startswith((*FLAG_TYPES, "null"))):
                raise DataError(
                    f"label_column: column '{column}' of split '{name}' must have 0 and 1, as one of several label"
                    f" columns, got {kind}."
                )

    def has_names(self, features: Features) -> bool:
        """Return whether the columns have class names."""
        return len(self.columns) > 1 or isinstance(list_item(features[self.columns[0]]), ClassLabel)

    def read(self, split: Dataset) -> list:
        """Return the labels of each row, not encoded."""
        if len(self.columns) == 1:
            return column_values(split, self.columns[0])
        return [list(row) for row in zip(*(column_values(split, column) for column in self.columns), strict=True)]

    def type_of(self, features: Features) -> Any:
        """Return the type of a label, None for 0/1 columns."""
        if len(self.columns) > 1:
            return None
        return list_item(features[self.columns[0]]) or features[self.columns[0]]

    def is_unlabeled(self, values: list) -> bool:
        """Return whether no row has a label."""
        empty = (None, -1, [], "")
        return all(
            value in empty or (isinstance(value, list) and all(item in (None, -1) for item in value))
            for value in values
        )

    def encode(
        self,
        features: Features,
        raw_labels: dict[str, list],
        names: Mapping[str, str],
        class_names: Sequence[str] | None = None,
    ) -> tuple[list[str], dict[str, np.ndarray]]:
        """Encode labels as 0 and 1.

        Args:
            features: features of the training split.
            raw_labels: labels from `read` by role. Without declared classes, the labels of `train` are the classes.
            names: name of the split by role, for messages.
            class_names: names of integers, 0/1 lists or columns, or all possible string labels.

        Returns:
            (class names in the order of the logits, uint8 targets `(images, classes)` by role).

        Raises:
            DataError: a label is missing, or is not a class.
        """
        if len(self.columns) > 1:
            lists = {role: self._flags(rows, names[role]) for role, rows in raw_labels.items()}
            feature = _numbered(len(self.columns), class_names, self.columns)
            class_names = None
        else:
            feature, lists = self._lists(features[self.columns[0]], raw_labels, names)
            width = _width(lists)
            if width and not isinstance(feature, ClassLabel):
                lists = {role: [np.flatnonzero(row).tolist() for row in rows] for role, rows in lists.items()}
                feature = _numbered(width, class_names)
                class_names = None
        flat = {role: [item for row in rows for item in row] for role, rows in lists.items()}
        owners = {role: np.repeat(np.arange(len(rows)), [len(row) for row in rows]) for role, rows in lists.items()}
        labels, indices = encode_labels(feature, flat, names, class_names, owners)
        targets = {}
        for role, rows in lists.items():
            targets[role] = np.zeros((len(rows), len(labels)), dtype=np.uint8)
            targets[role][owners[role], indices[role]] = 1
        return labels, targets

    def hold_out(self, targets: np.ndarray, fraction: float, seed: int) -> np.ndarray:
        """Choose rows to hold out, stratified by class, see `stratified_rows`.

        Args:
            targets: 0/1 targets `(rows, classes)`.
            fraction: fraction of the rows to hold out.
            seed: seed of the selection.
        """
        return stratified_rows(targets, fraction, seed)[1]

    folds = staticmethod(stratified_folds)

    def _flags(self, rows: list[list], name: str) -> list[list[int]]:
        """Convert rows of 0/1 columns to class indices."""
        found = []
        for number, row in enumerate(rows):
            flags = [as_flag(value) for value in row]
            if None in flags:
                column = self.columns[flags.index(None)]
                value = row[flags.index(None)]
                what = "the label is missing" if value is None else f"{value!r} is neither 0 nor 1"
                raise DataError(f"Split '{name}', row {number}: {what} in label column '{column}'. Write 0 or 1.")
            found.append([index for index, flag in enumerate(flags) if flag])
        return found

    def _lists(
        self, feature: Any, raw_labels: dict[str, list], names: Mapping[str, str]
    ) -> tuple[Any, dict[str, list[list]]]:
        """Return the type of one label, and the labels of each row as a list."""
        for role, rows in raw_labels.items():
            _check_not_missing(rows, names[role])
        item = list_item(feature)
        for role, rows in raw_labels.items():
            if any(isinstance(value, list) != (item is not None) for value in rows):
                other = "single labels" if item is not None else "lists"
                raise DataError(
                    f"label_column: column '{self.columns[0]}' of split '{names[role]}' has {other}, unlike that of"
                    " the training split. Write both in the same way."
                )
        if item is not None:
            return item, raw_labels
        if any(isinstance(value, str) for rows in raw_labels.values() for value in rows):
            # A CSV file has integers if all its images have one label, and that is a number.
            texts = {role: list(map(str, rows)) for role, rows in raw_labels.items()}
            self._check_not_lists(texts["train"])
            self.separator = self.separator or _find_separator(texts)
            return Value("string"), {role: _split(rows, self.separator) for role, rows in texts.items()}
        return feature, {role: [[value] for value in rows] for role, rows in raw_labels.items()}

    def _check_not_lists(self, texts: list[str]) -> None:
        """Raise `DataError` if the texts are lists.

        Brackets and quotes would belong to the class names.
        """
        labeled = [text for text in texts if text.strip()]
        if labeled and all(map(is_list_text, labeled)):
            raise DataError(
                f"label_column: '{self.columns[0]}' has lists that are written as text, got {labeled[0][:60]!r}. Join"
                " the labels with '|', or save the table as Parquet or JSON."
            )


def _check_not_missing(rows: list, name: str) -> None:
    missing = [row for row, value in enumerate(rows) if value is None]
    if missing:
        raise DataError(
            f"Split '{name}', row {missing[0]}: the label is missing ({counted(len(missing), 'such row')}). Remove or"
            " label these rows."
        )


def _width(lists: dict[str, list[list]]) -> int | None:
    """Return the length of 0/1 lists, None for lists of classes.

    0/1 lists have the same length of two or more, and only 0 and 1.
    """
    rows = [row for split_rows in lists.values() for row in split_rows]
    width = len(rows[0])
    is_flags = width > 1 and all(
        len(row) == width and all(isinstance(value, bool | int | float) and value in (0, 1) for value in row)
        for row in rows
    )
    return width if is_flags else None


def _numbered(count: int, class_names: Sequence[str] | None, columns: Sequence[str] | None = None) -> ClassLabel:
    """Return the classes of 0/1 lists or columns."""
    names = list(class_names or columns or map(str, range(count)))
    if len(names) != count:
        raise DataError(f"class_names: must have {count} names, one per 0/1 label, got {len(names)}.")
    return ClassLabel(names=names)


def _find_separator(raw_labels: dict[str, list]) -> str | None:
    """Find the separator of labels in strings, None if there is none.

    Raises:
        DataError: several separators occur.
    """
    found = [
        separator
        for separator in SEPARATORS
        if any(separator in value for values in raw_labels.values() for value in values)
    ]
    if len(found) > 1:
        raise DataError(
            f"label_separator: labels contain {' and '.join(map(repr, found))}. Set label_separator to the one between"
            " labels."
        )
    if found:
        logger.info("label_separator: using '%s'", found[0])
    return found[0] if found else None


def _split(rows: list[str], separator: str | None) -> list[list[str]]:
    """Split strings into labels; an empty string has none."""
    parts = [row.split(separator) if separator else [row] for row in rows]
    empty = sum(not row for row in rows)
    if empty:
        logger.info("%d of %d images have an empty label, and so no class", empty, len(rows))
    return [[part.strip() for part in row if part.strip()] for row in parts]
