"""What differs between one class and several labels an image: metrics, calibration, thresholds."""

from collections.abc import Callable

import numpy as np
from transformers import PreTrainedConfig

from hfvit.artifacts.run_sections import MultiLabelMetrics, SplitMetrics, Temperature, Thresholds
from hfvit.metrics.classification import classification_metrics
from hfvit.metrics.multilabel import fit_thresholds, multilabel_metrics, multilabel_scalars, probabilities_of
from hfvit.metrics.temperature import calibrate
from hfvit.recipe.arguments import MULTI_LABEL, MULTI_LABEL_METRICS, SCALAR_METRICS, SINGLE_LABEL

Results = dict[str, tuple[np.ndarray, np.ndarray]]  # logits and targets of each split


class SingleLabelTask:
    """One class an image: accuracy, and a temperature for the softmax."""

    problem_type = SINGLE_LABEL
    scalar_metrics = SCALAR_METRICS
    default_metric = "accuracy"

    def scalars(self, logits: np.ndarray, targets: np.ndarray, names: list[str]) -> dict[str, float]:
        """The metrics that are one number."""
        computed = classification_metrics(logits, targets, names, ranked=False)
        return {key: computed[key] for key in SCALAR_METRICS}

    def metrics(
        self, logits: np.ndarray, targets: np.ndarray, names: list[str], thresholds: Thresholds | None = None
    ) -> SplitMetrics:
        """All metrics of a split.

        Args:
            logits: `(images, classes)`.
            targets: class indices `(images,)`.
            names: of the classes.
            thresholds: not used.
        """
        computed = classification_metrics(logits, targets, names)
        return SplitMetrics.from_json(computed)

    def fit_thresholds(self, results: Results) -> None:
        """None: the most probable class is the answer."""
        return None

    def calibrate(self, results: Results) -> Temperature:
        """Fit the temperature on the validation split."""
        return calibrate(results)


class MultiLabelTask:
    """Several labels an image: mAP and F1, and a threshold for each class."""

    problem_type = MULTI_LABEL
    scalar_metrics = MULTI_LABEL_METRICS
    default_metric = "map"

    def scalars(self, logits: np.ndarray, targets: np.ndarray, names: list[str]) -> dict[str, float]:
        """The metrics that are one number, with thresholds of 0.5."""
        return multilabel_scalars(logits, targets)

    def metrics(
        self, logits: np.ndarray, targets: np.ndarray, names: list[str], thresholds: Thresholds | None = None
    ) -> MultiLabelMetrics:
        """All metrics of a split.

        Args:
            logits: `(images, classes)`.
            targets: 0 and 1, `(images, classes)`.
            names: of the classes.
            thresholds: 0.5 where there are none.
        """
        values = None if thresholds is None else np.array(thresholds.values)
        return MultiLabelMetrics.from_json(multilabel_metrics(logits, targets, names, values))

    def fit_thresholds(self, results: Results) -> Thresholds:
        """The threshold of each class with the largest F1 on the validation split."""
        logits, targets = results["validation"]
        values = fit_thresholds(probabilities_of(logits), targets).tolist()
        return Thresholds(values=values, fitted_on="validation", images=len(targets))

    def calibrate(self, results: Results) -> Temperature:
        """No temperature: the thresholds are of the probabilities as they are."""
        images = len(results["validation"][1])
        reason = "with several labels an image a threshold is fitted for each class instead"
        return Temperature(value=None, fitted_on="validation", images=images, reason=reason, splits={})


Task = SingleLabelTask | MultiLabelTask
TASKS: dict[str, Task] = {task.problem_type: task for task in (SingleLabelTask(), MultiLabelTask())}


def task_of(config: PreTrainedConfig) -> Task:
    """The task of a model, by transformers' `problem_type` in its configuration; one class an image by default."""
    return TASKS.get(config.problem_type or SINGLE_LABEL, TASKS[SINGLE_LABEL])


def trainer_metrics(task: Task, names: list[str], compute_metrics: Callable | None = None) -> Callable:
    """The `compute_metrics` of a Trainer: hfvit's scalar metrics, and those of a user's own function.

    Args:
        task: of the model.
        names: of the classes, in the order of the logits.
        compute_metrics: `EvalPrediction -> dict`; None for hfvit's metrics alone.
    """

    def compute(prediction) -> dict[str, float]:
        own = task.scalars(prediction.predictions, prediction.label_ids, names)
        return own | (compute_metrics(prediction) if compute_metrics else {})

    return compute
