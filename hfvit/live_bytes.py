"""Bytes of the tensors that are alive at once while a piece of code runs, on any device and on none."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make: `now` held, and `peak` the most that were held at once.

    What was there before does not count. With tensors without storage (the `meta` device, FakeTensor) nothing is
    allocated, and the figure is what a real run would hold, without an allocator's rounding.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._held: dict[int, int] = {}

    def ignore(self, tensors) -> None:
        """Leave these out, as what was there before."""
        for tensor in tensors:
            self._held[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._add, result)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        self._held[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._held.pop(key, 0)
