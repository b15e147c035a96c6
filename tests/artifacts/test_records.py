"""Records: round trips, files of version 0.1, and missing or wrong fields."""

import json
import shutil
from functools import reduce
from operator import getitem

import numpy as np
import pytest
from helpers.records import VERSION_0_1, artifact_result, exported_file, make_gate, make_record

from hfvit.artifacts.engine_record import EngineRecord
from hfvit.artifacts.export_record import ExportRecord
from hfvit.artifacts.gate import migrate_gate
from hfvit.artifacts.run_record import RunRecord
from hfvit.artifacts.run_sections import Score
from hfvit.errors import ModelError
from hfvit.metrics.multilabel import multilabel_metrics

KINDS = [(RunRecord, "run.json"), (RunRecord, "run_probe.json"), (RunRecord, "run_text.json")]
KINDS += [(ExportRecord, "export.json"), (EngineRecord, "engine.json")]


def old_content(name: str) -> dict:
    return json.loads((VERSION_0_1 / name).read_text())


def american(value):
    """Rename keys as after version 0.1."""
    if isinstance(value, dict):
        return {key.replace("artefact", "artifact"): american(item) for key, item in value.items()}
    return [american(item) for item in value] if isinstance(value, list) else value


@pytest.fixture
def old(tmp_path):
    """`old(kind, name)` copies a file of version 0.1 to a folder."""

    def put(kind, name):
        shutil.copy(VERSION_0_1 / name, tmp_path / kind.FILE)
        return tmp_path

    return put


@pytest.mark.parametrize(("kind", "name"), KINDS, ids=[name for _, name in KINDS])
def test_version_0_1_file_keeps_every_value_in_a_round_trip(kind, name, old):
    folder = old(kind, name)
    record = kind.load(folder)
    record.save(folder)
    assert kind.load(folder) == record
    content = json.loads((folder / kind.FILE).read_text())
    assert content.pop("schema_version") == 1
    expected = american(old_content(name))
    for row in expected["gate"]["artifacts"] if "gate" in expected else []:
        name, *changes = row["artifact"].split(" ")
        row["artifact"] = name
        row |= {key: int(value) for key, value in (change.split("=") for change in changes)}
    for metrics in expected.get("metrics", {}).values():
        matrix = np.array(metrics["confusion_matrix"])
        true, predicted = matrix.nonzero()
        metrics["confusion_matrix"] = {
            "classes": len(matrix),
            "true": true.tolist(),
            "predicted": predicted.tolist(),
            "counts": matrix[true, predicted].tolist(),
        }
    if examples := expected.get("examples"):
        examples["explanations"] = examples.pop("attention")
        examples["explanations_left_out"] = examples.pop("attention_left_out")
        examples |= {"explanation_method": "Attention rollout", "label_errors": []}
    assert content == expected
    assert record.extra == {}


def test_version_0_1_gate_has_changes_as_fields(old):
    gate = RunRecord.load(old(RunRecord, "run.json")).gate
    found = [(row.artifact, row.patch_size, row.merge_tokens) for row in gate.artifacts]
    assert found == [("run", None, None), ("onnx/model.onnx", None, None), ("run", 4, None), ("run", None, 1)]
    assert gate.artifacts[2].title == "run patch_size=4"


def test_version_0_1_gate_of_an_engine_is_read(old):
    folder = old(EngineRecord, "engine.json")
    content = old_content("engine.json")
    content["gate"] = old_content("export.json")["files"]["model.onnx"]["gate"]
    (folder / "engine.json").write_text(json.dumps(content))
    record = EngineRecord.load(folder)
    assert (record.gate.artifact, record.gate.reference.artifact) == ("onnx/model.onnx", "run")
    assert record.onnx.gate.artifact == "model_fp16.onnx"


@pytest.mark.parametrize("gate", [None, 3, [], {}, {"artefacts": 1}, {"artefact": []}, {"artefact": " patch_size="}])
def test_migrate_gate_accepts_any_json_value(gate):
    assert migrate_gate(gate) == american(gate)


