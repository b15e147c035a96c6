"""Write plots, model card and HTML page of a finished run from its records."""

from dataclasses import dataclass
from pathlib import Path

from hfvit.artifacts.export_folder import find_exports
from hfvit.artifacts.run_record import RunRecord
from hfvit.hub.files import EXPORTS
from hfvit.hub.model_card import write_model_card
from hfvit.report.page import write_page
from hfvit.report.plots import write_plots
from hfvit.utils.files import expand_user


@dataclass
class Report:
    """Files that `write_report` wrote.

    Attributes:
        record: record of the run.
        plots: paths of the plots.
        card: path of the model card.
        page: path of the HTML page, None without `html`.
        stale: export folders older than the run, which were left out.
    """

    record: RunRecord
    plots: list[Path]
    card: Path
    page: Path | None
    stale: list[Path]

    def __repr__(self) -> str:
        page = "" if self.page is None else f", {self.page}"
        return f"Report({self.card}: {len(self.plots)} plots{page})"


def write_report(folder: str | Path, html: bool = False) -> Report:
    """Draw the plots of a run and write its model card.

    Only `run.json` and `examples.npz` are read, neither the model nor the data set.

    Args:
        folder: `output_dir` of the run.
        html: also write `report.html`, a single page that works offline.

    Raises:
        ModelError: `folder` is not the output folder of a finished run, or its record is damaged.
    """
    record = RunRecord.load(folder)
    root = expand_user(folder)
    exports, stale = find_exports(root, record)
    plots = write_plots(record, root)
    card = write_model_card(record, root, {name: rows for name, rows in exports.items() if name in EXPORTS})
    page = write_page(record, root, exports) if html else None
    return Report(record, plots, card, page, [root / name for name in stale])
