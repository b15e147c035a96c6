"""Summary table and plots of a run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hfvit.artifacts.run_record import RunRecord, read_examples
from hfvit.artifacts.run_sections import MultiLabelMetrics, Training
from hfvit.errors import printable
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
from hfvit.utils.formatting import aligned, duration

# Plots of the metrics; of an earlier run with other labels some are deleted.
RESULT_PLOTS = ("confusion_matrix", "per_class_accuracy", "reliability", "precision_recall", "average_precision")


def summary_table(record: RunRecord, output_dir: str | Path) -> str:
    """Format the summary of a run: metrics of each split, model, time and speed."""
    tables = {split: metrics.columns() for split, metrics in record.metrics.items()}
    header = ("split", *next(iter(tables.values())))
    rows = [(split, *columns.values()) for split, columns in tables.items()]
    model = record.model
    training = record.training
    texts = model.texts
    resumed = f", resumed at step {training.resumed_at_step:,}" if training.resumed_at_step else ""
    epochs = "" if training.epochs is None else f", {training.epochs:.4g} epochs"
    lines = [
        *aligned([header, *rows]),
        "",
        f"model      {model.architecture}, {model.image_size[0]} px, {model.parameters / 1e6:.1f} M parameters"
        f" ({model.trained_parameters / 1e6:.1f} M trained)",
        *([f"texts      {texts.model_type}, fusion {texts.fusion}"] if texts else []),
        f"training   {training.steps:,} steps{epochs}{resumed};"
        f" {duration(training.seconds)},"
        f" {training.images_per_second:,.0f} images/s, {training.data_wait:.1%} of the time waiting for data,"
        f" {training.processes} process(es), precision {training.precision}",
        f"selected   {selection(training)}{_without_test_split(record)}",
        *_temperature_line(record),
        *_thresholds_line(record),
        f"files      {output_dir}",
    ]
    return "\n".join(map(printable, lines))


def selection(training: Training) -> str:
    """Describe which checkpoint or penalty was selected, and by which metric."""
    if training.best_step:
        return f"step {training.best_step} by validation {training.best_metric_name}"
    if probe := training.probe:
        return f"C = {probe.best_c:g} of {len(probe.c)} by validation {probe.selected_by}"
    return "the last step"


def _without_test_split(record: RunRecord) -> str:
    """Note that the results are optimistic if there is no test split."""
    if record.role == "test" or not record.data.selected_by:
        return ""
    name = record.result.score.name
    return f"; no test split: the {name} above is of the split used for selection, so it is optimistic"


def _temperature_line(record: RunRecord) -> list[str]:
    temperature = record.temperature
    if temperature is None or record.thresholds:
        return []
    if temperature.value is None:
        return [f"calibrated no: {temperature.reason}"]
    before = record.result
    after = temperature.splits[record.role]
    return [
        f"calibrated temperature {temperature.value:.2f}, fitted on the validation split; {record.role} ECE"
        f" {before.ece:.4f} -> {after.ece:.4f}, loss {before.loss:.4f} -> {after.loss:.4f}"
    ]


def _thresholds_line(record: RunRecord) -> list[str]:
    thresholds = record.thresholds
    if thresholds is None:
        return []
    low, high = min(thresholds.values), max(thresholds.values)
    return [f"thresholds {low:.2f} to {high:.2f}, fitted for each class on the {thresholds.fitted_on} split"]


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
