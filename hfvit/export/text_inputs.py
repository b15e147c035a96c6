"""Example text inputs for exporting image-text models."""

import torch
from torch.export import Dim

from hfvit.artifacts.export_record import TensorInfo
from hfvit.errors import ModelError

TOKEN_AXIS = "tokens"
TRACED_TOKENS = 3  # torch.export would specialize a length of 1


def reads_texts(model: torch.nn.Module) -> bool:
    """Return whether a model takes texts beside images."""
    return hasattr(model, "example_texts")


def check_reads_texts(model: torch.nn.Module, **wanted: bool) -> None:
    """Raise `ModelError` for enabled options that image-text models do not support.

    Args:
        model: the model to export.
        **wanted: whether each option is enabled.
    """
    for option, is_wanted in wanted.items():
        if is_wanted and reads_texts(model):
            raise ModelError(
                f"{option}: not supported for image-text models. Export them to ONNX in fp32, fp16 or bf16."
            )


def traced_texts(model: torch.nn.Module, batch: int, batch_axis: Dim | None) -> tuple[dict, dict]:
    """Return example texts for tracing and their dynamic axes, or two empty dicts.

    Args:
        model: the model to export.
        batch: batch size.
        batch_axis: dynamic batch axis, or None for a fixed batch size.
    """
    if not reads_texts(model):
        return {}, {}
    device = next(model.parameters()).device
    texts = model.example_texts(batch, TRACED_TOKENS, torch.Generator().manual_seed(0))
    axes = {1: Dim(TOKEN_AXIS, min=1, max=max(TRACED_TOKENS, model.config.max_text_length))}
    axes |= {} if batch_axis is None else {0: batch_axis}
    return {name: values.to(device) for name, values in texts.items()}, dict.fromkeys(texts, axes)


def compared_texts(model: torch.nn.Module, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return random texts to compare with PyTorch, longer ones for larger batches.

    Args:
        model: the exported model.
        batch: batch size.
        generator: source of random token ids.
    """
    if not reads_texts(model):
        return {}
    return model.example_texts(batch, min(model.config.max_text_length, 2 * batch - 1), generator)


def text_inputs(model: torch.nn.Module, batch: int | str) -> list[TensorInfo] | None:
    """Return name, type and shape of the text inputs, None for image models."""
    if not reads_texts(model):
        return None
    names = ("input_ids", "attention_mask")
    return [TensorInfo(name=name, type="int64", shape=[batch, TOKEN_AXIS]) for name in names]
