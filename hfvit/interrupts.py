"""SIGTERM and SIGINT of a training: noted when they come, acted upon between two steps, by all processes at the same.

Schedulers and spot machines send SIGTERM some seconds before they take a machine away, a terminal sends SIGINT for
Ctrl-C. A training that is saved at once loses nothing. transformers 5.23 has a callback for that
(`enable_jit_checkpoint`), but its processes do not agree on a step, and the run then ends as if it were complete.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

# torchrun passes on to its processes what a terminal or a scheduler has sent to all of them: the same signal twice.
SAME_SIGNAL_SECONDS = 5.0
# Of a data worker, after the signal that was meant for the training: long enough to save, no orphan for ever.
WORKER_SECONDS = 30
# Processes on GPUs ask one another every so many steps: to ask is to wait for the device.
STEPS_BETWEEN_QUESTIONS = 10


class Interrupts:
    """Whether this run was told to stop, and when all its processes do."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received: int | None = None
        self._since = 0.0
        alone = accelerator.num_processes == 1
        self._patience = 0.0 if alone else SAME_SIGNAL_SECONDS
        self._every = 1 if alone or accelerator.device.type == "cpu" else STEPS_BETWEEN_QUESTIONS

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within, the first signal is noted and a later one ends the process at once."""
        if threading.current_thread() is not threading.main_thread():  # Python lets no other set a handler
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
            if self.accelerator.is_main_process:
                text = f"hfvit: {signal.Signals(number).name}: saving after this step; once more ends at once\n"
                os.write(2, text.encode())  # a print may be what was interrupted
        elif time.monotonic() - self._since >= self._patience:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self, step: int) -> int | None:
        """The signal that any process has received, told to all of them at the same `step`; to be called by all."""
        if self.accelerator.num_processes == 1:
            return self.received
        if step % self._every:
            return None
        mine = torch.tensor([self.received or 0], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max()) or None


def start_worker(then: Callable[[int], None] | None, worker: int) -> None:
    """A data worker's `worker_init_fn`: signals to the whole group are for the training, which still needs it.

    torch ends a worker at the first SIGTERM, and the training with it, before it could save.
    """
    if then:
        then(worker)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _outlive)


def _outlive(number: int, frame) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(WORKER_SECONDS)
