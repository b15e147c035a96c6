"""Arguments of `optimum-cli export onnx`."""

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
from hfvit.cli.options import accept_dashes, add_token_options, exit_codes, positive_int

DESCRIPTION = """\
Export an image classifier to ONNX, and check the files before they are written to OUTPUT.

OUTPUT has the layout that transformers.js and ORTModelForImageClassification expect:
  model.onnx                    --dtype fp32 (also model_fp16.onnx, model_bf16.onnx)
  model_optimized.onnx          --optimize, for ONNX Runtime only
  model_quantized.onnx          --quantize int8 or int8-dynamic; the later export replaces the earlier one
  model_int8_tensorrt.onnx      --quantize int8 --target tensorrt (also model_fp8_tensorrt.onnx)
  ..._with_preprocessing.onnx   --with_preprocessing
  config.json, preprocessor_config.json, export.json
One call can write several files, and further calls add files to the folder.
"""

EPILOG = f"""\
Checks before a file is written: ONNX's checker; the logits of ONNX Runtime against PyTorch at several batch sizes
(--atol); and, if the checkpoint has a recipe.yaml, the accuracy on its validation images (accuracy gate).

examples:
  optimum-cli export onnx --model outputs/quickstart outputs/quickstart/onnx
  optimum-cli export onnx --model outputs/quickstart --dtype fp16 outputs/quickstart/onnx
  optimum-cli export onnx --model outputs/quickstart --optimize --quantize int8 outputs/quickstart/onnx
  optimum-cli export onnx --model google/vit-base-patch16-224 --quantize int8-dynamic vit_onnx
  optimum-cli export onnx --model user/my-vit --quantize int8 --calibration_dataset path/to/folder my_vit_onnx
  optimum-cli export onnx --model outputs/quickstart --with_preprocessing server_onnx

{exit_codes(0, 2, 4)}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `optimum-cli export onnx`."""
    add_positional(parser, DESCRIPTION, EPILOG)
    add_model(parser, "checkpoint folder or Hub id of an image classifier")

    graph = parser.add_argument_group("graph")
    graph.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), default="fp32",
        help="precision of matrix products; inputs, outputs, LayerNorm and Softmax stay in fp32 [%(default)s]",
    )  # fmt: skip
    graph.add_argument("--opset", type=int, help="ONNX opset, 18 to 23 [the exporter's default]")
    graph.add_argument(
        "--optimize",
        action="store_true",
        help="also write model_optimized.onnx: operators fused for ONNX Runtime on CPUs, always in fp32",
    )
    graph.add_argument(
        "--with_preprocessing", action="store_true",
        help="include resize, center crop and normalization in the graph, whose input is then uint8 (batch, height,"
        " width, 3) of any height and width",
    )  # fmt: skip
    graph.add_argument(
        "--batch_size",
        type=positive_int,
        help="batch size with --no_dynamic_axes, in images [1]",
    )
    graph.add_argument(
        "--no_dynamic_axes",
        action="store_true",
        help="fix the batch size to --batch_size",
    )
    add_tolerance(graph)
    add_token_options(graph)

    quantization = parser.add_argument_group("quantization")
    quantization.add_argument(
        "--quantize", choices=("int8", "int8-dynamic", "fp8"),
        help="also write model_quantized.onnx: int8 (static quantization: activation ranges from calibration images)"
        " or int8-dynamic (dynamic quantization: ranges of each batch); fp8 (static) needs --target tensorrt",
    )  # fmt: skip
    quantization.add_argument(
        "--target", choices=("onnxruntime", "tensorrt"),
        help="runtime of the quantized graph; TensorRT needs symmetric activations [onnxruntime]",
    )  # fmt: skip
    add_calibration(quantization)
    add_gate(parser)
    accept_dashes(parser)


def export_onnx_command(options: argparse.Namespace) -> None:
    """Check the options, import torch, and export."""
    from hfvit.artifacts.export_folder import claim_folder
    from hfvit.errors import ModelError
    from hfvit.export.options import CALIBRATED, CALIBRATION, check_gate, check_opset, refuse_unused

    require_checkpoint(options)
    if not options.quantize:
        refuse_unused(options, ["target"], "only used with --quantize")
    if options.quantize not in CALIBRATED:
        refuse_unused(options, CALIBRATION, "only used with --quantize int8 or fp8")
    if not options.no_dynamic_axes:
        refuse_unused(options, ["batch_size"], "only used with --no_dynamic_axes")
    check_gate(options, options.dtype == "bf16" and not (options.quantize or options.optimize))
    if options.quantize == "int8-dynamic" and options.target == "tensorrt":
        raise ModelError("--target tensorrt: not available with --quantize int8-dynamic. Use --quantize int8.")
    if options.quantize == "fp8" and options.target != "tensorrt":
        raise ModelError("--quantize fp8: requires --target tensorrt, got onnxruntime. Use --quantize int8.")
    check_opset(options.opset, quantized_for_tensorrt=options.target == "tensorrt")
    folder = claim_folder(options.output)
    quiet_export(options.verbose)
    from hfvit.export.pipeline import Export

    Export(options, folder).run()


class OnnxExportCommand(HFViTExportCommand):
    """Run `optimum-cli export onnx --model MODEL OUTPUT`."""

    COMMAND = CommandInfo(name="onnx", help="Export an image classifier to checked ONNX files (hfvit).")
    add_arguments = staticmethod(add_arguments)
    export = staticmethod(export_onnx_command)


main = OnnxExportCommand.main

if __name__ == "__main__":
    main()
