"""State of a resumed run, and changes of recipe and data since its start."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from transformers import EarlyStoppingCallback, TrainerState

from hfvit.artifacts.constants import STATE_FILE
from hfvit.data.folders import canonical_split
from hfvit.errors import DataError, ModelError, RecipeError, one_line
from hfvit.recipe.loader import default_of
from hfvit.utils.files import write_text

logger = logging.getLogger(__name__)

RESUME_FILE = "progress.json"
# Recipe keys that do not affect the result.
WITHOUT_EFFECT = (
    "output_dir", "keep_checkpoints", "allow_changed_data", "report_to", "run_name", "logging_steps",
    "logging_strategy", "disable_tqdm", "dataloader_num_workers", "save_total_limit", "allow_outside_paths", "plots",
    "save_predictions",
)  # fmt: skip

# Recipe keys of the optimizer whose values are in its state, too, and their names there.
IN_OPTIMIZER = {
    "learning_rate": "lr", "layer_decay": "lr", "weight_decay": "weight_decay", "adam_beta1": "betas",
    "adam_beta2": "betas", "adam_epsilon": "eps",
}  # fmt: skip
SAME_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")  # share their state
# Recipe keys of objects that continue their state.
CONTINUED = {
    "optim": "optimizer", "optim_args": "optimizer", "lr_scheduler_type": "schedule",
    "lr_scheduler_kwargs": "schedule", "metric_for_best_model": "schedule", "greater_is_better": "schedule",
}  # fmt: skip
# Schedules that follow evaluations, whose options are in their state.
WITH_STATE = ("reduce_lr_on_plateau", "greedy")

# A checkpoint of an earlier version does not have the keys that were added since: it had the default, or these values.
VALUES_BEFORE = {"crop_mode": "center"}


@dataclass
class ResumeState:
    """Hold the state for an exact resume beside the Trainer's files (`progress.json`).

    Args:
        logged_step: last step with a logged loss.
        unlogged_loss: sum of the losses since `logged_step` for each process.
        device_batch: number of images in a device's batch.
        micro_batch: number of images per forward pass, less than `device_batch` after an out-of-memory error.
        eval_batch: number of images per forward pass in evaluation.
        events: see `HFViTTrainer.events`.
        logged_loss: sum of the losses of all steps up to `logged_step`; 0 in checkpoints of version 0.1.
        origin: see `HFViTTrainer.origin`; empty in checkpoints of version 0.1.
        last_loss: last finite loss of each process; empty in checkpoints of version 0.1.
        only_by_signal: whether a signal alone caused the save.
    """

    logged_step: int
    unlogged_loss: list[float]
    device_batch: int
    micro_batch: int
    eval_batch: int
    events: list[dict[str, Any]] = field(default_factory=list)
    logged_loss: float = 0.0
    origin: dict[str, Any] = field(default_factory=dict)
    last_loss: list[float] = field(default_factory=list)
    only_by_signal: bool = False

    @classmethod
    def load(cls, checkpoint: str | Path) -> "ResumeState":
        """Read `progress.json`; raises `ModelError` if it is missing or invalid."""
        file = Path(checkpoint) / RESUME_FILE
        try:
            state = cls(**json.loads(file.read_text(encoding="utf-8")))
            numbers = (state.logged_step, state.device_batch, state.micro_batch, state.eval_batch, state.logged_loss)
            values = (*numbers, *state.unlogged_loss, *state.last_loss)
            is_valid = all(isinstance(value, int | float) for value in values)
            is_valid = is_valid and bool(state.unlogged_loss) and min(numbers[1:4]) > 0
            is_valid = is_valid and all(isinstance(event["event"], str) for event in state.events)
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise ModelError(
                f"resume_from_checkpoint: {file} cannot be read ({type(error).__name__}: {one_line(error)[:200]})."
                " Resume from another checkpoint."
            ) from None
        if not is_valid:
            raise ModelError(f"resume_from_checkpoint: {file} has wrong values. Resume from another checkpoint.")
        return state

    def save(self, checkpoint: str | Path) -> None:
        """Write `progress.json`."""
        write_text(Path(checkpoint) / RESUME_FILE, json.dumps(asdict(self), indent=2) + "\n")

    def loss_of(self, process: int, processes: int) -> float:
        """Return a process's unlogged loss, the mean if the number of processes changed."""
        return _of_process(self.unlogged_loss, process, processes)

    def last_loss_of(self, process: int, processes: int) -> float:
        """Return a process's last finite loss, the mean if their number changed."""
        return _of_process(self.last_loss, process, processes) if self.last_loss else math.nan


def _of_process(values: list[float], process: int, processes: int) -> float:
    return values[process] if len(values) == processes else sum(values) / len(values)


def rewinds(events: list[dict]) -> list[dict]:
    """Return the `rewind` events, whose `step` is skipped afterwards."""
    return [event for event in events if event["event"] == "rewind"]


def learning_rate_factor(events: list[dict]) -> float:
    """Return the factor of the learning rate after all rewinds."""
    return rewinds(events)[-1]["learning_rate_factor"] if rewinds(events) else 1.0


def scale_learning_rates(optimizer: Optimizer, scheduler: Any, factors: Sequence[float]) -> None:
    """Multiply the learning rates of an optimizer and its schedule.

    Args:
        optimizer: optimizer.
        scheduler: schedule of its learning rates.
        factors: factor of each parameter group.
    """
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        group |= {key: group[key] * factor for key in ("lr", "initial_lr") if key in group}
    for name in ("base_lrs", "_last_lr"):  # attributes of torch's schedulers, except those that read the groups
        if hasattr(scheduler, name):
            scaled = [rate * factor for rate, factor in zip(getattr(scheduler, name), factors, strict=True)]
            setattr(scheduler, name, scaled)


