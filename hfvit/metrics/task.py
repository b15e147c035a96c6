"""Tasks: metrics, calibration and thresholds of single- or multi-label models."""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from operator import methodcaller
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedConfig

from hfvit.artifacts.run_sections import MultiLabelMetrics, OutOfDistribution, SplitMetrics, Temperature, Thresholds
from hfvit.errors import DataError, NonFiniteLossError
from hfvit.metrics.classification import classification_metrics
from hfvit.metrics.multilabel import fit_thresholds, multilabel_metrics, multilabel_scalars, probabilities_of
from hfvit.metrics.out_of_distribution import fit_out_of_distribution
from hfvit.metrics.temperature import calibrate
from hfvit.recipe.arguments import MULTI_LABEL, MULTI_LABEL_METRICS, RANKING_METRICS, SCALAR_METRICS, SINGLE_LABEL

logger = logging.getLogger(__name__)

Results = dict[str, tuple[np.ndarray, np.ndarray]]  # logits and targets of each split


class Task(ABC):
    """Metrics, calibration and thresholds of a problem type.

    Attributes:
        problem_type: value of the configuration's `problem_type`.
        scalar_metrics: names of the metrics that the Trainer logs.
        ranking_metrics: names of metrics that it logs if one of them selects the best checkpoint.
        default_metric: metric that selects the best checkpoint.
    """

    problem_type: ClassVar[str]
    scalar_metrics: ClassVar[tuple[str, ...]]
    ranking_metrics: ClassVar[tuple[str, ...]] = ()
    default_metric: ClassVar[str]

    @abstractmethod
    def scalars(
        self, logits: np.ndarray, targets: np.ndarray, names: list[str], ranked: bool = False
    ) -> dict[str, float]:
        """Compute the scalar metrics, with thresholds of 0.5 for several labels.

        Args:
            logits: `(images, classes)`.
            targets: class indices `(images,)`, or 0 and 1 `(images, classes)`.
            names: class names, in the order of the logits.
            ranked: compute `ranking_metrics`, too.

        Raises:
            DataError: `ranking_metrics` are not defined, since the images have one class.
        """

    @abstractmethod
    def metrics(
        self, logits: np.ndarray, targets: np.ndarray, names: list[str], thresholds: Thresholds | None = None
    ) -> SplitMetrics | MultiLabelMetrics:
        """Compute all metrics of a split.

        Args:
            logits: `(images, classes)`.
            targets: class indices `(images,)`, or 0 and 1 `(images, classes)`.
            names: class names, in the order of the logits.
            thresholds: threshold of each class for several labels. Default: 0.5.

        Raises:
            NonFiniteLossError: logits are NaN or infinite.
        """

    @abstractmethod
    def fit_thresholds(self, results: Results) -> Thresholds | None:
        """Fit each class's threshold on the validation split, if there are several labels."""

    @abstractmethod
    def calibrate(self, results: Results) -> Temperature:
        """Fit the temperature of the softmax on the validation split."""

    def fit_out_of_distribution(self, results: Results) -> OutOfDistribution:
        """Fit the largest energy of usual images on the validation split."""
        return fit_out_of_distribution(results["validation"][0], multi_label=self.problem_type == MULTI_LABEL)


class SingleLabelTask(Task):
    """Single-label classification, with accuracy and a temperature for the softmax."""

    problem_type = SINGLE_LABEL
    scalar_metrics = SCALAR_METRICS
    ranking_metrics = RANKING_METRICS
    default_metric = "accuracy"

    def scalars(self, logits, targets, names, ranked=False):
        computed = classification_metrics(logits, targets, names, ranked=ranked)
        chosen = (*SCALAR_METRICS, *RANKING_METRICS) if ranked else SCALAR_METRICS
        missing = [key for key in chosen if computed[key] is None]
        if missing:
            raise DataError(
                f"metric_for_best_model: {missing[0]} cannot be computed for {len(targets):,} images of"
                f" {len(np.unique(targets))} of {len(names):,} classes. Choose one of {', '.join(SCALAR_METRICS)}."
            )
        return {key: computed[key] for key in chosen}

    def metrics(self, logits, targets, names, thresholds=None):
        check_finite(logits)
        return SplitMetrics.from_json(classification_metrics(logits, targets, names))

    def fit_thresholds(self, results):
        """Return None, since the most probable class is predicted."""
        return None

    def calibrate(self, results):
        return calibrate(results)


