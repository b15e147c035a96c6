"""Hardware, CPU threads and versions of installed packages."""

import ctypes
import logging
import multiprocessing
import os
import platform
import shutil
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from hfvit.errors import RecipeError

logger = logging.getLogger(__name__)


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int:
    """Return the peak resident memory of this process, in bytes."""
    if os.name == "nt":
        return psutil.Process().memory_info().peak_wset
    import resource  # not available on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cores_per_process(processes: int) -> int:
    """Return the CPU cores for each local process of a run, at least one."""
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", processes))  # set by torchrun
    return max(1, cores() // max(1, local_processes))


def use_all_cores(processes: int) -> None:
    """Set the number of threads of CPU training under `accelerate launch`.

    Without a configuration file `accelerate launch` sets OMP_NUM_THREADS to 1 (accelerate 1.15), which leaves other
    cores idle. A larger number is kept, as it was set by the user.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    threads = cores_per_process(processes)
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and threads > torch.get_num_threads():
        torch.set_num_threads(threads)
        logger.debug("Using %d threads per process instead of 1, the default of accelerate launch", threads)


def set_tf32(enabled: bool) -> None:
    """Set the TF32 mode of matrix products and convolutions, for all ways to read it.

    After `torch.backends.fp32_precision`, which transformers sets, the older readings raise an error (torch 2.14), and
    inductor uses one of them.
    """
    torch.backends.fp32_precision = "tf32" if enabled else "ieee"
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next training step.

    Returns False on systems without glibc.

    glibc returns freed blocks above 32 MiB to the system, and page faults then take 10 to 25 % of a step on a CPU.
    Processes with data workers should not call it: their batches fragment the heap, which would grow.
    """
    trim_threshold = -1  # M_TRIM_THRESHOLD of malloc.h
    mmap_max = -4  # M_MMAP_MAX
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, 2**31 - 1))


def return_freed_memory() -> None:
    """Return unused memory of Arrow and glibc to the system.

    Converting and decoding a data set frees tens of MiB that both would keep until training ends.
    """
    import pyarrow  # already imported by `datasets`

    pyarrow.default_memory_pool().release_unused()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def hardware() -> dict:
    """Describe CPU, cores, threads and GPUs of this machine, without its host name."""
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
    """Return the versions of those `packages` that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


SHARED_MEMORY = Path("/dev/shm")


def check_shared_memory(workers: int) -> None:
    """Check that shared memory has room for the semaphores of data loader workers.

    On Linux, a semaphore takes 4 kB.

    Args:
        workers: number of data loader workers.

    Raises:
        RecipeError: the semaphores do not fit.
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
    """Describe the free shared memory of this machine."""
    if not SHARED_MEMORY.is_dir():
        return "size not known"
    usage = shutil.disk_usage(SHARED_MEMORY)
    return f"{usage.free / 2**20:.1f} of {usage.total / 2**20:.1f} MiB free in {SHARED_MEMORY}"
