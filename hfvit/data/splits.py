"""Load train, validation and test splits and check their columns and labels."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Image, IterableDataset, ReadInstruction, Value
from PIL import Image as PILImage
from sklearn.model_selection import train_test_split

from hfvit.data.decode import unreadable_rows
from hfvit.data.folders import BAD_IMAGE, canonical_split, no_split_error
from hfvit.data.labels import (
    check_classes,
    check_column,
    encode_labels,
    find_label_column,
    hold_out,
    read_class_names,
)
from hfvit.data.local import LocalData, open_local
from hfvit.data.references import check_cards
from hfvit.data.tables import as_images, root_cause
from hfvit.errors import DataError, nearest, one_line
from hfvit.recipe.arguments import DEFAULT_TEST_SPLIT, DataArguments
from hfvit.utils.hub_ids import folder_or_hub_id, is_local

FEW_VALIDATION_IMAGES = 30
HELD_OUT = " held out"  # end of the source of a split that was held out of another

logger = logging.getLogger(__name__)


def find_image_column(features: datasets.Features) -> str:
    """The one column of type `Image`; `DataError` when there is none or more than one."""
    found = [name for name, feature in features.items() if isinstance(feature, Image)]
    if len(found) == 1:
        return found[0]
    what = f"several image columns ({', '.join(found)})" if found else f"no image column among {', '.join(features)}"
    raise DataError(f"image_column: the data set has {what}; name the one to use.")


def check_image_column(split: Dataset | IterableDataset, name: str, column: str) -> None:
    check_column(split, name, "image_column", column)
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
    check_column(split, name, "label_column", label_column)
    check_classes(split, name, label_column)


def _check_text_column(split: Dataset, name: str, column: str, label_column: str) -> None:
    check_column(split, name, "text_column", column)
    text = split.features[column]
    if not isinstance(text, Value) or text.dtype not in ("string", "large_string"):
        raise DataError(f"text_column: column '{column}' of split '{name}' holds {text}, not texts.")
    if column == label_column:
        raise DataError(f"text_column: '{column}' is the label column; a model that reads it has nothing to learn.")


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


def load_whole_splits(data: DataArguments, seed: int = 42, local: LocalData | None = None) -> ImageSplits:
    """Load and check the splits of a data set, the training split included.

    The test split selects nothing. Without `validation_split` a split of that name is used, or `validation_fraction`
    of train is held out, stratified by class. Of local images without splits, `test_fraction` is held out, too.

    Args:
        data: the data set, its columns, its splits and their limits.
        seed: of the rows that are held out, and of those that the limits choose.
        local: the data set, if it is local files and already open.

    Raises:
        DataError: for anything a training could not use.
    """
    local = local or open_source(data)
    loaded = {"train": load_split(data, data.train_split, "train_split", local)}
    names = choose_splits(data, split_names(loaded["train"], data, local), local)
    for role, name in names.items():
        if role != "train":
            loaded[role] = load_split(data, name, f"{role}_split", local)
    features = loaded["train"].features
    image_column = data.image_column or find_image_column(features)
    label_column = data.label_column or find_label_column(features)
    text_column = data.text_column
    for role, split in loaded.items():
        check_columns(split, names[role], image_column, label_column, text_column)
    _check_overlap(names, {role: _lengths(split, local) for role, split in loaded.items()})

    raw_labels = {role: split[label_column][:] for role, split in loaded.items()}
    _drop_unlabeled(data, names, raw_labels, loaded)
    labels, indices = encode_labels(features[label_column], raw_labels, names, read_class_names(data))
    commit = dataset_commit(file["filename"] for file in loaded["train"].cache_files)
    loaded = {role: standardise(split, image_column, indices[role], text_column) for role, split in loaded.items()}
    left_out = {role: _left_out(local, names[role]) for role in loaded}
    if local:
        local.log()
    if data.on_bad_image == "skip":
        for role in loaded:
            loaded[role] = skip_bad_images(loaded[role], names[role], left_out[role])
    whole = dict(loaded)
    sources = {role: names[role] for role in loaded}
    held_out = _hold_out_splits(data, seed, local, loaded, names)
    for role in held_out:
        sources[role] = data.train_split
        whole[role] = whole["train"]
    if len(np.unique(loaded["train"]["label"])) < 2:
        raise DataError(f"train_split: '{data.train_split}' holds one class only; a classifier needs two or more.")
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples, "test": data.max_eval_samples}
    loaded = {role: at_most(split, limits[role], seed) for role, split in loaded.items()}

    roles = [role for role in ("train", "validation", "test") if role in loaded]
    columns = {"image_column": image_column, "label_column": label_column}
    columns |= {"text_column": text_column} if text_column else {}
    shown = {role: (names[role], len(loaded[role]), loaded[role]._fingerprint) for role in roles}
    facts = data_facts(data, commit, columns, labels, shown)
    for role, fraction in held_out.items():
        facts["splits"][role]["held_out"] = fraction
    for role, counts in left_out.items():
        if counts:
            facts["splits"][role]["left_out"] = counts
    if local and local.left_out.counts():
        facts["left_out"] = local.left_out.counts()
    return ImageSplits(
        train=loaded["train"],
        validation=loaded["validation"],
        test=loaded.get("test"),
        sources={role: sources[role] for role in loaded},
        whole=whole,
        facts=facts,
    )


def open_source(data: DataArguments) -> LocalData | None:
    """The data set as local files; None for the digits and for what `datasets` loads itself."""
    return None if data.dataset_name == DIGITS else open_local(data)


def choose_splits(data: DataArguments, available: Sequence[str], local: LocalData | None = None) -> dict[str, str]:
    """The split of each role: those that the recipe names, and usual ones that are there.

    Args:
        data: names of splits, None where a validation split may be found, `DEFAULT_TEST_SPLIT` where a test split may
            be missing.
        available: names of the data set's splits; empty where they are not known.
        local: the data set, if it is local files, where `val` names `validation`.
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
            raise DataError(f"validation_split: there are several ({', '.join(usual)}). Name one.")
        if usual:
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
    """Names of all splits of the data set.

    Args:
        train: the split that was loaded.
        data: the data set.
        local: the data set, if it is local files.
    """
    if data.dataset_name == DIGITS:
        return list(digits())
    return list(local.splits) if local else list(train.info.splits or {})


