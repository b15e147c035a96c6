"""Open a training split as a stream; load evaluation splits completely."""

from collections.abc import Callable, Iterator
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, DatasetBuilder, Image, IterableDataset, Value
from datasets.fingerprint import Hasher
from datasets.utils.file_utils import is_local_path, xopen

from hfvit.data.splits import (
    DIGITS,
    ImageSplits,
    at_most,
    check_columns,
    data_facts,
    dataset_commit,
    encode_labels,
    find_image_column,
    find_label_column,
    standardise,
    why_not_loaded,
)
from hfvit.errors import DataError, RecipeError
from hfvit.recipe.arguments import DataArguments
from hfvit.utils.hub_ids import folder_or_hub_id


def stream_splits(
    data: DataArguments, seed: int = 42, check_length: Callable[[int | None], None] = lambda images: None
) -> ImageSplits:
    """Open the training split as a stream of columns `image` (undecoded) and `label`, and load the other splits.

    Args:
        data: the data set, its columns, its splits and their limits.
        seed: of the rows that `max_eval_samples` chooses.
        check_length: called with the number of training images, None where it is unknown, before any file is read.

    Raises:
        DataError: for anything a training could not use, as far as that is known without reading the stream.
    """
    names = {"train": data.train_split, "validation": data.validation_split, "test": data.test_split}
    names = {role: name for role, name in names.items() if name}
    builder = _open(data)
    streams = {role: _stream(builder, data, name) for role, name in names.items()}

    train = streams["train"]
    image_column = data.image_column or find_image_column(train.features)
    label_column = data.label_column or find_label_column(train.features)
    for role, stream in streams.items():
        check_columns(stream, names[role], image_column, label_column)
    class_label = train.features[label_column]
    if not isinstance(class_label, ClassLabel):
        raise DataError(
            f"label_column: column '{label_column}' of split '{data.train_split}' holds {class_label.dtype} without"
            " the names of its classes, which a stream would have to be read through to find; declare it as a"
            " ClassLabel in the data set's card (dataset_info: features), or set streaming to false."
        )
    images = _known_length(builder, data.train_split, data.max_train_samples)
    check_length(images)

    loaded = {
        role: _written(builder, data.dataset_name, streams[role], names[role]) for role in names if role != "train"
    }
    raw_labels = {role: split[label_column][:] for role, split in loaded.items()}
    labels, indices = encode_labels(class_label, raw_labels, names)
    whole = {role: standardise(split, image_column, indices[role]) for role, split in loaded.items()}
    loaded = {role: at_most(split, data.max_eval_samples, seed) for role, split in whole.items()}
    columns = {"image_column": image_column, "label_column": label_column}
    shown = {"train": (data.train_split, images, builder.hash)}
    shown |= {role: (names[role], len(split), split._fingerprint) for role, split in loaded.items()}
    return ImageSplits(
        train=_two_columns(train, image_column, label_column, data.max_train_samples),
        validation=loaded["validation"],
        test=loaded.get("test"),
        sources={role: names[role] for role in loaded},
        whole=whole,
        facts=data_facts(data, dataset_commit([builder.cache_dir]), columns, labels, shown),
    )


def _open(data: DataArguments) -> DatasetBuilder:
    name = data.dataset_name
    if name == DIGITS:
        raise RecipeError(f"streaming: '{DIGITS}' comes with scikit-learn and fits in memory; leave streaming out.")
    origin = folder_or_hub_id(name, DataError, "dataset_name")
    try:
        return datasets.load_dataset_builder(origin, data.dataset_config_name, revision=data.dataset_revision)
    except Exception as error:
        raise DataError(why_not_loaded(name, data.dataset_config_name, data.train_split, error)) from error


def _stream(builder: DatasetBuilder, data: DataArguments, split: str) -> IterableDataset:
    """The split as a stream; `DataError` when there is none, or its columns are unknown."""
    try:
        stream = builder.as_streaming_dataset(split=split)
    except Exception as error:
        raise DataError(why_not_loaded(data.dataset_name, data.dataset_config_name, split, error)) from error
    if stream.features is None:
        raise DataError(
            f"Split '{split}': what its columns hold is not known before it is read; declare them in the data set's"
            " card (dataset_info: features), or set streaming to false."
        )
    return stream


def _known_length(builder: DatasetBuilder, split: str, limit: int | None) -> int | None:
    """Images of the split by the data set's card. A limit alone is a length only if the split is known to reach it."""
    info = (builder.info.splits or {}).get(split)
    if info is None or not info.num_examples:
        return None
    return min(info.num_examples, limit or info.num_examples)


def _two_columns(stream: IterableDataset, image: str, label: str, limit: int | None) -> IterableDataset:
    stream = stream.select_columns([image, label]).cast_column(image, Image(decode=False))
    stream = stream.cast_column(label, Value("int64"))
    renamed = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
    stream = stream.rename_columns(renamed) if renamed else stream
    return stream.take(limit) if limit else stream


def _written(builder: DatasetBuilder, name: str, stream: IterableDataset, split: str) -> Dataset:
    """The whole split, written to the cache at the first call; `builder.hash` changes with the files behind it."""
    features = datasets.Features(stream.features)
    images = [column for column, feature in features.items() if isinstance(feature, Image)]
    for column in images:
        stream = stream.cast_column(column, Image(decode=False))

    def examples() -> Iterator[dict[str, Any]]:
        for example in stream:
            yield example | {column: with_bytes(example[column]) for column in images}

    try:
        dataset = Dataset.from_generator(
            examples, features=features, split=split, fingerprint=Hasher.hash([builder.cache_dir, split])
        )
    except Exception as error:
        cause = error.__cause__ or error  # datasets wraps what its reader raised
        if isinstance(cause, DataError):
            raise cause from None
        raise DataError(why_not_loaded(name, None, split, cause)) from error
    if len(dataset) == 0:
        raise DataError(f"Split '{split}' is empty.")
    return dataset


def with_bytes(encoded: dict[str, Any] | None) -> dict[str, Any] | None:
    """An undecoded image with its bytes, where its path is on the Hub or in an archive, which Pillow cannot open."""
    if encoded is None or encoded.get("bytes") or not encoded.get("path") or is_local_path(encoded["path"]):
        return encoded
    with xopen(encoded["path"], "rb") as file:
        return {"path": encoded["path"], "bytes": file.read()}
