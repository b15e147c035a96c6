"""Load the splits and build the data sets of a recipe."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
from datasets import IterableDataset
from timm.data import resolve_data_config
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hfvit.data.dataset import ImageDataset, image_datasets, open_reader
from hfvit.data.evaluation_stream import EvaluationStream
from hfvit.data.labels import SingleLabel, encode_labels, match_classes, normalized, targets_of
from hfvit.data.multilabel import MultiLabel
from hfvit.data.splits import (
    ImageSplits,
    check_columns,
    find_image_column,
    find_labels,
    load_whole_splits,
    standardize,
)
from hfvit.data.stream import ImageStream
from hfvit.data.stream_splits import stream_splits
from hfvit.data.text import split_texts
from hfvit.data.transform_reader import TransformReader
from hfvit.errors import DataError, RecipeError
from hfvit.recipe.arguments import AugmentationArguments, DataArguments
from hfvit.recipe.loader import Recipe
from hfvit.recipe.training_args import HFViTTrainingArguments
from hfvit.transforms.augmentation import Augmentation
from hfvit.utils.environment import keep_freed_memory
from hfvit.utils.formatting import shortened

logger = logging.getLogger(__name__)


def load_splits(
    data: DataArguments, seed: int = 42, check_length: Callable[[int | None], None] = lambda images: None
) -> ImageSplits:
    """Load and check the splits of a data set.

    Args:
        data: data options of the recipe; with `streaming`, the splits are opened as streams.
        seed: seed of held-out images, and of the images that `max_*_samples` selects.
        check_length: function to call with the number of images of a stream, or None if unknown, before files are
            read.

    Returns:
        The splits.

    Raises:
        DataError: the data set cannot be used for training.
    """
    if data.streaming:
        return stream_splits(data, seed, check_length)
    return load_whole_splits(data, seed)


def build_datasets(
    splits: ImageSplits,
    config: PreTrainedConfig,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None = None,
    train_transforms: Callable | None = None,
) -> dict[str, Dataset]:
    """Build the data sets of all splits, and choose the number of data workers.

    Args:
        splits: splits from `load_splits`.
        config: configuration of the model, with its preprocessing.
        recipe: recipe of the run.
        tokenizer: tokenizer of a model with a text encoder. Default: images only.
        train_transforms: transform to use instead of the augmentation, see `TransformReader`.

    Returns:
        The data sets by role: train, validation, test.

    Raises:
        RecipeError: `train_transforms` with streaming, a linear probe or texts.
        DataError: an image cannot be decoded, or all training texts are empty.
    """
    args = recipe.training
    if train_transforms:
        _check_takes_transforms(recipe)
    texts = None
    if tokenizer is not None:
        texts, summary = split_texts(splits, tokenizer, recipe.model.max_text_length)
        logger.info(summary)
    data_config = resolve_data_config(config.pretrained_cfg)
    augmentation = build_augmentation(data_config, recipe.augmentation)
    with args.main_process_first(desc="decoding the images"):
        datasets = image_datasets(
            splits,
            data_config,
            augmentation,
            seed=args.seed,
            repeats=recipe.augmentation.repeated_augmentation,
            show_progress=args.should_save and not args.disable_tqdm,
            texts=texts,
            train_transforms=train_transforms,
        )
    if recipe.data.streaming:
        datasets["train"] = _image_stream(splits, augmentation, recipe)
        logger.info(datasets["train"].describe())
        for role in ("validation", "test"):
            if isinstance(splits[role], IterableDataset):
                datasets[role] = _evaluation_stream(splits, role, data_config, recipe)
    _choose_workers(datasets, args)
    return datasets


def build_augmentation(data_config: dict, arguments: AugmentationArguments) -> Augmentation:
    """Create the augmentation, with image size and filter of timm's `data_config`.

    Raises:
        RecipeError: `crop_padding` is not below the image size.
    """
    side = min(data_config["input_size"][-2:])
    if arguments.crop_padding >= side:
        raise RecipeError(f"crop_padding: must be below the image size {side}, got {arguments.crop_padding}.")
    return Augmentation.from_config(
        data_config,
        crop_scale=arguments.crop_scale,
        crop_ratio=arguments.crop_ratio,
        horizontal_flip=arguments.horizontal_flip,
        vertical_flip=arguments.vertical_flip,
        policy=arguments.policy,
        rand_augment_magnitude=arguments.rand_augment_magnitude,
        rand_augment_num_ops=arguments.rand_augment_num_ops,
        color_jitter=arguments.color_jitter,
        crop_padding=arguments.crop_padding,
        crop_padding_mode=arguments.crop_padding_mode,
    )


def _check_takes_transforms(recipe: Recipe) -> None:
    """Raise `RecipeError` if the recipe does not support `train_transforms`."""
    options = {
        "streaming": recipe.data.streaming,
        "finetuning: linear_probe": recipe.finetuning.finetuning == "linear_probe",
        "text_encoder": recipe.model.text_encoder,
    }
    for option in (name for name, given in options.items() if given):
        raise RecipeError(f"train_transforms: not available with {option}.")


def _image_stream(splits: ImageSplits, augmentation: Augmentation, recipe: Recipe) -> ImageStream:
    """Create the stream of training batches of this process.

    Args:
        splits: splits from `load_splits`, with a streamed `train`.
        augmentation: augmentation of training images.
        recipe: recipe of the run.
    """
    args = recipe.training
    return ImageStream(
        splits.train,
        name=recipe.data.train_split,
        images=splits.metadata["splits"]["train"]["rows"],
        classes=len(splits.labels),
        augmentation=augmentation,
        batch_size=args.per_device_train_batch_size,
        seed=args.seed,
        order_seed=args.order_seed,
        repeats=recipe.augmentation.repeated_augmentation,
        buffer_size=recipe.data.shuffle_buffer_size,
        process=args.process_index,
        processes=args.world_size,
        divisible=recipe.data.max_train_samples is None,
    )


def _evaluation_stream(
    splits: ImageSplits, role: str, data_config: dict[str, Any], recipe: Recipe
) -> EvaluationStream:
    """Create the stream of evaluation batches of this process.

    Args:
        splits: splits from `load_splits`, with a streamed `role`.
        role: validation or test.
        data_config: preprocessing of the model, from `timm.data.resolve_data_config`.
        recipe: recipe of the run.
    """
    args = recipe.training
    metadata = splits.metadata["splits"][role]
    return EvaluationStream(
        splits[role],
        name=metadata["source"],
        images=metadata["rows"],
        labels=splits.labels,
        data_config=data_config,
        batch_size=args.per_device_eval_batch_size,
        process=args.process_index,
        processes=args.world_size,
        limit=recipe.data.max_eval_samples,
    )


def _choose_workers(datasets: dict[str, Dataset], args: HFViTTrainingArguments) -> None:
    """Set the number of data workers; on a CPU without workers, keep freed memory."""
    args.choose_workers(any(dataset.decodes for dataset in datasets.values()))
    if args.device.type == "cpu" and args.dataloader_num_workers == 0:
        keep_freed_memory()


def image_dataset(
    dataset: datasets.Dataset,
    labels: Sequence[str],
    data_config: dict[str, Any],
    name: str = "train",
    augmentation: Augmentation | None = None,
    seed: int = 0,
    transform: Callable | None = None,
) -> ImageDataset:
    """Create a data set for `HFViTTrainer` from a `datasets.Dataset`.

    Args:
        dataset: data set with images and labels, whose columns are found by type or by usual names.
        labels: class names of the model, in the order of the logits. Labels are matched by name; integers are class
            indices.
        data_config: preprocessing of the model, from `timm.data.resolve_data_config`.
        name: name of the split, for messages.
        augmentation: augmentation of training images. Default: none, for evaluation.
        seed: seed of the augmentation.
        transform: transform to use instead of the augmentation, see `TransformReader`.

    Returns:
        The data set of batches.

    Raises:
        DataError: there are no rows or no such columns, the data set has a transform, or labels are not classes of
            the model.
    """
    if not len(dataset):
        raise DataError(f"Split '{name}' has no images.")
    if dataset.format["type"] == "custom":
        raise DataError(
            f"Split '{name}': must not have a transform (set_transform). Pass train_transforms to HFViTTrainer, and"
            " the data set without it: dataset.with_format(None)."
        )
    dataset = dataset.with_format(None)
    image_column = find_image_column(dataset.features)
    kind = find_labels(dataset, image_column=image_column)
    check_columns(dataset, name, image_column, kind)
    encode = _class_indices if isinstance(kind, SingleLabel) else _class_matrix
    split = standardize(dataset, image_column, encode(dataset, kind, list(labels), name))
    if transform and augmentation is not None:
        reader = TransformReader(split, name, transform)
    else:
        reader, how = open_reader(split, split, name, data_config, show_progress=False)
        logger.info("%s: %s images %s", name, f"{len(split):,}", how)
    return ImageDataset(targets_of(split), reader, augmentation, seed=seed)


def _class_matrix(dataset: datasets.Dataset, kind: MultiLabel, labels: list[str], name: str) -> np.ndarray:
    """Return the 0/1 targets `(rows, classes)` in the order of `labels`.

    Args:
        dataset: data set with the label columns.
        kind: label columns, from `find_labels`.
        labels: class names of the model; integers and 0/1 lists are in their order.
        name: name of the split, for messages.
    """
    raw = {"train": kind.read(dataset)}
    class_names = None if kind.has_names(dataset.features) else labels
    names, targets = kind.encode(dataset.features, raw, {"train": name}, class_names)
    return match_classes(targets["train"], names, labels, f"split '{name}'")


def _class_indices(dataset: datasets.Dataset, kind: SingleLabel, labels: list[str], name: str) -> np.ndarray:
    """Return the class indices `(rows,)` in the order of `labels`.

    Args:
        dataset: data set with the label column.
        kind: label column of type `ClassLabel`, integers (class indices) or names.
        labels: class names of the model.
        name: name of the split, for messages.
    """
    column = kind.name
    feature = dataset.features[column]
    values = dataset[column][:]
    if isinstance(feature, datasets.ClassLabel):
        names, encoded = encode_labels(feature, {"train": values}, {"train": name})
        values = [names[index] for index in encoded["train"]]
    elif feature.dtype.startswith(("int", "uint")):
        feature = datasets.ClassLabel(names=labels)
        return encode_labels(feature, {"train": values}, {"train": name})[1]["train"]
    index_of = {normalized(label): index for index, label in enumerate(labels)}
    indices = [index_of.get(normalized(str(value))) for value in values]
    for row, value in enumerate(values):
        if indices[row] is None:
            raise DataError(
                f"Split '{name}', row {row}: label {value!r} of column '{column}' is not a class of the model"
                f" ({shortened(labels, 5)})."
            )
    return np.array(indices, dtype=np.int64)
