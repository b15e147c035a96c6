"""OpenVINO backend."""

import threading
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from hfvit.errors import ModelError, wrap_library_errors
from hfvit.inference.backends import MEASURED_SIZE, check_image_shape, fastest
from hfvit.utils.optional import import_optional

# Runtime information of an OpenVINO file: precision to compute in.
PRECISION_HINT = ("runtime_options", "INFERENCE_PRECISION_HINT")


class OpenVINOBackend:
    """Run an OpenVINO file on CPUs, or on GPUs and NPUs of Intel.

    The input is `pixel_values` (batch, 3, height, width) float32, the output `logits`. The precision is that of the
    file (`INFERENCE_PRECISION_HINT` of its runtime options), on CPUs float32 for a file without it, and not OpenVINO's
    default.

    Args:
        file: .xml file, with its weights in the .bin file beside it.
        classes: number of classes of the model's configuration, None to accept any.
        device: "cpu", or a device of OpenVINO such as "gpu", "gpu.1" or "npu"; None is the CPU.
        threads: CPU threads; None is PyTorch's number.
        objective: "throughput" to measure whether one-thread streams, with a part of the batch or image by image, are
            faster on this CPU, and to use them if so; "latency" or None to use all threads for one batch after the
            other.

    Raises:
        ModelError: OpenVINO is not installed, or the file is not an image classifier with this number of classes, or
            cannot run on the device.
    """

    takes_pixels = False
    text_inputs: tuple[str, ...] = ()

    def __init__(
        self,
        file: Path,
        classes: int | None = None,
        device: str | None = None,
        threads: int | None = None,
        objective: str | None = None,
    ):
        openvino = load_openvino()
        self.file = file
        self.device = (device or "cpu").lower()
        self.threads = threads or torch.get_num_threads()
        weights = file.with_suffix(".bin")
        self.bytes = sum(part.stat().st_size for part in (file, weights) if part.is_file())
        core = openvino.Core()
        name = self.device.upper()
        if name.partition(".")[0] not in {each.partition(".")[0] for each in core.available_devices}:
            found = ", ".join(core.available_devices).lower()
            raise ModelError(f"device: not supported by this OpenVINO, got '{device}' (found: {found}).")
        if objective == "throughput" and name != "CPU":
            raise ModelError(f"objective: throughput is for CPUs, but {file} runs on {self.device}. Omit it.")
        self._options: dict[str, str | int] = {}
        if name == "CPU":
            self._options = {"INFERENCE_NUM_THREADS": self.threads, PRECISION_HINT[1]: "f32"}
        with wrap_library_errors(ModelError, f"{file} cannot be loaded by OpenVINO", limit=300):
            self._model = core.read_model(file)
            if self._model.has_rt_info(list(PRECISION_HINT)):  # ignored by compile_model (openvino 2026.4)
                self._options[PRECISION_HINT[1]] = self._model.get_rt_info(list(PRECISION_HINT)).astype(str)
            self._size = _image_shape(self._model)
            names = [output.get_names() for output in self._model.outputs]
            self._output = next((index for index, known in enumerate(names) if "logits" in known), 0)
            known = self._model.outputs[self._output].partial_shape
        if self._size is None:
            raise ModelError(f"{file} is not an image classifier: it has other inputs than pixel values.")
        if len(known) != 2 or known[1].is_dynamic or classes not in (None, known[1].get_length()):
            raise ModelError(
                f"{file} has the output {known}, but config.json names {classes} classes. Use the config.json of the"
                " exported checkpoint."
            )
        self._classes = known[1].get_length()
        self._compile_model = partial(core.compile_model, device_name=name)
        self._lock = threading.Lock()  # an infer request runs one batch at a time
        self._streams = None  # queue of a compiled model with several streams
        self._step = None  # images per stream, None for an equal part of the batch
        # A fixed batch of 1 is about a tenth faster than a dynamic one (DINOv2-S at 224 px, openvino 2026.4).
        with wrap_library_errors(ModelError, f"{file} cannot be compiled by OpenVINO", limit=300):
            self._single = self._compile(1).create_infer_request()
            if objective == "throughput" and self.threads > 1:
                self._divide_where_faster(openvino)

    def _compile(self, batch_size: int, streams: int | None = None):
        """Compile the model.

        Args:
            batch_size: fixed batch size, -1 for a dynamic one.
            streams: number of batches that run at a time; None for one that uses all threads.
        """
        model = self._model.clone()
        model.reshape({0: [batch_size, *self._size]})
        options = {"PERFORMANCE_HINT": "LATENCY"} if streams is None else {"NUM_STREAMS": streams}
        return self._compile_model(model, config={**self._options, **options})

    @cached_property
    def _batches(self):
        """Return the infer request for batches, compiled on first use."""
        return self._compile(-1).create_infer_request()

    def _divide_where_faster(self, openvino) -> None:
        """Measure one stream against one per thread, and keep what is faster."""
        dynamic, single = (openvino.AsyncInferQueue(self._compile(size, self.threads)) for size in (-1, 1))
        ways = {
            f"one stream of {self.threads} threads": (None, None),
            f"{self.threads} streams of one thread, a part of the batch each": (dynamic, None),
            f"{self.threads} streams of one thread, image by image": (single, 1),
        }
        images = 4 * self.threads
        sizes = [MEASURED_SIZE if size == -1 else size for size in self._size]
        batch = np.random.default_rng(0).random((images, *sizes), dtype=np.float32)

        def run(way: str) -> None:
            self._streams, self._step = ways[way]
            self(batch)

        self._streams, self._step = ways[fastest(self.file, run, list(ways), images)]

    def __call__(self, batch: np.ndarray, texts: dict[str, np.ndarray] | None = None) -> np.ndarray:
        """Compute logits (batch, classes) float32.

        Args:
            batch: pixel values (batch, 3, height, width) float32.
            texts: not supported by OpenVINO files.
        """
        if texts:
            raise ModelError(f"{self.file}: texts are not supported.")
        check_image_shape(self.file, batch.shape[1:], self._size)
        batch = np.ascontiguousarray(batch, np.float32)
        failed = f"{self.file} failed on a batch of shape {batch.shape}"
        with self._lock, wrap_library_errors(ModelError, failed, limit=300):
            if self._streams is not None and len(batch) > 1:
                return self._divide(batch)
            request = self._single if len(batch) == 1 else self._batches
            return request.infer({0: batch})[self._output]

    def _divide(self, batch: np.ndarray) -> np.ndarray:
        """Compute the logits of a batch with a part of it in each stream."""
        logits = np.empty((len(batch), self._classes), np.float32)

        def copy(request, start: int) -> None:
            part = request.get_output_tensor(self._output).data
            logits[start : start + len(part)] = part

        self._streams.set_callback(copy)
        step = self._step or -(-len(batch) // len(self._streams))
        for start in range(0, len(batch), step):
            self._streams.start_async({0: batch[start : start + step]}, start)
        self._streams.wait_all()
        return logits


def load_openvino():
    """Import OpenVINO.

    Raises:
        ModelError: OpenVINO is not installed.
    """
    return import_optional("openvino", "openvino", "An OpenVINO file", ModelError)


def _image_shape(model) -> tuple[int, ...] | None:
    """Return (channels, height, width) of an OpenVINO model's only input.

    -1 where a size varies; None if there are other inputs.
    """
    shapes = [value.partial_shape for value in model.inputs]
    if len(shapes) != 1 or len(shapes[0]) != 4 or not model.outputs:
        return None
    return tuple(size.get_length() if size.is_static else -1 for size in list(shapes[0])[1:])
