"""Build a strongly typed TensorRT engine from an ONNX file."""

import logging
import signal
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from hfvit.artifacts.engine_record import BackendVersion, BuildOptions, BuiltEngine, Network, Profile
from hfvit.artifacts.export_folder import file_digest
from hfvit.artifacts.export_record import TensorInfo
from hfvit.errors import ModelError, one_line, wrap_library_errors
from hfvit.trt.api import (
    Backend,
    EngineOptions,
    build_progress,
    check_options,
    check_precision,
    local_gpus,
    message_log,
    target_capabilities,
)
from hfvit.utils.files import expand_user, temporary_file

logger = logging.getLogger(__name__)

FLOATS = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
FP8 = {TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FNUZ, TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E5M2FNUZ}
PRODUCTS = ("MatMul", "Gemm", "Conv")
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
EXPORT = "optimum-cli export onnx --model MODEL"


@dataclass(frozen=True)
class GraphInfo:
    """Describe an ONNX image classifier.

    Args:
        dtype: precision of the matrix products with weights (fp32, fp16, bf16, int8, fp8).
        input: name of the input.
        output: name of the output with the logits.
        image: input shape (channels, height, width).
        classes: number of classes.
        batch: fixed batch size, None when the batch axis is dynamic.
    """

    dtype: str
    input: str
    output: str
    image: tuple[int, int, int]
    classes: int
    batch: int | None


