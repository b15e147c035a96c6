"""Test recovery and precision modes: kill and resume, repeatability, out of memory, fp16, torch.compile.

python survive.py SECONDS

All runs train in separate processes, concurrently on one GPU.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from kit import CUDA, DATA, SOURCE, TINY, WORK, TimeBudget, record
from safetensors.torch import load_file
from torch import Tensor

FOLDER = WORK / "survive"
KIT = Path(__file__).resolve().parent
MAX_STEPS, EVAL_STEPS = (12, 3) if TINY else (60, 10)
MEMORY_FRACTION = 0.12
RESERVED_SECONDS = 25  # to end remaining runs and compare
QUICK = (
    "quickstart", "--max_steps", MAX_STEPS, "--eval_strategy", "steps", "--eval_steps", EVAL_STEPS,
    "--logging_steps", 1, "--ema_decay", 0.99, "--drop_path_rate", 0.2, "--mixup_alpha", 0.2,
    "--policy", "trivial_augment", "--disable_tqdm", "true", "--resume_from_checkpoint", "auto",
)  # fmt: skip
BF16 = ("--bf16", "true")
DETERMINISTIC = ("--full_determinism", "true")
COMPILED = ("--torch_compile", "true")
AUTOTUNED = (*COMPILED, "--torch_compile_mode", "max-autotune", "--max_steps", 4)
TINY_MODEL = {
    "architecture": "vit_tiny_patch16_224",
    "image_size": 32,
    "model_args": {"patch_size": 8, "depth": 2},
    "global_batch_size": 16,
    "max_steps": 4,
}
LARGE_MODEL = {
    "architecture": "vit_base_patch16_224",
    "image_size": 224,
    "global_batch_size": 256,
    "max_steps": 8,
}
COMPARED_KEYS = ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy")


@dataclass
class Run:
    """Training in a separate process.

    Args:
        name: name of the run and its folder.
        words: command line, beginning with the recipe.
        memory_fraction: limit of the run's GPU memory, as a fraction of the total.
        kill: kill the run when it has two checkpoints, and start it again.
    """

    name: str
    words: tuple
    memory_fraction: float | None = None
    kill: bool = False
    process: subprocess.Popen | None = field(default=None, repr=False)

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def log(self) -> Path:
        return FOLDER / f"{self.name}.log"

    def start(self) -> None:
        script = [SOURCE / "hfvit" / "train.py"]
        if self.memory_fraction is not None:
            script = [KIT / "limited_memory.py", self.memory_fraction]
        environment = {**os.environ, "HF_DATASETS_CACHE": str(FOLDER / "cache" / self.name)}
        if CUDA:
            environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        command = [sys.executable, *script, *self.words, "--output_dir", self.folder]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [str(word) for word in command], stdout=log, stderr=log, cwd=SOURCE, env=environment
            )

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("checkpoint-*"))

    def tail(self) -> str:
        """Return the last lines of the log."""
        return "\n".join(self.log.read_text().splitlines()[-6:])

    def record(self) -> dict[str, Any]:
        """Return run.json of a finished run."""
        return json.loads((self.folder / "run.json").read_text())

    def history(self) -> list[dict[str, Any]]:
        """Return the log entries without times and speeds."""
        entries = [entry for entry in self.record()["history"] if "train_loss" not in entry]
        return [{key: entry[key] for key in COMPARED_KEYS if key in entry} for entry in entries]

    def weights(self) -> dict[str, Tensor]:
        return load_file(self.folder / "model.safetensors")


def memory_recipe() -> Path:
    """Write the recipe of the out-of-memory runs."""
    recipe = {
        **(TINY_MODEL if TINY else LARGE_MODEL),
        "dataset_name": str(DATA / "small"),
        "validation_split": "validation",
        "test_split": None,
        "learning_rate": 1e-4,
        "max_grad_norm": 1.0,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "bf16": True,
        "seed": 0,
    }
    file = FOLDER / "memory.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def runs() -> list[Run]:
    """Return all runs; those after `oom` need CUDA."""
    recipe = memory_recipe()
    found = [
        Run("whole", (*QUICK, *BF16)),
        Run("again", (*QUICK, *BF16)),
        Run("killed", (*QUICK, *BF16), kill=True),
        Run("det_whole", (*QUICK, *BF16, *DETERMINISTIC)),
        Run("det_killed", (*QUICK, *BF16, *DETERMINISTIC), kill=True),
        Run("fits", (recipe,)),
        Run("oom", (recipe,), memory_fraction=MEMORY_FRACTION),
    ]
    if CUDA:
        found += [
            Run("fp16", (*QUICK, "--fp16", "true")),
            Run("compiled", (*QUICK, *BF16, *COMPILED)),
            Run("autotuned", (*QUICK, *BF16, *AUTOTUNED)),
        ]
    return found


def kill_and_restart(run: Run, seconds: float) -> None:
    """Send SIGKILL, record the checkpoints that are left, and start the run again.

    Args:
        run: run to kill.
        seconds: seconds since the start of the step.
    """
    run.process.send_signal(signal.SIGKILL)
    run.process.wait()
    record("survive", name=f"{run.name}: killed", after=seconds, stands=run.checkpoints())
    run.start()


def watch(all_runs: list[Run], seconds: float) -> None:
    """Kill and restart runs with `kill`, and record how each run ends within `seconds`."""
    started = time.monotonic()
    budget = TimeBudget(seconds)
    waiting = {run.name for run in all_runs if run.kill}
    running = {run.name: run for run in all_runs}
    while running and budget.left() > 0:
        for run in list(running.values()):
            elapsed = time.monotonic() - started
            if run.name in waiting and len(run.checkpoints()) >= 2:
                waiting.discard(run.name)
                kill_and_restart(run, elapsed)
            elif run.process.poll() is not None:
                code = run.process.returncode
                record(
                    "survive", name=f"{run.name}: ended", code=code, after=elapsed, tail=run.tail() if code else None
                )
                del running[run.name]
        time.sleep(0.01)
    for run in running.values():
        run.process.kill()
        run.process.wait()
        record("survive", name=f"{run.name}: cut off", tail=run.tail())


def compare(name: str, one: Run, other: Run) -> None:
    """Record whether two runs ended with the same weights and losses.

    Args:
        name: name of the comparison.
        one: reference run.
        other: run that should equal the reference.
    """
    try:
        histories = one.history(), other.history()
        weights = one.weights(), other.weights()
    except (OSError, ValueError) as error:
        record("survive", name=name, error=f"{type(error).__name__}: {str(error)[:200]}")
        return
    difference = max((value.float() - weights[1][key].float()).abs().max().item() for key, value in weights[0].items())
    pairs = zip(*histories, strict=False)  # the lengths may differ
    record(
        "survive",
        name=name,
        same_bits=difference == 0.0,
        largest_weight_difference=difference,
        same_history=histories[0] == histories[1],
        first_step_that_differs=next((entry["step"] for entry, twin in pairs if entry != twin), None),
        entries=[len(history) for history in histories],
    )


def describe(run: Run) -> None:
    """Record losses, events and peak memory of a finished run."""
    try:
        found = run.record()
    except (OSError, ValueError) as error:
        record("survive", name=run.name, error=f"{type(error).__name__}: {str(error)[:200]}", tail=run.tail())
        return
    peaks = [entry["peak_memory_gib"] for entry in found["history"] if "peak_memory_gib" in entry]
    record(
        "survive",
        name=run.name,
        losses=[entry["loss"] for entry in found["history"] if "loss" in entry],
        events=found.get("events"),
        peak_gib=max(peaks, default=None),
    )


def main(seconds: float) -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    all_runs = runs()
    for run in all_runs:
        run.start()
    watch(all_runs, seconds - RESERVED_SECONDS)
    named = {run.name: run for run in all_runs}
    compare("two runs of one recipe", named["whole"], named["again"])
    compare("killed and resumed", named["whole"], named["killed"])
    compare("killed and resumed, full_determinism", named["det_whole"], named["det_killed"])
    for name in ("fits", "oom", "fp16", "compiled"):
        if name in named:
            describe(named[name])


if __name__ == "__main__":
    main(float(sys.argv[1]))
