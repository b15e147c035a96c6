"""Self-contained HTML report."""

import base64
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import StrictUndefined
from PIL import Image

from hfvit.artifacts.export_folder import ExportRow
from hfvit.artifacts.gate import Gate
from hfvit.artifacts.run_record import RunRecord, read_examples
from hfvit.artifacts.run_sections import ExampleImage, ExampleImages, MultiLabelMetrics, SplitMetrics
from hfvit.artifacts.run_summary import selection
from hfvit.hub.redaction import redact_record
from hfvit.report.figures import DARK, LIGHT, css_variables, draw_svg, scaled, source_of
from hfvit.report.plots import explanation_title, result_figures
from hfvit.utils.files import expand_user, write_text
from hfvit.utils.formatting import duration
from hfvit.utils.hub_ids import dataset_title
from hfvit.utils.markup import SafeText, html_environment
from hfvit.utils.overlay import enlarged, highlight

PAGE_FILE = "report.html"
# Caption of each plot, also its description for screen readers.
_PLOTS = {
    "confusion_matrix": "Confusion matrix: rows are the true classes, columns the predicted ones",
    "per_class_recall": "Recall of each class with its 95 % interval, the worst class first",
    "two_classes": "ROC and precision-recall curve of the second class",
    "precision_recall": "Precision over recall of each class, with points at the thresholds",
    "average_precision": "Average precision and F1 of each class",
    "reliability": "Reliability diagram: accuracy over confidence with 95 % intervals, and number of images",
    "learning_curves": "Loss, validation {score} and learning rate over the epochs",
}
_PROBE_PLOTS = {"learning_curves": "Validation {score} and loss of the linear probe over its inverse L2 penalty C"}
_OPEN_ROWS = 20  # a longer table of classes is collapsed
_SMALL_IMAGE = 64  # pixels; smaller images are enlarged without smoothing
_WEBP_QUALITY = 85


@dataclass
class Table:
    """Table of the page; the first cell of a row is its heading.

    Args:
        label: description for screen readers.
        columns: headings.
        rows: cells.
        caption: text above the table.
    """

    label: str
    columns: Sequence[str]
    rows: list[Sequence[str]]
    caption: str = ""


@dataclass
class Number:
    """Number in the head of the page."""

    name: str
    value: str
    note: str


def write_page(record: RunRecord, output_dir: str | Path, exports: dict[str, list[ExportRow]]) -> Path:
    """Write `output_dir/report.html`, a single file with all plots.

    The page has images of the data set and relative links to its files, but no local paths. It is never pushed.

    Args:
        record: record of the run.
        output_dir: output folder of the run.
        exports: folder name of each export -> its rows.

    Returns:
        The path of the page.
    """
    folder = Path(output_dir)
    texts = _PLOTS | (_PROBE_PLOTS if record.training.probe else {})
    texts = {name: text.format(score=record.result.score.name) for name, text in texts.items()}
    environment = html_environment(
        Path(__file__).parent, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "count": lambda number: f"{number:,}"}
    script = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
    multi_label = isinstance(record.result, MultiLabelMetrics)
    figures = result_figures(record)
    examples = record.examples or ExampleImages(split=record.role, mistakes=[])
    page = environment.get_template("page.html").render(
        name=folder.resolve().name,
        run=redact_record(record),
        multi_label=multi_label,
        title=dataset_title(record.data.dataset_name),
        selected=selection(record.training),
        time=duration(record.training.seconds),
        numbers=_numbers(record),
        splits=_split_table(record),
        classes=_class_table(record.result),
        calibration=_calibration_table(record),
        exports=_export_table([row for rows in exports.values() for row in rows], multi_label),
        gate=_gate_table(record.gate) if record.gate else None,
        examples=examples,
        explanation_title=explanation_title(examples.explanation_method),
        **_galleries(record, folder),
        figures={
            name: {"svg": draw_svg(figures[name], text), "text": text} if name in figures else None
            for name, text in texts.items()
        },
        training_images=_training_images(folder),
        light=SafeText(css_variables(LIGHT)),
        dark=SafeText(css_variables(DARK)),
        script=SafeText(script),
        script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        open_rows=_OPEN_ROWS,
    )
    path = folder / PAGE_FILE
    write_text(path, page)
    return path


# Numbers and tables


def _percent(fraction: float) -> str:
    return f"{fraction:.2%}"


def _numbers(record: RunRecord) -> list[Number]:
    result = record.result
    training = record.training
    if isinstance(result, MultiLabelMetrics):
        found = [
            Number(f"mAP, {record.role}", f"{result.map:.4f}", "{:.4f} to {:.4f}".format(*result.map_interval)),
            Number("micro F1", f"{result.micro_f1:.4f}", "{:.4f} to {:.4f}".format(*result.micro_f1_interval)),
            Number(
                "exact match",
                _percent(result.exact_match),
                f"{result.images:,} images, {result.labels_per_image:.2f} labels each",
            ),
        ]
    else:
        temperature = record.temperature
        note = "15 bins"
        if temperature and temperature.value:
            note = f"{temperature.splits[record.role].ece:.4f} with temperature scaling"
        low, high = map(_percent, result.accuracy_interval)
        found = [
            Number(f"accuracy, {record.role}", _percent(result.accuracy), f"{low} to {high}"),
            Number("macro F1", f"{result.macro_f1:.4f}", f"{result.images:,} images"),
            Number("ECE", f"{result.ece:.4f}", note),
        ]
    steps = "linear probe" if training.probe else f"{training.steps:,} steps"
    speed = f"{steps}, {round(training.images_per_second):,} images/s"
    return [*found, Number("training", duration(training.seconds), speed)]


