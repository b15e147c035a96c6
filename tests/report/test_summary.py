"""Summary table and model card from a run record."""

from dataclasses import replace

import pytest
import yaml
from helpers.messages import assert_names
from helpers.records import artifact_result, exported_file, make_gate, make_record, parity
from huggingface_hub import ModelCard, parse_eval_result_entries

from hfvit.artifacts.export_folder import export_rows
from hfvit.artifacts.export_record import ExportRecord
from hfvit.artifacts.run_record import command_line
from hfvit.artifacts.run_sections import CalibratedSplit, Temperature
from hfvit.artifacts.run_summary import summary_table
from hfvit.hub.files import eval_results_file
from hfvit.hub.model_card import render_card, write_model_card
from hfvit.utils.formatting import duration
from hfvit.utils.hub_ids import dataset_title, is_hub_id


def test_summary_table_has_metrics_and_settings():
    table = summary_table(make_record(), "outputs/x")
    assert_names(table, "vit_base_patch16_224", "224 px", "86.0 M", "1 h 6 min", "step 900", "accuracy")
    assert table.splitlines()[0].split()[:3] == ["split", "images", "accuracy"]


def test_summary_fits_a_narrow_terminal():
    record = make_record()
    wide, narrow = summary_table(record, "outputs/x"), summary_table(record, "outputs/x", width=60)
    assert max(map(len, narrow.splitlines())) <= 60 < max(map(len, wide.splitlines()))
    assert [line.split()[0] for line in narrow.splitlines()[:3]] == ["split", "images", "accuracy"]
    assert sorted(narrow.split()) == sorted(wide.split())


def test_top5_is_shown_above_five_classes():
    metrics = make_record().metrics["test"]
    assert ("top-5" in metrics.columns()) == (len(metrics.per_class) > 5)
    few = replace(metrics, per_class=metrics.per_class[:3])
    assert "top-5" not in few.columns()


def test_card_has_valid_metadata_and_metrics(tmp_path):
    record = make_record()
    (tmp_path / "my-vit").mkdir()
    path = write_model_card(record, tmp_path / "my-vit")
    card = ModelCard.load(path)
    assert card.data.library_name == "timm"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.datasets == "uoft-cs/cifar10"
    assert card.data.base_model == "timm/vit_base_patch16_224.augreg_in21k"
    accuracy = card.data.eval_results[0]
    assert accuracy.metric_value == round(record.metrics["test"].accuracy, 4)
    assert accuracy.dataset_split == "test"
    assert "ore information needed" not in card.content.lower()
    for nothing in ("None", "{{", "}}", "{%"):
        assert nothing not in card.content


def temperature(record):
    split = CalibratedSplit(loss=0.1, ece=0.0123, calibration=record.metrics["test"].calibration)
    splits = {"validation": split, "test": split}
    return Temperature(value=1.2345, fitted_on="validation", images=2000, reason=None, splits=splits)


def test_summary_table_has_calibration_if_fitted():
    record = make_record()
    assert "temperature" not in render_card(record, "x")
    record.temperature = temperature(record)
    before = record.metrics["test"].ece
    assert_names(summary_table(record, "out"), 1.23, "validation", f"{before:.4f} -> 0.0123")
    card = render_card(record, "x")
    assert_names(card, 1.2345)
    assert f"| test | {before:.4f} | 0.0123 |" in card
    record.temperature.value = None
    record.temperature.reason = "nothing was wrong"
    assert_names(summary_table(record, "out"), "nothing was wrong")
    assert "temperature" not in render_card(record, "x")


def test_dark_plots_of_a_pushed_card_have_absolute_urls():
    card = render_card(make_record(), "x", "user/x")
    assert 'srcset="https://huggingface.co/user/x/resolve/main/plots/reliability_dark.png"' in card
    card = render_card(make_record(), "x", "user/x", revision="next/try")
    assert 'srcset="https://huggingface.co/user/x/resolve/next%2Ftry/plots/reliability_dark.png"' in card


def test_eval_results_file_of_a_hub_data_set():
    record = replace(make_record(), finished="2026-01-02T03:04:05+00:00")
    path, text = eval_results_file(record)
    assert path == ".eval_results/uoft-cs--cifar10.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.task_id) == ("uoft-cs/cifar10", "default")
    assert entry.value == pytest.approx(100 * record.metrics["test"].accuracy, abs=0.01)
    assert entry.date == record.finished
    assert_names(entry.notes, "test", "2,000")
    assert eval_results_file(make_record(dataset_name="digits")) is None
    assert eval_results_file(replace(record, recipe={"max_eval_samples": 10})) is None
    assert eval_results_file(replace(record, metrics={"validation": record.metrics["validation"]})) is None


