import pytest
import torch

from hfvit.training.losses import (
    asymmetric_loss,
    binary_cross_entropy,
    cross_entropy,
    hard_binary_distillation,
    soft_binary_distillation,
)

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
TARGETS = (torch.arange(24).view(6, 4) % 3 == 0).float()


def test_cross_entropy_with_label_smoothing_equals_its_definition():
    logits, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0, 1])
    target = torch.full((6, 4), 0.1 / 4)
    target[torch.arange(6), labels] += 0.9
    expected = -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(cross_entropy(logits, labels, label_smoothing=0.1), expected)


def test_cross_entropy_of_one_hot_targets_equals_class_ids():
    logits, labels = torch.randn(5, 3), torch.tensor([2, 0, 1, 1, 0])
    one_hot = torch.nn.functional.one_hot(labels, 3)
    torch.testing.assert_close(cross_entropy(logits, one_hot.half()), cross_entropy(logits, labels))


def test_cross_entropy_of_low_precision_logits_computes_in_float32():
    logits = torch.randn(64, 10, dtype=torch.bfloat16)
    loss = cross_entropy(logits, torch.zeros(64, dtype=torch.long))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy(logits.float(), torch.zeros(64, dtype=torch.long)))


def test_binary_cross_entropy_by_its_definition():
    weights = torch.tensor([1.0, 2.0, 3.0, 0.5])
    smoothed = 0.8 * TARGETS + 0.1
    terms = weights * smoothed * LOGITS.sigmoid().log() + (1 - smoothed) * (-LOGITS).sigmoid().log()
    torch.testing.assert_close(binary_cross_entropy(LOGITS, TARGETS, 0.2, weights), -terms.mean())


def test_asymmetric_loss_by_its_definition():
    weights = torch.tensor([1.0, 2.0, 3.0, 0.5])
    positive = LOGITS.sigmoid()
    negative = (1 - positive + 0.05).clamp(max=1)
    terms = weights * TARGETS * (1 - positive) * positive.log()
    terms = terms + (1 - TARGETS) * (1 - negative) ** 4 * negative.log()
    torch.testing.assert_close(asymmetric_loss(LOGITS, TARGETS, class_weights=weights), -terms.mean())
    smoothed = asymmetric_loss(LOGITS, 0.8 * TARGETS + 0.1, class_weights=weights)
    torch.testing.assert_close(asymmetric_loss(LOGITS, TARGETS, 0.2, weights), smoothed)


@pytest.mark.parametrize("loss", [binary_cross_entropy, asymmetric_loss])
def test_losses_of_several_labels_are_means_over_images(loss):
    whole = loss(LOGITS, TARGETS, 0.1)
    torch.testing.assert_close(
        torch.stack([loss(LOGITS[:3], TARGETS[:3], 0.1), loss(LOGITS[3:], TARGETS[3:], 0.1)]).mean(), whole
    )
    assert loss(LOGITS.bfloat16(), TARGETS).dtype == torch.float32


def test_distillation_of_several_labels_is_zero_where_student_and_teacher_agree():
    torch.testing.assert_close(soft_binary_distillation(LOGITS, LOGITS, 2.0), torch.tensor(0.0))
    other = LOGITS.flip(0)
    student, teacher = (torch.distributions.Bernoulli(logits=values / 2) for values in (LOGITS, other))
    expected = 4 * torch.distributions.kl_divergence(teacher, student).mean()
    torch.testing.assert_close(soft_binary_distillation(LOGITS, other, 2.0), expected)
    torch.testing.assert_close(
        hard_binary_distillation(LOGITS, other), binary_cross_entropy(LOGITS, (other > 0).float())
    )
