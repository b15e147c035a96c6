"""Single-label and multi-label losses, and distillation losses."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.loss import AsymmetricLossMultiLabel, BinaryCrossEntropy
from torch import Tensor

from hfvit.recipe.arguments import MULTI_LABEL, SINGLE_LABEL


def cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
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


def soft_distillation(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Compute soft distillation (Hinton et al., https://arxiv.org/abs/1503.02531).

    The loss is KL(teacher || student) times the squared temperature, which preserves the scale of the gradient.

    Args:
        logits: logits of the student (batch, classes).
        teacher_logits: logits of the teacher (batch, classes).
        temperature: divisor of both logits.
    """
    student, teacher = (F.log_softmax(values.float() / temperature, dim=1) for values in (logits, teacher_logits))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def hard_distillation(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Compute cross-entropy with the teacher's predicted class as the label.

    DeiT, https://arxiv.org/abs/2012.12877.
    """
    return F.cross_entropy(logits.float(), teacher_logits.argmax(dim=1))


def feature_distillation(features: Tensor, teacher_features: Tensor) -> Tensor:
    """Compute the mean squared error of features, as timm's `FeatureDistillationTask`.

    Args:
        features: projected features of the student (batch, dimensions).
        teacher_features: pooled features of the teacher (batch, dimensions).
    """
    return F.mse_loss(features.float(), teacher_features.float())


def binary_cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Compute the mean binary cross-entropy over images and classes in float32.

    Args:
        logits: `(batch, classes)`.
        targets: labels from 0 to 1, `(batch, classes)`.
        label_smoothing: fraction by which targets move towards 0.5, in [0, 1).
        class_weights: weights of the positive targets, `(classes,)`.
    """
    loss = BinaryCrossEntropy(label_smoothing, pos_weight=class_weights, smooth_dense=True)
    return loss(logits.float(), targets.float())


def asymmetric_loss(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Compute the mean asymmetric loss (Ridnik et al., 2021).

    See https://arxiv.org/abs/2009.14119.

    Args:
        logits: `(batch, classes)`.
        targets: labels from 0 to 1, `(batch, classes)`.
        label_smoothing: fraction by which targets move towards 0.5, in [0, 1).
        class_weights: weights of the positive targets, `(classes,)`.
    """
    return AsymmetricLossMultiLabel(smoothing=label_smoothing, reduction="mean", pos_weight=class_weights)(
        logits, targets
    )


def soft_binary_distillation(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Compute soft distillation of each label, as `soft_distillation` of two classes.

    Args:
        logits: logits of the student (batch, classes).
        teacher_logits: logits of the teacher (batch, classes).
        temperature: divisor of both logits.
    """
    student = logits.float() / temperature
    teacher = torch.sigmoid(teacher_logits.float() / temperature)
    entropy = F.binary_cross_entropy(teacher, teacher)
    return (F.binary_cross_entropy_with_logits(student, teacher) - entropy) * temperature**2


def hard_binary_distillation(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Compute binary cross-entropy with the teacher's labels, at a threshold of 0.5."""
    return F.binary_cross_entropy_with_logits(logits.float(), (teacher_logits >= 0).float())


@dataclass(frozen=True)
class Losses:
    """Hold the losses of a problem type.

    Args:
        labels: `(logits, targets, label_smoothing, class_weights) -> loss`.
        soft: `(logits, teacher_logits, temperature) -> loss` of soft distillation.
        hard: `(logits, teacher_logits) -> loss` of hard distillation.
    """

    labels: Callable[..., Tensor]
    soft: Callable[..., Tensor]
    hard: Callable[..., Tensor]


LOSSES = {
    SINGLE_LABEL: Losses(cross_entropy, soft_distillation, hard_distillation),
    MULTI_LABEL: Losses(binary_cross_entropy, soft_binary_distillation, hard_binary_distillation),
}
