"""Exceptions for user errors and their exit codes."""

import errno
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pickle import UnpicklingError

# Exit code of a command -> its meaning.
EXIT_CODES = {
    0: "done",
    1: "`hfvit predict`, `hfvit embed`, `hfvit inspect`: some images could not be read",
    2: "error in the command line, recipe, data or model, found before long work",
    3: "NaN or infinite loss, gradient or logits",
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
    """Error that a command-line user can fix.

    Messages: `<option>: <what is wrong>, got <value>. <what to do>.`
    """

    exit_code = 2
    kind = "error"


class RecipeError(HFViTError):
    """Invalid recipe or command line."""


class DataError(HFViTError):
    """Unusable data set, split, column, label or image."""


class ModelError(HFViTError):
    """Unusable model or checkpoint, or one that does not support an option."""


class NonFiniteLossError(HFViTError):
    """NaN or infinite loss or logits."""

    exit_code = 3


class GateError(HFViTError):
    """Artifact whose accuracy is below the limit."""

    exit_code = 4


class HubError(HFViTError):
    """Unreachable Hub or rejected request; nothing local was changed."""

    exit_code = 5


class PushArgumentError(HubError):
    """Unusable folder, repository name or option of a push."""

    exit_code = 2


class OutOfMemoryError(HFViTError):
    """Out of memory with one image, or with several processes after the first step."""

    exit_code = 6


class UnfinishedError(HFViTError):
    """Interrupted run that can be resumed.

    Args:
        cause: what interrupted the run.
        resume_hint: how to resume it; callers of the training may replace it.
    """

    def __init__(self, cause: str, resume_hint: str = "Resume with --resume_from_checkpoint auto."):
        super().__init__(f"{cause} {resume_hint}".strip())
        self.cause = cause
        self.resume_hint = resume_hint

    def __reduce__(self):
        return type(self), (self.cause, self.resume_hint)  # of `args`, the message would have the hint twice


class StorageError(UnfinishedError):
    """Full or unwritable disk; earlier files are not affected."""

    exit_code = 7


class InterruptedRunError(UnfinishedError):
    """Run that was stopped by a signal and saved (EX_TEMPFAIL of sysexits.h)."""

    exit_code = 75
    kind = "stopped"


# Disk full, quota or file size exceeded, mounted read-only.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# Invalid file name, or one that this user may not read or write.
FILE_ERRORS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM)
# Categories of control and format characters, lone surrogates, line and paragraph separators.
UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
MASK = "***"
MIN_SECRET_LENGTH = 8  # shorter values of variables occur in ordinary words
SECRET_VARIABLE = re.compile(
    r"(TOKEN|(API|ACCESS|SECRET|STORAGE|ACCOUNT|PRIVATE)_KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE)$"
)
HUB_TOKEN = re.compile(r"\bhf_(?:[A-Za-z0-9]{20,}\b|(?:oauth|jwt)_eyJ[\w.-]+)")
URL_CREDENTIALS = re.compile(r"(?<=://)[^/?#\s\"<>]+(?=@)")
# Values of a query that give access, such as those of presigned URLs of S3, Google and Azure.
URL_SECRETS = re.compile(
    r"(?i)(?<=[?&])((?:x-(?:amz|goog)-(?:signature|credential|security-token)|sig|signature|(?:access_|auth_)?token"
    r"|api_?key|password|secret)=)[^&#\s\"'<>]*[^&#\s\"'<>.,:;)]"
)
MIN_SIMILARITY = 0.7  # of names of options; below, the closest one is rarely the one that was meant
JOINERS = "\u200c\u200d"  # format characters in Persian words and emoji


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6, shown: Mapping[str, str] | None = None) -> str:
    """Return " Did you mean 'x'?" for the closest known name, or an empty string.

    Args:
        name: unknown name.
        known: known names.
        cutoff: least similarity, from 0 to 1, see `difflib.get_close_matches`.
        shown: what to show for a known name. Default: the name.
    """
    matches = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean '{shown[matches[0]] if shown else matches[0]}'?" if matches else ""


