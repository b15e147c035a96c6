"""Encode labels as class indices."""

import logging
import os
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, IterableDataset, Value

from hfvit.errors import DataError, nearest, one_line
from hfvit.recipe.arguments import MULTI_LABEL, SINGLE_LABEL, DataArguments
from hfvit.utils.files import expand_user
from hfvit.utils.formatting import counted, shortened

SEPARATORS = ("|", ";", ",")  # possible separators of several labels in a string
CLASS_TYPES = ("int", "uint", "string", "large_string", "bool", "float", "double", "null")

logger = logging.getLogger(__name__)


class SingleLabel:
    """One class for each image: targets are class indices `(images,)`."""

    problem_type = SINGLE_LABEL
    separator = None

    def __init__(self, column: str):
        self.name = column

    def describe(self, classes: int) -> str:
        """Describe the label column for the log."""
        return f"{classes} classes from column '{self.name}'"

    def check(self, split: Dataset | IterableDataset, name: str) -> None:
        """Raise `DataError` if split `name` has no such column, or it has no classes."""
        check_column(split, name, "label_column", self.name)
        label = split.features[self.name]
        if not isinstance(label, ClassLabel) and not (
            isinstance(label, Value) and label.dtype.startswith(CLASS_TYPES)
        ):
            raise DataError(f"label_column: column '{self.name}' of split '{name}' must have classes, got {label}.")

    def read(self, split: Dataset) -> list:
        """Return the label of each row, not encoded."""
        return column_values(split, self.name)

    def type_of(self, features: datasets.Features) -> Any:
        """Return the type of a label."""
        return features[self.name]

    def is_unlabeled(self, values: list) -> bool:
        """Return whether no row has a label."""
        return all(value in (None, -1, "") or value != value for value in values)  # also NaN

    def encode(
        self,
        features: datasets.Features,
        raw_labels: dict[str, list],
        names: Mapping[str, str],
        class_names: Sequence[str] | None = None,
    ) -> tuple[list[str], dict[str, np.ndarray]]:
        """Encode labels as class indices, see `encode_labels`.

        Args:
            features: features of the training split.
            raw_labels: labels from `read` by role.
            names: name of the split by role, for messages.
            class_names: names of integer labels, or all possible string labels.

        Returns:
            (class names in the order of the logits, class indices by role).
        """
        labels, indices = encode_labels(features[self.name], raw_labels, names, class_names)
        joined = joined_labels(labels)
        if joined:
            logger.warning(
                "label_column: '%s' is one class; pass --problem_type %s if it is several labels of an image",
                joined,
                MULTI_LABEL,
            )
        return labels, indices

    def hold_out(self, targets: np.ndarray, fraction: float, seed: int) -> np.ndarray:
        """Choose rows to hold out, stratified by class.

        Args:
            targets: class indices `(rows,)`.
            fraction: fraction of the rows to hold out.
            seed: seed of the choice.

        Returns:
            The rows, at least one of each class that has two, and not all of a class.

        Raises:
            ValueError: each class has only one image.
        """
        from sklearn.model_selection import train_test_split  # takes a second, which other data sets do not need

        order = np.arange(len(targets))
        try:
            kept, drawn = train_test_split(order, test_size=fraction, stratify=targets, random_state=seed)
            held_out = _with_all_classes(targets, kept, drawn)
            if len(held_out) == len(drawn):
                return held_out
        except ValueError:  # a class of one image, or fewer images to hold out than classes
            held_out = _some_of_each_class(targets, fraction, seed)
            if not len(held_out):
                raise ValueError("each class has only one image") from None
        logger.info(
            "%d of %d images are held out, one or more of each class that has two", len(held_out), len(targets)
        )
        return held_out

    def folds(self, targets: np.ndarray, count: int, seed: int) -> list[np.ndarray]:
        """Divide rows into folds, stratified by class.

        Args:
            targets: class indices `(rows,)`.
            count: number of folds.
            seed: seed of the order.

        Returns:
            The rows of each fold.

        Raises:
            ValueError: no class has as many images as there are folds.
        """
        from sklearn.model_selection import StratifiedKFold

        counts = np.bincount(targets)
        rare = int(((counts > 0) & (counts < count)).sum())
        if rare:
            logger.warning("folds: %d classes have fewer than %d images, and are not in each fold", rare, count)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # scikit-learn warns of the same
            folds = StratifiedKFold(count, shuffle=True, random_state=seed).split(targets, targets)
            return [held_out for _, held_out in folds]


