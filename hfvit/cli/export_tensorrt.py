"""Arguments of `optimum-cli export tensorrt`."""

import argparse
import re

from optimum.commands.base import CommandInfo

from hfvit.cli.export_command import (
    HFViTExportCommand,
    add_calibration,
    add_gate,
    add_model,
    add_positional,
    add_tolerance,
    find_model,
    quiet_export,
)
from hfvit.cli.options import accept_dashes, exit_codes, positive_int
from hfvit.utils.files import expand_user, removing_empty_folders

DESCRIPTION = """\
Build a TensorRT engine of an image classifier.

MODEL is a checkpoint, which is exported to ONNX and checked first (as by `optimum-cli export onnx`), or an .onnx file
with its config.json and preprocessor_config.json. The engine has the precision of the ONNX graph. Files in OUTPUT:
  model.engine              the engine for the given GPUs and batch sizes
  engine.json               backend, versions, compute capabilities, batch sizes, precision, ONNX sha256, classes
  config.json, preprocessor_config.json
"""

EPILOG = f"""\
backends: `tensorrt_rtx` (pip install tensorrt-rtx-cu13) builds without a GPU; its engines run on RTX GPUs and are
compiled for the GPU when they are loaded. `tensorrt` builds on the GPU that will run the engine. Neither can load
engines of the other. `hfvit doctor` shows the installed backends.

examples:
  optimum-cli export tensorrt --model outputs/quickstart --dtype fp16 outputs/quickstart/tensorrt
  optimum-cli export tensorrt --model outputs/quickstart engine_int8 --dtype int8 --compute_capability 8.6 8.9
  optimum-cli export tensorrt --model outputs/quickstart/onnx/model.onnx --max_batch 32 engine_fp32
  optimum-cli export tensorrt --model user/my-vit --dtype fp16 --triton my_vit --backend tensorrt model_repository

{exit_codes(0, 2, 4)}"""

UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `optimum-cli export tensorrt`."""
    add_positional(parser, DESCRIPTION, EPILOG)
    add_model(parser, "checkpoint folder or Hub id of an image classifier, or an .onnx file")

    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16", "int8", "fp8"),
        help="precision of matrix products [fp32 for a checkpoint, the graph's for an .onnx file]",
    )  # fmt: skip
    engine.add_argument("--min_batch", type=positive_int, default=1, help="smallest batch size [%(default)s]")
    engine.add_argument("--opt_batch", type=positive_int, default=8, help="batch size to optimize for [%(default)s]")
    engine.add_argument("--max_batch", type=positive_int, default=64, help="largest batch size [%(default)s]")
    engine.add_argument(
        "--compute_capability", nargs="+", type=capability, default=(), metavar="X.Y",
        help="compute capabilities to build for, such as 8.6 8.9; only tensorrt_rtx can build for GPUs of other"
        " machines [tensorrt_rtx: 8.0 8.6 8.9 12.0; tensorrt: the GPU of this machine]",
    )  # fmt: skip
    engine.add_argument(
        "--backend", choices=("auto", "tensorrt", "tensorrt_rtx"), default="auto",
        help="auto: tensorrt if it and a GPU are available, else tensorrt_rtx; with --compute_capability, tensorrt_rtx"
        " if it is available [%(default)s]",
    )  # fmt: skip
    engine.add_argument(
        "--workspace", type=size_in_bytes, metavar="SIZE",
        help="workspace limit of a layer, such as 512MiB or 1GiB [all memory of the GPU]",
    )  # fmt: skip
    engine.add_argument(
        "--timing_cache", metavar="FILE", help="read and save kernel timings, which speeds up builds (tensorrt only)"
    )
    engine.add_argument(
        "--optimization_level", type=int, metavar="N", help="0 (fast build) to 5 (fast engine) [the backend's default]"
    )
    engine.add_argument(
        "--hardware_compatibility", choices=("none", "ampere_plus", "same_compute_capability"), default="none",
        help="let other GPUs run the engine, at some cost in speed (tensorrt only) [%(default)s]",
    )  # fmt: skip
    engine.add_argument(
        "--version_compatible",
        action="store_true",
        help="let later TensorRT versions run the engine (tensorrt only)",
    )
    engine.add_argument(
        "--triton", metavar="NAME",
        help="write OUTPUT as a Triton model repository with the model NAME: NAME/config.pbtxt (dynamic batching),"
        " NAME/1/model.plan, NAME/labels.txt",
    )  # fmt: skip

    graph = parser.add_argument_group("ONNX graph of a checkpoint")
    graph.add_argument("--opset", type=int, help="ONNX opset, 18 to 23 [the exporter's default]")
    add_tolerance(graph)
    add_calibration(parser.add_argument_group("calibration of --dtype int8 and fp8"))
    add_gate(parser)
    accept_dashes(parser)


def export_tensorrt_command(options: argparse.Namespace) -> None:
    """Check the options, then build the engine."""
    from hfvit.errors import ModelError
    from hfvit.export.options import CALIBRATED, CALIBRATION, GATE, check_gate, check_opset, refuse_unused
    from hfvit.trt.api import (
        EngineOptions,
        check_options,
        check_precision,
        find_backend,
        local_gpus,
        target_capabilities,
    )

    artifact = find_model(options)
    if not (artifact.is_checkpoint or artifact.is_onnx):
        raise ModelError(f"--model: must be a checkpoint or an ONNX file, got {artifact.file}.")
    if artifact.is_onnx:
        unused = ("opset", "atol", "device", "no_gate", *CALIBRATION, *GATE)
        refuse_unused(options, unused, "only used for a checkpoint, not an ONNX file")
    if options.dtype not in CALIBRATED:
        refuse_unused(options, CALIBRATION, "only used with --dtype int8 or fp8")
    check_gate(options, options.dtype == "bf16")
    check_opset(options.opset, quantized_for_tensorrt=options.dtype in CALIBRATED)
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
                f"--triton: not available with {backend.title}. Use --backend tensorrt, with the TensorRT version of"
                " the Triton container and on its GPU."
            )
        options.output = expand_user(options.output) / options.triton
    quiet_export(options.verbose)
    from hfvit.export.tensorrt_pipeline import EngineExport, graph_options

    with removing_empty_folders(options.output):  # with --triton, a subfolder of OUTPUT
        EngineExport(graph_options(options), backend, engine_options).run()


def capability(text: str) -> str:
    """Parse a compute capability, such as `8.6`."""
    if not re.fullmatch(r"\d+\.\d", text):
        raise argparse.ArgumentTypeError(
            f"must be a compute capability such as 8.6, got '{text}'. Put OUTPUT before this option"
        )
    return text


def size_in_bytes(text: str) -> int:
    """Convert a size, such as `1GiB`, `512 MiB`, `2GB` or `1000`, to bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    unit = UNITS.get(match[2].lower()) if match else None
    size = int(float(match[1]) * unit) if unit else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"must be a size such as 512MiB, 1GiB or 2GB, got '{text}'")
    return size


class TensorRTExportCommand(HFViTExportCommand):
    """Run `optimum-cli export tensorrt --model MODEL OUTPUT`."""

    COMMAND = CommandInfo(name="tensorrt", help="Build a TensorRT engine of an image classifier (hfvit).")
    add_arguments = staticmethod(add_arguments)
    export = staticmethod(export_tensorrt_command)
