"""Memory of the process."""

import ctypes
import platform

import psutil
import pytest

from hfvit.utils.environment import return_freed_memory

MIB = 2**20
BLOCK = 64 * 1024  # below the size from which glibc maps a block on its own


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is of glibc's heap")
def test_return_freed_memory_returns_blocks_below_one_that_is_used():
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    blocks = [libc.malloc(BLOCK) for _ in range(64 * MIB // BLOCK)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    last = blocks.pop()  # above the others, which glibc then keeps
    for block in blocks:
        libc.free(ctypes.c_void_p(block))
    before = psutil.Process().memory_info().rss
    return_freed_memory()
    assert before - psutil.Process().memory_info().rss >= 32 * MIB
    libc.free(ctypes.c_void_p(last))
