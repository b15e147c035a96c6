"""Ordered map over threads, and the number of PyTorch's threads."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch

from hfvit.utils.environment import cores

_lock = threading.Lock()
_users = 0  # contexts that have changed the number
_default = 1  # number before the first of them
_own = threading.local()  # `count`: number that hfvit has set in this thread


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set the number of threads of PyTorch's operations in the context.

    PyTorch sets it for the calling thread, and for all that start later, so that concurrent contexts must not restore
    what they find: that may be the number of another one.

    Args:
        count: number of threads of an operation.
    """
    before = getattr(_own, "count", None)
    with _restored(before):
        _set(count)
        try:
            yield
        finally:
            _own.count = before


def _set(count: int) -> None:
    _own.count = count
    torch.set_num_threads(count)


@contextmanager
def _restored(own: int | None = None) -> Iterator[None]:
    """Restore the number of PyTorch's threads at the end.

    Args:
        own: number to restore. Default: that before all concurrent contexts.
    """
    global _users, _default
    with _lock:
        if not _users:
            _default = torch.get_num_threads()
        _users += 1
        default = _default
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            torch.set_num_threads(own or default)


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
    with _restored():  # without this, the first operation would set 1
        # One thread per image is faster than several threads within torch's operations on it.
        pool = ThreadPoolExecutor(threads or cores(), initializer=_set, initargs=(1,))
        try:
            pending = deque(pool.submit(function, item) for item in islice(iterator, ahead))
            while pending:
                yield pending.popleft().result()
                pending.extend(pool.submit(function, item) for item in islice(iterator, 1))
        finally:
            pool.shutdown(cancel_futures=True)
