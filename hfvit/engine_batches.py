"""How any number of images goes through an engine of a few batch sizes. Knows no GPU."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hfvit.errors import ModelError


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a batch, run as a batch of `size`: the rows behind them are padding."""

    start: int
    stop: int
    size: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


def pieces(count: int, smallest: int, largest: int) -> Iterator[Piece]:
    """`count` images in pieces of at most `largest`, the last one padded to `smallest` where it is shorter."""
    for start in range(0, count, largest):
        stop = min(start + largest, count)
        yield Piece(start, stop, max(stop - start, smallest))


def profile_limits(shape: tuple[int, ...], profile: Callable[[], list]) -> tuple[int, int]:
    """The smallest and largest batch of an engine's input.

    `shape` is the input's, -1 where it is free; `profile` gives the profile's (min, opt, max) shapes, and is asked
    only when the batch is free. Raises `ModelError` for an input that is no batch of images of one size.
    """
    if len(shape) != 4 or min(shape[1:]) < 1:
        raise ModelError(f"its input has the shape {list(shape)}, where (batch, channels, height, width) is expected")
    if shape[0] > 0:
        return shape[0], shape[0]
    low, _, high = profile()
    return low[0], high[0]


class Recurring:
    """The CUDA graphs of the batch sizes that come again, of the latest `most` of them.

    A size that comes once, such as the rest of an epoch, is not worth a graph. `capture(size)` makes one, or returns
    None where that cannot be done, which is then not tried again.
    """

    def __init__(self, capture: Callable[[int], Any | None], most: int = 4):
        self.capture, self.most = capture, most
        self.graphs: OrderedDict[int, Any] = OrderedDict()
        self.seen: Counter[int] = Counter()
        self.is_possible = True

    def graph(self, size: int) -> Any | None:
        """The graph for a batch of `size`, from its second call on."""
        if size in self.graphs:
            self.graphs.move_to_end(size)
            return self.graphs[size]
        self.seen[size] += 1
        if not self.is_possible or self.seen[size] < 2:
            return None
        while len(self.graphs) >= self.most:
            dropped, _ = self.graphs.popitem(last=False)
            self.seen[dropped] = 0
        graph = self.capture(size)
        if graph is None:
            self.is_possible = False
        else:
            self.graphs[size] = graph
        return graph