def _with_all_classes(targets: np.ndarray, kept: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Change the rows to hold out so that each class is in both parts.

    One row of each class that is in one part only moves to the other part.

    Args:
        targets: class indices `(rows,)`, with two or more rows of each class.
        kept: rows to keep, in random order.
        held_out: rows to hold out, in random order.

    Returns:
        The rows to hold out.
    """
    from_kept = _first_of_missing(targets, kept, held_out)
    from_held_out = _first_of_missing(targets, held_out, kept)
    return np.concatenate([held_out[~np.isin(held_out, from_held_out)], from_kept])


def _first_of_missing(targets: np.ndarray, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the first of `rows` of each class that `others` do not have."""
    classes, first = np.unique(targets[rows], return_index=True)
    return rows[first[~np.isin(classes, targets[others])]]


def _some_of_each_class(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose a fraction of the rows of each class.

    It is at least one row, except for a class with only one.

    Args:
        labels: class indices `(rows,)`.
        fraction: fraction of the rows of each class.
        seed: seed of the choice.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    groups = rows_by_class(labels[order])
    return np.concatenate([order[rows[: min(max(1, round(fraction * len(rows))), len(rows) - 1)]] for rows in groups])


def rows_by_class(targets: np.ndarray) -> list[np.ndarray]:
    """Return the rows of each class that has images, in ascending order.

    Args:
        targets: class indices `(rows,)`.
    """
    order = np.argsort(targets, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(targets[order])) + 1)


def joined_labels(labels: Sequence[str]) -> str | None:
    """Return a class name that seems to be several labels, None if there is none.

    It has a separator, and its parts also occur in other class names, or all class names are written as lists.
    """
    if all(map(is_list_text, labels)) and any("," in label for label in labels):
        return next(label for label in labels if "," in label)
    for separator in SEPARATORS:
        parts = {label: {part.strip() for part in label.split(separator)} for label in labels}
        counts = Counter(part for some in parts.values() for part in some)
        joined = [label for label, some in parts.items() if len(some) > 1]
        if joined and all(counts[part] > 1 for label in joined for part in parts[label]):
            return joined[0]
    return None


# Texts that pandas and R write for a missing value. "None" may be a class.
MISSING = ("nan", "na", "n/a", "#n/a", "<na>", "null")


def stands_for_missing(label: str) -> bool:
    """Return whether a class name is a usual text for a missing value."""
    return label.strip().lower() in MISSING


def is_list_text(label: str) -> bool:
    """Return whether a text is a list, as pandas writes a column of lists to CSV."""
    return label.strip().startswith("[") and label.strip().endswith("]")


def similar_names(labels: Sequence[str]) -> tuple[str, str] | None:
    """Return two class names that differ in case or spaces only, None without any.

    Single letters in both cases are different classes, as in data sets of handwriting.
    """
    seen: dict[str, str] = {}
    for label in labels:
        key = "".join(label.casefold().split())
        other = seen.setdefault(key, label)
        if other != label and len(key) > 1:
            return other, label
    return None


TYPO_LENGTH = 5  # smallest length of a name that may have a typo
MOST_ALIKE = 10  # names that differ in the same letter; more are a series, such as of codes
TYPO_RATIO = 5  # smallest ratio of the images of the right name to those of the wrong one


def likely_typos(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Find rare class names that differ in one letter from a more frequent one.

    Names that differ in digits are different classes.

    Args:
        counts: number of images by class name.

    Returns:
        (rare name, frequent name), sorted.
    """
    shortened_names: defaultdict[str, set[str]] = defaultdict(set)
    for name in counts:
        if len(name) >= TYPO_LENGTH and counts[name]:
            for index in range(len(name)):
                shortened_names[name[:index] + name[index + 1 :]].add(name)
            shortened_names[name].add(name)
    pairs = {
        (rare, frequent)
        for names in shortened_names.values() if 1 < len(names) <= MOST_ALIKE
        for rare in names for frequent in names
        if counts[rare] * TYPO_RATIO <= counts[frequent] and _digits(rare) == _digits(frequent)
    }  # fmt: skip
    return sorted(pairs)


def _digits(name: str) -> str:
    return "".join(filter(str.isdigit, name))


def check_column(split: Dataset | IterableDataset, name: str, key: str, column: str) -> None:
    """Raise `DataError` if a split does not have a column.

    Args:
        split: split to check.
        name: name of the split, for messages.
        key: option with the column, for messages.
        column: name of the column.
    """
    if column not in split.features:
        has = ", ".join(split.features)
        raise DataError(
            f"{key}: no column '{column}' in split '{name}', which has {has}.{nearest(column, split.features)}"
        )


def normalized(name: str) -> str:
    """Return a class name in Unicode NFC; file systems and editors differ in it."""
    return unicodedata.normalize("NFC", name)


def _class_name(value: Any) -> Any:
    """Return a label, None for an empty string."""
    if not isinstance(value, str):
        return value
    return normalized(value) if value.strip() else None


def encode_labels(
    feature: Any,
    raw_labels: dict[str, list],
    names: Mapping[str, str],
    class_names: Sequence[str] | None = None,
    rows: Mapping[str, np.ndarray] | None = None,
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Encode labels as class indices.

    Class names are compared in Unicode NFC.

    Args:
        feature: type of the label column: `ClassLabel`, or `Value` of strings, integers, booleans or integral floats.
        raw_labels: labels by role. Without `ClassLabel` and `class_names`, the labels of `train` are the classes.
        names: name of the split by role, for messages.
        class_names: names of integer labels, or all possible string labels.
        rows: row of each label by role, for messages. Default: the position of the label.

    Returns:
        (class names in the order of the logits, class indices by role).

    Raises:
        DataError: a label is missing (null or an empty string), or is not a class.
    """

    def row_of(role: str, place: int) -> int:
        return int(rows[role][place]) if rows else place

    if class_names is not None:
        class_names = list(map(normalized, class_names))
    if not isinstance(feature, ClassLabel):
        raw_labels = {role: list(map(_class_name, values)) for role, values in raw_labels.items()}
    for role, values in raw_labels.items():
        if None in values:
            missing = sum(value is None for value in values)
            row = row_of(role, values.index(None))
            raise DataError(
                f"Split '{names[role]}', row {row}: the label is missing ({counted(missing, 'such row')}). Remove or"
                " label these rows."
            )
    if isinstance(feature, ClassLabel):
        labels = list(map(normalized, feature.names))
        encoded = {role: np.asarray(values, dtype=np.int64) for role, values in raw_labels.items()}
        if class_names is not None:
            labels, encoded = _renamed(labels, encoded, class_names)
    else:
        raw_labels = {role: _whole(values, names[role], partial(row_of, role)) for role, values in raw_labels.items()}
        if any(isinstance(value, str) for values in raw_labels.values() for value in values):
            # A CSV file of one split can have only integers, while that of another has other names, too.
            raw_labels = {role: list(map(str, values)) for role, values in raw_labels.items()}
        labels, encoded = _encode_plain(raw_labels, class_names)
        if class_names is None and (found := list(filter(stands_for_missing, labels))):
            count = sum(raw_labels["train"].count(name) for name in found)
            logger.warning(
                "label_column: classes that may stand for missing labels: %s (%s). Remove these rows if they do.",
                shortened(found),
                counted(count, "label"),
            )
    for role, values in encoded.items():
        wrong = np.flatnonzero((values < 0) | (values >= len(labels)))
        if len(wrong):
            place = int(wrong[0])
            raise DataError(
                f"Split '{names[role]}', row {row_of(role, place)}: label {raw_labels[role][place]!r} is outside the"
                f" {len(labels)} classes ({len(wrong)} such rows). Remove these rows, or choose a split with labels."
            )
    if len(set(labels)) != len(labels):
        raise DataError("label_column: two classes have the same name. Rename one of them.")
    return labels, encoded


def _encode_plain(
    raw_labels: dict[str, list], class_names: list[str] | None
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Encode labels of a column without `ClassLabel`; -1 is for an unknown label."""
    if class_names is None:
        classes = sorted(set(raw_labels["train"]))
        class_names = list(map(str, classes))
    elif all(isinstance(value, int) for values in raw_labels.values() for value in values):
        classes = range(len(class_names))
    else:
        classes = class_names
    index_of = {value: index for index, value in enumerate(classes)}
    encoded = {
        role: np.array([index_of.get(value, -1) for value in values], dtype=np.int64)
        for role, values in raw_labels.items()
    }
    return class_names, encoded


def as_in_training(values: list, own: Any, train: Any, name: str, class_names: Sequence[str] | None = None) -> list:
    """Convert labels of a split to the type of those of the training split.

    Splits that were written one by one can have the classes in another order, or names in place of indices.

    Args:
        values: label of each row, or list of labels.
        own: type of a label in the split.
        train: type of a label in the training split.
        name: name of the split, for messages.
        class_names: class names that the recipe declares.

    Raises:
        DataError: a class of the split is none of the training split.
    """
    is_numbered = isinstance(train, Value) and train.dtype.startswith(("int", "uint"))
    has_names = isinstance(own, ClassLabel) and set(map(normalized, own.names)) == set(class_names or ())
    if is_numbered and has_names:
        train = ClassLabel(names=list(class_names))
    has_indices, to_indices = (isinstance(feature, ClassLabel) for feature in (own, train))
    texts = ("string", "large_string")
    are_names = all(isinstance(f, ClassLabel) or getattr(f, "dtype", None) in texts for f in (own, train))
    if own == train or not are_names or not (has_indices or to_indices):
        return values
    known = {normalized(label): index for index, label in enumerate(train.names)} if to_indices else {}
    unknown = set()

    def convert(value: Any) -> Any:
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if value == -1:
            return value
        if has_indices:
            value = own.names[value] if 0 <= value < len(own.names) else str(value)
        if not to_indices:
            return value
        if normalized(value) not in known:
            unknown.add(value)
        return known.get(normalized(value), -1)

    converted = [list(map(convert, value)) if isinstance(value, list) else convert(value) for value in values]
    if unknown:
        raise DataError(
            f"label_column: the classes of split '{name}' differ from those of the training split"
            f" ({shortened(sorted(unknown))})."
        )
    return converted


def _whole(values: list, name: str, row_of: Callable[[int], int]) -> list:
    """Convert floats to integers."""
    if not any(isinstance(value, float) for value in values):
        return values
    for place, value in enumerate(values):
        if isinstance(value, float) and not value.is_integer():
            raise DataError(f"label_column: split '{name}', row {row_of(place)}: must be an integer, got {value:g}.")
    return [int(value) for value in values]


def _renamed(
    labels: list[str], encoded: dict[str, np.ndarray], class_names: list[str]
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Use `class_names` for classes that are numbers, or reorder the same names."""
    if set(class_names) == set(labels):
        index_of = {name: index for index, name in enumerate(class_names)}
        order = np.array([index_of[label] for label in labels])
        moved = {}
        for role, values in encoded.items():
            known = (values >= 0) & (values < len(labels))
            moved[role] = np.where(known, order[np.where(known, values, 0)], -1)
        return class_names, moved
    if len(class_names) == len(labels) and sorted(labels) == sorted(map(str, range(len(labels)))):
        return _renamed([class_names[int(label)] for label in labels], encoded, class_names)
    raise DataError(
        f"class_names: must be the {len(labels)} classes of the data set ({', '.join(labels[:5])}), got"
        f" {len(class_names)} names ({', '.join(class_names[:5])})."
    )


def read_class_names(data: DataArguments) -> list[str] | None:
    """Return the class names that the recipe declares.

    These are `class_names`, the lines of its text file, or "0", "1", ... for a number of classes, in Unicode NFC.
    """
    if data.class_names is None:
        return None
    names = list(data.class_names)
    if len(names) == 1:
        file = expand_user(names[0])
        is_file = os.path.isfile(file)  # False where `Path.is_file` raises: a name too long, no permission
        if not is_file and names[0].isdecimal() and int(names[0]) > 1:
            return [str(index) for index in range(int(names[0]))]
        if not is_file:
            raise DataError(
                f"class_names: must be two or more names, a text file, or the number of classes, got {names[0]}."
            )
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"class_names: cannot read {names[0]} ({one_line(error)}).") from None
        names = [line.strip() for line in lines if line.strip()]
    names = list(map(normalized, names))
    repeated = next((name for name, count in Counter(names).items() if count > 1), None)
    if repeated is not None:
        raise DataError(f"class_names: must be distinct, got '{repeated}' more than once.")
    return names


def targets_of(split: Dataset) -> np.ndarray:
    """Return class indices `(rows,)` or 0/1 targets `(rows, classes)` of a split.

    Args:
        split: split from `standardize`.
    """
    column = read_column(split, "label")
    if not pa.types.is_fixed_size_list(column.type):
        return np.array(column.to_numpy())  # Arrow memory is read-only
    return column.combine_chunks().flatten().to_numpy().reshape(len(column), column.type.list_size)


def read_column(split: Dataset, name: str) -> pa.ChunkedArray:
    """Return a column as an Arrow array.

    `split[name]` takes up to 37 microseconds a row where it is iterated (datasets 5).
    """
    return split.select_columns([name]).with_format("arrow")[:][name]


def column_values(split: Dataset, name: str) -> list:
    """Return the values of a column as Python objects."""
    column = read_column(split, name)
    if pa.types.is_floating(column.type):  # pandas writes a missing label as NaN
        column = pc.if_else(pc.is_nan(column), None, column)
    if pa.types.is_integer(column.type) and not column.null_count:
        return column.to_numpy().tolist()
    return column.to_pylist()


def class_counts(targets: np.ndarray, classes: int) -> np.ndarray:
    """Count the images of each class, `(classes,)`."""
    return np.bincount(targets, minlength=classes) if targets.ndim == 1 else targets.sum(axis=0, dtype=np.int64)


def is_constant(targets: np.ndarray) -> bool:
    """Return whether all images have the same labels."""
    return bool((targets == targets[:1]).all())


def match_classes(targets: np.ndarray, names: Sequence[str], labels: Sequence[str], where: str) -> np.ndarray:
    """Reorder targets to the classes of a model.

    Names that differ only in their Unicode form are the same class.

    Args:
        targets: class indices `(rows,)`, or 0 and 1 `(rows, classes)`, of a data set.
        names: class names of the data set.
        labels: class names of the model, in the order of the logits.
        where: description of the data set, for messages.

    Returns:
        The targets in the order of `labels`.

    Raises:
        DataError: a class of an image is not a class of the model.
    """
    index_of = {normalized(label): index for index, label in enumerate(labels)}
    places = [index_of.get(normalized(name), -1) for name in names]
    used = np.flatnonzero(class_counts(targets, len(names)))
    missing = [names[index] for index in used if places[index] < 0]
    if missing:
        raise DataError(
            f"{where}: {len(missing)} of its {len(used)} classes are not among the {len(labels)} classes of the model:"
            f" {shortened(missing)}. The model has {shortened(labels)}.{nearest(missing[0], labels)}"
        )
    table = np.array(places, dtype=np.int64)
    if targets.ndim == 1:
        return table[targets]
    matched = np.zeros((len(targets), len(labels)), dtype=targets.dtype)
    matched[:, table[used]] = targets[:, used]
    return matched
