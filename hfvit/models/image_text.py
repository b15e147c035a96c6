"""`HFViTFusionForImageClassification`: image tower, text encoder, fusion head."""

from contextlib import nullcontext
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutput

from hfvit.errors import ModelError, one_line
from hfvit.models.attention import recorded_attention
from hfvit.models.configuration import HFViTConfig
from hfvit.models.freezing import FrozenParts, freeze, parse_freeze
from hfvit.models.modeling import HFViTForImageClassification, LibraryInitialization, PlainCheckpoint
from hfvit.recipe.arguments import ModelArguments, check_network
from hfvit.utils.hub_ids import folder_or_hub_id

HEAD_DIM = 64  # minimum channels of an attention head
MLP_RATIO = 4


class CrossAttention(nn.Module):
    """Pre-norm residual block: cross-attention from image to text tokens, MLP.

    Vaswani et al., https://arxiv.org/abs/1706.03762.
    """

    def __init__(self, image_dim: int, text_dim: int):
        super().__init__()
        self.heads = head_count(image_dim)
        self.image_norm = nn.LayerNorm(image_dim)
        self.text_norm = nn.LayerNorm(text_dim)
        self.query = nn.Linear(image_dim, image_dim)
        self.key_value = nn.Linear(text_dim, 2 * image_dim)
        self.output = nn.Linear(image_dim, image_dim)
        self.mlp_norm = nn.LayerNorm(image_dim)
        self.mlp = nn.Sequential(
            nn.Linear(image_dim, MLP_RATIO * image_dim), nn.GELU(), nn.Linear(MLP_RATIO * image_dim, image_dim)
        )

    def forward(self, image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Update image tokens with text tokens.

        Args:
            image: (batch, image tokens, image_dim).
            text: (batch, tokens, text_dim).
            mask: (batch, tokens) bool, False for padding; every row has a True.
        """
        query = self._split_heads(self.query(self.image_norm(image)))
        key, value = (self._split_heads(part) for part in self.key_value(self.text_norm(text)).chunk(2, dim=-1))
        context = scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
        image = image + self.output(context.transpose(1, 2).flatten(2))
        return image + self.mlp(self.mlp_norm(image))

    def _split_heads(self, tokens: Tensor) -> Tensor:
        """Reshape (batch, tokens, dim) to (batch, heads, tokens, dim / heads)."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Concatenation(nn.Module):
    """Late fusion: concatenate pooled image and mean text token; one hidden layer.

    The hidden layer is needed for interactions between image and text.
    """

    def __init__(self, image_dim: int, text_dim: int):
        super().__init__()
        self.image_norm = nn.LayerNorm(image_dim)
        self.text_norm = nn.LayerNorm(text_dim)
        self.hidden = nn.Linear(image_dim + text_dim, image_dim)

    def forward(self, image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Fuse a pooled image with text tokens into (batch, image_dim).

        Args:
            image: (batch, image_dim).
            text: (batch, tokens, text_dim).
            mask: (batch, tokens) bool, False for padding; every row has a True.
        """
        weights = mask.unsqueeze(-1).to(text.dtype)
        mean = (text * weights).sum(dim=1) / weights.sum(dim=1)
        both = torch.cat([self.image_norm(image), self.text_norm(mean)], dim=-1)
        return nn.functional.gelu(self.hidden(both))


def head_count(dim: int) -> int:
    """Return the largest number of heads with at least `HEAD_DIM` channels each."""
    return next(heads for heads in range(max(1, dim // HEAD_DIM), 0, -1) if dim % heads == 0)


# Keys of a text encoder's configuration with local paths, or code that must not run.
_NOT_KEPT = ("_name_or_path", "name_or_path", "auto_map", "transformers_version")


class HFViTFusionConfig(HFViTConfig):
    """Extend the image tower's `HFViTConfig` with text encoder and fusion head.

    Args:
        text_encoder_config: configuration of the text encoder.
        fusion: "cross_attention" or "concatenation".
        fusion_layers: number of cross-attention blocks.
        max_text_length: tokens that a text is truncated to.
    """

    model_type = "hfvit_fusion"

    text_encoder_config: dict[str, Any] | None = None
    fusion: str = "cross_attention"
    fusion_layers: int = 2
    max_text_length: int = 64

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["architectures"] = ["HFViTFusionForImageClassification"]
        # AutoImageProcessor needs it to read `pretrained_cfg`, as for any timm checkpoint.
        output["image_processor_type"] = "TimmWrapperImageProcessor"
        return output


class HFViTFusionForImageClassification(FrozenParts, LibraryInitialization, PlainCheckpoint, PreTrainedModel):
    """Classify an image together with a text.

    The image tower is a timm model without classifier. With `cross_attention`, its tokens (or the positions of its
    feature map) attend to the text tokens before timm's pooling; with `concatenation`, both sides are pooled first.
    """

    config_class = HFViTFusionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    _supports_sdpa = True

    def __init__(self, config: HFViTFusionConfig):
        check_network(config.architecture, config.model_args, ModelError)
        requested = config._attn_implementation  # None unless given; super() sets the default
        super().__init__(config)
        self.num_labels = config.num_labels
        self.timm_model = timm.create_model(
            config.architecture, pretrained=False, num_classes=0, **(config.model_args or {})
        )
        self.text_model = _untrained(config.text_encoder_config)
        if requested and (requested != "sdpa" or self.text_model._supports_sdpa):
            self.text_model.set_attn_implementation(requested)
        text_dim = self.text_model.config.hidden_size
        pooled_dim = self.timm_model.head_hidden_size
        if config.fusion == "concatenation":
            self.fusion = Concatenation(pooled_dim, text_dim)
        else:
            blocks = (CrossAttention(self.timm_model.num_features, text_dim) for _ in range(config.fusion_layers))
            self.fusion = nn.ModuleList(blocks)
        self.classifier = nn.Linear(pooled_dim, config.num_labels)
        # Block classes for FSDP; post_init adds those of the text encoder.
        self._no_split_modules = sorted({type(block).__name__ for block in getattr(self.timm_model, "blocks", ())})
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Compute timm's non-persistent buffers; called by `from_pretrained`."""
        super()._init_weights(module)
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple:
        """Compute logits (batch, classes) of images with texts.

        Args:
            pixel_values: (batch, 3, height, width).
            input_ids: (batch, tokens).
            attention_mask: (batch, tokens), 0 for padding; None means no padding. Every text has at least one token.
            labels: class ids (batch,) to compute the loss for.
            output_hidden_states: return the image tower's feature maps, or those of these indices; None follows the
                configuration, here and below.
            output_attentions: return the attention weights of the image tower's blocks.
            return_dict: return an `ImageClassifierOutput` rather than a tuple.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        pixel_values = pixel_values.to(self.classifier.weight.device, self.classifier.weight.dtype)
        text = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        with recorded_attention(self.timm_model) if output_attentions else nullcontext() as attentions:
            features, hidden_states = self._image_features(pixel_values, output_hidden_states)
        mask = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool()
        if self.config.fusion == "concatenation":
            pooled = self.fusion(self.timm_model.forward_head(features, pre_logits=True), text, mask)
        else:
            channels_last = getattr(self.timm_model, "output_fmt", None) == "NHWC"
            tokens, restore = _as_tokens(features, self.timm_model.num_features, channels_last)
            for block in self.fusion:
                tokens = block(tokens, text, mask)
            pooled = self.timm_model.forward_head(restore(tokens), pre_logits=True)
        logits = self.classifier(pooled)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        output = ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=hidden_states, attentions=attentions and tuple(attentions)
        )
        if return_dict is False or (return_dict is None and not self.config.return_dict):
            return output.to_tuple()
        return output

    def _image_features(self, pixel_values: Tensor, output_hidden_states: bool | list[int]) -> tuple:
        """Return the image tower's features, and its feature maps or None."""
        if not output_hidden_states:
            return self.timm_model.forward_features(pixel_values), None
        if not hasattr(self.timm_model, "forward_intermediates"):
            raise ModelError(f"output_hidden_states: not available for {type(self.timm_model).__name__}.")
        indices = output_hidden_states if isinstance(output_hidden_states, list | tuple) else None
        return self.timm_model.forward_intermediates(pixel_values, indices=indices)

    def freeze(self, part: str | int) -> None:
        """Freeze both encoders ("backbone"), or stem and first `part` image blocks."""
        freeze(self.timm_model, part)
        if part == "backbone":
            self.text_model.requires_grad_(False)
        self.eval_frozen_modules()

    def example_texts(self, batch: int, tokens: int, generator: torch.Generator | None = None) -> dict:
        """Return random `input_ids` and `attention_mask` (batch, tokens).

        Args:
            batch: number of texts; the last one is padded if `tokens` allows it.
            tokens: length of the texts.
            generator: source of the random ids.
        """
        device = None if generator is None else generator.device
        vocabulary = self.text_model.config.vocab_size
        mask = torch.ones(batch, tokens, dtype=torch.long, device=device)
        mask[-1, 1 + tokens // 2 :] = 0
        ids = torch.randint(vocabulary, (batch, tokens), generator=generator, device=device)
        return {"input_ids": ids, "attention_mask": mask}


def add_text_encoder(
    image_model: HFViTForImageClassification, arguments: ModelArguments
) -> HFViTFusionForImageClassification:
    """Build an image-text classifier from the image tower of `image_model`.

    Raises:
        ModelError: the `text_encoder` cannot be loaded, or does not support `max_text_length` tokens.
    """
    source = folder_or_hub_id(arguments.text_encoder, ModelError, "text_encoder")
    encoder = _pretrained(source, arguments.text_encoder_revision)
    values = {key: value for key, value in encoder.config.to_dict().items() if key not in _NOT_KEPT}
    _check_reads(encoder, source, arguments.max_text_length)
    own = image_model.config
    config = HFViTFusionConfig(
        architecture=own.architecture,
        model_args=own.model_args,
        pretrained_cfg=own.pretrained_cfg,
        id2label=own.id2label,
        label2id=own.label2id,
        text_encoder_config=values,
        fusion=arguments.fusion,
        fusion_layers=arguments.fusion_layers,
        max_text_length=arguments.max_text_length,
    )
    model = HFViTFusionForImageClassification(config)
    missing = model.timm_model.load_state_dict(image_model.timm_model.state_dict(), strict=False).missing_keys
    if missing:
        raise ModelError(
            f"{own.architecture} has other weights without its classifier ({missing[0]}, ...), so it cannot be the"
            " image tower of an image-text model. Choose another architecture."
        )
    model.text_model = encoder
    if arguments.freeze:
        model.freeze(parse_freeze(arguments.freeze))
    return model


def _pretrained(source: str, revision: str | None) -> PreTrainedModel:
    """Load a text encoder in float32, without its pooler."""
    hub = {"revision": revision or "main", "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source, **hub)
        config = getattr(config, "text_config", config)  # CLIP and SigLIP
        _check_text_config(config, f"text_encoder: {source} ")
        model, info = AutoModel.from_pretrained(
            source, config=config, dtype=torch.float32, output_loading_info=True, **hub
        )
    except (OSError, ValueError, TypeError, ImportError, RuntimeError, KeyError) as error:
        raise ModelError(f"text_encoder: {source} cannot be loaded: {one_line(error)}") from error
    model = _without_pooler(model)
    missing = sorted(key for key in info["missing_keys"] if key in model.state_dict())
    if missing:
        raise ModelError(f"text_encoder: {source} lacks {len(missing)} weights of the encoder ({missing[0]}, ...).")
    return model


def _untrained(values: dict[str, Any]) -> PreTrainedModel:
    """Build the text encoder of a configuration, without code from the checkpoint."""
    try:
        config = AutoConfig.for_model(**values)
        _check_text_config(config, "text_encoder_config: ")
        return _without_pooler(AutoModel.from_config(config, trust_remote_code=False))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"The text encoder of the configuration cannot be built: {one_line(error)}") from error


def _check_text_config(config: PretrainedConfig, start: str) -> None:
    """Raise `ModelError` unless a configuration is that of a text encoder.

    Building other models may load weights from elsewhere (`timm_wrapper`, `use_pretrained_backbone`).

    Args:
        config: configuration of a model that was not built yet.
        start: beginning of the message.
    """
    reads_texts = getattr(MODEL_MAPPING[type(config)], "main_input_name", "input_ids") == "input_ids"
    if not reads_texts or config.sub_configs or config.is_encoder_decoder or not hasattr(config, "vocab_size"):
        raise ModelError(
            f"{start}must be a text encoder such as BERT, RoBERTa, DistilBERT or CLIP's text model, got the model type"
            f" '{config.model_type}'."
        )


def _without_pooler(model: PreTrainedModel) -> PreTrainedModel:
    """Remove the pooler of BERT-like models; DDP fails on weights without gradient."""
    if isinstance(getattr(model, "pooler", None), nn.Module):
        model.pooler = None
    return model


@torch.inference_mode()
def _check_reads(encoder: PreTrainedModel, source: str, tokens: int) -> None:
    """Run the encoder on a text of that length; families count positions differently."""
    pad = getattr(encoder.config, "pad_token_id", None)
    ids = torch.full((1, tokens), 1 if pad == 0 else 0)
    try:
        encoder.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.shape  # noqa: B018
    except (IndexError, RuntimeError, ValueError) as error:
        positions = getattr(encoder.config, "max_position_embeddings", None)
        known = f" (max_position_embeddings: {positions})" if positions else ""
        raise ModelError(
            f"max_text_length: the text encoder {source} does not support {tokens} tokens{known}. Lower it."
        ) from error
    except (AttributeError, TypeError) as error:
        raise ModelError(f"text_encoder: {source} does not return token features: {one_line(error)}") from error


def _as_tokens(features: torch.Tensor, channels: int, channels_last: bool):
    """Reshape timm's features to (batch, tokens, channels); returns also the inverse."""
    if features.ndim == 3:
        return features, lambda tokens: tokens
    if features.shape[-1] == channels and (channels_last or features.shape[1] != channels):
        size = features.shape[1:3]
        return features.flatten(1, 2), lambda tokens: tokens.unflatten(1, size)
    size = features.shape[2:]
    return features.flatten(2).transpose(1, 2), lambda tokens: tokens.transpose(1, 2).unflatten(2, size)


AutoConfig.register(HFViTFusionConfig.model_type, HFViTFusionConfig)
AutoModelForImageClassification.register(HFViTFusionConfig, HFViTFusionForImageClassification)
