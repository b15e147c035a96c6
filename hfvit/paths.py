"""Names that may be a folder here or a repository on the Hub, and files that are written whole or not at all."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hfvit.errors import HFViTError


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
    if is_path(name):
        raise error(f"{head}there is no folder {name}." if head else f"There is no folder {name}.")
    return str(name)


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


def cache_folder(kind: str) -> Path:
    """Where hfvit keeps what can be made again: below the cache of HuggingFace's libraries (HF_HOME)."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hfvit" / kind
