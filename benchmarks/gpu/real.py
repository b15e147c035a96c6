"""Train recipes to the end in separate processes, concurrently on one GPU.

python real.py SECONDS [DINOV2_FOLDER]

DINOV2_FOLDER has DINOv2-S in the layout of a timm repository: config.json, and model.safetensors or (for a smaller
transfer) half.safetensors in float16. Without it, only the recipe from scratch is trained.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kit import DATA, SOURCE, TINY, WORK, TimeBudget, record

FOLDER = WORK / "real"
DATA_OPTIONS = ("--dataset_name", DATA / "cifar10", "--bf16", "true")
TINY_OPTIONS = (
    "--max_steps", 3, "--global_batch_size", 8, "--eval_strategy", "steps", "--eval_steps", 3,
    "--logging_steps", 1,
)  # fmt: skip
# The recipe is for 112 px, which it reaches in steps; all that depends on the size is set here.
DINOV2_224 = (
    "--image_size", 224, "--progressive_image_size", "none", "--global_batch_size", 128, "--num_train_epochs", 4,
    "--eval_strategy", "epoch", "--eval_tta", "none", "--drop_path_rate", 0.1,
)  # fmt: skip
DINOV2_TINY = ("--image_size", 28, "--progressive_image_size", "none")
HEAD_START = 0 if TINY else 2  # seconds until the next run starts, so that the first one decodes the images for all


def dinov2_weights(folder: Path) -> Path:
    """Return the folder, or a float32 copy of it if its weights are in float16."""
    half = folder / "half.safetensors"
    if not half.exists():
        return folder
    from safetensors.torch import load_file, save_file

    copy = WORK / "dinov2s"
    copy.mkdir(parents=True, exist_ok=True)
    (copy / "config.json").write_text((folder / "config.json").read_text())
    weights = {name: tensor.float() for name, tensor in load_file(half).items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def runs(dinov2: Path | None) -> dict[str, list]:
    """Return the arguments of each run by its name."""
    epochs = 1 if TINY else int(os.environ.get("KIT_TINY_EPOCHS", 20))
    found: dict[str, list] = {}
    if dinov2:
        recipe = ["dinov2_small", "--model_name_or_path", dinov2, *DATA_OPTIONS]
        found["dinov2_small"] = [*recipe, *TINY_OPTIONS, *DINOV2_TINY] if TINY else recipe
        if not TINY:
            found["dinov2_small_224"] = [*recipe, *DINOV2_224]
    found["vit_tiny_cifar10"] = [
        "vit_tiny_cifar10", *DATA_OPTIONS, "--num_train_epochs", epochs, "--mix_off_epochs", max(1, epochs // 10),
        "--global_batch_size", 256, "--learning_rate", 1e-3, *(TINY_OPTIONS if TINY else ()),
    ]  # fmt: skip
    return found


def start(folder: Path, words: list) -> subprocess.Popen:
    """Start a run in a new process.

    Args:
        folder: output folder; the log is written beside it.
        words: recipe and options.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    options = ["--output_dir", folder, "--disable_tqdm", "true"]
    command = [sys.executable, SOURCE / "hfvit" / "train.py", *words, *options]
    with folder.with_name(f"{folder.name}.log").open("w") as log:
        return subprocess.Popen(
            [str(word) for word in command],
            stdout=log,
            stderr=log,
            cwd=SOURCE,
            env={**os.environ, "HF_DATASETS_CACHE": str(folder.parent / "cache")},
        )


def report(name: str, seconds: float, code: int | str) -> None:
    """Record the accuracies and the speed of a run.

    Args:
        name: name of the run.
        seconds: seconds since the start of the step.
        code: exit code, or the reason why the run was ended.
    """
    try:
        run = json.loads((FOLDER / name / "run.json").read_text())
    except (OSError, ValueError) as error:
        tail = (FOLDER / f"{name}.log").read_text().splitlines()[-12:]
        record("real", name=name, code=code, seconds=seconds, error=f"{type(error).__name__}: {error}", tail=tail)
        return
    history = run["history"]
    test = run["metrics"].get("test", {})
    evaluations = [(entry["step"], round(entry["eval_accuracy"], 4)) for entry in history if "eval_accuracy" in entry]
    record(
        "real",
        name=name,
        code=code,
        seconds=seconds,
        test=test.get("accuracy"),
        test_interval=test.get("accuracy_interval"),
        validation=run["metrics"].get("validation", {}).get("accuracy"),
        ips_median=median(history, "images_per_second"),
        data_wait=median(history, "data_wait"),
        mfu=median(history, "mfu"),
        evals=evaluations[-8:],
    )


def median(history: list[dict[str, Any]], key: str) -> float | None:
    """Return the median of a key over the log entries that have it."""
    values = [entry[key] for entry in history if key in entry]
    return statistics.median(values) if values else None


def main(seconds: float, dinov2: Path | None) -> None:
    started = time.monotonic()
    budget = TimeBudget(seconds)
    weights = dinov2_weights(dinov2) if dinov2 else None
    running = {}
    for name, words in runs(weights).items():
        running[name] = start(FOLDER / name, [*words, "--overwrite_output_dir", "true"])
        time.sleep(HEAD_START)
    while running and budget.left() > 0:
        for name, process in list(running.items()):
            if process.poll() is not None:
                report(name, time.monotonic() - started, process.returncode)
                del running[name]
        time.sleep(0.1)
    for process in running.values():
        process.terminate()  # the run then saves a checkpoint
    for name, process in running.items():
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
        report(name, time.monotonic() - started, "cut off")


if __name__ == "__main__":
    main(float(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
