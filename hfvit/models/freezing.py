"""Freeze the backbone or the first blocks, and keep frozen modules in eval mode."""

import torch
from timm.models import group_parameters
from torch import nn

from hfvit.errors import ModelError


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


def frozen_part(option: str | int) -> str | int:
    """Return what the option `freeze` asks for: `"backbone"`, or a number of blocks."""
    return int(option) if str(option).isdigit() else option


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


class FrozenParts:
    """Mixin of a module: those within it that have weights and train none of them stay in evaluation mode."""

    _frozen_modules: tuple[nn.Module, ...] = ()

    def rest_frozen(self) -> None:
        """Put modules without a weight that trains into evaluation mode, for good: no dropout, no new statistics."""
        within = ((module, list(module.parameters())) for module in self.modules() if module is not self)
        self._frozen_modules = tuple(m for m, own in within if own and not any(p.requires_grad for p in own))
        self.train(self.training)

    def train(self, mode: bool = True):
        """Frozen modules stay in evaluation mode: no dropout, no moving statistics."""
        super().train(mode)
        for module in self._frozen_modules:
            module.eval()
        return self
