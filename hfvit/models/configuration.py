"""`HFViTConfig`: TimmWrapperConfig with labels and preprocessing."""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_data_config
from transformers import TimmWrapperConfig

from hfvit.artifacts.constants import ADAPTER_FILES
from hfvit.errors import ModelError, nearest, wrap_library_errors
from hfvit.recipe.arguments import SINGLE_LABEL, ModelArguments
from hfvit.utils.hub_ids import folder_or_hub_id

ADAPTER_WEIGHTS = (ADAPTER_FILES[1], "adapter_model.bin")  # that peft reads
# Keys of pretrained_cfg about the origin of timm's weights, dropped from fine-tuned models.
_ORIGIN_KEYS = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "num_classes", "state_dict", "cache_dir")
# Keys of pretrained_cfg about timm's weights, which a model trained from scratch does not have.
_WEIGHTS_KEYS = ("tag", "custom_load", "license", "origin_url", "paper_name", "paper_ids", "notes")
# Repositories in the format of transformers -> timm's name of the same weights.
_DINOV3_SIZES = {"s": "small", "b": "base", "l": "large"}
_TIMM_NAMES: dict[str, Callable[[re.Match], str]] = {
    r"google/vit-(\w+)-patch(\d+)-224-in21k": lambda m: f"vit_{m[1]}_patch{m[2]}_224.orig_in21k",
    r"google/vit-(\w+)-patch(\d+)-(\d+)": lambda m: f"vit_{m[1]}_patch{m[2]}_{m[3]}.orig_in21k_ft_in1k",
    r"facebook/(deit-[\w-]+-patch16-\d+)": lambda m: f"{m[1]}.fb_in1k",
    r"facebook/convnext-(\w+)-224": lambda m: f"convnext_{m[1]}.fb_in1k",
    r"facebook/dinov2-(\w+)": lambda m: f"vit_{m[1]}_patch14_dinov2.lvd142m",
    r"facebook/dinov3-vit([sbl])16-pretrain-lvd1689m": lambda m: f"vit_{_DINOV3_SIZES[m[1]]}_patch16_dinov3.lvd1689m",
    r"microsoft/(swin-\w+-patch4-window\d+-\d+)": lambda m: f"{m[1]}.ms_in1k",
}


class HFViTConfig(TimmWrapperConfig):
    """Extend `TimmWrapperConfig` with consistent labels and preprocessing.

    The stock class keeps an old `label_names` when the labels change, and has no preprocessing for a model trained
    from scratch.
    """

    @classmethod
    def from_architecture(cls, architecture: str, labels: list[str], **model_args) -> "HFViTConfig":
        """Create the configuration of an untrained timm model.

        Args:
            architecture: model name in timm.
            labels: class names in the order of the logits.
            **model_args: further arguments of `timm.create_model`.

        Raises:
            ModelError: timm has no such model.
        """
        check_architecture(architecture)
        cfg = timm.get_pretrained_cfg(architecture)
        unwanted = (*_ORIGIN_KEYS, *_WEIGHTS_KEYS)
        pretrained_cfg = {k: v for k, v in (cfg.to_dict() if cfg else {}).items() if k not in unwanted}
        return cls(
            architecture=architecture,
            model_args=dict(model_args),
            pretrained_cfg=pretrained_cfg,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
        )

    @property
    def label_names(self) -> list[str]:
        """Return class names in the order of the logits, derived from `id2label`."""
        return [self.id2label[index] for index in range(self.num_labels)]

    @label_names.setter
    def label_names(self, names: list[str]) -> None:
        """Ignore the value of a checkpoint, as `from_dict` has converted it to `id2label`."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Return (height, width) in pixels after preprocessing."""
        return tuple(self.pretrained_cfg.get("input_size", (3, 224, 224))[-2:])

    def set_image_size(self, image_size: int, is_argument: bool, **model_args: Any) -> None:
        """Set the image size of preprocessing and, if `is_argument`, of the architecture.

        Args:
            image_size: height and width in pixels.
            is_argument: whether the architecture has the argument `img_size`.
            **model_args: arguments that depend on the size, such as the windows of Swin and MaxViT.
        """
        self.pretrained_cfg = {**self.pretrained_cfg, "input_size": [3, image_size, image_size]}
        if is_argument:
            self.model_args = {**(self.model_args or {}), **model_args, "img_size": image_size}

    def set_problem_type(self, problem_type: str) -> None:
        """Set the problem type, and remove thresholds of an earlier training.

        A single label is None, the default of transformers.
        """
        self.problem_type = None if problem_type == SINGLE_LABEL else problem_type
        self.remove_thresholds()

    def remove_thresholds(self) -> None:
        """Remove the thresholds that were fitted to an earlier head."""
        if hasattr(self, "thresholds"):
            del self.thresholds

    def set_preprocessing(self, **values: Any) -> None:
        """Override `mean`, `std`, `interpolation` or `crop_pct` of the image processor."""
        overrides = {key: value for key, value in values.items() if value is not None}
        self.pretrained_cfg = {**self.pretrained_cfg, **overrides}

    def set_crop_mode(self, crop_mode: str) -> None:
        """Set timm's `crop_mode` of the evaluation, "squash" or "center".

        torchvision starts a crop with an odd margin at the even pixel, transformers and transformers.js round down.
        "squash" resizes to an exact size; `crop_pct` changes to the nearest value whose margin is even, so that all
        start at the same pixel.
        """
        values: dict[str, Any] = {"crop_mode": crop_mode}
        if crop_mode == "squash":
            values["crop_pct"] = _even_crop_pct(self.image_size, resolve_data_config(self.pretrained_cfg)["crop_pct"])
        self.pretrained_cfg = {**self.pretrained_cfg, **values}

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["label_names"] = self.label_names
        output["num_classes"] = self.num_labels
        output["architectures"] = ["TimmWrapperForImageClassification"]
        return output


