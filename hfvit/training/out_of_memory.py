"""Compute a step in micro-batches when it does not fit into memory."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from hfvit.errors import OutOfMemoryError
from hfvit.models.patch_size import smallest_patch_size
from hfvit.training.resume import ResumeState
from hfvit.transforms.augmentation import Augmentation
from hfvit.utils.environment import peak_memory

logger = logging.getLogger(__name__)

GIB = 2**30
# Texts of out-of-memory errors that `should_reduce_batch_size` does not know (accelerate 1.15).
OUT_OF_MEMORY_TEXTS = (
    "CUDA error: out of memory", "HIP error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA_ERROR_OUT_OF_MEMORY",
    "CUDNN_STATUS_ALLOC_FAILED", "ALLOCATION_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED",
    "HIPBLAS_STATUS_ALLOC_FAILED", "Failed to CUDA calloc",
)  # fmt: skip


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an exception means that memory ran out.

    It may come from PyTorch's allocators or from CUDA's libraries.
    """
    if isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)


class MicroBatchSize:
    """Track the number of micro-batches that a device's batch is split into.

    Args:
        images: number of images in the device's batch.
        even: whether micro-batches need an even size, for mixup and CutMix.
    """

    def __init__(self, images: int, even: bool = False):
        self.images = images
        self.even = even
        self.count = 1

    @property
    def size(self) -> int:
        """Return the number of images in a micro-batch."""
        return self.images // self.count

    def next_size(self) -> int | None:
        """Return the largest divisor of the batch up to half the current size, or None."""
        sizes = (size for size in range(self.size // 2, 0, -1) if self.images % size == 0)
        return next((size for size in sizes if not (self.even and size % 2)), None)

    def shrink(self, size: int) -> None:
        """Set the number of images in a micro-batch."""
        self.count = self.images // size


def micro_batches(batch: dict[str, Any], size: int, augmentation: Augmentation | None = None) -> list[dict[str, Any]]:
    """Split `batch` into micro-batches of at most `size` images.

    Args:
        batch: batch of `data.dataset` or `data.stream`.
        size: maximum number of images in a micro-batch.
        augmentation: samples the plan of each micro-batch from its images' seeds, as for a smaller batch; None for
            evaluation batches.
    """
    images = len(batch["labels"])
    if images <= size:
        return [batch]
    return [_slice(batch, slice(start, start + size), augmentation) for start in range(0, images, size)]


def _slice(batch: dict[str, Any], rows: slice, augmentation: Augmentation | None) -> dict[str, Any]:
    part = {key: value[rows] for key, value in batch.items() if key != "plan"}
    if "plan" in batch:
        seeds: np.ndarray = batch["plan"]["seeds"][rows]
        if "pixel_values" in part:
            part["plan"] = {}
        elif "images" in part:
            part["plan"] = augmentation.sample(seeds, *part["images"].shape[1:3])
        else:
            part["plan"] = augmentation.sample_changes(seeds, *augmentation.image_size)
        part["plan"]["seeds"] = seeds
    return part


def saved_rng_state(device: torch.device) -> Callable[[], None]:
    """Save the state of the random generators; returns a function to restore it."""
    states = [(torch.set_rng_state, torch.get_rng_state())]
    if device.type == "cuda":
        states.append((lambda state: torch.cuda.set_rng_state(state, device), torch.cuda.get_rng_state(device)))

    def restore() -> None:
        for set_state, state in states:
            set_state(state)

    return restore


def memory_usage(device: torch.device) -> str:
    """Describe the process's peak memory, and the device's free and total memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        peak = torch.cuda.max_memory_reserved(device)
        return f"peak {peak / GIB:.1f} GiB of the device's {total / GIB:.1f}, {free / GIB:.1f} free"
    memory = psutil.virtual_memory()
    peak = peak_memory()
    return f"peak {peak / GIB:.1f} GiB of the machine's {memory.total / GIB:.1f}, {memory.available / GIB:.1f} free"


def out_of_memory_error(
    model: nn.Module, device: torch.device, size: int, reason: str, work: str = "training"
) -> OutOfMemoryError:
    """Create the error for a run that cannot continue.

    Args:
        model: the model that does not fit.
        device: the training device.
        size: number of images in the smallest micro-batch that was tried.
        reason: why no smaller one was tried, or how to continue.
        work: operation that ran out of memory.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in model.parameters())
    return OutOfMemoryError(
        f"out of memory in {work} with {size} image{'s' if size > 1 else ''} at once ({memory_usage(device)})."
        f" {reason} Try a smaller image_size (activations grow with its square), activation_checkpointing: true"
        " (activations of one block instead of all), bf16: true (half the activations), freeze: backbone (saves"
        f" {12 * trained / GIB:.2f} GiB of gradients and AdamW moments, and most activations), or a smaller model"
        f" (these weights take {4 * parameters / GIB:.2f} GiB)."
    )


def none_if_out_of_memory(work: Callable, *args):
    """Return `work(*args)`, or None if memory ran out; its memory is then released."""
    try:
        return work(*args)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None


class OutOfMemoryHandler:
    """Split batches into micro-batches after an out-of-memory error.

    Global batch, order, schedule and seeds do not change. A single process repeats the failed step. With several
    processes that is impossible, as the others wait in the backward pass: each tries its first batch in advance (at
    the smallest patch size), and all use the size that fits everywhere. In evaluation each process splits separately.

    Args:
        trainer: the `HFViTTrainer` that owns this handler.
        forward_backward: `(model, batch) -> loss`, forward and backward pass of one micro-batch.
    """

    def __init__(self, trainer, forward_backward: Callable[[nn.Module, dict[str, Any]], torch.Tensor]):
        self.trainer = trainer
        self.forward_backward = forward_backward
        self.micro = MicroBatchSize(trainer.args.per_device_train_batch_size)
        self.eval_batch_size = trainer.args.per_device_eval_batch_size
        self.is_fitted = trainer.args.world_size == 1 or trainer.is_sharded
        self._batches: list[dict[str, Any]] = []
        self._reached = 0

    def resume(self, state: ResumeState) -> None:
        """Use the sizes that the resumed run determined."""
        if state.device_batch == self.micro.images and state.micro_batch < self.micro.size:
            self.micro.shrink(state.micro_batch)
        self.eval_batch_size = min(self.eval_batch_size, state.eval_batch)

    # Training

    def begin_step(self, batches: list[dict[str, Any]]) -> None:
        """Start an optimizer step that accumulates the gradients of `batches`."""
        self._batches = batches
        self._reached = 0

    def training_step(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """Run forward and backward pass of a batch, in micro-batches if it does not fit.

        Returns:
            The loss of the last micro-batch; the others are added to the trainer's unlogged loss.
        """
        trainer = self.trainer
        if self._reached == 0:
            self._restore_rng = saved_rng_state(trainer.args.device)
            self._loss_before = trainer.unlogged_loss.clone()
            if not self.is_fitted:
                self._fit_all_processes(batch)
        self._reached += 1
        loss = none_if_out_of_memory(self._in_micro_batches, model, batch)
        while loss is None:
            if trainer.args.world_size > 1 or trainer.is_sharded:
                size = self.micro.next_size()
                hint = (
                    f"Resume with --resume_from_checkpoint auto --per_device_train_batch_size {size}." if size else ""
                )
                raise out_of_memory_error(trainer.model, trainer.args.device, self.micro.size, hint)
            self._shrink()
            self._undo()
            loss = none_if_out_of_memory(self._repeat_step, model)
        return loss

    def _repeat_step(self, model: nn.Module) -> torch.Tensor:
        """Repeat all batches of the step so far; the Trainer adds the last loss."""
        for batch in self._batches[: self._reached - 1]:
            self.trainer.unlogged_loss += self._in_micro_batches(model, batch)
        return self._in_micro_batches(model, self._batches[self._reached - 1])

    def _fit_all_processes(self, batch: dict[str, Any]) -> None:
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        while not self.is_fitted:
            with smallest_patch_size(model):
                loss = none_if_out_of_memory(self._in_micro_batches, model, batch)
            fits = torch.tensor([int(loss is not None)], device=trainer.args.device)
            self.is_fitted = bool(trainer.accelerator.gather(fits).all())
            del loss
            self._undo()
            for buffer, before in buffers:
                buffer.copy_(before)
            if not self.is_fitted:
                self._shrink()

    def _in_micro_batches(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        trainer = self.trainer
        parts = micro_batches(batch, self.micro.size, trainer.augmentation)
        steps = trainer.current_gradient_accumulation_steps
        trainer.current_gradient_accumulation_steps = steps * len(parts)
        try:
            for part in parts[:-1]:
                with trainer.accelerator.no_sync(model):
                    trainer.unlogged_loss += self.forward_backward(model, part)
            return self.forward_backward(model, parts[-1])
        finally:
            trainer.current_gradient_accumulation_steps = steps

    def _undo(self) -> None:
        """Restore gradients, losses and generators to the beginning of the step."""
        trainer = self.trainer
        trainer.model.zero_grad()
        trainer.unlogged_loss = self._loss_before.clone()
        trainer.non_finite.losses.discard_step()
        self._restore_rng()
        clear_device_cache(garbage_collection=True)

    def _shrink(self) -> None:
        trainer = self.trainer
        args = trainer.args
        size = self.micro.next_size()
        step = trainer.state.global_step + 1
        if size is None:
            reason = f"The run started with {self.micro.images}."
            if self.micro.size > 1:
                reason = "mixup and CutMix require an even number."
            raise out_of_memory_error(trainer.model, args.device, self.micro.size, reason)
        logger.warning(
            "Out of memory at step %d with %d images at once (%s). Continuing with %d, accumulated %d times; the"
            " global batch is still %d. Set per_device_train_batch_size: %d to avoid this.",
            step,
            self.micro.size,
            memory_usage(args.device),
            size,
            args.gradient_accumulation_steps * self.micro.images // size,
            args.global_batch_size,
            size,
        )
        trainer.add_event("out_of_memory", step=step, images=self.micro.size, then=size)
        self.micro.shrink(size)

    # Evaluation

    def predict(self, predict: Callable, batch: dict[str, Any], prediction_loss_only: bool):
        """Predict an evaluation batch, in micro-batches if it does not fit.

        Args:
            predict: `batch -> (loss, logits, labels)`.
            batch: evaluation batch.
            prediction_loss_only: return None for logits and labels.

        Returns:
            `(loss, logits, labels)` of the batch.
        """
        outputs = None
        while outputs is None:
            parts = micro_batches(batch, self.eval_batch_size)
            outputs = none_if_out_of_memory(lambda parts: [predict(part) for part in parts], parts)
            if outputs is None:
                self.shrink_evaluation(len(parts[0]["labels"]))
        if len(outputs) == 1:
            return outputs[0]
        losses, logits, labels = zip(*outputs, strict=True)
        weights = torch.tensor([len(part["labels"]) for part in parts], device=losses[0].device)
        loss = (torch.stack(losses) * weights).sum() / weights.sum()
        if prediction_loss_only:
            return loss, None, None
        return loss, torch.cat(logits), torch.cat(labels)

    def shrink_evaluation(self, images: int, work: str = "evaluation") -> None:
        """Halve the batch size of evaluation and other work without a backward pass.

        Args:
            images: number of images that did not fit.
            work: operation that ran out of memory, for the log and the event.
        """
        trainer = self.trainer
        device = trainer.args.device
        if images == 1 or trainer.is_sharded:
            reason = "The batch size is per_device_eval_batch_size."
            raise out_of_memory_error(trainer.model, device, images, reason, work)
        clear_device_cache(garbage_collection=True)
        self.eval_batch_size = images // 2
        logger.warning(
            "Out of memory in %s with %d images at once (%s). Continuing with %d. Training is not affected. Set"
            " per_device_eval_batch_size: %d to avoid this.",
            work,
            images,
            memory_usage(device),
            self.eval_batch_size,
            self.eval_batch_size,
        )
        event = f"out_of_memory_in_{work.replace(' ', '_')}"
        trainer.add_event(event, step=trainer.state.global_step, images=images, then=self.eval_batch_size)