def _split_table(record: RunRecord) -> Table:
    """Return the table of the splits, with the columns of the summary."""
    cells = {split: metrics.columns() for split, metrics in record.metrics.items()}
    caption = "Intervals are of 95 % (Wilson), for random images. ECE: expected calibration error."
    if isinstance(record.result, MultiLabelMetrics):
        caption = (
            "Intervals are of 95 %, by a bootstrap over the images. F1 and exact match are of the thresholds below."
        )
    if record.eval_tta:
        caption += f" Evaluated with {record.eval_tta} test-time augmentation."
    return Table(
        "Metrics of each split",
        ["split", *next(iter(cells.values()))],
        [[split, *row.values()] for split, row in cells.items()],
        caption,
    )


def _class_table(result: SplitMetrics | MultiLabelMetrics) -> Table:
    has_thresholds = isinstance(result, MultiLabelMetrics)
    rows = []
    for entry in result.per_class:
        row = [entry.label, f"{entry.images:,}"]
        if has_thresholds:
            precision = "" if entry.average_precision is None else f"{entry.average_precision:.4f}"
            row += [precision, f"{entry.threshold:.4f}"]
        rows.append([*row, _percent(entry.precision), _percent(entry.recall), f"{entry.f1:.4f}"])
    extra = ["average precision", "threshold"] if has_thresholds else []
    return Table("Metrics of each class", ["class", "images", *extra, "precision", "recall", "F1"], rows)


def _calibration_table(record: RunRecord) -> Table | None:
    temperature = record.temperature
    if temperature is None or temperature.value is None:
        return None
    rows = []
    for split, after in temperature.splits.items():
        before = record.metrics[split]
        rows.append([split, *(f"{value:.4f}" for value in (before.ece, after.ece, before.loss, after.loss))])
    return Table("Calibration of each split", ["split", "ECE", "calibrated", "loss", "calibrated loss"], rows)


def _export_table(rows: list[ExportRow], multi_label: bool) -> Table | None:
    if not rows:
        return None
    score = "micro F1" if multi_label else "accuracy"
    columns = ["file", "size", "largest difference of the logits", score, "agreement with PyTorch"]
    cells = [[row.file, row.size, row.difference, row.score, row.agreement] for row in rows]
    return Table("Exported files", columns, cells, "An empty cell was not measured.")


def _gate_table(gate: Gate) -> Table:
    score = gate.artifacts[0].score.name if gate.artifacts else "score"
    columns = ["artifact", score, "change, percentage points", "agreement", "p50, ms", "images/s"]
    rows = [
        [
            row.title,
            _percent(row.score.value),
            f"{row.change_points:+.2f}",
            _percent(row.agreement),
            f"{row.latency_ms_p50:.1f}",
            f"{round(row.images_per_second):,}",
        ]
        for row in gate.artifacts
    ]
    return Table("Last validation", columns, rows, f"{gate.data.dataset}, {gate.data.split}")


# Images


def _galleries(record: RunRecord, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return mistakes, likely label errors and explanations with captions."""
    examples = record.examples
    if examples is None:
        return {"mistakes": [], "label_errors": [], "explanations": []}
    arrays = read_examples(folder, examples)
    maps = arrays.get("explanation_maps")
    root = data_folder(record)
    found = {}
    for name in ("mistakes", "label_errors", "explanations"):
        items = []
        for index, example in enumerate(getattr(examples, name)):
            images = [arrays[name][index]] if name in arrays else []
            if images and name == "explanations" and maps is not None:
                images.append(highlight(enlarged(images[0], 112), scaled(maps[index])))
            items.append(_item(example, images, root, folder))
        found[name] = items
    return found


def _item(example: ExampleImage, images: list[np.ndarray], root: Path | None, folder: Path) -> dict[str, Any]:
    return {
        "images": [_embed(image) for image in images],
        "small": bool(images) and max(images[0].shape[:2]) <= _SMALL_IMAGE,
        "predicted": example.predicted,
        "label": "" if example.true == example.predicted else example.true,
        "confidence": example.confidence,
        "classes": [example.true, example.predicted],
        "source": example.file or source_of(example),
        "link": file_link(example, root, folder),
    }


def data_folder(record: RunRecord) -> Path | None:
    """Return the folder of the data set, None for one that is not in a local folder."""
    if record.data.is_local is False:
        return None
    root = expand_user(record.data.dataset_name)
    return root if root.is_dir() else None


def file_link(example: ExampleImage, root: Path | None, folder: Path) -> str | None:
    """Return a link from a page in `folder` to the file of an image, None without it.

    Args:
        example: image with its file.
        root: folder of the data set.
        folder: folder of the page.
    """
    if root is None or not example.file or not (root / example.file).is_file():
        return None
    try:
        return quote(Path(os.path.relpath(root / example.file, folder)).as_posix())
    except ValueError:  # another drive on Windows
        return (root / example.file).resolve().as_uri()


def _embed(image: np.ndarray) -> str:
    """Return an image as a data URI."""
    buffer = io.BytesIO()
    is_small = max(image.shape[:2]) <= _SMALL_IMAGE
    Image.fromarray(image).save(buffer, "WEBP", lossless=is_small, quality=_WEBP_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _training_images(folder: Path) -> dict[str, str | None] | None:
    """Return the plot of training images as data URIs, None if it was not drawn."""
    files = [folder / "plots" / f"training_images{theme.suffix}.png" for theme in (LIGHT, DARK)]
    if not files[0].is_file():
        return None
    light, dark = (
        "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode() if file.is_file() else None
        for file in files
    )
    return {"light": light, "dark": dark}
