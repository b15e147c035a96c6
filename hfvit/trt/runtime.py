"""Run an engine as an inference backend, with CUDA graphs."""

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hfvit.artifacts.artifact import Artifact
from hfvit.errors import ModelError, one_line
from hfvit.trt.api import Backend, load_backend, message_log
from hfvit.trt.compatibility import check_engine, read_engine, this_machine
from hfvit.utils.files import cache_folder, temporary_file

logger = logging.getLogger(__name__)


class EngineRuntime:
    """Deserialize an engine and create its execution contexts.

    Args:
        backend: the TensorRT package to load it with.
        file: engine file.
        cache: kernel cache file of TensorRT for RTX, read here and written by `save_kernel_cache`.
        allow_code: accept host code in the engine, as version-compatible engines contain.

    Raises:
        ModelError: the engine cannot be loaded; the message has the backend's reason.
    """

    def __init__(self, backend: Backend, file: Path, cache: Path | None = None, allow_code: bool = False):
        self.trt = backend.module
        self.file = file
        self.cache_file = cache
        self.log = message_log(self.trt, verbose=False)
        runtime = self.trt.Runtime(self.log)
        runtime.engine_host_code_allowed = allow_code
        blob = file.read_bytes()
        if problem := validity_error(self.trt, runtime, blob, self.log):
            raise ModelError(f"{file}: {backend.title} rejects the engine on this machine: {problem}.")
        self.runtime = runtime  # must outlive its engine
        self.engine = runtime.deserialize_cuda_engine(blob)
        if self.engine is None:
            raise ModelError(f"{file}: {backend.title} cannot load the engine: {self.log.reason()}")
        self.is_jit = backend.builds_without_gpu
        self._config = None
        self._cache = None
        self._saved_bytes = 0
        if self.is_jit:
            self._configure_jit()

    def _configure_jit(self) -> None:
        """Read the kernel cache, and compile kernels before a batch size's first run.

        Otherwise a CUDA graph would record the fallback kernels that run while others compile.
        """
        config = self.engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._cache = config.create_runtime_cache()
        if self.cache_file is not None and self.cache_file.is_file():
            known = self.cache_file.read_bytes()
            if self._cache.deserialize(known):
                self._saved_bytes = len(known)
        config.set_runtime_cache(self._cache)
        self._config = config

    def context(self):
        """Create an execution context with its own memory."""
        arguments = () if self._config is None else (self._config,)
        context = self.engine.create_execution_context(*arguments)
        if context is None:
            raise ModelError(f"{self.file}: out of memory while loading the engine: {self.log.reason()}")
        return context

    def is_capturable(self, context, stream: int) -> bool:
        """Return whether a CUDA graph can capture `context` on the stream handle."""
        return not self.is_jit or context.is_stream_capturable(stream)

    def save_kernel_cache(self) -> None:
        """Write newly compiled kernels to the cache file, with a warning on failure."""
        if self._cache is None or self.cache_file is None:
            return
        compiled = memoryview(self._cache.serialize())
        if compiled.nbytes == self._saved_bytes:
            return
        try:
            with temporary_file(self.cache_file) as temporary:
                temporary.write_bytes(compiled)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self.cache_file, error.strerror or error)
        self._saved_bytes = compiled.nbytes


def validity_error(trt, runtime, blob: bytes, log) -> str | None:
    """Return why an engine cannot run on this machine, judged by its header.

    Args:
        trt: the imported TensorRT package.
        runtime: `trt.Runtime`.
        blob: content of the engine file.
        log: logger of `message_log`.

    Returns:
        The reasons, or None when it is valid or the backend cannot check (only TensorRT for RTX can).
    """
    if not hasattr(runtime, "get_engine_validity"):
        return None
    validity, flags = runtime.get_engine_validity(blob)
    if validity != trt.EngineValidity.INVALID:
        return None
    reasons = [
        name.lower().replace("_", " ")
        for name, flag in trt.EngineInvalidityDiagnostics.__members__.items()
        if int(flags) & int(flag.value)
    ]
    return ", ".join(reasons) or log.reason()


@dataclass(frozen=True)
class BatchSlice:
    """Hold rows `start` to `stop` of a batch, padded to a batch of `size`."""

    start: int
    stop: int
    size: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


def batch_slices(count: int, smallest: int, largest: int) -> Iterator[BatchSlice]:
    """Split a batch into slices that fit the optimization profile.

    Args:
        count: number of images.
        smallest: smallest batch size of the profile; a shorter last slice is padded to it.
        largest: largest batch size of the profile.
    """
    for start in range(0, count, largest):
        stop = min(start + largest, count)
        yield BatchSlice(start, stop, max(stop - start, smallest))


