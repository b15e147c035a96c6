"""Dynamic batching: images of concurrent requests share forward passes."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import numpy as np

from hfvit.errors import mask_credentials, one_line

logger = logging.getLogger(__name__)

SMOOTHING = 0.1  # weight of the last batch in the moving average of the seconds per image


class QueueFullError(Exception):
    """Error for more images than the queue has room for.

    Args:
        retry_after: estimated seconds until the images that are now in the queue are answered, at least 1.
    """

    def __init__(self, retry_after: int):
        super().__init__(f"the queue is full, retry after {retry_after} s")
        self.retry_after = retry_after


class _Item:
    """Image in the queue, which is let go of as soon as it is answered or abandoned."""

    def __init__(self, value: Any, answer: asyncio.Future):
        self.value = value
        self.answer = answer
        answer.add_done_callback(self._release)

    def _release(self, _) -> None:
        self.value = None


class DynamicBatcher:
    """Collect single images into batches and run them one after the other in a thread.

    A batch holds the images that arrived while the previous one ran. It starts when it is full, when no other image is
    on its way (reserved but not yet submitted), or `max_delay` seconds after its first image.

    Args:
        run: function from a list of prepared images to one row per image, called in a thread.
        max_batch_size: largest number of images per batch.
        max_delay: longest time that an image waits for others while no batch runs, in seconds.
        queue_size: largest number of images that are reserved, waiting or running.
        on_batch: called with the size and the seconds of each batch without an error.
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
        while True:
            await self._answer(await self._next_batch())

    async def _answer(self, batch: list[_Item]) -> None:
        """Run a batch, and after an error its halves.

        An image that the model fails on then fails alone, and a batch that takes too much memory is divided.
        """
        batch = [item for item in batch if not item.answer.done()]  # without abandoned ones
        if not batch:
            return
        loop = asyncio.get_running_loop()
        started = time.perf_counter()
        try:
            rows = await loop.run_in_executor(self._thread, self.run, [item.value for item in batch])
            answers = list(zip(batch, rows, strict=True))
        except Exception as error:
            answers = None
            if len(batch) == 1:
                if not batch[0].answer.done():
                    batch[0].answer.set_exception(error)
                return
            reason = mask_credentials(one_line(error))
            logger.warning("A batch of %d images failed, its halves are run: %s", len(batch), reason)
        if answers is None:  # outside of the handler, whose traceback keeps the memory of the batch
            half = len(batch) // 2
            await self._answer(batch[:half])
            await self._answer(batch[half:])
            return
        self._measure(len(batch), time.perf_counter() - started)
        for item, row in answers:
            if not item.answer.done():  # cancelled while the batch ran
                item.answer.set_result(row)

    def _measure(self, size: int, seconds: float) -> None:
        per_image = seconds / size
        before = self.seconds_per_image or per_image
        self.seconds_per_image = before + SMOOTHING * (per_image - before)
        self.on_batch(size, seconds)

    async def _next_batch(self) -> list[_Item]:
        batch: list[_Item] = []
        deadline = None  # from the first image on
        while len(batch) < self.max_batch_size:
            if batch and self.queue.empty() and not self.on_the_way:
                break
            try:
                async with asyncio.timeout_at(deadline):
                    item = await self.queue.get()  # at once if there is one, also after the deadline
            except TimeoutError:
                break
            if item.answer.done():  # abandoned
                continue
            batch.append(item)
            deadline = deadline or asyncio.get_running_loop().time() + self.max_delay
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
