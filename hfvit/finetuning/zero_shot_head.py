"""Initialise the classifier from class-name embeddings of CLIP or SigLIP."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from hfvit.data.dataset import ImageDataset
from hfvit.data.text import load_tokenizer
from hfvit.errors import ModelError, wrap_library_errors
from hfvit.utils.hub_ids import folder_or_hub_id

PAIRS = ("clip", "siglip")
IMAGES = 64  # whose mean norm is taken


@torch.inference_mode()
def start_from_text(
    model, labels: Sequence[str], images: ImageDataset, preprocessing, *, source: str, templates: Sequence[str]
) -> None:
    """Write the head of `model`, whose timm network is the image tower of the pair at `source`.

    Args:
        labels: names of the classes, in the head's order.
        images: whose first ones, made pixel values by `preprocessing`, set the scale of the logits; their labels play
            no part.
        source: a folder or a Hub id of a `CLIPModel` or `SiglipModel`, with its tokenizer.
        templates: sentences with `{}` in the place of a name; their embeddings are averaged.

    Raises `ModelError` when the pair cannot be loaded, or is not the pair of this image tower.
    """
    head = model.timm_model.get_classifier()
    if not isinstance(head, nn.Linear):
        raise ModelError(f"head_from_text: not for this family: its head is {type(head).__name__}, no linear layer.")
    pair, kind = _load_pair(source)
    projection = pair.visual_projection.weight if kind == "clip" else torch.eye(head.in_features)
    if projection.shape[1] != head.in_features:
        raise ModelError(
            f"head_from_text: {source} projects image features of {projection.shape[1]} numbers, but this network"
            f" gives {head.in_features}. model_name_or_path has to be the pair's own image tower, such as"
            " timm/vit_base_patch16_clip_quickgelu_224.openai for openai/clip-vit-base-patch16."
        )
    names = name_embeddings(pair, kind, labels, source=source, templates=templates)
    pixel_values = preprocessing(images.__getitems__(list(range(min(IMAGES, len(images))))))
    was_training = model.training
    tower = model.eval().timm_model
    features = tower.forward_head(tower.forward_features(pixel_values), pre_logits=True).cpu()
    model.train(was_training)
    norm = (features @ projection.T).norm(dim=1).mean()
    head.weight.copy_(pair.logit_scale.exp() / norm * names @ projection)
    if head.bias is not None:
        head.bias.zero_()


def name_embeddings(pair, kind: str, labels: Sequence[str], *, source: str, templates: Sequence[str]) -> torch.Tensor:
    """Normalised embeddings of class names `(classes, dimensions)`, each the mean over the templates."""
    limit = pair.config.text_config.max_position_embeddings
    tokenizer = load_tokenizer(source, pair.config.text_config.vocab_size)
    # SigLIP was trained on texts padded to one length and reads its padding, without a mask.
    padding = "max_length" if kind == "siglip" else True
    total = 0
    for template in templates:
        texts = [template.replace("{}", label.replace("_", " ")) for label in labels]
        tokens = tokenizer(texts, padding=padding, truncation=True, max_length=limit, return_tensors="pt")
        kept = ("input_ids",) if kind == "siglip" else ("input_ids", "attention_mask")
        found = pair.get_text_features(**{name: tokens[name] for name in kept}).pooler_output
        total = total + nn.functional.normalize(found, dim=1)
    return nn.functional.normalize(total, dim=1)


def _load_pair(source: str):
    """The pair at `source`, in evaluation, and which of `PAIRS` it is."""
    place = folder_or_hub_id(source, ModelError, "head_from_text")
    with wrap_library_errors(ModelError, f"head_from_text: {source} cannot be loaded"):
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        if config.model_type in PAIRS:
            return AutoModel.from_pretrained(place, trust_remote_code=False).float().eval(), config.model_type
    raise ModelError(f"head_from_text: {source} is a '{config.model_type}', no pair of image and text ({PAIRS}).")