def one_line(error: Exception) -> str:
    """Return the message of an error without line breaks and indentation."""
    return " ".join(str(error).split())


def is_unprintable(character: str) -> bool:
    """Return whether a character could control a terminal, or is a lone surrogate."""
    return unicodedata.category(character) in UNPRINTABLE and character not in JOINERS


def printable(text: str) -> str:
    r"""Escape control characters of untrusted names for a terminal.

    A line break becomes `\n`, an escape code `\x1b`, and a byte of a file name that is not UTF-8 (a lone surrogate
    in Python) `\xff`.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(character) if is_unprintable(character) else character for character in text)


def mask_credentials(text: str) -> str:
    """Mask Hub tokens, credentials in URLs, and secrets of environment variables."""
    for name, value in os.environ.items():
        if len(value) >= MIN_SECRET_LENGTH and SECRET_VARIABLE.search(name):
            text = text.replace(value, MASK)
    text = URL_SECRETS.sub(rf"\1{MASK}", text)
    return URL_CREDENTIALS.sub(MASK, HUB_TOKEN.sub(MASK, text))


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # PEP 383
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def printable_lines(text: str) -> str:
    """Escape each line of a message with `printable`."""
    return "\n".join(map(printable, text.split("\n")))


@contextmanager
def wrap_library_errors(error: type[HFViTError], what: str, limit: int | None = None) -> Iterator[None]:
    """Convert exceptions of libraries to `error`.

    `HFViTError` and `MemoryError` pass unchanged.

    For calls that may raise unrelated types, such as those of safetensors, torch, timm or protobuf for a damaged file.

    Args:
        error: exception type to raise.
        what: message before the colon; the library's message follows.
        limit: maximum length of the library's message.
    """
    try:
        yield
    except (HFViTError, MemoryError):
        raise
    except UnpicklingError as cause:  # torch.load(weights_only=True)
        raise error(
            f"{what}: the weights are a pickle with other objects than tensors, which could run code. Use a checkpoint"
            " in safetensors format."
        ) from cause
    except Exception as cause:
        raise error(f"{what}: {one_line(cause)[:limit] or type(cause).__name__}") from cause


def _without_worker_traceback(error: HFViTError) -> str:
    """Return the message of `error` without the traceback of a DataLoader worker.

    torch re-raises an exception of a worker as "Caught DataError in DataLoader worker process 0.\\nOriginal Traceback
    (most recent call last): [...]\\nhfvit.errors.DataError: <message>" (torch._utils.ExceptionWrapper, torch 2.14).
    """
    kind = type(error)
    message = str(error)
    if re.match(rf"Caught {kind.__name__} in DataLoader worker process \d+\.\nOriginal ", message):
        message = message.rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")[2]
    return message.strip()


def run(command: Callable[[], int | None]) -> int:
    """Call `command` and return its exit code, printing `HFViTError`s to stderr."""
    try:
        return command() or 0
    except HFViTError as error:
        message = _without_worker_traceback(error)
        if message:  # empty on all processes but the main one
            print(f"hfvit: {error.kind}: {printable_lines(mask_credentials(message))}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # closed pipe (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit succeeds
        return 141
    except OSError as error:
        where = f" ({printable(str(error.filename))})" if error.filename else ""
        if error.errno in FILE_ERRORS:
            print(f"hfvit: error: {error.strerror}{where}.", file=sys.stderr)
            return HFViTError.exit_code
        if error.errno not in DISK_ERRORS:
            raise
        print(f"hfvit: error: {error.strerror}{where}. Earlier files are not affected.", file=sys.stderr)
        return StorageError.exit_code
    except KeyboardInterrupt:
        print("hfvit: interrupted", file=sys.stderr)
        return 130
