"""ExecuTorch backend."""

import threading
from pathlib import Path

import numpy as np
import torch

from hfvit.errors import ModelError, wrap_library_errors
from hfvit.inference.backends import check_image_shape
from hfvit.utils.optional import import_optional


class ExecuTorchBackend:
    """Run an ExecuTorch program with its Python runtime, on all cores of a CPU.

    The input of its method `forward` is `pixel_values` (batch, 3, height, width) float32, the output the logits.
    Larger batches than the program was exported for are divided.

    Args:
        file: .pte file.
        classes: number of classes of the model's configuration, None to accept any.
        device: "cpu" or None.

    Raises:
        ModelError: ExecuTorch is not installed, or the file is not an image classifier with this number of classes.
    """

    takes_pixels = False
    text_inputs: tuple[str, ...] = ()
    device = "cpu"

    def __init__(self, file: Path, classes: int | None = None, device: str | None = None):
        runtime = load_executorch()
        if device not in (None, "cpu"):
            raise ModelError(f"device: ExecuTorch files run on the cpu, got '{device}'.")
        self.file = file
        self.bytes = file.stat().st_size
        self.threads = torch.get_num_threads()  # ExecuTorch's own pool, which cannot be limited, has as many
        with wrap_library_errors(ModelError, f"{file} cannot be loaded by ExecuTorch", limit=300):
            self._program = runtime.Runtime.get().load_program(file)
            self._method = self._program.load_method("forward")
            description = self._method.metadata
            inputs = [description.input_tensor_meta(index).sizes() for index in range(description.num_inputs())]
            outputs = [description.output_tensor_meta(index).sizes() for index in range(description.num_outputs())]
        if len(inputs) != 1 or len(inputs[0]) != 4 or not outputs or len(outputs[0]) != 2:
            raise ModelError(f"{file} is not an image classifier: it maps {inputs} to {outputs}.")
        self._max_batch, *self._size = inputs[0]
        if classes not in (None, outputs[0][1]):
            raise ModelError(
                f"{file} has {outputs[0][1]} logits, but config.json names {classes} classes. Use the config.json of"
                " the exported checkpoint."
            )
        self._lock = threading.Lock()  # a method runs one batch at a time

    def __call__(self, batch: np.ndarray, texts: dict[str, np.ndarray] | None = None) -> np.ndarray:
        """Compute logits (batch, classes) float32.

        Args:
            batch: pixel values (batch, 3, height, width) float32.
            texts: not supported by ExecuTorch files.
        """
        if texts:
            raise ModelError(f"{self.file}: texts are not supported.")
        check_image_shape(self.file, batch.shape[1:], self._size)
        pixel_values = torch.from_numpy(np.ascontiguousarray(batch, np.float32))
        failed = f"{self.file} failed on a batch of shape {batch.shape}"
        with self._lock, wrap_library_errors(ModelError, failed, limit=300):
            parts = [self._method.execute([part])[0].clone() for part in pixel_values.split(self._max_batch)]
        return torch.cat(parts).numpy()


def load_executorch():
    """Import ExecuTorch's runtime.

    Raises:
        ModelError: ExecuTorch is not installed.
    """
    return import_optional("executorch.runtime", "executorch", "A .pte file", ModelError)
