"""Arguments of `optimum-cli export onnx`."""

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from hfvit.cli.options import above_0, add_changes, not_negative, points, share
from hfvit.errors import run
from hfvit.utils.quiet import quiet_libraries
from hfvit.utils.terminal import prepare_streams

DESCRIPTION = """\
Write a checkpoint's image classifier as ONNX files that are checked before they get their names.

The output folder holds, flat, what transformers.js and ORTModelForImageClassification look for:
  model.onnx                    --dtype fp32 (also model_fp16.onnx, model_bf16.onnx)
  model_optimized.onnx          --optimize, for ONNX Runtime alone
  model_quantized.onnx          --quantize int8 or int8-dynamic, whichever came last
  model_int8_tensorrt.onnx      --quantize int8 --target tensorrt
  ..._with_preprocessing.onnx   --with-preprocessing
  config.json, preprocessor_config.json, export.json
Several variants in one call, or successive calls into one folder, add up.
"""

EPILOG = """\
What is checked before anything is put into OUTPUT: ONNX's own checker; ONNX Runtime against PyTorch at several batch
sizes (--atol); and, when the checkpoint has a recipe.yaml, the accuracy on the pictures that its training held out
(the gate). Exit code: 0 done, 2 something was wrong, 4 the gate refused.

examples:
  optimum-cli export onnx --model outputs/quickstart outputs/quickstart/onnx
  optimum-cli export onnx --model outputs/quickstart --dtype fp16 outputs/quickstart/onnx
  optimum-cli export onnx --model outputs/quickstart --optimize --quantize int8 outputs/quickstart/onnx
  optimum-cli export onnx --model google/vit-base-patch16-224 --quantize int8-dynamic vit_onnx
  optimum-cli export onnx --model user/my-vit --quantize int8 --calibration_dataset path/to/folder my_vit_onnx
  optimum-cli export onnx --model outputs/quickstart --with-preprocessing server_onnx
"""


class OnnxExportCommand(BaseOptimumCLICommand):
    """`optimum-cli export onnx --model MODEL OUTPUT`"""

    COMMAND = CommandInfo(name="onnx", help="Export an image classifier to checked ONNX files (hfvit).")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        add_arguments(parser)

    def run(self) -> None:
        prepare_streams()
        sys.exit(run(lambda: export_onnx_command(self.args)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("output", metavar="OUTPUT", help="the folder to write to")
    add_model(parser, "checkpoint folder or Hub id of an image classifier")

    graph = parser.add_argument_group("graph")
    graph.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), default="fp32",
        help="what matrix products compute in; inputs and outputs stay float32, LayerNorm and Softmax are computed in"
        " float32 [%(default)s]",
    )  # fmt: skip
    graph.add_argument("--opset", type=int, help="18 to 23 [the exporter's own]")
    graph.add_argument(
        "--optimize",
        action="store_true",
        help="model_optimized.onnx too: operators fused for ONNX Runtime on CPUs, in fp32 whatever --dtype says",
    )
    graph.add_argument(
        "--with-preprocessing", "--with_preprocessing", action="store_true",
        help="graphs that take raw pictures, uint8 (batch, height, width, 3) of any size, and resize, crop and"
        " normalise them as the image processor does",
    )  # fmt: skip
    graph.add_argument("--batch_size", type=above_0, default=1, help="of a graph with fixed axes [%(default)s]")
    graph.add_argument(
        "--no-dynamic-axes",
        "--no_dynamic_axes",
        action="store_true",
        help="fix the batch size instead of leaving it open",
    )
    add_tolerance(graph)
    add_changes(graph)

    int8 = parser.add_argument_group("INT8")
    int8.add_argument(
        "--quantize", choices=("int8", "int8-dynamic"),
        help="model_quantized.onnx too: int8 fixes the ranges of activations with calibration pictures, int8-dynamic"
        " finds them in each batch",
    )  # fmt: skip
    int8.add_argument(
        "--target", choices=("onnxruntime", "tensorrt"), default="onnxruntime",
        help="what runs the INT8 graph; TensorRT takes symmetric activations only [%(default)s]",
    )  # fmt: skip
    add_calibration(int8)
    add_gate(parser)


def add_model(parser: argparse.ArgumentParser, what: str) -> None:
    """Where the model comes from, and how it is loaded."""
    parser.add_argument("-m", "--model", required=True, help=what)
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--cache_dir", help="where downloads of the Hub are kept")
    parser.add_argument(
        "--task", choices=("auto", "image-classification"), default="auto", help="auto is image-classification"
    )
    parser.add_argument("--device", default="cpu", help="where PyTorch runs while it is traced [%(default)s]")
    parser.add_argument("--verbose", action="store_true", help="show what the exporters print and warn")


def add_tolerance(group) -> None:
    group.add_argument(
        "--atol", type=not_negative,
        help="largest difference of a float graph's logit from PyTorch's [0.001 for fp32, 0.02 for fp16, 0.1 for bf16,"
        " times the largest logit if that is above 1]",
    )  # fmt: skip


def add_calibration(group) -> None:
    group.add_argument("--calibration_dataset", help="Hub id or folder of pictures [the recipe's data set]")
    group.add_argument("--calibration_split", help="its split [the recipe's training split, else train]")
    group.add_argument("--calibration_samples", type=above_0, default=128, help="pictures [%(default)s]")


def add_gate(parser: argparse.ArgumentParser) -> None:
    gate = parser.add_argument_group("gate")
    gate.add_argument("--no-gate", "--no_gate", action="store_true", help="do not measure accuracy")
    gate.add_argument(
        "--max_accuracy_drop", type=points, default=0.5, help="refuse files that lose more points [%(default)s]"
    )
    gate.add_argument(
        "--min_agreement",
        type=share,
        help="refuse files that agree with the checkpoint on a smaller share, 0 to 1 [none]",
    )
    gate.add_argument("--gate_samples", type=above_0, default=5000, help="pictures at most [%(default)s]")


def export_onnx_command(options: argparse.Namespace) -> None:
    """What can be told at once is told before torch is imported."""
    from hfvit.artifacts.artifact import find_artifact
    from hfvit.artifacts.export_folder import claim_folder
    from hfvit.errors import ModelError

    if not find_artifact(options.model).is_checkpoint:
        raise ModelError(f"--model: {options.model} is an export already; name the checkpoint that it was made from.")
    if options.quantize == "int8-dynamic" and options.target == "tensorrt":
        raise ModelError("--target tensorrt: it has no int8-dynamic; take --quantize int8.")
    folder = claim_folder(options.output)
    quiet_export(options.verbose)
    from hfvit.export.pipeline import Export

    Export(options, folder).run()


def quiet_export(verbose: bool) -> None:
    """The bars and notes of the libraries are of no use to this command."""
    if verbose:
        return
    import os

    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    quiet_libraries()


def main(argv: list[str] | None = None) -> None:
    """`python -m hfvit.cli.export_onnx`: the same command where another distribution holds the name `export onnx`."""
    prepare_streams()
    parser = argparse.ArgumentParser(prog="python -m hfvit.cli.export_onnx")
    add_arguments(parser)
    options = parser.parse_args(argv)
    sys.exit(run(lambda: export_onnx_command(options)))


if __name__ == "__main__":
    main()