def profile_limits(shape: tuple[int, ...], profile: Callable[[], list]) -> tuple[int, int]:
    """Return the smallest and largest batch size of an engine.

    Args:
        shape: input shape (batch, channels, height, width), with -1 for a dynamic batch axis.
        profile: returns the (min, opt, max) shapes of the profile; called for a dynamic batch axis only.

    Raises:
        ModelError: the input is not a batch of images of fixed size.
    """
    if len(shape) != 4 or min(shape[1:]) < 1:
        raise ModelError(f"the input must have the shape (batch, channels, height, width), got {list(shape)}")
    if shape[0] > 0:
        return shape[0], shape[0]
    low, _, high = profile()
    return low[0], high[0]


class CudaGraphCache:
    """Cache CUDA graphs by batch size, least recently used first out.

    A graph is captured when a batch size occurs for the second time: the last batch of an epoch occurs only once.

    Args:
        capture: captures the graph of a batch size; returns None when it cannot, and is not called again then.
        max_graphs: number of graphs to keep.
    """

    def __init__(self, capture: Callable[[int], Any | None], max_graphs: int = 4):
        self.capture = capture
        self.max_graphs = max_graphs
        self.graphs: OrderedDict[int, Any] = OrderedDict()
        self.seen: Counter[int] = Counter()
        self.is_possible = True

    def graph(self, size: int) -> Any | None:
        """Return the graph of a batch size, None at its first call or when capture failed."""
        if size in self.graphs:
            self.graphs.move_to_end(size)
            return self.graphs[size]
        self.seen[size] += 1
        if not self.is_possible or self.seen[size] < 2:
            return None
        while len(self.graphs) >= self.max_graphs:
            dropped, _ = self.graphs.popitem(last=False)
            self.seen[dropped] = 0
        graph = self.capture(size)
        if graph is None:
            self.is_possible = False
        else:
            self.graphs[size] = graph
        return graph


# TensorRT's input and output types of an image classifier.
DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}


