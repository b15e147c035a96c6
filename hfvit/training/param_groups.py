"""Optimizer parameter groups: weight decay and layer-wise learning rates."""

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn


def build_param_groups(
    timm_model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict]:
    """Parameter groups for `torch.optim.AdamW` and its kin, highest learning rate first.

    Biases, one-dimensional weights and the names in the model's `no_weight_decay()` (position embeddings, class
    tokens) do not decay. With `layer_decay` below 1 each layer learns at `layer_decay` times the rate of the one
    above it (BEiT, https://arxiv.org/abs/2106.08254). timm states that factor as `lr_scale`, which torch's optimizers
    ignore, so it is multiplied into `lr` here.
    """
    no_decay = timm_model.no_weight_decay() if hasattr(timm_model, "no_weight_decay") else ()
    if layer_decay < 1.0:
        groups = param_groups_layer_decay(timm_model, weight_decay, no_decay, layer_decay=layer_decay)
    else:
        groups = param_groups_weight_decay(timm_model, weight_decay, no_weight_decay_list=no_decay)
    groups = [
        {
            "params": group["params"],
            "weight_decay": group["weight_decay"],
            "lr": learning_rate * group.get("lr_scale", 1.0),
        }
        for group in groups
    ]
    # The Trainer logs the first group's rate: let that be the recipe's `learning_rate`.
    return sorted(groups, key=lambda group: -group["lr"])


def groups_beside(model: nn.Module, timm_model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict]:
    """Parameter groups of what `model` has beside its `timm_model`, at the full rate; none for an image classifier.

    Vectors (biases, norms) do not decay, as in `build_param_groups`.
    """
    within = {id(parameter) for parameter in timm_model.parameters()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in within]
    matrices, vectors = [p for p in others if p.ndim > 1], [p for p in others if p.ndim <= 1]
    groups = ((matrices, weight_decay), (vectors, 0.0))
    return [{"params": own, "weight_decay": decay, "lr": learning_rate} for own, decay in groups if own]
