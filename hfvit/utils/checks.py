"""Check the arguments of Python functions."""

import math
import os
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from hfvit.errors import ModelError
from hfvit.utils.files import check_writable, expand_user

SAVE_DATASET = "Save a Dataset with save_to_disk, and pass its folder."  # advice of `check_name`
_INTEGERS = {0: "a non-negative integer", 1: "a positive integer"}


def check_integer(option: str, value: Any, low: int = 1, *, optional: bool = True) -> None:
    """Raise `ModelError` unless a value is an integer from `low`.

    Args:
        option: name of the argument.
        value: value of the argument.
        low: smallest value, 0 or 1.
        optional: whether None is a value.
    """
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if (value is None and optional) or (is_integer and value >= low):
        return
    raise ModelError(f"{option}: must be {_INTEGERS[low]}{' or None' if optional else ''}, got {value!r}.")


def check_number(option: str, value: Any, high: float, *, optional: bool = False) -> None:
    """Raise `ModelError` unless a value is a number from 0 to `high`.

    Args:
        option: name of the argument.
        value: value of the argument.
        high: largest value.
        optional: whether None is a value.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if (value is None and optional) or (is_number and 0 <= value <= high):
        return
    raise ModelError(f"{option}: must be a number from 0 to {high:g}{' or None' if optional else ''}, got {value!r}.")


def check_name(option: str, value: Any, advice: str = "") -> None:
    """Raise `TypeError` unless a value is a path or a name.

    Args:
        option: name of the argument.
        value: value of the argument.
        advice: what to do with a value of another type, a sentence.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{option}: must be a path or name, got {type(value).__name__}. {advice}".strip())


def checked_file(option: str, path: Any) -> Path:
    """Return the path of a file that can be written, with `~` expanded.

    Its folder may be missing.

    Args:
        option: name of the argument.
        path: value of the argument.

    Raises:
        ModelError: the path is empty or a folder, or cannot be written.
        TypeError: the value is no path.
    """
    check_name(option, path)
    file = expand_user(path)
    if not str(path) or file.is_dir():
        raise ModelError(f"{option}: must be a file, got {str(path)!r}.")
    check_writable(next(folder for folder in file.absolute().parents if folder.exists()), option, ModelError)
    return file
