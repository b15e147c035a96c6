"""The labelled rows that evaluate a finished model, in its class order."""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image

import hfvit.models.image_text  # noqa: F401
from hfvit.artifacts.artifact import class_names, find_artifact
from hfvit.artifacts.constants import RECIPE_FILE
from hfvit.artifacts.gate import EvaluationData
from hfvit.data.decode import decode
from hfvit.data.factory import load_splits
from hfvit.data.labels import encode_labels, find_label_column, read_class_names
from hfvit.data.splits import (
    HELD_OUT,
    at_most,
    check_columns,
    find_image_column,
    load_split,
    open_source,
    skip_bad_images,
    standardise,
)
from hfvit.errors import DataError, HFViTError, nearest, one_line
from hfvit.recipe.arguments import DataArguments
from hfvit.recipe.files import read_yaml
from hfvit.utils.files import expand_user


@dataclasses.dataclass
class EvaluationSplit:
    """Rows of one split of a data set: undecoded pictures, and `labels`, indices into the model's `classes`."""

    dataset: Dataset
    labels: np.ndarray
    classes: list[str]
    name: str
    source: str
    record: EvaluationData

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, rows: Iterable[int] | None = None) -> Iterator[Image.Image | tuple[Image.Image, str]]:
        """RGB pictures one at a time, in order, with a text column pairs of a picture and its text; of `rows` of this
        split, or all. `DataError` for a bad one."""
        for row in range(len(self)) if rows is None else rows:
            example = self.dataset[int(row)]
            image = decode(example["image"], self.source, example["row"])
            yield (image, example["text"]) if "text" in example else image


def evaluation_split(
    checkpoint: str | Path,
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
    max_samples: int | None = None,
    seed: int = 42,
    labels: list[str] | None = None,
) -> EvaluationSplit:
    """A labelled split for the classifier at `checkpoint` (what `load_classifier` takes).

    `labels` are that model's classes, where they are known already.

    With neither `dataset_name` nor `split` it is the validation split of the checkpoint's recipe.yaml: the very rows
    that training held out. `split` alone names another split of the recipe's data set; held-out test images
    have the name of the test split. `max_samples` are drawn with `seed`.

    Raises `DataError` where the data set's classes are not the model's, by name.
    """
    artifact = find_artifact(checkpoint)
    labels = labels or class_names(artifact)
    if dataset_name is None:
        path = artifact.beside(RECIPE_FILE)
        if path is None:
            raise DataError(f"dataset_name: missing, and {checkpoint} has no {RECIPE_FILE} that names its data set.")
        data, recipe_seed = read_recipe(path)
        given = {"dataset_config_name": dataset_config_name, "image_column": image_column}
        given |= {"label_column": label_column, "text_column": text_column}
        data = dataclasses.replace(data, **{key: value for key, value in given.items() if value is not None})
        try:
            if split is None:
                loaded = _of_role(data, recipe_seed, "validation")
            elif _is_held_out(data, split):
                loaded = _of_role(data, recipe_seed, "test")
            else:
                loaded = _one_split(data, split)
        except DataError as error:
            hint = f" ({path} says so; dataset_name overrides it.)" if "dataset_name" in str(error) else ""
            raise DataError(f"{error}{hint}") from None
    else:
        data = DataArguments(
            dataset_name=dataset_name,
            dataset_config_name=dataset_config_name,
            image_column=image_column,
            label_column=label_column,
            text_column=text_column,
        )
        loaded = _one_split(data, split or "validation")
    dataset, names, source, what = loaded
    table = _match(np.asarray(dataset["label"]), names, labels, f"{data.dataset_name}, split '{source}'")
    chosen = at_most(dataset, max_samples, seed)
    drawn = f" of {len(dataset):,} images drawn with seed {seed}" if len(chosen) < len(dataset) else " images"
    what = f"{what}, {len(chosen):,}{drawn}"
    shown = shown_name(data.dataset_name)
    return EvaluationSplit(
        dataset=chosen,
        labels=table[np.asarray(chosen["label"])],
        classes=labels,
        name=f"{shown}, {what}",
        source=source,
        record=EvaluationData(
            dataset=shown,
            dataset_config_name=data.dataset_config_name,
            split=what,
            images=len(chosen),
            fingerprint=chosen._fingerprint,
        ),
    )


def shown_name(dataset_name: str) -> str:
    """A data set's name without the path on this machine."""
    folder = expand_user(dataset_name)
    return folder.resolve().name if os.path.exists(folder) else dataset_name


def read_recipe(path: Path) -> tuple[DataArguments, int]:
    """The data section and the seed alone: the training section asks for the devices that trained."""
    try:
        values = read_yaml(path)
        known = {field.name for field in dataclasses.fields(DataArguments)}
        return DataArguments(**{key: values[key] for key in known & set(values)}), int(values.get("seed", 42))
    except HFViTError as error:
        raise DataError(f"{path}: {error}") from None
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as a recipe: {one_line(error)}; give dataset_name.") from None


def _is_held_out(data: DataArguments, split: str) -> bool:
    """Whether `split` stands for test images that training held out, by its name or as run.json names its source."""
    if split.endswith(HELD_OUT):
        return True
    local = open_source(data) if split == data.test_split else None
    return local is not None and not local.is_split and split not in local.splits


def _of_role(data: DataArguments, seed: int, role: str) -> tuple[Dataset, list[str], str, str]:
    """The rows that the recipe's training had as `role`."""
    if role == "validation":
        data = dataclasses.replace(data, test_split=None, test_fraction=data.held_out_for_test)
    splits = load_splits(data, seed)
    if role not in splits.sources:
        raise DataError(f"split: the recipe's training had no {role} split.")
    source = splits.sources[role]
    return splits[role], splits.labels, source, f"split '{splits.facts['splits'][role]['source']}'"


def _one_split(data: DataArguments, split: str) -> tuple[Dataset, list[str], str, str]:
    loaded = load_split(data, split)
    image_column = data.image_column or find_image_column(loaded.features)
    label_column = data.label_column or find_label_column(loaded.features)
    check_columns(loaded, split, image_column, label_column, data.text_column)
    # encode_labels takes the classes of a column without names from "train": here from the split itself.
    raw = {"train": loaded[label_column][:]}
    names, indices = encode_labels(loaded.features[label_column], raw, {"train": split}, read_class_names(data))
    table = standardise(loaded, image_column, indices["train"], data.text_column)
    if data.on_bad_image == "skip":
        table = skip_bad_images(table, split, {})
    return table, names, split, f"split '{split}'"


def _match(indices: np.ndarray, names: list[str], labels: list[str], where: str) -> np.ndarray:
    """The model's class index of each of the data set's `names`; all names that occur in `indices` must have one."""
    index_of = {label: index for index, label in enumerate(labels)}
    used = sorted(set(indices.tolist()))
    missing = [names[index] for index in used if names[index] not in index_of]
    if missing:
        raise DataError(
            f"{where}: {len(missing)} of its {len(used)} classes are none of the model's {len(labels)}:"
            f" {_some(missing)}. The model has {_some(labels)}.{nearest(missing[0], labels)}"
        )
    return np.array([index_of.get(name, -1) for name in names], dtype=np.int64)


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
