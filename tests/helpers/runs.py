"""Files of a run, and comparison of runs."""

import json

import torch
from safetensors.torch import load_file

from hfvit.errors import run
from hfvit.pipeline import main

OUTPUT_FILES = {
    "README.md",
    "config.json",
    "model.safetensors",
    "recipe.yaml",
    "run.json",
    "trainer_state.json",
    "examples.npz",
    "mistakes.csv",
    *(
        f"plots/{name}{theme}.png"
        for name in (
            "confusion_matrix",
            "explanations",
            "learning_curves",
            "per_class_recall",
            "reliability",
            "training_images",
        )
        for theme in ("", "_dark")
    ),
}


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def lasting_files(folder):
    """Return the files of a run without plots of mistakes, which some runs lack."""
    return {name for name in files(folder) if not name.startswith(("plots/mistakes", "plots/label_errors"))}


def read_record(folder):
    return json.loads((folder / "run.json").read_text())


def step_losses(folder):
    return [entry["loss"] for entry in read_record(folder)["history"] if "loss" in entry]


def assert_same_run(resumed, uninterrupted):
    first, second = load_file(uninterrupted / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert step_losses(resumed) == step_losses(uninterrupted)
    assert read_record(resumed)["training"]["resumed_at_step"] > 0


def fails(capsys, *argv, code=2):
    """Return the error of a run that must fail before training."""
    assert run(lambda: main([str(word) for word in argv])) == code
    error = capsys.readouterr().err
    last = error[error.rindex("hfvit: error: ") :]
    assert "Traceback" not in last
    return last


PUSHED = {
    "README.md", "config.json", "model.safetensors", "recipe.yaml", "run.json", "trainer_state.json",
    *(
        f"plots/{name}{theme}.png"
        for name in ("confusion_matrix", "learning_curves", "per_class_recall", "reliability")
        for theme in ("", "_dark")
    ),
}  # fmt: skip
