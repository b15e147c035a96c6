"""Detect non-finite losses and loss spikes without synchronizing the device."""

import numpy as np
import torch

HISTORY = 1024  # losses kept between two calls of `spikes`; of more steps without a log only the last ones are checked
BASELINE = 64  # previous steps that a loss is compared with
MIN_BASELINE = 16  # fewer previous steps are not enough to call a loss a spike
MAX_DEVIATIONS = 8.0
MIN_INCREASE = 0.5


class LossMonitor:
    """Loss, gradient norm and learning rate of each step, kept on the training device.

    Nothing is read back before `spikes` or an explicit read of `bad_step`: reading a tensor waits for the device.

    Attributes:
        bad_step: first step whose loss or gradient norm is not finite, a tensor; -1 while there is none.
        last_good: tensor `(3,)` of loss, gradient norm and learning rate of the last finite step.
        losses: the last `HISTORY` losses, a ring buffer indexed by step.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.last_good = torch.full((3,), float("nan"), device=device)
        self.reset()

    def reset(self) -> None:
        """Start again with the next step, whichever it is."""
        self.step_loss = torch.zeros((), device=self.device)
        self.bad_step = torch.full((), -1, dtype=torch.long, device=self.device)
        self.losses = torch.zeros(HISTORY, device=self.device)
        self.first_step = -1
        self.last_step = -1
        self.checked_step = -1

    def add(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's share of the step's loss."""
        self.step_loss = self.step_loss + loss.float()

    def discard_step(self) -> None:
        """Drop the losses of a step that is computed again."""
        self.step_loss = torch.zeros_like(self.step_loss)

    def end_step(self, step: int, grad_norm: torch.Tensor | float | None, learning_rate: float) -> None:
        """Record a finished optimizer step.

        Args:
            step: number of the step.
            grad_norm: gradient norm before clipping; None when the optimizer skipped the step (fp16 loss scaling).
            learning_rate: learning rate of the step.
        """
        self.last_step = step
        if self.first_step < 0:
            self.first_step = step
            self.checked_step = step - 1
        if hasattr(grad_norm, "full_tensor"):  # FSDP 2 returns a DTensor, and every process gets here
            grad_norm = grad_norm.full_tensor()
        norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm, device=self.bad_step.device).float()
        values = torch.stack([self.step_loss, norm.reshape(()), torch.full_like(self.step_loss, learning_rate)])
        good = torch.isfinite(values[:2]).all() & (self.bad_step < 0)
        self.last_good = torch.where(good, values, self.last_good)
        self.bad_step = torch.where(good | (self.bad_step >= 0), self.bad_step, step)
        self.losses[step % HISTORY] = self.step_loss
        self.discard_step()

    def spikes(self, losses: torch.Tensor) -> list[dict[str, float]]:
        """Loss spikes since the last call, as dicts of `step`, `loss` and `median`; see `find_spikes`.

        Args:
            losses: `losses` of all processes, `(processes, HISTORY)`.
        """
        new = self.last_step - self.checked_step
        self.checked_step = self.last_step
        count = min(self.last_step - self.first_step + 1, new + BASELINE, HISTORY)
        if not new or count <= MIN_BASELINE:
            return []
        steps = np.arange(self.last_step - count + 1, self.last_step + 1)
        values = losses.mean(dim=0).cpu().numpy()[steps % HISTORY]
        return [
            {"step": int(steps[place]), "loss": float(values[place]), "median": median}
            for place, median in find_spikes(values)
            if steps[place] > self.last_step - new
        ]


def find_spikes(losses: np.ndarray) -> list[tuple[int, float]]:
    """Indices of loss spikes in `losses` `(steps,)`, each with the median of the losses before it.

    A spike exceeds the median of the `BASELINE` losses before it by `MAX_DEVIATIONS` of their standard deviations
    (estimated from the median absolute deviation, which spikes do not move) and by the share `MIN_INCREASE` of the
    median. Of several in a row only the first is returned.
    """
    found = []
    was_high = False
    for place in range(MIN_BASELINE, len(losses)):
        before = losses[max(0, place - BASELINE) : place]
        median = float(np.median(before))
        deviation = 1.4826 * float(np.median(np.abs(before - median)))
        is_high = losses[place] > median + max(MAX_DEVIATIONS * deviation, MIN_INCREASE * abs(median))
        if is_high and not was_high:
            found.append((place, median))
        was_high = is_high
    return found
