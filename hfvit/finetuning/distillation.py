"""Training loss with class weights and distillation of logits or features."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from torch import nn

from hfvit.errors import ModelError, RecipeError
from hfvit.metrics.task import task_of
from hfvit.models.modeling import HFViTForImageClassification
from hfvit.recipe.arguments import FEATURE, SINGLE_LABEL
from hfvit.training.distributed import are_weights_sharded
from hfvit.training.losses import LOSSES, Losses, feature_distillation
from hfvit.utils.formatting import shortened


class FrozenTeacher(nn.Module):
    """Run a network on the pixel values of a student; base class of the teachers.

    Args:
        name: folder or Hub id of a checkpoint for `HFViTForImageClassification`.
        student: model whose normalization and image size the pixel values have.
        **options: further arguments of `HFViTForImageClassification.from_pretrained`.

    Raises:
        ModelError: the teacher cannot be loaded.
    """

    def __init__(self, name: str, student: HFViTForImageClassification, **options: Any):
        super().__init__()
        try:
            self.model = HFViTForImageClassification.from_pretrained(name, dtype=torch.float32, **options)
        except ModelError as error:
            raise ModelError(f"teacher: {error}") from error
        self.model.requires_grad_(False)
        self.image_size = self.model.config.image_size
        own, other = (resolve_data_config(m.config.pretrained_cfg) for m in (self.model, student))
        # (x * std + mean - own_mean) / own_std as one multiplication and one addition
        mean, std, own_mean, own_std = (
            torch.tensor(cfg[key]).view(3, 1, 1) for cfg in (other, own) for key in ("mean", "std")
        )
        self.register_buffer("scale", std / own_std)
        self.register_buffer("shift", (mean - own_mean) / own_std)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Keep the teacher in eval mode."""
        return super().train(False)

    def prepare(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalize and resize the student's pixel values for the teacher."""
        pixels = pixel_values * self.scale + self.shift
        if pixels.shape[-2:] != self.image_size:
            pixels = F.interpolate(pixels, self.image_size, mode="bicubic", antialias=True)
        return pixels


class FeatureTeacher(FrozenTeacher):
    """Compute a teacher's pooled features.

    Its classes do not matter, and it needs no head.

    Args:
        name: folder or Hub id of a timm checkpoint.
        student: model whose normalization and image size the pixel values have.

    Raises:
        ModelError: the teacher cannot be loaded.
    """

    def __init__(self, name: str, student: HFViTForImageClassification):
        super().__init__(name, student, labels=student.config.label_names)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Compute features (batch, dimensions), resizing images to the teacher's size."""
        return self.model.pooled_features(self.prepare(pixel_values))


class Teacher(FrozenTeacher):
    """Compute a teacher's logits of the student's pixel values and classes.

    Args:
        name: folder or Hub id of a checkpoint for `HFViTForImageClassification`.
        labels: the student's class names in order; the teacher must have all of them, in any order.
        student: model whose normalization and image size the pixel values have.

    Raises:
        ModelError: the teacher cannot be loaded, or lacks a class.
    """

    def __init__(self, name: str, labels: list[str], student: HFViTForImageClassification):
        super().__init__(name, student)
        known = self.model.config.label_names
        missing = [label for label in labels if label not in known]
        if missing:
            raise ModelError(
                f"teacher: must have all classes of the student, but {name} lacks '{missing[0]}'"
                f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''} (found: {shortened(known, 5)})."
            )
        kinds = [task_of(config).problem_type for config in (self.model.config, student.config)]
        if kinds[0] != kinds[1]:
            raise ModelError(f"teacher: {name} has the problem type {kinds[0]}, but the student has {kinds[1]}.")
        self.register_buffer("index", torch.tensor([known.index(label) for label in labels]))

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Compute logits (batch, classes), resizing images to the teacher's size."""
        return self.model(self.prepare(pixel_values)).logits[:, self.index]


