"""Pictures, table and card from facts alone."""

import pytest
import yaml
from helpers.messages import assert_names
from helpers.run_facts import make_facts
from huggingface_hub import ModelCard, parse_eval_result_entries

from hfvit.artifacts.run_facts import command_line
from hfvit.hub.files import eval_results_file
from hfvit.hub.model_card import render_card, write_model_card
from hfvit.report.summary import summary_table
from hfvit.utils.formatting import duration
from hfvit.utils.hub_ids import dataset_title, is_hub_id


def test_table_names_what_a_reader_looks_for():
    table = summary_table(make_facts(), "outputs/x")
    assert_names(table, "vit_base_patch16_224", "224 px", "86.0 M", "1 h 6 min", "step 900", "accuracy")
    assert table.splitlines()[0].split()[:3] == ["split", "images", "accuracy"]


def test_card_is_valid_and_complete(tmp_path):
    facts = make_facts()
    (tmp_path / "my-vit").mkdir()
    path = write_model_card(facts, tmp_path / "my-vit")
    card = ModelCard.load(path)
    assert card.data.library_name == "timm"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.datasets == "uoft-cs/cifar10"
    assert card.data.base_model == "timm/vit_base_patch16_224.augreg_in21k"
    accuracy = card.data.eval_results[0]
    assert accuracy.metric_value == round(facts["metrics"]["test"]["accuracy"], 4)
    assert accuracy.dataset_split == "test"
    assert "ore information needed" not in card.content.lower()
    for nothing in ("None", "{{", "}}", "{%"):
        assert nothing not in card.content


def temperature(facts):
    split = {"loss": 0.1, "ece": 0.0123, "calibration": facts["metrics"]["test"]["calibration"]}
    told = {"value": 1.2345, "fitted_on": "validation", "images": 2000, "reason": None}
    return {**told, "splits": {"validation": split, "test": split}}


def test_calibration_is_told_where_there_is_one():
    facts = make_facts()
    assert "temperature" not in render_card(facts, "x")
    facts["temperature"] = temperature(facts)
    before = facts["metrics"]["test"]["ece"]
    assert_names(summary_table(facts, "out"), 1.23, "validation", f"{before:.4f} -> 0.0123")
    card = render_card(facts, "x")
    assert_names(card, 1.2345)
    assert f"| test | {before:.4f} | 0.0123 |" in card
    facts["temperature"] |= {"value": None, "reason": "nothing was wrong", "splits": {}}
    assert_names(summary_table(facts, "out"), "nothing was wrong")
    assert "temperature" not in render_card(facts, "x")


def test_dark_pictures_of_a_published_card_have_the_repositorys_address():
    card = render_card(make_facts(), "x", "user/x")
    assert 'srcset="https://huggingface.co/user/x/resolve/main/plots/reliability_dark.png"' in card


def test_results_of_a_set_on_the_hub_are_there_for_its_leaderboard():
    facts = make_facts() | {"finished": "2026-01-02T03:04:05+00:00"}
    path, text = eval_results_file(facts)
    assert path == ".eval_results/uoft-cs--cifar10.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.task_id) == ("uoft-cs/cifar10", "default")
    assert entry.value == pytest.approx(100 * facts["metrics"]["test"]["accuracy"], abs=0.01)
    assert entry.date == facts["finished"]
    assert_names(entry.notes, "test", "2,000")
    assert eval_results_file(make_facts(dataset_name="digits")) is None
    assert eval_results_file(facts | {"recipe": {"max_eval_samples": 10}}) is None
    assert eval_results_file(facts | {"metrics": {"validation": facts["metrics"]["validation"]}}) is None


def test_card_names_the_license_the_commit_and_the_command(tmp_path):
    facts = make_facts()
    facts["model"] |= {"is_local": False, "base_license": "apache-2.0"}
    facts["data"] |= {"is_local": False, "dataset_commit": "c0ffee" * 6 + "abcd"}
    facts["command"] = "train.py vit_base --output_dir /home/somebody/out"
    text = write_model_card(facts, tmp_path).read_text()
    card = ModelCard(text)
    assert card.data.license == "apache-2.0"
    assert card.data.eval_results[0].dataset_revision == facts["data"]["dataset_commit"]
    assert f"--dataset_revision {facts['data']['dataset_commit']}" in text
    assert "`hfvit train vit_base --output_dir out`" in text
    pinned = facts | {"recipe": facts["recipe"] | {"dataset_revision": facts["data"]["dataset_commit"]}}
    assert "--dataset_revision" not in render_card(pinned, "x")
    for row in facts["metrics"]["test"]["per_class"]:
        assert f"| {row['label']} | {row['images']} |" in text


def test_card_lists_exports_and_how_to_use_those_that_are_there():
    parity, gate = {"max_abs_difference": 2.9e-06}, {"accuracy": 0.948, "agreement": 1.0}
    files = {"model.onnx": {"bytes": 86_283_204, "parity": parity, "gate": gate}, "model_fp16.onnx": {"bytes": 1}}
    text = render_card(make_facts(), "x", "user/x", {"onnx": files})
    assert "| `onnx/model.onnx` | 86.3 MB | 2.9e-06 | 94.80% | 100.00% |" in text
    assert "| `onnx/model_fp16.onnx` | 1 B |  |  |  |" in text
    assert 'dtype: "fp32"' in text
    assert 'hf_hub_download("user/x", "onnx/model.onnx")' in text
    assert "onnxruntime" not in render_card(make_facts(), "x", "user/x")


def test_what_a_user_wrote_into_the_card_survives_the_next_run(tmp_path):
    path = write_model_card(make_facts(), tmp_path)
    path.write_text(path.read_text().replace("## Limits", "## Thanks\n\nTo all.\n\n## Limits"))
    again = make_facts()
    again["training"]["steps"] = 4321
    text = write_model_card(again, tmp_path).read_text()
    assert "To all." in text
    assert_names(text, "4,321")
    assert text == write_model_card(again, tmp_path).read_text()


def test_card_of_a_local_set_and_checkpoint_shows_no_path(tmp_path):
    facts = make_facts(dataset_name="/home/somebody/private/photos", base_model="/home/somebody/models/x")
    text = write_model_card(facts, tmp_path).read_text()
    assert "somebody" not in text
    assert "photos" in text
    assert "datasets" not in ModelCard(text).data.to_dict()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("uoft-cs/cifar10", True), ("../images/cats", False), ("/data/x", False), ("digits", False), ("a/b/c", False)],
)
def test_what_counts_as_a_hub_id(name, expected):
    assert is_hub_id(name) is expected
    assert "/" not in dataset_title(name) or expected


def test_duration():
    assert [duration(s) for s in (5, 65, 3660)] == ["5 s", "1 min 5 s", "1 h 1 min"]


def test_tokens_are_not_in_the_recorded_command(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["/x/train.py", "r.yaml", "--hub_token", "hf_a", "--hub-token=hf_b", "--seed", "1"]
    )
    assert command_line() == "train.py r.yaml --hub_token '***' '--hub-token=***' --seed 1"
