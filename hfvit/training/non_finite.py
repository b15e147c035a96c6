"""`nan_policy`: stop or rewind on a NaN or infinite loss, and report loss spikes."""

import json
import logging
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback

from hfvit.artifacts.constants import STATE_FILE
from hfvit.errors import NonFiniteLossError, RecipeError
from hfvit.training.loss_monitor import LossMonitor
from hfvit.training.resume import learning_rate_factor, rewinds, scale_learning_rates

logger = logging.getLogger(__name__)


class RewindRequest(Exception):
    """Raised in the training loop to return to the last checkpoint and skip `step`."""

    def __init__(self, step: int):
        self.step = step


class NonFiniteLossMonitor(TrainerCallback):
    """Check losses and gradient norms before anything is logged, evaluated or saved.

    With `nan_policy: rewind`, training returns to the last checkpoint with a lower learning rate. The failed step is
    then skipped: its batch is read and the schedule advances, but the weights do not change.

    Args:
        trainer: the `HFViTTrainer` that owns this callback.

    Raises:
        RecipeError: `nan_policy: rewind` is used with sharded weights (FSDP, DeepSpeed).
    """

    def __init__(self, trainer):
        self.trainer = trainer
        # A fused optimizer applies the scale itself: accelerate does not know which steps it skips (accelerate 1.15).
        self.losses = LossMonitor(trainer.args.device, loss_scaling=trainer.accelerator.scaler is not None)
        self.grad_norm: torch.Tensor | float | None = None
        self.learning_rate = 0.0
        self.rewinds_allowed = trainer.args.nan_policy == "rewind"
        if self.rewinds_allowed and trainer.is_sharded:
            raise RecipeError("nan_policy: rewind is not available with sharded weights (FSDP, DeepSpeed). Use stop.")

    # Callbacks

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.resume_state:
            self.losses.restore(self.trainer.resume_state.last_loss_of(args.process_index, args.world_size))
            before = learning_rate_factor(self.trainer.resume_state.events)
            factor = learning_rate_factor(self.trainer.events) / before
            if factor != 1.0:
                optimizer = self.trainer.optimizer
                scale_learning_rates(optimizer, self.trainer.lr_scheduler, [factor] * len(optimizer.param_groups))
        if self.rewinds_allowed and state.global_step == 0:  # a rewind needs a checkpoint from the start
            self.trainer.save_checkpoint()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.skips_step():  # without gradients the loss scaler of fp16 would fail, and AdamW decay the weights
            self.trainer.accelerator.gradient_state._set_sync_gradients(False)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.learning_rate = optimizer.param_groups[0]["lr"]  # before the scheduler's step

    def on_step_end(self, args, state, control, **kwargs):
        self.losses.end_step(state.global_step, self.grad_norm, self.learning_rate)
        self._check_before(control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._check_before(control)

    def _check_before(self, control) -> None:
        if control.should_log or control.should_evaluate or control.should_save:
            self.check()

    # Non-finite losses

    def check(self) -> None:
        """Check losses and gradient norms since the last call, and report loss spikes.

        It must be called by every process.

        Raises:
            RewindRequest: a value is not finite, and the run has to return to its last checkpoint.
            NonFiniteLossError: a value is not finite, with `nan_policy: stop` or after `nan_max_rewinds`.
        """
        trainer = self.trainer
        bad_steps = trainer.accelerator.gather(torch.tensor([self.losses.bad_step], device=trainer.args.device))
        if not (bad_steps >= 0).any():
            self._report_spikes()
            return
        step = int(bad_steps[bad_steps >= 0].min())
        count = len(rewinds(trainer.events))
        if self.rewinds_allowed and trainer.last_checkpoint and count < trainer.args.nan_max_rewinds:
            raise RewindRequest(step)
        loss, norm, learning_rate = self.losses.last_good
        saved = f"The last good checkpoint is {trainer.last_checkpoint}."
        if not trainer.last_checkpoint:
            saved = "No checkpoint was saved."
        if count:
            saved += f" It is still not finite after {count} rewind{'s' if count > 1 else ''} (nan_max_rewinds)."
        raise NonFiniteLossError(
            f"the loss or its gradient is NaN or infinite at step {step} (before: loss {loss:.4g}, learning rate"
            f" {learning_rate:.3g}, gradient norm {norm:.3g}). {saved} Lower learning_rate, raise warmup_steps, lower"
            f" max_grad_norm ({trainer.args.max_grad_norm:g}), use bf16 instead of fp16, or check the data"
            " set's images and labels."
        )

    def _report_spikes(self) -> None:
        for spike in self.losses.spikes(self.trainer.accelerator.gather(self.losses.losses.reshape(1, -1))):
            logger.warning("Loss spike at step %(step)d: %(loss).4g (median of previous steps: %(median).4g).", spike)
            self.trainer.add_event("loss_spike", **spike)

    # Rewind

    def rewind(self, step: int) -> str:
        """Record the rewind because of `step` and return the checkpoint to resume from."""
        trainer = self.trainer
        checkpoint = trainer.last_checkpoint
        saved_step = json.loads((Path(checkpoint) / STATE_FILE).read_text(encoding="utf-8"))["global_step"]
        factor = learning_rate_factor(trainer.events) * trainer.args.nan_lr_factor
        logger.warning(
            "The loss or its gradient is NaN or infinite at step %d. Resuming from step %d with %g times the recipe's"
            " learning rate, skipping step %d.",
            step,
            saved_step,
            factor,
            step,
        )
        trainer.add_event("rewind", step=step, to_step=saved_step, learning_rate_factor=factor)
        self.losses.reset()
        return checkpoint

    def skips_step(self) -> bool:
        """Return whether the current step is skipped because of a rewind."""
        return self.trainer.state.global_step + 1 in [event["step"] for event in rewinds(self.trainer.events)]

    def skipped_loss(self) -> torch.Tensor:
        """Return the last finite loss, logged for a skipped step."""
        last = np.nan_to_num(self.losses.last_good[0]) / self.trainer.current_gradient_accumulation_steps
        loss = torch.full((), last, device=self.trainer.args.device)
        self.losses.add(loss)
        return loss
