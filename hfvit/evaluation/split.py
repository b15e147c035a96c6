"""Load labeled images for evaluation, with labels in the model's class order."""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset, IterableDataset
from PIL import Image

import hfvit.models.image_text  # noqa: F401
from hfvit.artifacts.artifact import find_artifact, read_head, revision_arguments
from hfvit.artifacts.constants import RECIPE_FILE
from hfvit.artifacts.gate import EvaluationData
from hfvit.data.decode import decode
from hfvit.data.evaluation_stream import store_stream
from hfvit.data.factory import load_splits
from hfvit.data.labels import match_classes, read_class_names, targets_of
from hfvit.data.splits import (
    HELD_OUT,
    at_most,
    check_columns,
    find_image_column,
    find_labels,
    load_split,
    open_source,
    skip_bad_images,
    standardize,
)
from hfvit.errors import DataError, HFViTError, one_line
from hfvit.recipe.arguments import MULTI_LABEL, DataArguments
from hfvit.recipe.files import read_yaml
from hfvit.utils.checks import SAVE_DATASET, check_name
from hfvit.utils.files import expand_user


@dataclasses.dataclass
class EvaluationSplit:
    """Labeled images of one split.

    Attributes:
        dataset: rows with undecoded images, and texts for an image and text model.
        labels: indices into `classes`, `(images,)`, or 0 and 1 `(images, classes)` of a multi-label model.
        classes: class names of the model.
        name: description of data set, split and number of images.
        source: name of the split.
        record: description for run.json.
    """

    dataset: Dataset
    labels: np.ndarray
    classes: list[str]
    name: str
    source: str
    record: EvaluationData

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, rows: Iterable[int] | None = None) -> Iterator[Image.Image | tuple[Image.Image, str]]:
        """Decode RGB images one at a time, or pairs of image and text.

        Args:
            rows: rows of this split. Default: all.

        Raises:
            DataError: an image cannot be read.
        """
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
    label_column: list[str] | str | None = None,
    text_column: str | None = None,
    max_samples: int | None = None,
    seed: int = 42,
    revision: str | None = None,
) -> EvaluationSplit:
    """Load a labeled split to evaluate a classifier on.

    Args:
        checkpoint: checkpoint folder, Hub id, ONNX file, TensorRT engine or export folder.
        dataset_name: Hub id, folder or `digits`. Default: the data set of the checkpoint's recipe.yaml.
        dataset_config_name: configuration of the data set.
        split: split. Default: the validation images of the recipe, also if training held them out. Test images that
            training held out have the name of the test split.
        image_column: name of the image column. Default: found by its type.
        label_column: name of the label column. Default: found by its type.
        text_column: name of the text column. Default: the recipe's.
        max_samples: number of images, sampled with `seed`. Default: all.
        seed: seed of `max_samples`.
        revision: branch, tag or commit of a Hub id. Default: main.

    Raises:
        DataError: the data cannot be loaded, or has classes that the model lacks.
    """
    if dataset_name is not None:
        check_name("dataset_name", dataset_name, SAVE_DATASET)
    artifact = find_artifact(checkpoint)
    head = read_head(artifact, **revision_arguments(checkpoint, revision))
    labels = head.labels
    multi_label = head.config.problem_type == MULTI_LABEL
    columns = {"image_column": image_column, "label_column": label_column, "text_column": text_column}
    options = {"dataset_config_name": dataset_config_name, **columns}
    if dataset_name is None:
        path = artifact.beside(RECIPE_FILE)  # not of a Hub repository, which would choose what is read here
        if path is None:
            raise DataError(f"dataset_name: required, since {checkpoint} has no {RECIPE_FILE} with a data set.")
        data, recipe_seed = read_recipe(path)
        data = dataclasses.replace(data, **{key: value for key, value in options.items() if value is not None})
        dataset, names, source, description = _recipe_split(data, split, recipe_seed, path)
    else:
        problem_type = MULTI_LABEL if multi_label else None
        data = DataArguments(dataset_name=dataset_name, problem_type=problem_type, **options)
        dataset, names, source, description = _named_split(data, split)
    where = f"{data.dataset_name}, split '{source}'"
    targets = match_classes(_targets(dataset, multi_label, where), names, labels, where)
    images = f"{len(dataset):,} images"
    chosen = at_most(dataset, max_samples, seed)
    if len(chosen) < len(dataset):
        targets = match_classes(targets_of(chosen), names, labels, where)
        images = f"{len(chosen):,} of {images}, sampled with seed {seed}"
    description = f"{description}, {images}"
    name = redacted_name(data.dataset_name)
    return EvaluationSplit(
        dataset=chosen,
        labels=targets,
        classes=labels,
        name=f"{name}, {description}",
        source=source,
        record=EvaluationData(
            dataset=name,
            dataset_config_name=data.dataset_config_name,
            split=description,
            images=len(chosen),
            fingerprint=chosen._fingerprint,
        ),
    )


