"""Restore settings of the process that a call of the library changes."""

import os
import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from hfvit.utils.environment import set_tf32

# Variables that transformers sets for `full_determinism` (5.24).
DETERMINISM = (
    "CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC",
    "FLASH_ATTENTION_DETERMINISTIC",
)  # fmt: skip

_tf32_lock = threading.Lock()
_tf32_users = 0
_tf32_before = ExitStack()


@contextmanager
def kept_tf32() -> Iterator[None]:
    """Restore the TF32 mode of matrix products and convolutions after the context."""
    try:
        legacy = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set by the new settings alone
        legacy = None
    modules = (torch.backends, torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [module.fp32_precision for module in modules]
    try:
        yield
    finally:
        if legacy is not None:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = legacy
        for module, value in zip(modules, before, strict=True):
            module.fp32_precision = value


@contextmanager
def tf32_mode(enabled: bool | None) -> Iterator[None]:
    """Set the TF32 mode of matrix products and convolutions in the context.

    None keeps it. The mode is that of the process: the last of concurrent contexts restores it.
    """
    global _tf32_users
    if enabled is None:
        yield
        return
    with _tf32_lock:
        if not _tf32_users:
            _tf32_before.enter_context(kept_tf32())
        _tf32_users += 1
        set_tf32(enabled)
    try:
        yield
    finally:
        with _tf32_lock:
            _tf32_users -= 1
            if not _tf32_users:
                _tf32_before.close()


@contextmanager
def kept_state() -> Iterator[None]:
    """Restore random generators, determinism and TF32 after the context.

    A `Trainer` sets them for the process. GPUs that are first used in the context get the seed of the CPU, as
    `torch.manual_seed` gives both.
    """
    python = random.getstate()
    arrays = np.random.get_state()
    cpu = torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    deterministic = _determinism()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    variables = {name: os.environ.get(name) for name in DETERMINISM}
    with kept_tf32():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
            torch.set_rng_state(cpu)
            if gpus is not None:
                torch.cuda.set_rng_state_all(gpus)
            elif torch.cuda.is_initialized():
                torch.cuda.manual_seed_all(torch.initial_seed())
            if _determinism() != deterministic:
                torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
            for name, value in variables.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
