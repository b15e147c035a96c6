"""Ordered map over threads with a bounded number of results in memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch

from hfvit.utils.environment import cores


def map_in_threads(
    function: Callable[[Any], Any], items: Iterable[Any], ahead: int, threads: int | None = None
) -> Iterator[Any]:
    """Apply `function` to items in threads, and yield the results in order.

    Args:
        function: thread-safe function; its first error is raised where its result is due.
        items: iterable that is read in the calling thread.
        ahead: number of results that are computed before they are asked for.
        threads: number of threads. Default: one per core.
    """
    iterator = iter(items)
    own_threads = torch.get_num_threads()
    # One thread per image is faster than several threads within torch's operations on it.
    pool = ThreadPoolExecutor(threads or cores(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        pending = deque(pool.submit(function, item) for item in islice(iterator, ahead))
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(iterator, 1))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(own_threads)  # without this, the first operation would set 1
