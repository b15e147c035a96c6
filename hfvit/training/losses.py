"""Cross-entropy and distillation losses."""

import torch
import torch.nn.functional as F


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    label_smoothing: float = 0.0,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the mean cross-entropy in float32 for any precision of the logits.

    Args:
        logits: `(batch, classes)`.
        targets: class indices `(batch,)`, or class probabilities `(batch, classes)` as mixup and CutMix make them.
        label_smoothing: weight of the uniform distribution in the target, in [0, 1) (Szegedy et al.,
            https://arxiv.org/abs/1512.00567).
        class_weights: `(classes,)`; the mean is over the images, not over their weights, so that a batch that is split
            in two has the same loss.
    """
    if targets.is_floating_point():
        targets = targets.float()
    logits = logits.float()
    if class_weights is None:
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    losses = F.cross_entropy(logits, targets, class_weights, label_smoothing=label_smoothing, reduction="none")
    return losses.mean()


def soft_distillation(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Compute soft distillation (Hinton et al., https://arxiv.org/abs/1503.02531).

    The loss is KL(teacher || student) times the squared temperature, which preserves the scale of the gradient.

    Args:
        logits: logits of the student (batch, classes).
        teacher_logits: logits of the teacher (batch, classes).
        temperature: divisor of both logits.
    """
    student, teacher = (F.log_softmax(values.float() / temperature, dim=1) for values in (logits, teacher_logits))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def hard_distillation(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Compute cross-entropy with the teacher's predicted class as the label.

    DeiT, https://arxiv.org/abs/2012.12877.
    """
    return F.cross_entropy(logits.float(), teacher_logits.argmax(dim=1))
