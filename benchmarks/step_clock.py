"""Measure time and memory of training steps, in the same way for all contenders."""

import resource
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MIB = 2**20


class WaitMeter:
    """Counts the seconds spent waiting for data, as hfvit's `SpeedMeter` does."""

    def __init__(self):
        self.waited = 0.0

    @contextmanager
    def waiting(self):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - start


class StepClock:
    """Measures optimizer steps: `begin()` before the first, `step()` after each, then `figures()`.

    `meter.waiting()` measures the seconds spent waiting for data.
    """

    def __init__(self, warm_up: int, steps: int, batch_size: int):
        import torch

        from hfvit.utils.environment import cores  # nothing that imports transformers, which would count for timm

        torch.set_num_threads(cores())
        self.warm_up, self.steps, self.batch_size = warm_up, steps, batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda":
            torch.cuda.init()  # memory statistics cannot be reset before
        self.meter = WaitMeter()
        self.done, self.workers = 0, 0
        self.flops_per_image = self.peak_flops = None
        self.seconds = self.waited = self.memory_before = self.memory_peak = 0.0

    def begin(self) -> None:
        """Start, after the setup and before the first batch is requested."""
        self.memory_before = memory(self.device)
        forget_peak(self.device)

    def step(self) -> None:
        """Count an optimizer step."""
        self.done += 1
        if self.done == self.warm_up:
            self.seconds, self.waited = -self._now(), -self.meter.waited
        elif self.done == self.warm_up + self.steps:
            self.seconds += self._now()
            self.waited += self.meter.waited
            self.memory_peak = peak_memory(self.device)

    def _now(self) -> float:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def figures(self) -> dict[str, Any]:
        return {
            "workers": self.workers,
            "images/s": self.steps * self.batch_size / self.seconds,
            "waiting": self.waited / self.seconds,
            "peak MiB": self.memory_peak / MIB,
            "of it steps": (self.memory_peak - self.memory_before) / MIB,
            "flops": self.flops_per_image,
            "peak flops": self.peak_flops,
        }


def trainer_callback(clock: StepClock):
    """Return a callback with which a Trainer calls `begin` and `step` of the clock."""
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            clock.begin()

        def on_step_end(self, args, state, control, **kwargs):
            clock.step()

    return Callback()


def memory(device) -> int:
    """Return allocated bytes: of tensors on a GPU, of this process on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss


def forget_peak(device) -> None:
    """Reset the peak memory, so that it does not include the loading."""
    if device.type == "cuda":
        import torch

        return torch.cuda.reset_peak_memory_stats(device)
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # resets VmHWM (proc(5)); other systems report the peak of the whole process


def peak_memory(device) -> int:
    """Return the largest number of allocated bytes since `forget_peak`."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage includes the memory of the parent process at the fork
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
