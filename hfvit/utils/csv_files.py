"""CSV files that spreadsheets open without running formulas."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hfvit.errors import printable
from hfvit.utils.files import temporary_file

# A cell that begins with one of these is a formula in Excel, LibreOffice and Google Sheets (OWASP, CSV injection).
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file atomically, in UTF-8.

    Args:
        path: file to write.
        header: names of the columns.
        rows: cells; text that a spreadsheet would take for a formula gets a leading apostrophe.
    """
    with temporary_file(Path(path)) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([cell(value) for value in row] for row in rows)


def cell(value: Any) -> Any:
    """Return a cell that spreadsheets show as text, without control characters."""
    if not isinstance(value, str):
        return value
    return printable(f"'{value}" if value.lstrip(" ").startswith(FORMULA_STARTS) else value)
