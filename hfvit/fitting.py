"""`FittingTrainer`: a step whose batch does not fit into memory is done again in pieces (micro_batches.py)."""

import logging
from collections.abc import Callable

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from transformers import Trainer

from hfvit.augment import Augmentation
from hfvit.loss_watch import LossWatch
from hfvit.micro_batches import MicroBatches, cut, does_not_fit, generators, memory_in_words
from hfvit.patch_size import most_patches

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
