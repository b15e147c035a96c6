"""Optimizer parameter groups: weight decay and layer-wise learning rates."""

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from hfvit.models.freezing import classifier_parameters, layer_ids


def build_param_groups(
    timm_model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    with_fallback: bool = False,
) -> list[dict]:
    """Build timm's parameter groups for PyTorch optimizers.

    The group with the highest learning rate comes first.

    timm stores the factor of layer-wise learning rates as `lr_scale`, which PyTorch's optimizers ignore, so it is
    multiplied into `lr`.

    Args:
        timm_model: timm network.
        learning_rate: learning rate of the last layer.
        weight_decay: weight decay, except for biases, one-dimensional weights and the names in the model's
            `no_weight_decay()` (position embeddings, class tokens).
        layer_decay: factor of the learning rate from each layer to the one below (BEiT,
            https://arxiv.org/abs/2106.08254); 1 is off.
        with_fallback: mark the groups of stem, head and position embeddings with timm's `use_fallback`, for Muon,
            which orthogonalizes the updates of the other matrices and convolutions.
    """
    no_decay = timm_model.no_weight_decay() if hasattr(timm_model, "no_weight_decay") else ()
    options = {"weight_decay": weight_decay, "no_weight_decay_list": no_decay}
    if with_fallback:
        options |= {"fallback_list": _stem_and_head(timm_model), "fallback_no_weight_decay": True}
    if layer_decay < 1.0:
        groups = param_groups_layer_decay(timm_model, layer_decay=layer_decay, **options)
    else:
        groups = param_groups_weight_decay(timm_model, **options)
    for group in groups:
        group["lr"] = learning_rate * group.pop("lr_scale", 1.0)
    # The Trainer logs the rate of the first group, which should be the recipe's `learning_rate`.
    return sorted(groups, key=lambda group: -group["lr"])


def _stem_and_head(timm_model: nn.Module) -> list[str]:
    """Return the names of parameters of the first and the last layer."""
    head = {id(p) for p in classifier_parameters(timm_model)}
    layer_of = layer_ids(timm_model) if hasattr(timm_model, "group_matcher") else {}
    return [name for name, p in timm_model.named_parameters() if id(p) in head or layer_of.get(name) == 0]


def groups_beside(
    model: nn.Module, timm_model: nn.Module, learning_rate: float, weight_decay: float, with_fallback: bool = False
) -> list[dict]:
    """Build parameter groups of all trainable parameters outside the timm network.

    Args:
        model: classifier, such as an image-text model.
        timm_model: timm network of the classifier.
        learning_rate: learning rate.
        weight_decay: weight decay of matrices; biases and norms have none.
        with_fallback: mark the groups with timm's `use_fallback`, as many matrices are embeddings of tokens.

    Returns:
        Groups, none for an image classifier.
    """
    within = {id(parameter) for parameter in timm_model.parameters()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in within]
    matrices = [p for p in others if p.ndim > 1]
    vectors = [p for p in others if p.ndim <= 1]
    groups = ((matrices, weight_decay), (vectors, 0.0))
    marks = {"use_fallback": True} if with_fallback else {}
    return [{"params": own, "weight_decay": decay, "lr": learning_rate, **marks} for own, decay in groups if own]
