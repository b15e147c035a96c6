"""PyTorch and ONNX Runtime backends."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from hfvit.errors import ModelError, one_line, wrap_library_errors
from hfvit.inference.execution_providers import CPU, CUDA, RTX, TENSORRT, Providers, start_session
from hfvit.utils.global_state import tf32_mode
from hfvit.utils.threads import torch_threads

logger = logging.getLogger(__name__)

# latency: all threads for one batch after the other; throughput: batches divided between threads where that is faster.
OBJECTIVES = ("latency", "throughput")
MEASUREMENTS = 2  # of each way to run a batch, after a warm-up
MEASURED_SIZE = 224  # height and width for a graph that takes any
TYPES = {"tensor(float16)": torch.float16, "tensor(uint8)": torch.uint8, "tensor(int64)": torch.int64}


class TorchBackend:
    """Run a transformers image classifier.

    Args:
        model: image classifier.
        device: PyTorch device; None is CUDA if available, else the CPU.
        threads: CPU threads; None is PyTorch's number.

    Raises:
        ModelError: PyTorch cannot use the device.
    """

    takes_pixels = False

    def __init__(self, model: torch.nn.Module, device: str | None = None, threads: int | None = None):
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.model = model.to(self.device).eval()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ModelError(f"device: PyTorch cannot use '{device}': {one_line(error)}") from error
        self.tf32 = True if self.device.startswith("cuda") else None  # as in training
        self.threads = threads or torch.get_num_threads()
        self.bytes = sum(value.numel() * value.element_size() for value in model.state_dict().values())

    @torch.inference_mode()
    def __call__(self, batch: np.ndarray, texts: dict[str, np.ndarray] | None = None) -> np.ndarray:
        """Compute logits (batch, classes) float32.

        Args:
            batch: pixel values (batch, 3, height, width) float32.
            texts: text inputs of an image-text model by name, (batch, tokens) int64.

        Raises:
            ModelError: the model fails, such as one of gray images.
        """
        failed = f"{type(self.model).__name__} failed on a batch of shape {batch.shape}"
        with torch_threads(self.threads), tf32_mode(self.tf32):
            pixel_values = torch.from_numpy(batch).to(self.device, self.model.dtype)
            text_inputs = {name: torch.from_numpy(values).to(self.device) for name, values in (texts or {}).items()}
            with wrap_library_errors(ModelError, failed, limit=300):
                return self.model(pixel_values, **text_inputs).logits.float().cpu().numpy()


class OnnxBackend:
    """Run an ONNX file with ONNX Runtime.

    The first input is `pixel_values` (batch, 3, height, width), or `pixels` (batch, height, width, 3) uint8 of a graph
    with preprocessing. Text inputs (batch, tokens) int64 may follow. A graph of fixed batch size gets split
    batches.

    Args:
        file: ONNX file.
        classes: number of classes of the model's configuration.
        device: "cpu", "cuda" or "cuda:N"; None is CUDA if available, else the CPU.
        threads: CPU threads; None is PyTorch's number.
        providers: ONNX Runtime's execution providers instead of `device`.
        objective: "throughput" to measure whether one session per thread, each with a part of the batch, is faster on
            this CPU, and to use them if so, with threads that do not spin; "latency" or None for one session with all
            threads, as on other devices and for texts.
        prepack: let ONNX Runtime copy the weights to a faster layout on a CPU; without, it takes less memory.

    Attributes:
        memory: PyTorch device of the session's memory; tensors there are inputs without a copy (`IOBinding`).

    Raises:
        ModelError: the file is not an image classifier with this number of classes, or cannot run on the device.
    """

    def __init__(
        self,
        file: Path,
        classes: int,
        device: str | None = None,
        threads: int | None = None,
        providers: Providers | None = None,
        objective: str | None = None,
        prepack: bool = True,
    ):
        import onnxruntime

        self.file = file
        self.threads = threads or torch.get_num_threads()
        if providers is not None and device is not None:
            raise ModelError(
                f"device: not allowed together with providers, got '{device}' for {file}. Omit it, and select a GPU"
                f" with ('{CUDA}', {{'device_id': 1}})."
            )
        self._prepack = prepack
        options = session_options(self.threads, objective != "throughput", prepack)
        external = (file.with_name(file.name + suffix) for suffix in (".data", "_data"))
        parts = [file, *(part for part in external if part.is_file())]
        if providers is None:
            self.device, providers = _providers(device, onnxruntime.get_available_providers())
            with wrap_library_errors(ModelError, f"{file} cannot be loaded by ONNX Runtime"):
                self.session = onnxruntime.InferenceSession(file, options, providers=providers)
            if self.device.startswith("cuda") and CUDA not in self.session.get_providers():
                raise ModelError(f"device: ONNX Runtime could not start CUDA for {file}. Pass device cpu.")
        else:
            self.session = start_session(file, parts, options, providers)
            first = self.session.get_providers()[0]
            self.device = "cpu" if first == CPU else first.removesuffix("ExecutionProvider")
        self.bytes = sum(part.stat().st_size for part in parts)
        self._read_signature(classes)
        self.memory = memory_device(self.session)
        self._sessions = [self.session]
        self._step = self.input.shape[0] if isinstance(self.input.shape[0], int) else None  # images per call
        self._pool: ThreadPoolExecutor | None = None
        if objective == "throughput":
            if self.device != "cpu":
                raise ModelError(f"objective: throughput is for CPUs, but {file} runs on {self.device}. Omit it.")
            if self.text_inputs:
                raise ModelError(f"objective: throughput is for image models, but {file} takes texts, too. Omit it.")
            if self.threads > 1:
                self._divide_where_faster(onnxruntime, providers)

    def _read_signature(self, classes: int) -> None:
        """Read the graph's inputs and output, or raise `ModelError`."""
        file = self.file
        with wrap_library_errors(ModelError, f"{file}: inputs and outputs cannot be read"):
            inputs = self.session.get_inputs()
            outputs = self.session.get_outputs()
            if not inputs or not outputs:
                raise ModelError(f"{file} is not an image classifier: it has no inputs or no outputs.")
            for value in (*inputs, *outputs):  # names that are not UTF-8 raise where they are read
                _ = value.name, value.type, value.shape
        self.text_inputs = [value.name for value in inputs[1:]]
        if len(inputs[0].shape) != 4 or not set(self.text_inputs) <= {"input_ids", "attention_mask"}:
            raise ModelError(f"{file} is not an image classifier: its inputs are {_signature(inputs)}.")
        self.input = inputs[0]
        self.output = next((output for output in outputs if output.name == "logits"), outputs[0])
        self.takes_pixels = self.input.type == "tensor(uint8)"
        self._dtype = {"tensor(float16)": np.float16, "tensor(uint8)": np.uint8}.get(self.input.type, np.float32)
        known = self.output.shape[1] if len(self.output.shape) == 2 else -1
        if isinstance(known, int) and known != classes:
            raise ModelError(
                f"{file} has the output {_signature([self.output])}, but config.json names {classes} classes. Use the"
                " config.json of the exported checkpoint."
            )
        self._classes = classes

    def _divide_where_faster(self, onnxruntime, providers) -> None:
        """Measure one session against one per thread, and keep what is faster."""
        sessions = [
            onnxruntime.InferenceSession(self.file, session_options(1, False, self._prepack), providers=providers)
            for _ in range(self.threads)
        ]
        ways = {f"one session of {self.threads} threads": ([self.session], self._step)}
        ways[f"{self.threads} sessions of one thread, a part of the batch each"] = (sessions, self._step)
        if self._step is None:
            ways[f"{self.threads} sessions of one thread, image by image"] = (sessions, 1)
        sizes = [size if isinstance(size, int) else MEASURED_SIZE for size in self.input.shape[1:]]
        images = 2 * self.threads * (self._step or 1)
        batch = np.random.default_rng(0).random((images, *sizes), dtype=np.float32)
        self._pool = ThreadPoolExecutor(self.threads, "sessions")

        def run(way: str) -> None:
            self._sessions, self._step = ways[way]
            self(batch)

        self._sessions, self._step = ways[fastest(self.file, run, list(ways), images)]

    def __call__(
        self, batch: np.ndarray | torch.Tensor, texts: dict[str, np.ndarray | torch.Tensor] | None = None
    ) -> np.ndarray | torch.Tensor:
        """Compute logits (batch, classes) float32.

        Those of tensors on `memory` are a tensor there.

        Args:
            batch: pixel values or uint8 images, as the graph's input. A tensor is not copied through host memory.
            texts: text inputs of an image-text model by name, (batch, tokens) int64.
        """
        texts = texts or {}
        if set(texts) != set(self.text_inputs):
            raise ModelError(f"{self.file}: the text inputs must be {self.text_inputs}, got {sorted(texts)}.")
        check_image_shape(self.file, batch.shape[1:], self.input.shape[1:])
        if isinstance(batch, torch.Tensor):
            return self._run_bound({self.input.name: batch, **texts})
        batch = np.ascontiguousarray(batch, dtype=self._dtype)
        feed = {self.input.name: batch, **texts}
        is_fixed = isinstance(self.input.shape[0], int)
        if not is_fixed and (len(batch) == 1 or len(self._sessions) == 1):
            logits = self._run(self.session, feed)
        else:
            step = self._step or -(-len(batch) // len(self._sessions))
            padding = -len(batch) % step if is_fixed else 0  # with the last image
            rows = np.minimum(np.arange(len(batch) + padding), len(batch) - 1)
            starts = range(0, len(rows), step)
            parts = [{name: values[rows[start : start + step]] for name, values in feed.items()} for start in starts]
            sessions = [self._sessions[index % len(self._sessions)] for index in range(len(parts))]
            run = self._pool.map if len(self._sessions) > 1 else map
            logits = np.concatenate(list(run(self._run, sessions, parts)))[: len(batch)]
        if logits.shape != (len(batch), self._classes):
            raise ModelError(
                f"{self.file}: logits must have the shape {(len(batch), self._classes)}, got {logits.shape}."
            )
        return logits

    def _run(self, session, feed: dict[str, np.ndarray]) -> np.ndarray:
        shapes = ", ".join(str(values.shape) for values in feed.values())
        with wrap_library_errors(ModelError, f"{self.file} failed on a batch of shape {shapes}"):
            return session.run([self.output.name], feed)[0].astype(np.float32, copy=False)

    def _run_bound(self, feed: dict[str, torch.Tensor]) -> torch.Tensor:
        """Run the session on tensors in the memory of its device, through `IOBinding`."""
        images = len(feed[self.input.name])
        step = self.input.shape[0] if isinstance(self.input.shape[0], int) else images
        logits = [torch.empty(0, self._classes, device=self.memory)]
        for start in range(0, images, step or 1):
            # A graph of fixed batch size gets the last image again.
            rows = torch.arange(start, start + step).clamp(max=images - 1)
            part = feed if step == images else {key: value[rows.to(value.device)] for key, value in feed.items()}
            logits.append(self._bound(part, step))
        return torch.cat(logits)[:images]

    def _bound(self, feed: dict[str, torch.Tensor], images: int) -> torch.Tensor:
        """Run one call; `feed` has `images` rows."""
        types = {value.name: TYPES.get(value.type, torch.float32) for value in self.session.get_inputs()}
        tensors = {name: value.to(types[name]).contiguous() for name, value in feed.items()}
        for name, value in tensors.items():
            if value.device != self.memory:
                raise ModelError(f"{name}: must be on {self.memory}, got a tensor on {value.device}.")
        logits = torch.empty(
            (images, self._classes), dtype=TYPES.get(self.output.type, torch.float32), device=self.memory
        )
        binding = self.session.io_binding()
        place = (self.memory.type, self.memory.index or 0)
        for bind, values in ((binding.bind_input, tensors), (binding.bind_output, {self.output.name: logits})):
            for name, value in values.items():
                bind(name, *place, numpy_type(value.dtype), tuple(value.shape), value.data_ptr())
        if self.memory.type == "cuda":
            torch.cuda.current_stream(self.memory).synchronize()  # ONNX Runtime has a stream of its own
        with wrap_library_errors(ModelError, f"{self.file} failed on a batch of {images} images"):
            self.session.run_with_iobinding(binding)
        return logits.float()


def memory_device(session) -> torch.device:
    """Return the device whose memory an ONNX Runtime session reads without a copy."""
    options = session.get_provider_options()
    provider = next((name for name in session.get_providers() if name in (CUDA, TENSORRT, RTX)), None)
    if provider is None:
        return torch.device("cpu")
    return torch.device("cuda", int(options.get(provider, {}).get("device_id", 0)))


def numpy_type(dtype: torch.dtype) -> type:
    """Return the NumPy type of a PyTorch type."""
    return torch.empty(0, dtype=dtype).numpy().dtype.type


def session_options(threads: int = 0, spins: bool = True, prepack: bool = True):
    """Return options of an ONNX Runtime session.

    Args:
        threads: CPU threads; 0 is one for each physical core.
        spins: whether threads wait for work in a loop, which is faster but takes the core from other work.
        prepack: copy weights to a faster layout.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only, without warnings about optimizations
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins)))
    options.add_session_config_entry("session.disable_prepacking", str(int(not prepack)))
    return options


def check_image_shape(file: Path, shape: Sequence[int], expected: Sequence[int | str]) -> None:
    """Raise `ModelError` unless images have the shape that a file takes.

    Args:
        file: the exported file.
        shape: shape of an image.
        expected: shape that the file takes; -1 or a name where it takes any size.
    """
    sizes = zip(shape, expected, strict=True)
    if any(isinstance(wanted, int) and wanted not in (-1, size) for size, wanted in sizes):
        raise ModelError(
            f"{file}: images must have the shape {tuple(expected)}, got {tuple(shape)} from the preprocessing. Use the"
            " preprocessor_config.json of the exported checkpoint."
        )


def fastest(file: Path, run: Callable[[str], None], ways: list[str], images: int) -> str:
    """Measure ways to run a batch, log the figures, and return the fastest one.

    Args:
        file: the model's file, for the log.
        run: runs the batch in a way.
        ways: descriptions of the ways.
        images: number of images in the batch.
    """
    seconds = {}
    for way in ways:
        run(way)  # warm-up
        measured = []
        for _ in range(MEASUREMENTS):
            started = time.perf_counter()
            run(way)
            measured.append(time.perf_counter() - started)
        seconds[way] = min(measured)
    best = min(seconds, key=seconds.get)
    figures = "; ".join(f"{way}: {images / value:,.1f} images/s" for way, value in seconds.items())
    logger.info("%s: %s (%s)", file.name, best, figures)
    return best


def _providers(device: str | None, available: list[str]) -> tuple[str, list]:
    """Return the device and its execution providers; CUDA is the default if available."""
    has_cuda = CUDA in available
    device = device or ("cuda" if has_cuda and torch.cuda.is_available() else "cpu")
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return device, [CPU]
    if kind != "cuda" or not has_cuda or not (index or "0").isdecimal():
        install = ", or install onnxruntime-gpu" if kind == "cuda" else ""
        raise ModelError(f"device: not supported by this ONNX Runtime, got '{device}'. Pass device cpu{install}.")
    return device, [(CUDA, {"device_id": int(index or 0)}), CPU]


def _signature(values) -> str:
    return ", ".join(f"{value.name} {value.type} {list(value.shape)}" for value in values)
