"""Exponential moving average of the weights."""

from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from transformers import TrainerCallback

from hfvit.errors import RecipeError
from hfvit.training.non_finite import WatchingTrainer

EMA_FILE = "ema.safetensors"


class AveragingTrainer(WatchingTrainer):
    """A Trainer whose evaluations, and whose model after `train`, have the averaged weights where there is an average.

    Raises `RecipeError` for an average of sharded weights.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ema: ModelEmaV3 | None = None
        if self.args.ema_decay:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise RecipeError("ema_decay: averaging sharded weights is not supported; set it to null.")
            self.ema = ModelEmaV3(self.model, decay=self.args.ema_decay, use_warmup=True)
            self.add_callback(_EmaCallback(self.ema))

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.ema:
            self.ema.decay = fitted_ema_decay(self.args.ema_decay, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        if self.ema:
            self.model.load_state_dict(self.ema.module.state_dict())
            self.ema = None
            self.remove_callback(_EmaCallback)
        return result

    def evaluation_loop(self, *args, **kwargs):
        with self._averaged_weights():
            return super().evaluation_loop(*args, **kwargs)

    @contextmanager
    def _averaged_weights(self):
        if self.ema is None:
            yield
            return
        raw = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema.module.state_dict())
        try:
            yield
        finally:
            self.model.load_state_dict(raw)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.ema and self.args.should_save:
            save_file(self.ema.module.state_dict(), Path(output_dir) / EMA_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.ema and checkpoint:
            self._load_ema(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.ema:
            self._load_ema(self.state.best_model_checkpoint)

    def _load_ema(self, checkpoint: str) -> None:
        file = Path(checkpoint) / EMA_FILE
        if not file.exists():
            raise RecipeError(f"{checkpoint} was saved without ema_decay; resume with ema_decay null, or start anew.")
        self.ema.module.load_state_dict(load_file(file))


class _EmaCallback(TrainerCallback):
    def __init__(self, ema: ModelEmaV3):
        self.ema = ema

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.ema.update(model, step=state.global_step + 1)


def fitted_ema_decay(decay: float, steps: int) -> float:
    """`decay`, shortened so that the average spans at most a tenth of a run of `steps` (timm#1182)."""
    return min(decay, max(0.0, 1.0 - 10.0 / max(steps, 1)))
