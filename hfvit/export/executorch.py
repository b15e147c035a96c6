"""`optimum-cli export executorch`: export, validate and save."""

from pathlib import Path

import torch
from torch.export import Dim

from hfvit.artifacts.artifact import EXECUTORCH_SUFFIX
from hfvit.artifacts.export_folder import PACKAGES, file_digest
from hfvit.artifacts.export_record import ExportedFile
from hfvit.export.onnx import (
    BATCH_AXIS,
    CHECKED_BATCHES,
    TRACED_BATCH,
    configured_image_size,
    exporting,
    in_eval_mode,
    input_channels,
    input_tensor,
)
from hfvit.export.parity import check_parity, tolerance
from hfvit.export.pipeline import Export
from hfvit.inference.executorch_backend import load_executorch
from hfvit.utils.environment import installed_versions

FILE = f"model{EXECUTORCH_SUFFIX}"


@in_eval_mode
def export_executorch(
    model: torch.nn.Module,
    path: str | Path,
    *,
    max_batch_size: int = 16,
    atol: float | None = None,
    image_size: tuple[int, int] | None = None,
    verbose: bool = False,
) -> ExportedFile:
    """Export an image classifier to ExecuTorch, and compare it with PyTorch.

    Its method `forward` maps `pixel_values` (batch_size, channels, height, width) to logits (batch_size, classes),
    both float32.

    Args:
        model: image classifier in float32.
        path: .pte file to write.
        max_batch_size: largest batch size, for which the program reserves memory.
        atol: largest difference of a logit from PyTorch's; the default depends on the largest logit.
        image_size: (height, width) in pixels; None reads it from the model's configuration.
        verbose: show the exporter's output and warnings.

    Returns:
        The record of the file for export.json.

    Raises:
        ModelError: ExecuTorch is not installed, the model cannot be exported, or the logits differ from PyTorch's.
    """
    load_executorch()
    from transformers.exporters import ExecutorchConfig, ExecutorchExporter

    path = Path(path)
    shape = (input_channels(model), *(image_size or configured_image_size(model)))
    device = next(model.parameters()).device
    pixel_values = torch.zeros((TRACED_BATCH, *shape), device=device)
    batch = Dim(BATCH_AXIS, min=1, max=max(TRACED_BATCH, max_batch_size))
    config = ExecutorchConfig(backend="xnnpack", dynamic_shapes={"pixel_values": {0: batch}})
    with exporting(model, "ExecuTorch", verbose):
        exported = ExecutorchExporter().export(model, {"pixel_values": pixel_values}, config=config)
        ExecutorchExporter.save_program(exported.program, path)
    parity = check_parity(path, model, shape, CHECKED_BATCHES, tolerance("fp32", atol), path.name)
    return ExportedFile(
        **file_digest(path),
        dtype="fp32",
        versions=installed_versions(PACKAGES),
        input=input_tensor(shape, None, with_preprocessing=False),
        optimized=False,
        with_preprocessing=False,
        parity=parity,
    )


class ExecuTorchExport(Export):
    """Run `export executorch` with the model and the record of its file."""

    def float_files(self, staging: Path) -> None:
        """Export the file."""
        options = self.options
        self.log(f"exporting {FILE}")
        self.files[FILE] = export_executorch(
            self.model,
            staging / FILE,
            max_batch_size=options.max_batch_size,
            atol=options.atol,
            image_size=self.shape[1:],
            verbose=options.verbose,
        )
