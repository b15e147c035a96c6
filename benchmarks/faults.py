"""Fault injection for benchmarks/soak.py: full disks, damaged and malicious files, unusual machines, many images.

Each trial trains a model with 20,000 parameters on scikit-learn's digits. Each case is one row. It is lost if a
command ends in a traceback, hangs, runs code of a file, or ends with other weights than the uninterrupted run if they
should be equal.
"""

import ctypes
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import hfvit.cli
import hfvit.pipeline
from hfvit.artifacts.checkpoint import newest_checkpoint
from hfvit.cli.export_onnx import main as export

ROOT = Path(__file__).resolve().parent.parent
HFVIT = Path(sys.executable).parent / "hfvit"
MICRO = """\
architecture: vit_tiny_patch16_224
model_args: {patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}
dataset_name: digits
image_size: 16
max_train_samples: 192
max_eval_samples: 48
global_batch_size: 16
max_steps: 12
learning_rate: 3.0e-3
ema_decay: 0.9
eval_strategy: steps
eval_steps: 4
logging_steps: 2
seed: 5
disable_tqdm: true
use_cpu: true
"""
HANG_SECONDS = 300
LOST = ("lost", "traceback", "hang", "ran code")


def read_run(out: Path) -> tuple[list, dict]:
    """Return the history of a run without times, and its weights."""
    history = json.loads((out / "run.json").read_text())["history"]
    kept = ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy")
    entries = [{key: entry[key] for key in kept if key in entry} for entry in history if "train_loss" not in entry]
    return entries, load_file(out / "model.safetensors")


def same(out: Path, whole: Path) -> bool:
    """Return whether two runs have equal histories and weights."""
    (history, weights), (expected, expected_weights) = read_run(out), read_run(whole)
    equal = (torch.equal(expected_weights[name], value) for name, value in weights.items())
    return history == expected and weights.keys() == expected_weights.keys() and all(equal)


class Bench:
    """Train the uninterrupted run, and run hfvit's commands in child processes.

    A command is a fork of this process, which saves ten seconds of imports. With `fresh` it is a new Python process,
    for settings that are read at the start.

    Args:
        folder: working folder.
    """

    def __init__(self, folder: Path):
        Image.init()  # imports Pillow's plugins once
        self.folder = folder
        self.canary = folder / "canary"
        self.recipe = folder / "micro.yaml"
        self.recipe.write_text(MICRO)
        self.whole = folder / "whole"
        self.rows: list[dict] = []
        code, text = self.train(self.whole, "--keep_checkpoints", "true", "--save_total_limit", "9")
        if code:
            sys.exit(f"the uninterrupted run failed:\n{text[-2000:]}")

    def command(
        self,
        *words,
        main: Callable = hfvit.cli.main,
        before: Callable | None = None,
        fresh: bool = False,
        environment: dict | None = None,
    ) -> tuple[int, str]:
        """Run `hfvit WORDS`.

        Args:
            words: command line.
            main: entry point of the command.
            before: function to call first in its process.
            fresh: start a new Python process.
            environment: environment variables; None deletes one.

        Returns:
            The exit code (negative for a signal, 124 for a hang) and the output.
        """
        log = self.folder / "command.log"
        pid = os.fork()
        if pid == 0:
            self._run([str(word) for word in words], log, main, before, fresh, environment or {})
        deadline = time.monotonic() + HANG_SECONDS
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
            time.sleep(0.02)
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return 124, log.read_text(errors="replace")

    def _run(self, words: list[str], log: Path, main, before, fresh: bool, environment: dict) -> None:
        code = 1
        try:
            os.setsid()
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            for key, value in environment.items():
                os.environ.pop(key, None)
                if value is not None:
                    os.environ[key] = str(value)
            if before:
                before()
            if fresh:
                os.execv(HFVIT, [str(HFVIT), *words])
            main(words)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def train(self, out: Path, *words, **how) -> tuple[int, str]:
        """Train the recipe in `out`, resuming from its newest checkpoint."""
        return self.command(
            "train", self.recipe, "--output_dir", out, "--resume_from_checkpoint", "auto", *words, **how
        )

    def checkpoints(self, out: Path, *steps: int) -> Path:
        """Copy checkpoints of the uninterrupted run to `out`; return the newest one."""
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for step in steps:
            shutil.copytree(self.whole / f"checkpoint-{step}", out / f"checkpoint-{step}")
        return out / f"checkpoint-{steps[-1]}"

    def row(self, trial: str, case: str, code: int, text: str, out: Path | None = None, refused: bool = True) -> str:
        """Add a row and return its outcome.

        Args:
            trial: name of the trial.
            case: description of the case.
            code: exit code of the command.
            text: output of the command.
            out: run that must equal the uninterrupted one if the exit code is 0, or None.
            refused: whether an error message is an accepted outcome.
        """
        errors = [line for line in text.splitlines() if line.startswith("hfvit: ")]
        outcome = "lost"
        if self.canary.exists():
            outcome = "ran code"
            self.canary.unlink()
        elif code == 124:
            outcome = "hang"
        elif "Traceback (most recent call last)" in text:
            outcome = "traceback"
        elif code == 0 and (out is None or same(out, self.whole)):
            outcome = "same" if out else "done"
        elif code > 0 and refused and errors:
            outcome = "clear error"
        if outcome in LOST:
            print(text[-3000:], file=sys.stderr)
        message = errors[-1].removeprefix("hfvit: error: ").replace(str(self.folder), "") if errors else ""
        self.rows.append({
            "trial": trial, "case": case, "exit code": str(code), "outcome": outcome, "message": message[:100]
        })  # fmt: skip
        print(f"{trial}: {case}: {code} {outcome}", file=sys.stderr, flush=True)
        return outcome


