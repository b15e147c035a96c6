"""`HFViTConfig`: TimmWrapperConfig with labels and preprocessing."""

from pathlib import Path
from typing import Any

import timm
from transformers import TimmWrapperConfig

from hfvit.errors import ModelError, nearest

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


def load_config(name: str | Path, **hub_kwargs) -> HFViTConfig:
    """The configuration of a timm, transformers `timm_wrapper` or hfvit checkpoint: a Hub id or a folder.

    `hub_kwargs` go to `get_config_dict` (`revision`, `token`, ...). Raises `ModelError` for another kind of
    checkpoint.
    """
    try:
        raw, _ = HFViTConfig.get_config_dict(name, **hub_kwargs)
    except (OSError, ValueError) as error:
        raise ModelError(f"model_name_or_path: {name} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(raw, dict):
        raise ModelError(f"model_name_or_path: config.json of {name} cannot be read: it holds no JSON object.")
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


def _nearest_model(name: str) -> str:
    return nearest(name.split(".")[0], timm.list_models())
