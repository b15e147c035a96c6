"""Convolutions in the memory format channels_last (NHWC), as in timm."""

import torch
from torch import nn
from transformers import TrainerCallback


def use_channels_last(module: nn.Module) -> None:
    """Convert the weights of 2D convolutions; their outputs have the same format."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)


class StateLayout(TrainerCallback):
    """Give the optimizer's state the strides of its weights when training begins.

    A checkpoint has the strides that it was saved with, which differ if `channels_last` has changed since. Fused
    optimizers read weight and state in the order of the memory.
    """

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        for weight, values in optimizer.state.items():
            for name, value in values.items():
                if torch.is_tensor(value) and value.shape == weight.shape and value.stride() != weight.stride():
                    values[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
