"""Training loss with class weights and knowledge distillation."""

import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from torch import nn

from hfvit.errors import ModelError
from hfvit.models.modeling import HFViTForImageClassification
from hfvit.training.losses import cross_entropy, hard_distillation, soft_distillation


class Teacher(nn.Module):
    """A classifier in evaluation mode that answers for the student's pixel values, in the student's classes.

    Args:
        name: a folder or a Hub id that `HFViTForImageClassification` loads.
        labels: the student's classes in order; the teacher has them all, in any order.
        student: whose normalisation and image size the pixel values have.
    """

    def __init__(self, name: str, labels: list[str], student: HFViTForImageClassification):
        super().__init__()
        try:
            self.model = HFViTForImageClassification.from_pretrained(name, dtype=torch.float32)
        except ModelError as error:
            raise ModelError(f"teacher: {error}") from error
        known = self.model.config.label_names
        missing = [label for label in labels if label not in known]
        if missing:
            raise ModelError(
                f"teacher: {name} does not know the class '{missing[0]}'"
                f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}; a teacher has all of the student's"
                f" classes, and this one's are {', '.join(known[:5])}{', ...' if len(known) > 5 else ''}."
            )
        self.model.requires_grad_(False)
        self.image_size = self.model.config.image_size
        self.register_buffer("index", torch.tensor([known.index(label) for label in labels]))
        own, other = (resolve_data_config(m.config.pretrained_cfg) for m in (self.model, student))
        # (x * std + mean - own mean) / own std, as one multiplication and one addition
        mean, std, own_mean, own_std = (
            torch.tensor(cfg[key]).view(3, 1, 1) for cfg in (other, own) for key in ("mean", "std")
        )
        self.register_buffer("scale", std / own_std)
        self.register_buffer("shift", (mean - own_mean) / own_std)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, classes)` of the student's pixel values, resized where the teacher takes another size."""
        pixels = pixel_values * self.scale + self.shift
        if pixels.shape[-2:] != self.image_size:
            pixels = F.interpolate(pixels, self.image_size, mode="bicubic", antialias=True)
        return self.model(pixels).logits[:, self.index]


class Objective(nn.Module):
    """What a training step minimises: `(1 - alpha)` of the labels' loss and `alpha` of the teacher's.

    A student with a distillation token (timm's `deit_*_distilled`) answers with two logits: its class token learns
    from the labels, the other from the teacher (DeiT, https://arxiv.org/abs/2012.12877).

    Args:
        class_weights: `(classes,)`, of the labels' loss.
        kind: `soft` or `hard`, see losses.py.
    """

    def __init__(
        self,
        class_weights=None,
        teacher: Teacher | None = None,
        kind: str = "soft",
        alpha: float = 0.5,
        temperature: float = 1.0,
    ):
        super().__init__()
        weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights)
        self.teacher, self.kind, self.alpha, self.temperature = teacher, kind, alpha, temperature

    def forward(
        self,
        logits: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        labels: torch.Tensor,
        pixel_values: torch.Tensor,
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """The loss of logits `(batch, classes)`, or of the pair of them, for labels as in `losses.cross_entropy`."""
        from_labels, from_teacher = logits if isinstance(logits, tuple) else (logits, logits)
        loss = cross_entropy(from_labels, labels, label_smoothing, self.class_weights)
        if self.teacher is None:
            return loss
        answer = self.teacher(pixel_values)
        if self.kind == "hard":
            distance = hard_distillation(from_teacher, answer)
        else:
            distance = soft_distillation(from_teacher, answer, self.temperature)
        return (1 - self.alpha) * loss + self.alpha * distance


def build_objective(
    model: HFViTForImageClassification,
    class_weights=None,
    teacher: str | None = None,
    distillation: str = "soft",
    alpha: float = 0.5,
    temperature: float = 1.0,
) -> Objective | None:
    """Build the training loss; None where it is plain cross-entropy.

    With a teacher, a student that has a distillation token trains it; its prediction remains the mean of both tokens'.

    Args:
        model: the student.
        class_weights: `(classes,)`, of the labels' loss; None for equal weights.
        teacher: folder or Hub id of the teacher; None for no distillation.
        distillation: `soft` (the teacher's probabilities) or `hard` (its decision).
        alpha: share of the teacher in the loss, 0 to 1.
        temperature: of both probabilities in soft distillation.
    """
    if teacher is None:
        return None if class_weights is None else Objective(class_weights)
    if hasattr(model.timm_model, "set_distilled_training"):
        model.timm_model.set_distilled_training(True)
    taught_by = Teacher(teacher, model.config.label_names, model)
    return Objective(class_weights, taught_by, distillation, alpha, temperature)
