"""Arguments of `optimum-cli export tensorrt`."""

import argparse
import re
import sys
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from hfvit.cli.export_onnx import add_calibration, add_gate, add_model, add_tolerance, quiet_export
from hfvit.cli.options import above_0
from hfvit.errors import run
from hfvit.utils.terminal import prepare_streams

DESCRIPTION = """\
Build a TensorRT engine of an image classifier.

MODEL is a checkpoint, which is exported to ONNX and checked first (as by `optimum-cli export onnx`), or an .onnx file
with its config.json and preprocessor_config.json. The engine computes in the precision of the ONNX graph: TensorRT has
no precision flags any more. OUTPUT then holds
  model.engine              for the GPUs and batch sizes that were named
  engine.json               backend, versions, compute capabilities, batch sizes, precision, ONNX sha256, classes
  config.json, preprocessor_config.json
"""

EPILOG = """\
backends: `tensorrt_rtx` (pip install tensorrt-rtx-cu13) needs no GPU while it builds; its engines are for RTX GPUs and
are compiled for the one at hand when they are loaded. `tensorrt` builds and measures on the GPU that will run the
engine. Neither reads the other's engines. `hfvit doctor` tells what is installed here.

examples:
  optimum-cli export tensorrt --model outputs/quickstart --dtype fp16 outputs/quickstart/tensorrt
  optimum-cli export tensorrt --model outputs/quickstart engine_int8 --dtype int8 --compute_capability 8.6 8.9
  optimum-cli export tensorrt --model outputs/quickstart/onnx/model.onnx --max_batch 32 engine_fp32
  optimum-cli export tensorrt --model user/my-vit --dtype fp16 --triton my_vit --backend tensorrt model_repository
"""

UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class TensorRTExportCommand(BaseOptimumCLICommand):
    """`optimum-cli export tensorrt --model MODEL OUTPUT`"""

    COMMAND = CommandInfo(name="tensorrt", help="Build a TensorRT engine of an image classifier (hfvit).")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        add_arguments(parser)

    def run(self) -> None:
        prepare_streams()
        sys.exit(run(lambda: export_tensorrt_command(self.args)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("output", metavar="OUTPUT", help="the folder to write to")
    add_model(parser, "checkpoint folder or Hub id of an image classifier, or an .onnx file")

    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16", "int8", "fp8"),
        help="what matrix products compute in [fp32 for a checkpoint, the graph's own for an .onnx file]",
    )  # fmt: skip
    engine.add_argument("--min_batch", type=above_0, default=1, help="smallest batch [%(default)s]")
    engine.add_argument("--opt_batch", type=above_0, default=8, help="batch that it shall be fastest at [%(default)s]")
    engine.add_argument("--max_batch", type=above_0, default=64, help="largest batch [%(default)s]")
    engine.add_argument(
        "--compute_capability", nargs="+", type=capability, default=(), metavar="X.Y",
        help="GPUs to build for, such as 8.6 8.9; tensorrt_rtx alone can build for GPUs that are not here"
        " [tensorrt_rtx: 8.0 8.6 8.9 12.0; tensorrt: the GPU that is here]",
    )  # fmt: skip
    engine.add_argument(
        "--backend", choices=("auto", "tensorrt", "tensorrt_rtx"), default="auto",
        help="auto takes tensorrt where it and a GPU are, else tensorrt_rtx",
    )  # fmt: skip
    engine.add_argument(
        "--workspace", type=size_in_bytes, metavar="SIZE",
        help="most memory that a layer may use while it runs, such as 512MiB or 1GiB [the whole GPU's]",
    )  # fmt: skip
    engine.add_argument("--timing_cache", metavar="FILE", help="keep measured timings for the next build (tensorrt)")
    engine.add_argument(
        "--optimization_level", type=int, metavar="N", help="0 builds fast, 5 searches longest [the backend's own]"
    )
    engine.add_argument(
        "--hardware_compatibility", choices=("none", "ampere_plus", "same_compute_capability"), default="none",
        help="let other GPUs run the engine, at some cost in speed (tensorrt)",
    )  # fmt: skip
    engine.add_argument(
        "--version_compatible", action="store_true", help="let later versions of TensorRT run the engine (tensorrt)"
    )
    engine.add_argument(
        "--triton", metavar="NAME",
        help="make OUTPUT a model repository of Triton with the model NAME: NAME/config.pbtxt with dynamic batching,"
        " NAME/1/model.plan, NAME/labels.txt",
    )  # fmt: skip

    graph = parser.add_argument_group("ONNX graph of a checkpoint")
    graph.add_argument("--opset", type=int, help="18 to 23 [the exporter's own]")
    add_tolerance(graph)
    add_calibration(parser.add_argument_group("calibration of --dtype int8"))
    add_gate(parser)


def export_tensorrt_command(options: argparse.Namespace) -> None:
    """What cannot be done is told before anything is loaded or built."""
    from hfvit.artifacts.artifact import find_artifact
    from hfvit.errors import ModelError
    from hfvit.trt.api import (
        EngineOptions,
        check_options,
        check_precision,
        find_backend,
        local_gpus,
        target_capabilities,
    )

    artifact = find_artifact(options.model)
    if artifact.is_engine:
        raise ModelError(f"--model: {artifact.file} is an engine already; name its checkpoint or its ONNX file.")
    if options.dtype == "fp8" and artifact.is_checkpoint:
        raise ModelError(
            "--dtype fp8: hfvit's quantiser writes INT8 only. Take --dtype int8 or fp16; an ONNX file with FP8 Q/DQ"
            " pairs from another quantiser, such as NVIDIA's Model Optimizer, can be given as --model."
        )
    names = ("min_batch", "opt_batch", "max_batch", "workspace", "timing_cache", "optimization_level")
    names += ("hardware_compatibility", "version_compatible")
    engine_options = EngineOptions(
        compute_capability=tuple(options.compute_capability), **{name: getattr(options, name) for name in names}
    )
    backend = find_backend(options.backend, needs_no_gpu=bool(options.compute_capability))
    gpus = local_gpus()
    check_options(backend, engine_options, gpus)
    if artifact.is_checkpoint:
        options.dtype = options.dtype or "fp32"
        check_precision(backend, options.dtype, target_capabilities(backend, engine_options, gpus, options.dtype))
    if options.triton:
        from hfvit.trt.triton import check_triton

        check_triton(options.triton, options.min_batch)
        if backend.builds_without_gpu:
            raise ModelError(
                f"--triton: Triton serves engines of TensorRT, not of {backend.title}. Take --backend tensorrt, in the"
                " version of the Triton container and on its GPU."
            )
        options.output = Path(options.output).expanduser() / options.triton
    quiet_export(options.verbose)
    from hfvit.export.tensorrt_pipeline import EngineExport, graph_options

    EngineExport(graph_options(options), backend, engine_options).run()


def capability(text: str) -> str:
    """`8.6`, for argparse."""
    if not re.fullmatch(r"\d+\.\d", text):
        raise argparse.ArgumentTypeError(
            f"'{text}' is no compute capability such as 8.6; OUTPUT goes before this option"
        )
    return text


def size_in_bytes(text: str) -> int:
    """`1GiB`, `512 MiB`, `2GB`, or a number of bytes, for argparse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    unit = UNITS.get(match[2].lower()) if match else None
    size = int(float(match[1]) * unit) if unit else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write it as 512MiB, 1GiB or 2GB")
    return size
