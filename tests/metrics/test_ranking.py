"""Ranking metrics and metrics of unequal classes against scikit-learn's, and metrics of large inputs."""

import time
import tracemalloc

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.metrics import (
    auc,
    average_precision_score,
    balanced_accuracy_score,
    confusion_matrix,
    matthews_corrcoef,
    precision_recall_fscore_support,
    roc_auc_score,
    top_k_accuracy_score,
)

from hfvit.artifacts.run_sections import ConfusionMatrix, SplitMetrics
from hfvit.metrics.classification import classification_metrics, label_ranks
from hfvit.metrics.evaluate_metric import ImageClassificationMetric


def draw(images: int, classes: int, margin: float, seed: int = 0, ties: bool = False):
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, images, p=rng.dirichlet(np.ones(classes)))
    logits = rng.normal(size=(images, classes)).astype(np.float32)
    logits[np.arange(images), labels] += margin
    return (np.round(logits) if ties else logits), labels


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("margin", [0.0, 1.5, 40.0])
@pytest.mark.parametrize("classes", [2, 3, 7, 150])
def test_metrics_equal_scikit_learns(classes, margin, ties):
    logits, labels = draw(900, classes, margin, seed=classes, ties=ties)
    found = classification_metrics(logits, labels, [str(index) for index in range(classes)])
    # The scores as hfvit ranks them: probabilities near 0 and 1 would be equal in float64.
    scores = log_softmax(logits.astype(np.float64), axis=1).astype(np.float32)
    held = np.unique(labels)
    areas = [roc_auc_score(labels == index, scores[:, index]) for index in held]
    precisions = [average_precision_score(labels == index, scores[:, index]) for index in held]
    predicted = logits.argmax(axis=1)
    assert found["auc"] == pytest.approx(np.mean(areas), abs=1e-6)
    assert found["average_precision"] == pytest.approx(np.mean(precisions), abs=1e-6)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert found["mcc"] == pytest.approx(matthews_corrcoef(labels, predicted))
    if classes > 2:
        expected = top_k_accuracy_score(labels, logits, k=min(5, classes - 1), labels=range(classes))
        assert classes <= 5 or ties or found["top5_accuracy"] == pytest.approx(expected)
    each = precision_recall_fscore_support(labels, predicted, labels=range(classes), zero_division=0)
    for key, expected in zip(("precision", "recall", "f1", "images"), each, strict=True):
        assert [entry[key] for entry in found["per_class"]] == pytest.approx(list(expected))
    matrix = ConfusionMatrix.from_json(found["confusion_matrix"]).dense()
    assert np.array_equal(matrix, confusion_matrix(labels, predicted, labels=range(classes)))


def test_auc_of_all_classes_is_scikit_learns_one_against_the_rest():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 500)
    logits = rng.normal(size=(500, 6)) + 1.5 * np.eye(6)[labels]
    probabilities = np.exp(log_softmax(logits, axis=1))
    found = classification_metrics(logits, labels, list("abcdef"))
    assert found["auc"] == pytest.approx(roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"))
    assert found["average_precision"] == pytest.approx(average_precision_score(labels, probabilities, average="macro"))


def test_ranks_are_those_of_a_stable_sort():
    logits, labels = draw(400, 30, 0.0, ties=True)
    order = np.argsort(-logits, axis=1, kind="stable")
    assert np.array_equal(label_ranks(logits, labels), (order == labels[:, None]).argmax(axis=1))


@pytest.mark.parametrize("classes", [2, 3])
def test_ranking_is_undefined_where_all_images_are_of_one_class(classes):
    found = classification_metrics(np.eye(classes)[[0, 1]], np.array([1, 1]), list("abc")[:classes])
    assert (found["auc"], found["average_precision"], found["mcc"]) == (None, None, 0.0)
    assert "roc_curve" not in found


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_images_with_nan_rank_last_in_auc_and_average_precision(value):
    logits, labels = draw(60, 3, 1.0)
    scores = log_softmax(logits.astype(np.float64), axis=1)
    logits[:5] = value
    scores[:5] = -1e9
    found = classification_metrics(logits, labels, ["a", "b", "c"])
    for key, reference in (("auc", roc_auc_score), ("average_precision", average_precision_score)):
        expected = np.mean([reference(labels == index, scores[:, index]) for index in range(3)])
        assert found[key] == pytest.approx(expected, abs=1e-6), key
    logits[:] = value
    assert classification_metrics(logits, labels, ["a", "b", "c"])["auc"] == 0.5


def test_label_with_nan_ranks_last():
    logits = np.array([[np.nan, 1.0, 2.0], [0.0, np.nan, 2.0]])
    assert label_ranks(logits, np.array([0, 0])).tolist() == [3, 1]


def test_ranking_is_left_out_above_the_limit(monkeypatch):
    monkeypatch.setattr("hfvit.metrics.classification.MOST_RANKED", 5)
    found = classification_metrics(np.eye(3), np.arange(3), list("abc"))
    assert (found["auc"], found["average_precision"], found["accuracy"]) == (None, None, 1.0)


def test_batches_that_were_added_give_the_same_metrics():
    logits, labels = draw(60, 4, 1.0)
    metric = ImageClassificationMetric(list("abcd"))
    whole = metric.compute(predictions=logits, references=labels)
    for start in range(0, 60, 20):
        metric.add_batch(predictions=logits[start : start + 20], references=labels[start : start + 20])
    assert metric.compute() == whole


def test_a_thousand_classes_take_little_time_and_memory():
    logits, labels = draw(10_000, 1000, 3.0)
    names = [str(index) for index in range(1000)]
    metric = ImageClassificationMetric(names)
    begin = time.perf_counter()
    metric.compute(predictions=logits, references=labels)
    assert time.perf_counter() - begin < 3  # 0.15 s measured; the Arrow table alone took 5 s
    tracemalloc.start()
    metric.compute(predictions=logits, references=labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < logits.nbytes  # never a copy of all logits


def test_two_class_curves_have_scikit_learns_areas():
    logits, labels = draw(400, 2, 1.0)
    computed = SplitMetrics.from_json(classification_metrics(logits, labels, ["a", "b"]))
    score = logits[:, 1] - logits[:, 0]
    assert auc(*zip(*computed.roc_curve, strict=True)) == pytest.approx(roc_auc_score(labels, score), abs=0.01)
    recall, precision = zip(*computed.precision_recall_curve, strict=True)
    assert auc(recall, precision) == pytest.approx(average_precision_score(labels, score), abs=0.01)
    assert len(computed.roc_curve) <= 200
    assert "roc_curve" not in classification_metrics(*draw(60, 3, 1.0), ["a", "b", "c"])
