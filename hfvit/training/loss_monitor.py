"""Detect non-finite losses and loss spikes without synchronising the device."""

import numpy as np
import torch

KEPT = 1024  # losses between two looks; of a longer time without a log the last ones are looked at
BASELINE = 64  # steps that a loss is compared with
LEAST = 16  # of them, or nothing is said
DEVIATIONS = 8.0
SHARE = 0.5


class LossWatch:
    """The first step with a loss or gradient that is not finite, the figures of the last good one, and the losses.

    Tensors on the training device throughout: looking at one would make the processor wait for the device.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.last_good = torch.full((3,), float("nan"), device=device)  # loss, gradient norm, learning rate
        self.restart()

    def restart(self) -> None:
        """Watch from the next step on, whichever it is."""
        self.step_loss = torch.zeros((), device=self.device)
        self.bad_step = torch.full((), -1, dtype=torch.long, device=self.device)
        self.losses = torch.zeros(KEPT, device=self.device)
        self.first_step = self.ended_step = self.seen_step = -1

    def add(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's share of the step's loss."""
        self.step_loss = self.step_loss + loss.float()

    def drop(self) -> None:
        """Forget what was added of a step that begins anew."""
        self.step_loss = torch.zeros_like(self.step_loss)

    def end_step(self, step: int, grad_norm: torch.Tensor | float | None, learning_rate: float | None) -> None:
        """Judge step `step` once, however often the Trainer calls."""
        if step == self.ended_step or learning_rate is None:
            return
        self.ended_step = step
        if self.first_step < 0:
            self.first_step, self.seen_step = step, step - 1
        if hasattr(grad_norm, "full_tensor"):  # FSDP 2 gives a DTensor; every process gets here
            grad_norm = grad_norm.full_tensor()
        norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm, device=self.bad_step.device).float()
        figures = torch.stack([self.step_loss, norm.reshape(()), torch.full_like(self.step_loss, learning_rate)])
        good = torch.isfinite(figures[:2]).all() & (self.bad_step < 0)
        self.last_good = torch.where(good, figures, self.last_good)
        self.bad_step = torch.where(good | (self.bad_step >= 0), self.bad_step, step)
        self.losses[step % KEPT] = self.step_loss
        self.drop()

    def leaps(self, losses: torch.Tensor) -> list[dict[str, float]]:
        """The leaps since the last call in `losses`, those of all processes, `(processes, KEPT)`; see `find_leaps`."""
        new = self.ended_step - self.seen_step
        self.seen_step = self.ended_step
        count = min(self.ended_step - self.first_step + 1, new + BASELINE, KEPT)
        if not new or count <= LEAST:
            return []
        steps = np.arange(self.ended_step - count + 1, self.ended_step + 1)
        values = losses.mean(dim=0).cpu().numpy()[steps % KEPT]
        return [
            {"step": int(steps[place]), "loss": float(values[place]), "usual": usual}
            for place, usual in find_leaps(values)
            if steps[place] > self.ended_step - new
        ]


def find_leaps(losses: np.ndarray) -> list[tuple[int, float]]:
    """Places `(steps,)` where a loss leaps, each with the median that it leaves.

    A leap is above the median of the `BASELINE` losses before it by `DEVIATIONS` of their standard deviations (by the
    median absolute deviation, which leaps do not move) and by `SHARE` of the median. Of several in a row the first.
    """
    found, was_high = [], False
    for place in range(LEAST, len(losses)):
        before = losses[max(0, place - BASELINE) : place]
        usual = float(np.median(before))
        deviation = 1.4826 * float(np.median(np.abs(before - usual)))
        is_high = losses[place] > usual + max(DEVIATIONS * deviation, SHARE * abs(usual))
        if is_high and not was_high:
            found.append((place, usual))
        was_high = is_high
    return found
