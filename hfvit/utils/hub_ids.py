"""Distinguish local paths from Hub repository ids."""

import os
import re
import shlex
from pathlib import Path

from hfvit.errors import HFViTError, nearest
from hfvit.utils.files import expand_user


def is_path(name: str | Path) -> bool:
    """Return whether `name` can only be a path, by its first character or slashes."""
    return isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def is_local(name: str | Path) -> bool:
    """Return whether `name` is a local path: it looks like one, or exists."""
    return is_path(name) or os.path.exists(expand_user(name))  # `exists` is False for a too long name


def is_hub_id(name: str) -> bool:
    """Return whether `name` is a Hub id `owner/name` and not a local path."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not is_local(name)


def folder_or_hub_id(name: str | Path, error: type[HFViTError], option: str | None = None) -> str:
    """Expand an existing folder, or return a Hub id unchanged.

    Args:
        name: folder or Hub id.
        error: exception type for an empty name, a missing folder, a file, a Hub id with a revision, or a name close to
            that of an existing folder.
        option: beginning of the error message.
    """
    folder = expand_user(name)
    head = f"{option}: " if option else ""
    if not str(name):  # would be the current folder
        raise error(f"{head}must be a folder or Hub id, got ''.")
    if os.path.isdir(folder):
        return str(folder)
    if os.path.isfile(folder):
        raise error(f"{head}{name} is a file, not a folder or Hub id.")
    if is_path(name):
        raise error(f"{head}folder {name} not found.")
    if re.fullmatch(r"[\w.-]+/[\w.-]+@[^@]+", str(name)):
        repository, _, revision = str(name).partition("@")
        raise error(
            f"{head}a Hub id has no revision, got {name}. Pass {repository} and --revision (to a training"
            f" --model_revision), or the folder of `hf download {repository} --revision {shlex.quote(revision)}"
            " --local-dir FOLDER`."
        )
    parent, _, last = str(name).partition("/")
    if last and os.path.isdir(parent):  # a Hub id, or a folder with a typo
        folders = [f"{parent}/{path.name}" for path in Path(parent).iterdir() if path.is_dir()]
        if close := nearest(str(name), folders):
            raise error(f"{head}folder {name} not found.{close}")
    return str(name)


def dataset_title(name: str) -> str:
    """Return the public name of a data set: the Hub id, or the last part of a folder."""
    if name == "digits":
        return "scikit-learn digits"
    return name if is_hub_id(name) else Path(name).name
