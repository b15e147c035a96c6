"""Summary of a run in a terminal."""

import shlex
import textwrap
from pathlib import Path

from hfvit.artifacts.run_record import RunRecord
from hfvit.artifacts.run_summary import score_rows, shown_path, summary_facts
from hfvit.errors import printable
from hfvit.utils.formatting import aligned

INDENT = 11  # of the facts, after their names
NEXT = "next"


def summary_table(record: RunRecord, output_dir: str | Path, width: int | None = None) -> str:
    """Format the scores of each split, and model, time and speed of the training.

    Args:
        record: record of the run.
        output_dir: output folder of the run.
        width: columns of the terminal. With few, splits are columns instead of rows. Default: no limit.
    """
    rows = score_rows(record.metrics)
    table = aligned(rows)
    if width and max(map(len, table)) > width:
        table = aligned([*zip(*rows, strict=True)])
    facts = {name: printable(text) for name, text in summary_facts(record, output_dir).items()}
    return "\n".join([*table, "", *(line for entry in facts.items() for line in _entry(*entry, width))])


def run_summary(record: RunRecord, output_dir: str | Path, width: int | None = None) -> str:
    """Format the summary of a run that has just ended, with the commands to type next.

    Args:
        record: record of the run.
        output_dir: output folder of the run.
        width: as in `summary_table`.
    """
    folder = shlex.quote(shown_path(output_dir))
    commands = (
        f"hfvit report {folder} --open",
        f"hfvit predict {folder} IMAGE",
        f"optimum-cli export onnx --model {folder} {shlex.quote(shown_path(Path(output_dir) / 'onnx'))}",
        f"hfvit push {folder} USER/NAME",
    )
    lines = [f"{(NEXT if index == 0 else '').ljust(INDENT)}{line}" for index, line in enumerate(commands)]
    return "\n".join([summary_table(record, output_dir, width), *map(printable, lines)])


def _entry(name: str, text: str, width: int | None) -> list[str]:
    lines = [text] if width is None else textwrap.wrap(text, max(width - INDENT, 20)) or [""]
    return [f"{(name if index == 0 else '').ljust(INDENT)}{line}" for index, line in enumerate(lines)]