def test_card_has_license_commit_and_command(tmp_path):
    record = make_record()
    record.model = replace(record.model, is_local=False, base_license="apache-2.0")
    record.data = replace(record.data, is_local=False, dataset_commit="c0ffee" * 6 + "abcd")
    record.command = "train.py vit_base --output_dir /home/somebody/out"
    text = write_model_card(record, tmp_path).read_text()
    card = ModelCard(text)
    assert card.data.license == "apache-2.0"
    assert card.data.eval_results[0].dataset_revision == record.data.dataset_commit
    assert f"--dataset_revision {record.data.dataset_commit}" in text
    assert "`hfvit train vit_base --output_dir out`" in text
    pinned = replace(record, recipe=record.recipe | {"dataset_revision": record.data.dataset_commit})
    assert "--dataset_revision" not in render_card(pinned, "x")
    for row in record.metrics["test"].per_class:
        assert f"| {row.label} | {row.images} |" in text


def test_card_lists_exports_and_their_usage(tmp_path):
    row = artifact_result("onnx/model.onnx", accuracy=0.948)
    whole = exported_file(bytes=86_283_204, parity=parity(2.9e-06), gate=make_gate(row).of(row))
    (tmp_path / "onnx").mkdir()
    files = {"model.onnx": whole, "model_fp16.onnx": exported_file(), "deleted.onnx": exported_file()}
    ExportRecord(files=files).save(tmp_path / "onnx")
    for name in ("model.onnx", "model_fp16.onnx"):
        (tmp_path / "onnx" / name).touch()
    text = render_card(make_record(), "x", "user/x", {"onnx": export_rows(tmp_path / "onnx")})
    assert "| `onnx/model.onnx` | 86.3 MB | 2.9e-06 | 94.80% | 100.00% |" in text
    assert "| `onnx/model_fp16.onnx` | 1 B |  |  |  |" in text
    assert "deleted.onnx" not in text
    assert 'dtype: "fp32"' in text
    assert 'hf_hub_download("user/x", "onnx/model.onnx")' in text
    assert "onnxruntime" not in render_card(make_record(), "x", "user/x")


@pytest.mark.parametrize(
    ("reference", "shown"),
    [("out", True), ("user/x@v1", True), ("onnx/model.onnx", False), ("1/model.plan", False), (None, True)],
)
def test_agreement_with_pytorch_is_that_with_a_checkpoint(tmp_path, reference, shown):
    row = artifact_result("onnx/model.onnx", agreement=0.99, max_logit_difference=0.25)
    gate = make_gate(row).of(row, reference and artifact_result(reference))
    ExportRecord(files={"model.onnx": exported_file(gate=gate)}).save(tmp_path)
    (tmp_path / "model.onnx").touch()
    (found,) = export_rows(tmp_path)
    assert (found.score, found.difference, found.agreement) == ("94.80%", *(("0.25", "99.00%") if shown else ("", "")))


def test_user_text_in_the_card_is_kept_by_the_next_run(tmp_path):
    path = write_model_card(make_record(), tmp_path)
    path.write_text(path.read_text() + "\n## Thanks\n\nTo all.\n")
    again = make_record()
    again.training.steps = 4321
    text = write_model_card(again, tmp_path).read_text()
    assert "To all." in text
    assert_names(text, "4,321")
    assert text == write_model_card(again, tmp_path).read_text()


def test_card_of_local_data_and_checkpoint_has_no_local_path(tmp_path):
    record = make_record(dataset_name="/home/somebody/private/photos", base_model="/home/somebody/models/x")
    text = write_model_card(record, tmp_path).read_text()
    assert "somebody" not in text
    assert "photos" in text
    assert "datasets" not in ModelCard(text).data.to_dict()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("uoft-cs/cifar10", True), ("../images/cats", False), ("/data/x", False), ("digits", False), ("a/b/c", False)],
)
def test_is_hub_id(name, expected):
    assert is_hub_id(name) is expected
    assert "/" not in dataset_title(name) or expected


def test_duration():
    assert [duration(s) for s in (5, 65, 3660)] == ["5 s", "1 min 5 s", "1 h 1 min"]


def test_recorded_command_has_no_tokens(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["/x/train.py", "r.yaml", "--hub_token", "hf_a", "--hub-token=hf_b", "--seed", "1"]
    )
    assert command_line() == "train.py r.yaml --hub_token '***' '--hub-token=***' --seed 1"
