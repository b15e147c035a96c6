"""Tasks: metrics of logits that are not finite."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import average_precision_score, roc_auc_score
from transformers import EvalPrediction

from hfvit.errors import DataError, NonFiniteLossError
from hfvit.metrics.task import TASKS, trainer_metrics
from hfvit.recipe.arguments import MULTI_LABEL, SINGLE_LABEL

NAMES = ["a", "b", "c"]
TARGETS = {SINGLE_LABEL: np.array([0, 1, 2, 1]), MULTI_LABEL: np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]])}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("problem_type", TARGETS)
def test_metrics_of_logits_that_are_not_finite_raise(problem_type, value, caplog):
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    targets = TARGETS[problem_type]
    task = TASKS[problem_type]
    assert task.metrics(logits, targets, NAMES).images == 4
    logits[2, 1] = value
    with pytest.raises(NonFiniteLossError, match="1 of 4"):
        task.metrics(logits, targets, NAMES)
    trainer_metrics(task, NAMES)(EvalPrediction(logits, targets))
    assert len(caplog.records) == 1


@pytest.mark.parametrize("metric", ["auc", "eval_average_precision", "validation_auc"])
def test_trainer_metrics_that_select_by_ranking_equal_scikit_learn(metric):
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(60, 3)).astype(np.float32)
    labels = generator.integers(0, 3, 60)
    found = trainer_metrics(TASKS[SINGLE_LABEL], NAMES, metric=metric)(EvalPrediction(logits, labels))
    probabilities = softmax(logits, axis=1)
    one_hot = np.eye(3, dtype=int)[labels]
    assert found["auc"] == pytest.approx(roc_auc_score(one_hot, probabilities))
    assert found["average_precision"] == pytest.approx(average_precision_score(one_hot, probabilities))
    assert "auc" not in trainer_metrics(TASKS[SINGLE_LABEL], NAMES, metric="loss")(EvalPrediction(logits, labels))


def test_trainer_metrics_that_select_by_ranking_of_one_class_raise():
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    with pytest.raises(DataError, match=r"^metric_for_best_model:"):
        trainer_metrics(TASKS[SINGLE_LABEL], NAMES, metric="auc")(EvalPrediction(logits, np.zeros(4, int)))