class TensorRTBackend:
    """Run an engine on one GPU for batches of any size.

    The engine uses its own stream and two fixed buffers, which batches are copied into and out of, so that CUDA graphs
    stay valid. Calls from several threads are serialized.

    Args:
        backend: the TensorRT package to load the engine with.
        file: engine file.
        classes: number of classes of the model's configuration.
        device: CUDA device, such as "cuda:0".
        cache: kernel cache file of TensorRT for RTX.
        allow_code: accept host code in the engine, as version-compatible engines contain.
        graphs: capture CUDA graphs.

    Raises:
        ModelError: the engine cannot be loaded, or is not an image classifier with this number of classes.
    """

    takes_pixels = False

    def __init__(
        self,
        backend: Backend,
        file: Path,
        classes: int,
        device: str = "cuda:0",
        *,
        cache: Path | None = None,
        allow_code: bool = False,
        graphs: bool = True,
    ):
        self.file = file
        self.device = device
        self.threads = torch.get_num_threads()
        self.bytes = file.stat().st_size
        self._lock = threading.Lock()
        with torch.cuda.device(device):
            torch.zeros(1, device=device)  # makes this GPU's context current, as TensorRT expects
            self._runtime = EngineRuntime(backend, file, cache, allow_code)
            engine = self._runtime.engine
            modes = backend.module.TensorIOMode
            names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
            inputs = [name for name in names if engine.get_tensor_mode(name) == modes.INPUT]
            outputs = [name for name in names if engine.get_tensor_mode(name) == modes.OUTPUT]
            if len(inputs) != 1 or not outputs:
                raise ModelError(f"{file} is not an image classifier: it has the inputs {inputs}, outputs {outputs}.")
            self._input = inputs[0]
            self._output = "logits" if "logits" in outputs else outputs[0]
            if len(outputs) > 1:
                raise ModelError(f"{file}: the only output must be logits, got {', '.join(outputs)}.")
            shape = tuple(engine.get_tensor_shape(self._input))
            try:
                self.smallest, self.largest = profile_limits(
                    shape, lambda: [tuple(dims) for dims in engine.get_tensor_profile_shape(self._input, 0)]
                )
            except ModelError as error:
                raise ModelError(f"{file} is not an image classifier: {error}.") from None
            self.image = shape[1:]
            output_shape = tuple(engine.get_tensor_shape(self._output))
            if len(output_shape) != 2 or output_shape[1] != classes:
                raise ModelError(
                    f"{file}: the logits have the shape {list(output_shape)}, but config.json names {classes} classes."
                    " Use the config.json of the exported checkpoint."
                )
            self._classes = classes
            self._pixels = self._buffer(self._input, self.image)
            self._logits = self._buffer(self._output, (classes,))
            self.stream = torch.cuda.Stream()
            self._context = self._new_context()
        self._graphs = CudaGraphCache(self._capture) if graphs else None
        self._executed: set[int] = set()  # batch sizes

    def _buffer(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Allocate the device buffer of an input or output for the largest batch."""
        dtype = self._dtype(self._runtime.engine, name)
        return torch.zeros((self.largest, *shape), dtype=dtype, device=self.device)

    def _dtype(self, engine, name: str) -> torch.dtype:
        kind = engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise ModelError(f"{self.file}: the type of {name} must be one of {', '.join(DTYPES)}, got {kind}.")
        return DTYPES[kind]

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Return float32 logits (batch, classes) of (batch, channels, height, width)."""
        return self.run(torch.from_numpy(np.ascontiguousarray(batch))).float().cpu().numpy()

    @torch.inference_mode()
    def run(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return logits on the engine's GPU, ready for use on the caller's current stream.

        Args:
            pixel_values: (batch, channels, height, width) of any float type, on that GPU or on the CPU.

        Returns:
            Logits (batch, classes) in the engine's output type.
        """
        if tuple(pixel_values.shape[1:]) != self.image:
            raise ModelError(
                f"{self.file}: images must have the shape {self.image}, got {tuple(pixel_values.shape[1:])} from the"
                " preprocessing. Use the preprocessor_config.json of the exported checkpoint."
            )
        with self._lock, torch.cuda.device(self.device):
            caller = torch.cuda.current_stream()
            self.stream.wait_stream(caller)
            with torch.cuda.stream(self.stream):
                logits = torch.empty((len(pixel_values), self._classes), dtype=self._logits.dtype, device=self.device)
                for part in batch_slices(len(pixel_values), self.smallest, self.largest):
                    self._pixels[: part.rows].copy_(pixel_values[part.start : part.stop])
                    self._pixels[part.rows : part.size].zero_()
                    self._execute(part.size)
                    logits[part.start : part.stop].copy_(self._logits[: part.rows])
            caller.wait_stream(self.stream)
            # Otherwise the allocator may reuse memory that the other stream still reads.
            logits.record_stream(caller)
            if pixel_values.is_cuda:
                pixel_values.record_stream(self.stream)
            return logits

    def _execute(self, size: int) -> None:
        """Run the first `size` rows of the buffers, with a CUDA graph if there is one."""
        graph = self._graphs.graph(size) if self._graphs else None
        if graph is not None:
            graph.replay()
            return
        self._enqueue(self._context, size)
        if size not in self._executed:
            self._executed.add(size)
            self._runtime.save_kernel_cache()

    def _new_context(self):
        """Create an execution context bound to the buffers."""
        context = self._runtime.context()
        for name, buffer in ((self._input, self._pixels), (self._output, self._logits)):
            if not context.set_tensor_address(name, buffer.data_ptr()):
                raise ModelError(f"{self.file}: {name} cannot be bound: {self._runtime.log.reason()}")
        return context

    def _enqueue(self, context, size: int) -> None:
        if not context.set_input_shape(self._input, (size, *self.image)):
            raise ModelError(f"{self.file} does not support batches of {size}: {self._runtime.log.reason()}")
        shape = tuple(context.get_tensor_shape(self._output))
        if shape != (size, self._classes):
            raise ModelError(f"{self.file}: logits must have the shape {(size, self._classes)}, got {shape}.")
        if not context.execute_async_v3(self.stream.cuda_stream):
            raise ModelError(f"{self.file} failed on a batch of {size}: {self._runtime.log.reason()}")

    def _capture(self, size: int) -> "CapturedBatch | None":
        """Capture the CUDA graph of a batch size; None, with a warning, on failure.

        Each graph has its own context, as running another shape in a context invalidates its graphs (TensorRT's
        guide, "CUDA Graphs").
        """
        context = self._new_context()
        self._enqueue(context, size)  # warm-up: the setup of a new shape must not be captured
        self.stream.synchronize()
        if not self._runtime.is_capturable(context, self.stream.cuda_stream):
            logger.warning("%s runs without CUDA graphs: its kernels allocate memory at run time", self.file)
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self._enqueue(context, size)
        except (RuntimeError, ModelError) as error:
            logger.warning("%s runs without CUDA graphs: %s", self.file, one_line(error)[:300])
            return None
        return CapturedBatch(graph, context)


class CapturedBatch:
    """Keep a CUDA graph with the context whose memory it uses."""

    def __init__(self, graph: torch.cuda.CUDAGraph, context):
        self.graph = graph
        self.context = context

    def replay(self) -> None:
        self.graph.replay()


def open_engine(artifact: Artifact, classes: int, device: str | None = None, allow_code: bool = False):
    """Check an engine against this machine and load it.

    Args:
        artifact: the engine.
        classes: number of classes of the model's configuration.
        device: "cuda" or "cuda:N"; None is the first GPU.
        allow_code: accept host code in the engine, as version-compatible engines contain.

    Raises:
        ModelError: the engine is damaged or cannot run on this machine.
    """
    engine = read_engine(artifact)
    number = check_engine(engine, this_machine(), device, allow_code)
    cache = cache_folder("engines") / f"{engine.record.sha256[:16]}.kernels"
    return TensorRTBackend(
        load_backend(engine.backend), artifact.file, classes, f"cuda:{number}", cache=cache, allow_code=allow_code
    )
