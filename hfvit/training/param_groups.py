"""Optimizer parameter groups: weight decay and layer-wise learning rates."""

import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from hfvit.errors import ModelError


def build_param_groups(
    timm_model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict]:
    """Parameter groups for `torch.optim.AdamW` and its kin, highest learning rate first.

    Biases, one-dimensional weights and the names in the model's `no_weight_decay()` (position embeddings, class
    tokens) do not decay. With `layer_decay` below 1 each layer learns at `layer_decay` times the rate of the one
    above it (BEiT, https://arxiv.org/abs/2106.08254). timm states that factor as `lr_scale`, which torch's optimisers
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


def freeze(timm_model: nn.Module, part: str | int) -> None:
    """Stop the gradient of `"backbone"` (all but the classifier) or of the stem and the first `part` blocks.

    Raises `ModelError` where the family has no such blocks.
    """
    if part == "backbone":
        classifier = {id(p) for p in classifier_parameters(timm_model)}
        frozen = [name for name, p in timm_model.named_parameters() if id(p) not in classifier]
    else:
        layer_of = layer_ids(timm_model)
        blocks = block_count(layer_of, timm_model)
        if not 0 < part <= blocks:
            raise ModelError(f"freeze: {part} blocks were asked for, but the model has {blocks}; use 1 to {blocks}.")
        frozen = [name for name, layer in layer_of.items() if layer <= part]
    for name in frozen:
        timm_model.get_parameter(name).requires_grad = False


def groups_beside(model: nn.Module, timm_model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict]:
    """Parameter groups of what `model` has beside its `timm_model`, at the full rate; none for an image classifier.

    Vectors (biases, norms) do not decay, as in `build_param_groups`.
    """
    within = {id(parameter) for parameter in timm_model.parameters()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in within]
    matrices, vectors = [p for p in others if p.ndim > 1], [p for p in others if p.ndim <= 1]
    groups = ((matrices, weight_decay), (vectors, 0.0))
    return [{"params": own, "weight_decay": decay, "lr": learning_rate} for own, decay in groups if own]


def layer_ids(timm_model: nn.Module) -> dict[str, int]:
    """Parameter name -> layer, counted from the stem (0) through the blocks (1, 2, ...) to the head."""
    if not hasattr(timm_model, "group_matcher"):
        raise ModelError(
            f"freeze: not for this family: {type(timm_model).__name__} does not name its blocks; use"
            " `freeze: backbone`."
        )
    return group_parameters(timm_model, timm_model.group_matcher(coarse=False), reverse=True)


def block_count(layer_of: dict[str, int], timm_model: nn.Module) -> int:
    """Layers between the stem and what the classifier belongs to: blocks, or of some networks whole stages."""
    head = {id(p) for p in classifier_parameters(timm_model)}
    of_head = [layer_of[name] for name, p in timm_model.named_parameters() if id(p) in head]
    return min(of_head, default=max(layer_of.values())) - 1  # a tower without a head ends with its last norm


def classifier_parameters(timm_model: nn.Module) -> list[torch.nn.Parameter]:
    """The head's parameters; distilled models have two heads."""
    heads = timm_model.get_classifier()
    return [p for head in (heads if isinstance(heads, tuple) else (heads,)) for p in head.parameters()]
