"""Write predictions as CSV, Parquet or JSON Lines, one batch at a time."""

import csv
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hfvit.errors import HFViTError, one_line, printable
from hfvit.utils.csv_files import cell
from hfvit.utils.files import temporary_file
from hfvit.utils.terminal import printable_json

COLUMNS = ("image", "rank", "label", "probability", "error")
ROWS_PER_GROUP = 10_000


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` if there is no error.

    SIGTERM raises `SystemExit`, so that the temporary file is deleted.

    Raises:
        HFViTError: the disk is full or not writable.
    """
    try:
        with _exiting_on_sigterm(), temporary_file(path) as temporary:
            yield temporary
    except OSError as error:
        raise HFViTError(f"--output: {path} cannot be written: {error.strerror or one_line(error)}.") from None


@contextmanager
def _exiting_on_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone can set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def prediction_file(path: Path) -> Iterator["CsvFile | ParquetFile | JsonLinesFile"]:
    """Open a file of predictions by its ending.

    It is renamed to `path` if there is no error.
    """
    with complete_file(path) as temporary:
        writer = WRITERS[path.suffix.lower()](temporary)
        try:
            yield writer
        finally:
            writer.close()


def rows_of(prediction) -> list[dict[str, Any]]:
    """Return a row per class of a prediction, or one with its error.

    A prediction without classes has one row, too.
    """
    name = printable(prediction.name)
    empty = dict.fromkeys(COLUMNS) | {"image": name}
    if prediction.error:
        return [empty | {"error": printable(prediction.error)}]
    best = enumerate(prediction.probabilities.items(), 1)
    rows = [empty | {"rank": rank, "label": label, "probability": value} for rank, (label, value) in best]
    return rows or [empty]


class CsvFile:
    """CSV file with `COLUMNS`, in UTF-8; see `csv_files.cell`."""

    def __init__(self, path: Path):
        self.file = path.open("w", encoding="utf-8", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS, lineterminator="\n")
        self.writer.writeheader()

    def add(self, prediction) -> None:
        """Write a prediction."""
        for row in rows_of(prediction):
            self.writer.writerow({key: cell(value) for key, value in row.items()})

    def close(self) -> None:
        self.file.close()


class ParquetFile:
    """Parquet file with `COLUMNS`."""

    def __init__(self, path: Path):
        import pyarrow as pa
        from pyarrow import parquet

        text = pa.string()
        types = {"image": text, "rank": pa.int32(), "label": text, "probability": pa.float32(), "error": text}
        self.schema = pa.schema([(name, types[name]) for name in COLUMNS])
        self.writer = parquet.ParquetWriter(path, self.schema)
        self.rows: list[dict[str, Any]] = []

    def add(self, prediction) -> None:
        """Add a prediction, which is written with the next group of rows."""
        self.rows += [row | {"label": row["label"] and printable(row["label"])} for row in rows_of(prediction)]
        if len(self.rows) >= ROWS_PER_GROUP:
            self._write()

    def _write(self) -> None:
        import pyarrow as pa

        if self.rows:
            self.writer.write_table(pa.Table.from_pylist(self.rows, self.schema))
        self.rows = []

    def close(self) -> None:
        self._write()
        self.writer.close()


class JsonLinesFile:
    """File with a line of JSON for each image, as `hfvit predict --json` prints."""

    def __init__(self, path: Path):
        self.file = path.open("w", encoding="utf-8", newline="\n")

    def add(self, prediction) -> None:
        """Write a prediction."""
        self.file.write(printable_json(prediction.to_json()) + "\n")

    def close(self) -> None:
        self.file.close()


WRITERS = {".csv": CsvFile, ".parquet": ParquetFile, ".jsonl": JsonLinesFile}
