"""The columns of a split: which hold images, classes and texts, checked and brought to one form."""

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Image, IterableDataset, Value

from hfvit.errors import DataError, nearest

CLASS_TYPES = ("int", "uint", "string", "large_string", "bool")
LABEL_NAMES = ("label", "labels", "fine_label", "target", "class")


def find_image_column(features: datasets.Features) -> str:
    """The one column of type `Image`; `DataError` when there is none or more than one."""
    found = [name for name, feature in features.items() if isinstance(feature, Image)]
    if len(found) == 1:
        return found[0]
    what = f"several image columns ({', '.join(found)})" if found else f"no image column among {', '.join(features)}"
    raise DataError(f"The data set has {what}; name the one to use with image_column.")


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
    raise DataError(f"The data set has {what}; name the one to use with label_column.")


def check_image_column(split: Dataset | IterableDataset, name: str, column: str) -> None:
    _check_column(split, name, "image_column", column)
    if not isinstance(split.features[column], Image):
        raise DataError(f"image_column: column '{column}' of split '{name}' does not hold images.")


def check_columns(
    split: Dataset | IterableDataset, name: str, image_column: str, label_column: str, text_column: str | None = None
) -> None:
    check_image_column(split, name, image_column)
    if text_column is not None:
        _check_text_column(split, name, text_column, label_column)
    _check_column(split, name, "label_column", label_column)
    label = split.features[label_column]
    if not isinstance(label, ClassLabel) and not (isinstance(label, Value) and label.dtype.startswith(CLASS_TYPES)):
        raise DataError(f"label_column: column '{label_column}' of split '{name}' holds {label}, not classes.")


def _check_text_column(split: Dataset, name: str, column: str, label_column: str) -> None:
    _check_column(split, name, "text_column", column)
    text = split.features[column]
    if not isinstance(text, Value) or text.dtype not in ("string", "large_string"):
        raise DataError(f"text_column: column '{column}' of split '{name}' holds {text}, not texts.")
    if column == label_column:
        raise DataError(f"text_column: '{column}' is the label column; a model that reads it has nothing to learn.")


def _check_column(split: Dataset | IterableDataset, name: str, key: str, column: str) -> None:
    if column not in split.features:
        has = ", ".join(split.features)
        raise DataError(
            f"{key}: split '{name}' has no column '{column}'; it has {has}.{nearest(column, split.features)}"
        )


def encode_labels(feature, raw_labels: dict[str, list], names: dict[str, str]) -> tuple[list[str], dict]:
    """Label names in class order, and each split's labels as class indices; a label that is no class names its row.

    `raw_labels` and the indices are by role, `names` gives each role's split.
    """
    for role, values in raw_labels.items():
        if None in values:
            raise DataError(f"Split '{names[role]}', row {values.index(None)}: the label is missing.")
    if isinstance(feature, ClassLabel):
        labels = list(feature.names)
        encoded = {role: np.asarray(values, dtype=np.int64) for role, values in raw_labels.items()}
    else:
        classes = sorted(set(raw_labels["train"]))
        labels = [str(value) for value in classes]
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


def undecoded(split: Dataset, image_column: str, text_column: str | None = None) -> Dataset:
    """Columns `image` (undecoded bytes), `row` (in the data set's split) and, of a `text_column`, `text` only."""
    names = {image_column: "image"} | ({text_column: "text"} if text_column else {})
    table = split.select_columns(list(names)).cast_column(image_column, Image(decode=False))
    changed = {old: new for old, new in names.items() if old != new}
    table = table.rename_columns(changed) if changed else table
    return table.add_column("row", np.arange(len(table)))


def standardise(split: Dataset, image_column: str, labels: np.ndarray, text_column: str | None = None) -> Dataset:
    """Columns `image`, `row`, `text` (see `undecoded`) and `label` (class index) only."""
    return undecoded(split, image_column, text_column).add_column("label", labels.astype(np.int64))
