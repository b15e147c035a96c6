"""Notices a loss or gradient that is no longer finite, without waiting for the device."""

import torch


class LossWatch:
    """The first step with a loss or gradient that is not finite, and the figures of the last good one.

    Tensors on the training device throughout: looking at one would make the processor wait for the device.
    """

    def __init__(self, device: torch.device):
        self.step_loss = torch.zeros((), device=device)
        self.bad_step = torch.full((), -1, dtype=torch.long, device=device)
        self.last_good = torch.full((3,), float("nan"), device=device)  # loss, gradient norm, learning rate
        self.ended_step = -1

    def add(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's share of the step's loss."""
        self.step_loss = self.step_loss + loss.float()

    def end_step(self, step: int, grad_norm: torch.Tensor | float | None, learning_rate: float | None) -> None:
        """Judge step `step` once, however often the Trainer calls."""
        if step == self.ended_step or learning_rate is None:
            return
        self.ended_step = step
        if hasattr(grad_norm, "full_tensor"):  # FSDP 2 gives a DTensor; every process gets here
            grad_norm = grad_norm.full_tensor()
        norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm, device=self.bad_step.device).float()
        figures = torch.stack([self.step_loss, norm.reshape(()), torch.full_like(self.step_loss, learning_rate)])
        good = torch.isfinite(figures[:2]).all() & (self.bad_step < 0)
        self.last_good = torch.where(good, figures, self.last_good)
        self.bad_step = torch.where(good | (self.bad_step >= 0), self.bad_step, step)
        self.step_loss = torch.zeros_like(self.step_loss)
