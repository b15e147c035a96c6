"""Example text inputs for exporting image-text models."""

import torch
from torch.export import Dim

from hfvit.artifacts.export_record import TensorInfo
from hfvit.errors import ModelError

TOKEN_AXIS = "tokens"
TRACED_TOKENS = 3  # torch.export would fix a length of 1


def reads_texts(model: torch.nn.Module) -> bool:
    return hasattr(model, "example_texts")


def check_reads_texts(model: torch.nn.Module, **wanted: bool) -> None:
    """Raise `ModelError` for one of `wanted` (option -> asked for) where the model reads texts."""
    for option, is_wanted in wanted.items():
        if is_wanted and reads_texts(model):
            raise ModelError(
                f"{option}: not available for a model of images with texts; export it to ONNX in fp32, fp16 or bf16."
            )


def traced_texts(model: torch.nn.Module, batch: int, batch_axis: Dim | None) -> tuple[dict, dict]:
    """Texts to trace `model` with, and their free axes; nothing for a model of images alone."""
    if not reads_texts(model):
        return {}, {}
    device = next(model.parameters()).device
    texts = model.example_texts(batch, TRACED_TOKENS, torch.Generator().manual_seed(0))
    axes = {1: Dim(TOKEN_AXIS, min=1, max=max(TRACED_TOKENS, model.config.max_text_length))}
    axes |= {} if batch_axis is None else {0: batch_axis}
    return {name: values.to(device) for name, values in texts.items()}, dict.fromkeys(texts, axes)


def compared_texts(model: torch.nn.Module, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Texts to compare a graph on: longer ones in larger batches."""
    if not reads_texts(model):
        return {}
    return model.example_texts(batch, min(model.config.max_text_length, 2 * batch - 1), generator)


def text_inputs(model: torch.nn.Module, batch: int | str) -> list[TensorInfo] | None:
    """Name, type and shape of these inputs; None for a model of images alone."""
    if not reads_texts(model):
        return None
    names = ("input_ids", "attention_mask")
    return [TensorInfo(name=name, type="int64", shape=[batch, TOKEN_AXIS]) for name in names]
