"""`HFViTForImageClassification`: a timm classifier as a `PreTrainedModel`."""

import logging
import re
from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageClassification, PretrainedConfig, TimmWrapperForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from hfvit.errors import ModelError
from hfvit.models.attention import recorded_attention
from hfvit.models.configuration import HFViTConfig, load_config
from hfvit.models.freezing import FrozenParts, classifier_parameters, freeze
from hfvit.models.image_size import check_image_size, check_patches, resize_input
from hfvit.recipe.arguments import DROP_RATES, MULTI_LABEL, SINGLE_LABEL, check_network
from hfvit.utils.eval_mode import eval_mode
from hfvit.utils.files import file_mode
from hfvit.utils.formatting import shortened
from hfvit.utils.hub_ids import folder_or_hub_id
from hfvit.utils.quiet import log_level

FEATURE_PROJECTION = "feature_projection"  # of the timm network during feature distillation


class LibraryInitialization:
    """Keep the initialization of timm and torch rather than transformers' normal.

    `_is_hf_initialized` marks initialized modules in transformers. `from_pretrained` builds on the meta device,
    computes missing weights and non-persistent buffers with `_init_weights`, and then sets it.
    """

    def post_init(self):
        self._is_hf_initialized = not next(self.parameters()).is_meta
        super().post_init()

    def init_weights(self):
        """Initialize a model that was built on the meta device, after `to_empty`."""
        if self._is_hf_initialized or next(self.parameters()).is_meta:
            return
        new = type(self)(self.config)  # all timm architectures initialize themselves in their constructor
        values = {**dict(new.named_parameters()), **dict(new.named_buffers())}
        with torch.no_grad():
            for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
                tensor.copy_(values[name])
        self._is_hf_initialized = True


class PlainCheckpoint:
    """Save checkpoints of compiled blocks and shared modules that load elsewhere."""

    def save_pretrained(self, save_directory: str | Path, state_dict: dict | None = None, **kwargs):
        """Save the model.

        Args:
            save_directory: folder to write.
            state_dict: weights to save instead of the model's.
            **kwargs: arguments of `PreTrainedModel.save_pretrained`.
        """
        state_dict = self.state_dict() if state_dict is None else state_dict
        weights = unshared({self.saved_name(name): value for name, value in state_dict.items()})
        super().save_pretrained(save_directory, state_dict=weights, **kwargs)
        for file in Path(save_directory).glob("*.safetensors"):
            file.chmod(file_mode())  # safetensors 0.8 writes with 0600

    def saved_name(self, name: str) -> str:
        """Return a weight's name without the prefix of `torch.compile`."""
        return name.replace("_orig_mod.", "")


