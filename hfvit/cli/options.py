"""Argument parser, shared options and argument types of the commands."""

import argparse
import math
from difflib import get_close_matches
from typing import NoReturn

from hfvit.errors import EXIT_CODES, MIN_SIMILARITY, nearest, printable
from hfvit.recipe.arguments import TTA

ARTIFACT_KINDS = "checkpoint folder, Hub id, .onnx file, TensorRT engine or export folder"


class CommandParser(argparse.ArgumentParser):
    """Argument parser that reports an error in one line and exits with code 2."""

    def __init__(self, *args, **kwargs):
        # Abbreviations would be ambiguous, since each option exists with underscores and with dashes.
        kwargs = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **kwargs}
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Print `message` in one line and exit with code 2."""
        text = message.removeprefix("argument ").rstrip(".")
        end = "" if text.endswith("?") else "."
        self.exit(2, f"{self.prog}: error: {printable(text)}{end} See `{self.prog} --help`.\n")

    @property
    def option_names(self) -> list[str]:
        """Return the options as spelled in the help."""
        return [name for action in self._actions for name in action.option_strings]

    def refuse(self, words: list[str]) -> NoReturn:
        """Exit with an error about the first of `words`, an unknown argument."""
        name = words[0].partition("=")[0]
        if not name.startswith("-"):
            self.error(f"{name}: unexpected argument")
        options = {option.lstrip("-"): option for option in self.option_names}  # equal dashes are no similarity
        hint = nearest(with_underscores(name).lstrip("-"), options, MIN_SIMILARITY, options)
        self.error(f"{name}: unknown option.{hint}")

    def check_misspelled(self, words: list[str]) -> None:
        """Exit with an error if one of `words` looks like a misspelled option.

        Args:
            words: arguments that the recipe will parse, such as `--learning_rate 1e-3`.
        """
        for word in words:
            name = word.partition("=")[0]
            if name.startswith("--") and get_close_matches(with_underscores(name), self.option_names, cutoff=0.8):
                self.refuse([word])


def with_underscores(name: str) -> str:
    """Return the option with underscores: `--save_grid` for `--save-grid`."""
    return f"--{name[2:].replace('-', '_')}" if name.startswith("--") else name


def accept_dashes(parser: argparse.ArgumentParser) -> None:
    """Accept each option with dashes, too.

    The help shows underscores only, as transformers' does.
    """
    parser.allow_abbrev = False
    for name, action in list(parser._option_string_actions.items()):
        parser._option_string_actions.setdefault(name.replace("_", "-"), action)


def exit_codes(*codes: int) -> str:
    """Return the section of a command's help about its exit codes."""
    return "\n".join(["exit codes:", *(f"  {code:<3} {EXIT_CODES[code]}" for code in codes)]) + "\n"


def positive_int(text: str) -> int:
    """Parse a positive integer."""
    if not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"must be a positive integer, got '{text}'")
    return int(text)


def non_negative_int(text: str) -> int:
    """Parse a non-negative integer."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a non-negative integer, got '{text}'")
    return int(text)


def fraction(text: str) -> float:
    """Parse a fraction, 0 to 1."""
    value = _number(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be a fraction from 0 to 1 (99 % is 0.99), got '{text}'")
    return value


def percentage_points(text: str) -> float:
    """Parse percentage points, 0 to 100."""
    value = _number(text)
    if not 0.0 <= value <= 100.0:
        raise argparse.ArgumentTypeError(f"must be percentage points from 0 to 100, got '{text}'")
    return value


def non_negative_float(text: str) -> float:
    """Parse a finite non-negative number."""
    value = _number(text)
    if not (math.isfinite(value) and value >= 0.0):
        raise argparse.ArgumentTypeError(f"must be a finite non-negative number, got '{text}'")
    return value


def _number(text: str) -> float:
    """Parse a number, NaN for other text, which then fails every range check."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def add_revision(parser: argparse.ArgumentParser) -> None:
    """Add --revision of the command's artifact."""
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id [main]")


def hub_options(options: argparse.Namespace) -> dict[str, str]:
    """Find ARTIFACT, and return the arguments of `load_classifier` for --revision.

    Raises:
        ModelError: there is no artifact, or --revision is given for a local one.
    """
    from hfvit.artifacts.artifact import revision_arguments  # imports NumPy

    return revision_arguments(options.artifact, options.revision)


def add_batch_and_device(parser: argparse.ArgumentParser) -> None:
    """Add --batch_size and --device."""
    parser.add_argument("--batch_size", type=positive_int, help="images per batch [16 on a CPU, 128 on a GPU]")
    parser.add_argument("--device", help="where to run: cpu, cuda, cuda:1, ... [cuda if available, else cpu]")


def add_runtime_options(parser: argparse.ArgumentParser, has_providers: bool = True) -> None:
    """Add batch size, device, threads and, for ONNX files, execution providers."""
    add_batch_and_device(parser)
    if has_providers:
        parser.add_argument(
            "--providers", nargs="+", metavar="NAME[:KEY=VALUE,...]",
            help="ONNX Runtime execution providers for .onnx files, instead of --device, such as"
            " TensorrtExecutionProvider CUDAExecutionProvider",
        )  # fmt: skip
    parser.add_argument("--threads", type=positive_int, help="CPU threads [PyTorch's default]")


def add_classifier_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose how a classifier runs."""
    add_runtime_options(parser)
    parser.add_argument(
        "--objective", choices=("latency", "throughput"), default="latency",
        help="of ONNX and OpenVINO files on a CPU: latency gives all threads to one batch after the other; throughput"
        " divides batches between the threads, for ONNX where a measurement at the start finds that faster"
        " [%(default)s]",
    )  # fmt: skip
    parser.add_argument("--bf16", action="store_true", help="use the weights of a checkpoint as bfloat16")
    add_tta(parser, "flip averages the logits of each image and its mirror image")


def add_score_options(parser: argparse.ArgumentParser) -> None:
    """Add --top_k and --calibrated."""
    parser.add_argument(
        "--top_k",
        type=positive_int,
        help="classes per image [5; with several labels per image those that reach their thresholds]",
    )
    parser.add_argument(
        "--calibrated",
        action="store_true",
        help="apply the temperature scaling of the run (run.json) to the probabilities",
    )


def add_tta(parser, help: str) -> None:
    """Add --tta, described by `help`."""
    parser.add_argument("--tta", choices=TTA, help=f"test-time augmentation: {help} [none]")


def parse_providers(options: argparse.Namespace) -> list[tuple[str, dict[str, str]]] | None:
    """Parse --providers, None without it."""
    from hfvit.inference.execution_providers import parse_provider

    return [parse_provider(text) for text in options.providers] if options.providers else None


def add_token_options(parser, several: bool = False) -> None:
    """Add --patch_size and --merge_tokens, which change the number of tokens.

    Args:
        several: accept several values, each of which is compared with the reference.
    """
    many = {"nargs": "+"} if several else {}
    also = "; one row each" if several else ""
    parser.add_argument(
        "--patch_size", type=positive_int, metavar="PIXELS", **many,
        help=f"resample the patch embedding of a ViT to this patch size, in pixels (FlexiViT){also} [unchanged]",
    )  # fmt: skip
    parser.add_argument(
        "--merge_tokens", type=positive_int, metavar="R", **many,
        help=f"merge R tokens in each block of a ViT (ToMe){also} [none]",
    )  # fmt: skip
