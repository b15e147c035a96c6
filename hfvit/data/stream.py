"""Iterable data set over a streamed split, and its data loader."""

import copy
import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec.asyn
import numpy as np
import torch
from accelerate.data_loader import DataLoaderShard, prepare_data_loader
from datasets import IterableDataset
from torch.utils.data import DataLoader, get_worker_info
from transformers import TrainerCallback

from hfvit.data.dataset import collate, decoded_crops
from hfvit.data.stream_order import IMBALANCE, PLACES_PER_SHARD, ShuffledReader, remaining
from hfvit.data.stream_splits import with_bytes
from hfvit.errors import DataError, HFViTError, RecipeError, one_line
from hfvit.transforms.augmentation import Augmentation
from hfvit.utils.counter_rng import sample_seeds
from hfvit.utils.files import write_text

logger = logging.getLogger(__name__)

STREAM_FILE = "stream.json"


@dataclass
class Sample:
    """Image of a stream.

    Args:
        example: columns `image` (undecoded) and `label`, and `row` for messages.
        draw: number of the image's copy over all epochs.
        place: place in the stream, unique within an epoch.
        position: number of the reader, and position after the sample.
    """

    example: dict[str, Any]
    draw: int
    place: int
    position: list


class ImageStream(torch.utils.data.IterableDataset):
    """Training batches of a stream: `labels`, `crops` and `plan`.

    Batches are like those of `ImageDataset`. Iterating raises `DataError` for a wrong label, an image that cannot be
    decoded, and a file that cannot be read.

    Args:
        split: stream with the columns `image` (undecoded) and `label` (class index), from `stream_splits`.
        name: name of the split, for messages.
        images: number of images of the split, None if unknown.
        classes: number of classes.
        augmentation: augmentation of training images.
        batch_size: images per batch and process; all batches are full.
        seed: seed of the augmentation.
        order_seed: seed of the order.
        repeats: number of differently augmented copies of an image in a row.
        buffer_size: shuffle buffer size, in images per process; divided among its workers.
        process: index of this process.
        processes: number of processes.
        divisible: whether the shards may be divided; false for the first images of a stream.
    """

    decodes = True  # reading decodes images, which benefits from data workers

    def __init__(
        self,
        split: IterableDataset,
        name: str,
        images: int | None,
        classes: int,
        augmentation: Augmentation,
        batch_size: int,
        seed: int = 0,
        order_seed: int = 0,
        repeats: int = 1,
        buffer_size: int = 10000,
        process: int = 0,
        processes: int = 1,
        divisible: bool = True,
    ):
        self.split = split
        self.name = name
        self.images = images
        self.classes = classes
        self.augmentation = augmentation
        self.batch_size = batch_size
        self.seed = seed
        self.order_seed = order_seed
        self.repeats = repeats
        self.buffer_size = buffer_size
        self.process = process
        self.processes = processes
        self.shards = split.num_shards if divisible else None
        self.max_workers = max(1, split.num_shards // processes)
        self.restart()

    def restart(self) -> None:
        """Restart the stream from its beginning."""
        self.positions: dict[int, list] = {}  # of the readers of this process
        self.batches = 0
        self.rest: dict[int, list] = {}

    def _sharing(self, workers: int) -> dict[str, int]:
        """Return the settings that, besides the seeds, determine the order of the images."""
        return {
            "number of processes": self.processes,
            "dataloader_num_workers": self.used_workers(workers),
            "shuffle_buffer_size": self.buffer_size,
            "images that a device holds": self.batch_size,
        }

    def used_workers(self, workers: int) -> int:
        """Return the number of data workers, limited to the shards of a process."""
        return min(workers, self.max_workers)

    def _readers(self, workers: int) -> int:
        """Return the number of readers of a process."""
        return max(1, self.used_workers(workers))

    def take_position(self, batch: dict[str, Any]) -> None:
        """Move the position of a reader out of a batch, and remember it."""
        reader, *position = json.loads(batch.pop("position"))
        self.positions[reader] = position
        self.batches += 1

    def state(self) -> dict[str, Any]:
        """Return the positions of the readers of this process, as JSON values."""
        return {"positions": self.positions, "batches": self.batches}

    def save_state(self, checkpoint: str | Path, workers: int, states: list[dict[str, Any]]) -> None:
        """Save the positions of all readers in a checkpoint.

        Args:
            checkpoint: folder of the checkpoint.
            workers: number of data workers.
            states: `state` of each process.
        """
        content = {
            **self._sharing(workers),
            "shards": self.shards,
            "positions": {str(reader): place for state in states for reader, place in state["positions"].items()},
            "batches": [state["batches"] for state in states],
            "rest": {str(epoch): units for epoch, units in self.rest.items()},
        }
        write_text(Path(checkpoint) / STREAM_FILE, json.dumps(content))

    def load_state(self, checkpoint: str | Path, workers: int) -> None:
        """Continue after the images of a checkpoint, also with another number of readers.

        Args:
            checkpoint: folder of the checkpoint.
            workers: number of data workers.

        Raises:
            RecipeError: the checkpoint has no positions, or those of another data set.
        """
        file = Path(checkpoint) / STREAM_FILE
        if not file.exists():
            raise RecipeError(
                f"resume_from_checkpoint: {checkpoint} is of a run without streaming. Resume with --streaming false."
            )
        before = json.loads(file.read_text(encoding="utf-8"))
        if "positions" not in before:
            raise RecipeError(
                f"resume_from_checkpoint: {checkpoint} is of an earlier version of hfvit, which did not save the"
                " position in the stream. Start a new run."
            )
        if before["shards"] != self.shards:
            raise RecipeError(
                f"resume_from_checkpoint: the stream had {before['shards']} shards and now has {self.shards}. Restore"
                " the data set, or start a new run."
            )
        self.restart()
        now = self._sharing(workers)
        changes = [f"{key} {before[key]} -> {value}" for key, value in now.items() if before[key] != value]
        if changes:
            logger.warning(
                "Resuming the stream with %s. The order of the images changes; each is still used once per epoch.",
                ", ".join(changes),
            )
        positions = {int(reader): position for reader, position in before["positions"].items()}
        rest = {int(epoch): units for epoch, units in before["rest"].items()}
        of_readers = [key for key in now if key != "images that a device holds"]
        if all(before[key] == now[key] for key in of_readers):
            self.rest = rest
            self.batches = before["batches"][self.process]
            own = range(self.process * self._readers(workers), (self.process + 1) * self._readers(workers))
            self.positions = {reader: position for reader, position in positions.items() if reader in own}
            return
        old_workers = max(1, before["dataloader_num_workers"])
        readers = before["number of processes"] * old_workers
        buffer_size = max(1, before["shuffle_buffer_size"] // old_workers)
        self.rest = remaining(
            [
                self._reader(number, readers, buffer_size, rest, positions.get(number, [None])[0])
                for number in range(readers)
            ]
        )

    def describe(self) -> str:
        """Return a line for the log: shuffle buffer, shards and processes."""
        shards = f"{self.split.num_shards:,} shard{'s' if self.split.num_shards > 1 else ''}"
        over = f" over {self.processes} processes" if self.processes > 1 else ""
        line = f"train: streamed, shuffle buffer of {self.buffer_size:,}, {shards}{over}"
        whole = self.shards and (self.shards % self.processes == 0 or self.processes <= IMBALANCE * self.shards)
        return line if whole or self.processes == 1 else f"{line}, some of them read by several processes"

    def preview(self, count: int) -> dict[str, Any]:
        """Return a training batch of the first `count` images, without a shuffle buffer."""
        first = copy.copy(self)
        first.batch_size = count
        first.buffer_size = 1
        first.restart()
        return next(iter(first))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        workers = info.num_workers if info else 1
        if info:
            fsspec.asyn.reset_lock()  # else remote files hang after a fork (gcsfs#379)
        # Batches come from the workers in turn, and a resumed run continues with the next one.
        worker = ((info.id if info else 0) + self.batches) % workers
        samples = self.samples(worker, workers)
        while True:
            yield self._collate(list(itertools.islice(samples, self.batch_size)))

    def _collate(self, samples: list[Sample]) -> dict[str, Any]:
        labels = [class_index(sample.example, self.name, self.classes) for sample in samples]
        examples = [fetched(sample.example, self.name) for sample in samples]
        draws, places = (np.array([getattr(sample, key) for sample in samples]) for key in ("draw", "place"))
        seeds = sample_seeds(self.seed, draws, places)
        batch = {"labels": torch.tensor(labels), **decoded_crops(examples, self.name, seeds, self.augmentation)}
        batch["plan"]["seeds"] = seeds
        batch["position"] = json.dumps(samples[-1].position)
        return batch

    def samples(self, worker: int = 0, workers: int = 1) -> Iterator[Sample]:
        """Return the samples of a data worker, without end.

        Args:
            worker: index of the worker.
            workers: number of workers of this process.
        """
        number = self.process * workers + worker
        readers = self.processes * workers
        state, copies = self.positions.get(number, (None, 0))
        reader = self._reader(number, readers, max(1, self.buffer_size // workers), self.rest, state)
        before = state
        for epoch, place, example in self._checked(reader):
            shard, row = divmod(place, PLACES_PER_SHARD)
            example["row"] = f"{row} of shard {shard} in epoch {epoch}"
            for repeat in range(copies, self.repeats):
                # An image whose copies are divided among batches is read again after a resume.
                position = [before, repeat + 1] if repeat + 1 < self.repeats else [reader.state, 0]
                yield Sample(example, epoch * self.repeats + repeat, place, [number, *position])
            copies = 0
            before = reader.state
        raise DataError(
            f"Split '{self.name}': reader {number + 1} of {readers} has no images. Use fewer processes or workers"
            " (dataloader_num_workers), or increase max_train_samples."
        )

    def _reader(self, number: int, readers: int, buffer_size: int, rest: dict, state: dict | None) -> ShuffledReader:
        return ShuffledReader(self.split, self.shards, number, readers, buffer_size, self.order_seed, rest, state)

    def _checked(self, reader: ShuffledReader) -> Iterator[tuple[int, int, dict]]:
        """Convert errors of the stream to `DataError`."""
        try:
            yield from reader
        except HFViTError:
            raise
        except Exception as error:
            state = reader.state or {"epoch": 0, "number": 0, "returned": 0}
            raise DataError(
                f"Split '{self.name}': the stream failed after {state['number'] * reader.size + state['returned']}"
                f" images of epoch {state['epoch']} (reader {reader.reader + 1} of {reader.readers};"
                f" {type(error).__name__}: {one_line(error)})."
            ) from None


def fetched(example: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a row of a stream with the bytes of its image.

    Args:
        example: columns `image` (undecoded) and `row`.
        name: name of the split, for messages.

    Raises:
        DataError: the image cannot be read.
    """
    try:
        return example | {"image": with_bytes(example["image"])}
    except Exception as error:
        raise DataError(
            f"Split '{name}', row {example['row']}: cannot read {example['image'].get('path')}"
            f" ({type(error).__name__}: {one_line(error)})."
        ) from None


def class_index(example: dict[str, Any], name: str, classes: int) -> int:
    """Return the label of a row of a stream, which may be a Boolean or a whole number.

    Raises `DataError` unless it is one of `classes` indices.

    Args:
        example: columns `image`, `label` and `row`.
        name: name of the split, for messages.
        classes: number of classes.
    """
    label = example["label"]
    if label is not None and 0 <= label < classes and label == int(label):
        return int(label)
    path = (example["image"] or {}).get("path")
    problem = "the label is missing" if label is None else f"label {label} is none of the {classes} classes"
    raise DataError(
        f"Split '{name}', row {example['row']}{f' ({path})' if path else ''}: {problem}. Remove such rows, or"
        " choose another split or label_column."
    )


class StreamEpochs(TrainerCallback):
    """Callback that counts epochs by the number of images of a stream.

    Without it, the Trainer counts a data set without a length as one epoch.
    """

    def __init__(self, images: int | None):
        self.images = images

    def on_step_end(self, args, state, control, **kwargs):
        """Set the epoch, None if the number of images is unknown."""
        state.epoch = state.global_step * args.global_batch_size / self.images if self.images else None


def stream_loader(
    stream, workers: int, device: torch.device, non_blocking: bool = False, **options
) -> DataLoader | DataLoaderShard:
    """Create the data loader of a stream on this process.

    The stream already yields the batches of its process: accelerate must neither divide it (`num_processes=1`) nor
    read it on the main process only (`dispatch_batches=False`).

    Args:
        stream: `ImageStream` or `EvaluationStream`.
        workers: number of data workers, limited to the number of shards.
        device: device to move batches to.
        non_blocking: copy to the device asynchronously.
        **options: further arguments of `DataLoader`.
    """
    used = stream.used_workers(workers)
    if used < workers and isinstance(stream, ImageStream):
        logger.info("train: %d workers instead of %d, one per shard", used, workers)
    loader = DataLoader(stream, batch_size=None, collate_fn=collate, num_workers=used, **options)
    return prepare_data_loader(
        loader,
        device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        dispatch_batches=False,
        non_blocking=non_blocking,
    )
