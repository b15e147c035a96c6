"""`HFViTForImageClassification`: any timm classifier as a `PreTrainedModel` that stock transformers can load.

The checkpoint keeps `model_type: timm_wrapper` and timm's own weight names, so `AutoModelForImageClassification`,
`pipeline("image-classification")` and `timm.create_model` all read it without hfvit.
"""

import copy
import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_model_args
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import logging as transformers_logging

from hfvit.attention import recorded_attention
from hfvit.errors import ModelError, nearest, one_line
from hfvit.param_groups import classifier_parameters, freeze
from hfvit.paths import folder_or_hub_id

# Where timm's releases keep their files; of no use to the model that was trained from them.
_ORIGIN_KEYS = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "num_classes", "state_dict", "cache_dir")


class HFViTConfig(TimmWrapperConfig):
    """A `TimmWrapperConfig` whose labels survive a round trip and whose `pretrained_cfg` says how images are read.

    The stock class keeps an old `label_names` when the labels change, and has no preprocessing of its own for a model
    trained from scratch.
    """

    @classmethod
    def from_architecture(cls, architecture: str, labels: list[str], **model_args) -> "HFViTConfig":
        """Configuration of an untrained timm model; `model_args` go to `timm.create_model`."""
        if not timm.is_model(architecture):
            raise ModelError(
                f"architecture: timm {timm.__version__} has no model '{architecture}'.{_nearest_model(architecture)}"
            )
        cfg = timm.get_pretrained_cfg(architecture)
        pretrained_cfg = {k: v for k, v in (cfg.to_dict() if cfg else {}).items() if k not in _ORIGIN_KEYS}
        return cls(
            architecture=architecture,
            model_args=dict(model_args),
            pretrained_cfg=pretrained_cfg,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
        )

    @property
    def label_names(self) -> list[str]:
        """Class names in the order of the logits; derived, so that they cannot go stale."""
        return [self.id2label[index] for index in range(self.num_labels)]

    @label_names.setter
    def label_names(self, names: list[str]) -> None:
        """Read from a checkpoint; `from_dict` has made `id2label` of them already."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that preprocessing makes."""
        return tuple(self.pretrained_cfg.get("input_size", (3, 224, 224))[-2:])

    def set_image_size(self, image_size: int, is_argument: bool, **model_args: Any) -> None:
        """Record the size for preprocessing, and for timm where the architecture takes `img_size`.

        `model_args` follow from the size: the windows of a Swin or a MaxViT.
        """
        self.pretrained_cfg = {**self.pretrained_cfg, "input_size": [3, image_size, image_size]}
        if is_argument:
            self.model_args = {**(self.model_args or {}), **model_args, "img_size": image_size}

    def set_preprocessing(self, **values: Any) -> None:
        """Override `mean`, `std`, `interpolation` or `crop_pct` of what the saved image processor does."""
        given = {key: value for key, value in values.items() if value is not None}
        self.pretrained_cfg = {**self.pretrained_cfg, **given}

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["label_names"] = self.label_names
        output["num_classes"] = self.num_labels
        output["architectures"] = ["TimmWrapperForImageClassification"]
        return output


