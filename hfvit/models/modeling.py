"""`HFViTForImageClassification`: a timm classifier as a `PreTrainedModel`."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, TimmWrapperForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from hfvit.errors import ModelError
from hfvit.models.attention import recorded_attention
from hfvit.models.configuration import HFViTConfig, load_config
from hfvit.models.freezing import FrozenParts, classifier_parameters, freeze
from hfvit.models.image_size import check_patches, resize_input
from hfvit.utils.files import file_mode
from hfvit.utils.hub_ids import folder_or_hub_id
from hfvit.utils.quiet import log_level


class LibraryInitialization:
    """Mixin of a model: keep the initialization of timm and torch, where transformers redraws it from a normal.

    `_is_hf_initialized` is transformers' mark of a module that has its values. `from_pretrained`, which builds on the
    meta device, computes missing values and non-persistent buffers itself (`_init_weights`), and then sets it.
    """

    def post_init(self):
        self._is_hf_initialized = not next(self.parameters()).is_meta
        super().post_init()

    def init_weights(self):
        """Give a model built on the meta device the values of a new one, once it has storage (`to_empty`)."""
        if self._is_hf_initialized or next(self.parameters()).is_meta:
            return
        new = type(self)(self.config)  # the one way to timm's initialization that each of its architectures has
        values = {**dict(new.named_parameters()), **dict(new.named_buffers())}
        with torch.no_grad():
            for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
                tensor.copy_(values[name])
        self._is_hf_initialized = True


class HFViTForImageClassification(FrozenParts, LibraryInitialization, TimmWrapperForImageClassification):
    """timm classifier with position embeddings that follow the image size, attention maps and frozen parts."""

    config_class = HFViTConfig

    def __init__(self, config: HFViTConfig):
        try:
            super().__init__(config)
        except TypeError as error:
            raise ModelError(
                f"model_args: {config.architecture} does not take one of {config.model_args}: {error}."
            ) from None
        # What FSDP wraps; the stock value names a class that the model does not contain.
        self._no_split_modules = sorted({type(block).__name__ for block in getattr(self.timm_model, "blocks", ())})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *args,
        labels: list[str] | None = None,
        image_size: int | None = None,
        timm_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ) -> "HFViTForImageClassification":
        """Load a timm, transformers `timm_wrapper` or hfvit checkpoint: a Hub id or a folder.

        Args:
            pretrained_model_name_or_path: None to load `state_dict=` into the model that `config=` describes.
            labels: class names in order. The head is kept when they are the checkpoint's own, else it is new.
            image_size: height and width in pixels; position embeddings are resampled by timm when it differs. (The
                stock class leaves them uninitialised, transformers 5.23.)
            timm_kwargs: further arguments of `timm.create_model`, over the checkpoint's `model_args`.

        Raises:
            ModelError: another kind of checkpoint, or anything but a new head would be left untrained.
            ValueError: neither a checkpoint nor `config` and `state_dict`.
        """
        given = kwargs.pop("config", None)
        if pretrained_model_name_or_path is None:
            if given is None or kwargs.get("state_dict") is None:
                raise ValueError("from_pretrained: name a checkpoint, or pass config= and state_dict=.")
            config = _as_own_config(given, {})
            old_labels = config.label_names
        else:
            pretrained_model_name_or_path = folder_or_hub_id(
                pretrained_model_name_or_path, ModelError, "model_name_or_path"
            )
            hub = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")
            config = load_config(pretrained_model_name_or_path, **{key: kwargs[key] for key in hub if key in kwargs})
            old_labels = config.label_names
            if given is not None:
                config = _as_own_config(given, config.pretrained_cfg)
        labels = _requested_labels(labels, config.label_names, kwargs)
        if not labels:
            raise ModelError(
                f"labels: {pretrained_model_name_or_path} has no classifier of its own; name the classes of a new one"
                ' (labels=["cat", "dog", ...]).'
            )
        keeps_head = labels == old_labels
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        if timm_kwargs:
            config.model_args = {**(config.model_args or {}), **timm_kwargs}
        with_info = kwargs.pop("output_loading_info", False)
        kwargs.pop("ignore_mismatched_sizes", None)  # a head of another size is always drawn anew
        with log_level("transformers", logging.ERROR):  # transformers logs a table of the head's missing weights
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                config=config,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **kwargs,
            )
        model._check_loaded(info, pretrained_model_name_or_path or "state_dict", keeps_head)
        if not keeps_head:
            model.reset_head()
        if image_size:
            model.set_image_size(image_size)
        return (model, info) if with_info else model

    def _check_loaded(self, info: dict, name: str | Path, keeps_head: bool) -> None:
        head = {id(parameter) for parameter in classifier_parameters(self.timm_model)}
        in_head = {key for key, parameter in self.named_parameters() if id(parameter) in head}
        untrained = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
        wrong = sorted(untrained if keeps_head else untrained - in_head)
        if wrong:
            shown = ", ".join(key.removeprefix("timm_model.") for key in wrong[:5])
            raise ModelError(
                f"{name} does not fit {self.config.architecture}: {len(wrong)} weights are missing or of another shape"
                f" ({shown}{', ...' if len(wrong) > 5 else ''}); check architecture and model_args."
            )

    def save_pretrained(self, save_directory: str | Path, state_dict: dict | None = None, **kwargs):
        """Save under timm's own weight names, which stock transformers and timm both load.

        The stock class keeps its `timm_model.` prefix unless the weights came from a timm checkpoint (transformers
        5.23), and timm cannot read that.
        """
        state_dict = self.state_dict() if state_dict is None else state_dict
        plain = {name.removeprefix("timm_model."): value for name, value in state_dict.items()}
        super().save_pretrained(save_directory, state_dict=plain, **kwargs)
        for file in Path(save_directory).glob("*.safetensors"):
            file.chmod(file_mode())  # safetensors 0.8 writes with 0600

    @torch.no_grad()
    def reset_head(self) -> None:
        """Draw the classifier anew: normal weights of `initializer_range`, zero bias."""
        for parameter in classifier_parameters(self.timm_model):
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=self.config.initializer_range)
            else:
                nn.init.zeros_(parameter)

    def set_image_size(self, image_size: int) -> None:
        """Take images of another size from now on, with position embeddings resampled by timm's own rule."""
        if (image_size, image_size) == self.config.image_size:
            return
        check_patches(self.timm_model, image_size)
        resizable = hasattr(self.timm_model, "set_input_size")
        if not resizable and self.config.pretrained_cfg.get("fixed_input_size"):
            raise ModelError(
                f"image_size: not for this family: {self.config.architecture} takes {self.config.image_size[0]} px"
                " images only."
            )
        changed = resize_input(self.timm_model, image_size) if resizable else {}
        self.config.set_image_size(image_size, is_argument=resizable, **changed)
        self._check_rebuilt()

    def _check_rebuilt(self) -> None:
        """Raise `ModelError` unless the configuration builds a model that takes these weights."""
        with torch.device("meta"):
            rebuilt = type(self)(self.config).state_dict()
        changed = [name for name, value in self.state_dict().items() if rebuilt[name].shape != value.shape]
        if changed:
            raise ModelError(
                f"image_size: not for this family: {self.config.architecture} cannot change to"
                f" {self.config.image_size[0]} px and be loaded again"
                f" ({changed[0].removeprefix('timm_model.')} takes another shape); keep its own size."
            )

    def freeze(self, part: str | int) -> None:
        """Stop training `"backbone"`, or the stem and the first `part` blocks; their dropout and statistics too."""
        freeze(self.timm_model, part)
        self.rest_frozen()

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutput | tuple:
        """Logits `(batch, classes)`; with `output_attentions`, each block's `(batch, heads, tokens, tokens)` too.

        Attention maps need a model with `blocks` of timm's plain attention (ViT, DeiT, DINOv2, BEiT, EVA, ...).
        """
        wanted = self.config.output_attentions if output_attentions is None else output_attentions
        arguments = {"labels": labels, "output_attentions": False, "return_dict": return_dict, **kwargs}
        if not wanted:
            return super().forward(pixel_values, **arguments)
        with recorded_attention(self.timm_model) as maps:
            outputs = super().forward(pixel_values, **arguments)
        if isinstance(outputs, tuple):
            return (*outputs, tuple(maps))
        outputs.attentions = tuple(maps)
        return outputs


def _as_own_config(given: PretrainedConfig, pretrained_cfg: dict[str, Any]) -> HFViTConfig:
    """A copy of `given`, a stock `TimmWrapperConfig` or our own; `pretrained_cfg` stands in where it has none."""
    names = [given.id2label[index] for index in range(given.num_labels)]
    values = {**given.to_dict(), "label_names": names, "num_classes": len(names)}
    return HFViTConfig.from_dict({"pretrained_cfg": pretrained_cfg, **values})


def _requested_labels(labels: list[str] | None, old_labels: list[str], kwargs: dict[str, Any]) -> list[str]:
    """Class names from `labels`, else from transformers' `id2label` or `num_labels` in `kwargs`, else the old."""
    id2label, num_labels = kwargs.pop("id2label", None), kwargs.pop("num_labels", None)
    kwargs.pop("label2id", None)
    if labels is not None:
        return list(labels)
    if id2label is not None:
        return [name for _, name in sorted((int(index), name) for index, name in id2label.items())]
    if num_labels is not None and num_labels != len(old_labels):
        return [f"LABEL_{index}" for index in range(num_labels)]
    return old_labels
