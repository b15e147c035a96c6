"""Read and write run.json and examples.npz."""

import json
import zipfile
from pathlib import Path

import numpy as np

from hfvit.artifacts.constants import EXAMPLES_FILE, RUN_FILE
from hfvit.errors import ModelError
from hfvit.utils.files import read_object, temporary_file, write_text

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


def write_examples(output_dir: str | Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays whole or not at all, in place of those of an earlier run."""
    with temporary_file(Path(output_dir) / EXAMPLES_FILE) as temporary:
        np.savez_compressed(temporary, allow_pickle=False, **arrays)


def read_examples(output_dir: str | Path, facts: dict) -> dict[str, np.ndarray]:
    """The arrays that belong to `facts`, run.json's `examples`; empty where the file is not there, or not theirs.

    `mistakes` and `attention` are uint8 `(images, height, width, 3)`, `attention_maps` float32 `(images, rows,
    columns)`; each as long as the list of its name in `facts`.
    """
    path, examples = Path(output_dir) / EXAMPLES_FILE, facts.get("examples")
    if not examples or not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return {}
    counts = {"mistakes": "mistakes", "attention": "attention", "attention_maps": "attention"}
    return {
        name: array
        for name, array in arrays.items()
        if name in counts and len(array) and len(array) == len(examples[counts[name]])
    }


def reported_split(facts: dict) -> str:
    """The split that plots and card are about."""
    return "test" if "test" in facts["metrics"] else "validation"


def write_facts(facts: dict, output_dir: str | Path) -> None:
    """Write run.json whole or not at all."""
    write_text(Path(output_dir) / RUN_FILE, json.dumps(facts, indent=2, allow_nan=False, default=str) + "\n")
