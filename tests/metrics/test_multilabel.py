"""Multi-label metrics and thresholds, against scikit-learn."""

import numpy as np
import pytest
from scipy.special import expit
from sklearn import metrics as sklearn_metrics

from hfvit.artifacts.run_sections import MultiLabelMetrics
from hfvit.metrics.multilabel import (
    bootstrap_intervals,
    decisions,
    fit_thresholds,
    multilabel_metrics,
    multilabel_scalars,
    weighted_average_precisions,
)

NAMES = ["a", "b", "c", "never"]


@pytest.fixture(scope="module")
def answers():
    """Logits, rounded so that many are equal, and targets; the last class is of no image."""
    rng = np.random.default_rng(0)
    targets = (rng.random((200, 4)) < [0.5, 0.2, 0.05, 0.0]).astype(np.uint8)
    logits = np.round(rng.normal(size=(200, 4)) + 2 * targets - 1, 1)
    return logits, targets


def test_multilabel_scalars_are_those_of_sklearn(answers):
    logits, targets = answers
    probabilities, thresholds = expit(logits), np.array([0.3, 0.5, 0.6, 0.7])
    predicted = probabilities >= thresholds
    found = multilabel_scalars(logits, targets, thresholds)
    expected = {
        "map": sklearn_metrics.average_precision_score(targets[:, :3], probabilities[:, :3], average="macro"),
        "micro_f1": sklearn_metrics.f1_score(targets, predicted, average="micro", zero_division=0),
        "macro_f1": sklearn_metrics.f1_score(targets, predicted, average="macro", zero_division=np.nan),
        "exact_match": sklearn_metrics.accuracy_score(targets, predicted),
        "loss": sklearn_metrics.log_loss(targets.ravel(), probabilities.ravel()),
    }
    assert found == pytest.approx(expected)


def test_macro_f1_leaves_out_classes_without_labels_and_predictions():
    targets = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]])
    predicted = np.array([[1, 0, 0], [1, 0, 0], [0, 0, 0]])
    found = multilabel_metrics(np.where(predicted, 5.0, -5.0), targets, NAMES[:3])
    assert found["macro_f1"] == 0.5
    assert found["macro_f1"] == sklearn_metrics.f1_score(targets, predicted, average="macro", zero_division=np.nan)
    assert found["macro_f1_interval"][1] == 1.0
    assert multilabel_scalars(np.full((3, 3), -5.0), np.zeros((3, 3)))["macro_f1"] == 0.0


def test_multilabel_metrics_of_each_class_are_those_of_sklearn(answers):
    logits, targets = answers
    thresholds = np.array([0.3, 0.5, 0.6, 0.7])
    found = multilabel_metrics(logits, targets, NAMES, thresholds)
    record = MultiLabelMetrics.from_json(found)
    predicted = expit(logits) >= thresholds
    assert record.micro_f1 == pytest.approx(sklearn_metrics.f1_score(targets, predicted, average="micro"))
    assert [entry.threshold for entry in record.per_class] == thresholds.tolist()
    scores = sklearn_metrics.precision_recall_fscore_support(targets, predicted, zero_division=0)
    for index, entry in enumerate(record.per_class):
        assert (entry.label, entry.images) == (NAMES[index], scores[3][index])
        assert (entry.precision, entry.recall, entry.f1) == pytest.approx([score[index] for score in scores[:3]])
    assert record.per_class[3].average_precision is None
    assert record.per_class[3].curve == []
    for curve, columns in ((record.per_class[0].curve, slice(1)), (record.curve, slice(None))):
        truth, probabilities = targets[:, columns].ravel(), expit(logits[:, columns]).ravel()
        precision, recall, _ = sklearn_metrics.precision_recall_curve(truth, probabilities)
        assert set(curve) <= set(zip(np.round(recall, 4), np.round(precision, 4), strict=True))
        assert curve[-1][0] == 1.0
    assert record.labels_per_image == targets.sum() / 200


def test_multilabel_metrics_take_nan_for_no_detection(answers):
    logits, targets = answers[0].copy(), answers[1]
    logits[0] = np.nan
    found = multilabel_scalars(logits, targets)
    logits[0] = -np.inf
    assert found["micro_f1"] == multilabel_scalars(logits, targets)["micro_f1"]
    assert np.isnan(found["loss"])


def test_weighted_average_precisions_are_those_of_sklearn(answers):
    logits, targets = answers
    weights = np.random.default_rng(1).integers(0, 4, (20, 200)).astype(np.float32)
    found = weighted_average_precisions(logits[:, 1], targets[:, 1], weights)
    score = sklearn_metrics.average_precision_score
    expected = [score(targets[:, 1], logits[:, 1], sample_weight=weight) for weight in weights]
    assert found == pytest.approx(expected, abs=1e-6)


def test_bootstrap_intervals_are_seeded_and_those_of_drawn_images(answers):
    logits, targets = answers
    probabilities = expit(logits)
    predicted = decisions(probabilities)
    found = bootstrap_intervals(probabilities, targets, predicted, seed=3)
    assert found == bootstrap_intervals(probabilities, targets, predicted, seed=3)
    assert found != bootstrap_intervals(probabilities, targets, predicted, seed=4)
    rng = np.random.default_rng(3)
    scores = []
    for _ in range(1000):
        rows = rng.integers(0, 200, 200)
        scores.append(sklearn_metrics.f1_score(targets[rows], predicted[rows], average="micro", zero_division=0))
    assert found["micro_f1_interval"] == pytest.approx(np.percentile(scores, (2.5, 97.5)), abs=1e-6)
    low, high = found["map_interval"]
    assert low < multilabel_scalars(logits, targets)["map"] < high


def test_bootstrap_interval_of_map_leaves_out_classes_that_were_not_drawn():
    targets = np.zeros((20, 2), np.int64)
    targets[:10, 0] = targets[0, 1] = 1  # a third of the resamples have no image of the second class
    found = bootstrap_intervals(0.1 + 0.8 * targets, targets, targets)
    assert found["map_interval"] == pytest.approx([1.0, 1.0])


def test_fit_thresholds_finds_the_largest_f1_of_each_class(answers):
    logits, targets = answers
    probabilities = expit(logits)
    thresholds = fit_thresholds(probabilities, targets)
    for index in range(3):
        tried = [
            sklearn_metrics.f1_score(targets[:, index], probabilities[:, index] >= threshold)
            for threshold in np.unique(probabilities[:, index])
        ]
        own = sklearn_metrics.f1_score(targets[:, index], probabilities[:, index] >= thresholds[index])
        assert own == pytest.approx(max(tried))
        assert thresholds[index] not in probabilities[:, index]
    assert thresholds[3] == 0.5


def test_fit_thresholds_of_separable_classes_lies_between_them():
    probabilities = np.array([[0.1], [0.2], [0.9], [1.0]])
    assert fit_thresholds(probabilities, np.array([[0], [0], [1], [1]])) == pytest.approx([0.55])
    assert fit_thresholds(probabilities, np.ones((4, 1))) == [0.5]


def test_fit_thresholds_of_equal_f1_takes_the_one_closest_to_one_half():
    """F1 is 2/3 for the first image alone, and for all images."""
    probabilities = np.array([[0.9], [0.6], [0.55], [0.4]])
    assert fit_thresholds(probabilities, np.array([[1], [0], [0], [1]])) == pytest.approx([0.75])


def test_fit_thresholds_below_all_probabilities_is_half_of_the_lowest():
    assert fit_thresholds(np.array([[0.4], [0.5], [0.6]]), np.array([[1], [0], [1]])) == pytest.approx([0.2])
