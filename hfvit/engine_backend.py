"""`TensorRTBackend`: an engine as a classifier's backend. Its arithmetic of batches is in engine_batches.py."""

import logging
import threading
from pathlib import Path

import numpy as np
import torch

from hfvit.engine_batches import Recurring, pieces, profile_limits
from hfvit.engine_runtime import EngineRuntime
from hfvit.errors import ModelError, one_line
from hfvit.export.trt_backends import Backend

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
