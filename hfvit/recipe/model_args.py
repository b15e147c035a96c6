"""The fields of a recipe that say which network is trained: timm's image model, and beside it a text encoder."""

import json
from dataclasses import dataclass, field
from typing import Any

from hfvit.errors import RecipeError
from hfvit.recipe.arguments import (
    AugmentationArguments,
    DataArguments,
    _check,
    _check_fraction,
    _check_positive,
    _field,
)

FUSIONS = ("cross_attention", "concatenation")


@dataclass
class TextArguments:
    """What joins a text encoder to the image model; needs text_column."""

    text_encoder: str | None = _field(
        None, "Text encoder of transformers, with its tokenizer, that reads text_column: a folder or a Hub id."
    )
    text_encoder_revision: str | None = _field(None, "Branch, tag or commit of text_encoder on the Hub.")
    fusion: str = _field("cross_attention", f"How image and text are joined, one of {', '.join(FUSIONS)}.")
    fusion_layers: int = _field(2, "Blocks of cross_attention.")
    max_text_length: int = _field(64, "Tokens of a text that are read; longer texts are cut.")

    def check_texts(self, data: DataArguments, augmentation: AugmentationArguments) -> None:
        """Raise `RecipeError` for what a model that reads texts rules out, or lacks."""
        if (self.text_encoder is None) != (data.text_column is None):
            given, lacks = ("text_encoder", "text_column") if self.text_encoder else ("text_column", "text_encoder")
            raise RecipeError(f"{given} is given without {lacks}; a model that reads texts needs both.")
        if self.text_encoder is None:
            return
        _check(self.fusion in FUSIONS, "fusion", self.fusion, f"one of {', '.join(FUSIONS)}")
        _check_positive("fusion_layers", self.fusion_layers)
        _check_positive("max_text_length", self.max_text_length)
        if data.streaming:
            raise RecipeError("streaming: texts are read from a whole data set only; set streaming to false.")
        for key in ("mixup_alpha", "cutmix_alpha"):
            if getattr(augmentation, key):
                raise RecipeError(f"{key}: a mixture of two images has no text of its own; set it to 0.")

    @property
    def text_options(self) -> dict[str, Any]:
        """The arguments of `image_text.add_text_encoder` that a recipe gives."""
        keys = ("text_encoder", "fusion", "fusion_layers", "max_text_length")
        return {**{key: getattr(self, key) for key in keys}, "revision": self.text_encoder_revision}


@dataclass
class ModelArguments(TextArguments):
    """Model: which network, at which image size, with which parts trained, and with which reader of texts."""

    model_name_or_path: str | None = _field(
        None, "Pretrained timm checkpoint: a Hub id (timm/vit_base_patch16_224.augreg_in21k) or a local folder."
    )
    architecture: str | None = _field(
        None, "timm model name (vit_tiny_patch16_224) trained from scratch; instead of model_name_or_path."
    )
    model_args: dict | str | None = _field(
        None, "Further keyword arguments of timm.create_model, as a mapping (JSON on the command line)."
    )
    model_revision: str | None = _field(None, "Branch, tag or commit of model_name_or_path on the Hub.")
    image_size: int | None = _field(
        None, "Height and width in pixels that the model sees; position embeddings are resampled to it."
    )
    patch_sizes: list[int] | None = field(
        default=None,
        metadata={
            "help": "Patch sizes in pixels to train at, one drawn for each optimiser step; what is saved has the"
            " model's own."
        },
    )
    drop_rate: float | None = _field(
        None, "Dropout before the classifier; proj_drop_rate in model_args is that of the blocks."
    )
    attn_drop_rate: float | None = _field(None, "Dropout of attention weights.")
    drop_path_rate: float | None = _field(None, "Stochastic depth at the last block, falling to 0 at the first.")
    freeze: str | None = _field(
        None, "Part that does not train: 'backbone' (linear probe), or N for the stem and the first N blocks."
    )

    def __post_init__(self):
        if (self.model_name_or_path is None) == (self.architecture is None):
            raise RecipeError(
                "Give exactly one of model_name_or_path (a checkpoint to start from) and architecture (to train anew)."
            )
        if isinstance(self.model_args, str):
            try:
                self.model_args = json.loads(self.model_args)
            except json.JSONDecodeError as error:
                raise RecipeError(f"model_args: not valid JSON ({error}); write it like '{{\"depth\": 8}}'.") from None
        _check(
            self.model_args is None or isinstance(self.model_args, dict),
            "model_args",
            self.model_args,
            "a mapping such as {depth: 8}",
        )
        if "img_size" in (self.model_args or {}):
            raise RecipeError(
                "model_args: give the size as image_size, which preprocessing follows too, not img_size."
            )
        _check_positive("image_size", self.image_size)
        sizes = self.patch_sizes
        _check(sizes is None or len(set(sizes)) > 1, "patch_sizes", sizes, "two or more sizes, such as [8, 16, 32]")
        for key in ("drop_rate", "attn_drop_rate", "drop_path_rate"):
            _check_fraction(key, getattr(self, key))
        if self.freeze in ("none", "no", ""):
            self.freeze = None
        valid = self.freeze in (None, "backbone") or (str(self.freeze).isdigit() and int(self.freeze) > 0)
        _check(valid, "freeze", self.freeze, "nothing, 'backbone', or the number of blocks to freeze")

    @property
    def timm_kwargs(self) -> dict[str, Any]:
        """What timm.create_model gets: `model_args` plus the drop rates that were given."""
        rates = ("drop_rate", "attn_drop_rate", "drop_path_rate")
        given = {key: getattr(self, key) for key in rates if getattr(self, key) is not None}
        return {**(self.model_args or {}), **given}

    @property
    def checkpoints(self) -> dict[str, str | None]:
        """What the model is made from, by the keys that name it."""
        return {key: getattr(self, key) for key in ("model_name_or_path", "text_encoder")}
