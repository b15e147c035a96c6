"""Retry a step in micro-batches after an out-of-memory error."""

import logging
import resource
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from transformers import Trainer

from hfvit.errors import OutOfMemoryError
from hfvit.models.patch_size import most_patches
from hfvit.training.loss_monitor import LossWatch
from hfvit.transforms.augmentation import Augmentation

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


def does_not_fit(
    model: nn.Module, device: torch.device, size: int, why: str, work: str = "training"
) -> OutOfMemoryError:
    """The error for a training that cannot go on: what was tried, what is taken, what helps and by how much."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    state = 12 * trained / GIB  # gradient and both moments of AdamW, in 32 bits
    return OutOfMemoryError(
        f"out of memory in {work} with {size} image{'s' if size > 1 else ''} at once ({memory_in_words(device)})."
        f" {why} What helps: a smaller image_size (activations grow with its square),"
        " activation_checkpointing: true (activations of one block instead of all), bf16: true (half of them), freeze:"
        f" backbone (no gradients nor AdamW's moments, {state:.2f} GiB, and few activations), a smaller model (these"
        f" weights alone take {4 * everything / GIB:.2f} GiB)."
    )


logger = logging.getLogger(__name__)


class FittingTrainer(Trainer):
    """A Trainer whose global batch, order, schedule and seeds outlive an out-of-memory error.

    One process does the failed step again. Several cannot: the others wait for it in a backward pass. They try their
    first batch beforehand, each alone, at the smallest of several patch sizes, and take the size that all of them can
    work on. In evaluation, where no process waits within a batch, each cuts for itself.

    A subclass sets `augmentation`, which draws a batch that is cut anew. `events` tells what happened.
    """

    augmentation: Augmentation | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.events: list[dict] = []
        self.micro = MicroBatches(self.args.per_device_train_batch_size)
        self.eval_batch = self.args.per_device_eval_batch_size
        self.is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self._watch = LossWatch(self.args.device)
        self._is_fitted = self.args.world_size == 1 or self.is_sharded

    def note(self, event: str, **facts) -> None:
        """Enter something in `events`, plain JSON values only."""
        self.events.append({"event": event, **facts})

    def get_batch_samples(self, *args, **kwargs):
        self._batches, items = super().get_batch_samples(*args, **kwargs)
        self._reached = 0
        return self._batches, items

    def training_step(self, model: nn.Module, inputs, num_items_in_batch=None) -> torch.Tensor:
        if self._reached == 0:
            self._put_back, self._loss_before = generators(self.args.device), self._tr_loss.clone()
            if not self._is_fitted:
                self._fit_together(inputs)
        self._reached += 1
        loss = where_it_fits(self._in_pieces, model, inputs)
        while loss is None:
            if self.args.world_size > 1 or self.is_sharded:
                size = self.micro.next_size()
                way = f"Go on with --resume_from_checkpoint auto --per_device_train_batch_size {size}." if size else ""
                raise does_not_fit(self.model, self.args.device, self.micro.size, way)
            self._shrink()
            self._take_back()
            loss = where_it_fits(self._again, model)
        return loss

    def _again(self, model: nn.Module) -> torch.Tensor:
        """What this step has done so far, in smaller pieces; the Trainer adds the last loss itself."""
        for batch in self._batches[: self._reached - 1]:
            self._tr_loss += self._in_pieces(model, batch)
        return self._in_pieces(model, self._batches[self._reached - 1])

    def _fit_together(self, inputs) -> None:
        model = self.accelerator.unwrap_model(self.model)
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        while not self._is_fitted:
            with most_patches(model):
                loss = where_it_fits(self._in_pieces, model, inputs)
            fits = torch.tensor([int(loss is not None)], device=self.args.device)
            self._is_fitted = bool(self.accelerator.gather(fits).all())
            del loss
            self._take_back()
            for buffer, before in buffers:
                buffer.copy_(before)
            if not self._is_fitted:
                self._shrink()

    def _in_pieces(self, model: nn.Module, batch) -> torch.Tensor:
        pieces, steps = cut(batch, self.micro.size, self.augmentation), self.current_gradient_accumulation_steps
        self.current_gradient_accumulation_steps = steps * len(pieces)
        try:
            for piece in pieces[:-1]:
                with self.accelerator.no_sync(model):
                    self._tr_loss += self._step(model, piece)
            return self._step(model, pieces[-1])
        finally:
            self.current_gradient_accumulation_steps = steps

    def _step(self, model: nn.Module, piece) -> torch.Tensor:
        loss = super().training_step(model, piece)
        self._watch.add(loss)
        return loss

    def _take_back(self) -> None:
        """Gradients, losses and generators as they were when the step began."""
        self.model.zero_grad()
        self._tr_loss = self._loss_before.clone()
        self._watch.drop()
        self._put_back()
        clear_device_cache(garbage_collection=True)

    def _shrink(self) -> None:
        size, device, step = self.micro.next_size(), self.args.device, self.state.global_step + 1
        if size is None:
            pairs = "Mixing needs pairs." if self.micro.size > 1 else f"{self.micro.images} were tried first."
            raise does_not_fit(self.model, device, self.micro.size, pairs)
        logger.warning(
            "Out of memory at step %d with %d images at once (%s): going on with %d, accumulated %d times; the global"
            " batch stays %d. per_device_train_batch_size: %d avoids this.",
            *(step, self.micro.size, memory_in_words(device), size),
            *(self.args.gradient_accumulation_steps * self.micro.images // size, self.args.global_batch_size, size),
        )
        self.note("out_of_memory", step=step, images=self.micro.size, then=size)
        self.micro.shrink(size)

    def prediction_step(self, model: nn.Module, inputs, prediction_loss_only: bool, ignore_keys=None):
        outputs = None
        while outputs is None:
            pieces = cut(inputs, self.eval_batch)
            outputs = where_it_fits(self._predict_pieces, model, pieces, prediction_loss_only, ignore_keys)
            if outputs is None:
                self.shrink_evaluation(len(pieces[0]["labels"]))
        if len(outputs) == 1:
            return outputs[0]
        losses, logits, labels = zip(*outputs, strict=True)
        weights = torch.tensor([len(piece["labels"]) for piece in pieces], device=losses[0].device)
        loss = (torch.stack(losses) * weights).sum() / weights.sum()
        return (loss, None, None) if prediction_loss_only else (loss, torch.cat(logits), torch.cat(labels))

    def _predict_pieces(self, model: nn.Module, pieces: list, *args) -> list:
        outputs = []
        for piece in pieces:
            outputs.append(super().prediction_step(model, piece, *args))
        return outputs

    def shrink_evaluation(self, images: int, work: str = "evaluation") -> None:
        """Go on with half of `images` at once, in evaluation and in what else (`work`) trains nothing."""
        device, step = self.args.device, self.state.global_step
        if images == 1 or self.is_sharded:
            raise does_not_fit(self.model, device, images, "Its batch is per_device_eval_batch_size.", work)
        clear_device_cache(garbage_collection=True)
        self.eval_batch = images // 2
        logger.warning(
            "Out of memory in %s with %d images at once (%s): going on with %d. Training is not changed;"
            " per_device_eval_batch_size: %d avoids this.",
            *(work, images, memory_in_words(device), self.eval_batch, self.eval_batch),
        )
        self.note(f"out_of_memory_in_{work.replace(' ', '_')}", step=step, images=images, then=self.eval_batch)


def where_it_fits(work: Callable, *args):
    """What `work` returns; None when memory ran out. What it held then is let go of with its exception."""
    try:
        return work(*args)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
    return None
