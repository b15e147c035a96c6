"""Text for a terminal: standard streams that take any text, JSON that no character of it acts on."""

import io
import json
import os
import sys
from typing import TextIO

from hfvit.errors import is_unprintable


def prepare_streams() -> None:
    """Let standard output and error take any text, at the start of a command.

    What their encoding lacks is escaped. A stream that the caller has closed (`>&-`) is opened on the null device:
    otherwise `print` has no stream, and the next file that is opened gets its number, and with it the output of
    libraries.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115 (for as long as the process lives)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def encoding_of(stream: TextIO | None) -> str:
    """The encoding of a stream, UTF-8 where it has none."""
    return getattr(stream, "encoding", None) or "utf-8"


def printable_json(text: str, encoding: str = "utf-8") -> str:
    r"""JSON text that stands for the same value, with `\uXXXX` for what would act on a terminal.

    Also for what `encoding` lacks. Line breaks between values are escaped: the text is to be one line.
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
