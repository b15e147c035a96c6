"""Plots of a run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from hfvit.artifacts.run_record import RunRecord, read_examples
from hfvit.artifacts.run_sections import MultiLabelMetrics, SplitMetrics, Temperature
from hfvit.report.figures import (
    THEMES,
    Theme,
    average_precision_figure,
    confusion_figure,
    draw,
    explanation_figure,
    learning_curves,
    mistakes_figure,
    per_class_figure,
    precision_recall_figure,
    probe_curves,
    reliability_figure,
    training_figure,
    two_class_figure,
)
from hfvit.utils.files import sweep_temporary

Drawing = Callable[[Theme], Figure]

# Plots that some runs do not have; those of an earlier run are deleted.
OPTIONAL_PLOTS = (
    "confusion_matrix", "per_class_recall", "two_classes", "reliability", "precision_recall", "average_precision",
    "mistakes", "label_errors", "explanations",
    "per_class_accuracy", "attention",  # names in hfvit 0.1
)  # fmt: skip


def write_training_images(images: np.ndarray, targets: np.ndarray, names: list[str], output_dir: str | Path) -> None:
    """Draw `plots/training_images.png` and `training_images_dark.png`.

    Args:
        images: uint8 `(images, height, width, 3)`.
        targets: class indices `(images,)`, or probabilities `(images, classes)` after mixup or CutMix.
        names: class names.
        output_dir: output folder of the run.
    """
    draw("training_images", partial(training_figure, images, targets, names), Path(output_dir) / "plots", names)


def result_figures(record: RunRecord) -> dict[str, Drawing]:
    """Return functions that draw the plots of training and metrics, by name."""
    metrics = record.result
    score = {"key": metrics.score.key, "name": metrics.score.name}
    if record.training.probe:
        curves = partial(probe_curves, record.training.probe, **score)
    else:
        curves = partial(learning_curves, record.history, record.training.best_step, **score)
    return {"learning_curves": curves} | metric_figures(metrics, record.role, record.temperature)


def metric_figures(
    metrics: SplitMetrics | MultiLabelMetrics, split: str, temperature: Temperature | None = None
) -> dict[str, Drawing]:
    """Return functions that draw the plots of metrics, by name.

    Args:
        metrics: metrics of a split.
        split: name of the split, for the titles.
        temperature: temperature scaling of the run.
    """
    if isinstance(metrics, MultiLabelMetrics):
        return {
            "precision_recall": partial(precision_recall_figure, metrics, split),
            "average_precision": partial(average_precision_figure, metrics, split),
        }
    figures = {
        "confusion_matrix": partial(confusion_figure, metrics, split),
        "per_class_recall": partial(per_class_figure, metrics, split),
        "reliability": partial(reliability_figure, metrics, split, temperature),
    }
    if metrics.roc_curve and metrics.precision_recall_curve and len(metrics.per_class) == 2:
        figures["two_classes"] = partial(two_class_figure, metrics, split)
    return figures


def write_metric_plots(metrics: SplitMetrics | MultiLabelMetrics, split: str, folder: str | Path) -> list[Path]:
    """Draw the plots of metrics to a folder and return their paths.

    Args:
        metrics: metrics of a split, such as `Comparison.metrics`.
        split: name of the split, for the titles.
        folder: folder of the PNG files, which is created.
    """
    names = [each.label for each in metrics.per_class]
    figures = metric_figures(metrics, split)
    return [path for name, figure in figures.items() for path in draw(name, figure, folder, names)]


def image_figures(record: RunRecord, arrays: dict[str, np.ndarray]) -> dict[str, Drawing]:
    """Return functions that draw the plots with images of the data set, by name.

    Args:
        record: record of the run.
        arrays: its images, from `read_examples`.
    """
    figures = {}
    examples = record.examples
    for name, title in (("mistakes", "Most confident mistakes"), ("label_errors", "Likely label errors")):
        if name in arrays:
            title = f"{title} on the {examples.split} split"
            figures[name] = partial(mistakes_figure, arrays[name], getattr(examples, name), title)
    if "explanations" in arrays and "explanation_maps" in arrays:
        maps = arrays["explanation_maps"]
        title = explanation_title(examples.explanation_method)
        figures["explanations"] = partial(
            explanation_figure, arrays["explanations"], maps, examples.explanations, title
        )
    return figures


def explanation_title(method: str | None) -> str:
    """Return the title of explanation maps, by the name of their method."""
    if method == "Attention rollout":  # hfvit 0.1
        return "Attention rollout (does not depend on the class)"
    return f"{method}: parts that speak for the predicted class"


def write_plots(record: RunRecord, output_dir: str | Path) -> list[Path]:
    """Draw the plots of a run to `output_dir/plots` and return their paths.

    Plots that need images of the data set are drawn if examples.npz has them. Plots of an earlier run that this run
    does not have are deleted, as are temporary files.
    """
    figures = result_figures(record) | image_figures(record, read_examples(output_dir, record.examples))
    folder = Path(output_dir) / "plots"
    sweep_temporary(folder / "*.png")
    for name in OPTIONAL_PLOTS:
        if name not in figures:
            for theme in THEMES:
                (folder / f"{name}{theme.suffix}.png").unlink(missing_ok=True)
    return [path for name, figure in figures.items() for path in draw(name, figure, folder, record.data.labels)]
