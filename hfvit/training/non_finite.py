"""Stop or rewind on a NaN or infinite loss."""

import json
import logging
from pathlib import Path

import torch
from transformers import TrainerCallback

from hfvit.artifacts.constants import STATE_FILE
from hfvit.errors import NonFiniteLossError, RecipeError
from hfvit.training.checkpointing import Progress, SavingTrainer, learning_rate_factor, rewinds

logger = logging.getLogger(__name__)


class _GoBack(Exception):
    """To the last checkpoint, and without step `step` from there."""

    def __init__(self, step: int):
        self.step = step


class WatchingTrainer(SavingTrainer):
    """A Trainer with `nan_policy`, which also tells of a loss that leaps (loss_watch.py)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_LeaveOut(self))
        if self.args.nan_policy == "rewind":
            if self.is_sharded:
                raise RecipeError("nan_policy: rewind is not available with sharded weights; set it to stop.")
            self.add_callback(_SaveFirst(self))

    def train(self, resume_from_checkpoint: str | None = None, *args, **kwargs):
        while True:
            try:
                result = super().train(resume_from_checkpoint, *args, **kwargs)
                self._require_finite()
                return result
            except _GoBack as back:
                step = back.step
            self._go_back(step)
            resume_from_checkpoint = self._last_checkpoint

    def _adopt(self, progress: Progress) -> None:
        events = self.events  # of this process, when it goes back: its checkpoint knows less
        super()._adopt(progress)
        self.events = events or self.events

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, learning_rate=None, **kwargs):
        norm = None if self.accelerator.optimizer_step_was_skipped else grad_norm
        self._watch.end_step(self.state.global_step, norm, learning_rate)
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self._require_finite()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, learning_rate=learning_rate, **kwargs)

    def _save_checkpoint(self, *args, **kwargs) -> None:
        self._require_finite()  # for a save that a signal or an epoch's end asked for
        super()._save_checkpoint(*args, **kwargs)

    def _require_finite(self) -> None:
        """Called before anything is logged, evaluated or saved, and at the end: no broken weights are kept."""
        bad_steps = self.accelerator.gather(self._watch.bad_step.reshape(1))
        if not (bad_steps >= 0).any():
            self._tell_leaps()
            return
        step = int(bad_steps[bad_steps >= 0].min())
        may_go_back = self.args.nan_policy == "rewind" and self._last_checkpoint
        if may_go_back and len(rewinds(self.events)) < self.args.nan_max_rewinds:
            raise _GoBack(step)
        loss, norm, learning_rate = self._watch.last_good.tolist()
        kept = "No checkpoint had been saved yet."
        if self._last_checkpoint:
            kept = f"The last good checkpoint is {self._last_checkpoint}."
        if count := len(rewinds(self.events)):
            kept += f" To go back {count} time{'s' if count > 1 else ''} (nan_max_rewinds) did not help."
        raise NonFiniteLossError(
            f"the loss or its gradient became NaN or infinite at step {step} (before that: loss {loss:.4g}, learning"
            f" rate {learning_rate:.3g}, gradient norm {norm:.3g}). {kept} Lower learning_rate or lengthen"
            f" warmup_steps, clip harder (max_grad_norm {self.args.max_grad_norm:g}), use bf16 instead of fp16, and"
            " look for broken images or labels in the data."
        )

    def _tell_leaps(self) -> None:
        for leap in self._watch.leaps(self.accelerator.gather(self._watch.losses.reshape(1, -1))):
            logger.warning("The loss leaps at step %(step)d: %(loss).4g, where %(usual).4g is usual.", leap)
            self.note("loss_leap", **leap)

    def _go_back(self, step: int) -> None:
        state = json.loads((Path(self._last_checkpoint) / STATE_FILE).read_text(encoding="utf-8"))
        factor = learning_rate_factor(self.events) * self.args.nan_lr_factor
        logger.warning(
            "The loss or its gradient became NaN or infinite at step %d: back to step %d, with %g of the recipe's"
            " learning rate and without the batch of step %d.",
            *(step, state["global_step"], factor, step),
        )
        self.note("rewind", step=step, to_step=state["global_step"], learning_rate_factor=factor)
        self._watch.restart()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint:
            before = learning_rate_factor(Progress.load(checkpoint).events)
            self._scale_learning_rate(learning_rate_factor(self.events) / before)

    def _scale_learning_rate(self, factor: float) -> None:
        if factor == 1.0:
            return
        for group in self.optimizer.param_groups:
            group |= {key: group[key] * factor for key in ("lr", "initial_lr") if key in group}
        for name in ("base_lrs", "_last_lr"):  # of torch's schedulers, all but those that read the groups
            if hasattr(self.lr_scheduler, name):
                setattr(self.lr_scheduler, name, [rate * factor for rate in getattr(self.lr_scheduler, name)])

    # A step that is left out: its batch is read, the schedule goes on, the weights stay.

    def leaves_out(self) -> bool:
        """Whether the step under way is one that a rewind leaves out."""
        return self.state.global_step + 1 in [event["step"] for event in rewinds(self.events)]

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        if self.leaves_out():  # the last good loss stands in for it in the log
            loss = torch.nan_to_num(self._watch.last_good[0]) / self.current_gradient_accumulation_steps
            self._watch.add(loss)
            return loss
        return super().training_step(model, inputs, num_items_in_batch)

    def _clip_grad_norm(self, model) -> torch.Tensor:
        return torch.zeros((), device=self.args.device) if self.leaves_out() else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        if self.leaves_out():
            return torch.zeros((), device=self.args.device)
        return super()._get_grad_norm(model, grad_norm)


class _LeaveOut(TrainerCallback):
    def __init__(self, trainer: WatchingTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.leaves_out():  # without gradients fp16's scaler would complain, and AdamW decay the weights
            self.trainer.accelerator.gradient_state._set_sync_gradients(False)


class _SaveFirst(TrainerCallback):
    """A run that may go back needs a place to go back to from the start."""

    def __init__(self, trainer: WatchingTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.trainer._save_checkpoint(self.trainer.model, None)