@contextmanager
def small_disk(place: Path, kibibytes: int) -> Iterator[None]:
    """Mount a file system of limited size at `place`."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def resize_disk(place: Path, options: str) -> None:
    """Remount a file system with other mount options."""
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)


def disk(bench: Bench, quick: bool) -> None:
    """Fill the disk of a training, the image cache, an export and a push."""
    import datasets

    place = bench.folder / "disk"
    size = sum(file.stat().st_size for file in (bench.whole / "checkpoint-4").iterdir()) // 1024
    for part in (12,) if quick else range(1, 20):
        kibibytes = size * part // 6
        with small_disk(place, kibibytes):
            out = place / "out"
            code, text = bench.train(out)
            case = f"training, {kibibytes} KiB"
            if code == 0 or bench.row("disk", case, code, text) == "clear error":
                resize_disk(place, "size=50m")
                bench.row("disk", f"{case}, then room", *bench.train(out), out, refused=False)
    for kibibytes in (4,) if quick else (4, 64, 120, 160, 200):

        def on_disk():
            datasets.config.HF_DATASETS_CACHE = place

        with small_disk(place, kibibytes):
            out = bench.folder / "cached"
            shutil.rmtree(out, ignore_errors=True)
            # Without a cache, images are decoded in each epoch with another resize (within one level of 255).
            bench.row("disk", f"cache, {kibibytes} KiB", *bench.train(out, before=on_disk))
    _export_to_disks(bench, place, quick)
    _push_from_disks(bench, place, quick)


def _export_to_disks(bench: Bench, place: Path, quick: bool) -> None:
    whole = bench.folder / "onnx"
    words = ("--model", bench.whole)
    code, text = bench.command(*words, whole, main=export)
    bench.row("disk", "export, with room", code, text)
    size = sum(file.stat().st_size for file in whole.iterdir()) // 1024
    for part in (3,) if quick else range(1, 11):
        kibibytes = size * part // 5 + 4
        with small_disk(place, kibibytes):
            code, text = bench.command(*words, place / "onnx", main=export)
            if bench.row("disk", f"export, {kibibytes} KiB", code, text) == "clear error":
                resize_disk(place, "size=50m")
                again = bench.command(*words, place / "onnx", main=export)
                bench.row("disk", f"export, {kibibytes} KiB, then room", *again, refused=False)


def _push_from_disks(bench: Bench, place: Path, quick: bool) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers.loopback_hub import LoopbackHub

    for kibibytes in (4,) if quick else (4, 40, 160):
        with small_disk(place, kibibytes), LoopbackHub() as hub:
            (place / "tmp").mkdir()
            environment = {**hub.environment(place / "home"), "TMPDIR": place / "tmp"}
            code, text = bench.command("push", bench.whole, "user/x", fresh=True, environment=environment)
            there = "model", "user/x"
            files = len(hub.model("user/x").files()) if there in hub.repositories else 0
            bench.row("disk", f"push with a temporary folder of {kibibytes} KiB, {files} files arrived", code, text)


def manifest(checkpoint: Path) -> None:
    """Write a valid manifest for the files of a checkpoint."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in checkpoint.iterdir()
        if file.is_file() and file.name != "checkpoint.json"
    }
    (checkpoint / "checkpoint.json").write_text(json.dumps({"files": files}))


