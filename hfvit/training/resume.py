"""Compare recipe and data of a resumed run with those of its start."""

import logging
from typing import Any

from hfvit.errors import DataError
from hfvit.recipe.loader import default_of
from hfvit.training.checkpointing import ResumeState

logger = logging.getLogger(__name__)

# Recipe keys that do not affect the result.
WITHOUT_EFFECT = (
    "output_dir", "keep_checkpoints", "allow_changed_data", "report_to", "run_name", "logging_steps",
    "logging_strategy", "disable_tqdm", "dataloader_num_workers", "save_total_limit", "allow_outside_paths", "plots",
    "save_predictions",
)  # fmt: skip

# A checkpoint of an earlier version does not have the keys that were added since: it had the default, or these values.
VALUES_BEFORE = {"crop_mode": "center"}


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
        allow_changed_data: resume although validation images may have been trained on.

    Raises:
        DataError: validation images are held out of the training split, which changed.
    """
    before = ResumeState.load(checkpoint).origin
    if not before:
        return
    changes = describe_changes(before, origin)
    if not changes:
        return
    logger.warning("Resuming with changes: %s.", "; ".join(changes))
    if _may_leak(before["splits"], origin["splits"]) and not allow_changed_data:
        raise DataError(
            "resume_from_checkpoint: the data changed since the checkpoint was written"
            f" ({'; '.join(changes)}), so validation images may have been trained on. Restore the data set and the"
            " recipe, start a new run, or pass --allow_changed_data."
        )


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Describe recipe keys and splits that differ between `describe_origin` results."""
    keys = {*before["recipe"], *now["recipe"]}
    old, new = (
        {key: part["recipe"].get(key, VALUES_BEFORE.get(key, default_of(key))) for key in keys}
        for part in (before, now)
    )
    return _changes(old, new) + _changes(_shown(before["splits"]), _shown(now["splits"]))


def _may_leak(before: dict[str, dict], now: dict[str, dict]) -> bool:
    """Return whether images of the validation split may have been trained on."""
    held_out = before["train"]["source"] == before["validation"]["source"].split(",")[0]
    changed = [role for role in ("train", "validation") if before.get(role) != now.get(role)]
    return held_out and bool(changed)


def _shown(splits: dict[str, dict]) -> dict[str, str]:
    return {
        f"{role} split": f"{split['source']}, {split['rows']} images, fingerprint {split['fingerprint']}"
        for role, split in splits.items()
    }


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    keys = sorted({*before, *now})
    return [f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys if before.get(key) != now.get(key)]
