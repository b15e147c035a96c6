"""Parts that the export commands of optimum-cli share."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from optimum.commands.base import BaseOptimumCLICommand

from hfvit.cli.options import fraction, non_negative_float, percentage_points, positive_int
from hfvit.errors import ModelError, run
from hfvit.export.options import CALIBRATION_SAMPLES, GATE_SAMPLES, MAX_ACCURACY_DROP, refuse_unused
from hfvit.utils.files import removing_empty_folders
from hfvit.utils.quiet import quiet_libraries
from hfvit.utils.terminal import prepare_streams

if TYPE_CHECKING:
    from hfvit.artifacts.artifact import Artifact


class HFViTExportCommand(BaseOptimumCLICommand):
    """Command `optimum-cli export ...`, also `python -m hfvit.cli.export_...`.

    Attributes:
        add_arguments: adds the command's arguments to a parser.
        export: runs the command with its parsed arguments.
    """

    add_arguments: ClassVar[Callable[[argparse.ArgumentParser], None]]
    export: ClassVar[Callable[[argparse.Namespace], None]]

    @classmethod
    def parse_args(cls, parser: argparse.ArgumentParser) -> None:
        """Add the arguments of the command."""
        cls.add_arguments(parser)

    @classmethod
    def export_to_folder(cls, options: argparse.Namespace) -> None:
        """Run the export; an error leaves no new and empty output folder."""
        with removing_empty_folders(options.output):
            cls.export(options)

    def run(self) -> None:
        """Run the command and exit with its code."""
        prepare_streams()
        sys.exit(run(lambda: self.export_to_folder(self.args)))

    @classmethod
    def main(cls, argv: list[str] | None = None) -> None:
        """Run the command without optimum-cli.

        This serves environments in which another package registers the name of the command.

        Args:
            argv: arguments. Default: those of the process.
        """
        prepare_streams()
        parser = argparse.ArgumentParser(prog=f"python -m hfvit.cli.export_{cls.COMMAND.name}")
        cls.add_arguments(parser)
        options = parser.parse_args(argv)
        sys.exit(run(lambda: cls.export_to_folder(options)))


def add_positional(parser: argparse.ArgumentParser, description: str, epilog: str) -> None:
    """Add OUTPUT, and the texts around the list of options.

    Args:
        parser: parser of the command.
        description: text above the options.
        epilog: text below them.
    """
    parser.description = description
    parser.epilog = epilog
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("output", metavar="OUTPUT", help="folder to write to")


def add_model(parser: argparse.ArgumentParser, model_help: str) -> None:
    """Add --model and the options for loading it.

    Args:
        parser: parser of the command.
        model_help: help text of --model.
    """
    parser.add_argument("-m", "--model", required=True, help=model_help)
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--cache_dir", help="folder for downloads from the Hub")
    parser.add_argument(
        "--task",
        choices=("auto", "image-classification"),
        default="auto",
        help="auto is image-classification",
    )
    parser.add_argument("--device", help="where PyTorch runs the model for the export: cpu, cuda, ... [cpu]")
    parser.add_argument("--verbose", action="store_true", help="show the output and warnings of the exporters")


def add_tolerance(group) -> None:
    """Add --atol."""
    group.add_argument(
        "--atol", type=non_negative_float,
        help="largest absolute difference from PyTorch's logits [0.001 for fp32, 0.02 for fp16, 0.1 for bf16, times"
        " the largest logit if that is above 1]",
    )  # fmt: skip


def add_calibration(group) -> None:
    """Add the options that choose the calibration images."""
    group.add_argument("--calibration_dataset", help="calibration images: Hub id or folder [the recipe's data set]")
    group.add_argument("--calibration_split", help="split to calibrate on [the recipe's training split, else train]")
    group.add_argument(
        "--calibration_samples", type=positive_int, help=f"number of calibration images [{CALIBRATION_SAMPLES}]"
    )


def add_gate(parser: argparse.ArgumentParser) -> None:
    """Add the options of the accuracy gate."""
    gate = parser.add_argument_group("accuracy gate")
    gate.add_argument("--no_gate", action="store_true", default=None, help="skip the accuracy gate")
    gate.add_argument(
        "--max_accuracy_drop",
        type=percentage_points,
        help=f"largest drop in accuracy beyond chance, in percentage points [{MAX_ACCURACY_DROP}]",
    )
    gate.add_argument(
        "--min_agreement",
        type=fraction,
        help="smallest fraction of images, 0 to 1, for which the export predicts the checkpoint's class [none]",
    )
    gate.add_argument("--gate_samples", type=positive_int, help=f"largest number of images compared [{GATE_SAMPLES}]")


def find_model(options: argparse.Namespace) -> "Artifact":
    """Return the artifact of `--model`.

    Raises:
        ModelError: nothing was found, or an option of the Hub is given for a local path.
    """
    from hfvit.artifacts.artifact import find_artifact  # imports NumPy

    artifact = find_artifact(options.model)
    if artifact.folder is not None:
        refuse_unused(options, ["revision", "cache_dir"], f"only used with a Hub id, but {options.model} is local")
    return artifact


def require_checkpoint(options: argparse.Namespace) -> None:
    """Raise `ModelError` if the value of `--model` is an export; see `find_model`."""
    if not find_model(options).is_checkpoint:
        raise ModelError(f"--model: must be a checkpoint, got the export {options.model}. Pass its checkpoint.")


def quiet_export(verbose: bool) -> None:
    """Silence progress bars and warnings of the libraries, unless `verbose`."""
    if verbose:
        return
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    quiet_libraries()
