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
    """A deserialised engine; `context()` gives what runs it.

    `cache` is a file for kernels that TensorRT for RTX compiled for this GPU: it is read here, and written by `keep`.
    Raises `ModelError` with the backend's own reason when the engine cannot be loaded.

    `allow_code` lets an engine bring code for the processor, as version-compatible ones do: their own runtime.
    """

    def __init__(self, backend: Backend, file: Path, cache: Path | None = None, allow_code: bool = False):
        self.trt, self.file, self.cache_file = backend.module, file, cache
        self.log = message_log(self.trt, verbose=False)
        runtime = self.trt.Runtime(self.log)
        runtime.engine_host_code_allowed = allow_code
        blob = file.read_bytes()
        if problem := invalidity(self.trt, runtime, blob, self.log):
            raise ModelError(f"{file}: {backend.title} does not take the engine here: {problem}.")
        self.runtime = runtime  # it must outlive its engine
        self.engine = runtime.deserialize_cuda_engine(blob)
        if self.engine is None:
            raise ModelError(f"{file}: {backend.title} cannot load the engine: {self.log.reason()}")
        self.is_jit = backend.builds_without_gpu
        self._config, self._cache, self._kept = None, None, 0
        if self.is_jit:
            self._compile_at_once()

    def _compile_at_once(self) -> None:
        """Kernels for a new batch size before its first run, not beside it: a CUDA graph must not hold the ones that
        are to be replaced. What was compiled before is taken from the cache, if it is of this GPU and version."""
        config = self.engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._cache = config.create_runtime_cache()
        if self.cache_file is not None and self.cache_file.is_file():
            known = self.cache_file.read_bytes()
            if self._cache.deserialize(known):
                self._kept = len(known)
        config.set_runtime_cache(self._cache)
        self._config = config

    def context(self):
        """A new execution context, with memory of its own."""
        given = () if self._config is None else (self._config,)
        made = self.engine.create_execution_context(*given)
        if made is None:
            raise ModelError(f"{self.file}: no memory for the engine: {self.log.reason()}")
        return made

    def is_capturable(self, context, stream: int) -> bool:
        """Whether a CUDA graph can hold what `context` does on the stream with the handle `stream`."""
        return not self.is_jit or context.is_stream_capturable(stream)

    def keep(self) -> None:
        """Write what was compiled since it was read; a folder that takes no file only makes the next start slower."""
        if self._cache is None or self.cache_file is None:
            return
        compiled = memoryview(self._cache.serialize())
        if compiled.nbytes == self._kept:
            return
        try:
            with temporary_file(self.cache_file) as temporary:
                temporary.write_bytes(compiled)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self.cache_file, error.strerror or error)
        self._kept = compiled.nbytes