def redacted_name(dataset_name: str) -> str:
    """Return the name of a data set, without the path of a local folder."""
    folder = expand_user(dataset_name)
    return folder.resolve().name if os.path.exists(folder) else dataset_name


def read_recipe(path: Path) -> tuple[DataArguments, int]:
    """Read the data section and the seed of a recipe.

    Other sections are not parsed, since TrainingArguments checks for the devices of the training.
    """
    try:
        values = read_yaml(path)
        known = {field.name for field in dataclasses.fields(DataArguments)}
        return DataArguments(**{key: values[key] for key in known & set(values)}), int(values.get("seed", 42))
    except HFViTError as error:
        raise DataError(f"{path}: {error}") from None
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not a valid recipe ({one_line(error)}). Pass dataset_name.") from None


def _recipe_split(
    data: DataArguments, split: str | None, seed: int, path: Path
) -> tuple[Dataset, list[str], str, str]:
    """Load a split of a recipe's data set, like `_of_role`.

    Args:
        data: data options of the recipe.
        split: split. Default: the validation images of the training.
        seed: seed of the recipe.
        path: path of the recipe, for messages.
    """
    try:
        if split is None:
            return _of_role(data, seed, "validation")
        if _is_held_out(data, split):
            return _of_role(data, seed, "test")
        return _one_split(data, split)
    except DataError as error:
        if "dataset_name" not in str(error):
            raise
        raise DataError(f"{error} (The value is from {path}. Pass dataset_name to override it.)") from None


def _named_split(data: DataArguments, split: str | None) -> tuple[Dataset, list[str], str, str]:
    """Load a split of any data set, by default validation, like `_of_role`."""
    try:
        return _one_split(data, split or "validation")
    except DataError as error:
        if split is not None or not str(error).startswith("split:"):
            raise
        local = open_source(data)
        only = [*local.splits] if local and not local.is_split else []
        advice = f"{only[0]} to evaluate on all its images" if only else "with the name of one that has labels"
        raise DataError(f"{error} Pass split {advice}.") from None


def _is_held_out(data: DataArguments, split: str) -> bool:
    """Return whether `split` is the test split that training held out.

    It has the name of the test split, or the name of the source in run.json.
    """
    if split.endswith(HELD_OUT):
        return True
    local = open_source(data) if split == data.test_split else None
    return local is not None and not local.is_split and split not in local.splits


def _of_role(data: DataArguments, seed: int, role: str) -> tuple[Dataset, list[str], str, str]:
    """Load a split as a training with the recipe does.

    Args:
        data: data options of the recipe.
        seed: seed of the recipe.
        role: validation or test.

    Returns:
        (rows, class names, name of the split, description).

    Raises:
        DataError: the split cannot be loaded, or there is none.
    """
    if role == "validation":
        data = dataclasses.replace(data, test_split=None, test_fraction=data.held_out_for_test)
    splits = load_splits(data, seed)
    if splits[role] is None:
        raise DataError(f"split: the run has no {role} split. Pass another split.")
    metadata = splits.metadata["splits"][role]
    source = splits.sources.get(role, metadata["source"])
    loaded = splits[role]
    if isinstance(loaded, IterableDataset):
        loaded = store_stream(loaded, role, splits.metadata, data.max_eval_samples)
    return loaded, splits.labels, source, f"split '{metadata['source']}'"


def _one_split(data: DataArguments, split: str) -> tuple[Dataset, list[str], str, str]:
    loaded = load_split(data, split)
    image_column = data.image_column or find_image_column(loaded.features)
    kind = find_labels(loaded, data, image_column)
    check_columns(loaded, split, image_column, kind, data.text_column)
    # encode collects the class names of a plain column from "train", here from the split itself.
    raw = {"train": kind.read(loaded)}
    names, targets = kind.encode(loaded.features, raw, {"train": split}, read_class_names(data))
    table = standardize(loaded, image_column, targets["train"], data.text_column)
    if data.on_bad_image == "skip":
        table = skip_bad_images(table, split, {})
    return table, names, split, f"split '{split}'"


def _targets(dataset: Dataset, multi_label: bool, where: str) -> np.ndarray:
    """Return the targets of a split.

    Args:
        dataset: split from `standardize`.
        multi_label: whether the model is a multi-label classifier.
        where: description of the data set, for messages.

    Raises:
        DataError: the targets do not match the model.
    """
    targets = targets_of(dataset)
    if multi_label != (targets.ndim > 1):
        has, needs = ("several labels", "one class") if targets.ndim > 1 else ("one class", "several labels")
        raise DataError(f"label_column: images of {where} have {has}, but the model predicts {needs} per image.")
    return targets
