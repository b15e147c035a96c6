"""Print the results of all steps as tables.

python table.py RESULTS_FILE
"""

import json
import sys
from pathlib import Path
from typing import Any

from common import table

# Columns of each step, with their formats; "" for text.
COLUMNS = {
    "amp": {
        "name": "", "who": "", "ips": ",.0f", "step_ms": ".1f", "waiting": ".1%", "workers": ".0f",
        "peak_mib": ",.0f", "tflops": ".0f", "mfu_measured": ".1%", "mfu_datasheet": ".1%",
    },
    "latency": {"name": "", "batch": "d", "p50_ms": ".3f", "p95_ms": ".3f", "ips": ",.0f", "difference": ".1e"},
    "real": {
        "name": "", "code": "", "seconds": ".0f", "test": ".4f", "validation": ".4f", "ips_median": ",.0f",
        "data_wait": ".1%", "mfu": ".1%",
    },
    "records": {
        "name": "", "code": "", "steps": ",d", "images": ",d", "seconds": ",.0f", "ips_median": ",.0f",
        "peak_gib": ".1f", "mfu": ".1%", "validation": ".4f", "test": ".4f", "aim": ".3f",
    },
    "pixels": {
        "name": "", "ms": ".2f", "host_ms": ".2f", "max difference ieee": ".1e", "max difference tf32": ".1e",
        "equal": "", "difference": ".1e",
    },
    "loader": {"name": "", "workers": "d", "ips": ",.0f"},
    "profile": {"name": "", "step_ms": ".1f", "device_ms": ".1f", "busy": ".0%", "kernels_a_step": ".0f"},
    "syncs": {"name": "", "steps": "d", "waits": "d"},
    "tests": {"tests": "d", "failures": "d", "errors": "d", "skipped": "d", "seconds": ".0f"},
    "day": {"name": "", "code": "d", "seconds": "d"},
}  # fmt: skip
# Steps whose results have no columns, with keys that are too long to print.
TEXTS = {"facts": ("doctor", "versions"), "survive": ("losses",)}
TEXT_WIDTH = 330


def print_table(step: str, rows: list[dict[str, Any]]) -> None:
    """Print the results of a step, with errors and skipped measurements.

    Args:
        step: a key of `COLUMNS`.
        rows: results of that step.
    """
    numbers = [key for key, form in COLUMNS[step].items() if form]
    figures = [row for row in rows if any(row.get(key) is not None for key in numbers)]
    print(f"\n{step}\n")
    if figures:
        print(table(figures, COLUMNS[step]))
    for row in rows:
        problem = row.get("error") or row.get("skipped")
        if isinstance(problem, str):
            print(f"{row.get('name')} {row.get('who', '')}: {problem[:170]}")
        if step == "syncs" and isinstance(row.get("where"), dict):
            for where, count in row["where"].items():
                print(f"   {count:4d}  {where[:170]}")


def main(file: Path) -> None:
    results = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for step, omitted in TEXTS.items():
        for row in results:
            values = {key: value for key, value in row.items() if key not in ("step", "t", *omitted)}
            if row["step"] == step and values:
                print(f"{step}: {json.dumps(values)[:TEXT_WIDTH]}")
    for step in COLUMNS:
        rows = [row for row in results if row["step"] == step]
        if rows:
            print_table(step, rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