def _lengths(split: Dataset, local: LocalData | None) -> dict[str, int]:
    if local:
        return local.lengths()
    return {name: info.num_examples for name, info in (split.info.splits or {}).items()}


def _check_overlap(names: Mapping[str, str], lengths: Mapping[str, Mapping[str, int]]) -> None:
    """Raise `DataError` when two roles have rows of the data set in common.

    Args:
        names: split or slice of each role.
        lengths: rows of the data set's splits, by role.
    """
    ranges: dict[str, list] = {}
    for role, name in names.items():
        try:
            ranges[role] = ReadInstruction.from_spec(name).to_absolute(dict(lengths[role]))
        except (ValueError, AttributeError):
            return
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
                    f" '{names[other]}'. Name slices that do not overlap, such as train[:90%] and train[90%:]."
                )


def _drop_unlabeled(
    data: DataArguments, names: dict[str, str], raw_labels: dict[str, list], loaded: dict[str, Dataset]
) -> None:
    """Leave out a validation or test split without any labels that the recipe does not name."""
    chosen = {"validation": data.validation_split is None, "test": data.test_split == DEFAULT_TEST_SPLIT}
    for role, is_default in chosen.items():
        if is_default and role in loaded and all(value in (None, -1) for value in raw_labels[role]):
            logger.warning("%s: split '%s' has no labels and is not used", role, names[role])
            for known in (names, raw_labels, loaded):
                del known[role]


def _left_out(local: LocalData | None, name: str) -> dict[str, int]:
    """Files left out of a split by reason."""
    return local.left_out.counts(local.resolve(name).split("[")[0]) if local else {}


