"""Build a model from a checkpoint or a timm architecture name."""

import copy
from typing import Any

import torch
from torch import nn

from hfvit.errors import ModelError, wrap_library_errors
from hfvit.models.configuration import HFViTConfig
from hfvit.models.image_size import check_patches
from hfvit.models.modeling import HFViTForImageClassification


def build_model(
    labels: list[str],
    model_name_or_path: str | None = None,
    architecture: str | None = None,
    image_size: int | None = None,
    timm_kwargs: dict[str, Any] | None = None,
    revision: str | None = None,
    frozen: str | int | None = None,
    preprocessing: dict[str, Any] | None = None,
) -> HFViTForImageClassification:
    """A classifier of `labels`, from a checkpoint or (with `architecture`) from timm's own initialisation.

    `preprocessing` overrides `mean`, `std`, `interpolation`, `crop_pct` of the pretrained model.
    """
    origin = model_name_or_path or architecture
    arguments = f" with {timm_kwargs}" if timm_kwargs else ""
    with wrap_library_errors(ModelError, f"{origin} cannot be built{arguments}"):
        if model_name_or_path:
            model = HFViTForImageClassification.from_pretrained(
                origin,
                labels=labels,
                image_size=image_size,
                timm_kwargs=timm_kwargs,
                revision=revision or "main",
                dtype=torch.float32,
            )
        else:
            model = _new_model(architecture, labels, image_size, timm_kwargs or {})
    model.config.set_preprocessing(**(preprocessing or {}))
    if frozen:
        model.freeze(int(frozen) if str(frozen).isdigit() else frozen)
    return model


def _new_model(
    architecture: str, labels: list[str], image_size: int | None, timm_kwargs: dict[str, Any]
) -> HFViTForImageClassification:
    """An untrained model built for `image_size`, by argument where its architecture has one for it."""
    config = HFViTConfig.from_architecture(architecture, labels, **timm_kwargs)
    if image_size is None:
        return HFViTForImageClassification(config)
    own_config = copy.deepcopy(config)
    config.set_image_size(image_size, is_argument=True)
    try:
        model = HFViTForImageClassification(config)
    except ModelError as error:
        if "'img_size'" not in str(error):
            raise
        model = HFViTForImageClassification(own_config)  # a network that takes images of any size
        model.set_image_size(image_size)
    check_patches(model.timm_model, image_size)
    return model


def without_storage(model: nn.Module) -> nn.Module:
    """A copy on the meta device, adapters and frozen weights included, made without the memory of another model."""
    tensors = [*model.parameters(), *model.buffers()]
    empty = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors}
    for parameter in model.parameters():
        empty[id(parameter)] = nn.Parameter(empty[id(parameter)], requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, empty)