def damage(bench: Bench, quick: bool) -> None:
    """Damage each file of the newest checkpoint; the run must resume from the previous one."""
    out = bench.folder / "damaged"
    rng = random.Random(0)
    names = sorted(file.name for file in (bench.whole / "checkpoint-8").iterdir())
    for name in names[:2] if quick else names:
        for how in ("cut", "cut by one byte", "emptied", "deleted", "bit flipped"):
            file = bench.checkpoints(out, 4, 8) / name
            content = bytearray(file.read_bytes())
            if how == "bit flipped":
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
                file.write_bytes(content)
            elif how == "deleted":
                file.unlink()
            else:
                kept = {"cut": len(content) // 2, "cut by one byte": len(content) - 1, "emptied": 0}[how]
                file.write_bytes(content[:kept])
            bench.row("damage", f"{name} {how}", *bench.train(out), out, refused=False)


class Payload:
    """Object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.open, (self.path, os.O_CREAT | os.O_WRONLY)


PICKLED = (
    "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin",
    "pytorch_model.bin", "model.safetensors", "ema.safetensors", "trainer_state.json", "progress.json", "config.json",
    "optimizer.bin", "adapter_model.bin", "pytorch_model.bin.index.json", "tokenizer.pkl",
)  # fmt: skip


def pickles(bench: Bench, quick: bool) -> None:
    """Replace files of checkpoints and finished runs by pickles that run code; the manifest is valid."""
    out = bench.folder / "pickled"
    content = {"plain": pickle.dumps(Payload(bench.canary))}
    torch.save(Payload(bench.canary), bench.folder / "payload.pt")
    content["torch"] = (bench.folder / "payload.pt").read_bytes()
    bench.canary.unlink(missing_ok=True)
    image = bench.folder / "image.png"
    Image.new("RGB", (20, 20)).save(image)
    for name in PICKLED[:1] if quick else PICKLED:
        for kind, data in content.items():
            checkpoint = bench.checkpoints(out, 4)
            (checkpoint / name).write_bytes(data)
            if name.startswith("pytorch_model") or name.startswith("adapter"):
                (checkpoint / "model.safetensors").unlink()
            manifest(checkpoint)
            bench.row("pickle", f"{name} of a checkpoint, {kind}", *bench.train(out), out)
        if name.startswith(("optimizer", "scheduler", "scaler", "rng_state", "ema", "progress")):
            continue
        run = bench.folder / "pickled_run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(bench.whole, run)
        (run / name).write_bytes(content["torch"])
        if name.startswith("pytorch_model"):
            (run / "model.safetensors").unlink()
        bench.row("pickle", f"{name} of a run, predict", *bench.command("predict", run, image))


CHANGES = (
    "--optim sgd", "--optim adafactor", "--learning_rate 1e-4", "--global_batch_size 8", "--freeze backbone",
    "--layer_decay 0.7", "--early_stopping_patience 3", "--ema_decay 0", "--mixup_alpha 0.4", "--seed 6",
    "--max_train_samples 100", "--patch_sizes 4 8", "--metric_for_best_model accuracy", "--max_steps 6",
    "--max_steps 20", "--finetuning lora", "--finetuning linear_probe", "--lr_scheduler_type constant", "--bf16 true",
    "--image_size 32",
    "--per_device_train_batch_size 4", "--weight_decay 0.3", "--dataloader_num_workers 1", "--eval_steps 3",
    "--class_balance weight", "--drop_path_rate 0.2", "--eval_strategy epoch", "--repeated_augmentation 2",
    "--validation_fraction 0.3", "--nan_policy rewind", "--save_only_model true", "--model_args={\"depth\": 3}",
)  # fmt: skip


def resume(bench: Bench, quick: bool) -> None:
    """Resume with a changed option: the run must report the change, or fail with one error message."""
    out = bench.folder / "changed"
    for words in CHANGES[:2] if quick else CHANGES:
        bench.checkpoints(out, 4, 8)
        code, text = bench.train(out, *(shlex.split(words) if "{" not in words else [words]))
        key = words.split()[0].removeprefix("--").split("=")[0]
        named = "named" if key in text.replace(words, "") else "not named"
        bench.row("resume", f"{words}: {named}", code, text)


def machine(bench: Bench, quick: bool) -> None:
    """Train with low limits and unusual settings of the machine."""
    out = bench.folder / "machine"

    def case(name: str, *words, **how) -> None:
        shutil.rmtree(out, ignore_errors=True)
        bench.row("machine", name, *bench.train(out, *words, **how), out)

    workers = ("--dataloader_num_workers", "2")
    case("64 open files", before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)), fresh=True)
    if quick:
        return
    case("64 open files, 2 workers", *workers, before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    case("24 open files", before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24)))
    shared = Path("/dev/shm")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0:

        def tiny_shared_memory(kibibytes: int) -> None:
            ctypes.CDLL(None).unshare(0x00020000)  # CLONE_NEWNS: for this process alone
            subprocess.run(["mount", "--make-rprivate", "/"], check=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", shared], check=True)

        for kibibytes in (4, 64, 256):
            size = partial(tiny_shared_memory, kibibytes)
            case(f"/dev/shm of {kibibytes} kB, 2 workers", *workers, before=size)
    case("umask 077", before=lambda: os.umask(0o077))
    case("umask 077, 2 workers", *workers, before=lambda: os.umask(0o077))
    for name, value in (("no HOME", None), ("HOME that cannot be written", "/proc/nowhere")):
        case(name, environment={"HOME": value, "HF_HOME": None, "HF_DATASETS_CACHE": None}, fresh=True)
    cache = bench.folder / "read_only"
    with small_disk(cache, 64):
        resize_disk(cache, "ro")
        case("read-only cache", environment={"HF_HOME": cache, "HF_DATASETS_CACHE": cache / "d"}, fresh=True)
        case("read-only TMPDIR", environment={"TMPDIR": cache}, fresh=True)
    checkpoint = bench.checkpoints(out, 4, 8)
    for file in [*out.rglob("*"), bench.recipe]:
        os.utime(file, (4e9, 4e9))
    bench.row("machine", f"files from the future, resume from {checkpoint.name}", *bench.train(out), out)
    _interrupt(bench, out)


def _interrupt(bench: Bench, out: Path) -> None:
    """Interrupt with Ctrl-C, once and twice, between two checkpoints."""
    for times in (1, 2):
        shutil.rmtree(out, ignore_errors=True)
        words = [HFVIT, "train", bench.recipe, "--output_dir", out, "--eval_steps", "6"]
        process = subprocess.Popen([*map(str, words)], stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
        while process.poll() is None and not newest_checkpoint(out):
            time.sleep(0.005)
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.01)
        text, _ = process.communicate()
        bench.row("machine", f"Ctrl-C, {times} times", process.returncode if process.returncode > 0 else 130, text)
        code, text = bench.train(out, "--eval_steps", "6")
        bench.row("machine", f"resume after Ctrl-C, {times} times", code, text)


def rows(bench: Bench, quick: bool) -> None:
    """Train on a folder of 200,000 images in 100 classes."""
    count = 2000 if quick else 200_000
    folder = bench.folder / "many"
    rng = np.random.default_rng(0)
    for label in range(100):
        (folder / f"class{label:03d}").mkdir(parents=True)
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
        for number in range(count // 100):
            (folder / f"class{label:03d}" / f"{number}.png").write_bytes(buffer.getvalue())
    words = ("--dataset_name", folder, "--max_train_samples", "none", "--eval_strategy", "no", "--max_steps", "5")
    began = time.monotonic()
    code, text = bench.train(bench.folder / "many_out", *words, before=_print_memory)
    case = f"{count:,} images: {time.monotonic() - began:.0f} s, {_memory(text)[-1]:.0f} MB at most"
    bench.row("rows", case, code, text)


def _print_memory() -> None:
    """Print the peak memory of this process when it ends."""
    run = os._exit

    def leave(code: int) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        os.write(1, f"\nmemory {peak:.1f}\n".encode())
        run(code)

    os._exit = leave


def _memory(text: str) -> list[float]:
    return [float(line.split()[1]) for line in text.splitlines() if line.startswith("memory ")]


def memory(bench: Bench, quick: bool) -> None:
    """Measure the growth of the process's memory over 5,000 steps."""
    from transformers import Trainer

    steps = (50, 100) if quick else (500, 5000)

    def watch() -> None:
        step = Trainer.training_step

        def watched(trainer, *args, **kwargs):
            if trainer.state.global_step in (steps[0], steps[1] - 1):
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                print(f"memory {pages * resource.getpagesize() / 2**20:.1f}", flush=True)
            return step(trainer, *args, **kwargs)

        Trainer.training_step = watched

    words = ("--max_steps", steps[1], "--eval_steps", steps[0], "--logging_steps", "50")
    code, text = bench.train(bench.folder / "long", *words, before=watch)
    first, last = _memory(text) or (0, 0)
    bench.row("memory", f"{first:.0f} MB at step {steps[0]}, {last:.0f} MB at step {steps[1]}", code, text)
    if last > first * 1.1:
        bench.rows[-1]["outcome"] = "lost"


TRIALS = {
    "disk": disk, "damage": damage, "pickle": pickles, "resume": resume, "machine": machine, "rows": rows,
    "memory": memory,
}  # fmt: skip