def check_model_name(arguments: ModelArguments) -> None:
    """Raise `ModelError` for a name that no model can have, without network."""
    if arguments.architecture:
        check_architecture(arguments.architecture)
    else:
        check_checkpoint_name(folder_or_hub_id(arguments.model_name_or_path, ModelError, "model_name_or_path"))


def check_architecture(name: str) -> None:
    """Raise `ModelError` if timm has no model of this name."""
    if not timm.is_model(name):
        hint = nearest(name.split(".")[0], timm.list_models())
        raise ModelError(f"architecture: no model '{name}' in timm {timm.__version__}.{hint}")


def check_checkpoint_name(name: str | Path) -> None:
    """Raise `ModelError` for a model name of timm that is no Hub id."""
    if "/" not in str(name) and not os.path.isdir(name) and timm.is_model(str(name)):
        raise ModelError(
            f"model_name_or_path: must be a folder or Hub id, but {name} is a model name of timm."
            f"{_weights_of(str(name))} Set architecture instead to train from scratch."
        )


def _weights_of(name: str) -> str:
    """Return which repository has timm's weights of a model, or an empty string."""
    try:
        weights = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None)
    except RuntimeError:  # an unknown model or tag
        weights = None
    return f" Pass {weights} for its weights." if weights else ""


def _timm_name(repository: str) -> str:
    """Return timm's name of the weights of a repository, an empty string if unknown.

    The repository is in the format of transformers.
    """
    for pattern, name in _TIMM_NAMES.items():
        if found := re.fullmatch(pattern, repository):
            return name(found).replace("-", "_")
    return ""


def load_config(name: str | Path, **hub_kwargs) -> HFViTConfig:
    """Load the configuration of a timm, `timm_wrapper` or hfvit checkpoint.

    Args:
        name: Hub id or folder.
        **hub_kwargs: arguments of `get_config_dict` (`revision`, `token`, ...).

    Raises:
        ModelError: the configuration cannot be read, or is not of a timm model; an adapter in the folder has no
            weights.
    """
    check_checkpoint_name(name)
    folder = Path(name) / (hub_kwargs.get("subfolder") or "")
    if (folder / ADAPTER_FILES[0]).is_file() and not any((folder / file).is_file() for file in ADAPTER_WEIGHTS):
        raise ModelError(
            f"model_name_or_path: {name} has {ADAPTER_FILES[0]}, but no weights of an adapter ({ADAPTER_WEIGHTS[0]})."
            " Remove this file, or add the weights."
        )
    try:
        raw, _ = HFViTConfig.get_config_dict(name, **hub_kwargs)
    except (OSError, ValueError) as error:
        architecture = str(name).removeprefix("timm/")  # timm/resnet18 is none of timm's repositories
        hint = _weights_of(architecture) if "." not in architecture and timm.is_model(architecture) else ""
        raise ModelError(
            f"model_name_or_path: {name} cannot be read: {str(error).splitlines()[0].rstrip('.')}.{hint}"
        ) from error
    if not isinstance(raw, dict):
        raise ModelError(f"model_name_or_path: config.json of {name} must have a JSON object.")
    if raw.get("model_type", "timm_wrapper") != "timm_wrapper" or "architecture" not in raw:
        kind = raw.get("model_type", "unknown")
        advice = _weights_of(_timm_name(str(name))) or " Pass the timm repository of the same weights (timm/...)."
        raise ModelError(
            f"model_name_or_path: must be a timm checkpoint, but {name} has the model type '{kind}'.{advice}"
        )
    if isinstance(raw.get("model_args"), dict):
        # timm's own checkpoints have it a second time (timm 1.0.30).
        raw["model_args"] = {key: value for key, value in raw["model_args"].items() if key != "num_classes"}
    # transformers raises various types for wrong values.
    with wrap_library_errors(ModelError, f"model_name_or_path: config.json of {name} cannot be read", limit=300):
        config = HFViTConfig.from_dict(raw)
    pretrained_cfg = getattr(config, "pretrained_cfg", None) or {}
    if not isinstance(pretrained_cfg, dict):
        raise ModelError(
            f"model_name_or_path: config.json of {name} must have an object as pretrained_cfg, got {pretrained_cfg!r}."
        )
    config.pretrained_cfg = {k: v for k, v in pretrained_cfg.items() if k not in _ORIGIN_KEYS}
    return config


def _even_crop_pct(image_size: tuple[int, int], crop_pct: float) -> float:
    """Return the nearest `crop_pct` for which the margin of each side is even."""

    def margins(candidate: float) -> list[int]:
        return [math.floor(side / candidate) - side for side in image_size]  # as timm.data.transforms_factory

    if not any(margin % 2 for margin in margins(crop_pct)):
        return crop_pct
    side = image_size[0]
    # A quarter of a pixel more, so that rounding does not lower the size.
    candidates = [1.0, *(round(side / (side + margin + 0.25), 4) for margin in range(2, side + 2, 2))]
    even = [candidate for candidate in candidates if not any(margin % 2 for margin in margins(candidate))]
    return min(even, key=lambda candidate: abs(candidate - crop_pct))
