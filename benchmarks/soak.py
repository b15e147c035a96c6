"""Interrupt and disturb trainings, and check that they resume exactly.

  python benchmarks/soak.py                        # 15 kills, some minutes
  python benchmarks/soak.py --quick                # 2 kills, only to test the script
  python benchmarks/soak.py --kills 50 --seed 7 --recipe vit_tiny_cifar10 --options "--max_steps 400"
  python benchmarks/soak.py --trials disk damage pickle resume machine rows memory
  unshare -rm python benchmarks/soak.py --trials disk    # to mount small file systems without being root

`kills` trains the recipe once without interruption. Then it trains again; after a random time, the process gets
SIGKILL or SIGTERM and is started again with `--resume_from_checkpoint auto`, until the run finishes. Further runs
follow until the number of kills is reached. A kill is survived if its run ends with the weights and losses of the
uninterrupted run, bit for bit. The random times start shortly before the first checkpoint, so that kills also hit the
start, saves and evaluations.

The other trials (faults.py) train a model with 20,000 parameters on scikit-learn's digits. Each case is one row. It is
lost if a command ends in a traceback, hangs, runs code of a file, or ends with other weights than the uninterrupted
run if they should be equal:

  disk     full file systems of many sizes: training and its resume, decoded images, an export, a push
  damage   each file of the newest checkpoint truncated, emptied, deleted or with one bit flipped
  pickle   malicious pickles instead of each file of a checkpoint and of a finished run
  resume   recipes that changed since the checkpoint
  machine  64 open files, /dev/shm of 4 kB, umask 077, files from the future, no HOME, a read-only cache, Ctrl-C twice
  rows     a folder of 200,000 images, with its time and memory
  memory   growth of the process from step 500 to step 5,000

The exit code is 1 if a case is lost.
"""

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import table, workspace
from faults import LOST, TRIALS, Bench, same

