"""run.json read back: the facts of a run that report, card and push need, or one sentence about what is wrong."""

from pathlib import Path

from hfvit.checkpoints import RUN_FILE
from hfvit.errors import ModelError
from hfvit.json_files import read_object

# What is asked of the file; anything beside it may be missing, as `temperature` and `examples` of older runs are.
_NEEDED = {
    "model": ("architecture", "base_model", "image_size", "parameters", "trained_parameters"),
    "data": ("dataset_name", "dataset_config_name", "dataset_revision", "labels", "selected_by", "splits"),
    "training": (
        "steps", "epochs", "best_step", "best_metric_name", "seconds", "images_per_second", "data_wait",
        "resumed_at_step", "processes", "precision",
    ),
    "recipe": ("global_batch_size",),
    "hardware": ("processor", "cores", "gpus"),
    "versions": (),
}  # fmt: skip
_METRICS = (
    "accuracy", "accuracy_interval", "top5_accuracy", "macro_f1", "loss", "ece", "images", "per_class",
    "confusion_matrix", "calibration",
)  # fmt: skip


def read_run(folder: str | Path) -> dict:
    """The facts in `folder`/run.json; `ModelError` when there are none, or not those that this hfvit reads."""
    root = Path(folder).expanduser()
    path = root / RUN_FILE
    if not root.is_dir():
        raise ModelError(f"There is no folder {folder}; name the output_dir of a run.")
    if not path.is_file():
        raise ModelError(f"{folder} holds no run: there is no {RUN_FILE}. Name the output_dir of a finished run.")
    facts = read_object(path)
    missing = _missing(facts)
    if missing:
        by = facts.get("hfvit_version")
        raise ModelError(
            f"{path} lacks {missing}: it was written by {f'hfvit {by}' if by else 'an older hfvit'} in another layout."
            " Read it with the version that wrote it, or train again."
        )
    return facts


def _missing(facts: dict) -> str | None:
    """The first thing that is not there."""
    for section, keys in _NEEDED.items():
        held = facts.get(section)
        if not isinstance(held, dict):
            return section
        for key in keys:
            if key not in held:
                return f"{section}.{key}"
    metrics = facts.get("metrics")
    if not isinstance(metrics, dict) or not ("validation" in metrics or "test" in metrics):
        return "metrics"
    for role, held in metrics.items():
        for key in _METRICS:
            if not isinstance(held, dict) or key not in held:
                return f"metrics.{role}.{key}"
    return None if isinstance(facts.get("history"), list) else "history"
