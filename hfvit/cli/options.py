"""Shared command-line options and argument types."""

import argparse
import math


def above_0(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def from_0(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 0 on")
    return int(text)


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = _number(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is no share from 0 to 1; 99 % is 0.99")
    return value


def points(text: str) -> float:
    """Points of accuracy, 0 to 100."""
    value = _number(text)
    if not 0.0 <= value <= 100.0:
        raise argparse.ArgumentTypeError(f"{text} is no number of points from 0 to 100; half a percent is 0.5")
    return value


def not_negative(text: str) -> float:
    """A finite number, 0 or more."""
    value = _number(text)
    if not (math.isfinite(value) and value >= 0.0):
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 on")
    return value


def _number(text: str) -> float:
    """NaN, which every comparison refuses, for what is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def add_running(parser: argparse.ArgumentParser, batch_size: int) -> None:
    parser.add_argument("--batch_size", type=above_0, default=batch_size, help="images at a time [%(default)s]")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... [cuda where there is one]")
    parser.add_argument(
        "--providers", nargs="+", metavar="NAME[:KEY=VALUE,...]",
        help="ONNX Runtime's execution providers for .onnx files, such as TensorrtExecutionProvider"
        " CUDAExecutionProvider, in the place of --device",
    )  # fmt: skip
    parser.add_argument("--threads", type=above_0, help="threads of the processor [PyTorch's own number]")


def given_providers(options: argparse.Namespace) -> list[tuple[str, dict[str, str]]] | None:
    """What --providers names."""
    from hfvit.inference.execution_providers import parse_provider

    return [parse_provider(text) for text in options.providers] if options.providers else None


def add_changes(parser, several: bool = False) -> None:
    """What makes a checkpoint cheaper or dearer without training."""
    many = {"nargs": "+"} if several else {}
    also = "; each adds a row" if several else ""
    parser.add_argument(
        "--patch_size", type=above_0, metavar="PIXELS", **many,
        help=f"resample a ViT checkpoint to patches of this size{also} [its own]",
    )  # fmt: skip
    parser.add_argument(
        "--merge_tokens", type=above_0, metavar="R", **many,
        help=f"merge R patches in each block of a ViT checkpoint{also} [none]",
    )  # fmt: skip
