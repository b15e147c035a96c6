"""`hfvit sweep`: search spaces, resuming after a kill, and the best recipe."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from helpers.commands import ROOT
from helpers.messages import assert_names, option_of
from transformers import TrainerCallback

import hfvit.sweep
from hfvit.cli import main
from hfvit.errors import OutOfMemoryError, RecipeError
from hfvit.pipeline import main as train
from hfvit.recipe.loader import load_recipe
from hfvit.sweep import Sweep, read_space

SPACE = "learning_rate: {log: [1e-3, 1e-2]}\nlayer_decay: [0.8, 1.0]\nglobal_batch_size: {range: [8, 9]}\n"


@pytest.fixture
def space(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(SPACE)
    return path


def test_sweep_resumes_after_a_kill_and_writes_the_best_recipe(recipe, space, tmp_path, monkeypatch, capsys):
    real, calls = hfvit.sweep.train, []

    def killed_in_the_second(argv, callbacks):
        calls.append(argv)
        real(argv, callbacks)
        if len(calls) == 2:
            raise KeyboardInterrupt

    argv = ["sweep", str(recipe), str(space), "--trials", "2", "--num_train_epochs", "1"]
    monkeypatch.setattr(hfvit.sweep, "train", killed_in_the_second)
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 130
    (tmp_path / "out" / "trial-001" / "run.json").unlink()  # as if the run had not finished
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert len(calls) == 3
    assert calls[1] == calls[2]  # the same trial, in the same folder

    out = tmp_path / "out"
    runs = {path.parent.name: json.loads(path.read_text()) for path in out.glob("trial-*/run.json")}
    scores = {name: record["metrics"]["validation"]["accuracy"] for name, record in runs.items()}
    assert len(runs) == 2
    assert all("test" not in record["metrics"] for record in runs.values())
    best = load_recipe([str(out / "best.yaml")])
    winners = [record["recipe"] for name, record in runs.items() if scores[name] == max(scores.values())]
    assert best.values["learning_rate"] in [values["learning_rate"] for values in winners]
    assert best.data.test_split == "test"
    assert 1e-3 <= best.training.learning_rate <= 1e-2
    assert str(out / "best.yaml") in printed
    for name, score in scores.items():
        assert any(line.startswith(name) and f"{score:.4f}" in line for line in printed.splitlines())
    with pytest.raises(RecipeError, match=r"^output_dir: .*\bspace\b") as caught:
        Sweep([str(recipe), "--num_train_epochs", "1"], {"layer_decay": [0.9]})
    assert_names(caught.value, out)


class AfterTwoSteps(TrainerCallback):
    def __init__(self, happens):
        self.happens = happens

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.happens()


def test_sweep_after_a_signal_names_the_command(recipe, space, monkeypatch, capsys):
    real = hfvit.sweep.train

    def watched(argv, callbacks):
        real(argv, [AfterTwoSteps(lambda: os.kill(os.getpid(), signal.SIGTERM))])

    monkeypatch.setattr(hfvit.sweep, "train", watched)
    with pytest.raises(SystemExit) as ended:
        main(["sweep", str(recipe), str(space), "--trials", "1"])
    assert ended.value.code == 75
    captured = capsys.readouterr().err.splitlines()[-1]
    assert captured.startswith("hfvit: stopped: ")
    assert_names(captured, "SIGTERM", recipe.parent / "out" / "trial-000" / "checkpoint-2", "hfvit sweep")


def test_second_sweep_takes_other_trials_of_the_study(recipe, monkeypatch):
    argv, space = [str(recipe), "--max_steps", "1"], {"learning_rate": {"log": [1e-4, 1e-2]}}
    real, tables = hfvit.sweep.train, []

    def beside(argv_of_trial, callbacks):
        if not tables:
            tables.append(None)  # the second sweep runs while the first one trains
            tables.append(Sweep(argv, space).run(2))
        real(argv_of_trial, callbacks)

    monkeypatch.setattr(hfvit.sweep, "train", beside)
    first = Sweep(argv, space)
    table = first.run(2)
    assert [trial.state.name for trial in first.study.trials] == ["COMPLETE"] * 2
    assert len({trial.params["learning_rate"] for trial in first.study.trials}) == 2
    assert "trial-000" in table
    assert "trial-000" not in tables[1]  # it was running


@pytest.mark.slow
@pytest.mark.integration
def test_two_processes_lose_and_repeat_no_trial_when_one_is_killed(recipe, space, tmp_path):
    code = "import sys; from hfvit.cli import main; main(sys.argv[1:])"
    words = [sys.executable, "-c", code, "sweep", recipe, space, "--trials", "6", "--num_train_epochs", "2"]
    out = tmp_path / "out"
    processes = [subprocess.Popen([str(word) for word in words], cwd=ROOT) for _ in range(2)]
    try:
        while len(list(out.glob("trial-*/run.json"))) < 2:
            assert processes[0].poll() is None
            time.sleep(0.1)
        processes[0].kill()
        assert processes[1].wait(240) == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
    records = [json.loads(file.read_text())["recipe"] for file in out.glob("trial-*/run.json")]
    assert len(records) == 6
    assert len({record["learning_rate"] for record in records}) == 6
    assert (out / "best.yaml").exists()


def test_sweep_on_full_disk_names_the_command(recipe, space, monkeypatch, capsys, caplog):
    before, real = resource.getrlimit(resource.RLIMIT_FSIZE), hfvit.sweep.train

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))

    monkeypatch.setattr(hfvit.sweep, "train", lambda argv, callbacks: real(argv, [AfterTwoSteps(full)]))
    optuna.logging.enable_propagation()  # to caplog
    try:
        with pytest.raises(SystemExit) as ended:
            main(["sweep", str(recipe), str(space), "--trials", "1"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        optuna.logging.disable_propagation()
    assert ended.value.code == 7
    captured = capsys.readouterr().err
    assert_names(captured.splitlines()[-1], recipe.parent / "out" / "trial-000" / "checkpoint-5", "hfvit sweep")
    assert "Traceback" not in caplog.text


def test_sweep_prunes_a_bad_trial(recipe):
    space = {"learning_rate": [1e-9, 1e-3]}
    search = Sweep([str(recipe)], space, prune=True)
    kinds = {"learning_rate": optuna.distributions.CategoricalDistribution([1e-9, 1e-3])}
    for _ in range(5):  # minimum number of trials for the pruner
        good = {"value": 1.0, "intermediate_values": {6: 1.0, 12: 1.0}}
        search.study.add_trial(optuna.create_trial(params={"learning_rate": 1e-3}, distributions=kinds, **good))
    search.study.enqueue_trial({"learning_rate": 1e-9})
    assert "pruned" in search.run(6)
    trial = search.study.trials[-1]
    assert trial.state.name == "PRUNED"
    assert list(trial.intermediate_values) == [6]  # after the first of two epochs


def test_sweep_counts_a_failed_trial(recipe):
    search = Sweep([str(recipe), "--max_grad_norm", "0"], {"learning_rate": [1e-3, 1e30]})
    search.study.enqueue_trial({"learning_rate": 1e30})
    search.study.enqueue_trial({"learning_rate": 1e-3})
    table = search.run(2)
    assert {trial.state.name for trial in search.ended()} == {"COMPLETE", "FAIL"}
    assert table.splitlines()[1].startswith("trial-001")
    assert "fail" in table.splitlines()[2]


def test_sweep_passes_quiet_and_json_log_on_to_the_trials(recipe, tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    options = ["--max_steps", "1", "--quiet", "true", "--json_log", str(log)]
    Sweep([str(recipe), *options], {"learning_rate": [1e-3, 1e-2]}).run(2)
    assert not capsys.readouterr().out
    records = list(map(json.loads, log.read_text().splitlines()))
    folders = {str(tmp_path / "out" / f"trial-00{number}") for number in range(2)}
    assert {record["output_dir"] for record in records if "output_dir" in record} == folders


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("overwrite_output_dir", ["true"]),
        ("resume_from_checkpoint", ["checkpoint-5"]),
        ("push_to_hub", ["true", "--hub_model_id", "user/name"]),
    ],
)
def test_sweep_with_an_option_that_it_does_not_have_raises(recipe, option, words):
    with pytest.raises(RecipeError, match=rf"^{option}: "):
        Sweep([str(recipe), f"--{option}", *words], {"learning_rate": [1e-3, 1e-2]})


def test_sweep_counts_a_trial_out_of_memory(recipe, monkeypatch):
    def too_large(argv, callbacks):
        if "trial-000" in argv[0]:
            raise OutOfMemoryError("1 image does not fit.")
        return train(argv, callbacks)

    monkeypatch.setattr(hfvit.sweep, "train", too_large)
    search = Sweep([str(recipe), "--max_steps", "1"], {"learning_rate": [1e-3, 1e-2]})
    assert "fail" in search.run(2).splitlines()[2]


@pytest.mark.parametrize(
    ("text", "option", "data"),
    [
        ("", None, ["range", "log"]),
        ("learning_rate: 1.0e-3", "learning_rate", [0.001]),
        ("learning_rate: {log: [0, 1]}", "learning_rate", ["log", "[0, 1]"]),
        ("learning_rate: {range: [fast, faster]}", "learning_rate", ["['fast', 'faster']"]),
        ("test_split: [test]", "test_split", []),
        ("metric_for_best_model: [accuracy, loss]", "metric_for_best_model", ["['accuracy', 'loss']"]),
        ("greater_is_better: [true, false]", "greater_is_better", []),
        ("validation_fraction: {range: [0.1, 0.3]}", "validation_fraction", [0.1, 0.3]),
        ("dataset_name: [a, b]", "dataset_name", ["['a', 'b']"]),
        ("folds: [2, 3]", "folds", [2, 3]),
    ],
)
def test_read_space_of_invalid_space_names_file_and_key(tmp_path, text, option, data):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_space(path)
    assert option_of(caught.value) == option
    assert_names(caught.value, path, *data)


@pytest.mark.parametrize(
    ("space", "options"),
    [
        ({"seed": [1, 2]}, []),
        ({"seed": [1, 2]}, ["--validation_split", "test", "--max_eval_samples", "5"]),
        ({"train_split": ["train", "train[:20]"]}, []),
    ],
)
def test_sweep_over_the_validation_images_raises(recipe, space, options):
    with pytest.raises(RecipeError, match=rf"^{next(iter(space))}: "):
        Sweep([str(recipe), *options], space)


def test_sweep_with_a_validation_split_searches_seed_and_train_split(recipe):
    Sweep([str(recipe), "--validation_split", "test"], {"seed": [1, 2], "train_split": ["train", "train[:20]"]})


def test_sweep_with_value_that_the_recipe_rejects_raises(recipe):
    with pytest.raises(RecipeError, match=r"\blearning_rat: .*'learning_rate'"):
        Sweep([str(recipe)], {"learning_rat": [1e-3]})
    with pytest.raises(RecipeError, match=r"\blayer_decay: .*\b2\.0\b"):
        Sweep([str(recipe)], {"layer_decay": {"range": [0.5, 2.0]}})
    with pytest.raises(RecipeError, match=r"\boptim: .*'nonsense'"):
        Sweep([str(recipe)], {"optim": ["sgd", "nonsense", "adamw_torch"], "layer_decay": {"range": [0.5, 1.0]}})


def test_sweep_in_an_unusable_folder_raises(recipe, tmp_path):
    space = {"learning_rate": [0.1, 0.2]}
    (tmp_path / "file").write_text("")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "sweep.journal").write_text("no study\n{}\n")
    for name in ("file", "damaged"):
        with pytest.raises(RecipeError, match=r"^output_dir: ") as caught:
            Sweep([str(recipe), "--output_dir", str(tmp_path / name)], space)
        assert_names(caught.value, tmp_path / name)


def test_new_sweep_beside_trials_of_another_one_raises(recipe, tmp_path):
    (tmp_path / "out" / "trial-000").mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(RecipeError, match=r"^output_dir: .*\btrial-000\b"):
            Sweep([str(recipe)], {"learning_rate": [0.1, 0.2]})


def test_new_sweep_while_another_worker_begins_the_first_trial_joins_it(recipe, tmp_path, monkeypatch):
    space = {"learning_rate": [0.1, 0.2]}
    worker = Sweep([str(recipe)], space)
    real = Path.glob

    def glob(folder, pattern):
        if pattern == "trial-*":
            worker.study.ask()
            (tmp_path / "out" / "trial-000").mkdir()
        return real(folder, pattern)

    monkeypatch.setattr(Path, "glob", glob)
    assert len(Sweep([str(recipe)], space).study.trials) == 1


def test_sweep_space_of_the_docs_loads(tmp_path):
    text = (ROOT / "docs" / "fine_tuning.md").read_text().split("```yaml\n# space.yaml\n")[1].split("```")[0]
    (tmp_path / "space.yaml").write_text(text)
    shown = read_space(tmp_path / "space.yaml")
    assert Sweep(["quickstart", "--output_dir", str(tmp_path / "out")], shown).ended() == []
