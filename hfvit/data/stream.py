"""Iterable data set over a streamed split, and its data loader."""

import copy
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderShard, prepare_data_loader
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, get_worker_info
from transformers import TrainerCallback

from hfvit.data.dataset import collate, decoded_crops
from hfvit.data.stream_splits import with_bytes
from hfvit.errors import DataError, HFViTError, RecipeError, one_line
from hfvit.transforms.augmentation import Augmentation
from hfvit.utils.counter_rng import sample_seeds
from hfvit.utils.files import write_text

logger = logging.getLogger(__name__)

# With at least this many shards per process, shards are divided among processes even if their numbers differ by one.
ENOUGH_SHARDS = 10
STREAM_FILE = "stream.json"


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
    """

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
        self.skipped = 0
        shards = split.num_shards
        self.by_shards = shards % processes == 0 or shards >= ENOUGH_SHARDS * processes
        self.max_workers = shards // processes if self.by_shards else shards

    def _sharing(self, workers: int) -> dict[str, int]:
        """Return the settings that, besides the seeds, determine the order of the images."""
        return {
            "number of processes": self.processes,
            "dataloader_num_workers": min(workers, self.max_workers),
            "images that a device holds": self.batch_size,
            "shuffle_buffer_size": self.buffer_size,
        }

    def save_sharing(self, checkpoint: str, workers: int) -> None:
        """Save the settings that determine the order of the images in a checkpoint."""
        write_text(Path(checkpoint) / STREAM_FILE, json.dumps(self._sharing(workers)))

    def check_sharing(self, checkpoint: str, workers: int) -> None:
        """Raise `RecipeError` if the images of a checkpoint's run were in another order."""
        file = Path(checkpoint) / STREAM_FILE
        if not file.exists():
            raise RecipeError(
                f"resume_from_checkpoint: {checkpoint} is of a run without streaming. Resume with --streaming false."
            )
        before = json.loads(file.read_text(encoding="utf-8"))
        for setting, now in self._sharing(workers).items():
            if before.get(setting) != now:
                raise RecipeError(
                    f"resume_from_checkpoint: {setting} was {before.get(setting)} and is now {now}, which changes the"
                    " order of the stream. Resume with the same value, or start a new run."
                )

    def describe(self) -> str:
        """Return a line for the log: shuffle buffer, shards and processes."""
        shards = f"{self.split.num_shards:,} shard{'s' if self.split.num_shards > 1 else ''}"
        line = f"train: streamed, shuffle buffer of {self.buffer_size:,}, "
        if self.by_shards:
            return line + shards + (f" over {self.processes} processes" if self.processes > 1 else "")
        return (
            f"{line}{shards}, not enough for {self.processes} processes: each process reads all files and uses one of"
            f" {self.processes} images"
        )

    @property
    def decodes(self) -> bool:
        """Return whether reading decodes images, which benefits from data workers."""
        return True

    def preview(self, count: int) -> dict[str, Any]:
        """Return a training batch of the first `count` images, without a shuffle buffer."""
        first = copy.copy(self)
        first.batch_size = count
        first.buffer_size = 1
        first.skipped = 0
        return next(iter(first))

    def skip(self, batches: int) -> None:
        """Yield empty batches instead of the first `batches`, as a resumed run needs."""
        self.skipped = batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        skipped = (self.skipped - worker + workers - 1) // workers  # batches come from the workers in turn
        samples = self._samples(worker, workers)
        for number in itertools.count():
            batch = list(itertools.islice(samples, self.batch_size))
            yield {} if number < skipped else self._collate(batch)  # skipped images are read, but not decoded

    def _collate(self, samples: list[tuple[dict, int, int]]) -> dict[str, Any]:
        examples, draws, places = zip(*samples, strict=True)
        labels = [self._label(example) for example in examples]
        examples = [example | {"image": self._fetch(example)} for example in examples]
        seeds = sample_seeds(self.seed, np.array(draws), np.array(places))
        batch = {"labels": torch.tensor(labels), **decoded_crops(examples, self.name, seeds, self.augmentation)}
        batch["plan"]["seeds"] = seeds
        return batch

    def _samples(self, worker: int, workers: int) -> Iterator[tuple[dict, int, int]]:
        """Yield (example, draw, place) in an endless loop over epochs.

        Draw and place determine the seed of the augmentation. The n-th example of a reader has the place n * readers +
        reader, which is unique within an epoch.
        """
        reader = self.process * workers + worker
        readers = self.processes * workers
        for epoch in itertools.count():
            place = -1
            for place, example in enumerate(self._examples(epoch, workers)):
                example["row"] = f"{place} of the stream in epoch {epoch} (reader {reader + 1} of {readers})"
                for repeat in range(self.repeats):
                    yield example, epoch * self.repeats + repeat, place * readers + reader
            if place < 0:
                raise DataError(
                    f"Split '{self.name}': reader {reader + 1} of {readers} has no images. Use fewer processes or"
                    " workers (dataloader_num_workers), or increase max_train_samples."
                )

    def _examples(self, epoch: int, workers: int) -> Iterator[dict]:
        # Not IterableDataset.set_epoch, whose epoch is shared by all workers, which may be in different epochs.
        order = np.random.default_rng([self.order_seed, epoch])
        shuffled = self.split.shuffle(generator=order, buffer_size=max(1, self.buffer_size // workers))
        strategy = "shards" if self.by_shards else "examples"
        examples = iter(split_dataset_by_node(shuffled, self.process, self.processes, strategy=strategy))
        for place in itertools.count():
            try:
                example = next(examples)
            except StopIteration:
                return
            except HFViTError:
                raise
            except Exception as error:
                raise DataError(
                    f"Split '{self.name}': the stream failed after {place} images of epoch {epoch}"
                    f" ({type(error).__name__}: {one_line(error)})."
                ) from None
            yield example

    def _fetch(self, example: dict) -> dict | None:
        try:
            return with_bytes(example["image"])
        except Exception as error:
            raise DataError(
                f"Split '{self.name}', row {example['row']}: cannot read {example['image'].get('path')}"
                f" ({type(error).__name__}: {one_line(error)})."
            ) from None

    def _label(self, example: dict) -> int:
        label = example["label"]
        if label is not None and 0 <= label < self.classes:
            return label
        path = (example["image"] or {}).get("path")
        problem = "the label is missing" if label is None else f"label {label} is outside the {self.classes} classes"
        raise DataError(
            f"Split '{self.name}', row {example['row']}{f' ({path})' if path else ''}: {problem}. Remove such rows, or"
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
    stream: ImageStream, workers: int, device: torch.device, non_blocking: bool = False, **options
) -> DataLoader | DataLoaderShard:
    """Create the data loader of a stream on this process.

    The stream already yields the batches of its process: accelerate must neither divide it (`num_processes=1`) nor
    read it on the main process only (`dispatch_batches=False`).

    Args:
        stream: the stream.
        workers: number of data workers, limited to the number of shards.
        device: device to move batches to.
        non_blocking: copy to the device asynchronously.
        **options: further arguments of `DataLoader`.
    """
    if workers > stream.max_workers:
        logger.info("train: %d workers instead of %d, one per shard", stream.max_workers, workers)
        workers = stream.max_workers
    loader = DataLoader(stream, batch_size=None, collate_fn=collate, num_workers=workers, **options)
    return prepare_data_loader(
        loader,
        device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        dispatch_batches=False,
        non_blocking=non_blocking,
    )
