"""What several commands share."""

import argparse

from hfvit.option_types import above_0


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
    from hfvit.execution_providers import parse_provider

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


def quiet_libraries() -> None:
    """Leave standard error to what these commands say; loading a model says nothing that a reader needs."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
