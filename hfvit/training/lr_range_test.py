"""Learning rate range test: raise the rate until the loss diverges."""

import math

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from hfvit.artifacts.lr_finder_record import smoothed_losses
from hfvit.errors import RecipeError
from hfvit.training.trainer import HFViTTrainer

DIVERGED = 4.0  # smoothed loss over the lowest one, from which on the test ends


class LearningRateRangeTest(TrainerCallback):
    """Raise the learning rate exponentially, and record the loss of each step.

    The test ends when the smoothed loss is above 4 times the lowest one (Smith 2015, https://arxiv.org/abs/1506.01186;
    ramp, smoothing and end as in fastai). Parameter groups keep the ratios of their learning rates.

    Args:
        trainer: trainer that logs each step, and neither evaluates nor saves; its model is trained.
        low: learning rate of the first step.
        high: learning rate of the last step.

    Attributes:
        learning_rate: learning rate of the current step.
        learning_rates: learning rates of the steps so far, without those that the loss scaler of fp16 skips.
        losses: their losses, means over the global batch, before the update.
        diverged: whether the loss diverged.

    Raises:
        RecipeError: the weights are sharded.
    """

    def __init__(self, trainer: HFViTTrainer, low: float, high: float):
        if trainer.is_sharded:
            raise RecipeError("--find_lr: not available with sharded weights (FSDP, DeepSpeed). Use one process.")
        self.trainer = trainer
        self.low = low
        self.high = high
        self.steps = trainer.args.max_steps
        self.learning_rate = 0.0
        self.learning_rates: list[float] = []
        self.losses: list[float] = []
        self.diverged = False

    def run(self) -> None:
        """Train `max_steps` steps, or until the loss diverges."""
        trainer = self.trainer
        trainer.remove_callback(trainer.non_finite)  # NaN is the end of the test, not an error
        trainer.add_callback(self)
        optimizer = trainer.create_optimizer()
        trainer.lr_scheduler = LambdaLR(optimizer, lambda step: self.rate_at(step) / trainer.args.learning_rate)
        trainer.train()

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return self.low * (self.high / self.low) ** (step / max(self.steps - 1, 1))

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.learning_rate = optimizer.param_groups[0]["lr"]  # before the scheduler's step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        loss = logs["loss"]
        if not math.isfinite(loss):
            self.diverged = True
        elif not self.trainer.accelerator.optimizer_step_was_skipped:  # then the next step has the same rate
            self.learning_rates.append(self.learning_rate)
            self.losses.append(loss)
            smoothed = smoothed_losses(self.losses)
            self.diverged = bool(smoothed[-1] > DIVERGED * smoothed.min())
        control.should_training_stop |= self.diverged
