"""Runs of version 0.1 in all commands."""

import json

import pytest
from helpers.recipes import MICRO_RECIPE
from helpers.records import VERSION_0_1
from helpers.runs import PUSHED

from hfvit.artifacts.run_record import RunRecord
from hfvit.cli import main as hfvit_command
from hfvit.hub.model_card import END
from hfvit.pipeline import main as train


@pytest.fixture(scope="module")
def trained(tmp_path_factory, colors):
    """Repeat the run of version 0.1, with its old record."""
    folder = tmp_path_factory.mktemp("version_0_1")
    (folder / "micro.yaml").write_text(MICRO_RECIPE)
    words = ["--dataset_name", str(colors), "--use_cpu", "true", "--max_steps", "3", "--eval_strategy", "steps"]
    train([str(folder / "micro.yaml"), *words, "--eval_steps", "3", "--output_dir", str(folder / "run")])
    text = (VERSION_0_1 / "run.json").read_text()
    (folder / "run" / "run.json").write_text(text.replace("/home/somebody/colors", str(colors)))
    card = (VERSION_0_1 / "README.md").read_text()
    (folder / "run" / "README.md").write_text(card.replace("## Limits\n", "## Limits\n\nMy own words.\n"))
    return folder / "run"


def command(capsys, *words) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        hfvit_command([str(word) for word in words])
    printed = capsys.readouterr()
    return stop.value.code or 0, printed.out, printed.err


def test_report_of_version_0_1_run(trained, capsys):
    code, printed, error = command(capsys, "report", trained, "--html")
    assert (code, error) == (0, "")
    assert "calibrated temperature 0.21" in printed
    page = (trained / "report.html").read_text()
    assert "run patch_size=4<" in page
    assert "Last validation: passed" in page
    assert (trained / "plots" / "mistakes.png").is_file()
    card = (trained / "README.md").read_text()
    assert card.count("My own words.") == 1
    assert card.index(END) < card.index("My own words.")


def test_push_of_version_0_1_run_lists_its_files(trained, capsys):
    code, printed, _ = command(capsys, "push", trained, "user/x", "--dry-run")
    assert code == 0
    assert {line.split()[0] for line in printed.splitlines()[:-1]} == PUSHED


def test_verify_of_version_0_1_run(trained, capsys):
    code, printed, _ = command(capsys, "verify", trained, "--eval-only", "--device", "cpu", "--allow-outside-paths")
    assert code == 0
    assert printed.count(" inside") == 2


def test_validate_of_version_0_1_run_records_the_gate(trained, capsys):
    before = json.loads((trained / "run.json").read_text())
    assert "schema_version" not in before
    code, _, error = command(capsys, "validate", trained, "--merge_tokens", 1, "--max_accuracy_drop", 100)
    assert (code, error) == (0, "")
    gate = RunRecord.load(trained).gate
    assert [(row.artifact, row.merge_tokens) for row in gate.artifacts] == [("run", None), ("run", 1)]
    after = json.loads((trained / "run.json").read_text())
    expected = RunRecord.from_json(before).to_json()  # in the layout of this version
    assert {key: value for key, value in after.items() if key != "gate"} == {
        key: value for key, value in expected.items() if key != "gate"
    }
