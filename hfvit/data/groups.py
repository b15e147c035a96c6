"""Groups of images that are held out together, such as the images of a patient."""

import logging
from collections.abc import Collection, Mapping

import numpy as np
from datasets import ClassLabel, Dataset, Value

from hfvit.data.labels import check_column, column_values, normalized
from hfvit.errors import DataError
from hfvit.utils.formatting import counted

logger = logging.getLogger(__name__)

# Names of group columns in lower case, without spaces, dashes and underscores.
USUAL_NAMES = ("patient", "patientid", "subject", "subjectid", "groupid", "individual", "individualid")


def usual_group_column(split: Dataset, used: Collection[str | None]) -> str | None:
    """Return a column with a usual name whose values repeat, None without one.

    Args:
        split: training split.
        used: columns with another use, such as the labels.
    """
    for name, feature in split.features.items():
        plain = name.lower().translate(str.maketrans("", "", " -_"))
        if name not in used and plain in USUAL_NAMES and isinstance(feature, Value):
            values = column_values(split, name)
            if 1 < len(set(values)) < len(values):
                return name
    return None


def number_groups(splits: Mapping[str, Dataset], names: Mapping[str, str], column: str) -> dict[str, np.ndarray]:
    """Number the groups of splits.

    Args:
        splits: splits by role.
        names: names of the splits by role, for messages.
        column: column of text or numbers, whose equal values are a group. Spaces around texts and the Unicode form are
            ignored.

    Returns:
        The number of each row's group `(rows,)` by role.

    Raises:
        DataError: there is no such column, or a row has no group.
    """
    known: dict[str, int] = {}
    found = {}
    for role, split in splits.items():
        if role != "train" and column not in split.features:
            logger.warning("%s: split '%s' has no column '%s', so its groups are unknown", role, names[role], column)
            continue
        check_column(split, names[role], "group_column", column)
        feature = split.features[column]
        if not isinstance(feature, Value | ClassLabel):
            raise DataError(f"group_column: column '{column}' must have text or numbers, got {feature}.")
        values = [None if value is None else normalized(str(value).strip()) for value in column_values(split, column)]
        missing = [row for row, value in enumerate(values) if not value]
        if missing:
            raise DataError(
                f"group_column: split '{names[role]}', row {missing[0]}: '{column}' is missing"
                f" ({counted(len(missing), 'such row')}). Pass a value for each row."
            )
        found[role] = np.array([known.setdefault(str(value), len(known)) for value in values])
    return found


def joined_with_files(groups: np.ndarray, files: np.ndarray) -> np.ndarray:
    """Join the groups that have an image file in common.

    Args:
        groups: number of each row's group `(rows,)`.
        files: number of each row's file `(rows,)`.

    Returns:
        The number of each row's joined group `(rows,)`.
    """
    from scipy.sparse import coo_array  # takes a while, which runs without groups do not need
    from scipy.sparse.csgraph import connected_components

    group = np.unique(groups, return_inverse=True)[1]
    file = np.unique(files, return_inverse=True)[1] + group.max() + 1
    nodes = file.max() + 1
    edges = coo_array((np.ones(len(group), bool), (group, file)), shape=(nodes, nodes))
    return connected_components(edges, directed=False)[1][group]


def targets_of_groups(targets: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes of each group.

    Args:
        targets: class indices `(rows,)`, or 0 and 1 `(rows, classes)`.
        groups: number of each row's group `(rows,)`.

    Returns:
        (index of each row's group `(rows,)`, 0 and 1 `(groups, classes)` whether a group has images of a class).
    """
    numbers, group = np.unique(groups, return_inverse=True)
    classes = targets.shape[1] if targets.ndim == 2 else targets.max() + 1
    found = np.zeros((len(numbers), classes), np.uint8)
    if targets.ndim == 2:
        np.maximum.at(found, group, targets)
    else:
        found[group, targets] = 1
    return group, found