class MultiLabelTask(Task):
    """Multi-label classification, with mAP, F1 and a threshold for each class."""

    problem_type = MULTI_LABEL
    scalar_metrics = MULTI_LABEL_METRICS
    default_metric = "map"

    def scalars(self, logits, targets, names, ranked=False):
        return multilabel_scalars(logits, targets)

    def metrics(self, logits, targets, names, thresholds=None):
        check_finite(logits)
        values = None if thresholds is None else np.array(thresholds.values)
        return MultiLabelMetrics.from_json(multilabel_metrics(logits, targets, names, values))

    def fit_thresholds(self, results):
        """Fit the thresholds with the largest F1 of each class."""
        logits, targets = results["validation"]
        values = fit_thresholds(probabilities_of(logits), targets).tolist()
        return Thresholds(values=values, fitted_on="validation", images=len(targets))

    def calibrate(self, results):
        """Return no temperature, since thresholds are fitted instead."""
        images = len(results["validation"][1])
        reason = "with several labels per image, a threshold is fitted for each class instead"
        return Temperature(value=None, fitted_on="validation", images=images, reason=reason, splits={})


TASKS: dict[str, Task] = {task.problem_type: task for task in (SingleLabelTask(), MultiLabelTask())}


def task_of(config: PreTrainedConfig) -> Task:
    """Return the task for `problem_type` of a configuration, single-label by default."""
    return TASKS.get(config.problem_type or SINGLE_LABEL, TASKS[SINGLE_LABEL])


def not_finite(logits: np.ndarray) -> int:
    """Count the images with a logit that is NaN or infinite."""
    return int(np.count_nonzero(~np.isfinite(logits).all(axis=1)))


def check_finite(logits: np.ndarray) -> None:
    """Raise `NonFiniteLossError` if logits are NaN or infinite."""
    if count := not_finite(logits):
        raise NonFiniteLossError(
            f"the logits of {count:,} of {len(logits):,} images are NaN or infinite. Evaluate in bf16 or full"
            " precision instead of fp16 (fp16, fp16_full_eval), or check the weights and images."
        )


def trainer_metrics(
    task: Task, names: list[str], compute_metrics: Callable | None = None, metric: str | None = None
) -> Callable:
    """Create `compute_metrics` of a Trainer from hfvit's and the user's metrics.

    Args:
        task: task of the model.
        names: class names, in the order of the logits.
        compute_metrics: function `EvalPrediction -> dict` of the user. Default: only hfvit's metrics.
        metric: `metric_for_best_model`; for one of `ranking_metrics`, these are computed, too.
    """
    ranked = bool(task.ranking_metrics) and (metric or "").endswith(task.ranking_metrics)

    def compute(prediction) -> dict[str, float]:
        if count := not_finite(prediction.predictions):
            logger.warning("The logits of %d images of an evaluation are NaN or infinite", count)
        own = task.scalars(prediction.predictions, prediction.label_ids, names, ranked)
        return own | (json_metrics(compute_metrics(prediction)) if compute_metrics else {})

    return compute


def json_metrics(metrics: Any) -> dict[str, Any]:
    """Return the metrics of a user as JSON values, as checkpoints have them.

    NumPy and torch values, also nested ones, become numbers and lists.

    Raises:
        TypeError: not a dict of names and such values.
    """
    if not isinstance(metrics, Mapping):
        raise TypeError(f"compute_metrics: must return a dict, got {type(metrics).__name__}.")
    values = {}
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise TypeError(f"compute_metrics: names of metrics must be strings, got {name!r}.")
        try:
            values[name] = json.loads(json.dumps(value, default=methodcaller("tolist")))
        except (AttributeError, TypeError, ValueError):
            raise TypeError(
                f"compute_metrics: {name} must be a number, an array or a JSON value, got {type(value).__name__}."
            ) from None
    return values
