"""Arguments of `optimum-cli export executorch`."""

import argparse

from optimum.commands.base import CommandInfo

from hfvit.cli.export_command import (
    HFViTExportCommand,
    add_gate,
    add_model,
    add_positional,
    add_tolerance,
    quiet_export,
    require_checkpoint,
)
from hfvit.cli.options import accept_dashes, add_token_options, exit_codes, positive_int

DESCRIPTION = """\
Export an image classifier to ExecuTorch (XNNPACK, fp32) for phones and other devices, and check the file before it is
written to OUTPUT: model.pte, config.json, preprocessor_config.json, export.json.
"""

EPILOG = f"""\
Install ExecuTorch with: pip install "hfvit[executorch]"

Checks before the file is written: the logits of ExecuTorch's runtime against PyTorch (--atol), also on photographs;
and, if the checkpoint has a recipe.yaml, the accuracy on its validation images (accuracy gate).

example:
  optimum-cli export executorch --model outputs/quickstart outputs/quickstart/executorch

{exit_codes(0, 2, 4)}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `optimum-cli export executorch`."""
    add_positional(parser, DESCRIPTION, EPILOG)
    add_model(parser, "checkpoint folder or Hub id of an image classifier")
    graph = parser.add_argument_group("program")
    graph.add_argument("--dtype", choices=("fp32",), default="fp32", help="precision [%(default)s]")
    graph.add_argument(
        "--max_batch_size",
        type=positive_int,
        default=16,
        help="largest batch size, for which the program reserves memory [%(default)s]",
    )
    add_tolerance(graph)
    add_token_options(graph)
    add_gate(parser)
    accept_dashes(parser)


def export_executorch_command(options: argparse.Namespace) -> None:
    """Check the options, import torch, and export."""
    from hfvit.artifacts.export_folder import claim_folder
    from hfvit.export.options import as_onnx_options, check_gate

    require_checkpoint(options)
    check_gate(options)
    folder = claim_folder(options.output)
    quiet_export(options.verbose)
    from hfvit.inference.executorch_backend import load_executorch

    load_executorch()
    from hfvit.export.executorch import ExecuTorchExport

    ExecuTorchExport(as_onnx_options(options, "executorch"), folder).run()


class ExecuTorchExportCommand(HFViTExportCommand):
    """Run `optimum-cli export executorch --model MODEL OUTPUT`."""

    COMMAND = CommandInfo(name="executorch", help="Export an image classifier to a checked ExecuTorch file (hfvit).")
    add_arguments = staticmethod(add_arguments)
    export = staticmethod(export_executorch_command)


main = ExecuTorchExportCommand.main

if __name__ == "__main__":
    main()
