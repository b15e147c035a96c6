"""Settings, results and time limits of all steps."""

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(os.environ.get("KIT_SOURCE", Path(__file__).resolve().parents[2]))
DATA = Path(os.environ.get("KIT_DATA", "/tmp/kit_data"))
WORK = Path(os.environ.get("KIT_WORK", "/tmp/kit_work"))
OUT = Path(os.environ.get("OUT", "/tmp/kit_out"))
TINY = os.environ.get("KIT_TINY") == "1"  # dry run: the same code at sizes for one CPU core
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if CUDA else "cpu")
STARTED = time.monotonic()


def record(step: str, **values: Any) -> None:
    """Append a result to `results.jsonl` immediately, so that it is kept if the step is ended.

    Args:
        step: name of the step, which selects the table of the result.
        **values: numbers and texts; other types are converted to text.
    """
    row = {"step": step, "t": round(time.monotonic() - STARTED, 1), **values}
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, default=str) + "\n")
    scalars = {key: value for key, value in row.items() if not isinstance(value, dict | list)}
    short = {key: round(value, 4) if isinstance(value, float) else value for key, value in scalars.items()}
    print("RESULT", json.dumps(short, default=str)[:600], flush=True)


def attempt(step: str, name: str, work: Callable[[], object]) -> None:
    """Call `work`, and record an exception as a result, so that the step continues.

    Args:
        step: name of the step.
        name: name of the measurement.
        work: function that measures and records results.
    """
    started = time.monotonic()
    try:
        work()
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
        record(step, name=name, error=f"{type(error).__name__}: {str(error)[:500]}", where=where)
        traceback.print_exc(limit=6)
    finally:
        release_memory()
    print(f"  {name}: {time.monotonic() - started:.1f} s", flush=True)


def release_memory() -> None:
    """Free GPU memory of the last measurement, and reset the peak."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if CUDA:
        torch.cuda.synchronize()


def exit_now() -> None:
    """End the process without waiting for compiler and data loader workers, which takes seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class TimeBudget:
    """Count the remaining seconds of a step."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()
