"""Dynamic batching: images of concurrent requests share forward passes."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

SMOOTHING = 0.1  # weight of the last batch in the moving average of the seconds per image


class QueueFullError(Exception):
    """Error for more images than the queue has room for.

    Args:
        retry_after: estimated seconds until the images that are now in the queue are answered, at least 1.
    """

    def __init__(self, retry_after: int):
        super().__init__(f"the queue is full, retry after {retry_after} s")
        self.retry_after = retry_after


@dataclass(eq=False)
class _Item:
    value: Any
    answer: asyncio.Future


class DynamicBatcher:
    """Collect single images into batches and run them one after the other in a thread.

    A batch holds the images that arrived while the previous one ran. It starts when it is full, when no other image is
    on its way (reserved but not yet submitted), or `max_delay` seconds after its first image.

    Args:
        run: function from a list of prepared images to one row per image, called in a thread.
        max_batch_size: largest number of images per batch.
        max_delay: longest time that an image waits for others while no batch runs, in seconds.
        queue_size: largest number of images that are reserved, waiting or running.
        on_batch: called with the size and the seconds of each batch.
    """

    def __init__(
        self,
        run: Callable[[list[Any]], Sequence[np.ndarray]],
        *,
        max_batch_size: int,
        max_delay: float,
        queue_size: int,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ):
        self.run = run
        self.max_batch_size = max_batch_size
        self.max_delay = max_delay
        self.queue_size = queue_size
        self.on_batch = on_batch
        self.reserved = 0
        self.submitted = 0
        self.seconds_per_image = 0.0
        self.queue: asyncio.Queue[_Item] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "batches")
        self._task: asyncio.Task | None = None

    async def __aenter__(self) -> "DynamicBatcher":
        self._task = asyncio.create_task(self._run_batches())
        return self

    async def __aexit__(self, *_) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown()

    @property
    def is_running(self) -> bool:
        """Return whether batches are being run."""
        return self._task is not None and not self._task.done()

    @contextmanager
    def reservation(self) -> Iterator["Reservation"]:
        """Reserve places in the queue within the context."""
        places = Reservation(self)
        try:
            yield places
        finally:
            self.reserved -= places.reserved
            self.submitted -= places.submitted

    @property
    def on_the_way(self) -> int:
        """Return the number of images that have a place and were not submitted yet."""
        return self.reserved - self.submitted

    async def _run_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [item for item in await self._next_batch() if not item.answer.done()]  # without abandoned ones
            if not batch:
                continue
            started = time.perf_counter()
            try:
                rows = await loop.run_in_executor(self._thread, self.run, [item.value for item in batch])
            except Exception as error:
                answers = [(item.answer, None, error) for item in batch]
            else:
                answers = [(item.answer, row, None) for item, row in zip(batch, rows, strict=True)]
            seconds = time.perf_counter() - started
            self.seconds_per_image += SMOOTHING * (seconds / len(batch) - self.seconds_per_image)
            self.on_batch(len(batch), seconds)
            for answer, row, error in answers:
                if answer.done():  # cancelled while the batch ran
                    continue
                if error is None:
                    answer.set_result(row)
                else:
                    answer.set_exception(error)

    async def _next_batch(self) -> list[_Item]:
        batch = [await self.queue.get()]
        deadline = asyncio.get_running_loop().time() + self.max_delay
        while len(batch) < self.max_batch_size:
            if not self.queue.empty():
                batch.append(self.queue.get_nowait())
                continue
            if not self.on_the_way:
                break
            try:
                async with asyncio.timeout_at(deadline):
                    batch.append(await self.queue.get())
            except TimeoutError:
                break
        return batch


class Reservation:
    """Places of a request in the queue, see `DynamicBatcher.reservation`."""

    def __init__(self, batcher: DynamicBatcher):
        self._batcher = batcher
        self.reserved = 0
        self.submitted = 0

    def add(self, images: int) -> None:
        """Reserve places.

        Raises:
            QueueFullError: the queue has no room for them.
        """
        batcher = self._batcher
        if batcher.reserved + images > batcher.queue_size:
            raise QueueFullError(max(1, math.ceil(batcher.reserved * batcher.seconds_per_image)))
        batcher.reserved += images
        self.reserved += images

    def submit(self, value: Any) -> asyncio.Future:
        """Queue a prepared image that has a place, and return the future of its row."""
        answer = asyncio.get_running_loop().create_future()
        self._batcher.submitted += 1
        self.submitted += 1
        self._batcher.queue.put_nowait(_Item(value, answer))
        return answer


class Budget:
    """Limit of a sum over concurrent tasks, such as the pixels of decoded images.

    Args:
        limit: largest sum.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.free = limit
        self._released = asyncio.Condition()

    @asynccontextmanager
    async def take(self, amount: int) -> AsyncIterator[None]:
        """Wait until `amount`, at most the limit, is free; take it within the context."""
        async with self._released:
            await self._released.wait_for(lambda: amount <= self.free)
            self.free -= amount
        try:
            yield
        finally:
            self.free += amount
            async with self._released:
                self._released.notify_all()
