"""Time to the first optimizer step, and time of imports.

  python benchmarks/startup.py                     # about ten minutes
  python benchmarks/startup.py --quick             # a minute, only to test the script
  python benchmarks/startup.py --json rows.json

First step: a small ViT on generated 32x32 images, from the start of the Python process to the end of the first
optimizer step, without data loader workers. hfvit runs `hfvit/train.py` with a recipe; the timm loop and the Trainer
are those of train_step.py. A `first run` has an empty cache: all contenders convert the parquet files to Arrow, and
hfvit decodes the images into its array. A `later run` uses the cache of the first one.

hfvit does more in that time than its peers: it loads and checks the evaluation data, augments the images of the first
training batch, and measures the FLOP/s of a matrix product and the FLOPs of the model for `mfu`.

Imports: a process that does only this, including the start of Python (`python -c pass` is a row). The JSON file also
has `import_milliseconds`: the time of each top-level package in `python -X importtime -c "import hfvit.pipeline"`,
without the packages that it imports.
"""

import importlib.util
import runpy
import shutil
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

from common import answer, in_own_process, interleaved, medians, parse_options, report, spread, workspace
from contenders import CONTENDERS, Case, recipe_values
from images import SMALL, generate
from step_clock import StepClock

CASE = {
    "name": "first step",
    "images": SMALL.name,
    "model_args": {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4},
    "image_size": 32,
    "batch_size": 64,
    "precision": "fp32",
    "warm_up": 0,
    "steps": 1,
    "peer_workers": 0,
}
IMPORTS = {
    "python -c pass": "pass",
    "import hfvit": "import hfvit",
    "hfvit --help": "from hfvit.cli import main; main(['--help'])",
    "import torch": "import torch",
    "import timm": "import timm",
    "from transformers import Trainer": "from transformers import Trainer",
    "import hfvit.pipeline": "import hfvit.pipeline",
}
QUICK_IMPORTS = ("python -c pass", "import hfvit", "hfvit --help", "import torch")
COLUMNS = {"what": "", "seconds": ".2f", "spread": ".0%"}


def train_with_recipe(case: Case, folder: str, output_dir: str) -> None:
    """Run `python hfvit/train.py RECIPE` in this process."""
    import yaml

    recipe = Path(output_dir) / "recipe.yaml"
    values = recipe_values(case, folder, str(Path(output_dir) / "run"))
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    script = importlib.util.find_spec("hfvit.train").origin
    sys.argv = [script, str(recipe)]
    runpy.run_path(script, run_name="__main__")


def first_step(contender: str, folder: str, output_dir: str, started: float, **_) -> None:
    """Train to the end of the first optimizer step and answer with the seconds since `started`.

    Args:
        contender: name of the contender.
        folder: data set.
        output_dir: output folder of hfvit.
        started: start of the process.
    """
    from torch.optim.optimizer import register_optimizer_step_post_hook

    class FirstStep(BaseException):
        """Not an Exception, so that no `except Exception` catches it."""

    def stop(*_) -> None:
        answer({"seconds": time.monotonic() - started})
        raise FirstStep

    register_optimizer_step_post_hook(stop)
    case = Case(**CASE)
    try:
        if contender == "hfvit":
            train_with_recipe(case, folder, output_dir)
        else:
            clock = StepClock(case.warm_up, case.steps, case.batch_size)
            CONTENDERS[contender](case, folder, clock)
    except FirstStep:
        return
    sys.exit(f"{contender} made no optimizer step")


def first_steps(job: dict, work: Path) -> dict:
    """Measure the seconds of a first run with an empty cache and of a later run."""
    cache, output_dir = work / "cache", work / "output"
    shutil.rmtree(cache, ignore_errors=True)
    figures = {}
    for name in job["runs"]:
        shutil.rmtree(output_dir, ignore_errors=True)
        output_dir.mkdir()
        figures[name] = in_own_process(__file__, {**job, "output_dir": str(output_dir)}, cache)["seconds"]
    return figures


def seconds_to_run(job: dict) -> dict:
    """Measure the seconds of a new interpreter that runs one line."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", job["code"]], check=True, stdout=subprocess.DEVNULL)
    return {"seconds": time.perf_counter() - start}


def import_milliseconds(code: str) -> dict[str, float]:
    """Measure the import time of each top-level package by `-X importtime`, largest first."""
    command = [sys.executable, "-X", "importtime", "-c", code]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stderr.splitlines()
    microseconds: Counter[str] = Counter()
    for line in lines:
        if line.startswith("import time:") and line.count("|") == 2:
            own, _, name = line.removeprefix("import time:").split("|")
            if own.strip().isdecimal():
                microseconds[name.strip().partition(".")[0]] += int(own)
    return {name: total / 1000 for name, total in microseconds.most_common() if total >= 1000}


def rows_of(results: dict[str, list[dict]]) -> list[dict]:
    """Return one row for each measurement of each job."""
    rows = []
    for name, rounds in results.items():
        for figure, seconds in medians(rounds).items():
            what = name if figure == "seconds" else f"{name}, first step of a {figure}"
            rows.append({"what": what, "seconds": seconds, "spread": spread([values[figure] for values in rounds])})
    return rows


def main(argv: list[str] | None = None) -> None:
    options = parse_options(__doc__, argv, rounds=5)
    if options.worker:
        return first_step(**options.worker)
    count, runs, codes = 10_000, ("first run", "later run"), IMPORTS
    if options.quick:
        count, runs = 500, runs[:1]
        codes = {name: IMPORTS[name] for name in QUICK_IMPORTS}
    with workspace() as work:
        folder = work / "images"
        generate(SMALL, count, folder)
        jobs = {name: {"contender": name, "folder": str(folder), "runs": runs} for name in CONTENDERS}
        results = interleaved(jobs, options.rounds, partial(first_steps, work=work))
    imports = interleaved({name: {"code": code} for name, code in codes.items()}, options.rounds, seconds_to_run)
    notes = [f"{count:,} generated {SMALL.name} images; ViT of 4 blocks at 32 px, batch {CASE['batch_size']}"]
    details = {
        "import_milliseconds": import_milliseconds("import torch" if options.quick else "import hfvit.pipeline")
    }
    largest = ", ".join(f"{name} {value:.0f} ms" for name, value in list(details["import_milliseconds"].items())[:5])
    notes.append(f"import time by package: {largest}")
    report("Startup", options, rows_of(results) + rows_of(imports), COLUMNS, notes, details)


if __name__ == "__main__":
    main()
