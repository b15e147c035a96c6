"""Summary of a run in a terminal."""

import shlex
from pathlib import Path

from hfvit.artifacts.run_record import RunRecord
from hfvit.artifacts.run_summary import score_rows, shown_path, summary_facts
from hfvit.errors import printable
from hfvit.utils.formatting import aligned

NAME_WIDTH = 10


def summary_table(record: RunRecord, output_dir: str | Path) -> str:
    """Format the scores of each split, and model, time and speed of the training."""
    facts = summary_facts(record, output_dir)
    lines = [*aligned(score_rows(record.metrics)), "", *_entries(facts)]
    return "\n".join(map(printable, lines))


def run_summary(record: RunRecord, output_dir: str | Path) -> str:
    """Format the summary of a run that has just ended, with the commands to type next."""
    folder = shlex.quote(shown_path(output_dir))
    commands = (
        f"hfvit report {folder} --open",
        f"hfvit predict {folder} IMAGE",
        f"optimum-cli export onnx --model {folder} {shlex.quote(shown_path(Path(output_dir) / 'onnx'))}",
        f"hfvit push {folder} USER/NAME",
    )
    return "\n".join([summary_table(record, output_dir), *map(printable, _list("next", commands))])


def _entries(facts: dict[str, str]) -> list[str]:
    return [f"{name.ljust(NAME_WIDTH)} {text}" for name, text in facts.items()]


def _list(name: str, lines: tuple[str, ...]) -> list[str]:
    return [f"{(name if index == 0 else '').ljust(NAME_WIDTH)} {line}" for index, line in enumerate(lines)]
