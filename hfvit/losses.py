"""Classification losses on plain tensors; the Trainer calls them, so soft targets never reach the model."""

import torch
import torch.nn.functional as F


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy, computed in float32 whatever the logits' precision.

    Args:
        logits: `(batch, classes)`.
        targets: class indices `(batch,)`, or class probabilities `(batch, classes)` as mixup and CutMix make them.
        label_smoothing: weight of the uniform distribution in the target, in [0, 1) (Szegedy et al.,
            https://arxiv.org/abs/1512.00567).
    """
    if targets.is_floating_point():
        targets = targets.float()
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)
