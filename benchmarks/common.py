"""Shared code of the benchmarks: options, worker processes, interleaved rounds, medians, tables, JSON.

A script starts itself in a new process (`--worker`) for every measurement, so that imports, memory settings and child
processes of one contender do not affect another. Rounds are interleaved and start with different contenders, so that
changes of the machine's load affect all of them.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGES = (
    "hfvit", "torch", "torchvision", "timm", "transformers", "accelerate", "datasets", "numpy", "pillow",
    "onnx", "onnxruntime", "onnxscript",
)  # fmt: skip
ANSWER = "benchmark answer: "


def parse_options(
    description: str, argv: list[str] | None, rounds: int, own_options: dict[str, dict] | None = None
) -> argparse.Namespace:
    """Parse the options of a benchmark.

    Args:
        description: help text, the docstring of the script.
        argv: command line. Default: that of the process.
        rounds: default of --rounds.
        own_options: further options of the script -> arguments of `add_argument`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small data and one round, only to test the script")
    parser.add_argument(
        "--rounds", type=int, help=f"interleaved rounds; figures are their medians [{rounds}, quick 1]"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write rows, versions and hardware to FILE")
    for name, settings in (own_options or {}).items():
        parser.add_argument(name, **settings)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.rounds is None:
        options.rounds = 1 if options.quick else rounds
    if options.rounds < 1:
        parser.error("--rounds takes 1 or more")
    return options


@contextmanager
def workspace() -> Iterator[Path]:
    """Create a temporary folder for data and caches."""
    with tempfile.TemporaryDirectory(prefix="hfvit_benchmark_", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def in_own_process(script: str, job: dict[str, Any], cache: Path) -> Any:
    """Run `script --worker job` in a new process and return its answer.

    Args:
        script: path of the script.
        job: arguments of the worker, as JSON.
        cache: cache folder of the Hugging Face libraries.
    """
    environment = {
        **os.environ,
        "HF_HOME": str(cache),
        "HF_DATASETS_CACHE": str(cache / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TMPDIR": str(cache.parent),
    }
    environment.pop("OMP_NUM_THREADS", None)  # use all cores
    job = {**job, "started": time.monotonic()}  # the clock is shared by all processes of a machine
    command = [sys.executable, script, "--worker", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    answers = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if done.returncode or not answers:
        sys.exit(f"{Path(script).name} failed (exit code {done.returncode}) on {job}:\n{done.stderr[-4000:]}")
    return json.loads(answers[-1].removeprefix(ANSWER))


def answer(value: Any) -> None:
    """Return a worker's result to the process that started it."""
    print(ANSWER + json.dumps(value), flush=True)


def interleaved(jobs: dict[str, dict], rounds: int, run: Callable[[dict], dict]) -> dict[str, list[dict]]:
    """Run every job once per round, starting each round with another one.

    Args:
        jobs: name -> job.
        rounds: number of rounds.
        run: function that runs a job.

    Returns:
        Name -> results of all rounds.
    """
    results: dict[str, list[dict]] = {name: [] for name in jobs}
    for number in range(rounds):
        names = list(jobs)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            results[name].append(run(jobs[name]))
    return results


def medians(results: list[dict]) -> dict[str, Any]:
    """Return the median of each number, and other values of the first round."""
    summary = {}
    for key, value in results[0].items():
        is_figure = isinstance(value, int | float) and not isinstance(value, bool)
        summary[key] = statistics.median(result[key] for result in results) if is_figure else value
    return summary


def spread(values: list[float]) -> float:
    """Return (largest - smallest) / median of the rounds."""
    return (max(values) - min(values)) / statistics.median(values)


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """Format rows as an aligned Markdown table.

    Args:
        rows: values by column.
        columns: column -> format of numbers, empty for text.
    """
    cells = [list(columns)]
    for row in rows:
        values = [(row.get(key), form) for key, form in columns.items()]
        cells.append(["-" if value is None else format(value, form) for value, form in values])
    widths = [max(len(line[column]) for line in cells) for column in range(len(columns))]
    right = [bool(form) for form in columns.values()]

    def line(words: list[str]) -> str:
        padded = (word.rjust(w) if r else word.ljust(w) for word, w, r in zip(words, widths, right, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (w - 1) + ":") if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def report(
    name: str,
    options: argparse.Namespace,
    rows: list[dict],
    columns: dict[str, str],
    notes: list[str],
    details: dict | None = None,
):
    """Print the table and notes, and write all rows to `--json`.

    Args:
        name: name of the benchmark.
        options: parsed options.
        rows: values by column.
        columns: columns of the table -> format.
        notes: lines below the table.
        details: further values for the JSON file.
    """
    from hfvit.utils.environment import hardware, installed_versions

    machine = hardware()
    where = machine["gpus"][0] if machine["gpus"] else f"{machine['cores']} cores of {machine['processor']}, no GPU"
    heading = f"{name}: {where}; medians of {options.rounds} round{'s' * (options.rounds > 1)}"
    print(f"\n{heading}{' (--quick: not for quoting)' * options.quick}\n\n{table(rows, columns)}")
    print("".join(f"\n{note}" for note in notes))
    if options.json:
        result = {"benchmark": name, "quick": options.quick, "rounds": options.rounds, "rows": rows, "notes": notes}
        result |= details or {}
        result |= {
            "versions": {"python": platform.python_version(), **installed_versions(PACKAGES)},
            "hardware": machine,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
