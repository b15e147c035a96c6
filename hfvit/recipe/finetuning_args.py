"""The fields of a recipe that say what learns from what: LoRA, linear probe, distillation, imbalanced classes."""

from dataclasses import dataclass, field
from typing import Any

from hfvit.errors import RecipeError
from hfvit.recipe.arguments import _check, _check_fraction, _check_positive, _field

METHODS = ("full", "lora", "linear_probe")
BALANCES = ("none", "sample", "weight")
DISTILLATIONS = ("soft", "hard")


@dataclass
class FinetuningArguments:
    """Fine-tuning: which weights learn, and from what."""

    finetuning: str = _field(
        "full",
        f"One of {', '.join(METHODS)}: all weights that `freeze` leaves, low-rank adapters and the head (needs peft),"
        " or a classifier that is solved on features extracted once.",
    )
    lora_rank: int = _field(8, "Rank of LoRA's matrices.")
    lora_alpha: float | None = _field(None, "LoRA's update is scaled by alpha / rank; twice the rank when not given.")
    lora_dropout: float = _field(0.0, "Dropout before LoRA's matrices.")
    lora_targets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers with a LoRA, by the last part of their name (qkv proj fc1 fc2); those of every attention"
            " when not given."
        },
    )
    probe_c: list[float] = field(
        default_factory=lambda: [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0],
        metadata={"help": "Inverse strengths of the probe's L2 penalty; the best on the validation split is taken."},
    )
    probe_passes: int = _field(
        0, "Augmented copies of each training image for the probe; 0 takes each image once, as evaluation sees it."
    )
    head_from_text: str | None = _field(
        None,
        "CLIP or SigLIP checkpoint whose image tower model_name_or_path is: the head starts from the classes' names.",
    )
    head_templates: list[str] = field(
        default_factory=lambda: ["a photo of a {}."],
        metadata={"help": "Sentences for head_from_text, with {} in the place of a class's name; averaged."},
    )
    class_balance: str = _field(
        "none",
        f"For classes of unequal size, one of {', '.join(BALANCES)}: draw every class as often, or weight the loss by"
        " the inverse of a class's share.",
    )
    teacher: str | None = _field(None, "Checkpoint of a larger model of the same classes to distil from.")
    distillation: str = _field(
        "soft", f"What the teacher says, one of {', '.join(DISTILLATIONS)}: its probabilities, or its decision."
    )
    distillation_alpha: float = _field(0.5, "Share of the teacher in the loss; the labels have the rest.")
    distillation_temperature: float = _field(2.0, "Softens both probabilities of soft distillation; 1 is as they are.")
    progressive_image_size: list[int] | None = field(
        default=None,
        metadata={
            "help": "Image sizes in pixels, ascending, that training begins with: an equal part of the steps each, and"
            " the last part at image_size."
        },
    )

    def __post_init__(self):
        for key, allowed in (("finetuning", METHODS), ("class_balance", BALANCES), ("distillation", DISTILLATIONS)):
            _check(getattr(self, key) in allowed, key, getattr(self, key), f"one of {', '.join(allowed)}")
        for key in ("lora_rank", "lora_alpha", "distillation_temperature"):
            _check_positive(key, getattr(self, key))
        _check_fraction("lora_dropout", self.lora_dropout)
        _check(0.0 <= self.distillation_alpha <= 1.0, "distillation_alpha", self.distillation_alpha, "0 to 1")
        _check(bool(self.probe_c) and min(self.probe_c) > 0, "probe_c", self.probe_c, "numbers above 0")
        whole = bool(self.head_templates) and all(text.count("{}") == 1 for text in self.head_templates)
        _check(whole, "head_templates", self.head_templates, "sentences with {} once in each")
        sizes = self.progressive_image_size
        ascend = sizes is None or (bool(sizes) and sizes == sorted(set(sizes)) and sizes[0] > 0)
        _check(ascend, "progressive_image_size", sizes, "ascending sizes, such as [96, 160]")
        _check(self.probe_passes >= 0, "probe_passes", self.probe_passes, "0 or more")

    def check_against(self, model, data, augmentation, training) -> None:
        """Raise `RecipeError` for what the recipe's other sections rule out."""
        if self.finetuning != "full":
            self._refuse(bool(model.freeze), "freeze", "which says itself what does not train; leave freeze out")
            self._refuse(bool(model.text_encoder), "text_encoder", "which is for images alone")
            self._refuse(bool(model.patch_sizes), "patch_sizes", "which has one patch size")
            self._refuse(not model.model_name_or_path, "architecture", "which leaves pretrained weights as they are")
        if self.finetuning == "linear_probe":
            mixes = bool(augmentation.mixup_alpha or augmentation.cutmix_alpha or augmentation.random_erasing)
            self._refuse(mixes, "mixup_alpha, cutmix_alpha, random_erasing", "which is solved on whole images")
            self._refuse(data.streaming, "streaming", "which needs every image at once")
            self._refuse(bool(self.teacher), "teacher", "which is solved on the labels")
            self._refuse(self.class_balance == "sample", "class_balance", "which draws nothing; use weight")
            self._refuse(training.ema_decay is not None, "ema_decay", "which takes no steps")
            self._refuse(bool(self.head_from_text), "head_from_text", "which solves for the head")
        if self.head_from_text and (model.text_encoder or not model.model_name_or_path):
            raise RecipeError(
                "head_from_text: it needs model_name_or_path, the image tower of that pair, and no text_encoder."
            )
        if self.progressive_image_size:
            others = {"text_encoder": model.text_encoder, "patch_sizes": model.patch_sizes}
            others["finetuning: linear_probe"] = self.finetuning == "linear_probe"
            for other in (key for key, given in others.items() if given):
                raise RecipeError(f"progressive_image_size: not with {other}; leave one of them out.")
        if self.teacher and model.text_encoder:
            raise RecipeError("teacher: a teacher sees images alone; not with text_encoder.")
        if self.class_balance != "none" and data.streaming:
            raise RecipeError(f"class_balance: {self.class_balance} needs the labels of every image; not of a stream.")

    def _refuse(self, condition: bool, key: str, why: str) -> None:
        if condition:
            raise RecipeError(f"{key}: not with finetuning: {self.finetuning}, {why}.")

    @property
    def checkpoints(self) -> dict[str, str | None]:
        """The further models that it learns from, by the keys that name them."""
        return {key: getattr(self, key) for key in ("teacher", "head_from_text")}

    @property
    def probe(self) -> dict[str, Any]:
        """The arguments of `linear_probe.LinearProbeTrainer` that a recipe gives."""
        return {"c": self.probe_c, "passes": self.probe_passes, "class_balance": self.class_balance}

    @property
    def distilling(self) -> dict[str, Any]:
        """The arguments of `objective.build_objective` that a recipe gives."""
        return {
            "teacher": self.teacher,
            "distillation": self.distillation,
            "alpha": self.distillation_alpha,
            "temperature": self.distillation_temperature,
        }

    @property
    def text_head(self) -> dict[str, Any]:
        """The arguments of `text_head.start_from_text` that a recipe gives."""
        return {"source": self.head_from_text, "templates": self.head_templates}

    @property
    def lora(self) -> dict[str, Any]:
        """The arguments of `lora.add_lora` that a recipe gives."""
        return {
            "rank": self.lora_rank,
            "alpha": self.lora_alpha or 2 * self.lora_rank,
            "dropout": self.lora_dropout,
            "targets": self.lora_targets,
        }