def test_unknown_keys_of_every_section_are_kept(old):
    folder = old(RunRecord, "run.json")
    content = old_content("run.json")
    for section in (content, content["model"], content["metrics"]["test"]["per_class"][0], content["gate"]["data"]):
        section["of another version"] = {"a": [1]}
    (folder / "run.json").write_text(json.dumps(content))
    record = RunRecord.load(folder)
    record.gate = make_gate(artifact_result("x", patch_size=8))
    record.save(folder)
    written = json.loads((folder / "run.json").read_text())
    for section in (written, written["model"], written["metrics"]["test"]["per_class"][0]):
        assert section["of another version"] == {"a": [1]}
    assert [(row["artifact"], row["patch_size"]) for row in written["gate"]["artifacts"]] == [("x", 8)]
    assert "merge_tokens" not in written["gate"]["artifacts"][0]


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("model",), None, "model must be an object"),
        (("model", "architecture"), 3, "model.architecture must be a string"),
        (("model", "image_size"), [16], "model.image_size must be a list of 2"),
        (("data", "labels"), ["a", 1], r"data.labels\[1\] must be a string"),
        (("data", "splits", "test"), "test", "data.splits.test must be an object"),
        (("training", "steps"), 1.5, "training.steps must be an integer"),
        (("training", "processes"), True, "training.processes must be an integer"),
        (("training", "seconds"), "long", "training.seconds must be a number"),
        (
            ("metrics", "test", "confusion_matrix"),
            [[1, 2], [3, "x"]],
            r"metrics.test.confusion_matrix\[1\]\[1\] must be",
        ),
        (("metrics", "test", "confusion_matrix"), [[1, 2], [3]], r"metrics.test.confusion_matrix\[1\] must be"),
        (("metrics", "test", "confusion_matrix"), [[1]], r"metrics.test.confusion_matrix must have the"),
        (("metrics", "test", "accuracy"), 1.5, "metrics.test.accuracy must be a number from 0 to 1"),
        (("metrics", "test", "loss"), 1e200, "metrics.test.loss must be a number"),
        (("metrics", "test", "images"), -1, "metrics.test.images must be an integer from 0"),
        (("metrics",), {}, "metrics.validation"),
        (("recipe",), {}, "recipe.global_batch_size"),
        (("history",), {}, "history must be a list"),
        (("finished",), "yesterday", "finished must be a date"),
        (("temperature", "splits"), {}, "temperature.splits"),
        (("examples", "split"), "elsewhere", "data.splits.elsewhere"),
        (("schema_version",), 2, "schema_version must be at most 1"),
        (("schema_version",), "1", "schema_version must be at most 1"),
    ],
)
def test_wrong_field_error_names_field_and_file(old, path, value, named):
    folder = old(RunRecord, "run.json")
    content = old_content("run.json")
    reduce(getitem, path[:-1], content)[path[-1]] = value
    (folder / "run.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=rf"run\.json: .*{named}") as raised:
        RunRecord.load(folder)
    assert len(str(raised.value)) < 400 + len(str(folder))


@pytest.mark.parametrize(
    "path",
    [
        ("model",), ("model", "parameters"), ("data", "selected_by"), ("training", "best_step"), ("hardware", "gpus"),
        ("versions",), ("metrics", "test", "ece"), ("history",),
    ],
    ids=".".join,
)  # fmt: skip
def test_missing_field_error_names_field_and_file(old, path):
    folder = old(RunRecord, "run.json")
    content = old_content("run.json")
    del reduce(getitem, path[:-1], content)[path[-1]]
    (folder / "run.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=rf"run\.json: .*{'.'.join(path)} \("):
        RunRecord.load(folder)


def test_wrong_value_of_multi_label_metrics_is_named():
    targets = np.eye(3, dtype=np.uint8)
    content = make_record().to_json()
    content["metrics"]["test"] = multilabel_metrics(targets - 0.5, targets, ["a", "b", "c"])
    assert RunRecord.from_json(content).metrics["test"].map == 1.0
    content["metrics"]["test"]["per_class"][1]["f1"] = 2
    with pytest.raises(ModelError, match=r"metrics\.test\.per_class\[1\]\.f1 must be"):
        RunRecord.from_json(content)


def test_run_json_of_a_thousand_classes_is_small(tmp_path):
    record = make_record(classes=1000, images=20_000)
    record.save(tmp_path)
    assert (tmp_path / "run.json").stat().st_size < 1e6
    assert RunRecord.load(tmp_path) == record


def test_a_large_dense_matrix_of_an_older_version_is_read():
    record = make_record(classes=1000)
    content = record.to_json()
    expected = record.metrics["test"].confusion_matrix
    content["metrics"]["test"]["confusion_matrix"] = expected.dense().tolist()
    assert RunRecord.from_json(content).metrics["test"].confusion_matrix == expected


@pytest.mark.parametrize("most", [1, 2, 3, 5, 10, 11])
def test_neighboring_classes_of_a_confusion_matrix_are_added_up(most):
    matrix = make_record().metrics["test"].confusion_matrix
    dense = matrix.dense()
    found = matrix.dense(most)
    together = -(-10 // most)
    edges = np.arange(0, 10, together)
    assert len(found) <= most
    assert np.array_equal(found, np.add.reduceat(np.add.reduceat(dense, edges, axis=0), edges, axis=1))


def test_export_record_drops_deleted_files(tmp_path):
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_text("")
        ExportRecord.load(tmp_path).enter(tmp_path, name, exported_file())
    (tmp_path / "a.onnx").unlink()
    (tmp_path / "c.onnx").write_text("")
    ExportRecord.load(tmp_path).enter(tmp_path, "c.onnx", exported_file())
    assert set(ExportRecord.load(tmp_path).files) == {"b.onnx", "c.onnx"}


@pytest.mark.parametrize(("name", "title"), [("accuracy", "Accuracy"), ("micro F1", "Micro F1"), ("mAP", "mAP")])
def test_score_begins_a_line_with_a_capital_unless_it_is_mean_average_precision(name, title):
    assert Score(name, name, 0.5, (0.4, 0.6)).title == title


def test_record_is_printed_as_a_summary(tmp_path):
    record = make_record()
    record.save(tmp_path)
    score = f"{record.result.score.value:.2%}"
    assert score in str(record)
    assert str(tmp_path) in str(record)
    assert score in repr(record)
    assert "\n" not in repr(record)
    assert len(str(record)) < 2000
