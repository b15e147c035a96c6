"""Iterable dataset over a streamed split, and its data loader."""

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

# With this many shards a process, one more or less is little, and each file is read by one process only.
ENOUGH_SHARDS = 10
STREAM_FILE = "stream.json"


class ImageStream(torch.utils.data.IterableDataset):
    """Training batches of a stream, of the kind that `ImageDataset` makes: `labels`, `crops` and the drawn `plan`.

    Args:
        split: columns `image` (undecoded) and `label` (class index), from stream_source.py.
        name: the data set's own split, for messages.
        images: how many the split has; None where nobody has counted.
        classes: how many; a label must be below.
        augmentation: of augment.py.
        batch_size: images of one batch on one process; a batch is never smaller.
        seed: of what is random about an image.
        order_seed: of the order.
        repeats: how often each image comes in a row, augmented each time anew.
        buffer_size: images that a process holds to draw from, shared by its workers.
        process, processes: which of how many.

    Iterating raises `DataError` for a label or a picture that cannot be used and for a file that cannot be read, each
    with its split and place.
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
        self.split, self.name, self.images, self.classes = split, name, images, classes
        self.augmentation, self.batch_size = augmentation, batch_size
        self.seed, self.order_seed, self.repeats, self.buffer_size = seed, order_seed, repeats, buffer_size
        self.process, self.processes = process, processes
        self.skipped = 0
        shards = split.num_shards
        self.by_shards = shards % processes == 0 or shards >= ENOUGH_SHARDS * processes
        self.max_workers = shards // processes if self.by_shards else shards

    def _sharing(self, workers: int) -> dict[str, int]:
        """What the order of the images depends on beside the seeds."""
        return {
            "number of processes": self.processes,
            "dataloader_num_workers": min(workers, self.max_workers),
            "images that a device holds": self.batch_size,
            "shuffle_buffer_size": self.buffer_size,
        }

    def save_sharing(self, checkpoint: str, workers: int) -> None:
        """Write down in `checkpoint` how the stream is shared out."""
        write_text(Path(checkpoint) / STREAM_FILE, json.dumps(self._sharing(workers)))

    def check_sharing(self, checkpoint: str, workers: int) -> None:
        """Raise `RecipeError` when the run of `checkpoint` shared the stream out otherwise: it saw other images."""
        file = Path(checkpoint) / STREAM_FILE
        if not file.exists():
            raise RecipeError(
                f"resume_from_checkpoint: {checkpoint} is of a run without streaming; resume without it."
            )
        before = json.loads(file.read_text(encoding="utf-8"))
        for what, now in self._sharing(workers).items():
            if before.get(what) != now:
                raise RecipeError(
                    f"resume_from_checkpoint: the stream was read with {what} {before.get(what)}, now it is {now};"
                    " resume with the same, or start anew."
                )

    def describe(self) -> str:
        """One line for the log: that the split is streamed, and how the processes share it."""
        shards = f"{self.split.num_shards:,} shard{'s' if self.split.num_shards > 1 else ''}"
        line = f"train: streamed, shuffle buffer of {self.buffer_size:,}, "
        if self.by_shards:
            return line + shards + (f" over {self.processes} processes" if self.processes > 1 else "")
        return (
            f"{line}{shards}, which {self.processes} processes cannot share evenly: each reads all files and keeps one"
            f" image of {self.processes}"
        )

    @property
    def decodes(self) -> bool:
        """Whether reading means to decode pictures, which is work for several processes."""
        return True

    def preview(self, count: int) -> dict[str, Any]:
        """A training batch of the stream's first `count` images; the shuffle buffer is not filled for it."""
        first = copy.copy(self)
        first.batch_size, first.buffer_size, first.skipped = count, 1, 0
        return next(iter(first))

    def skip(self, batches: int) -> None:
        """Yield empty batches in place of this process's first `batches`, which a resumed run has already seen."""
        self.skipped = batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        skipped = (self.skipped - worker + workers - 1) // workers  # the loader asks its workers in turn
        draws = self._draws(worker, workers)
        for number in itertools.count():
            drawn = list(itertools.islice(draws, self.batch_size))
            yield {} if number < skipped else self._batch(drawn)  # read, but not decoded

    def _batch(self, drawn: list[tuple[dict, int, int]]) -> dict[str, Any]:
        examples, draws, places = zip(*drawn, strict=True)
        labels = [self._label(example) for example in examples]
        examples = [example | {"image": self._fetched(example)} for example in examples]
        seeds = sample_seeds(self.seed, np.array(draws), np.array(places))
        batch = {"labels": torch.tensor(labels), **decoded_crops(examples, self.name, seeds, self.augmentation)}
        batch["plan"]["seeds"] = seeds
        return batch

    def _draws(self, worker: int, workers: int) -> Iterator[tuple[dict, int, int]]:
        """Examples without end, each with its draw and its place, the two that its seed is made of.

        Within an epoch, place n of a reader is n * readers + reader: no other reader has it.
        """
        reader, readers = self.process * workers + worker, self.processes * workers
        for epoch in itertools.count():
            place = -1
            for place, example in enumerate(self._examples(epoch, workers)):
                example["row"] = f"{place} of the stream in epoch {epoch} (reader {reader + 1} of {readers})"
                for repeat in range(self.repeats):
                    yield example, epoch * self.repeats + repeat, place * readers + reader
            if place < 0:
                raise DataError(
                    f"Split '{self.name}': reader {reader + 1} of {readers} finds no image in its share of the stream;"
                    " use fewer processes or workers (dataloader_num_workers), or raise max_train_samples."
                )

    def _examples(self, epoch: int, workers: int) -> Iterator[dict]:
        # Not the split's own set_epoch: its epoch lies in memory that workers share, who are not at the same one.
        order = np.random.default_rng([self.order_seed, epoch])
        shuffled = self.split.shuffle(generator=order, buffer_size=max(1, self.buffer_size // workers))
        strategy = "shards" if self.by_shards else "examples"
        share = iter(split_dataset_by_node(shuffled, self.process, self.processes, strategy=strategy))
        for place in itertools.count():
            try:
                example = next(share)
            except StopIteration:
                return
            except HFViTError:
                raise
            except Exception as error:
                raise DataError(
                    f"Split '{self.name}': the stream breaks off after {place} images of epoch {epoch}"
                    f" ({type(error).__name__}: {one_line(error)})."
                ) from None
            yield example

    def _fetched(self, example: dict) -> dict | None:
        try:
            return with_bytes(example["image"])
        except Exception as error:
            raise DataError(
                f"Split '{self.name}', row {example['row']}: {example['image'].get('path')} cannot be fetched"
                f" ({type(error).__name__}: {one_line(error)})."
            ) from None

    def _label(self, example: dict) -> int:
        label = example["label"]
        if label is not None and 0 <= label < self.classes:
            return label
        path = (example["image"] or {}).get("path")
        what = "the label is missing" if label is None else f"label {label} is outside the {self.classes} classes"
        raise DataError(
            f"Split '{self.name}', row {example['row']}{f' ({path})' if path else ''}: {what}; remove such rows, or"
            " choose another split or label_column."
        )


class StreamEpochs(TrainerCallback):
    """Counts epochs by the images of a stream; the Trainer takes a run without a length for one epoch."""

    def __init__(self, images: int | None):
        self.images = images

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step * args.global_batch_size / self.images if self.images else None


def stream_loader(
    stream: ImageStream, workers: int, device: torch.device, non_blocking: bool = False, **options
) -> DataLoader | DataLoaderShard:
    """A loader of this process's own batches; `options` are torch's.

    The stream knows its process, so accelerate must not divide it again. Nor must it read the stream on one process
    and send the batches to the others, as it does with iterable datasets unless told otherwise.
    """
    if workers > stream.max_workers:
        logger.info("train: %d workers instead of %d: one needs a shard of its own", stream.max_workers, workers)
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