def skip_bad_images(split: Dataset, name: str, left_out: dict[str, int]) -> Dataset:
    """`split` without the images that cannot be decoded, which are logged and counted.

    Args:
        split: columns `image` (undecoded) and `row`.
        name: of the split.
        left_out: gets their number.
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
    data: DataArguments, seed: int, local: LocalData | None, loaded: dict[str, Dataset], names: dict[str, str]
) -> dict[str, float]:
    """Hold validation and test images out of train where no split has the role; returns their fractions.

    The rows depend on the data and the seed alone, not on whether the test images are used.

    Args:
        data: fractions and splits.
        seed: of the rows.
        local: the data set, if it is local files.
        loaded: splits by role; changed.
        names: of the splits by role; changed.
    """
    fractions: dict[str, float] = {}
    if "validation" not in loaded:
        fractions["validation"] = data.validation_fraction
    if local and not local.is_split and "test" not in loaded and "[" not in data.train_split:
        fractions |= {"test": data.held_out_for_test} if data.held_out_for_test else {}
    for role, fraction in fractions.items():
        train = loaded["train"]
        share = fraction if len(fractions) == 1 or role == "validation" else fraction / (1 - fractions["validation"])
        kept, held_out = hold_out(np.asarray(train["label"]), share, seed, data.train_split, role)
        loaded["train"] = train.select(kept)
        loaded[role] = train.select(held_out)
        names[role] = f"{data.train_split}, {fraction:g}{HELD_OUT}"
    if "test" in fractions and data.test_split is None:
        logger.info(
            "test_fraction: %d images are held out and not evaluated, because there is no test_split",
            len(loaded.pop("test")),
        )
        del names["test"], fractions["test"]
    return fractions


def warn_about_sizes(splits: ImageSplits) -> None:
    """Warn of few validation images, and of classes without training or validation images."""
    labels = splits.labels
    counts = {role: np.bincount(splits[role]["label"], minlength=len(labels)) for role in splits.sources}
    if "train" in counts:
        missing = [labels[index] for index in np.flatnonzero(counts["train"] == 0)]
        if missing:
            logger.warning("train: %d of %d classes have no images: %s", len(missing), len(labels), _some(missing))
        single = [labels[index] for index in np.flatnonzero(counts["train"] == 1)]
        if single:
            logger.warning("train: %d of %d classes have one image: %s", len(single), len(labels), _some(single))
    validation = counts["validation"]
    if validation.sum() < FEW_VALIDATION_IMAGES:
        logger.warning(
            "validation: %d images select the checkpoint; below %d the choice is mostly chance",
            validation.sum(),
            FEW_VALIDATION_IMAGES,
        )
    present = counts["train"] > 0 if "train" in counts else np.ones(len(labels), dtype=bool)
    missing = [labels[index] for index in np.flatnonzero((validation == 0) & present)]
    if missing:
        logger.warning("validation: %d of %d classes have no images: %s", len(missing), len(labels), _some(missing))


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


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


def load_split(data: DataArguments, split: str, option: str = "split", local: LocalData | None = None) -> Dataset:
    """Load one split of a data set, with undecoded images where they are in files.

    Args:
        data: the data set; its own names of splits are not used.
        split: a split, a slice or a sum of them.
        option: that names it, for messages.
        local: the data set, if it is local files and already open.

    Raises:
        DataError: there is no such split, or nothing in it.
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
        # Parquet, JSON, CSV, imagefolder and the like: datasets 5 runs no code of a data set.
        dataset = datasets.load_dataset(origin, data.dataset_config_name, split=split, revision=data.dataset_revision)
    except Exception as error:
        raise why_not_loaded(data, split, error, option) from error
    if not isinstance(dataset, Dataset):
        raise DataError(f"{option}: split '{split}' of {name} is not one table; name a single split.")
    if len(dataset) == 0:
        raise DataError(f"{option}: split '{split}' of {name} is empty.")
    return images_of_rows(dataset, data, split)


def images_of_rows(dataset: Dataset, data: DataArguments, split: str) -> Dataset:
    """A split that `datasets` loaded, with an image column of bytes as images; paths in rows are refused.

    Args:
        dataset: of `datasets.load_dataset`.
        data: `image_column` and `allow_outside_paths`.
        split: for messages.
    """
    if is_folder_builder(dataset.builder_name):
        return dataset  # its paths are those of files that datasets found itself
    found = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    column = data.image_column or (found[0] if len(found) == 1 else None)
    if column is None:
        return dataset
    converted = as_images(dataset, column, split, None, data.allow_outside_paths)
    return dataset if column in found else converted


def is_folder_builder(name: str | None) -> bool:
    """Whether a builder of `datasets` finds files itself, so that its paths are not those of rows."""
    return name == "imagefolder"  # and not webdataset, whose members may have the name of any file


def dataset_commit(files: Iterable[str]) -> str | None:
    """The commit of a data set on the Hub, which the folder of its cached files is named by; None for any other."""
    found = (re.search(r"[/\\]([0-9a-f]{40})(?:[/\\]|$)", file) for file in files)
    return next((match[1] for match in found if match), None)


def why_not_loaded(data: DataArguments, split: str, error: Exception, option: str = "split") -> DataError:
    """The error for a split that `datasets` could not load, with the cause that it wraps.

    Args:
        data: the data set.
        split: that was asked for.
        error: of `datasets`.
        option: that names the split.
    """
    name = data.dataset_name
    cause = root_cause(error)
    reason = one_line(error)
    if "corresponds to no data" in reason:  # what datasets says of an empty slice or table
        return DataError(f"{option}: split '{split}' of {name} is empty.")
    try:
        available = datasets.get_dataset_split_names(name, data.dataset_config_name)
    except Exception:
        available = None
    plain = split.split("[")[0]
    if available and plain not in available:
        return no_split_error(option, name, split, available)
    folders = [path.name for path in Path().iterdir() if path.is_dir()] if "/" not in name else []
    hint = nearest(name, folders)
    there = "" if is_local(name) else f"there is no folder {name} here, and "
    return DataError(
        f"dataset_name: {there}split '{split}' of {name} cannot be loaded ({type(cause).__name__}: {one_line(cause)})."
        f"{hint}"
    )


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


def at_most(split: Dataset, limit: int | None, seed: int) -> Dataset:
    if limit is None or limit >= len(split):
        return split
    rows = np.random.default_rng(seed).permutation(len(split))[:limit]
    return split.select(np.sort(rows))
