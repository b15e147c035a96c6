"""Tasks: metrics of logits that are not finite."""

import numpy as np
import pytest
from transformers import EvalPrediction

from hfvit.errors import NonFiniteLossError
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
