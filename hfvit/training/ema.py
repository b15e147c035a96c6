"""Averages of the weights over training steps: EMA and SWA."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from transformers import TrainerCallback

from hfvit.errors import RecipeError


class ListedAverage(ModelEmaV3):
    """`ModelEmaV3` that lists the tensors of both models once.

    timm lists them in each step (1.0.31), which takes the host longer than to average them. Tensors are listed again
    after `forget`; until then they must only change in place.
    """

    _pairs: list[tuple[Tensor, Tensor]] | None = None

    def forget(self) -> None:
        """List the tensors again at the next update."""
        self._pairs = None

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Average the floating-point tensors of a model, and copy the others."""
        if self._pairs is None:
            states = self.module.state_dict(), model.state_dict()
            self._pairs = list(zip(*(state.values() for state in states), strict=True))
        averaged = [pair for pair in self._pairs if pair[0].is_floating_point()]
        self._foreach_lerp_(*map(list, zip(*averaged, strict=True)), weight=1.0 - decay)
        for average, value in self._pairs:
            if not average.is_floating_point():
                average.copy_(value)


class WeightAverage(TrainerCallback):
    """Average the weights after each optimizer step; base class of EMA and SWA.

    Args:
        average: timm's average, updated with the number of the step.

    Attributes:
        option: key of the recipe.
        file: name of the averaged weights in a checkpoint.
    """

    option = ""
    file = ""

    def __init__(self, average: ListedAverage):
        self.average = average

    def on_train_begin(self, args, state, control, **kwargs):
        self.average.forget()

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.average.update(model, step=state.global_step + 1)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Use the averaged weights in `model` within the context."""
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        self.copy_to(model)
        try:
            yield
        finally:
            model.load_state_dict(weights)

    def copy_to(self, model: nn.Module) -> None:
        """Copy the averaged weights to a model."""
        model.load_state_dict(self.average.module.state_dict())

    def save(self, checkpoint: str | Path) -> None:
        """Write the averaged weights to a checkpoint."""
        weights = {name: value.contiguous() for name, value in self.average.module.state_dict().items()}
        save_file(weights, Path(checkpoint) / self.file)

    def load(self, checkpoint: str | Path) -> None:
        """Load the averaged weights; raises `RecipeError` if the checkpoint has none."""
        file = Path(checkpoint) / self.file
        if not file.exists():
            raise RecipeError(
                f"{self.option}: {checkpoint} was saved without averaged weights. Resume without {self.option}, or"
                " start a new run in another output_dir."
            )
        self.average.module.load_state_dict(load_file(file))


class EmaCallback(WeightAverage):
    """Exponential moving average, by timm's `ModelEmaV3` with warmup.

    Args:
        model: the model, not wrapped.
        decay: decay in [0, 1), reduced for short runs by `fitted_ema_decay`.
    """

    option = "ema_decay"
    file = "ema.safetensors"

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(ListedAverage(model, decay=decay, use_warmup=True))
        self.decay = decay

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.average.decay = fitted_ema_decay(self.decay, state.max_steps)


class SwaCallback(WeightAverage):
    """Stochastic weight averaging: mean of the weights after each step from a start.

    See https://arxiv.org/abs/1803.05407. Before the start, the average is the model.

    Args:
        model: the model, not wrapped.
        start: fraction of the steps before the first averaged one, in [0, 1).
    """

    option = "swa_start"
    file = "swa.safetensors"

    def __init__(self, model: nn.Module, start: float):
        # The decay is 0 up to the first averaged step, then n / (n + 1) after n averaged steps.
        super().__init__(ListedAverage(model, decay=1.0, use_warmup=True, warmup_gamma=1.0, warmup_power=1.0))
        self.start = start

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.average.update_after_step = int(self.start * state.max_steps)


def fitted_ema_decay(decay: float, steps: int) -> float:
    """Limit the decay so that the average spans a tenth of the run (timm#1182)."""
    return min(decay, max(0.0, 1.0 - 10.0 / max(steps, 1)))
