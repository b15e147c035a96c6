"""PyTorch and ONNX Runtime backends."""

from pathlib import Path

import numpy as np
import torch

from hfvit.errors import ModelError, one_line, wrap_library_errors
from hfvit.inference.execution_providers import CPU, CUDA, Providers, start_session


class TorchBackend:
    """A transformers image classifier."""

    takes_pixels = False

    def __init__(self, model: torch.nn.Module, device: str | None = None, threads: int | None = None):
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.model = model.to(self.device).eval()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ModelError(f"device: PyTorch cannot use '{device}' here: {one_line(error)}") from error
        self.threads = threads or torch.get_num_threads()
        self.bytes = sum(value.numel() * value.element_size() for value in model.state_dict().values())

    @torch.inference_mode()
    def __call__(self, batch: np.ndarray, texts: dict[str, np.ndarray] | None = None) -> np.ndarray:
        """Logits `(batch, classes)` float32 of pixel values `(batch, 3, height, width)` float32.

        `texts` are the further inputs of a model that reads them, `(batch, tokens)` int64.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)  # the only way there is, and it holds for the whole process
        try:
            pixel_values = torch.from_numpy(batch).to(self.device, self.model.dtype)
            further = {name: torch.from_numpy(values).to(self.device) for name, values in (texts or {}).items()}
            return self.model(pixel_values, **further).logits.float().cpu().numpy()
        finally:
            torch.set_num_threads(before)


class OnnxBackend:
    """An ONNX Runtime session.

    The graph's one input is `pixel_values` `(batch, 3, height, width)`, or `pixels` uint8 `(batch, height, width, 3)`
    where preprocessing is inside; those of texts may follow, `(batch, tokens)` int64. A graph that was traced for one
    batch size is fed that many at a time. `providers` are ONNX Runtime's, in the place of `device`.
    """

    def __init__(
        self,
        file: Path,
        classes: int,
        device: str | None = None,
        threads: int | None = None,
        providers: Providers | None = None,
    ):
        import onnxruntime

        self.file, self.threads = file, threads or torch.get_num_threads()
        if providers is not None and device is not None:
            raise ModelError(
                f"device: the providers say where {file} runs; leave device out, and name a GPU as in"
                f" ('{CUDA}', {{'device_id': 1}})."
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3  # errors; its warnings are about fusions it did not need
        beside = (file.with_name(file.name + suffix) for suffix in (".data", "_data"))
        parts = [file, *(part for part in beside if part.is_file())]
        if providers is None:
            self.device, providers = _providers(device, onnxruntime.get_available_providers())
            with wrap_library_errors(ModelError, f"{file} is no ONNX file that ONNX Runtime can run"):
                self.session = onnxruntime.InferenceSession(file, options, providers=providers)
            if self.device.startswith("cuda") and CUDA not in self.session.get_providers():
                raise ModelError(f"device: ONNX Runtime could not start CUDA for {file}; use the device cpu.")
        else:
            self.session = start_session(file, parts, options, providers)
            first = self.session.get_providers()[0]
            self.device = "cpu" if first == CPU else first.removesuffix("ExecutionProvider")
        self.bytes = sum(part.stat().st_size for part in parts)

        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        self.text_inputs = [value.name for value in inputs[1:]]
        if len(inputs[0].shape) != 4 or not set(self.text_inputs) <= {"input_ids", "attention_mask"}:
            raise ModelError(f"{file} is no image classifier: it takes {_signature(inputs)}, not one batch of images.")
        self.input = inputs[0]
        self.output = next((output for output in outputs if output.name == "logits"), outputs[0])
        self.takes_pixels = self.input.type == "tensor(uint8)"
        self._dtype = {"tensor(float16)": np.float16, "tensor(uint8)": np.uint8}.get(self.input.type, np.float32)
        known = self.output.shape[1] if len(self.output.shape) == 2 else -1
        if isinstance(known, int) and known != classes:
            raise ModelError(
                f"{file} gives {_signature([self.output])}, but its config.json names {classes} classes; take the"
                " config.json of the checkpoint that was exported."
            )
        self._classes = classes

    def __call__(self, batch: np.ndarray, texts: dict[str, np.ndarray] | None = None) -> np.ndarray:
        """Logits `(batch, classes)` float32 of one batch, of pixel values or of pixels as the graph takes them.

        `texts` are `(batch, tokens)` int64, by the names of `text_inputs`.
        """
        texts = texts or {}
        if set(texts) != set(self.text_inputs):
            raise ModelError(f"{self.file} takes the texts {self.text_inputs}, but was given {sorted(texts)}.")
        for size, expected in zip(batch.shape[1:], self.input.shape[1:], strict=True):
            if isinstance(expected, int) and size != expected:
                raise ModelError(
                    f"{self.file} takes images of shape {tuple(self.input.shape[1:])}, but its preprocessing made"
                    f" {batch.shape[1:]}; take the preprocessor_config.json of the checkpoint that was exported."
                )
        batch = np.ascontiguousarray(batch, dtype=self._dtype)
        fixed = self.input.shape[0] if isinstance(self.input.shape[0], int) else None
        if fixed is None:
            logits = self._run({self.input.name: batch, **texts})
        else:
            rows = np.minimum(np.arange(len(batch) + -len(batch) % fixed), len(batch) - 1)  # the last one again
            feed = {self.input.name: batch, **texts}
            parts = [
                self._run({name: values[rows[start : start + fixed]] for name, values in feed.items()})
                for start in range(0, len(rows), fixed)
            ]
            logits = np.concatenate(parts)[: len(batch)]
        if logits.shape != (len(batch), self._classes):
            raise ModelError(f"{self.file} gave logits of shape {logits.shape} for {len(batch)} images.")
        return logits

    def _run(self, feed: dict[str, np.ndarray]) -> np.ndarray:
        shapes = ", ".join(str(values.shape) for values in feed.values())
        with wrap_library_errors(ModelError, f"{self.file} failed on a batch of shape {shapes}"):
            return self.session.run([self.output.name], feed)[0].astype(np.float32, copy=False)


def _providers(device: str | None, available: list[str]) -> tuple[str, list]:
    """The device and ONNX Runtime's providers for it; CUDA unasked only where both the provider and a GPU exist."""
    has_cuda = CUDA in available
    device = device or ("cuda" if has_cuda and torch.cuda.is_available() else "cpu")
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return device, [CPU]
    if kind != "cuda" or not has_cuda or not (index or "0").isdecimal():
        why = "install onnxruntime-gpu, or" if kind == "cuda" else "it has cpu and cuda;"
        raise ModelError(f"device: this ONNX Runtime cannot use '{device}'; {why} use the device cpu.")
    return device, [(CUDA, {"device_id": int(index or 0)}), CPU]


def _signature(values) -> str:
    return ", ".join(f"{value.name} {value.type} {list(value.shape)}" for value in values)
