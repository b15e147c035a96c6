"""Summary of a run: scores of each split and entries, as rows, text or HTML."""

import base64
import os
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hfvit.artifacts.run_sections import MultiLabelMetrics, SplitMetrics, Training
from hfvit.errors import printable
from hfvit.utils.formatting import aligned, counted, duration

INDENT = 11  # of the entries, after their names
PRECISIONS = {"no": "fp32"}  # Accelerate's word -> the usual one
SHOWN_FIGURES = ("learning_curves", "confusion_matrix", "precision_recall", "mistakes")


def score_rows(metrics: Mapping[str, MultiLabelMetrics | SplitMetrics]) -> list[tuple[str, ...]]:
    """Return the table of scores: a header, and a row for each split.

    Args:
        metrics: metrics of each split.
    """
    tables = {split: values.columns() for split, values in metrics.items()}
    header = ("split", *next(iter(tables.values())))
    return [header, *((split, *columns.values()) for split, columns in tables.items())]


def summary_entries(record: Any, output_dir: str | Path) -> dict[str, str]:
    """Describe model, training, selection and files of a run.

    Args:
        record: `RunRecord` of the run.
        output_dir: output folder of the run.
    """
    model = record.model
    training = record.training
    entries = {
        "model": f"{model.architecture}, {model.image_size[0]} px, {model.parameters / 1e6:.1f} M parameters"
        f" ({model.trained_parameters / 1e6:.1f} M trained)"
    }
    if model.texts:
        entries["texts"] = f"{model.texts.model_type}, fusion {model.texts.fusion}"
    resumed = f", resumed at step {training.resumed_at_step:,}" if training.resumed_at_step else ""
    epochs = "" if training.epochs is None else f", {counted(training.epochs, 'epoch')}"
    processes = counted(training.processes, "process", "processes")
    entries["training"] = (
        f"{counted(training.steps, 'step')}{epochs}{resumed} in {duration(training.seconds)};"
        f" {training.images_per_second:,.0f} images/s, {training.data_wait:.1%} of the time waiting for data;"
        f" {PRECISIONS.get(training.precision, training.precision)}, {processes}"
    )
    entries["selected"] = f"{selection(training)}{_without_test_split(record)}"
    if record.eval_tta:
        entries["evaluated"] = f"with {record.eval_tta} test-time augmentation"
    if record.thresholds:
        thresholds = record.thresholds
        entries["thresholds"] = (
            f"{min(thresholds.values):.2f} to {max(thresholds.values):.2f}, fitted for each class on the"
            f" {thresholds.fitted_on} split"
        )
    elif record.temperature:
        entries["calibrated"] = _calibration(record)
    entries["files"] = shown_path(output_dir)
    return entries


def _entry(name: str, text: str, width: int | None) -> list[str]:
    lines = [text] if width is None else textwrap.wrap(text, max(width - INDENT, 20)) or [""]
    return [f"{(name if index == 0 else '').ljust(INDENT)}{line}" for index, line in enumerate(lines)]


def selection(training: Training) -> str:
    """Describe which checkpoint, soup or penalty was selected, and by which metric."""
    if training.soup and training.soup.is_used:
        steps = ", ".join(name.removeprefix("checkpoint-") for name in training.soup.used)
        return f"{training.soup.kind} soup of steps {steps} by validation {training.soup.metric}"
    if training.best_step:
        value = "" if training.best_metric is None else f" ({training.best_metric:.4f})"
        return f"step {training.best_step} by validation {training.best_metric_name}{value}"
    if probe := training.probe:
        return f"C = {probe.best_c:g} of {len(probe.c)} by validation {probe.selected_by}"
    return "the last step"


def _without_test_split(record: Any) -> str:
    """Note that the results are optimistic if there is no test split."""
    if record.role == "test" or not record.data.selected_by:
        return ""
    name = record.result.score.name
    return f"; no test split: the {name} above is of the split used for selection, so it is optimistic"


def _calibration(record: Any) -> str:
    temperature = record.temperature
    if temperature.value is None:
        return f"no: {temperature.reason}"
    before = record.result
    after = temperature.splits[record.role]
    return (
        f"temperature {temperature.value:.2f}, fitted on the validation split; {record.role} ECE"
        f" {before.ece:.4f} -> {after.ece:.4f}, loss {before.loss:.4f} -> {after.loss:.4f}"
    )


def shown_path(path: str | Path) -> str:
    """Return a path relative to the working folder if it is inside, else unchanged."""
    absolute = os.path.abspath(path)
    inside = absolute.startswith(os.getcwd() + os.sep)
    return os.path.relpath(absolute) if inside else str(path)


def summary_table(record: Any, output_dir: str | Path, width: int | None = None) -> str:
    """Format the scores of each split, and model, time and speed of the training.

    Args:
        record: record of the run.
        output_dir: output folder of the run.
        width: columns of the terminal. With few, splits are columns instead of rows. Default: no limit.
    """
    rows = score_rows(record.metrics)
    table = aligned(rows)
    if width and max(map(len, table)) > width:
        table = aligned([*zip(*rows, strict=True)])
    entries = {name: printable(text) for name, text in summary_entries(record, output_dir).items()}
    return "\n".join([*table, "", *(line for entry in entries.items() for line in _entry(*entry, width))])


def summary_html(record: Any, folder: Path | None) -> str:
    """Format the summary as HTML, with the figures of the run's folder.

    Args:
        record: `RunRecord` of the run.
        folder: output folder of the run, None if it is not known.
    """
    header, *rows = score_rows(record.metrics)
    entries = summary_entries(record, folder or record.recipe.get("output_dir") or "")
    lines = [
        "<div>",
        f"<table><thead>{_html_row(header, 'th')}</thead>",
        f"<tbody>{''.join(_html_row(row, 'td') for row in rows)}</tbody></table>",
        "<table><tbody>",
        *(_html_row((name, text), "td", "text-align: left") for name, text in entries.items() if text),
        "</tbody></table>",
    ]
    for name in SHOWN_FIGURES if folder else ():
        file = folder / "plots" / f"{name}.png"
        if file.is_file():
            title = name.replace("_", " ").capitalize()
            is_first = " open" if name == SHOWN_FIGURES[0] else ""
            image = png_html(file.read_bytes(), title)
            lines.append(f"<details{is_first}><summary>{title}</summary>{image}</details>")
    return "\n".join([*lines, "</div>"])


def _html_row(cells: Sequence[str], tag: str, style: str = "") -> str:
    with_style = f' style="{style}"' if style else ""
    return f"<tr>{''.join(f'<{tag}{with_style}>{escape(printable(cell))}</{tag}>' for cell in cells)}</tr>"


def png_html(content: bytes, title: str, style: str = "max-width: 100%") -> str:
    """Return an HTML image that contains a PNG file.

    Args:
        content: bytes of the file.
        title: alternative text.
        style: CSS of the image.
    """
    data = base64.b64encode(content).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{escape(printable(title))}" style="{style}">'
