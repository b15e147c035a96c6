"""Atomic file writes, JSON files, writability checks and packaged resources."""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hfvit.errors import HFViTError, ModelError, RecipeError, one_line

ABANDONED_SECONDS = 24 * 3600


def writable(path: str | Path | None, option: str) -> Path | None:
    """`path` as a file that can be written at the end; raises `HFViTError` at the start when it cannot."""
    if path is None:
        return None
    file = Path(path).expanduser()
    if file.is_dir():
        raise HFViTError(f"{option}: {path} is a folder; name a file in it.")
    if not os.access(file.parent, os.W_OK):
        raise HFViTError(f"{option}: {path} cannot be written: there is no folder {file.parent} to write to.")
    return file


def check_writable(folder: Path, option: str) -> None:
    """Make the folder; raises `RecipeError` where that, or writing in it, is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RecipeError(f"{option}: {folder} cannot be written: {error.strerror or error}.") from None


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """A name beside `path` for a file that gets the name `path` only if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_abandoned(folder: Path, pattern: str, seconds: float = ABANDONED_SECONDS) -> None:
    """Delete what killed writers left under temporary names of this `pattern`, once it is so old: a day."""
    for file in folder.glob(pattern):
        with suppress(FileNotFoundError):  # its writer, or another reader of the folder, was quicker
            if time.time() - file.stat().st_mtime >= seconds:
                file.unlink()


def sweep_temporary(path: Path) -> None:
    """Delete what a kill has left of `temporary_file(path)`; the name in `path` may be a pattern, such as `*.png`.

    At once, so only for a folder that nobody else writes to.
    """
    remove_abandoned(path.parent, f".{path.stem}.[0-9]*{path.suffix}", seconds=0)


def cache_folder(kind: str) -> Path:
    """Where hfvit keeps what can be made again: below the cache of HuggingFace's libraries (HF_HOME)."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hfvit" / kind


_PACKAGE = Path(__file__).resolve().parents[1]


def shipped(name: str) -> Path:
    """Path of a shipped file or folder: inside the package in a wheel, beside it in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.exists() else _PACKAGE.parent / name


def write_text(path: str | Path, text: str) -> None:
    """Write under a temporary name, then rename: a reader never sees half a file."""
    with temporary_file(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
