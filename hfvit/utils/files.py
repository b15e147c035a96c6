"""Atomic file writes, digests, JSON files, writability checks, shipped files."""

import hashlib
import json
import math
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hfvit.errors import HFViTError, ModelError, RecipeError, one_line

ABANDONED_SECONDS = 24 * 3600


def expand_user(path: str | Path) -> Path:
    """Expand `~`; like a shell, keep the path if there is no such home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # unknown user or home folder
        return Path(path)


def output_file(path: str | Path | None, option: str) -> Path | None:
    """Expand `~` and check that a file can be written at the end of a command.

    Raises:
        HFViTError: `path` is a folder, or its folder is missing or not writable.
    """
    if path is None:
        return None
    file = expand_user(path)
    if file.is_dir():
        raise HFViTError(f"{option}: must be a file, but {path} is a folder.")
    if not file.parent.is_dir():
        raise HFViTError(f"{option}: {path} cannot be written: folder {file.parent} not found.")
    check_writable(file.parent, option, HFViTError)
    return file


def check_writable(folder: Path, option: str, error: type[HFViTError] = RecipeError) -> None:
    """Create a folder with its parents, and check that it is writable.

    Args:
        folder: folder to create.
        option: beginning of the error message.
        error: exception type to raise.
    """
    if folder.is_file():
        raise error(f"{option}: must be a folder, but {folder} is a file.")
    with wrap_write_errors(f"{option}: {folder}", error):
        folder.mkdir(parents=True, exist_ok=True)
        _try_write(folder)


@contextmanager
def removing_empty_folders(folder: str | Path) -> Iterator[None]:
    """Remove a folder and its parents after an error if they are new and empty."""
    path = expand_user(folder)
    missing = [each for each in (path, *path.parents) if not os.path.lexists(each)]
    try:
        yield
    except BaseException:
        with suppress(OSError):  # never created, or not empty
            for each in missing:
                each.rmdir()
        raise


def _try_write(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder):
        pass


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Write a file or folder through to the disk (fsync)."""
    if os.name != "posix":  # Windows syncs neither folders nor files that are open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Sync the files directly in `folder`, then the folder."""
    for path in filter(Path.is_file, folder.iterdir()):
        sync(path)
    sync(folder)


def sync_tree(folder: Path) -> None:
    """Sync all files below `folder`, then the folders."""
    paths = sorted(folder.rglob("*"))
    for path in [*filter(Path.is_file, paths), *filter(Path.is_dir, paths), folder]:
        sync(path)


def file_mode() -> int:
    """Return the permissions of a new file by the umask."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def commit_file(finished: Path, path: Path) -> None:
    """Rename a finished file to `path`: sync the file, rename, sync the folder.

    Its permissions are set by the umask, as some libraries write with 0600 (safetensors 0.8).
    """
    finished.chmod(file_mode())
    sync(finished)
    finished.replace(path)
    sync(path.parent)


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """Yield a unique temporary path, and rename it to `path` if there is no error.

    The name is unique among all writers, also on other machines that share the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        commit_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_abandoned(folder: Path, pattern: str, seconds: float = ABANDONED_SECONDS) -> None:
    """Delete old temporary files of killed writers.

    Args:
        folder: folder to clean.
        pattern: glob pattern of the temporary files.
        seconds: minimum age.
    """
    for file in folder.glob(pattern):
        with suppress(FileNotFoundError):  # renamed or deleted meanwhile
            if time.time() - file.stat().st_mtime >= seconds:
                file.unlink()


def sweep_temporary(path: Path) -> None:
    """Delete remains of `temporary_file(path)`, in a folder without other writers.

    The name in `path` may be a pattern, such as `*.png`.
    """
    remove_abandoned(path.parent, f".{path.stem}.[0-9]*{path.suffix}", seconds=0)


def cache_folder(kind: str) -> Path:
    """Return hfvit's cache folder for a kind of files, below HF_HOME."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hfvit" / kind


_PACKAGE = Path(__file__).resolve().parents[1]


def shipped(name: str) -> Path:
    """Return the path of a shipped file or folder, in a wheel or in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.exists() else _PACKAGE.parent / name


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with temporary_file(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(content: Any, allow_nan: bool = False) -> str:
    """Format JSON with one line per list item, and per list of numbers and strings.

    Raises:
        ValueError: a number is NaN or infinite, unless `allow_nan`.
    """
    return "".join(_json_parts(content, "\n", allow_nan)) + "\n"


def _json_parts(value: Any, line: str, allow_nan: bool) -> Iterator[str]:
    inner = line + "  "
    if isinstance(value, dict) and value:
        for index, (key, item) in enumerate(value.items()):
            yield f"{',' if index else '{'}{inner}{json.dumps(key)}: "
            yield from _json_parts(item, inner, allow_nan)
        yield f"{line}}}"
    elif isinstance(value, list) and not all(map(_is_plain, value)):
        for index, item in enumerate(value):
            yield f"{',' if index else '['}{inner}"
            is_row = isinstance(item, dict) and all(map(_is_plain, item.values()))
            yield from [json.dumps(item, allow_nan=allow_nan)] if is_row else _json_parts(item, inner, allow_nan)
        yield f"{line}]"
    else:  # compact, as there may be a million numbers
        yield json.dumps(value, allow_nan=allow_nan, separators=(",", ": "))


def finite(value: Any) -> Any:
    """Replace NaN and infinity in a JSON value, since JSON has neither, by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_plain(value: Any) -> bool:
    return not isinstance(value, dict | list)


def read_object(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        ModelError: the file cannot be read, or is not a JSON object with finite numbers.
    """
    if path.exists() and not path.is_file():  # reading a pipe may never end
        raise ModelError(f"{path} is not a regular file. Delete it.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_reject_constant)
    except RecursionError:
        raise ModelError(f"{path} cannot be read as JSON: nested too deeply. Repair or delete it.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {one_line(error)}. Repair or delete it.") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} must have a JSON object. Repair or delete it.")
    return content


def write_object(path: Path, content: dict) -> None:
    """Write a JSON object atomically; raises `ModelError` on failure."""
    with wrap_write_errors(path):
        write_text(path, json_text(content))


def check_replaceable(path: Path) -> None:
    """Raise `ModelError` unless the file has a JSON object and its folder is writable."""
    read_object(path)
    with wrap_write_errors(path):
        _try_write(path.parent)


@contextmanager
def wrap_write_errors(subject: str | Path, error: type[HFViTError] = ModelError) -> Iterator[None]:
    """Convert `OSError` and `ValueError` to `error`, with `subject` in the message."""
    try:
        yield
    except (OSError, ValueError) as cause:
        reason = getattr(cause, "strerror", None) or one_line(cause)
        raise error(f"{subject} cannot be written: {reason}.") from None


def _reject_constant(constant: str):
    raise ValueError(f"{constant} is not a JSON value")
