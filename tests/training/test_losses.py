import torch

from hfvit.training.losses import cross_entropy


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
