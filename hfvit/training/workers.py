"""Data loader workers: signals, random numbers and lost workers."""

import re
import signal
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.data import DataLoader

# Seconds that a data loader worker survives SIGTERM, to finish the step and save.
WORKER_SECONDS = 30


def keep_workers_on_signals(loader: DataLoader) -> DataLoader:
    """Keep data loader workers alive after a signal, until training has saved.

    By default a worker ends at the first SIGTERM, and with it the training.
    """
    function = loader.worker_init_fn
    if not (isinstance(function, partial) and function.func is start_worker):
        loader.worker_init_fn = partial(start_worker, function)
    return loader


def draw_base_seed(loader: DataLoader) -> None:
    """Advance torch's generator before an iteration that reuses persistent workers.

    A new iterator draws the base seed of its workers, a reused one does not: without this draw, dropout would depend
    on the number of workers, and on whether the run was resumed.
    """
    loader = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper
    if getattr(loader, "_iterator", None) is not None:
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)


def is_lost_worker(error: Exception, workers: int) -> bool:
    """Return whether `error` comes from a data loader worker that was killed.

    torch notices it by a signal (RuntimeError), or the connection that transfers a batch breaks before.
    """
    if re.match(r"DataLoader worker .*(killed|exited)", str(error)):
        return True
    # An exception of a worker's own keeps its type, and its message begins with "Caught".
    is_broken = isinstance(error, (ConnectionError, EOFError)) and not str(error).startswith("Caught ")
    return workers > 0 and is_broken


def start_worker(then: Callable[[int], None] | None, worker: int) -> None:
    """Call `then` in a new worker, ignore SIGINT, delay SIGTERM by `WORKER_SECONDS`."""
    if then:
        then(worker)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def _end_later(number: int, frame) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(WORKER_SECONDS)
