"""Time and memory of training steps, the same for all contenders."""

import resource
import sys
import time
from pathlib import Path
from typing import Any

MIB = 2**20


class StepClock:
    """Counts optimizer steps: `begin()` before the first, `step()` after each; then `figures()`.

    `meter` adds up the seconds spent waiting for data, inside its `waiting()`.
    """

    def __init__(self, warm_up: int, steps: int, batch_size: int):
        import torch

        from hfvit.training.throughput import SpeedMeter
        from hfvit.utils.environment import cores

        torch.set_num_threads(cores())
        self.warm_up, self.steps, self.batch_size = warm_up, steps, batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda":
            torch.cuda.init()  # memory statistics cannot be reset before
        self.meter = SpeedMeter(self.device)
        self.done, self.workers = 0, 0
        self.flops_per_image = self.peak_flops = None
        self.seconds = self.waited = self.memory_before = self.memory_peak = 0.0

    def begin(self) -> None:
        """Everything is built; the first batch has not been asked for."""
        self.memory_before = memory(self.device)
        forget_peak(self.device)

    def step(self) -> None:
        """An optimizer step is over."""
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
    """A callback that lets a Trainer drive `clock`."""
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            clock.begin()

        def on_step_end(self, args, state, control, **kwargs):
            clock.step()

    return Callback()


def memory(device) -> int:
    """Bytes held now: by tensors on a GPU, by this process on a processor."""
    if device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss


def forget_peak(device) -> None:
    """Measure the peak from here on: what loading needed is no training memory."""
    if device.type == "cuda":
        import torch

        return torch.cuda.reset_peak_memory_stats(device)
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # resets VmHWM (Linux's proc(5)); elsewhere the peak is the process's whole life's


def peak_memory(device) -> int:
    """The largest number of bytes held since `forget_peak`."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure begins with the memory of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
