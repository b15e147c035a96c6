"""Labels of images: find their column, and encode them as class indices."""

import logging
from collections.abc import Sequence

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, IterableDataset, Value
from sklearn.model_selection import train_test_split

from hfvit.data.tables import LABEL_NAMES
from hfvit.errors import DataError, nearest, one_line
from hfvit.recipe.arguments import DataArguments
from hfvit.utils.files import expand_user

CLASS_TYPES = ("int", "uint", "string", "large_string", "bool", "float", "double", "null")

logger = logging.getLogger(__name__)


def find_label_column(features: datasets.Features) -> str:
    """The `ClassLabel` column, or an integer or string column with a usual name."""
    found = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if not found:
        usual = [name for name in LABEL_NAMES if name in features]
        found = [name for name in usual if isinstance(features[name], Value)]
    preferred = [name for name in LABEL_NAMES if name in found]
    if len(found) == 1 or preferred:
        return (preferred or found)[0]
    what = f"several label columns ({', '.join(found)})" if found else f"no label column among {', '.join(features)}"
    raise DataError(f"label_column: the data set has {what}; name the one to use.")


def check_column(split: Dataset | IterableDataset, name: str, key: str, column: str) -> None:
    if column not in split.features:
        has = ", ".join(split.features)
        raise DataError(
            f"{key}: split '{name}' has no column '{column}'; it has {has}.{nearest(column, split.features)}"
        )


def check_classes(split: Dataset | IterableDataset, name: str, column: str) -> None:
    """Raise `DataError` where a column of split `name` does not hold classes."""
    label = split.features[column]
    if not isinstance(label, ClassLabel) and not (isinstance(label, Value) and label.dtype.startswith(CLASS_TYPES)):
        raise DataError(f"label_column: column '{column}' of split '{name}' holds {label}, not classes.")


def encode_labels(
    feature, raw_labels: dict[str, list], names: dict[str, str], class_names: Sequence[str] | None = None
) -> tuple[list[str], dict]:
    """Label names in class order, and each split's labels as class indices.

    Args:
        feature: of the label column: `ClassLabel`, or a `Value` of strings, integers, booleans or whole floats.
        raw_labels: values by role; without `ClassLabel` and `class_names`, those of `train` are the classes.
        names: each role's split, for messages.
        class_names: in the order of integer labels, or all names that string labels may have.

    Raises:
        DataError: a label is missing or no class; its row is named.
    """
    for role, values in raw_labels.items():
        if None in values:
            missing = sum(value is None for value in values)
            raise DataError(
                f"Split '{names[role]}', row {values.index(None)}: the label is missing ({missing:,} such rows)."
            )
    if isinstance(feature, ClassLabel):
        labels = list(feature.names)
        encoded = {role: np.asarray(values, dtype=np.int64) for role, values in raw_labels.items()}
        if class_names is not None:
            labels, encoded = _renamed(labels, encoded, list(class_names))
    else:
        raw_labels = {role: _whole(values, names[role]) for role, values in raw_labels.items()}
        if class_names is None:
            classes = sorted(set(raw_labels["train"]))
        elif all(isinstance(value, int) for values in raw_labels.values() for value in values):
            classes = list(range(len(class_names)))
        else:
            classes = list(class_names)
        labels = [str(value) for value in (classes if class_names is None else class_names)]
        index_of = {value: index for index, value in enumerate(classes)}
        encoded = {role: np.array([index_of.get(v, -1) for v in values]) for role, values in raw_labels.items()}
    for role, values in encoded.items():
        wrong = np.flatnonzero((values < 0) | (values >= len(labels)))
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"Split '{names[role]}', row {row}: label {raw_labels[role][row]!r} is outside the {len(labels)}"
                f" classes ({len(wrong)} such rows). Remove them or choose another split; a split without labels (-1)"
                " can neither train nor test."
            )
    if len(set(labels)) != len(labels):
        raise DataError("Two classes have the same name; rename one of them.")
    return labels, encoded


def _whole(values: list, name: str) -> list:
    """Labels with floats as integers."""
    if not any(isinstance(value, float) for value in values):
        return values
    for row, value in enumerate(values):
        if isinstance(value, float) and not value.is_integer():
            raise DataError(f"label_column: split '{name}', row {row}: {value:g} is not a class. Use whole numbers.")
    return [int(value) for value in values]


def _renamed(
    labels: list[str], encoded: dict[str, np.ndarray], class_names: list[str]
) -> tuple[list[str], dict[str, np.ndarray]]:
    """`class_names` for labels that are numbers, or the same names in another order."""
    if set(class_names) == set(labels):
        order = np.array([class_names.index(label) for label in labels])
        moved = {}
        for role, values in encoded.items():
            known = (values >= 0) & (values < len(labels))
            moved[role] = np.where(known, order[np.where(known, values, 0)], -1)
        return class_names, moved
    if len(class_names) == len(labels) and sorted(labels) == sorted(map(str, range(len(labels)))):
        return _renamed([class_names[int(label)] for label in labels], encoded, class_names)
    raise DataError(
        f"class_names: has {len(class_names)} names ({', '.join(class_names[:5])}), the data set has {len(labels)}"
        f" classes ({', '.join(labels[:5])}). Name the same classes, or leave it out."
    )


def read_class_names(data: DataArguments) -> list[str] | None:
    """`class_names` of the recipe, read from its file where one is named."""
    if data.class_names is None:
        return None
    names = list(data.class_names)
    if len(names) == 1:
        file = expand_user(names[0])
        if not file.is_file():
            raise DataError(f"class_names: there is no file {names[0]}. Give two names or more, or a text file.")
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"class_names: {names[0]} cannot be read ({one_line(error)}).") from None
        names = [line.strip() for line in lines if line.strip()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"class_names: '{twice}' is in it twice. Each class needs a name of its own.")
    return names


def hold_out(
    labels: np.ndarray, fraction: float, seed: int, name: str, role: str = "validation"
) -> tuple[np.ndarray, np.ndarray]:
    """Rows that stay and rows that are held out, stratified by class.

    Args:
        labels: class indices `(rows,)`.
        fraction: of the rows to hold out.
        seed: of the choice.
        name: of the split, for messages.
        role: that the rows are held out for.
    """
    order = np.arange(len(labels))
    try:
        kept, held_out = train_test_split(order, test_size=fraction, stratify=labels, random_state=seed)
    except ValueError:  # a class of one image, or fewer images to hold out than classes
        held_out = _some_of_each_class(labels, fraction, seed)
        kept = np.setdiff1d(order, held_out)
        if not len(held_out) or not len(kept):
            raise DataError(
                f"{role}_fraction: no image of split '{name}' can be held out, because each class has one image only"
                f" ({len(labels)} images). Add images, or name a {role}_split."
            ) from None
        logger.info(
            "%s: %d of %d images are held out, one or more of each class that has two",
            role,
            len(held_out),
            len(labels),
        )
    return np.sort(kept), np.sort(held_out)


def _some_of_each_class(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Rows of a fraction of each class, at least one; a class of one image keeps it.

    Args:
        labels: class indices `(rows,)`.
        fraction: of the rows of each class.
        seed: of the choice.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = []
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        chosen.append(rows[: min(max(1, round(fraction * len(rows))), len(rows) - 1)])
    return np.concatenate(chosen)
