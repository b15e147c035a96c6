"""Arguments of `optimum-cli export openvino`."""

import argparse

from optimum.commands.base import CommandInfo

from hfvit.cli.export_command import (
    HFViTExportCommand,
    add_calibration,
    add_gate,
    add_model,
    add_positional,
    add_tolerance,
    quiet_export,
    require_checkpoint,
)
from hfvit.cli.options import accept_dashes, add_token_options, exit_codes

DESCRIPTION = """\
Export an image classifier to OpenVINO, and check the files before they are written to OUTPUT.

OUTPUT has the layout that OVModelForImageClassification of optimum-intel expects:
  openvino_model.xml, .bin            --dtype fp32 (also openvino_model_fp16, openvino_model_bf16)
  openvino_model_int8.xml, .bin       --quantize int8
  config.json, preprocessor_config.json, export.json
One call can write two files, and further calls add files to the folder.
"""

EPILOG = f"""\
Install OpenVINO and NNCF with: pip install "hfvit[openvino]"

Checks before a file is written: the logits of OpenVINO against PyTorch (--atol); and, if the checkpoint has a
recipe.yaml, the accuracy on its validation images (accuracy gate).

examples:
  optimum-cli export openvino --model outputs/quickstart outputs/quickstart/openvino
  optimum-cli export openvino --model outputs/quickstart --dtype bf16 --quantize int8 outputs/quickstart/openvino
  optimum-cli export openvino --model user/my-vit --quantize int8 --calibration_dataset path/to/folder my_vit_openvino

{exit_codes(0, 2, 4)}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `optimum-cli export openvino`."""
    add_positional(parser, DESCRIPTION, EPILOG)
    add_model(parser, "checkpoint folder or Hub id of an image classifier")
    graph = parser.add_argument_group("graph")
    graph.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), default="fp32",
        help="fp32; fp16: weights stored in fp16; bf16: the same, and computation in bf16 on CPUs that support it;"
        " with --quantize, of the operators that stay in floating point [%(default)s]",
    )  # fmt: skip
    add_tolerance(graph)
    add_token_options(graph)
    int8 = parser.add_argument_group("INT8")
    int8.add_argument(
        "--quantize", choices=("int8",),
        help="also write openvino_model_int8.xml: static quantization with NNCF's preset for transformers and"
        " SmoothQuant, activation ranges from calibration images",
    )  # fmt: skip
    add_calibration(int8)
    add_gate(parser)
    accept_dashes(parser)


def export_openvino_command(options: argparse.Namespace) -> None:
    """Check the options, import torch, and export."""
    from hfvit.artifacts.export_folder import claim_folder
    from hfvit.export.options import CALIBRATED, CALIBRATION, as_onnx_options, check_gate, refuse_unused

    require_checkpoint(options)
    if options.quantize not in CALIBRATED:
        refuse_unused(options, CALIBRATION, "only used with --quantize int8")
    check_gate(options)
    folder = claim_folder(options.output)
    quiet_export(options.verbose)
    from hfvit.inference.openvino_backend import load_openvino

    load_openvino()
    from hfvit.export.openvino import OpenVINOExport

    OpenVINOExport(as_onnx_options(options, "openvino"), folder).run()


class OpenVINOExportCommand(HFViTExportCommand):
    """Run `optimum-cli export openvino --model MODEL OUTPUT`."""

    COMMAND = CommandInfo(name="openvino", help="Export an image classifier to checked OpenVINO files (hfvit).")
    add_arguments = staticmethod(add_arguments)
    export = staticmethod(export_openvino_command)


main = OpenVINOExportCommand.main

if __name__ == "__main__":
    main()
