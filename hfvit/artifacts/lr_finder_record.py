"""`LearningRateCurve` (lr_finder.json): result of a learning rate range test."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from hfvit.artifacts.json_record import LARGEST, FieldError, FileRecord, Range
from hfvit.errors import ModelError

SMOOTHING = 0.9  # of the losses: weight of the mean so far
SKIPPED_START = 0.1  # fraction of the steps before a suggestion, whose smoothed loss is that of few steps
SKIPPED_END = 5  # steps at the divergence, which no suggestion comes from
MIN_STEPS = 20
Rate = Annotated[float, Range(0, LARGEST)]


@dataclass(kw_only=True)
class LearningRateCurve(FileRecord):
    """lr_finder.json: losses of a learning rate range test, and suggestions.

    Attributes:
        learning_rates: learning rate of each step: that of the last layer with `layer_decay`.
        losses: loss of each step, before its update.
        smoothed: losses smoothed by `smoothed_losses`.
        diverged: whether the loss diverged before the last step.
        steepest: learning rate where the smoothed loss falls fastest.
        minimum_tenth: a tenth of the learning rate with the lowest smoothed loss.
        recipe: learning rate of the recipe.
    """

    FILE: ClassVar[str] = "lr_finder.json"
    REMEDY: ClassVar[str] = "Run hfvit train --find_lr again."

    hfvit_version: str
    command: str
    learning_rates: list[Rate]
    losses: list[float]
    smoothed: list[float]
    diverged: bool
    steepest: Rate
    minimum_tenth: Rate
    recipe: Rate

    def check(self) -> None:
        """Raise `FieldError` for lists of different lengths."""
        for name in ("losses", "smoothed"):
            if len(getattr(self, name)) != len(self.learning_rates):
                raise FieldError(name, f"must have {len(self.learning_rates)} items")

    def __repr__(self) -> str:
        return (
            f"LearningRateCurve({len(self.losses)} steps: steepest={self.steepest:.1e},"
            f" minimum_tenth={self.minimum_tenth:.1e}, recipe={self.recipe:.1e})"
        )

    def __str__(self) -> str:
        return self.describe()

    def describe(self) -> str:
        """Return the suggestions as text."""
        end = "until the loss diverged" if self.diverged else "without divergence"
        return "\n".join(
            (
                f"learning rate  {self.learning_rates[0]:.1e} to {self.learning_rates[-1]:.1e} in"
                f" {len(self.losses)} steps, {end}",
                f"steepest       {self.steepest:.1e}   where the smoothed loss falls fastest",
                f"minimum / 10   {self.minimum_tenth:.1e}   a tenth of that with the lowest smoothed loss",
                f"recipe         {self.recipe:.1e}",
            )
        )


def smoothed_losses(losses: list[float], weight: float = SMOOTHING) -> np.ndarray:
    """Smooth losses by an exponential moving average without bias to its start.

    Args:
        losses: loss of each step.
        weight: weight of the average so far.
    """
    average = 0.0
    smoothed = []
    for step, loss in enumerate(losses, 1):
        average = weight * average + (1 - weight) * loss
        smoothed.append(average / (1 - weight**step))
    return np.array(smoothed)


def suggest(learning_rates: list[float], losses: list[float]) -> tuple[float, float]:
    """Suggest learning rates from a range test.

    Args:
        learning_rates: learning rate of each step, ascending.
        losses: loss of each step.

    Returns:
        (where the smoothed loss falls fastest over the logarithm, a tenth of where it is lowest), as in fastai.

    Raises:
        ModelError: the loss diverged too early, or never fell.
    """
    if len(losses) < MIN_STEPS:
        raise ModelError(
            f"--find_lr: the loss diverged after {len(losses)} steps, at a learning rate of"
            f" {learning_rates[-1] if learning_rates else 0:.1e}. Check the data, or use fp32 instead of fp16."
        )
    used = slice(int(SKIPPED_START * len(losses)), -SKIPPED_END)
    rates = np.array(learning_rates)[used]
    smoothed = smoothed_losses(losses)[used]
    lowest = int(smoothed.argmin())
    slopes = np.diff(smoothed[: lowest + 1]) / np.diff(np.log(rates[: lowest + 1]))
    if not len(slopes) or slopes.min() >= 0:
        raise ModelError("--find_lr: the loss did not fall at any learning rate. Check labels and images of the data.")
    return float(rates[slopes.argmin()]), float(rates[lowest] / 10)
