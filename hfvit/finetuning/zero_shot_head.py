"""Initialize the classifier from class-name embeddings of CLIP or SigLIP."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from hfvit.data.dataset import ImageDataset
from hfvit.data.evaluation_stream import EvaluationStream
from hfvit.data.text import load_tokenizer
from hfvit.errors import ModelError, wrap_library_errors
from hfvit.utils.eval_mode import eval_mode
from hfvit.utils.hub_ids import folder_or_hub_id

MODEL_TYPES = ("clip", "siglip")
IMAGES = 64  # for the mean feature norm
TEXTS = 256  # class names in one forward pass


@torch.inference_mode()
def initialize_head_from_text(
    model,
    labels: Sequence[str],
    images: ImageDataset | EvaluationStream,
    preprocessing,
    *,
    source: str,
    templates: Sequence[str],
) -> None:
    """Initialize the head as CLIP's zero-shot classifier.

    See https://arxiv.org/abs/2103.00020, section 3.1.

    Args:
        model: classifier whose timm network is the image tower of `source`.
        labels: class names in the order of the logits.
        images: dataset whose first images set the scale of the logits; its labels are not used.
        preprocessing: converts a batch of `images` to pixel values.
        source: folder or Hub id of a `CLIPModel` or `SiglipModel`, with its tokenizer.
        templates: prompts with `{}` for the class name, whose embeddings are averaged.

    Raises:
        ModelError: the model cannot be loaded, or has another image tower.
    """
    head = model.timm_model.get_classifier()
    if not isinstance(head, nn.Linear):
        raise ModelError(f"head_from_text: the head must be a linear layer, got {type(head).__name__}.")
    pair, kind = _load_pair(source)
    projection = pair.visual_projection.weight if kind == "clip" else torch.eye(head.in_features)
    if projection.shape[1] != head.in_features:
        raise ModelError(
            f"head_from_text: {source} has {projection.shape[1]} image features, but this network has"
            f" {head.in_features}. Set model_name_or_path to its image tower, such as"
            " timm/vit_base_patch16_clip_quickgelu_224.openai for openai/clip-vit-base-patch16."
        )
    if isinstance(images, EvaluationStream):
        images = images.first(IMAGES)
    names = name_embeddings(pair, kind, labels, source=source, templates=templates)
    pixel_values = preprocessing(images.__getitems__(list(range(min(IMAGES, len(images))))))
    tower = model.timm_model
    with eval_mode(model):
        features = tower.forward_head(tower.forward_features(pixel_values), pre_logits=True).cpu()
    norm = (features @ projection.T).norm(dim=1).mean()
    head.weight.copy_(pair.logit_scale.exp() / norm * names @ projection)
    if head.bias is not None:
        head.bias.zero_()


def name_embeddings(pair, kind: str, labels: Sequence[str], *, source: str, templates: Sequence[str]) -> torch.Tensor:
    """Compute normalized text embeddings of class names, averaged over the templates.

    Args:
        pair: `CLIPModel` or `SiglipModel`.
        kind: model type, one of `MODEL_TYPES`.
        labels: class names; underscores are replaced by spaces.
        source: folder or Hub id of the tokenizer.
        templates: prompts with `{}` for the class name.

    Returns:
        Embeddings (classes, dimensions).
    """
    limit = pair.config.text_config.max_position_embeddings
    tokenizer = load_tokenizer(source, pair.config.text_config.vocab_size)
    # SigLIP was trained on texts padded to the maximum length, without an attention mask.
    padding = "max_length" if kind == "siglip" else True
    total = 0
    for template in templates:
        texts = [template.replace("{}", label.replace("_", " ")) for label in labels]
        tokens = tokenizer(texts, padding=padding, truncation=True, max_length=limit, return_tensors="pt")
        names = ("input_ids",) if kind == "siglip" else ("input_ids", "attention_mask")
        parts = zip(*(tokens[name].split(TEXTS) for name in names), strict=True)
        embeddings = [pair.get_text_features(**dict(zip(names, part, strict=True))).pooler_output for part in parts]
        total = total + nn.functional.normalize(torch.cat(embeddings), dim=1)
    return nn.functional.normalize(total, dim=1)


def _load_pair(source: str):
    """Load a CLIP or SigLIP model in eval mode; returns it with its model type."""
    path = folder_or_hub_id(source, ModelError, "head_from_text")
    with wrap_library_errors(ModelError, f"head_from_text: {source} cannot be loaded"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if config.model_type in MODEL_TYPES:
            return AutoModel.from_pretrained(path, trust_remote_code=False).float().eval(), config.model_type
    raise ModelError(
        f"head_from_text: the model type must be one of {', '.join(MODEL_TYPES)}, but {source} has"
        f" '{config.model_type}'."
    )
