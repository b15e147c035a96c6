"""Summary of a run in a terminal."""

import shlex
from pathlib import Path

from hfvit.artifacts.run_record import RunRecord
from hfvit.artifacts.run_summary import INDENT, shown_path, summary_table
from hfvit.errors import printable

NEXT = "next"


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
