"""Build the model that a recipe describes."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfvit.data.text import load_tokenizer
from hfvit.errors import ModelError, wrap_library_errors
from hfvit.models.configuration import HFViTConfig
from hfvit.models.freezing import parse_freeze
from hfvit.models.image_size import check_computes, check_patches
from hfvit.models.image_text import add_text_encoder
from hfvit.models.modeling import HFViTForImageClassification
from hfvit.models.patch_size import train_patch_sizes
from hfvit.recipe.arguments import SINGLE_LABEL, DataArguments, ModelArguments
from hfvit.utils.eval_mode import eval_mode


def build_model(
    arguments: ModelArguments,
    labels: list[str],
    data: DataArguments | None = None,
    problem_type: str = SINGLE_LABEL,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Build the classifier of a recipe, with its text encoder and tokenizer if any.

    Args:
        arguments: the recipe's model section.
        labels: class names in the order of the logits.
        data: overrides of the preprocessing; None keeps that of the pretrained model.
        problem_type: single_label_classification or multi_label_classification.

    Returns:
        The model and its tokenizer, None for image models.

    Raises:
        ModelError: a checkpoint cannot be loaded, or the network does not support an option.
    """
    model = build_image_model(arguments, labels, data)
    tokenizer = None
    if arguments.text_encoder:
        model = add_text_encoder(model, arguments)
        vocabulary = model.text_model.config.vocab_size
        tokenizer = load_tokenizer(arguments.text_encoder, vocabulary, arguments.text_encoder_revision)
    if arguments.patch_sizes:
        train_patch_sizes(model, arguments.patch_sizes)
    model.config.set_problem_type(problem_type)
    return model, tokenizer


def build_image_model(
    arguments: ModelArguments, labels: list[str], data: DataArguments | None = None
) -> HFViTForImageClassification:
    """Build an image classifier from a checkpoint or with timm's initialization.

    Args:
        arguments: the recipe's model section; options of text encoders and `patch_sizes` are ignored.
        labels: class names in the order of the logits.
        data: overrides of the preprocessing; None keeps that of the pretrained model.

    Raises:
        ModelError: a checkpoint cannot be loaded, or the network does not support an option.
    """
    origin = arguments.model_name_or_path or arguments.architecture
    timm_kwargs = arguments.timm_kwargs
    with_kwargs = f" with {timm_kwargs}" if timm_kwargs else ""
    # Wrong arguments and damaged files raise errors of timm, torch and safetensors.
    with wrap_library_errors(ModelError, f"{origin} cannot be built{with_kwargs}"):
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
    if arguments.model_args:
        check_classifies(model)
    if data:
        model.config.set_preprocessing(
            mean=data.image_mean, std=data.image_std, interpolation=data.interpolation, crop_pct=data.crop_pct
        )
        model.config.set_crop_mode(data.crop_mode)
    if arguments.freeze:
        model.freeze(parse_freeze(arguments.freeze))
    return model


def _new_model(
    architecture: str, labels: list[str], image_size: int | None, timm_kwargs: dict[str, Any]
) -> HFViTForImageClassification:
    """Build an untrained model, with `img_size` if the architecture has it.

    Args:
        architecture: model name in timm.
        labels: class names in the order of the logits.
        image_size: height and width in pixels; None for the architecture's default.
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
        model = HFViTForImageClassification(own_config)  # the network accepts any image size
        model.set_image_size(image_size)
    check_patches(model.timm_model, image_size)
    network = model.timm_model
    is_checked = not hasattr(network, "set_input_size") and own_config.pretrained_cfg.get("fixed_input_size")
    if is_checked and not next(network.parameters()).is_meta:
        check_computes(network, image_size)
    return model


@torch.no_grad()
def check_classifies(model: HFViTForImageClassification) -> None:
    """Raise `ModelError` unless a model computes logits of RGB images.

    `model_args` such as in_chans, features_only and global_pool may change that.
    """
    image = torch.zeros(1, 3, *model.config.image_size, device=model.device, dtype=model.dtype)
    problem = f"model_args: no images can be classified with {model.config.model_args}"
    with wrap_library_errors(ModelError, problem), eval_mode(model):
        shape = getattr(model(image).logits, "shape", None)
    if shape != (1, model.config.num_labels):
        raise ModelError(
            f"model_args: must leave the network a classifier of {model.config.num_labels} classes, got"
            f" {model.config.model_args}. Remove those that change its output, such as global_pool."
        )


def meta_copy(model: nn.Module) -> nn.Module:
    """Copy a model, adapters included, to the meta device without allocating memory."""
    tensors = [*model.parameters(), *model.buffers()]
    empty = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors}
    for parameter in model.parameters():
        empty[id(parameter)] = nn.Parameter(empty[id(parameter)], requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, empty)
