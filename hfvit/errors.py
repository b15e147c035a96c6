"""Exceptions for user errors and their exit codes."""

import errno
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pickle import UnpicklingError

# Exit code of a command -> its meaning.
EXIT_CODES = {
    0: "done",
    1: "`hfvit predict`, `hfvit inspect`: some images could not be read",
    2: "error in the command line, recipe, data or model, found before long work",
    3: "NaN or infinite loss or gradient",
    4: "`hfvit validate`, `hfvit verify` or an export: accuracy below the limit",
    5: "the Hub could not be reached, or refused",
    6: "out of memory with one image, or with several processes after the first step",
    7: "disk full or not writable; the last checkpoint is complete",
    8: "another process of the run died or cannot be reached; the last checkpoint is complete",
    75: "stopped by a signal after saving; resume with `--resume_from_checkpoint auto`",
    130: "stopped by Ctrl-C without saving",
    141: "the reader of the output closed the pipe",
}


class HFViTError(Exception):
    """An error that a command-line user can fix.

    Messages: `<option>: <what is wrong>, got <value>. <what to do>.`
    """

    exit_code = 2
    kind = "error"


class RecipeError(HFViTError):
    """A recipe or a command line that cannot be run as it stands."""


class DataError(HFViTError):
    """A data set, split, column, label or image that cannot be used."""


class ModelError(HFViTError):
    """A model, checkpoint or option that does not fit the others."""


class NonFiniteLossError(HFViTError):
    """Training met a NaN or infinite loss."""

    exit_code = 3


class GateError(HFViTError):
    """An artifact is worse than its reference by more than was allowed."""

    exit_code = 4


class HubError(HFViTError):
    """The Hub could not be reached or refused; nothing local was changed."""

    exit_code = 5


class PushArgumentError(HubError):
    """A folder, repository name or option of a push that cannot be used."""

    exit_code = 2


class OutOfMemoryError(HFViTError):
    """A single image does not fit, or not every process can be told of fewer."""

    exit_code = 6


class UnfinishedError(HFViTError):
    """A run that ended before its end and can go on.

    `happened` says what ended it, and `way_on` what to type, which whoever called the training may know better.
    """

    def __init__(self, happened: str, way_on: str = "Go on with --resume_from_checkpoint auto."):
        super().__init__(f"{happened} {way_on}".strip())
        self.happened = happened


class StorageError(UnfinishedError):
    """A disk that is full or cannot be written; what stood before still stands."""

    exit_code = 7


class InterruptedRunError(UnfinishedError):
    """A signal came and the run is saved: EX_TEMPFAIL of sysexits.h."""

    exit_code = 75
    kind = "stopped"


# Of a disk that takes no more: full, over its quota, over the largest file allowed, mounted read-only.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# Of a name that no file can have.
NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP)
# Control and format characters (escape codes, directions of writing), lone surrogates, line and paragraph separators.
UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
JOINERS = "\u200c\u200d"  # format characters of Persian words and of emoji


def nearest(name: str, known) -> str:
    """`" Did you mean 'x'?"` for the known name closest to `name`, or nothing when none is close."""
    matches = get_close_matches(name, list(known), n=1)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def one_line(error: Exception) -> str:
    """A library's message as part of one of ours: without its line breaks and indentation."""
    return " ".join(str(error).split())


def is_unprintable(character: str) -> bool:
    """Whether a character acts on a terminal instead of being shown, or is half of one."""
    return unicodedata.category(character) in UNPRINTABLE and character not in JOINERS


def printable(text: str) -> str:
    r"""`text` as one line for a terminal: `\n`, `\x1b`, `\u202e` in place of what would act on it.

    For names that others chose, of files and of classes. Bytes of a file name that is not UTF-8, which Python keeps as
    lone surrogates, are shown as `\xff`.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(character) if is_unprintable(character) else character for character in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # PEP 383
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def _printable_lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


@contextmanager
def wrap_library_errors(error: type[HFViTError], what: str, limit: int | None = None) -> Iterator[None]:
    """Raise `error` for whatever a library raises in the block; `HFViTError` and `MemoryError` pass.

    For calls that end in exceptions of several libraries: transformers, safetensors, torch and timm for a damaged
    file, protobuf's, which share no class, or those of a class of configuration.

    Args:
        what: the message up to its colon; the library's own follows.
        limit: how many characters of that are shown.
    """
    try:
        yield
    except (HFViTError, MemoryError):
        raise
    except UnpicklingError as cause:  # torch.load(weights_only=True)
        raise error(
            f"{what}: its weights are a pickle of more than tensors, which could run code; take a checkpoint in"
            " safetensors."
        ) from cause
    except Exception as cause:
        raise error(f"{what}: {one_line(cause)[:limit] or type(cause).__name__}") from cause


def _without_worker_traceback(error: HFViTError) -> str:
    """The message of `error`, without the traceback that a DataLoader worker puts before it.

    torch re-raises an exception of a worker as "Caught DataError in DataLoader worker process 0.\\nOriginal Traceback
    (most recent call last): [...]\\nhfvit.errors.DataError: <message>" (torch._utils.ExceptionWrapper, torch 2.14).
    """
    kind, message = type(error), str(error)
    if re.match(rf"Caught {kind.__name__} in DataLoader worker process \d+\.\nOriginal ", message):
        message = message.rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")[2]
    return message.strip()


def run(command: Callable[[], int | None]) -> int:
    """Call `command` and return its exit code; an `HFViTError` becomes its message on standard error."""
    try:
        return command() or 0
    except HFViTError as error:
        message = _without_worker_traceback(error)
        if message:  # only the main process tells what all of them end with
            print(f"hfvit: {error.kind}: {_printable_lines(message)}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of a pipe has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor may the flush at exit complain
        return 141
    except OSError as error:
        where = f" ({printable(str(error.filename))})" if error.filename else ""
        if error.errno in NO_NAME:
            print(f"hfvit: error: {error.strerror}{where}.", file=sys.stderr)
            return HFViTError.exit_code
        if error.errno not in NO_ROOM:
            raise
        print(f"hfvit: error: {error.strerror}{where}; what was whole before is so still.", file=sys.stderr)
        return StorageError.exit_code
    except KeyboardInterrupt:
        print("hfvit: interrupted", file=sys.stderr)
        return 130
