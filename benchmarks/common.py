"""What the benchmarks share: options, processes of their own, interleaved rounds, medians, tables, JSON.

A script runs itself once more for every measurement (`--worker`), in a fresh process: one contender's imports, memory
settings and leftover processes cannot touch another's figures. The rounds are interleaved and each begins with another
contender, so that a machine that slows down slows everyone.
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
    """The options that every benchmark takes, and a script's own; the script's docstring is its help."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small data and one round: shows that it works, no more")
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
    """A temporary folder for data and caches; nothing is left behind."""
    with tempfile.TemporaryDirectory(prefix="hfvit_benchmark_", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def in_own_process(script: str, job: dict[str, Any], cache: Path) -> Any:
    """What `script --worker job` answers. `cache` holds everything that HuggingFace libraries keep."""
    environment = {
        **os.environ,
        "HF_HOME": str(cache),
        "HF_DATASETS_CACHE": str(cache / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TMPDIR": str(cache.parent),
    }
    environment.pop("OMP_NUM_THREADS", None)  # everyone gets every core
    job = {**job, "started": time.monotonic()}  # one clock for all processes of a machine
    command = [sys.executable, script, "--worker", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    answers = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if done.returncode or not answers:
        sys.exit(f"{Path(script).name} failed (exit code {done.returncode}) on {job}:\n{done.stderr[-4000:]}")
    return json.loads(answers[-1].removeprefix(ANSWER))


def answer(value: Any) -> None:
    """Hand a worker's result to the process that started it."""
    print(ANSWER + json.dumps(value), flush=True)


def interleaved(jobs: dict[str, dict], rounds: int, run: Callable[[dict], dict]) -> dict[str, list[dict]]:
    """Run every job once a round, beginning each round with another one; a list of results for each."""
    results: dict[str, list[dict]] = {name: [] for name in jobs}
    for number in range(rounds):
        names = list(jobs)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            results[name].append(run(jobs[name]))
    return results


def medians(results: list[dict]) -> dict[str, Any]:
    """The median of each figure; other values are the first round's."""
    summary = {}
    for key, value in results[0].items():
        is_figure = isinstance(value, int | float) and not isinstance(value, bool)
        summary[key] = statistics.median(result[key] for result in results) if is_figure else value
    return summary


def spread(values: list[float]) -> float:
    """How far apart the rounds lie: (largest - smallest) / median."""
    return (max(values) - min(values)) / statistics.median(values)


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """Rows as a Markdown table that is aligned as text, too; `columns` maps a row's key to a format or "" for text."""
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


def report(name: str, options: argparse.Namespace, rows: list[dict], columns: dict[str, str], notes: list[str]):
    """Print the table and its notes; write them, every row in full, to `--json`."""
    from hfvit.utils.environment import hardware, installed_versions

    machine = hardware()
    where = machine["gpus"][0] if machine["gpus"] else f"{machine['cores']} cores of {machine['processor']}, no GPU"
    heading = f"{name}: {where}; medians of {options.rounds} round{'s' * (options.rounds > 1)}"
    print(f"\n{heading}{' (--quick: not for quoting)' * options.quick}\n\n{table(rows, columns)}")
    print("".join(f"\n{note}" for note in notes))
    if options.json:
        facts = {"benchmark": name, "quick": options.quick, "rounds": options.rounds, "rows": rows, "notes": notes}
        facts |= {
            "versions": {"python": platform.python_version(), **installed_versions(PACKAGES)},
            "hardware": machine,
        }
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
