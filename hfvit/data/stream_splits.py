"""Open the splits of a data set as streams."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, DatasetBuilder, Image, IterableDataset, Value
from datasets.fingerprint import Hasher
from datasets.utils.file_utils import is_local_path, xopen

from hfvit.data.folders import no_split_error
from hfvit.data.labels import SingleLabel, as_in_training, encode_labels, normalized, read_class_names
from hfvit.data.local import LocalData, open_local
from hfvit.data.open_image import DEFAULT_LIMITS
from hfvit.data.references import check_cards
from hfvit.data.splits import (
    DIGITS,
    ImageSplits,
    at_most,
    check_columns,
    choose_splits,
    data_metadata,
    dataset_commit,
    drop_without_label_column,
    find_image_column,
    find_labels,
    is_folder_builder,
    labels_as_in_training,
    not_loaded_error,
    standardize,
)
from hfvit.data.tables import fingerprint, root_cause, stream_images
from hfvit.errors import DataError, RecipeError
from hfvit.recipe.arguments import DEFAULT_TEST_SPLIT, DataArguments
from hfvit.utils.files import expand_user
from hfvit.utils.formatting import shortened
from hfvit.utils.hub_ids import folder_or_hub_id

FIRST_ROWS = 16  # of a test split, to find out whether it has labels

logger = logging.getLogger(__name__)


def stream_splits(
    data: DataArguments, seed: int = 42, check_length: Callable[[int | None], None] = lambda images: None
) -> ImageSplits:
    """Open the training split as a stream, the others by `stream_evaluation`.

    Args:
        data: data options of the recipe.
        seed: seed of the images that `max_eval_samples` selects.
        check_length: function to call with the number of training images, or None if unknown, before files are read.

    Returns:
        The splits, with the columns `image` and `label`.

    Raises:
        DataError: the data set cannot be used for training, as far as known without reading the stream.
    """
    source = _open(data)
    names = choose_splits(data, source.names(), source.local)
    streams = {role: source.stream(name, f"{role}_split") for role, name in names.items()}

    train = streams["train"]
    image_column = data.image_column or find_image_column(train.features)
    kind = find_labels(train, data, image_column)
    if not isinstance(kind, SingleLabel):
        raise DataError("streaming: not available with several labels per image. Set streaming to false.")
    label_column = kind.name
    drop_without_label_column(data, names, streams, kind)
    for role, stream in streams.items():
        check_columns(stream, names[role], image_column, kind)
    class_label = train.features[label_column]
    class_names = read_class_names(data)
    if not isinstance(class_label, ClassLabel) and class_names is None:
        raise DataError(
            f"label_column: class names are unknown before the stream is read, since column '{label_column}' of split"
            f" '{data.train_split}' is {class_label.dtype}. Pass class_names, declare a ClassLabel in the card of the"
            " data set (dataset_info: features), or set streaming to false."
        )
    images = source.length(names["train"], data.max_train_samples)
    check_length(images)

    shown = {"train": (names["train"], images, source.fingerprint(names["train"]))}
    whole: dict[str, Dataset] = {}
    if data.stream_evaluation:
        _drop_unlabeled(data, names, streams, kind)
        labels, _ = kind.encode(train.features, {}, names, class_names)
        found = {role: streams[role] for role in names if role != "train"}
        for role, split in found.items():
            _check_classes(split, names[role], label_column, class_label)
            index_of = _class_indices(split.features[label_column], class_label, names[role], labels, class_names)
            found[role] = _two_columns(split, image_column, label_column, None, index_of)
            rows = source.length(names[role], data.max_eval_samples)
            shown[role] = (names[role], rows, source.fingerprint(names[role]))
    else:
        loaded = {role: source.load(names[role], streams[role], f"{role}_split") for role in names if role != "train"}
        raw_labels = {role: kind.read(split) for role, split in loaded.items()}
        raw_labels = labels_as_in_training(kind, raw_labels, streams, names, class_names)
        labels, indices = kind.encode(train.features, raw_labels, names, class_names)
        whole = {role: standardize(split, image_column, indices[role]) for role, split in loaded.items()}
        found = {role: at_most(split, data.max_eval_samples, seed) for role, split in whole.items()}
        shown |= {role: (names[role], len(split), split._fingerprint) for role, split in found.items()}
    if source.local:
        source.local.log()
    index_of = _class_indices(class_label, class_label, names["train"], labels, class_names)
    return ImageSplits(
        train=_two_columns(train, image_column, label_column, data.max_train_samples, index_of),
        validation=found["validation"],
        test=found.get("test"),
        sources={role: names[role] for role in whole},
        whole=whole,
        metadata=data_metadata(data, source.commit, image_column, kind, labels, shown),
        kind=kind,
    )


def _drop_unlabeled(
    data: DataArguments, names: dict[str, str], streams: dict[str, IterableDataset], kind: SingleLabel
) -> None:
    """Remove a test split that is not named and whose first rows have no labels.

    Args:
        data: data options of the recipe.
        names: names of the splits by role, changed in place.
        streams: splits by role.
        kind: label column.
    """
    if "test" not in names or data.test_split != DEFAULT_TEST_SPLIT:
        return
    try:
        first = [row[kind.name] for row in streams["test"].select_columns([kind.name]).take(FIRST_ROWS)]
    except Exception as error:
        raise not_loaded_error(data, names["test"], error, "test_split") from error
    if not first:
        raise DataError(f"test_split: split '{names['test']}' is empty.")
    if kind.is_unlabeled(first):
        logger.warning("test: split '%s' has no labels and is not used", names.pop("test"))


def _check_classes(split: IterableDataset, name: str, column: str, train: Any) -> None:
    """Raise `DataError` if an evaluation split has other classes than training.

    Args:
        split: evaluation split.
        name: name of the split, for messages.
        column: label column.
        train: type of the column in the training split.
    """
    label = split.features[column]
    both = isinstance(label, ClassLabel) and isinstance(train, ClassLabel)
    known = set(map(normalized, train.names)) if both else set()
    unknown = [class_name for class_name in label.names if normalized(class_name) not in known] if both else []
    are_indices = [kind.dtype.startswith(("int", "uint")) for kind in (label, train)]  # ClassLabel too
    if unknown or are_indices[0] != are_indices[1]:
        raise DataError(
            f"label_column: the classes of split '{name}' differ from those of the training split"
            f" ({shortened(unknown) or f'{label.dtype} instead of {train.dtype}'})."
        )


@dataclass
class _Source:
    """Data set to stream, from local files or a builder of `datasets`."""

    data: DataArguments
    local: LocalData | None = None
    builder: DatasetBuilder | None = None

    def fingerprint(self, split: str) -> str:
        """Return the fingerprint of the files of a split.

        For a data set on the Hub, it is that of all its files.
        """
        if self.local:
            found = self.local.splits[split]
            return fingerprint(found.files) if found.files else found.load()._fingerprint  # of a saved data set
        return self.builder.hash

    @property
    def commit(self) -> str | None:
        """Return the commit of a data set on the Hub."""
        return None if self.local else dataset_commit([self.builder.cache_dir])

    def names(self) -> list[str]:
        """Return the names of the splits."""
        return list(self.local.splits) if self.local else list(self._streams())

    def _streams(self) -> dict[str, IterableDataset]:
        try:
            return self.builder.as_streaming_dataset()
        except Exception as error:
            raise not_loaded_error(self.data, self.data.train_split, error, "train_split") from error

    def stream(self, split: str, option: str) -> IterableDataset:
        """Stream a split with undecoded images.

        Args:
            split: name of the split.
            option: option with the split, for messages.

        Raises:
            DataError: the split does not exist, or its columns are unknown.
        """
        if self.local:
            if split not in self.local.splits:
                raise no_split_error(option, self.local.name, split, self.local.splits)
            stream = self.local.splits[split].stream()
        else:
            streams = self._streams()
            if split not in streams:
                raise no_split_error(option, self.data.dataset_name, split, streams)
            stream = streams[split]
        if stream.features is None:
            raise DataError(
                f"streaming: the columns of split '{split}' are unknown before it is read. Declare them in the card of"
                " the data set (dataset_info: features), or set streaming to false."
            )
        if self.local or is_folder_builder(self.builder.name):
            return stream
        found = [name for name, feature in stream.features.items() if isinstance(feature, Image)]
        column = self.data.image_column or (found[0] if len(found) == 1 else None)
        if column is None:
            return stream
        return stream_images(stream, column, split, None, self.data.allow_outside_paths)

    def length(self, split: str, limit: int | None) -> int | None:
        """Return the number of images of a split, None if unknown before reading.

        A limit without a known number does not count, since the split may be smaller.
        """
        if self.local:
            rows = self.local.splits[split].rows
            return rows and min(rows, limit or rows)
        return _known_length(self.builder, split, limit)

    def load(self, split: str, stream: IterableDataset, option: str) -> Dataset:
        """Load a complete split.

        Args:
            split: name of the split.
            stream: stream of the split.
            option: option with the split, for messages.
        """
        if self.local:
            return self.local.load(split, option)
        return _written(self.builder, self.data, stream, split, option)


def _open(data: DataArguments) -> _Source:
    name = data.dataset_name
    if name == DIGITS:
        raise RecipeError(f"streaming: not available with '{DIGITS}'. Omit it.")
    tables = lance_tables(name)
    if tables:
        return _Source(data, builder=_lance_builder(data, tables))
    local = open_local(data)
    if local:
        return _Source(data, local=local)
    origin = folder_or_hub_id(name, DataError, "dataset_name")
    check_cards(origin, data.allow_outside_paths, data.dataset_revision)
    try:
        builder = datasets.load_dataset_builder(origin, data.dataset_config_name, revision=data.dataset_revision)
    except Exception as error:
        raise not_loaded_error(data, data.train_split, error, "train_split") from error
    return _Source(data, builder=builder)


def lance_tables(folder: str) -> dict[str, str]:
    """Return the files of Lance tables `SPLIT.lance` in a folder, by split."""
    tables = sorted(expand_user(folder).glob("*.lance"))
    return {table.stem: f"{table}/**" for table in tables if (table / "_versions").is_dir()}


def _lance_builder(data: DataArguments, tables: dict[str, str]) -> DatasetBuilder:
    if find_spec("lance") is None:
        raise DataError("dataset_name: Lance tables require pylance. Install it with `pip install pylance`.")
    try:
        return datasets.load_dataset_builder("lance", data_files=tables)
    except Exception as error:
        raise not_loaded_error(data, data.train_split, error, "train_split") from error


def _known_length(builder: DatasetBuilder, split: str, limit: int | None) -> int | None:
    """Return the number of images of a split by its data set card, at most `limit`."""
    info = (builder.info.splits or {}).get(split)
    if info is None or not info.num_examples:
        return None
    return min(info.num_examples, limit or info.num_examples)


def _class_indices(
    own: Any, train: Any, name: str, labels: list[str], class_names: list[str] | None
) -> dict[Any, int] | None:
    """Return the class index of each label, as `load_whole_splits` encodes them.

    Args:
        own: type of the label column in the split.
        train: type of the label column in the training split.
        name: name of the split, for messages.
        labels: class names in the order of the logits.
        class_names: class names that the recipe declares, or None.

    Returns:
        The class index by label, None if the labels are class indices.
    """
    if own.dtype in ("string", "large_string"):
        return {label: index for index, label in enumerate(labels)}
    numbered = own if isinstance(own, ClassLabel) else train
    if not isinstance(numbered, ClassLabel):
        return None
    numbers = list(range(len(numbered.names)))
    indices = as_in_training(numbers, own, train, name, class_names)
    if isinstance(train, ClassLabel):
        indices = encode_labels(train, {"train": indices}, {"train": name}, class_names)[1]["train"].tolist()
    return None if indices == numbers else dict(zip(numbers, indices, strict=True))


def _two_columns(
    stream: IterableDataset, image: str, label: str, limit: int | None, index_of: dict[Any, int] | None
) -> IterableDataset:
    """Select the columns `image` (undecoded) and `label` (class index) of a stream.

    Args:
        stream: the split.
        image: image column.
        label: label column.
        limit: largest number of images. None: all.
        index_of: class index by label, None if the labels are class indices.
    """
    stream = stream.select_columns([image, label]).cast_column(image, Image(decode=False))
    if index_of is not None:
        features = datasets.Features({**stream.features, label: Value("int64")})
        stream = stream.map(_to_index, fn_kwargs={"label": label, "index_of": index_of}, features=features)
    stream = stream.cast_column(label, Value("int64"))
    renamed = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
    stream = stream.rename_columns(renamed) if renamed else stream
    return stream.take(limit) if limit else stream


def _to_index(example: dict[str, Any], label: str, index_of: dict) -> dict[str, Any]:
    value = example[label]
    if isinstance(value, str):
        value = normalized(value) if value.strip() else None
    return {**example, label: None if value is None else index_of.get(value, -1)}


def _written(
    builder: DatasetBuilder, data: DataArguments, stream: IterableDataset, split: str, option: str
) -> Dataset:
    """Load a complete split from a stream, through the cache of `datasets`.

    Args:
        builder: builder of the data set; its hash changes with the files.
        data: data options of the recipe.
        stream: stream of the split.
        split: name of the split.
        option: option with the split, for messages.
    """
    features = datasets.Features(stream.features)
    images = [column for column, feature in features.items() if isinstance(feature, Image)]
    stream = stream.decode(False)  # images inside other columns, audio and video too

    def examples() -> Iterator[dict[str, Any]]:
        for example in stream:
            yield example | {column: with_bytes(example[column]) for column in images}

    try:
        dataset = Dataset.from_generator(
            examples, features=features, split=split, fingerprint=Hasher.hash([builder.cache_dir, split])
        )
    except Exception as error:
        cause = root_cause(error)
        if isinstance(cause, DataError):
            raise cause from None
        raise not_loaded_error(data, split, cause, option) from error
    if len(dataset) == 0:
        raise DataError(f"{option}: split '{split}' is empty.")
    return dataset


def with_bytes(encoded: dict[str, Any] | None) -> dict[str, Any] | None:
    """Read the bytes of an undecoded image whose path is on the Hub or in an archive."""
    if encoded is None or encoded.get("bytes") is not None or not encoded.get("path"):
        return encoded
    if is_local_path(encoded["path"]):
        return encoded
    with xopen(encoded["path"], "rb") as file:
        content = file.read(DEFAULT_LIMITS.max_bytes + 1)
    DEFAULT_LIMITS.check_bytes(len(content))
    return {"path": encoded["path"], "bytes": content}