def read_graph(path: Path) -> GraphInfo:
    """Read the description of an ONNX file.

    Raises:
        ModelError: no engine can be built from the file.
    """
    with wrap_library_errors(ModelError, f"{path} is not a valid ONNX file", limit=300):
        model = onnx.load(path)
    _check_operators(path, model)
    weights = {weight.name: weight.data_type for weight in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    shapes = [[dim.dim_value or None for dim in value.type.tensor_type.shape.dim] for value in inputs]
    kinds = [value.type.tensor_type.elem_type for value in inputs]
    if kinds == [TensorProto.UINT8]:
        raise ModelError(
            f"{path}: takes uint8 images of any size, which an optimization profile cannot describe. Export it again"
            " without --with_preprocessing."
        )
    if len(inputs) != 1 or kinds[0] not in FLOATS or len(shapes[0]) != 4 or None in shapes[0][1:]:
        names = ", ".join(value.name for value in inputs) or "no input"
        raise ModelError(
            f"{path}: must be an image classifier with one input (batch, channels, height, width) of fixed image size,"
            f" got {names} {shapes}."
        )
    outputs = list(model.graph.output)
    output = next((value for value in outputs if value.name == "logits"), outputs[0])
    shape = [dim.dim_value for dim in output.type.tensor_type.shape.dim]
    if len(shape) != 2 or not shape[1]:
        raise ModelError(f"{path}: the output must have the shape (batch, classes), got {output.name} {shape}.")
    batch, *image = shapes[0]
    return GraphInfo(_dtype(model, weights), inputs[0].name, output.name, tuple(image), shape[1], batch)


def _check_operators(path: Path, model: onnx.ModelProto) -> None:
    """Raise `ModelError` for ONNX Runtime's operators and asymmetric quantization."""
    values = {weight.name: weight for weight in model.graph.initializer}
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise ModelError(
                f"{path}: {_named(node)} is an operator of {node.domain}, which only ONNX Runtime supports. Export it"
                f" again with {EXPORT}, without --optimize (for INT8: --quantize int8 --target tensorrt)."
            )
        if node.op_type in ("MatMulInteger", "ConvInteger", "DynamicQuantizeLinear", "QLinearMatMul", "QLinearConv"):
            raise ModelError(f"{path}: {_named(node)} is an INT8 operator of ONNX Runtime. {_int8_again()}")
        if node.op_type in QUANTIZERS and len(node.input) > 2 and node.input[2] in values:
            zero = onnx.numpy_helper.to_array(values[node.input[2]])
            if zero.dtype == "uint8" or zero.astype("float32").any():
                raise ModelError(
                    f"{path}: {_named(node)} must be quantized symmetrically for TensorRT, got the zero point"
                    f" {zero.dtype}, {zero.ravel()[0]}. {_int8_again()}"
                )


def _dtype(model: onnx.ModelProto, weights: dict[str, int]) -> str:
    """Return the precision of Q/DQ pairs, else of most matrix products' weights."""
    if any(node.op_type in QUANTIZERS for node in model.graph.node):
        return "fp8" if any(kind in FP8 for kind in weights.values()) else "int8"
    matrices = {weight.name for weight in model.graph.initializer if len(weight.dims) > 1}
    products = (node for node in model.graph.node if node.op_type in PRODUCTS)
    kinds = Counter(weights[name] for node in products for name in node.input if name in matrices)
    return FLOATS[max(FLOATS, key=kinds.__getitem__)]


def _named(node: onnx.NodeProto) -> str:
    return f"the node {node.name or node.output[0]} ({node.op_type})"


def _int8_again() -> str:
    return f"Export it with {EXPORT} --quantize int8 --target tensorrt."


# Output type of matrix products in the parsed network.
TENSOR_TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
PRODUCT_LAYERS = ("MATRIX_MULTIPLY", "CONVOLUTION")


def build_engine(
    source: str | Path,
    target: str | Path,
    backend: Backend,
    options: EngineOptions | None = None,
    *,
    show_progress: bool = True,
    verbose: bool = False,
) -> BuiltEngine:
    """Build a TensorRT engine from an ONNX file.

    The engine maps `pixel_values` (batch, channels, height, width), with a batch size inside the profile, to `logits`
    (batch, classes), in the types of the graph.

    Args:
        source: ONNX file.
        target: engine file to write.
        backend: the TensorRT package to build with.
        options: build options.
        show_progress: draw a progress bar on a terminal.
        verbose: print TensorRT's log to stderr.

    Returns:
        The record of the engine for engine.json.

    Raises:
        ModelError: the backend or a target GPU does not support the graph or the options; no file is written.
    """
    source = Path(source)
    target = Path(target)
    options = options or EngineOptions()
    gpus = local_gpus()
    check_options(backend, options, gpus)
    graph = read_graph(source)
    check_batches(graph, options)
    capabilities = target_capabilities(backend, options, gpus, graph.dtype)
    check_precision(backend, graph.dtype, capabilities)

    started = time.monotonic()
    trt = backend.module
    log = message_log(trt, verbose)
    builder = trt.Builder(log)
    network = parse(trt, builder, source, log)
    parsed = network_info(network)
    check_types(parsed, graph.dtype, source)
    config = builder.create_builder_config()
    profile = configure(backend, builder, network, config, graph, options)
    with stoppable() as stopped:
        bar = build_progress(trt, stopped, show_progress)
        config.progress_monitor = bar
        try:
            engine = builder.build_serialized_network(network, config)
        finally:
            bar.close()
    if stopped.is_set():
        raise KeyboardInterrupt
    if engine is None:
        raise ModelError(f"{backend.title} cannot build {source.name}: {log.reason()}")
    with temporary_file(target) as temporary:
        temporary.write_bytes(engine)
    if options.timing_cache is not None:
        save_timings(expand_user(options.timing_cache), config.get_timing_cache().serialize())
    return BuiltEngine(
        **file_digest(target),
        backend=BackendVersion(name=backend.name, version=backend.version, cuda=backend.cuda),
        compute_capabilities=list(capabilities),
        built_on=gpus[0][0] if gpus else None,
        dtype=graph.dtype,
        profile=profile,
        input=tensor_info(network.get_input(0)),
        output=tensor_info(next(t for t in _outputs(network) if t.name == graph.output)),
        network=parsed,
        options=BuildOptions(
            workspace=options.workspace,
            optimization_level=options.optimization_level,
            hardware_compatibility=options.hardware_compatibility,
            version_compatible=options.version_compatible,
        ),
        seconds=round(time.monotonic() - started, 1),
    )


def check_batches(graph: GraphInfo, options: EngineOptions) -> None:
    """Raise `ModelError` unless the profile fits a graph of fixed batch size."""
    batches = (options.min_batch, options.opt_batch, options.max_batch)
    if graph.batch is not None and set(batches) != {graph.batch}:
        raise ModelError(
            f"--min_batch, --opt_batch, --max_batch: must be {graph.batch}, the fixed batch size of the ONNX file, got"
            f" {', '.join(map(str, batches))}. Pass --min_batch {graph.batch} --opt_batch {graph.batch} --max_batch"
            f" {graph.batch}, or export the file without --no_dynamic_axes."
        )


def parse(trt, builder, source: Path, log):
    """Parse an ONNX file into a strongly typed network.

    Args:
        trt: the imported TensorRT package.
        builder: `trt.Builder` that owns the network.
        source: ONNX file.
        log: logger of `message_log`.

    Raises:
        ModelError: names the node that the parser rejects.
    """
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(source)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        named = [f"{e.node_operator()} node '{e.node_name()}': {one_line(e.desc())}" for e in errors if e.node_name()]
        reason = named[0] if named else one_line(errors[0].desc()) if errors else log.reason()
        raise ModelError(f"TensorRT cannot parse {source.name}: {reason[:400]}")
    return network


def configure(backend: Backend, builder, network, config, graph: GraphInfo, options: EngineOptions) -> Profile:
    """Set the builder configuration and its only optimization profile.

    Args:
        backend: the TensorRT package to build with.
        builder: `trt.Builder`.
        network: the parsed network.
        config: `trt.IBuilderConfig` to change.
        graph: description of the ONNX file.
        options: build options.

    Returns:
        The shapes of the profile.

    Raises:
        ModelError: the timing cache cannot be read, or is of another GPU or version.
    """
    trt = backend.module
    shapes = [(batch, *graph.image) for batch in (options.min_batch, options.opt_batch, options.max_batch)]
    if graph.batch is None:
        profile = builder.create_optimization_profile()
        profile.set_shape(graph.input, *shapes)
        config.add_optimization_profile(profile)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.hardware_compatibility != "none":
        level = options.hardware_compatibility.upper()
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.timing_cache is not None:
        cache = expand_user(options.timing_cache)
        with wrap_library_errors(ModelError, f"--timing_cache: {cache} cannot be read"):
            held = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
        if not config.set_timing_cache(held, False):
            raise ModelError(
                f"--timing_cache: {cache} was written for another GPU or version than {backend.title}. Delete it."
            )
    if backend.builds_without_gpu and options.compute_capability:
        wanted = tuple(dict.fromkeys(options.compute_capability))
        config.num_compute_capabilities = len(wanted)
        for index, capability in enumerate(wanted):
            config.set_compute_capability(backend.targets[capability], index)
    low, best, high = shapes
    return Profile(min=low, opt=best, max=high)


def save_timings(path: Path, timings: bytes) -> None:
    """Write a timing cache; a failure is a warning, as the engine is complete."""
    try:
        with temporary_file(path) as temporary:
            temporary.write_bytes(timings)
    except OSError as error:
        logger.warning("--timing_cache: %s was not written: %s.", path, error.strerror or one_line(error))


def network_info(network) -> Network:
    """Count layers by kind, and matrix products by output type."""
    layers, products = Counter(), Counter()
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        kind = layer.type.name
        layers[kind] += 1
        if kind in PRODUCT_LAYERS:
            products[layer.get_output(0).dtype.name] += 1
    return Network(layers=dict(sorted(layers.items())), products=dict(sorted(products.items())))


def check_types(network: Network, dtype: str, source: Path) -> None:
    """Check that the parsed network computes in a precision.

    Args:
        network: layer counts of `network_info`.
        dtype: expected precision.
        source: ONNX file, for the message.

    Raises:
        ModelError: most matrix products compute in another type.
    """
    if dtype in TENSOR_TYPES:
        right = network.products.get(TENSOR_TYPES[dtype], 0) * 2 > sum(network.products.values())
    else:
        right = network.layers.get("QUANTIZE", 0) > 0 and network.layers.get("DEQUANTIZE", 0) > 0
    if not right:
        raise ModelError(f"{source.name} must compute in {dtype}, got the parsed network {network.to_json()}.")


def tensor_info(tensor) -> TensorInfo:
    """Return name, type and shape of an input or output; -1 is the dynamic batch axis."""
    return TensorInfo(name=tensor.name, type=tensor.dtype.name, shape=list(tensor.shape))


def _outputs(network) -> list:
    return [network.get_output(index) for index in range(network.num_outputs)]


@contextmanager
def stoppable():
    """Yield an event set by Ctrl-C; exceptions must not pass through TensorRT's C++."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
