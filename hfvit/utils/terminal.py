"""Safe output on terminals: standard streams for any text, escaped JSON."""

import io
import json
import logging
import os
import shutil
import sys
import traceback
from types import TracebackType
from typing import TextIO

from hfvit.errors import is_unprintable, mask_credentials, printable_lines


def prepare_streams() -> None:
    """Prepare the standard streams for any text, at the start of a command.

    Characters that the encoding lacks are escaped. Closed streams (`>&-`) are opened on the null device: otherwise
    `print` fails, and the next opened file gets the descriptor, and with it the output of libraries.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115 (open until the process ends)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class PrintableFormatter(logging.Formatter):
    """Format log records with escaped control characters and masked credentials."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(mask_credentials(super().format(record)))


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback with masked credentials, as `sys.excepthook`.

    Args:
        kind: type of the exception.
        error: the exception.
        trace: its traceback.
    """
    lines = "".join(traceback.format_exception(kind, error, trace))
    print(mask_credentials(lines), end="", file=sys.stderr)


def terminal_width() -> int | None:
    """Return the columns of standard output's terminal, None for a file or pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def encoding_of(stream: TextIO | None) -> str:
    """Return the encoding of a stream, UTF-8 by default."""
    return getattr(stream, "encoding", None) or "utf-8"


def printable_json(text: str, encoding: str = "utf-8") -> str:
    r"""Escape control characters, and those that `encoding` lacks, in one line of JSON.

    The text has the same value with `\uXXXX` escapes.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(character if _fits(character, encoding) else json.dumps(character)[1:-1] for character in text)


def _fits(character: str, encoding: str) -> bool:
    if is_unprintable(character):
        return False
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
