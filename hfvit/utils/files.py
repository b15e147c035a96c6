"""Atomic file writes, digests, JSON files, writability checks and packaged resources."""

import hashlib
import json
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hfvit.errors import HFViTError, ModelError, RecipeError, one_line

ABANDONED_SECONDS = 24 * 3600


def expand_user(path: str | Path) -> Path:
    """`path` with `~` expanded, or as it is where there is no such home folder, as a shell does."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user, or no HOME and no entry in the password database
        return Path(path)


def output_file(path: str | Path | None, option: str) -> Path | None:
    """Check that the file `path` can be written at the end of a command; `~` is expanded.

    Raises:
        HFViTError: it is a folder, or files cannot be written in its folder.
    """
    if path is None:
        return None
    file = expand_user(path)
    if file.is_dir():
        raise HFViTError(f"{option}: {path} is a folder; name a file in it.")
    if not file.parent.is_dir():
        raise HFViTError(f"{option}: {path} cannot be written: there is no folder {file.parent}.")
    check_writable(file.parent, option, HFViTError)
    return file


def check_writable(folder: Path, option: str, error: type[HFViTError] = RecipeError) -> None:
    """Make `folder` and its parents, and check that files can be written in it.

    Args:
        option: the head of the message.
        error: the exception to raise when it cannot be made or written.
    """
    if folder.is_file():
        raise error(f"{option}: {folder} is a file; name a folder.")
    with wrap_write_errors(f"{option}: {folder}", error):
        folder.mkdir(parents=True, exist_ok=True)
        _write_nothing(folder)


def _write_nothing(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder):
        pass


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Write a file or a folder through to the disk (fsync)."""
    if os.name != "posix":  # Windows syncs neither folders nor files that are open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """`sync` the files right in `folder`, then the folder."""
    for path in filter(Path.is_file, folder.iterdir()):
        sync(path)
    sync(folder)


def sync_tree(folder: Path) -> None:
    """`sync` all files in `folder` and below, then the folders."""
    paths = sorted(folder.rglob("*"))
    for path in [*filter(Path.is_file, paths), *filter(Path.is_dir, paths), folder]:
        sync(path)


def file_mode() -> int:
    """The permissions that the umask leaves a new file."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def commit_file(finished: Path, path: Path) -> None:
    """Give the file `finished` the name `path`, on the same file system: sync, rename, sync the folder.

    Its permissions follow the umask; some libraries write with 0600 (safetensors 0.8).
    """
    finished.chmod(file_mode())
    sync(finished)
    finished.replace(path)
    sync(path.parent)


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """A name beside `path` for a file that gets the name `path` only if the block ends without an error.

    The name is no other writer's, on whatever machine shares the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        commit_file(temporary, path)
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
    if path.exists() and not path.is_file():  # a pipe that nobody writes to has no end
        raise ModelError(f"{path} is not a regular file; delete it.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {one_line(error)}; mend it or delete it.") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object; mend it or delete it.")
    return content


def write_object(path: Path, content: dict) -> None:
    """Write a JSON object under a temporary name, then rename; `ModelError` when that cannot be done."""
    with wrap_write_errors(path):
        write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def check_replaceable(path: Path) -> None:
    """Raise `ModelError` unless the file holds a JSON object and its folder takes another file."""
    read_object(path)
    with wrap_write_errors(path):
        _write_nothing(path.parent)


@contextmanager
def wrap_write_errors(subject: str | Path, error: type[HFViTError] = ModelError) -> Iterator[None]:
    """Raise `error`, with `subject` as the head of its message, for an `OSError` or `ValueError` of the block."""
    try:
        yield
    except (OSError, ValueError) as cause:
        reason = getattr(cause, "strerror", None) or one_line(cause)
        raise error(f"{subject} cannot be written: {reason}.") from None


def _refuse(constant: str):
    raise ValueError(f"{constant} is no JSON value")
