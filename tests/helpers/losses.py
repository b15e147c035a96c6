"""Replace the loss that a trainer computes."""

from collections.abc import Callable
from dataclasses import replace

from hfvit.recipe.arguments import SINGLE_LABEL
from hfvit.training.losses import LOSSES


def training_loss() -> Callable:
    """The loss of single-label training, `(logits, labels, smoothing) -> loss`."""
    return LOSSES[SINGLE_LABEL].labels


def set_training_loss(monkeypatch, loss: Callable) -> None:
    """Let trainers that are created from now on compute another loss."""
    monkeypatch.setitem(LOSSES, SINGLE_LABEL, replace(LOSSES[SINGLE_LABEL], labels=loss))