def unshared(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors that share memory with an earlier one, for safetensors.

    Modules of CoaT share their weights, for example.
    """
    seen: set[tuple] = set()
    output = {}
    for name, value in weights.items():
        key = (value.device, value.data_ptr(), value.shape)
        shares = value.numel() > 0 and not value.is_meta and key in seen
        output[name] = value.clone() if shares else value
        seen.add(key)
    return output


class HFViTForImageClassification(
    FrozenParts, LibraryInitialization, PlainCheckpoint, TimmWrapperForImageClassification
):
    """timm classifier with resizable position embeddings, attention maps and freezing."""

    config_class = HFViTConfig

    def __init__(self, config: HFViTConfig):
        check_network(config.architecture, config.model_args, ModelError)
        try:
            super().__init__(config)
        except TypeError as error:
            unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unexpected and unexpected[1] in DROP_RATES:
                name = unexpected[1]
                raise ModelError(
                    f"{name}: not supported by {config.architecture}, got {config.model_args[name]}. Omit it."
                ) from None
            raise ModelError(
                f"model_args: not supported by {config.architecture}, got {config.model_args}: {error}."
            ) from None
        if not hasattr(self.timm_model, "get_classifier"):
            if (config.model_args or {}).get("features_only"):
                raise ModelError("model_args: must not have features_only, which leaves no classifier. Remove it.")
            raise ModelError(
                f"architecture: must be a classifier, but {config.architecture} of timm is an encoder without a head."
                " Use another model."
            )
        # Block classes for FSDP; the inherited value names a class that the model does not have.
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
        """Load a timm, transformers `timm_wrapper` or hfvit checkpoint.

        Args:
            pretrained_model_name_or_path: Hub id or folder; None to load `state_dict=` into the model of `config=`.
            *args: arguments of `PreTrainedModel.from_pretrained`.
            labels: class names in the order of the logits. The head is kept if they are the checkpoint's in any order,
                else new; `id2label=` or `label2id=` of the same length renames the classes of the trained head, as in
                the stock class.
            image_size: height and width in pixels; timm resamples position embeddings when it differs (the stock class
                leaves them uninitialized, transformers 5.23).
            timm_kwargs: arguments of `timm.create_model` that override the checkpoint's `model_args`.
            **kwargs: arguments of `PreTrainedModel.from_pretrained`, and values of the configuration
                (`problem_type`, `output_hidden_states`, ...).

        Raises:
            ModelError: not a timm checkpoint, or weights other than a new head's are missing.
            TypeError: `labels` or `image_size` have a wrong type.
            ValueError: neither a checkpoint nor `config` and `state_dict` are given, or the class names contradict
                each other.
        """
        if image_size is not None:
            check_image_size(image_size)
        own_config = kwargs.pop("config", None)
        if pretrained_model_name_or_path is None:
            if own_config is None or kwargs.get("state_dict") is None:
                raise ValueError("from_pretrained: pass a checkpoint, or config= and state_dict=.")
            config = _to_hfvit_config(own_config, {})
            old_labels = config.label_names
        else:
            pretrained_model_name_or_path = folder_or_hub_id(
                pretrained_model_name_or_path, ModelError, "model_name_or_path"
            )
            hub = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")
            config = load_config(pretrained_model_name_or_path, **{key: kwargs[key] for key in hub if key in kwargs})
            old_labels = config.label_names
            if own_config is not None:
                config = _to_hfvit_config(own_config, config.pretrained_cfg)
        renames = labels is None
        labels = _requested_labels(labels, config.label_names, kwargs)
        if not labels:
            raise ModelError(
                f"labels: required, as {pretrained_model_name_or_path} has no classifier. Pass the class names"
                ' (labels=["cat", "dog", ...]).'
            )
        rows = None if renames else _old_rows(labels, old_labels)
        keeps_head = rows is not None or (renames and len(labels) == len(old_labels))
        if not keeps_head:
            config.remove_thresholds()
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        _set_values(config, kwargs)
        if timm_kwargs:
            config.model_args = {**(config.model_args or {}), **timm_kwargs}
        with_info = kwargs.pop("output_loading_info", False)
        kwargs.pop("ignore_mismatched_sizes", None)  # a head of another size is always reinitialized
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
        elif rows and labels != old_labels:
            model.reorder_head(rows)
        if image_size is not None:
            model.set_image_size(image_size)
        return (model, info) if with_info else model

    def _check_loaded(self, info: dict, name: str | Path, keeps_head: bool) -> None:
        head = {id(parameter) for parameter in classifier_parameters(self.timm_model)}
        in_head = {key for key, parameter in self.named_parameters() if id(parameter) in head}
        untrained = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
        wrong = sorted(untrained if keeps_head else untrained - in_head)
        if wrong:
            shown = shortened([key.removeprefix("timm_model.") for key in wrong], 5)
            raise ModelError(
                f"{name} does not match {self.config.architecture}: {len(wrong)} weights are missing or have another"
                f" shape ({shown}). Check architecture and model_args."
            )

    def saved_name(self, name: str) -> str:
        """Return timm's name of a weight, which both transformers and timm load.

        The stock class keeps the prefix `timm_model.` unless the weights came from a timm checkpoint (transformers
        5.23), and timm cannot load it.
        """
        return super().saved_name(name).removeprefix("timm_model.")

    @torch.no_grad()
    def reset_head(self) -> None:
        """Reinitialize the classifier: normal weights with `initializer_range`, zero bias.

        A norm layer in it, such as LeViT's, gets ones and zeros.
        """
        norms = self._norm_weights()
        for parameter in classifier_parameters(self.timm_model):
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=self.config.initializer_range)
            elif id(parameter) in norms:
                nn.init.ones_(parameter)
            else:
                nn.init.zeros_(parameter)

    def _norm_weights(self) -> set[int]:
        weights = (getattr(module, "weight", None) for module in self.timm_model.modules())
        return {id(weight) for weight in weights if isinstance(weight, nn.Parameter) and weight.ndim == 1}

    @torch.no_grad()
    def reorder_head(self, rows: list[int]) -> None:
        """Reorder the classes of a linear classifier; another one is reinitialized.

        Args:
            rows: index of each class before.
        """
        parameters = classifier_parameters(self.timm_model)  # of one linear layer, or two beside each other
        inputs = {parameter.shape[1:] for parameter in parameters if parameter.ndim > 1}
        has_norm = not self._norm_weights().isdisjoint(map(id, parameters))
        if len(inputs) > 1 or has_norm or any(len(parameter) != len(rows) for parameter in parameters):
            self.reset_head()
            self.config.remove_thresholds()
            return
        for parameter in parameters:
            parameter.copy_(parameter[rows])
        if getattr(self.config, "thresholds", None):
            self.config.thresholds = [self.config.thresholds[row] for row in rows]

    def set_image_size(self, image_size: int) -> None:
        """Change the image size in pixels; timm resamples the position embeddings.

        Raises:
            ModelError: the architecture does not support the size.
            TypeError: not an integer.
            ValueError: not positive.
        """
        check_image_size(image_size)
        image_size = int(image_size)  # numpy's are not JSON
        if (image_size, image_size) == self.config.image_size:
            return
        check_patches(self.timm_model, image_size)
        resizable = hasattr(self.timm_model, "set_input_size")
        if not resizable and self.config.pretrained_cfg.get("fixed_input_size"):
            raise ModelError(
                f"image_size: must be {self.config.image_size[0]} for {self.config.architecture}, got {image_size}."
            )
        changed = resize_input(self.timm_model, image_size) if resizable else {}
        self.config.set_image_size(image_size, is_argument=resizable, **changed)
        self._check_rebuilt()

    def _check_rebuilt(self) -> None:
        """Raise `ModelError` unless the configuration builds a model for these weights."""
        with torch.device("meta"):
            rebuilt = type(self)(self.config).state_dict()
        changed = [name for name, value in self.state_dict().items() if rebuilt[name].shape != value.shape]
        if changed:
            raise ModelError(
                f"image_size: {self.config.architecture} cannot be reloaded at {self.config.image_size[0]} px"
                f" ({changed[0].removeprefix('timm_model.')} has another shape). Omit image_size."
            )

    def freeze(self, part: str | int) -> None:
        """Freeze the "backbone", or the stem and the first `part` blocks (eval mode)."""
        freeze(self.timm_model, part)
        self.eval_frozen_modules()

    def add_feature_projection(self, size: int) -> None:
        """Add a linear projection of the pooled features, for feature distillation.

        While it is there, `logits` are a pair of logits and projected features (batch, size) in training mode. It is
        saved in checkpoints.
        """
        with torch.no_grad(), eval_mode(self):
            features = self.pooled_features(torch.zeros(1, 3, *self.config.image_size, device=self.device))
        projection = nn.Linear(features.shape[1], size, device=self.device)
        setattr(self.timm_model, FEATURE_PROJECTION, projection)  # a name of the network, as all names in checkpoints

    def remove_feature_projection(self) -> int:
        """Remove the projection for features, and return its number of parameters."""
        projection = getattr(self.timm_model, FEATURE_PROJECTION, None)
        if projection is None:
            return 0
        delattr(self.timm_model, FEATURE_PROJECTION)
        return sum(parameter.numel() for parameter in projection.parameters())

    def pooled_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Compute the inputs of the head (batch, dimensions)."""
        maps = self.timm_model.forward_features(pixel_values)
        return self.timm_model.forward_head(maps, pre_logits=True).flatten(1)

    def _forward_with_features(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        maps = self.timm_model.forward_features(pixel_values.to(self.device, self.dtype))
        features = self.timm_model.forward_head(maps, pre_logits=True).flatten(1)
        projection = getattr(self.timm_model, FEATURE_PROJECTION)
        return ImageClassifierOutput(logits=(self.timm_model.forward_head(maps), projection(features)))

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutput | tuple:
        """Compute logits (batch, classes).

        Args:
            pixel_values: (batch, channels, height, width).
            labels: class ids (batch,), or targets (batch, classes), to compute the loss for.
            output_attentions: return each block's attention weights (batch, heads, tokens, tokens); only for models
                with plain attention blocks (ViT, DeiT, DINOv2, BEiT, EVA, ...).
            return_dict: return an `ImageClassifierOutput` rather than a tuple; None follows the configuration.
            **kwargs: further arguments of `TimmWrapperForImageClassification.forward`.
        """
        if self.training and hasattr(self.timm_model, FEATURE_PROJECTION):
            return self._forward_with_features(pixel_values)
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


def _to_hfvit_config(config: PretrainedConfig, pretrained_cfg: dict[str, Any]) -> HFViTConfig:
    """Convert a `TimmWrapperConfig`, with a default for `pretrained_cfg`."""
    names = [config.id2label[index] for index in range(config.num_labels)]
    values = {**config.to_dict(), "label_names": names, "num_classes": len(names)}
    return HFViTConfig.from_dict({"pretrained_cfg": pretrained_cfg, **values})


def _requested_labels(labels: list[str] | None, old_labels: list[str], kwargs: dict[str, Any]) -> list[str]:
    """Return the class names that `from_pretrained` is asked for, else the old ones.

    Args:
        labels: class names, or None.
        old_labels: class names of the checkpoint.
        kwargs: arguments of `from_pretrained`, without `id2label`, `label2id` and `num_labels` afterwards.

    Raises:
        TypeError: class names or their container are of another type.
        ValueError: no class, ids other than 0, 1, ..., no number of labels, or arguments that contradict each other.
    """
    requests: dict[str, list[str]] = {}
    if labels is not None:
        requests["labels"] = _as_names(labels)
    id2label = kwargs.pop("id2label", None)
    label2id = kwargs.pop("label2id", None)
    num_labels = kwargs.pop("num_labels", None)
    is_count = isinstance(num_labels, Integral) and not isinstance(num_labels, bool) and num_labels > 0
    if num_labels is not None and not is_count:
        raise ValueError(f"num_labels: must be a positive integer, got {num_labels!r}.")
    for option, value in {"id2label": id2label, "label2id": label2id}.items():
        if not isinstance(value, Mapping | None):
            raise TypeError(f"{option}: must be a dict, got {value!r}.")
    if id2label is not None:
        requests["id2label"] = _in_order("id2label", id2label.items())
    elif label2id is not None:  # classes with the same name are one in label2id
        requests["label2id"] = _in_order("label2id", ((index, name) for name, index in label2id.items()))
    if empty := next((option for option, names in requests.items() if not names), None):
        raise ValueError(f"{empty}: must have at least one class name.")
    if not requests:
        if num_labels is not None and num_labels != len(old_labels):
            return [f"LABEL_{index}" for index in range(num_labels)]
        return old_labels
    (option, names), *others = requests.items()
    for other, other_names in others:
        if other_names != names:
            raise ValueError(f"{other}: must have the class names of {option}, got {other_names}. Pass one of them.")
    if num_labels is not None and num_labels != len(names):
        raise ValueError(f"num_labels: must be {len(names)}, the classes of {option}, got {num_labels}. Omit it.")
    return names


def _old_rows(labels: list[str], old_labels: list[str]) -> list[int] | None:
    """Return the old index of each class, None unless the classes are the old ones."""
    if labels == old_labels:  # also if a name occurs twice
        return list(range(len(labels)))
    row_of = {label: row for row, label in enumerate(old_labels)}
    if len(labels) != len(row_of) or len(old_labels) != len(row_of) or set(labels) != set(row_of):
        return None
    return [row_of[label] for label in labels]


def _as_names(labels: Any) -> list[str]:
    """Return class names as a list, or raise `TypeError` if they are none."""
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise TypeError(f"labels: must be a list of class names, got {labels!r}.")
    names = list(labels)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise TypeError(f"labels: must be strings, got {wrong[0]!r}.")
    return names


def _in_order(option: str, classes: Iterable[tuple[Any, Any]]) -> list[str]:
    """Return class names by index.

    Args:
        option: name of the argument.
        classes: pairs of index and class name.

    Raises:
        TypeError: a class name is not a string.
        ValueError: an index is missing, or no integer.
    """
    name_of = {}
    for index, name in classes:
        if not isinstance(name, str):
            raise TypeError(f"{option}: class names must be strings, got {name!r}.")
        if not re.fullmatch(r"\d+", str(index)):
            raise ValueError(f"{option}: indices must be non-negative integers, got {index!r}.")
        name_of[int(index)] = name
    if sorted(name_of) != list(range(len(name_of))):
        raise ValueError(
            f"{option}: indices must be 0 to {len(name_of) - 1}, got {', '.join(map(str, sorted(name_of)[:20]))}."
        )
    return [name_of[index] for index in range(len(name_of))]


def _set_values(config: HFViTConfig, kwargs: dict[str, Any]) -> None:
    """Move keyword arguments to the configuration, as the stock class does."""
    problem_type = kwargs.pop("problem_type", None)
    if problem_type:
        known = (SINGLE_LABEL, MULTI_LABEL, "regression")  # those of transformers
        if problem_type not in known:
            raise ValueError(f"problem_type: must be one of {', '.join(known)}, got {problem_type!r}.")
        config.set_problem_type(problem_type)
    for key in (config.to_dict().keys() - {"dtype", "torch_dtype"}) & kwargs.keys():
        setattr(config, key, kwargs.pop(key))


# For `from_config`; saved checkpoints have the stock class.
AutoModelForImageClassification.register(HFViTConfig, HFViTForImageClassification)
