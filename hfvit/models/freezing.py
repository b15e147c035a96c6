"""Freeze the backbone or the first blocks, and keep frozen modules in eval mode."""

from numbers import Integral

import torch
from timm.models import group_parameters
from torch import nn

from hfvit.errors import ModelError


def freeze(timm_model: nn.Module, part: str | int) -> None:
    """Set `requires_grad = False` for a part of a timm model.

    Args:
        timm_model: the network.
        part: "backbone" (all but the classifier), or the number of blocks to freeze together with the stem.

    Raises:
        ModelError: the network does not have so many blocks, or does not name them, or `part` is another value.
    """
    if part != "backbone" and not isinstance(part, Integral):
        raise ModelError(f"freeze: must be backbone or a number of blocks, got {part!r}.")
    if part == "backbone":
        classifier = {id(p) for p in classifier_parameters(timm_model)}
        frozen = [name for name, p in timm_model.named_parameters() if id(p) not in classifier]
    else:
        layer_of = layer_ids(timm_model)
        blocks = block_count(layer_of, timm_model)
        if not 0 < part <= blocks:
            raise ModelError(f"freeze: must be between 1 and {blocks}, the number of blocks, got {part}.")
        frozen = [name for name, layer in layer_of.items() if layer <= part]
    for name in frozen:
        timm_model.get_parameter(name).requires_grad = False


def parse_freeze(option: str | int) -> str | int:
    """Convert the option `freeze` to "backbone" or a number of blocks."""
    return int(option) if str(option).isdecimal() else option


def layer_ids(timm_model: nn.Module) -> dict[str, int]:
    """Map parameter names to layers: the stem is 0, blocks follow, the head is last."""
    if not hasattr(timm_model, "group_matcher"):
        raise ModelError(
            f"freeze: {type(timm_model).__name__} does not name its blocks (no group_matcher). Use `freeze: backbone`."
        )
    return group_parameters(timm_model, timm_model.group_matcher(coarse=False), reverse=True)


def block_count(layer_of: dict[str, int], timm_model: nn.Module) -> int:
    """Count the layers between stem and head: blocks, or stages in some networks."""
    head = {id(p) for p in classifier_parameters(timm_model)}
    of_head = [layer_of[name] for name, p in timm_model.named_parameters() if id(p) in head]
    return min(of_head, default=max(layer_of.values())) - 1  # without a head, the last layer is the final norm


def classifier_parameters(timm_model: nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters of the classifier.

    Distilled models and VOLO have two heads.
    """
    heads = timm_model.get_classifier()
    heads = list(heads) if isinstance(heads, tuple) else [heads]
    # VOLO's auxiliary head is named in the configuration only (timm 1.0).
    names = (getattr(timm_model, "pretrained_cfg", None) or {}).get("classifier") or ()
    modules = dict(timm_model.named_modules())
    named = (modules.get(name) for name in ([names] if isinstance(names, str) else names))
    heads += [module for module in named if isinstance(module, nn.Linear)]
    return list(dict.fromkeys(p for head in heads for p in head.parameters()))


class FrozenParts:
    """Keep frozen modules in eval mode (no dropout, fixed batch-norm statistics)."""

    _frozen_modules: tuple[nn.Module, ...] = ()

    def eval_frozen_modules(self) -> None:
        """Find modules whose parameters are all frozen, and put them in eval mode."""
        within = ((module, list(module.parameters())) for module in self.modules() if module is not self)
        self._frozen_modules = tuple(m for m, own in within if own and not any(p.requires_grad for p in own))
        self.train(self.training)

    def train(self, mode: bool = True):
        """Set the mode of all modules but the frozen ones, which stay in eval mode."""
        super().train(mode)
        for module in self._frozen_modules:
            module.eval()
        return self
