"""Iterable data set over a streamed evaluation split, with each image once."""

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import fsspec.asyn
import numpy as np
import torch
from datasets import Dataset, Features, Image, IterableDataset, Value
from datasets.fingerprint import Hasher
from torch.utils.data import get_worker_info

from hfvit.data.dataset import DecodingReader, ImageDataset, evaluation_crops, evaluation_transform
from hfvit.data.local import data_root
from hfvit.data.stream import class_index, fetched
from hfvit.data.stream_order import PLACES_PER_SHARD, in_order
from hfvit.data.tables import root_cause
from hfvit.errors import DataError, HFViTError, one_line
from hfvit.utils.formatting import shortened

logger = logging.getLogger(__name__)


class EvaluationStream(torch.utils.data.IterableDataset):
    """Evaluation batches of a stream: `labels`, `crops` and `places`.

    Each image is in one batch of one process, decoded as by `DecodingReader`. Processes can have different numbers of
    batches, and batches can be smaller than `batch_size`. The order of all images is that of their `places`.
    Iterating raises `DataError` for a wrong label, an image that cannot be decoded, and a file that cannot be read.

    Args:
        split: stream with the columns `image` (undecoded) and `label` (class index), from `stream_splits`.
        name: name of the split, for messages.
        images: number of images, None if unknown; of a limited stream, the largest possible number.
        labels: class names.
        data_config: preprocessing of the model, from `timm.data.resolve_data_config`.
        batch_size: images per batch.
        process: index of this process.
        processes: number of processes.
        limit: maximum number of images, the first ones of each shard. Default: all.
    """

    decodes = True  # reading decodes images, which benefits from data workers

    def __init__(
        self,
        split: IterableDataset,
        name: str,
        images: int | None,
        labels: list[str],
        data_config: dict[str, Any],
        batch_size: int,
        process: int = 0,
        processes: int = 1,
        limit: int | None = None,
    ):
        self.split = split
        self.name = name
        self.images = images
        self.labels = labels
        self.data_config = data_config
        self.transform = evaluation_transform(data_config)
        self.batch_size = batch_size
        self.process = process
        self.processes = processes
        self.limit = limit
        self._is_counted = False

    def used_workers(self, workers: int) -> int:
        """Return the number of data workers, limited to the shards of a process."""
        return min(workers, max(1, self.split.num_shards // self.processes))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if info:
            fsspec.asyn.reset_lock()  # else remote files hang after a fork (gcsfs#379)
        rows = self._rows(self.process * workers + worker, self.processes * workers)
        while batch := list(islice(rows, self.batch_size)):
            examples = [example for _, example in batch]
            yield {
                "labels": torch.tensor([class_index(example, self.name, len(self.labels)) for example in examples]),
                "places": np.array([place for place, _ in batch]),
                **evaluation_crops([fetched(example, self.name) for example in examples], self.name, self.transform),
            }

    def _rows(self, reader: int = 0, readers: int = 1) -> Iterator[tuple[int, dict[str, Any]]]:
        """Return place and example of each row of a reader.

        Args:
            reader: index of the reader.
            readers: number of readers of all processes.

        Raises:
            DataError: the stream cannot be read.
        """
        count = 0
        try:
            for place, example in in_order(self.split, reader, readers, self.limit):
                count += 1
                yield place, _located(example, place)
        except HFViTError:
            raise
        except Exception as error:
            raise DataError(
                f"Split '{self.name}': the stream failed after {count} images (reader {reader + 1} of {readers};"
                f" {type(error).__name__}: {one_line(error)})."
            ) from None

    def first(self, count: int) -> ImageDataset:
        """Read the first images into memory, undecoded, to access them by index."""
        examples = [fetched(example, self.name) for _, example in islice(self._rows(), count)]
        columns = {key: [example[key] for example in examples] for key in ("image", "row")}
        split = Dataset.from_dict(columns).cast_column("image", Image(decode=False))
        return ImageDataset(
            [class_index(example, self.name, len(self.labels)) for example in examples],
            DecodingReader(split, self.name, self.data_config),
        )

    def count(self, labels: np.ndarray) -> None:
        """Set the number of images, and warn about missing images and classes.

        Calls after the first one have no effect.

        Args:
            labels: class indices of all images `(images,)`.

        Raises:
            DataError: there are no images.
        """
        if self._is_counted:
            return
        self._is_counted = True
        if not len(labels):
            raise DataError(f"Split '{self.name}' is empty.")
        # With a limit, there are fewer images if a shard has less than its share.
        if self.limit is None and self.images is not None and len(labels) != self.images:
            logger.warning(
                "Split '%s': evaluated %s images, but the data set's description has %s.",
                self.name,
                f"{len(labels):,}",
                f"{self.images:,}",
            )
        self.images = len(labels)
        missing = [self.labels[index] for index in np.setdiff1d(np.arange(len(self.labels)), labels)]
        if missing:
            logger.warning(
                "Split '%s': %d of %d classes have no images: %s",
                self.name,
                len(missing),
                len(self.labels),
                shortened(missing),
            )


def _located(example: dict[str, Any], place: int) -> dict[str, Any]:
    """Add shard and row to an example, for messages."""
    shard, row = divmod(place, PLACES_PER_SHARD)
    return example | {"row": f"{row} of shard {shard}"}


# Metadata of a data set that its stored rows depend on.
STORED_METADATA = ("dataset_name", "dataset_config_name", "dataset_commit", "image_column", "label_column", "labels")


def store_stream(split: IterableDataset, role: str, metadata: dict[str, Any], limit: int | None) -> Dataset:
    """Store the rows that `EvaluationStream` evaluates in the cache of `datasets`.

    Args:
        split: stream with the columns `image` (undecoded) and `label` (class index), from `stream_splits`.
        role: validation or test.
        metadata: description of the data set, `ImageSplits.metadata`.
        limit: maximum number of images, the first ones of each shard. Default: all.

    Returns:
        A split with the columns `image`, `row` and `label`.

    Raises:
        DataError: a label is wrong, or the stream cannot be read.
    """
    name = metadata["splits"][role]["source"]
    classes = len(metadata["labels"])

    def rows() -> Iterator[dict[str, Any]]:
        for row, (place, example) in enumerate(in_order(split, limit=limit)):
            example = _located(example, place)
            yield fetched(example, name) | {"row": row, "label": class_index(example, name, classes)}

    features = Features({"image": Image(decode=False), "row": Value("int64"), "label": Value("int64")})
    place = data_root(metadata["dataset_name"]) if metadata["is_local"] else None
    known = [metadata[key] for key in STORED_METADATA]
    key = Hasher.hash([known, place, metadata["splits"][role]["fingerprint"], name, limit])
    try:
        return Dataset.from_generator(rows, features=features, split=name, fingerprint=key)
    except Exception as error:
        cause = root_cause(error)
        if isinstance(cause, HFViTError):
            raise cause from None
        raise DataError(f"Split '{name}': the stream failed ({type(cause).__name__}: {one_line(cause)}).") from None
