"""Detect non-finite losses and loss spikes without synchronizing the device."""

import math

import numpy as np
import torch

HISTORY = 1024  # losses kept between two calls of `spikes`; earlier ones are not checked
BASELINE = 64  # number of previous steps to compare a loss with
MIN_BASELINE = 16  # minimum number of previous steps
MAX_DEVIATIONS = 8.0
MIN_INCREASE = 0.5
# Steps in a row that a loss scaler may skip: it halves the scale each time, from 65,536 down to 3e-5.
MAX_SKIPPED_STEPS = 31


class LossMonitor:
    """Record loss, gradient norm and learning rate of each step on the device.

    A step takes two kernels. The values are judged on the host: when `bad_step` or `last_good` is read, which
    synchronizes with the device, and before they are overwritten, every `HISTORY` steps.

    Args:
        device: the training device.
        loss_scaling: whether a loss scaler skips steps with infinite gradients, as with fp16.

    Attributes:
        records: ring buffer (HISTORY, 2) of losses and gradient norms, indexed by step.
    """

    def __init__(self, device: torch.device, loss_scaling: bool = False):
        self.device = device
        self.skips_allowed = MAX_SKIPPED_STEPS if loss_scaling else 0
        self._last_good = (math.nan, math.nan, math.nan)
        self.reset()

    def reset(self) -> None:
        """Clear the history; it continues with any step."""
        self.step_loss: torch.Tensor | None = None
        self.records = torch.zeros(HISTORY, 2, device=self.device)
        self.learning_rates = np.zeros(HISTORY)
        self.first_step = -1
        self.last_step = -1
        self.checked_step = -1
        self._judged_step = -1
        self._skipped = 0
        self._bad_step = -1

    @property
    def losses(self) -> torch.Tensor:
        """Return the ring buffer of losses (HISTORY,), indexed by step."""
        return self.records[:, 0]

    @property
    def bad_step(self) -> int:
        """Return the first step with a loss or gradient norm that is not finite.

        Returns -1 if there is none.

        With loss scaling, infinite gradients count after `MAX_SKIPPED_STEPS` of them in a row.
        """
        self._judge()
        return self._bad_step

    @property
    def last_good(self) -> tuple[float, float, float]:
        """Return loss, gradient norm and learning rate of the last step before `bad_step`."""
        self._judge()
        return self._last_good

    def restore(self, loss: float) -> None:
        """Set the last good loss of a resumed run."""
        if math.isnan(self._last_good[0]):
            self._last_good = (loss, *self._last_good[1:])

    def add(self, loss: torch.Tensor) -> None:
        """Add the loss of a micro-batch to that of the step."""
        self.step_loss = loss.float() if self.step_loss is None else self.step_loss + loss.float()

    def discard_step(self) -> None:
        """Drop the losses of a step that is recomputed."""
        self.step_loss = None

    def end_step(self, step: int, grad_norm: torch.Tensor | float | None, learning_rate: float) -> None:
        """Record a finished optimizer step.

        Args:
            step: number of the step.
            grad_norm: gradient norm before clipping; None if it is not known.
            learning_rate: learning rate of the step.
        """
        if self.first_step < 0:
            self.first_step = step
            self.checked_step = self._judged_step = step - 1
        if step - self._judged_step > HISTORY:
            self._judge()
        self.last_step = step
        if hasattr(grad_norm, "full_tensor"):  # a DTensor of FSDP 2, gathered by all processes
            grad_norm = grad_norm.full_tensor()
        loss = torch.zeros((), device=self.device) if self.step_loss is None else self.step_loss
        norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm, device=self.device).float()
        torch.stack([loss, norm.reshape(())], out=self.records[step % HISTORY])
        self.learning_rates[step % HISTORY] = learning_rate
        self.step_loss = None

    def _judge(self) -> None:
        """Find the first bad step among those since the last call."""
        steps = np.arange(self._judged_step + 1, self.last_step + 1)
        self._judged_step = self.last_step
        if not len(steps) or self._bad_step >= 0:
            return
        values = self.records.cpu().numpy()[steps % HISTORY]
        for step, (loss, norm), rate in zip(steps, values, self.learning_rates[steps % HISTORY], strict=True):
            self._skipped = 0 if np.isfinite(norm) else self._skipped + 1
            if not np.isfinite(loss) or self._skipped > self.skips_allowed:
                self._bad_step = int(step)
                return
            self._last_good = (float(loss), float(norm), float(rate))

    def spikes(self, losses: torch.Tensor) -> list[dict[str, float]]:
        """Return loss spikes since the last call, see `find_spikes`.

        Args:
            losses: `losses` of all processes (processes, HISTORY).

        Returns:
            Dicts of `step`, `loss` and `median`.
        """
        new = self.last_step - self.checked_step
        self.checked_step = self.last_step
        count = min(self.last_step - self.first_step + 1, new + BASELINE, HISTORY)
        if not new or count <= MIN_BASELINE:
            return []
        steps = np.arange(self.last_step - count + 1, self.last_step + 1)
        values = losses.mean(dim=0).cpu().numpy()[steps % HISTORY]
        return [
            {"step": int(steps[index]), "loss": float(values[index]), "median": median}
            for index, median in find_spikes(values)
            if steps[index] > self.last_step - new
        ]


def find_spikes(losses: np.ndarray) -> list[tuple[int, float]]:
    """Find loss spikes by the median and median absolute deviation of previous losses.

    A spike exceeds the median of the `BASELINE` previous losses by `MAX_DEVIATIONS` standard deviations (estimated
    from the median absolute deviation) and by the fraction `MIN_INCREASE` of the median. Only the first of consecutive
    spikes is returned.

    Args:
        losses: losses (steps,).

    Returns:
        Index and previous median of each spike.
    """
    spikes = []
    was_high = False
    for index in range(MIN_BASELINE, len(losses)):
        before = losses[max(0, index - BASELINE) : index]
        median = float(np.median(before))
        deviation = 1.4826 * float(np.median(np.abs(before - median)))
        is_high = losses[index] > median + max(MAX_DEVIATIONS * deviation, MIN_INCREASE * abs(median))
        if is_high and not was_high:
            spikes.append((index, median))
        was_high = is_high
    return spikes
