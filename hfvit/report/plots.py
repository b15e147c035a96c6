"""Plots of a run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hfvit.artifacts.run_record import RunRecord, read_examples
from hfvit.artifacts.run_sections import MultiLabelMetrics
from hfvit.report.figures import (
    THEMES,
    Theme,
    attention_figure,
    average_precision_figure,
    confusion_figure,
    draw,
    learning_curves,
    mistakes_figure,
    per_class_figure,
    precision_recall_figure,
    probe_curves,
    reliability_figure,
    training_figure,
)
from hfvit.utils.files import sweep_temporary

# Plots of the metrics; of an earlier run with other labels some are deleted.
RESULT_PLOTS = ("confusion_matrix", "per_class_accuracy", "reliability", "precision_recall", "average_precision")


def write_training_images(images: np.ndarray, targets: np.ndarray, names: list[str], output_dir: str | Path) -> None:
    """Draw `plots/training_images.png` and `training_images_dark.png`.

    Args:
        images: uint8 `(images, height, width, 3)`.
        targets: class indices `(images,)`, or probabilities `(images, classes)` after mixup or CutMix.
        names: class names.
        output_dir: output folder of the run.
    """
    draw("training_images", partial(training_figure, images, targets, names), output_dir)


def _result_figures(record: RunRecord) -> dict[str, Callable[[Theme], Any]]:
    """Return functions that draw the plots of the metrics, by name."""
    metrics = record.result
    if isinstance(metrics, MultiLabelMetrics):
        return {
            "precision_recall": partial(precision_recall_figure, metrics, record.role),
            "average_precision": partial(average_precision_figure, metrics, record.role),
        }
    return {
        "confusion_matrix": partial(confusion_figure, metrics, record.role),
        "per_class_accuracy": partial(per_class_figure, metrics, record.role),
        "reliability": partial(reliability_figure, metrics, record.role, record.temperature),
    }


def write_plots(record: RunRecord, output_dir: str | Path) -> list[Path]:
    """Draw the plots of a run to `output_dir/plots` and return their paths.

    Plots that need images of the data set are drawn if examples.npz has them. Plots of an earlier run that this run
    does not have are deleted, as are temporary files.
    """
    metrics = record.result
    examples = record.examples
    arrays = read_examples(output_dir, examples)
    probe = record.training.probe
    score = {"key": metrics.score.key, "name": metrics.score.name}
    curves = partial(learning_curves, record.history, record.training.best_step, **score)
    figures = {
        "learning_curves": partial(probe_curves, probe, **score) if probe else curves,
        **dict.fromkeys(RESULT_PLOTS),
        **_result_figures(record),
        "mistakes": None,
        "attention": None,
    }
    if "mistakes" in arrays:
        figures["mistakes"] = partial(mistakes_figure, arrays["mistakes"], examples.mistakes, examples.split)
    if "attention" in arrays and "attention_maps" in arrays:
        figures["attention"] = partial(
            attention_figure, arrays["attention"], arrays["attention_maps"], examples.attention, examples.split
        )
    sweep_temporary(Path(output_dir) / "plots" / "*.png")
    written = []
    for name, figure in figures.items():
        if figure:
            written += draw(name, figure, output_dir)
        else:
            for theme in THEMES:
                (Path(output_dir) / "plots" / f"{name}{theme.suffix}.png").unlink(missing_ok=True)
    return written


def remove_plots(output_dir: str | Path) -> None:
    """Delete the plots of an earlier run."""
    for plot in (Path(output_dir) / "plots").glob("*.png"):
        plot.unlink(missing_ok=True)