def invalidity(trt, runtime, blob: bytes, log) -> str | None:
    """Why the engine cannot run here by its head alone, which TensorRT for RTX can tell; None when it can."""
    if not hasattr(runtime, "get_engine_validity"):
        return None
    validity, flags = runtime.get_engine_validity(blob)
    if validity != trt.EngineValidity.INVALID:
        return None
    found = [
        name.lower().replace("_", " ")
        for name, flag in trt.EngineInvalidityDiagnostics.__members__.items()
        if int(flags) & int(flag.value)
    ]
    return ", ".join(found) or log.reason()


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a batch, run as a batch of `size`: the rows behind them are padding."""

    start: int
    stop: int
    size: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


def pieces(count: int, smallest: int, largest: int) -> Iterator[Piece]:
    """`count` images in pieces of at most `largest`, the last one padded to `smallest` where it is shorter."""
    for start in range(0, count, largest):
        stop = min(start + largest, count)
        yield Piece(start, stop, max(stop - start, smallest))


def profile_limits(shape: tuple[int, ...], profile: Callable[[], list]) -> tuple[int, int]:
    """The smallest and largest batch of an engine's input.

    `shape` is the input's, -1 where it is free; `profile` gives the profile's (min, opt, max) shapes, and is asked
    only when the batch is free. Raises `ModelError` for an input that is no batch of images of one size.
    """
    if len(shape) != 4 or min(shape[1:]) < 1:
        raise ModelError(f"its input has the shape {list(shape)}, where (batch, channels, height, width) is expected")
    if shape[0] > 0:
        return shape[0], shape[0]
    low, _, high = profile()
    return low[0], high[0]


class Recurring:
    """The CUDA graphs of the batch sizes that come again, of the latest `most` of them.

    A size that comes once, such as the rest of an epoch, is not worth a graph. `capture(size)` makes one, or returns
    None where that cannot be done, which is then not tried again.
    """

    def __init__(self, capture: Callable[[int], Any | None], most: int = 4):
        self.capture, self.most = capture, most
        self.graphs: OrderedDict[int, Any] = OrderedDict()
        self.seen: Counter[int] = Counter()
        self.is_possible = True

    def graph(self, size: int) -> Any | None:
        """The graph for a batch of `size`, from its second call on."""
        if size in self.graphs:
            self.graphs.move_to_end(size)
            return self.graphs[size]
        self.seen[size] += 1
        if not self.is_possible or self.seen[size] < 2:
            return None
        while len(self.graphs) >= self.most:
            dropped, _ = self.graphs.popitem(last=False)
            self.seen[dropped] = 0
        graph = self.capture(size)
        if graph is None:
            self.is_possible = False
        else:
            self.graphs[size] = graph
        return graph


logger = logging.getLogger(__name__)

# What torch calls the types of TensorRT that an image classifier takes and gives.
DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}


class TensorRTBackend:
    """An engine on one GPU, for batches of any size.

    The engine reads and writes two buffers that stay where they are, on a stream of its own: batches are copied into
    the one and out of the other on the GPU, so rows may lie anywhere, and a CUDA graph of a batch size stays valid.
    Several threads may call it; they take turns.
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
        self.file, self.device, self.threads = file, device, torch.get_num_threads()
        self.bytes = file.stat().st_size
        self._lock = threading.Lock()
        with torch.cuda.device(device):
            torch.zeros(1, device=device)  # makes the context of this GPU current, for what TensorRT asks of it
            self._runtime = EngineRuntime(backend, file, cache, allow_code)
            engine, trt = self._runtime.engine, backend.module
            names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
            of_mode = {
                mode: [name for name in names if engine.get_tensor_mode(name) == mode]
                for mode in (trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT)
            }
            inputs, outputs = of_mode.values()
            if len(inputs) != 1 or not outputs:
                raise ModelError(f"{file} is no image classifier: it takes {inputs} and gives {outputs}.")
            self._input = inputs[0]
            self._output = "logits" if "logits" in outputs else outputs[0]
            if len(outputs) > 1:
                raise ModelError(f"{file} gives {', '.join(outputs)}, where logits alone are expected.")
            shape = tuple(engine.get_tensor_shape(self._input))
            try:
                self.smallest, self.largest = profile_limits(
                    shape, lambda: [tuple(dims) for dims in engine.get_tensor_profile_shape(self._input, 0)]
                )
            except ModelError as error:
                raise ModelError(f"{file} is no image classifier: {error}.") from None
            self.image = shape[1:]
            given = tuple(engine.get_tensor_shape(self._output))
            if len(given) != 2 or given[1] != classes:
                raise ModelError(
                    f"{file} gives logits of shape {list(given)}, but its config.json names {classes} classes; take"
                    " the config.json of the checkpoint that was exported."
                )
            self._classes = classes
            self._pixels, self._logits = (
                torch.zeros((self.largest, *rest), dtype=self._dtype(engine, name), device=device)
                for name, rest in ((self._input, self.image), (self._output, (classes,)))
            )
            self.stream = torch.cuda.Stream()
            self._context = self._new_context()
        self._graphs = Recurring(self._capture) if graphs else None
        self._ran: set[int] = set()

    def _dtype(self, engine, name: str) -> torch.dtype:
        kind = engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise ModelError(f"{self.file}: {name} is of type {kind}, which is none of {', '.join(DTYPES)}.")
        return DTYPES[kind]

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Logits `(batch, classes)` float32 of pixel values `(batch, channels, height, width)` float32."""
        return self.run(torch.from_numpy(np.ascontiguousarray(batch))).float().cpu().numpy()

    @torch.inference_mode()
    def run(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, classes)` on the engine's GPU and in its output's type.

        `pixel_values` `(batch, channels, height, width)` of any float type may be on that GPU already, and then they
        stay there, or on the processor. The result may be used on the caller's current stream as any tensor.
        """
        if tuple(pixel_values.shape[1:]) != self.image:
            raise ModelError(
                f"{self.file} takes images of shape {self.image}, but its preprocessing made"
                f" {tuple(pixel_values.shape[1:])}; take the preprocessor_config.json of the checkpoint that was"
                " exported."
            )
        with self._lock, torch.cuda.device(self.device):
            caller = torch.cuda.current_stream()
            self.stream.wait_stream(caller)
            with torch.cuda.stream(self.stream):
                logits = torch.empty((len(pixel_values), self._classes), dtype=self._logits.dtype, device=self.device)
                for piece in pieces(len(pixel_values), self.smallest, self.largest):
                    self._pixels[: piece.rows].copy_(pixel_values[piece.start : piece.stop])
                    self._pixels[piece.rows : piece.size].zero_()
                    self._execute(piece.size)
                    logits[piece.start : piece.stop].copy_(self._logits[: piece.rows])
            caller.wait_stream(self.stream)
            # The allocator knows each tensor by the stream it was made on; it must not give away what the other uses.
            logits.record_stream(caller)
            if pixel_values.is_cuda:
                pixel_values.record_stream(self.stream)
            return logits

    def _execute(self, size: int) -> None:
        """The buffers' first `size` rows, by a graph where there is one."""
        graph = self._graphs.graph(size) if self._graphs else None
        if graph is not None:
            graph.replay()
            return
        self._enqueue(self._context, size)
        if size not in self._ran:
            self._ran.add(size)
            self._runtime.keep()

    def _new_context(self):
        """One that reads and writes the buffers."""
        context = self._runtime.context()
        for name, buffer in ((self._input, self._pixels), (self._output, self._logits)):
            if not context.set_tensor_address(name, buffer.data_ptr()):
                raise ModelError(f"{self.file}: {name} cannot be bound: {self._runtime.log.reason()}")
        return context

    def _enqueue(self, context, size: int) -> None:
        if not context.set_input_shape(self._input, (size, *self.image)):
            raise ModelError(f"{self.file} takes no batch of {size}: {self._runtime.log.reason()}")
        expected, given = (size, self._classes), tuple(context.get_tensor_shape(self._output))
        if given != expected:
            raise ModelError(f"{self.file} gives logits of shape {given} for {size} images.")
        if not context.execute_async_v3(self.stream.cuda_stream):
            raise ModelError(f"{self.file} failed on a batch of {size}: {self._runtime.log.reason()}")

    def _capture(self, size: int) -> "CapturedBatch | None":
        """What one batch of `size` launches; None, and told once, where a CUDA graph cannot hold it.

        The graph has a context of its own: it is undefined once the context that it was captured from has met another
        shape (TensorRT's guide, "CUDA Graphs").
        """
        context = self._new_context()
        self._enqueue(context, size)  # what a new shape asks for once must not be captured
        self.stream.synchronize()
        if not self._runtime.is_capturable(context, self.stream.cuda_stream):
            logger.warning("%s runs without CUDA graphs: its kernels allocate memory as they run", self.file)
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
    """A CUDA graph, with the context whose memory it uses."""

    def __init__(self, graph: torch.cuda.CUDAGraph, context):
        self.graph, self.context = graph, context

    def replay(self) -> None:
        self.graph.replay()


def open_engine(artifact: Artifact, classes: int, device: str | None = None, allow_code: bool = False):
    """The backend of an engine (engine_backend.py), after every check that this machine allows without it."""
    engine = read_engine(artifact)
    number = check_engine(engine, this_machine(), device, allow_code)

    cache = cache_folder("engines") / f"{engine.record.sha256[:16]}.kernels"
    return TensorRTBackend(
        load_backend(engine.backend), artifact.file, classes, f"cuda:{number}", cache=cache, allow_code=allow_code
    )
