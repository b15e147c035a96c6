"""Self-contained HTML report."""

import base64
from pathlib import Path

from jinja2 import StrictUndefined

from hfvit.artifacts.export_folder import ExportRow
from hfvit.artifacts.run_record import RunRecord
from hfvit.artifacts.run_sections import ExampleImages, MultiLabelMetrics
from hfvit.artifacts.run_summary import selection
from hfvit.hub.redaction import redact_record
from hfvit.report.figures import DARK, LIGHT
from hfvit.utils.files import write_text
from hfvit.utils.formatting import duration
from hfvit.utils.hub_ids import dataset_title
from hfvit.utils.markup import html_environment

PAGE_FILE = "report.html"
# Caption and alt text of each plot.
_PLOTS = {
    "confusion_matrix": "Confusion matrix: rows are the true classes, columns the predicted ones",
    "per_class_accuracy": "Accuracy of each class with its 95 % interval",
    "precision_recall": "Precision over recall of each class, with points at the thresholds",
    "average_precision": "Average precision and F1 of each class",
    "reliability": "Reliability diagram: accuracy over confidence, before and after temperature scaling",
    "mistakes": "The most confident mistakes, with predicted class, confidence and true class",
    "attention": "Images and their attention rollout",
    "learning_curves": "Loss, validation {score} and learning rate over the training steps",
    "training_images": "Training images after augmentation",
}
_PROBE_PLOTS = {"learning_curves": "Validation {score} and loss of the linear probe over its inverse L2 penalty C"}
_OPEN_ROWS = 20  # a longer table of classes is collapsed


def write_page(record: RunRecord, output_dir: str | Path, exports: dict[str, list[ExportRow]]) -> Path:
    """Write `output_dir/report.html`, a single file with all plots.

    The page has images of the data set, but no local paths. It is never pushed.

    Args:
        record: record of the run.
        output_dir: output folder of the run, whose `plots/` are embedded.
        exports: folder name of each export -> its rows.

    Returns:
        The path of the page.
    """
    folder = Path(output_dir)
    plots = _PLOTS | (_PROBE_PLOTS if record.training.probe else {})
    score = record.result.score.name
    environment = html_environment(
        Path(__file__).parent, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": lambda fraction: f"{fraction:.2%}", "count": lambda number: f"{number:,}"}
    page = environment.get_template("page.html").render(
        name=folder.resolve().name,
        run=redact_record(record),
        result=record.result,
        multi_label=isinstance(record.result, MultiLabelMetrics),
        title=dataset_title(record.data.dataset_name),
        selected=selection(record.training),
        time=duration(record.training.seconds),
        examples=record.examples or ExampleImages(split=record.role, mistakes=[]),
        exports=[row for rows in exports.values() for row in rows],
        plots={name: _embed(folder, name, text.format(score=score)) for name, text in plots.items()},
        open_rows=_OPEN_ROWS,
    )
    path = folder / PAGE_FILE
    write_text(path, page)
    return path


def _embed(folder: Path, name: str, text: str) -> dict | None:
    """Return both themes of a plot as data URIs, None if it was not drawn."""
    files = [folder / "plots" / f"{name}{theme.suffix}.png" for theme in (LIGHT, DARK)]
    if not files[0].is_file():
        return None
    light, dark = (
        "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode() if file.is_file() else None
        for file in files
    )
    return {"light": light, "dark": dark, "text": text}
