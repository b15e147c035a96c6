"""Train recipes for accuracy, one after another, each within a time limit.

python records.py SECONDS [NAME[:SECONDS] ...]

SECONDS is the limit of all runs together, and NAME:SECONDS another limit for one of them. A later call resumes what
was cut off, from `$KIT_WORK/records`, which can be copied to another machine. `KIT_DINO` and `KIT_VIT_B` are folders
with pretrained weights in the layout of a timm repository; without them, DINOv2-S is skipped, and ViT-B starts from
random weights. The exit code is 1 if a run failed; the others are trained nevertheless.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kit import OUT, TINY, WORK, TimeBudget, record
from real import DATA_OPTIONS, DINOV2_224, DINOV2_TINY, TINY_OPTIONS, dinov2_weights, median, start

from hfvit.artifacts.checkpoint import newest_checkpoint
from hfvit.errors import HFViTError, InterruptedRunError
from hfvit.recipe.loader import load_recipe

FOLDER = WORK / "records"
SECONDS_TO_SAVE = 60  # after SIGTERM, for a checkpoint of a gigabyte
LOG_LINES = 12
STOPPED_IN_TRAINING = "cut off"
STOPPED_OUTSIDE = "cut off outside training"  # in start-up or in the last evaluation, where there is nothing to save
STOPPED = {InterruptedRunError.exit_code: STOPPED_IN_TRAINING, -signal.SIGTERM: STOPPED_OUTSIDE}  # by exit code


@dataclass(frozen=True)
class Attempt:
    """Recipe to train.

    Args:
        words: recipe and options of the command line.
        seconds: time limit.
        aim: test accuracy to reach; None from random weights, for which the recipe was not made.
        skipped: reason why it cannot be trained.
    """

    words: tuple[str | int | float | Path, ...]
    seconds: float
    aim: float | None = None
    skipped: str | None = None


def attempts(dinov2: Path | None, vit_b: Path | None) -> dict[str, Attempt]:
    """Return the attempts by name, the shortest first.

    Args:
        dinov2: folder of DINOv2-S, None to skip it.
        vit_b: folder of ViT-B/16, None to start from random weights.
    """
    tiny = (*TINY_OPTIONS, "--per_device_train_batch_size", 8, "--max_eval_samples", 16) if TINY else ()
    base = ("--model_name_or_path", vit_b) if vit_b else ("--architecture", "vit_base_patch16_224")
    if TINY:
        base = ("--architecture", "vit_tiny_patch16_224", "--image_size", 32)
    options = (*tiny, *DINOV2_TINY) if TINY else DINOV2_224
    words = ("dinov2_small", "--model_name_or_path", dinov2, *options) if dinov2 else ()
    skipped = None if dinov2 else "KIT_DINO is not set"
    return {
        "dinov2_small_224": Attempt(words, 900, 0.975, skipped),
        "vit_base": Attempt(("vit_base", *base, *tiny), 1800, 0.986 if vit_b else None),
        "seed_article": Attempt(("seed_article", *base, *tiny), 2400, 0.91 if vit_b else None),
        "vit_tiny_cifar10": Attempt(("vit_tiny_cifar10", *tiny), 5400, 0.96),
    }


def chosen(known: dict[str, Attempt], words: list[str]) -> dict[str, Attempt]:
    """Select attempts by `NAME` or `NAME:SECONDS`; without words, all of them.

    Args:
        known: attempts by name.
        words: names, with other time limits.
    """
    if not words:
        return known
    found = {}
    for word in words:
        name, _, seconds = word.partition(":")
        if name not in known:
            sys.exit(f"records: no recipe '{name}' (found: {', '.join(known)})")
        found[name] = replace(known[name], seconds=float(seconds or known[name].seconds))
    return found


def train(name: str, attempt: Attempt, seconds: float) -> int | str:
    """Train or resume an attempt, and end it with a checkpoint after `seconds`.

    Args:
        name: name of the attempt.
        attempt: the attempt.
        seconds: time limit.

    Returns:
        The exit code; after the time limit a value of `STOPPED`, or "killed" if the run did not end then.
    """
    process = start(FOLDER / name, [*attempt.words, *DATA_OPTIONS, "--resume_from_checkpoint", "auto"])
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # the run then saves a checkpoint
    try:
        code = process.wait(timeout=SECONDS_TO_SAVE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "killed"
    return STOPPED.get(code, code)


def results(folder: Path, global_batch_size: int) -> dict[str, Any]:
    """Return progress, speed, memory and accuracy of a run, from `run.json` or its last checkpoint.

    Args:
        folder: output folder.
        global_batch_size: images per step.
    """
    run: dict[str, Any] = {}
    state: dict[str, Any] = {}
    if (folder / "run.json").exists():
        run = json.loads((folder / "run.json").read_text())
        state = {"global_step": run["training"]["steps"], "log_history": run["history"]}
        state["max_steps"] = state["global_step"]
    elif checkpoint := newest_checkpoint(folder):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
    history = state.get("log_history", [])
    test = run.get("metrics", {}).get("test", {})
    evaluations = [(entry["step"], round(entry["eval_accuracy"], 4)) for entry in history if "eval_accuracy" in entry]
    return {
        "finished": bool(run),
        "steps": state.get("global_step", 0),
        "of_steps": state.get("max_steps"),
        "images": state.get("global_step", 0) * global_batch_size,
        "ips_median": median(history, "images_per_second"),
        "data_wait": median(history, "data_wait"),
        "mfu": median(history, "mfu"),
        "peak_gib": max((entry["peak_memory_gib"] for entry in history if "peak_memory_gib" in entry), default=None),
        "validation": max((accuracy for _, accuracy in evaluations), default=None),
        "test": test.get("accuracy"),
        "test_interval": test.get("accuracy_interval"),
        "evals": evaluations[-8:],
    }


def measure(name: str, attempt: Attempt, seconds: float) -> bool:
    """Train an attempt, and record its results with the seconds of all calls.

    Args:
        name: name of the attempt.
        attempt: the attempt.
        seconds: time limit of this call.

    Returns:
        Whether it ended without an error.
    """
    file = FOLDER / f"{name}.json"
    try:
        recipe = load_recipe([str(word) for word in (*attempt.words, *DATA_OPTIONS)])
    except HFViTError as error:
        record("records", name=name, error=f"{type(error).__name__}: {error}")
        return False
    global_batch_size = recipe.training.global_batch_size
    before = json.loads(file.read_text()) if file.exists() else {"seconds": 0.0, "calls": 0}
    steps_before = results(FOLDER / name, global_batch_size)["steps"]
    started = time.monotonic()
    code = 0 if before.get("finished") else train(name, attempt, seconds)
    took = 0.0 if before.get("finished") else time.monotonic() - started
    found = results(FOLDER / name, global_batch_size)
    values = {
        "name": name,
        "code": code,
        "from_scratch": recipe.model.model_name_or_path is None,
        "seconds": before["seconds"] + took,
        "calls": before["calls"] + (found["steps"] > steps_before),
        "steps_before": steps_before,
        **found,
        "aim": attempt.aim,
    }
    if attempt.aim and values["test"] is not None:
        values["reached"] = values["test"] >= attempt.aim
    failed = code not in (0, STOPPED_IN_TRAINING, STOPPED_OUTSIDE)
    if failed:
        values["error"] = f"killed {SECONDS_TO_SAVE} s after SIGTERM" if code == "killed" else f"exit code {code}"
        values["tail"] = (FOLDER / f"{name}.log").read_text().splitlines()[-LOG_LINES:]
    file.write_text(json.dumps(values, indent=2) + "\n")
    OUT.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, OUT / f"record_{name}.json")
    record("records", **values)
    return not failed


def main(seconds: float, words: list[str]) -> None:
    budget = TimeBudget(seconds)
    FOLDER.mkdir(parents=True, exist_ok=True)
    dinov2, vit_b = (Path(folder) if (folder := os.environ.get(key)) else None for key in ("KIT_DINO", "KIT_VIT_B"))
    failed = []
    for name, attempt in chosen(attempts(dinov2 and dinov2_weights(dinov2), vit_b), words).items():
        left = min(attempt.seconds, budget.left() - SECONDS_TO_SAVE)
        skipped = attempt.skipped or ("no time was left" if left <= 0 else None)
        if skipped:
            record("records", name=name, skipped=skipped)
        elif not measure(name, attempt, left):
            failed.append(name)
    if failed:
        sys.exit(f"records: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