class Objective(nn.Module):
    """Compute the training loss, cross-entropy with optional distillation.

    It is `(1 - alpha) * cross_entropy + alpha * distillation` with a teacher.

    A student with a distillation token (timm's `deit_*_distilled`) has two logits: the class token learns from the
    labels, the distillation token from the teacher (DeiT, https://arxiv.org/abs/2012.12877). With a feature teacher,
    the second of the pair are projected features.

    Args:
        class_weights: weights of the labels' loss (classes,), or None.
        teacher: the teacher, or None for the labels only.
        kind: "soft", "hard" or "feature", see `training.losses`; a `FeatureTeacher` for the last.
        alpha: weight of the distillation loss, 0 to 1.
        temperature: temperature of soft distillation.
        losses: losses of the labels and of distillation.
    """

    def __init__(
        self,
        class_weights=None,
        teacher: FrozenTeacher | None = None,
        kind: str = "soft",
        alpha: float = 0.5,
        temperature: float = 1.0,
        losses: Losses = LOSSES[SINGLE_LABEL],
    ):
        super().__init__()
        weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights)
        self.teacher = teacher
        self.kind = kind
        self.alpha = alpha
        self.temperature = temperature
        self.losses = losses

    def forward(
        self,
        logits: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        labels: torch.Tensor,
        pixel_values: torch.Tensor,
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """Compute the loss of a batch.

        Args:
            logits: (batch, classes), or a pair for the class and the distillation token, or of logits and features.
            labels: class ids (batch,) or probabilities (batch, classes), as in `training.losses`.
            pixel_values: (batch, channels, height, width), for the teacher.
            label_smoothing: label smoothing of the labels' loss.
        """
        class_logits, distillation_logits = logits if isinstance(logits, tuple) else (logits, logits)
        loss = self.losses.labels(class_logits, labels, label_smoothing, self.class_weights)
        if self.teacher is None:
            return loss
        target = self.teacher(pixel_values)
        if self.kind == FEATURE:
            distillation = feature_distillation(distillation_logits, target)
        elif self.kind == "hard":
            distillation = self.losses.hard(distillation_logits, target)
        else:
            distillation = self.losses.soft(distillation_logits, target, self.temperature)
        return (1 - self.alpha) * loss + self.alpha * distillation


def build_objective(
    model: HFViTForImageClassification,
    class_weights=None,
    teacher: str | None = None,
    distillation: str = "soft",
    alpha: float = 0.5,
    temperature: float = 1.0,
    losses: Losses | None = None,
) -> Objective | None:
    """Build the training loss, None for the default loss of the labels.

    With a teacher of logits, distilled training of a student with a distillation token is switched on; its prediction
    is the mean of both tokens. With a teacher of features, the student gets a projection, to be removed at the end.

    Args:
        model: the student.
        class_weights: weights of the cross-entropy (classes,); None for equal weights.
        teacher: folder or Hub id of the teacher; None for no distillation.
        distillation: "soft" (the teacher's probabilities), "hard" (its predicted class) or "feature" (its pooled
            features).
        alpha: weight of the distillation loss, 0 to 1.
        temperature: temperature of soft distillation.
        losses: losses of the labels and of distillation; None for those of the model's problem type.

    Raises:
        ModelError: the teacher cannot be loaded, lacks a class, or has another problem type.
        RecipeError: features are distilled with sharded weights.
    """
    if distillation == FEATURE and teacher and are_weights_sharded():
        raise RecipeError("distillation: feature requires unsharded weights. Launch without FSDP or DeepSpeed.")
    if teacher is None and class_weights is None and losses is None:
        return None
    losses = losses or LOSSES[task_of(model.config).problem_type]
    if teacher is None:
        return Objective(class_weights, losses=losses)
    if distillation == FEATURE:
        loaded = FeatureTeacher(teacher, model)
        model.add_feature_projection(loaded(torch.zeros(1, 3, *model.config.image_size)).shape[1])
        return Objective(class_weights, loaded, distillation, alpha, losses=losses)
    if hasattr(model.timm_model, "set_distilled_training"):
        model.timm_model.set_distilled_training(True)
    loaded = Teacher(teacher, model.config.label_names, model)
    return Objective(class_weights, loaded, distillation, alpha, temperature, losses)
