"""JSON files that a command enters something in at its end: looked at before its work, then replaced as a whole."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hfvit.artifacts.output_dir import write_text
from hfvit.errors import ModelError, one_line


def read_object(path: Path) -> dict:
    """The JSON object in a file; `ModelError` when there is none that could be written again as it is."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {one_line(error)}; mend it or delete it.") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object; mend it or delete it.")
    return content


def write_object(path: Path, content: dict) -> None:
    """Write a JSON object under a temporary name, then rename; `ModelError` when that cannot be done."""
    with told_of(path):
        write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def check_replaceable(path: Path) -> None:
    """Raise `ModelError` unless the file holds a JSON object and its folder takes another file."""
    read_object(path)
    with told_of(path), tempfile.TemporaryFile(dir=path.parent):
        pass


@contextmanager
def told_of(path: Path) -> Iterator[None]:
    """What keeps the file from being written is told with its name."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be written: {getattr(error, 'strerror', None) or one_line(error)}.") from None


def _refuse(constant: str):
    raise ValueError(f"{constant} is no JSON value")
