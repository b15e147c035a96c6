"""Records with a wrong value at any place: refused with the file's name, or taken and shown without a traceback."""

import json
from functools import partial

import matplotlib.pyplot as plt
import pytest
from helpers.damage import damaged, places, with_value
from helpers.records import VERSION_0_1

from hfvit.artifacts.engine_record import EngineRecord
from hfvit.artifacts.export_folder import export_rows
from hfvit.artifacts.export_record import ExportRecord
from hfvit.artifacts.run_record import RunRecord
from hfvit.artifacts.run_summary import summary_table
from hfvit.errors import ModelError
from hfvit.hub.files import eval_results_file
from hfvit.hub.model_card import render_card
from hfvit.hub.redaction import redact_paths
from hfvit.report.figures import (
    LIGHT,
    confusion_figure,
    learning_curves,
    per_class_figure,
    probe_curves,
    reliability_figure,
)
from hfvit.report.page import write_page
from hfvit.utils.files import json_text

KINDS = {"run.json": RunRecord, "run_probe.json": RunRecord, "run_text.json": RunRecord}
KINDS |= {"export.json": ExportRecord, "engine.json": EngineRecord}
OWN_KEYS = {"run_probe.json": "probe", "run_text.json": "text"}  # parts of the names of what run.json does not have
VALUES = [
    None, [], {}, "x", "", float("nan"), 1e308, 10**30, -1, -1.5, 0, True, [1], {"a": 1}, [[None]], "\ud800\n\x1b[2J",
]  # fmt: skip


def content_of(name: str) -> dict:
    """A file of version 0.1 with one or two items in each list of many."""
    content = json.loads((VERSION_0_1 / name).read_text())
    if name.startswith("run"):
        content["history"] = content["history"][:3]
        content["data"]["labels"] = content["data"]["labels"][:2]
        content["versions"] = {"python": "3.11"}
        content["recipe"] = {"global_batch_size": 8, "output_dir": "out", "dataset_name": "digits"}
        for metrics in content["metrics"].values():
            metrics["per_class"] = metrics["per_class"][:2]
            metrics["confusion_matrix"] = {"classes": 2, "true": [0, 1], "predicted": [0, 0], "counts": [3, 1]}
            metrics["calibration"] = metrics["calibration"][:1]
    return content


@pytest.mark.parametrize("name", KINDS)
def test_any_wrong_value_is_refused_with_the_files_name_or_taken(name, tmp_path):
    kind, content = KINDS[name], content_of(name)
    file = tmp_path / kind.FILE
    accepted = 0
    for path, value, text in damaged(content, VALUES):
        if name in OWN_KEYS and not any(OWN_KEYS[name] in str(key) for key in path):
            continue
        file.write_text(text)
        refusal = None
        try:
            json_text(kind.load(tmp_path).to_json())
        except ModelError as error:
            refusal = str(error)
        if refusal is None:
            accepted += 1
            if kind is not RunRecord:
                export_rows(tmp_path)
        else:
            assert str(file) in refusal, (path, value)
            assert "\n" not in refusal, (path, value)
    assert accepted > 10


@pytest.mark.parametrize(
    "value", [value for value in VALUES if value == value], ids=repr
)  # a file with NaN is refused
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind is RunRecord])
def test_a_record_with_all_wrong_values_that_are_taken_is_shown(name, value, tmp_path):
    content = content_of(name)
    for path in list(places(content)):
        try:
            changed = with_value(content, path, value)
            RunRecord.from_json(json.loads(json.dumps(changed)))
        except (ModelError, LookupError, TypeError):  # refused, or the place is gone with an earlier change
            continue
        content = changed
    text = json.dumps(content)
    (tmp_path / "run.json").write_text(text)
    record = RunRecord.load(tmp_path)
    summary_table(record, tmp_path)
    render_card(record, "m").encode()
    write_page(record, tmp_path, {})
    redact_paths(text, "run.json", record)
    eval_results_file(record)
    figures = [
        partial(learning_curves, record.history, record.training.best_step),
        partial(confusion_figure, record.result, record.role),
        partial(per_class_figure, record.result, record.role),
        partial(reliability_figure, record.result, record.role, record.temperature),
    ]
    figures += [partial(probe_curves, record.training.probe)] if record.training.probe else []
    for figure in figures:
        with plt.rc_context(LIGHT.settings()):
            figure(LIGHT).get_tightbbox()
            plt.close("all")
