"""Atomic file writes, JSON files, writability checks and packaged resources."""

import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hfvit.errors import HFViTError, RecipeError, nearest

ABANDONED_SECONDS = 24 * 3600


def is_path(name: str | Path) -> bool:
    """Whether `name` can only be a path: no Hub id starts so or has more than one slash."""
    return isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def is_local(name: str | Path) -> bool:
    """Whether `name` is a path of this machine, not the id of a repository: it looks like one, or is there."""
    return is_path(name) or Path(name).expanduser().exists()


def is_hub_id(name: str) -> bool:
    """Whether `name` can only be a repository on the Hub: `owner/name`, and no path of this machine."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not is_local(name)


def folder_or_hub_id(name: str | Path, error: type[HFViTError], option: str | None = None) -> str:
    """`name` as libraries take it: an existing folder with `~` expanded, or the Hub id as it stands.

    Raises `error`, with `option` as the head of its message, for a path where there is no folder: a library would ask
    the Hub for it, and tell of that.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    head = f"{option}: " if option else ""
    if folder.is_file():
        raise error(f"{head}{name} is a file, where a folder or a Hub id is expected.")
    there = head + ("there" if head else "There")
    if is_path(name):
        raise error(f"{there} is no folder {name}.")
    parent, _, last = str(name).partition("/")
    if last and Path(parent).is_dir():  # a repository's name as well as a folder's with a slip of the finger
        if close := nearest(str(name), [f"{parent}/{path.name}" for path in Path(parent).iterdir() if path.is_dir()]):
            raise error(f"{there} is no folder {name}.{close}")
        if _is_out_of_reach(str(name), "dataset" if option == "dataset_name" else "model"):
            raise error(f"{there} is no folder {name}, and the Hub cannot be asked for a repository of that name.")
    return str(name)


def _is_out_of_reach(repo_id: str, kind: str) -> bool:
    """Whether neither the cache has the repository nor the Hub answers: a library would try for half a minute."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if constants.HF_HUB_OFFLINE or (Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo_id.replace('/', '--')}").is_dir():
        return False
    try:
        HfApi().repo_info(repo_id, repo_type=kind, timeout=5.0)
    except (HfHubHTTPError, HFValidationError):  # an answer, of which the library tells more
        return False
    except Exception:
        return True
    return False


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
