"""Batches that do not fit into memory: cut into pieces, with the same images, order, schedule and seeds.

The loader and the accumulation stay as they are. A device's batch is worked on in pieces, each with its own forward
and backward pass, exactly as if `per_device_train_batch_size` had been the size of a piece.
"""

import resource
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil  # accelerate depends on it
import torch
from torch import nn

from hfvit.augment import Augmentation
from hfvit.errors import OutOfMemory

GIB = 2**30


class MicroBatches:
    """Into how many pieces a device's batch of `images` is cut; `even`: mixing needs pairs in each piece."""

    def __init__(self, images: int, even: bool = False):
        self.images, self.even, self.pieces = images, even, 1

    @property
    def size(self) -> int:
        """Images in a piece."""
        return self.images // self.pieces

    def next_size(self) -> int | None:
        """The largest piece of at most half the size; None when there is none."""
        sizes = (size for size in range(self.size // 2, 0, -1) if self.images % size == 0)
        return next((size for size in sizes if not (self.even and size % 2)), None)

    def shrink(self, size: int) -> None:
        """Work on `size` images at once from now on."""
        self.pieces = self.images // size


def cut(batch: dict[str, Any], size: int, augmentation: Augmentation | None = None) -> list[dict[str, Any]]:
    """`batch` of images.py or stream.py in pieces of at most `size` images.

    What is random about an image is drawn again, from its own seed: the plan of a piece is that of a smaller batch.
    """
    images = len(batch["labels"])
    if images <= size:
        return [batch]
    return [_piece(batch, slice(start, start + size), augmentation) for start in range(0, images, size)]


def _piece(batch: dict[str, Any], part: slice, augmentation: Augmentation | None) -> dict[str, Any]:
    piece = {key: value[part] for key, value in batch.items() if key != "plan"}
    if "plan" in batch:
        seeds: np.ndarray = batch["plan"]["seeds"][part]
        if "images" in piece:
            piece["plan"] = augmentation.draw(seeds, *piece["images"].shape[1:3])
        else:
            piece["plan"] = {"operations": augmentation.draw_operations(seeds, min(augmentation.image_size))}
        piece["plan"]["seeds"] = seeds
    return piece


def generators(device: torch.device) -> Callable[[], None]:
    """The state of the generators that a step draws from; call the result to put them back."""
    states = [(torch.set_rng_state, torch.get_rng_state())]
    if device.type == "cuda":
        states.append((lambda state: torch.cuda.set_rng_state(state, device), torch.cuda.get_rng_state(device)))

    def put_back() -> None:
        for put, state in states:
            put(state)

    return put_back


def memory_in_words(device: torch.device) -> str:
    """How much of a device's memory this process has taken, and how much there is."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        taken = torch.cuda.max_memory_reserved(device)
        return f"at most {taken / GIB:.1f} GiB of the device's {total / GIB:.1f} taken here, {free / GIB:.1f} free now"
    memory, taken = psutil.virtual_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (
        f"at most {taken / GIB:.1f} GiB of the machine's {memory.total / GIB:.1f} taken here,"
        f" {memory.available / GIB:.1f} free now"
    )


def does_not_fit(model: nn.Module, device: torch.device, size: int, why: str, work: str = "training") -> OutOfMemory:
    """The error for a training that cannot go on: what was tried, what is taken, what helps and by how much."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    state = 12 * trained / GIB  # gradient and both moments of AdamW, in 32 bits
    return OutOfMemory(
        f"out of memory in {work} with {size} image{'s' if size > 1 else ''} at once ({memory_in_words(device)})."
        f" {why} What helps: a smaller image_size (activations grow with its square),"
        " activation_checkpointing: true (activations of one block instead of all), bf16: true (half of them), freeze:"
        f" backbone (no gradients nor AdamW's moments, {state:.2f} GiB, and few activations), a smaller model (these"
        f" weights alone take {4 * everything / GIB:.2f} GiB)."
    )
