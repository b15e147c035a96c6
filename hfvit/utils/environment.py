"""Hardware, CPU threads and versions of installed packages."""

import ctypes
import logging
import multiprocessing
import os
import platform
import shutil
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from hfvit.errors import RecipeError

logger = logging.getLogger(__name__)


def cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores(processes: int) -> int:
    """Cores for each of the `processes` of a run, at least one; those on other machines need none of these."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))  # torchrun's
    return max(1, cores() // max(1, here))


def use_all_cores(processes: int) -> None:
    """Share the cores evenly among `processes` of a CPU training that `accelerate launch` started.

    Without a configuration file `accelerate launch` sets OMP_NUM_THREADS to 1 (accelerate 1.15), which leaves every
    other core idle. A number of threads above 1 is somebody's choice and stays.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    threads = share_of_cores(processes)
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and threads > torch.get_num_threads():
        torch.set_num_threads(threads)
        logger.info("Using %d threads a process (accelerate launch had set 1)", threads)


def keep_freed_memory() -> bool:
    """Let glibc keep the memory that a training step frees for the next step; whether it agreed.

    It gives every freed block above 32 MiB back to the system, and the next step pays for each page anew: a tenth to a
    quarter of a step on a processor. From here on this process gives no memory back before it ends. Not for one with
    data workers: beside the batches that they send, blocks of the same size find no room again and the heap grows.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, 2**31 - 1))


def hardware() -> dict:
    """Processor, cores, threads and GPUs of this machine; never its name."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The version of each of `packages` that is installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


SHARED_MEMORY = Path("/dev/shm")


def check_shared_memory(workers: int) -> None:
    """Check that the semaphores of so many data loader workers fit into the shared memory, 4 kB for each (Linux).

    Raises:
        RecipeError: they do not.
    """
    if not workers:
        return
    context = multiprocessing.get_context()
    try:
        # 3 of the queue to each worker and 4 of those from all of them (torch 2.14), and as many for evaluation.
        held = [context.Semaphore() for _ in range(2 * (3 * workers + 4))]
    except OSError as error:
        raise RecipeError(
            f"dataloader_num_workers: {workers} workers need more shared memory than there is ({error.strerror};"
            f" {free_shared_memory()}). Enlarge it (docker run --shm-size=1g), or set dataloader_num_workers to 0."
        ) from None
    del held


def free_shared_memory() -> str:
    """The free shared memory of this machine, in words."""
    if not SHARED_MEMORY.is_dir():
        return "size not known"
    usage = shutil.disk_usage(SHARED_MEMORY)
    return f"{usage.free / 2**20:.1f} of {usage.total / 2**20:.1f} MiB free in {SHARED_MEMORY}"
