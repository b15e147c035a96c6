"""Load train, validation and test splits and check their columns and labels."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Image, IterableDataset, Value
from PIL import Image as PILImage
from sklearn.model_selection import train_test_split

from hfvit.errors import DataError, nearest, one_line
from hfvit.recipe.arguments import DataArguments
from hfvit.utils.hub_ids import folder_or_hub_id, is_local

CLASS_TYPES = ("int", "uint", "string", "large_string", "bool")
LABEL_NAMES = ("label", "labels", "fine_label", "target", "class")


def find_image_column(features: datasets.Features) -> str:
    """The one column of type `Image`; `DataError` when there is none or more than one."""
    found = [name for name, feature in features.items() if isinstance(feature, Image)]
    if len(found) == 1:
        return found[0]
    what = f"several image columns ({', '.join(found)})" if found else f"no image column among {', '.join(features)}"
    raise DataError(f"image_column: the data set has {what}; name the one to use.")


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


def check_image_column(split: Dataset | IterableDataset, name: str, column: str) -> None:
    _check_column(split, name, "image_column", column)
    if not isinstance(split.features[column], Image):
        raise DataError(f"image_column: column '{column}' of split '{name}' does not hold images.")


def check_columns(
    split: Dataset | IterableDataset, name: str, image_column: str, label_column: str, text_column: str | None = None
) -> None:
    """Check that the columns exist and hold images, classes and texts.

    Args:
        split: one split of a data set.
        name: of the split, for messages.
        image_column: must be of type `Image`.
        label_column: must hold classes.
        text_column: must hold texts; None for images alone.

    Raises:
        DataError: names the option of the column that cannot be used.
    """
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


DIGITS = "digits"


@dataclass
class ImageSplits:
    """The three splits of one data set, in one label order.

    `sources` names the data set's split behind each role, and `whole` is that split before anything was held out. A
    streamed train split (stream_source.py) is in neither: it is nowhere as a whole.
    """

    train: Dataset | IterableDataset
    validation: Dataset
    test: Dataset | None
    sources: dict[str, str]
    whole: dict[str, Dataset]
    facts: dict

    @property
    def labels(self) -> list[str]:
        """Class names in the order of the logits."""
        return self.facts["labels"]

    @property
    def image_column(self) -> str:
        return self.facts["image_column"]

    @property
    def label_column(self) -> str:
        return self.facts["label_column"]

    def __getitem__(self, role: str) -> Dataset | IterableDataset:
        return {"train": self.train, "validation": self.validation, "test": self.test}[role]

    def describe(self) -> str:
        """One line for the log: which columns were taken, and how many images each split has."""
        sizes = ", ".join(
            f"{name} {'?' if facts['rows'] is None else format(facts['rows'], ',')}"
            for name, facts in self.facts["splits"].items()
        )
        return (
            f"{self.facts['dataset_name']}: images from column '{self.image_column}', {len(self.labels)} classes from"
            f" column '{self.label_column}'; {sizes} images"
        )


def load_whole_splits(data: DataArguments, seed: int = 42) -> ImageSplits:
    """Load and check the splits of a data set, the training split included.

    The test split selects nothing: without `validation_split`, `validation_fraction` of train is held out, stratified
    by class.

    Args:
        data: the data set, its columns, its splits and their limits.
        seed: of the rows that are held out, and of those that the limits choose.

    Raises:
        DataError: for anything a training could not use.
    """
    names = {"train": data.train_split, "validation": data.validation_split, "test": data.test_split}
    loaded = {
        role: load_split(data.dataset_name, data.dataset_config_name, data.dataset_revision, name)
        for role, name in names.items()
        if name
    }
    features = loaded["train"].features
    image_column = data.image_column or find_image_column(features)
    label_column = data.label_column or find_label_column(features)
    text_column = data.text_column
    for role, split in loaded.items():
        check_columns(split, names[role], image_column, label_column, text_column)

    raw_labels = {role: split[label_column][:] for role, split in loaded.items()}
    labels, indices = encode_labels(features[label_column], raw_labels, names)
    commit = dataset_commit(file["filename"] for file in loaded["train"].cache_files)
    loaded = {role: standardise(split, image_column, indices[role], text_column) for role, split in loaded.items()}
    if len(np.unique(indices["train"])) < 2:
        raise DataError(f"train_split: '{data.train_split}' holds one class only; a classifier needs two or more.")

    sources = {role: names[role] for role in loaded}
    whole = dict(loaded)
    if "validation" not in loaded:
        sources["validation"] = data.train_split
        whole["validation"] = loaded["train"]
        kept, held_out = _hold_out(indices["train"], data.validation_fraction, seed, data.train_split)
        loaded["validation"] = whole["train"].select(held_out)
        loaded["train"] = whole["train"].select(kept)
        names["validation"] = f"{data.train_split}, {data.validation_fraction:g} held out"
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples, "test": data.max_eval_samples}
    loaded = {role: at_most(split, limits[role], seed) for role, split in loaded.items()}

    roles = [role for role in ("train", "validation", "test") if role in loaded]
    columns = {"image_column": image_column, "label_column": label_column}
    columns |= {"text_column": text_column} if text_column else {}
    shown = {role: (names[role], len(loaded[role]), loaded[role]._fingerprint) for role in roles}
    return ImageSplits(
        train=loaded["train"],
        validation=loaded["validation"],
        test=loaded.get("test"),
        sources=sources,
        whole=whole,
        facts=data_facts(data, commit, columns, labels, shown),
    )


def data_facts(
    data: DataArguments,
    commit: str | None,
    columns: dict[str, str],
    labels: list[str],
    splits: dict[str, tuple[str, int | None, str]],
) -> dict:
    """Describe a data set for run.json.

    Args:
        data: name, configuration and revision of the data set.
        commit: of a data set on the Hub, else None.
        columns: option -> column, of the columns that were found.
        labels: class names in the order of the logits.
        splits: role -> source, rows (None for a stream of unknown length) and fingerprint.
    """
    name = data.dataset_name
    here = name != DIGITS and is_local(name)
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


def load_split(name: str, config_name: str | None, revision: str | None, split: str) -> Dataset:
    """One split of a data set, as it is; `DataError` when there is none, or nothing in it."""
    if name == DIGITS:
        splits = digits()
        if split not in splits:
            raise DataError(f"'{DIGITS}' has no split '{split}'; it has {', '.join(splits)}.")
        return splits[split]
    origin = folder_or_hub_id(name, DataError, "dataset_name")
    try:
        # Parquet, JSON, CSV, imagefolder and the like: datasets 5 runs no code of a data set.
        dataset = datasets.load_dataset(origin, config_name, split=split, revision=revision)
    except Exception as error:
        raise DataError(why_not_loaded(name, config_name, split, error)) from error
    if not isinstance(dataset, Dataset):
        raise DataError(f"{name}: split '{split}' is not one table; name a single split.")
    if len(dataset) == 0:
        raise DataError(f"{name}: split '{split}' is empty.")
    return dataset


def dataset_commit(files: Iterable[str]) -> str | None:
    """The commit of a data set on the Hub, which the folder of its cached files is named by; None for any other."""
    found = (re.search(r"[/\\]([0-9a-f]{40})(?:[/\\]|$)", file) for file in files)
    return next((match[1] for match in found if match), None)


def why_not_loaded(name: str, config_name: str | None, split: str, error: Exception) -> str:
    reason = one_line(error)
    if "corresponds to no data" in reason:  # what datasets says of an empty slice or table
        return f"{name}: split '{split}' is empty."
    try:
        available = datasets.get_dataset_split_names(name, config_name)
    except Exception:
        available = None
    plain = split.split("[")[0]
    if available and plain not in available:
        return f"{name} has no split '{split}'; it has {', '.join(available)}.{nearest(plain, available)}"
    return f"{name}: split '{split}' cannot be loaded: {type(error).__name__}: {reason}"


def digits() -> dict[str, Dataset]:
    """scikit-learn's 1,797 real 8x8 grayscale digits as a train (80 %) and a test (20 %, stratified) split."""
    from sklearn.datasets import load_digits

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


def _hold_out(labels: np.ndarray, fraction: float, seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        kept, held_out = train_test_split(
            np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=seed
        )
    except ValueError as error:
        raise DataError(
            f"validation_fraction: {fraction:g} of the {len(labels)} images of split '{name}' cannot be held out by"
            f" class ({error}); change it or name a validation_split."
        ) from None
    return np.sort(kept), np.sort(held_out)


def at_most(split: Dataset, limit: int | None, seed: int) -> Dataset:
    if limit is None or limit >= len(split):
        return split
    rows = np.random.default_rng(seed).permutation(len(split))[:limit]
    return split.select(np.sort(rows))
