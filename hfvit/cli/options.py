"""Argument parser, shared options and argument types of the commands."""

import argparse
import math
from difflib import get_close_matches
from typing import NoReturn

from hfvit.errors import EXIT_CODES, nearest, printable


class CommandParser(argparse.ArgumentParser):
    """Parser of `hfvit` and its commands: an error is one line and exits with 2."""

    def __init__(self, *args, **kwargs):
        # An abbreviation would be ambiguous: each option is known with underscores and with dashes.
        kwargs = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **kwargs}
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        text = message.removeprefix("argument ").rstrip(".")
        end = "" if text.endswith("?") else "."
        self.exit(2, f"{self.prog}: error: {printable(text)}{end} See `{self.prog} --help`.\n")

    @property
    def option_names(self) -> list[str]:
        """Options as the help shows them."""
        return [name for action in self._actions for name in action.option_strings]

    def refuse(self, words: list[str]) -> NoReturn:
        """Exit with an error about the first of `words`, which this command does not know."""
        name = words[0].partition("=")[0]
        if not name.startswith("-"):
            self.error(f"{name}: unexpected argument")
        self.error(f"{name}: unknown option.{nearest(with_underscores(name), self.option_names)}")

    def refuse_misspelled(self, words: list[str]) -> None:
        """Exit with an error where one of `words`, options of a recipe, is close to an option of this command."""
        for word in words:
            name = word.partition("=")[0]
            if name.startswith("--") and get_close_matches(with_underscores(name), self.option_names, cutoff=0.8):
                self.refuse([word])


def with_underscores(name: str) -> str:
    """`--save-grid` as `--save_grid`."""
    return f"--{name[2:].replace('-', '_')}" if name.startswith("--") else name


def accept_dashes(parser: argparse.ArgumentParser) -> None:
    """Accept each option with dashes, too; the help shows it with underscores, as that of transformers does."""
    parser.allow_abbrev = False
    for name, action in list(parser._option_string_actions.items()):
        parser._option_string_actions.setdefault(name.replace("_", "-"), action)


def exit_codes(*codes: int) -> str:
    """The part of a command's help about its exit codes."""
    return "\n".join(["exit codes:", *(f"  {code:<3} {EXIT_CODES[code]}" for code in codes)]) + "\n"


def above_0(text: str) -> int:
    """Parse an integer, at least 1."""
    if not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"must be a positive integer, got '{text}'")
    return int(text)


def from_0(text: str) -> int:
    """Parse an integer, at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer, at least 0, got '{text}'")
    return int(text)


def share(text: str) -> float:
    """Parse a fraction from 0 to 1."""
    value = _number(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be a fraction from 0 to 1 (99 % is 0.99), got '{text}'")
    return value


def points(text: str) -> float:
    """Parse percentage points of accuracy, 0 to 100."""
    value = _number(text)
    if not 0.0 <= value <= 100.0:
        raise argparse.ArgumentTypeError(f"must be percentage points from 0 to 100, got '{text}'")
    return value


def not_negative(text: str) -> float:
    """Parse a finite number, at least 0."""
    value = _number(text)
    if not (math.isfinite(value) and value >= 0.0):
        raise argparse.ArgumentTypeError(f"must be a finite number, at least 0, got '{text}'")
    return value


def _number(text: str) -> float:
    """Parse a number; NaN, which every comparison refuses, for anything else."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def add_running(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """Add the options that say how a model is run."""
    parser.add_argument("--batch_size", type=above_0, default=batch_size, help="images per batch [%(default)s]")
    parser.add_argument("--device", help="where to run: cpu, cuda, cuda:1, ... [cuda if available, else cpu]")
    parser.add_argument(
        "--providers", nargs="+", metavar="NAME[:KEY=VALUE,...]",
        help="ONNX Runtime execution providers for .onnx files, instead of --device, such as TensorrtExecutionProvider"
        " CUDAExecutionProvider",
    )  # fmt: skip
    parser.add_argument("--threads", type=above_0, help="CPU threads [PyTorch's default]")


def given_providers(options: argparse.Namespace) -> list[tuple[str, dict[str, str]]] | None:
    """Parse --providers; None if it was not given."""
    from hfvit.inference.execution_providers import parse_provider

    return [parse_provider(text) for text in options.providers] if options.providers else None


def add_changes(parser, several: bool = False) -> None:
    """Add the options that change a checkpoint's cost without training."""
    many = {"nargs": "+"} if several else {}
    also = "; one row each" if several else ""
    parser.add_argument(
        "--patch_size", type=above_0, metavar="PIXELS", **many,
        help=f"resample a ViT checkpoint to this patch size, in pixels{also} [its own]",
    )  # fmt: skip
    parser.add_argument(
        "--merge_tokens", type=above_0, metavar="R", **many,
        help=f"merge R tokens in each block of a ViT checkpoint (ToMe){also} [none]",
    )  # fmt: skip