def is_over(checkpoint: str | Path, max_steps: int, patience: int | None) -> bool:
    """Return whether a run ended at a checkpoint, by its last step or early stopping.

    Args:
        checkpoint: folder with `trainer_state.json`.
        max_steps: optimizer steps of the run.
        patience: evaluations without improvement after which the run stops, None without early stopping.
    """
    state = TrainerState.load_from_json(str(Path(checkpoint) / STATE_FILE))
    if state.global_step >= max_steps:
        return True
    stored = state.stateful_callbacks.get(EarlyStoppingCallback.__name__, [])
    counters = [
        callback["attributes"]["early_stopping_patience_counter"]
        for callback in (stored if isinstance(stored, list) else [stored])
    ]
    return patience is not None and any(counter >= patience for counter in counters)


def describe_origin(recipe: dict[str, Any], splits: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Describe recipe and data of a run, to save in its checkpoints.

    Args:
        recipe: resolved values of the recipe.
        splits: `source`, `rows` and `fingerprint` of each role, as in `run.json`.
    """
    kept = ("source", "rows", "fingerprint")
    return {
        "recipe": {key: value for key, value in recipe.items() if key not in WITHOUT_EFFECT},
        "splits": {role: {key: split.get(key) for key in kept} for role, split in splits.items()},
    }


def check_origin(checkpoint: str, origin: dict[str, Any], allow_changed_data: bool = False) -> None:
    """Report changes of recipe and data since a checkpoint was written.

    Args:
        checkpoint: checkpoint to resume from; one of version 0.1 is not checked.
        origin: description of `describe_origin`.
        allow_changed_data: resume although validation or test images may have been trained on.

    Raises:
        DataError: validation or test images are of the split that was trained on, and the splits changed.
        RecipeError: the global batch size or the optimizer changed, or a schedule that has a state.
    """
    before = ResumeState.load(checkpoint).origin
    if not before:
        return
    changes = describe_changes(before, origin)
    if not changes:
        return
    old, new = _recipes(before, origin)
    batch, new_batch = (values["global_batch_size"] for values in (old, new))
    if batch != new_batch:
        raise RecipeError(
            f"global_batch_size: must be that of the checkpoint ({batch}), since epochs are counted in steps, got"
            f" {new_batch}. Resume {checkpoint} with it, or start a new run in another output_dir."
        )
    has_state = bool({old["lr_scheduler_type"], new["lr_scheduler_type"]} & {*WITH_STATE})
    for key, owner in CONTINUED.items():
        may_change = {old[key], new[key]} <= {*SAME_OPTIMIZERS} if owner == "optimizer" else not has_state
        if old[key] != new[key] and not may_change:
            raise RecipeError(
                f"{key}: must be that of the checkpoint ({old[key]}), whose state the {owner} continues, got"
                f" {new[key]}. Resume {checkpoint} with it, or start a new run in another output_dir."
            )
    logger.warning("Resuming with changes: %s.", "; ".join(changes))
    if _may_leak(before["splits"], origin["splits"]) and not allow_changed_data:
        raise DataError(
            "resume_from_checkpoint: the data changed since the checkpoint was written"
            f" ({'; '.join(changes)}), so validation or test images may have been trained on. Restore the data set"
            " and the recipe, start a new run, or pass --allow_changed_data."
        )


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Describe recipe keys and splits that differ between `describe_origin` results."""
    return _changes(*_recipes(before, now)) + _changes(_shown(before["splits"]), _shown(now["splits"]))


def changes_in_optimizer(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return old and new value of each key of `IN_OPTIMIZER` that changed.

    Args:
        before: result of `describe_origin`, empty if unknown.
        now: the same of the resumed run.
    """
    if not before or not now:
        return {}
    old, new = _recipes(before, now)
    return {key: (old[key], new[key]) for key in IN_OPTIMIZER if old[key] != new[key]}


def _recipes(before: dict[str, Any], now: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return both recipes with the same keys."""
    keys = {*before["recipe"], *now["recipe"], *IN_OPTIMIZER, *CONTINUED, "global_batch_size"}
    old, new = (
        {key: part["recipe"].get(key, VALUES_BEFORE.get(key, default_of(key))) for key in keys}
        for part in (before, now)
    )
    return old, new


def _may_leak(before: dict[str, dict], now: dict[str, dict]) -> bool:
    """Return whether images that are evaluated may have been trained on."""
    changed = [role for role in ("train", "validation") if before.get(role) != now.get(role)]
    evaluated = [before["validation"], *(split for role, split in now.items() if role != "train")]
    trained = _names(before["train"])
    return bool(changed) and any(not trained.isdisjoint(_names(split)) for split in evaluated)


def _names(split: dict[str, Any]) -> set[str]:
    """Return the original splits of a source, without slices and fractions."""
    names = {part.split("[")[0] for part in split["source"].split(",")[0].split("+")}
    return {canonical_split(name) or name for name in names}


def _shown(splits: dict[str, dict]) -> dict[str, str]:
    return {
        f"{role} split": f"{split['source']}, {split['rows']} images, fingerprint {split['fingerprint']}"
        for role, split in splits.items()
    }


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    keys = sorted({*before, *now})
    return [f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys if before.get(key) != now.get(key)]
