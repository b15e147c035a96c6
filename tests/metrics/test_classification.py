"""Metrics against hand counts, scipy, torch and scikit-learn."""

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss, top_k_accuracy_score

from hfvit.metrics.classification import calibration
from hfvit.metrics.evaluate_metric import ImageClassificationMetric

NAMES = [f"class {index}" for index in range(7)]


@pytest.fixture(scope="module")
def logits_and_labels():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 200)  # class 6 never occurs
    logits = rng.normal(size=(200, 7)).astype(np.float32)
    logits[np.arange(200), labels] += 1.5
    return logits, labels


def test_metrics_equal_scikit_learn_and_torch(logits_and_labels):
    logits, labels = logits_and_labels
    result = ImageClassificationMetric(NAMES).compute(predictions=logits, references=labels)
    probabilities = torch.from_numpy(logits).double().softmax(dim=1).numpy()
    predicted = logits.argmax(axis=1)
    assert result["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert result["top5_accuracy"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5, labels=range(7)))
    assert result["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))
    assert result["loss"] == pytest.approx(log_loss(labels, probabilities, labels=range(7)), rel=1e-6)
    assert result["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)).item(), rel=1e-5
    )
    assert sum(result["confusion_matrix"]["counts"]) == 200
    assert [entry["label"] for entry in result["per_class"]] == NAMES
    assert result["per_class"][6]["images"] == 0


def test_macro_f1_leaves_out_classes_without_images_and_predictions():
    logits = np.eye(4)[[0, 1, 1]]
    for labels in ([0, 1, 1], [0, 1, 2]):
        found = ImageClassificationMetric(list("abcd")).compute(predictions=logits, references=np.array(labels))
        assert found["macro_f1"] == pytest.approx(f1_score(labels, [0, 1, 1], average="macro", zero_division=0))
        assert found["macro_f1"] == pytest.approx(1.0 if labels[2] == 1 else 5 / 9)


def test_accuracy_interval_equals_the_wilson_formula(logits_and_labels):
    logits, labels = logits_and_labels
    result = ImageClassificationMetric(NAMES).compute(predictions=logits, references=labels)
    p, n, z = result["accuracy"], 200, 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert result["accuracy_interval"] == pytest.approx([centre - half, centre + half])


def test_calibration_equals_a_hand_count():
    confidence = np.array([0.95, 0.99, 0.97, 0.35, 0.38])
    correct = np.array([True, True, False, True, False])
    bins, ece = calibration(confidence, correct)
    # Bins of width 1/15: two in (0.333, 0.4], three in (0.933, 1].
    assert [entry["images"] for entry in bins] == [2, 3]
    expected = 2 / 5 * abs(0.5 - 0.365) + 3 / 5 * abs(2 / 3 - 0.97)
    assert ece == pytest.approx(expected)


def test_calibration_bins_contain_their_upper_edge():
    bins, _ = calibration(np.array([5 / 15, 0.34, 1.0]), np.array([True, True, True]))
    assert [entry["images"] for entry in bins] == [1, 1, 1]


def test_top5_accuracy_with_two_classes_is_1():
    result = ImageClassificationMetric(["no", "yes"]).compute(
        predictions=np.array([[2.0, 1.0], [0.0, 3.0]]), references=np.array([1, 1])
    )
    assert result["top5_accuracy"] == 1.0
    assert result["accuracy"] == 0.5


def test_results_are_plain_json_values(logits_and_labels):
    import json

    logits, labels = logits_and_labels
    json.dumps(ImageClassificationMetric(NAMES).compute(predictions=logits, references=labels), allow_nan=False)


def test_metric_needs_no_cache_folder(logits_and_labels, tmp_path, monkeypatch):
    logits, labels = logits_and_labels
    expected = ImageClassificationMetric(NAMES).compute(predictions=logits, references=labels)
    (tmp_path / "file").touch()
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "file")  # no folder can be made in it
    assert ImageClassificationMetric(NAMES).compute(predictions=logits, references=labels) == expected
