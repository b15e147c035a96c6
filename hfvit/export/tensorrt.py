"""`build_engine`: a typed ONNX file -> a strongly typed TensorRT engine, one code path for both backends.

TensorRT 11 has no precision flags and no calibrators: what the graph says is what the engine computes in. The network
is checked for that before it is built, since an engine can be read on its GPU alone.
"""

import signal
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from hfvit.errors import ModelError, one_line
from hfvit.export.folder import file_facts
from hfvit.export.trt_backends import (
    Backend,
    EngineOptions,
    check_options,
    check_precision,
    local_gpus,
    target_capabilities,
)
from hfvit.export.trt_graph import GraphFacts, read_graph
from hfvit.export.trt_watch import build_progress, message_log
from hfvit.paths import temporary_file

# The type that the products with weights must show in the parsed network.
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
) -> dict:
    """Build the engine of the ONNX file `source` into `target`, and return what engine.json holds of it.

    The engine takes `pixel_values` `(batch, channels, height, width)` of any batch inside the profile and gives
    `logits` `(batch, classes)`, in the graph's own types. Raises `ModelError`, and leaves no file, when the backend or
    a GPU that is asked for cannot do what the graph and `options` say.
    """
    source, target, options = Path(source), Path(target), options or EngineOptions()
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
    layers = network_facts(network)
    check_types(layers, graph.dtype, source)
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
        with temporary_file(Path(options.timing_cache)) as temporary:
            temporary.write_bytes(config.get_timing_cache().serialize())
    return {
        **file_facts(target),
        "backend": {"name": backend.name, "version": backend.version, "cuda": backend.cuda},
        "compute_capabilities": list(capabilities),
        "built_on": gpus[0][0] if gpus else None,
        "dtype": graph.dtype,
        "profile": profile,
        "input": tensor_facts(network.get_input(0)),
        "output": tensor_facts(next(t for t in _outputs(network) if t.name == graph.output)),
        "network": layers,
        "options": {
            "workspace": options.workspace,
            "optimization_level": options.optimization_level,
            "hardware_compatibility": options.hardware_compatibility,
            "version_compatible": options.version_compatible,
        },
        "seconds": round(time.monotonic() - started, 1),
    }


def check_batches(graph: GraphFacts, options: EngineOptions) -> None:
    """Raise `ModelError` when a graph that was exported for one batch size is asked for others."""
    asked = {options.min_batch, options.opt_batch, options.max_batch}
    if graph.batch is not None and asked != {graph.batch}:
        raise ModelError(
            f"The ONNX file takes batches of {graph.batch} only; give --min_batch {graph.batch} --opt_batch"
            f" {graph.batch} --max_batch {graph.batch}, or export it without --no-dynamic-axes."
        )


def parse(trt, builder, source: Path, log):
    """The network of an ONNX file, strongly typed; `ModelError` names the node that the parser does not take."""
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(source)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        named = [f"{e.node_operator()} node '{e.node_name()}': {one_line(e.desc())}" for e in errors if e.node_name()]
        reason = named[0] if named else one_line(errors[0].desc()) if errors else log.reason()
        raise ModelError(f"The parser does not take {source.name}: {reason[:400]}")
    return network


def configure(backend: Backend, builder, network, config, graph: GraphFacts, options: EngineOptions) -> dict:
    """Set the configuration and its one profile; the profile's facts."""
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
        cache = Path(options.timing_cache)
        held = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
        if not config.set_timing_cache(held, False):
            raise ModelError(f"--timing_cache: {cache} is of another GPU or version of {backend.title}; delete it.")
    if backend.builds_without_gpu and options.compute_capability:
        wanted = tuple(dict.fromkeys(options.compute_capability))
        config.num_compute_capabilities = len(wanted)
        for index, capability in enumerate(wanted):
            config.set_compute_capability(backend.targets[capability], index)
    return dict(zip(("min", "opt", "max"), map(list, shapes), strict=True))


def network_facts(network) -> dict:
    """How many layers of each kind the network has, and in which types its products compute."""
    layers, products = Counter(), Counter()
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        kind = layer.type.name
        layers[kind] += 1
        if kind in PRODUCT_LAYERS:
            products[layer.get_output(0).dtype.name] += 1
    return {"layers": dict(sorted(layers.items())), "products": dict(sorted(products.items()))}


def check_types(facts: dict, dtype: str, source: Path) -> None:
    """Raise `ModelError` unless the parsed network computes in `dtype`."""
    if dtype in TENSOR_TYPES:
        right = facts["products"].get(TENSOR_TYPES[dtype], 0) * 2 > sum(facts["products"].values())
    else:
        right = facts["layers"].get("QUANTIZE", 0) > 0 and facts["layers"].get("DEQUANTIZE", 0) > 0
    if not right:
        raise ModelError(f"{source.name} should compute in {dtype}, but its parsed network has {facts}.")


def tensor_facts(tensor) -> dict:
    """Name, type and shape of an input or output; -1 is the free batch axis."""
    return {"name": tensor.name, "type": tensor.dtype.name, "shape": list(tensor.shape)}


def _outputs(network) -> list:
    return [network.get_output(index) for index in range(network.num_outputs)]


@contextmanager
def stoppable():
    """An event that Ctrl-C sets: an exception may not cross the builder's own code."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
