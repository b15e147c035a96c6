"""Tell local paths from Hub repository ids."""

import os
import re
from pathlib import Path

from hfvit.errors import HFViTError, nearest
from hfvit.utils.files import expand_user


def is_path(name: str | Path) -> bool:
    """Whether `name` can only be a path: no Hub id starts so or has more than one slash."""
    return isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def is_local(name: str | Path) -> bool:
    """Whether `name` is a path of this machine, not the id of a repository: it looks like one, or is there."""
    return is_path(name) or os.path.exists(expand_user(name))  # False for a name that is too long


def is_hub_id(name: str) -> bool:
    """Whether `name` can only be a repository on the Hub: `owner/name`, and no path of this machine."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not is_local(name)


def folder_or_hub_id(name: str | Path, error: type[HFViTError], option: str | None = None) -> str:
    """`name` as libraries take it: an existing folder with `~` expanded, or the Hub id as it stands.

    Args:
        error: raised for a path where there is no folder, for which a library would ask the Hub, and for a name close
            to that of a folder that exists.
        option: the head of its message.
    """
    folder = expand_user(name)
    if os.path.isdir(folder):
        return str(folder)
    head = f"{option}: " if option else ""
    if os.path.isfile(folder):
        raise error(f"{head}{name} is a file, where a folder or a Hub id is expected.")
    there = head + ("there" if head else "There")
    if is_path(name):
        raise error(f"{there} is no folder {name}.")
    parent, _, last = str(name).partition("/")
    if last and os.path.isdir(parent):  # may be a repository, or a folder with a typo
        folders = [f"{parent}/{path.name}" for path in Path(parent).iterdir() if path.is_dir()]
        if close := nearest(str(name), folders):
            raise error(f"{there} is no folder {name}.{close}")
    return str(name)


def dataset_title(name: str) -> str:
    """A data set's public name: a Hub id as it is; of a folder the last part alone, never a path."""
    if name == "digits":
        return "scikit-learn digits"
    return name if is_hub_id(name) else Path(name).name