from hfvit.artifacts.checkpoint import newest_checkpoint
from hfvit.artifacts.output_dir import is_finished
from hfvit.utils.environment import hardware

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = {"kill": "d", "run": "d", "signal": "", "after s": ".1f", "exit code": "d", "checkpoint": "", "outcome": ""}
CASE_COLUMNS = {"trial": "", "case": "", "exit code": "", "outcome": "", "message": ""}
EVERY = "--eval_strategy steps --eval_steps 20 --ema_decay 0.99 --drop_path_rate 0.2 --mixup_alpha 0.2 --max_steps 200"
QUICK = "--eval_strategy steps --eval_steps 5 --max_steps 30"


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 kills of a run of 30 steps; few cases of each trial")
    parser.add_argument("--trials", nargs="+", choices=("kills", *TRIALS), default=["kills"], help="[kills]")
    parser.add_argument("--kills", type=int, help="number of kills [15, quick 2]")
    parser.add_argument(
        "--recipe", default=str(ROOT / "recipes" / "quickstart.yaml"), help="[recipes/quickstart.yaml]"
    )
    parser.add_argument("--options", help=f"options of the recipe [{EVERY}]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times and signals [0]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    options = parser.parse_args(argv)
    options.kills = options.kills or (2 if options.quick else 15)
    options.options = options.options or (QUICK if options.quick else EVERY)
    return options


def start(options: argparse.Namespace, out: Path) -> subprocess.Popen:
    """Start or resume a training, with its output in a log file."""
    words = [sys.executable, str(ROOT / "hfvit" / "train.py"), options.recipe, *shlex.split(options.options)]
    words += ["--output_dir", str(out), "--resume_from_checkpoint", "auto", "--disable_tqdm", "true"]
    log = out.with_name(f"{out.name}.log").open("w")
    return subprocess.Popen(
        words, stdout=log, stderr=log, env={**os.environ, "HF_DATASETS_CACHE": str(out.parent / "cache")}
    )


def undisturbed(options: argparse.Namespace, out: Path) -> tuple[float, float]:
    """Train without interruption; return the seconds to the first checkpoint and to the end."""
    began, first = time.monotonic(), None
    process = start(options, out)
    while process.poll() is None:
        if first is None and newest_checkpoint(out):
            first = time.monotonic() - began
        time.sleep(0.02)
    if process.returncode or first is None:
        sys.exit(f"the uninterrupted run failed:\n{out.with_name(f'{out.name}.log').read_text()[-2000:]}")
    return first, time.monotonic() - began


def disturbed(options, out: Path, rng: random.Random, first: float, total: float, left: int) -> list[dict]:
    """Train with at most `left` kills and return a row for each.

    Args:
        options: parsed options.
        out: output folder.
        rng: random number generator.
        first: seconds to the first checkpoint.
        total: seconds of the uninterrupted run.
        left: largest number of kills.
    """
    rows = []
    while True:
        process, began = start(options, out), time.monotonic()
        number = rng.choice((signal.SIGKILL, signal.SIGTERM))
        wait = first * 0.9 + rng.random() * (total - first) * 2 / options.kills
        try:
            code = process.wait(timeout=wait if len(rows) < left else None)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        code = process.wait()
        if is_finished(out):  # killed after its last file
            code = 0
            break
        newest = newest_checkpoint(out)
        rows.append({"signal": number.name, "after s": time.monotonic() - began, "exit code": code})
        rows[-1]["checkpoint"] = newest.name if newest else "nothing"
        print(f"kill {len(rows)} of this run: {number.name}, {rows[-1]['checkpoint']}", file=sys.stderr, flush=True)
    for row in rows:
        row["exit"] = code
    return rows


def kills(options: argparse.Namespace, folder: Path) -> list[dict]:
    """Kill runs of the recipe at random moments, and return a row for each kill."""
    rng = random.Random(options.seed)
    rows: list[dict] = []
    runs = 0
    whole = folder / "undisturbed"
    first, total = undisturbed(options, whole)
    while len(rows) < options.kills:
        runs += 1
        out = folder / f"run-{runs}"
        new = disturbed(options, out, rng, first, total, options.kills - len(rows))
        survived = all(row["exit"] == 0 for row in new) and same(out, whole)
        for row in new:
            rows.append({"kill": len(rows) + 1, "run": runs, **row, "outcome": "survived" if survived else "lost"})
        if not survived:
            print(out.with_name(f"{out.name}.log").read_text()[-2000:], file=sys.stderr)
    return rows


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    found = []
    machine = hardware()
    gpus = machine["gpus"]
    where = gpus[0] if gpus else f"{machine['cores']} cores of {machine['processor']}, no GPU"
    with workspace() as folder:
        if "kills" in options.trials:
            found = kills(options, folder)
            lost = sum(row["outcome"] == "lost" for row in found)
            print(f"\nsoak: {Path(options.recipe).stem} {options.options}; {where}\n\n{table(found, COLUMNS)}\n")
            runs = max(row["run"] for row in found)
            print(f"{len(found)} kills of {runs} runs: {len(found) - lost} survived, {lost} lost", flush=True)
        chosen = [name for name in TRIALS if name in options.trials]
        if chosen:
            bench = Bench(folder)
            for name in chosen:
                TRIALS[name](bench, options.quick)
            print(f"\nsoak: {where}\n\n{table(bench.rows, CASE_COLUMNS)}\n")
            for name in chosen:
                outcomes = [row["outcome"] for row in bench.rows if row["trial"] == name]
                counts = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in dict.fromkeys(outcomes))
                print(f"{name}: {len(outcomes)} cases: {counts}", flush=True)
            found += bench.rows
    lost = sum(row["outcome"] in LOST for row in found)
    if options.json:
        results = {"benchmark": "soak", "quick": options.quick, "rows": found, "lost": lost}
        results["hardware"] = machine
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
