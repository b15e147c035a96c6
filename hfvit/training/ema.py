"""Exponential moving average (EMA) of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from transformers import TrainerCallback

from hfvit.errors import RecipeError

EMA_FILE = "ema.safetensors"


class ListedEma(ModelEmaV3):
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


class EmaCallback(TrainerCallback):
    """Average the weights after each optimizer step with timm's `ModelEmaV3`.

    Args:
        model: the model, not wrapped.
        decay: decay in [0, 1), reduced for short runs by `fitted_ema_decay`.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.average = ListedEma(model, decay=decay, use_warmup=True)

    def on_train_begin(self, args, state, control, **kwargs):
        self.average.forget()
        self.average.decay = fitted_ema_decay(self.decay, state.max_steps)

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
        save_file(self.average.module.state_dict(), Path(checkpoint) / EMA_FILE)

    def load(self, checkpoint: str | Path) -> None:
        """Load the averaged weights; raises `RecipeError` if the checkpoint has none."""
        file = Path(checkpoint) / EMA_FILE
        if not file.exists():
            raise RecipeError(
                f"ema_decay: {checkpoint} was saved without averaged weights. Resume without ema_decay, or start a"
                " new run in another output_dir."
            )
        self.average.module.load_state_dict(load_file(file))


def fitted_ema_decay(decay: float, steps: int) -> float:
    """Limit the decay so that the average spans a tenth of the run (timm#1182)."""
    return min(decay, max(0.0, 1.0 - 10.0 / max(steps, 1)))
