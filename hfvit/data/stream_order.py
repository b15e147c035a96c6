"""Order of a stream: shuffled in blocks, with a small state to resume from.

Shards are divided among readers (workers of all processes). A reader reads a few shards in turn, and shuffles blocks
of half its buffer: while it returns the images of one block, it reads the next. Its state is the position of the two
blocks in the shards (`IterableDataset.state_dict`), so that resuming reads two blocks, not the stream. With another
number of readers, what the old ones have not returned is divided among the new ones.
"""

import copy
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from datasets import IterableDataset

# Rows of a shard: `shard` (None: of the complete stream), `index` and `count` (rows `index`, `index + count`, ...),
# and in a resumed run `row` and `state` to start from. Or the rest of a `block` of another reader. As JSON values.
Unit = dict[str, Any]
State = dict[str, Any]
Row = tuple[int, dict]  # place, unique within an epoch, and example

OPEN_SHARDS = 4  # shards that a reader reads in turn
# Readers whose numbers of images differ by at most this fraction start their next epochs at about the same time.
IMBALANCE = 0.1
PLACES_PER_SHARD = 2**40


def divide(shards: int, reader: int, readers: int, order: np.ndarray) -> list[Unit]:
    """Return the units of a reader in an epoch.

    Complete shards as far as they can be divided evenly; the rows of the others are divided, unless there are so many
    shards that one more or less makes no difference.

    Args:
        shards: number of shards.
        reader: index of the reader.
        readers: number of readers.
        order: order of the shards in the epoch (shards,).
    """
    rest = shards % readers
    if rest == 0 or readers <= IMBALANCE * shards:
        return [{"shard": int(shard), "index": 0, "count": 1} for shard in order[reader::readers]]
    whole = order[: shards - rest][reader::readers]
    units = [{"shard": int(shard), "index": 0, "count": 1} for shard in whole]
    count = min(readers // math.gcd(rest, readers), math.ceil(readers / (IMBALANCE * shards)))
    parts = [(int(shard), index) for shard in order[shards - rest :] for index in range(count)]
    return units + [{"shard": shard, "index": index, "count": count} for shard, index in parts[reader::readers]]


class Source:
    """Iterator over the rows of units, of `OPEN_SHARDS` of them in turn.

    Args:
        split: the stream.
        units: units to read.
        state: state of an earlier source of the same units, None for the beginning.
    """

    def __init__(self, split: IterableDataset, units: list[Unit], state: State | None):
        self.split = split
        self.units = units
        state = state or {"open": [], "next": 0, "turn": 0}
        self.next = state["next"]
        self.turn = state["turn"]
        self.open = [self._reader(number, row, position) for number, row, position in state["open"]]

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        while True:
            while len(self.open) < OPEN_SHARDS and self.next < len(self.units):
                unit = self.units[self.next]
                self.open.append(self._reader(self.next, unit.get("row", 0), unit.get("state")))
                self.next += 1
            if not self.open:
                raise StopIteration
            self.turn %= len(self.open)
            try:
                found = next(self.open[self.turn])
            except StopIteration:
                del self.open[self.turn]
                continue
            self.turn += 1
            return found

    def state(self) -> State:
        """Return the position, as JSON values."""
        return {"open": [reader.position() for reader in self.open], "next": self.next, "turn": self.turn}

    def _reader(self, number: int, row: int, state: dict | None) -> "_ShardReader | _BlockReader":
        unit = self.units[number]
        if "block" in unit:
            return _BlockReader(self.split, number, unit["block"], row)
        return _ShardReader(self.split, number, unit, row, state)


class _ShardReader:
    """Iterator over the rows of a unit of a shard.

    Args:
        split: the stream.
        number: number of the unit.
        unit: the unit.
        row: first row.
        state: state of the shard's data set before that row.
    """

    def __init__(self, split: IterableDataset, number: int, unit: Unit, row: int, state: dict | None):
        self.number = number
        self.unit = unit
        self.row = row
        shard = unit["shard"]
        # A copy, as `split` itself has one position for all readers.
        self.dataset = copy.deepcopy(split) if shard is None else split.shard(split.num_shards, shard)
        self.first_place = (shard or 0) * PLACES_PER_SHARD
        self.initial = state
        self.rows = None

    def __iter__(self):
        return self

    def __next__(self) -> Row:
        if self.rows is None:
            self.dataset.load_state_dict(self.initial)
            # Unlike iteration over examples, `iter` does not divide the shards among data loader workers itself.
            self.rows = self.dataset.iter(batch_size=1)
        for batch in self.rows:
            row = self.row
            self.row += 1
            if row % self.unit["count"] == self.unit["index"]:
                return self.first_place + row, {column: values[0] for column, values in batch.items()}
        raise StopIteration

    def position(self) -> list:
        return [self.number, self.row, self.initial if self.rows is None else self.dataset.state_dict()]


class _BlockReader:
    """Iterator over the rest of a shuffled block of another reader.

    Args:
        split: the stream.
        number: number of the unit.
        block: units, position and seed of the block.
        row: first row, in the block's order.
    """

    def __init__(self, split: IterableDataset, number: int, block: dict[str, Any], row: int):
        self.split = split
        self.number = number
        self.block = block
        self.row = row
        self.rows: list[Row] | None = None

    def __iter__(self):
        return self

    def __next__(self) -> Row:
        if self.rows is None:
            source = Source(self.split, self.block["units"], self.block["start"])
            self.rows = shuffled(list(islice(source, self.block["size"])), self.block["seed"])
        if self.row >= len(self.rows):
            raise StopIteration
        self.row += 1
        return self.rows[self.row - 1]

    def position(self) -> list:
        return [self.number, self.row, None]


def in_order(split: IterableDataset, reader: int = 0, readers: int = 1, limit: int | None = None) -> Iterator[Row]:
    """Return the rows of a reader once, in the order of the shards.

    Args:
        split: the stream.
        reader: index of the reader.
        readers: number of readers, which together return each row once.
        limit: number of rows of all readers, the first ones of each shard. Fewer if a shard has less than its share.
            Default: all.
    """
    shards = split.num_shards
    for number, unit in enumerate(divide(shards, reader, readers, np.arange(shards))):
        shard = unit["shard"]
        end = math.inf if limit is None else limit * (shard + 1) // shards - limit * shard // shards
        rows = _ShardReader(split, number, unit, 0, None)
        while rows.row < end:
            row = next(rows, None)
            if row is None or row[0] % PLACES_PER_SHARD >= end:
                break
            yield row


def shuffled(rows: list, seed: list[int]) -> list:
    """Return `rows` in a random order that depends on `seed` only."""
    return [rows[place] for place in np.random.default_rng(seed).permutation(len(rows))]


class ShuffledReader:
    """Iterator over (epoch, place, example) of a reader.

    It ends only if there are no images for it.

    Args:
        split: the stream.
        shards: number of shards to divide, None to divide the rows of the complete stream.
        reader: index of the reader.
        readers: number of readers of all processes.
        buffer_size: images that the reader keeps to shuffle.
        seed: seed of the order.
        rest: units of epochs that other readers began, by epoch, from `remaining`.
        state: state of this reader in an earlier run with the same arguments, or None.

    Attributes:
        state: position after the image that was returned last, as JSON values; None at the beginning.
    """

    def __init__(
        self,
        split: IterableDataset,
        shards: int | None,
        reader: int,
        readers: int,
        buffer_size: int,
        seed: int,
        rest: dict[int, list[Unit]],
        state: State | None,
    ):
        self.split = split
        self.shards = shards
        self.reader = reader
        self.readers = readers
        self.size = max(1, buffer_size // 2)
        self.seed = seed
        self.rest = rest
        self.state = state

    def units(self, epoch: int) -> list[Unit]:
        """Return the units of an epoch."""
        if epoch in self.rest:
            return self.rest[epoch][self.reader :: self.readers]
        if self.shards is None:
            return [{"shard": None, "index": self.reader, "count": self.readers}]
        order = np.random.default_rng([self.seed, epoch]).permutation(self.shards)
        return divide(self.shards, self.reader, self.readers, order)

    def __iter__(self) -> Iterator[tuple[int, int, dict]]:
        epoch = self.state["epoch"] if self.state else min(self.rest, default=0)
        while True:
            may_be_empty = epoch in self.rest or (self.state is not None and self.state["epoch"] == epoch)
            images = 0
            for place, example in self._epoch(epoch):
                images += 1
                yield epoch, place, example
            if not images and not may_be_empty:
                return
            epoch += 1

    def _epoch(self, epoch: int) -> Iterator[Row]:
        resumed = self.state if self.state and self.state["epoch"] == epoch else {}
        number = resumed.get("number", 0)
        returned = resumed.get("returned", 0)
        start = resumed.get("start")
        source = Source(self.split, self.units(epoch), start)
        block = list(islice(source, self.size))
        while block:
            after = source.state()
            following = []
            for place, row in enumerate(shuffled(block, [self.seed, epoch, self.reader, number])):
                following.extend(islice(source, 1))
                if place >= returned:
                    self.state = {
                        "epoch": epoch, "number": number, "returned": place + 1, "images": len(block), "start": start,
                        "after": after,
                    }  # fmt: skip
                    yield row
            block = following
            start = after
            number += 1
            returned = 0

    def remaining(self, epoch: int) -> list[Unit]:
        """Return units of the images of an epoch that this reader has not returned."""
        units = self.units(epoch)
        state = self.state
        if state is None or state["epoch"] < epoch:
            return units
        if state["epoch"] > epoch:
            return []
        found = []
        if state["returned"] < state["images"]:
            block = {"units": units, "start": state["start"], "size": self.size}
            block["seed"] = [self.seed, epoch, self.reader, state["number"]]
            found.append({"block": block, "row": state["returned"]})
        after = state["after"]
        found += [{**units[number], "row": row, "state": position} for number, row, position in after["open"]]
        return found + units[after["next"] :]


def remaining(readers: list[ShuffledReader]) -> dict[int, list[Unit]]:
    """Return what all readers have not returned of their epochs, by epoch."""
    epochs = [reader.state["epoch"] if reader.state else min(reader.rest, default=0) for reader in readers]
    last = max(epochs + [max(reader.rest, default=0) for reader in readers])
    return {
        epoch: [unit for reader in readers for unit in reader.remaining(epoch)]
        for epoch in range(min(epochs), last + 1)
    }
