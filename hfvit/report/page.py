"""Self-contained HTML report."""

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hfvit.artifacts.export_folder import ExportRow
from hfvit.artifacts.run_record import RunRecord
from hfvit.artifacts.run_sections import ExampleImages
from hfvit.hub.redaction import redact_record
from hfvit.report.figures import DARK, LIGHT
from hfvit.report.summary import selection
from hfvit.utils.files import write_text
from hfvit.utils.formatting import duration
from hfvit.utils.hub_ids import dataset_title

PAGE_FILE = "report.html"
# In the order of the page: what a picture shows, for those who do not see it too.
_PLOTS = {
    "confusion_matrix": "Confusion matrix: rows are the true classes, columns the predicted ones",
    "per_class_accuracy": "Accuracy of every class with its 95 % interval",
    "reliability": "Accuracy against stated confidence, before and after calibration",
    "mistakes": "The most confident mistakes: each picture with what was said and what it is",
    "attention": "Pictures above maps of where the model looked",
    "learning_curves": "Loss, validation accuracy and learning rate over the training steps",
    "training_images": "Training images as the model sees them",
}
_PROBE_PLOTS = {"learning_curves": "Validation accuracy and loss over the strength of the probe's penalty"}
_OPEN_ROWS = 20  # of a table that is not folded


def write_page(record: RunRecord, output_dir: str | Path, exports: dict[str, list[ExportRow]]) -> Path:
    """Write `output_dir/report.html` from the record, the plots that lie there, and the exports by folder.

    It holds pictures of the data set, where there are any, but no path of this machine. It is never pushed.
    """
    folder = Path(output_dir)
    plots = _PLOTS | (_PROBE_PLOTS if record.training.probe else {})
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"percent": lambda share: f"{share:.2%}", "count": lambda number: f"{number:,}"}
    page = environment.get_template("page.html").render(
        name=folder.resolve().name,
        run=redact_record(record),
        result=record.result,
        title=dataset_title(record.data.dataset_name),
        selected=selection(record.training),
        time=duration(record.training.seconds),
        examples=record.examples or ExampleImages(split=record.role, mistakes=[]),
        exports=[row for rows in exports.values() for row in rows],
        plots={name: _embedded(folder, name, text) for name, text in plots.items()},
        open_rows=_OPEN_ROWS,
    )
    path = folder / PAGE_FILE
    write_text(path, page)
    return path


def _embedded(folder: Path, name: str, text: str) -> dict | None:
    """Both themes of a plot as data URIs; None where it was not drawn."""
    files = [folder / "plots" / f"{name}{theme.suffix}.png" for theme in (LIGHT, DARK)]
    if not files[0].is_file():
        return None
    light, dark = (
        "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode() if file.is_file() else None
        for file in files
    )
    return {"light": light, "dark": dark, "text": text}
