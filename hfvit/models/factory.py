"""Build the model that a recipe describes."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfvit.data.text import load_tokenizer
from hfvit.errors import ModelError, wrap_library_errors
from hfvit.models.configuration import HFViTConfig
from hfvit.models.freezing import frozen_part
from hfvit.models.image_size import check_patches
from hfvit.models.image_text import add_text_encoder
from hfvit.models.modeling import HFViTForImageClassification
from hfvit.models.patch_size import train_patch_sizes
from hfvit.recipe.arguments import DataArguments, ModelArguments


def build_model(
    arguments: ModelArguments, labels: list[str], data: DataArguments | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Build the classifier of a recipe, with its text encoder and its patch sizes; load the encoder's tokenizer.

    Args:
        arguments: the recipe's model section.
        labels: class names in the order of the logits.
        data: overrides the preprocessing of the pretrained model; None leaves it.

    Returns:
        The model, and its tokenizer or, for images alone, None.

    Raises:
        ModelError: for a checkpoint that cannot be loaded, or an option that the network does not support.
    """
    model = build_image_model(arguments, labels, data)
    tokenizer = None
    if arguments.text_encoder:
        model = add_text_encoder(model, arguments)
        vocabulary = model.text_model.config.vocab_size
        tokenizer = load_tokenizer(arguments.text_encoder, vocabulary, arguments.text_encoder_revision)
    if arguments.patch_sizes:
        train_patch_sizes(model, arguments.patch_sizes)
    return model, tokenizer


def build_image_model(
    arguments: ModelArguments, labels: list[str], data: DataArguments | None = None
) -> HFViTForImageClassification:
    """Build an image classifier from a checkpoint or, with `architecture`, from timm's own initialization.

    Args:
        arguments: the recipe's model section, of which the options for texts and `patch_sizes` are not read.
        labels: class names in the order of the logits.
        data: overrides the preprocessing of the pretrained model; None leaves it.

    Raises:
        ModelError: for a checkpoint that cannot be loaded, or an option that the network does not support.
    """
    origin = arguments.model_name_or_path or arguments.architecture
    timm_kwargs = arguments.timm_kwargs
    given = f" with {timm_kwargs}" if timm_kwargs else ""
    # timm's arguments and damaged files end in errors of timm, torch and safetensors.
    with wrap_library_errors(ModelError, f"{origin} cannot be built{given}"):
        if arguments.model_name_or_path:
            model = HFViTForImageClassification.from_pretrained(
                origin,
                labels=labels,
                image_size=arguments.image_size,
                timm_kwargs=timm_kwargs,
                revision=arguments.model_revision or "main",
                dtype=torch.float32,
            )
        else:
            model = _new_model(origin, labels, arguments.image_size, timm_kwargs)
    if data:
        model.config.set_preprocessing(
            mean=data.image_mean, std=data.image_std, interpolation=data.interpolation, crop_pct=data.crop_pct
        )
    if arguments.freeze:
        model.freeze(frozen_part(arguments.freeze))
    return model


def _new_model(
    architecture: str, labels: list[str], image_size: int | None, timm_kwargs: dict[str, Any]
) -> HFViTForImageClassification:
    """Build an untrained model for `image_size`, by argument where its architecture has one for it.

    Args:
        architecture: a name of timm's.
        labels: class names in the order of the logits.
        image_size: height and width in pixels; None for the architecture's own.
        timm_kwargs: further arguments of `timm.create_model`.
    """
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