class HFViTForImageClassification(TimmWrapperForImageClassification):
    """timm classifier with position embeddings that follow the image size, attention maps and frozen parts."""

    config_class = HFViTConfig

    def __init__(self, config: HFViTConfig):
        try:
            super().__init__(config)
        except TypeError as error:
            raise ModelError(f"{config.architecture} does not take one of {config.model_args}: {error}.") from None
        self._frozen_modules: list[nn.Module] = []
        # What FSDP wraps; the stock value names a class that the model does not contain.
        self._no_split_modules = sorted({type(block).__name__ for block in getattr(self.timm_model, "blocks", ())})

    def init_weights(self):
        """Leave timm's own initialisation of a new model alone; the stock class redraws it from a normal."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args,
        labels: list[str] | None = None,
        image_size: int | None = None,
        timm_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ) -> "HFViTForImageClassification":
        """Load a timm, transformers `timm_wrapper` or hfvit checkpoint: a Hub id or a folder.

        Args:
            labels: class names in order. The head is kept when they are the checkpoint's own, else it is new.
            image_size: height and width in pixels; position embeddings are resampled by timm when it differs. (The
                stock class leaves them uninitialised, transformers 5.23.)
            timm_kwargs: further arguments of `timm.create_model`, over the checkpoint's `model_args`.

        Raises `ModelError` for another kind of checkpoint, or when anything but a new head would be left untrained.
        """
        pretrained_model_name_or_path = folder_or_hub_id(
            pretrained_model_name_or_path, ModelError, "model_name_or_path"
        )
        hub = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")
        config = cls._load_config(pretrained_model_name_or_path, **{key: kwargs[key] for key in hub if key in kwargs})
        old_labels = config.label_names
        given = kwargs.pop("config", None)
        if given is not None:
            names = [given.id2label[index] for index in range(given.num_labels)]
            stock = {**given.to_dict(), "label_names": names, "num_classes": len(names)}
            config = HFViTConfig.from_dict({"pretrained_cfg": config.pretrained_cfg, **stock})
        labels = _requested_labels(labels, config.label_names, kwargs)
        if not labels:
            raise ModelError(
                f"{pretrained_model_name_or_path} has no classifier of its own; name the classes of a new one"
                ' (labels=["cat", "dog", ...]).'
            )
        keeps_head = labels == old_labels
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        if timm_kwargs:
            config.model_args = {**(config.model_args or {}), **timm_kwargs}
        with_info = kwargs.pop("output_loading_info", False)
        kwargs.pop("ignore_mismatched_sizes", None)  # a head of another size is always drawn anew
        with _quiet_load_report():
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                config=config,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **kwargs,
            )
        model._check_loaded(info, pretrained_model_name_or_path, keeps_head)
        if not keeps_head:
            model.reset_head()
        if image_size:
            model.set_image_size(image_size)
        return (model, info) if with_info else model

    @classmethod
    def _load_config(cls, name: str | Path, **hub_kwargs) -> HFViTConfig:
        try:
            raw, _ = HFViTConfig.get_config_dict(name, **hub_kwargs)
        except (OSError, ValueError) as error:
            raise ModelError(f"model_name_or_path: {name} cannot be read: {str(error).splitlines()[0]}") from error
        if raw.get("model_type", "timm_wrapper") != "timm_wrapper" or "architecture" not in raw:
            kind = raw.get("model_type", "unknown")
            raise ModelError(
                f"model_name_or_path: {name} is a '{kind}' checkpoint, not a timm one; take the timm repository of the"
                " same weights (timm/...)."
            )
        config = HFViTConfig.from_dict(raw)
        if not hasattr(config, "pretrained_cfg"):
            config.pretrained_cfg = {}
        config.pretrained_cfg = {k: v for k, v in config.pretrained_cfg.items() if k not in _ORIGIN_KEYS}
        return config

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
        parts = [(module, list(module.parameters())) for module in self.timm_model.modules()]
        self._frozen_modules = [m for m, own in parts if own and not any(p.requires_grad for p in own)]
        self.train(self.training)

    def train(self, mode: bool = True):
        """Frozen modules stay in evaluation mode: no dropout, no moving statistics."""
        super().train(mode)
        for module in self._frozen_modules:
            module.eval()
        return self

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


def resize_input(timm_model: nn.Module, image_size: int) -> dict[str, Any]:
    """Let timm change its model's image size in pixels; returns what else its `create_model` needs from then on.

    Windows keep their share of the patch grid (Swin, MaxViT), so that a model built anew from the size alone would
    have others than these weights.
    """
    before = get_model_args(timm_model)
    timm_model.set_input_size(img_size=(image_size, image_size))
    after = get_model_args(timm_model)
    changed = {key: value for key, value in after.items() if key != "img_size" and before.get(key) != value}
    return json.loads(json.dumps(changed))  # as config.json will hold them: lists


def check_patches(timm_model: nn.Module, image_size: int) -> None:
    """Raise `ModelError` when the model's patches do not tile an image of this size."""
    patch = getattr(getattr(timm_model, "patch_embed", None), "patch_size", None)
    patch = patch[0] if isinstance(patch, tuple) else patch
    if patch and image_size % patch:
        down = image_size - image_size % patch
        raise ModelError(
            f"image_size: {image_size} is no multiple of the patch size {patch};"
            f" use {down or patch} or {down + patch}."
        )


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
    try:
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
    except (TypeError, AssertionError, RuntimeError, OSError) as error:
        arguments = f" with {timm_kwargs}" if timm_kwargs else ""
        raise ModelError(f"{origin} cannot be built{arguments}: {one_line(error)}") from error
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


def _nearest_model(name: str) -> str:
    return nearest(name.split(".")[0], timm.list_models())


@contextmanager
def _quiet_load_report():
    """transformers prints a table for a missing head; a head that should not be missing is an error here anyway."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
