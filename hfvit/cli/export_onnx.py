"""Arguments of `optimum-cli export onnx`."""

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from hfvit.cli.options import (
    accept_dashes,
    add_token_options,
    exit_codes,
    fraction,
    non_negative_float,
    percentage_points,
    positive_int,
)
from hfvit.errors import run
from hfvit.utils.quiet import quiet_libraries
from hfvit.utils.terminal import prepare_streams

DESCRIPTION = """\
Export an image classifier to ONNX, and check the files before they are written to OUTPUT.

OUTPUT has the layout that transformers.js and ORTModelForImageClassification expect:
  model.onnx                    --dtype fp32 (also model_fp16.onnx, model_bf16.onnx)
  model_optimized.onnx          --optimize, for ONNX Runtime only
  model_quantized.onnx          --quantize int8 or int8-dynamic; the later export replaces the earlier one
  model_int8_tensorrt.onnx      --quantize int8 --target tensorrt
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


class OnnxExportCommand(BaseOptimumCLICommand):
    """Run `optimum-cli export onnx --model MODEL OUTPUT`."""

    COMMAND = CommandInfo(name="onnx", help="Export an image classifier to checked ONNX files (hfvit).")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of the command."""
        add_arguments(parser)

    def run(self) -> None:
        """Run the command and exit with its code."""
        prepare_streams()
        sys.exit(run(lambda: export_onnx_command(self.args)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `optimum-cli export onnx`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("output", metavar="OUTPUT", help="folder to write to")
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
        default=1,
        help="batch size with --no_dynamic_axes, in images [%(default)s]",
    )
    graph.add_argument(
        "--no_dynamic_axes",
        action="store_true",
        help="fix the batch size to --batch_size",
    )
    add_tolerance(graph)
    add_token_options(graph)

    int8 = parser.add_argument_group("INT8")
    int8.add_argument(
        "--quantize", choices=("int8", "int8-dynamic"),
        help="also write model_quantized.onnx: int8 (static quantization: activation ranges from calibration images)"
        " or int8-dynamic (dynamic quantization: ranges of each batch)",
    )  # fmt: skip
    int8.add_argument(
        "--target", choices=("onnxruntime", "tensorrt"), default="onnxruntime",
        help="runtime of the INT8 graph; TensorRT needs symmetric activations [%(default)s]",
    )  # fmt: skip
    add_calibration(int8)
    add_gate(parser)
    accept_dashes(parser)


def add_model(parser: argparse.ArgumentParser, model_help: str) -> None:
    """Add --model and the options for loading it.

    Args:
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
    parser.add_argument(
        "--device", default="cpu", help="where PyTorch runs the model for the export: cpu, cuda, ... [%(default)s]"
    )
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
        "--calibration_samples", type=positive_int, default=128, help="number of calibration images [%(default)s]"
    )


def add_gate(parser: argparse.ArgumentParser) -> None:
    """Add the options of the accuracy gate."""
    gate = parser.add_argument_group("accuracy gate")
    gate.add_argument("--no_gate", action="store_true", help="skip the accuracy gate")
    gate.add_argument(
        "--max_accuracy_drop",
        type=percentage_points,
        default=0.5,
        help="largest drop in accuracy beyond chance, in percentage points [%(default)s]",
    )
    gate.add_argument(
        "--min_agreement",
        type=fraction,
        help="smallest fraction of images, 0 to 1, for which the export predicts the checkpoint's class [none]",
    )
    gate.add_argument(
        "--gate_samples", type=positive_int, default=5000, help="largest number of images compared [%(default)s]"
    )


def export_onnx_command(options: argparse.Namespace) -> None:
    """Check the options, import torch, and export."""
    from hfvit.artifacts.export_folder import claim_folder
    from hfvit.errors import ModelError

    require_checkpoint(options.model)
    if options.quantize == "int8-dynamic" and options.target == "tensorrt":
        raise ModelError("--target tensorrt: not available with --quantize int8-dynamic. Use --quantize int8.")
    folder = claim_folder(options.output)
    quiet_export(options.verbose)
    from hfvit.export.pipeline import Export

    Export(options, folder).run()


def require_checkpoint(model: str) -> None:
    """Raise `ModelError` if the value of `--model` is an export."""
    from hfvit.artifacts.artifact import find_artifact
    from hfvit.errors import ModelError

    if not find_artifact(model).is_checkpoint:
        raise ModelError(f"--model: must be a checkpoint, got the export {model}. Pass its checkpoint.")


def quiet_export(verbose: bool) -> None:
    """Silence progress bars and warnings of the libraries, unless `verbose`."""
    if verbose:
        return
    import os

    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    quiet_libraries()


def main(argv: list[str] | None = None) -> None:
    """Run `python -m hfvit.cli.export_onnx`.

    It equals `optimum-cli export onnx`, for environments where another package registers that name.
    """
    prepare_streams()
    parser = argparse.ArgumentParser(prog="python -m hfvit.cli.export_onnx")
    add_arguments(parser)
    options = parser.parse_args(argv)
    sys.exit(run(lambda: export_onnx_command(options)))


if __name__ == "__main__":
    main()
