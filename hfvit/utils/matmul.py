"""Measured rate of matrix products, by device and precision."""

import logging
import time
from functools import cache

import torch

logger = logging.getLogger(__name__)

REPETITIONS = 5
SMALL = 1024  # rows and columns
TINY = 512  # the same on CPUs, to compare precisions, of which one may be emulated
LONGEST = 1.0  # seconds of a measurement, for precisions that a device emulates


@cache
def peak_rate(device: torch.device, dtype: torch.dtype, tf32: bool | None) -> float:
    """Return `matmul_rate`, measured once in a process.

    Args:
        device: device to measure.
        dtype: data type of the product.
        tf32: setting of TF32, which changes the rate of float32.
    """
    if device.type == "cpu" and is_slow(device, dtype):  # a second measurement may take a second
        return matmul_rate(device, torch.float32) / times_slower(device, dtype)
    return matmul_rate(device, dtype)


@torch.no_grad()
def matmul_rate(device: torch.device, dtype: torch.dtype, side: int | None = None) -> float:
    """Measure the FLOPs per second of a large matrix product, the peak for MFU.

    Args:
        device: device to measure.
        dtype: data type of the product.
        side: rows and columns of the matrices; None is 1,024 on a CPU, and 8,192 on a GPU.
    """
    products = 1 if device.type == "cpu" else 10
    side = side or (SMALL if device.type == "cpu" else 8192)
    generator = torch.Generator(device).manual_seed(0)  # the global one is that of dropout
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    best, spent = float("inf"), 0.0
    for _ in range(REPETITIONS):
        wait(device)
        start = time.perf_counter()
        for _ in range(products):
            torch.matmul(a, b)
        wait(device)
        seconds = time.perf_counter() - start
        best, spent = min(best, seconds), spent + seconds
        if spent > LONGEST:
            break
    return products * 2 * side**3 / best


def warn_if_slow(option: str, device: torch.device, dtype: torch.dtype) -> None:
    """Warn if matrix products are less than half as fast as in float32.

    PyTorch emulates bfloat16 on CPUs without AVX-512 or AMX, and on GPUs before Ampere.

    Args:
        option: option that sets the precision.
        device: device of the computation.
        dtype: data type of the products.
    """
    if is_slow(device, dtype):
        slower = times_slower(device, dtype)
        logger.warning(
            "%s: matrix products on this %s are %.0f times slower than in float32. Omit %s, or set it to false.",
            option, "CPU" if device.type == "cpu" else "GPU", slower, option,
        )  # fmt: skip


def is_slow(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether matrix products are less than half as fast as in float32."""
    return dtype != torch.float32 and times_slower(device, dtype) > 2


@cache
def times_slower(device: torch.device, dtype: torch.dtype) -> float:
    """Return how many times slower matrix products are than in float32.

    The matrices are small on GPUs, too, as a model may have taken their memory.

    Args:
        device: device to measure.
        dtype: data type of the products.
    """
    side = TINY if device.type == "cpu" else SMALL
    return matmul_rate(device, torch.float32, side) / matmul_rate(device, dtype, side)


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
