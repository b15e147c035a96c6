"""Several runs of one recipe: seeds, folds, resuming, summary."""

import json
import shutil

import datasets
import numpy as np
import pytest
import yaml
from helpers.commands import ROOT, run_command
from helpers.images import LABELS
from helpers.messages import assert_names, option_of
from helpers.recipes import MICRO_RECIPE
from helpers.records import make_record
from helpers.runs import read_record
from pyarrow import parquet
from sklearn.model_selection import StratifiedKFold
from transformers import TrainerCallback

import hfvit
import hfvit.multirun
from hfvit.artifacts.multirun_record import MultiRunRecord
from hfvit.artifacts.run_record import RunRecord
from hfvit.cli import main as hfvit_command
from hfvit.errors import RecipeError
from hfvit.multirun import main
from hfvit.pipeline import main as train_once
from hfvit.recipe.loader import load_recipe
from hfvit.sweep import Sweep
from hfvit.verify import evaluate_again

RANDOM = "drop_path_rate: 0.2\nmixup_alpha: 0.4\nrandom_erasing: 0.2\npolicy: rand_augment\n"
COMPARED = ("loss", "grad_norm", "eval_loss", "eval_accuracy", "learning_rate")


@pytest.fixture(scope="module")
def micro(tmp_path_factory, colors):
    """Write a micro recipe with all kinds of random numbers."""
    path = tmp_path_factory.mktemp("multirun") / "micro.yaml"
    path.write_text(
        f"{MICRO_RECIPE}{RANDOM}dataset_name: {colors}\noutput_dir: {path.parent / 'out'}\nuse_cpu: true\n"
    )
    return path


@pytest.fixture(scope="module")
def trained(micro):
    """Train with seeds 0 and 1."""
    with pytest.raises(SystemExit) as ended:
        hfvit_command(["train", str(micro), "--seeds", "2"])
    assert not ended.value.code
    return micro.parent / "out"


def history(folder):
    return [[entry.get(key) for key in COMPARED] for entry in read_record(folder)["history"]]


def assert_same_run(folder, other):
    assert (folder / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert history(folder) == history(other)
    assert read_record(folder)["metrics"] == read_record(other)["metrics"]
    first, second = (yaml.safe_load((each / "recipe.yaml").read_text()) for each in (folder, other))
    assert {**first, "output_dir": ""} == {**second, "output_dir": ""}


class Nothing:
    """Stand in for the training where none must run."""

    def __call__(self, *arguments, **options):
        raise AssertionError("a finished run was trained again")


def test_run_with_second_seed_equals_a_plain_run_bit_for_bit(micro, trained, tmp_path):
    train_once([str(micro), "--seed", "1", "--output_dir", str(tmp_path / "plain")])
    assert_same_run(trained / "seed_1", tmp_path / "plain")
    assert history(trained / "seed_0") != history(trained / "seed_1")


def test_summary_has_mean_and_sample_standard_deviation(trained):
    record = json.loads((trained / "multirun.json").read_text())
    assert [run["folder"] for run in record["runs"]] == record["planned"] == ["seed_0", "seed_1"]
    assert [run["values"] for run in record["runs"]] == [{"seed": 0}, {"seed": 1}]
    for role in ("validation", "test"):
        for key in ("accuracy", "loss", "macro_f1"):
            values = [read_record(trained / name)["metrics"][role][key] for name in record["planned"]]
            assert [run["metrics"][role][key] for run in record["runs"]] == values
            spread = record["metrics"][role][key]
            assert spread["mean"] == pytest.approx(np.mean(values))
            assert spread["std"] == pytest.approx(np.std(values, ddof=1))
            assert (spread["lowest"], spread["highest"], spread["runs"]) == (min(values), max(values), 2)


def test_rerun_of_finished_runs_only_summarizes(micro, trained, monkeypatch, capsys):
    monkeypatch.setattr(hfvit.multirun, "start_run", Nothing())
    record = hfvit.train(micro, seeds=[1, 0])
    assert [run.folder for run in record.runs] == ["seed_1", "seed_0"]
    assert MultiRunRecord.load(trained).metrics == record.metrics
    printed = capsys.readouterr().out.splitlines()
    mean, std = (next(line.split() for line in printed if line.startswith(name)) for name in ("mean", "std"))
    spread = record.metrics["test"]["accuracy"]
    assert mean[-1] == f"{spread.mean:.2%}"
    assert std[-1] == f"{spread.std:.2%}"


@pytest.fixture
def copied(trained, tmp_path, monkeypatch):
    """Copy the runs with seeds 0 and 1, without multirun.json, where no run may be trained."""
    monkeypatch.setattr(hfvit.multirun, "start_run", Nothing())
    out = shutil.copytree(trained, tmp_path / "out")
    (out / "multirun.json").unlink()
    return out


def set_commit(folder, commit):
    record = read_record(folder)
    record["data"]["dataset_commit"] = record["recipe"]["dataset_revision"] = commit
    (folder / "run.json").write_text(json.dumps(record))


def test_finished_run_of_another_recipe_is_an_error(micro, copied):
    words = [str(micro), "--output_dir", str(copied), "--seeds", "2"]
    with pytest.raises(RecipeError, match=r"^output_dir: .*seed_0\b.*\bweight_decay\b"):
        main([*words, "--weight_decay", "0.3"])
    (copied / "seed_0" / "checkpoint-6").mkdir()  # of a run that was killed at its end
    main(words)
    assert not (copied / "seed_0" / "checkpoint-6").exists()


def test_finished_run_with_a_fitted_batch_is_unchanged(micro, copied):
    for name in ("seed_0", "seed_1"):
        record = read_record(copied / name)
        record["recipe"]["global_batch_size"] = 32  # for 52 training images
        (copied / name / "run.json").write_text(json.dumps(record))
    words = [str(micro), "--output_dir", str(copied), "--seeds", "2", "--global_batch_size"]
    assert len(hfvit.multirun.start(load_recipe([*words, "128"])).runs) == 2
    (copied / "multirun.json").unlink()
    with pytest.raises(RecipeError, match=r"^output_dir: .*\bglobal_batch_size\b"):
        main([*words, "16"])


def test_runs_of_different_commits_are_an_error(micro, copied):
    for name, digit in (("seed_0", "a"), ("seed_1", "b")):
        set_commit(copied / name, 40 * digit)
    with pytest.raises(RecipeError, match=r"^output_dir: .*seed_1\b.*\bdataset_revision\b"):
        main([str(micro), "--output_dir", str(copied), "--seeds", "2"])


@pytest.mark.parametrize("finished", [True, False])
def test_all_runs_read_the_commit_of_the_first_one(micro, copied, monkeypatch, finished):
    read = []

    def record_revision(recipe, *arguments, **options):
        read.append(recipe.data.dataset_revision)
        recipe.pin(recipe.data.dataset_revision or 40 * "b")
        return make_record()

    monkeypatch.setattr(hfvit.multirun, "start_run", record_revision)
    shutil.rmtree(copied / "seed_0")
    if finished:
        set_commit(copied / "seed_1", 40 * "a")
    else:
        shutil.rmtree(copied / "seed_1")
    main([str(micro), "--output_dir", str(copied), "--seeds", "3"])
    assert read == ([40 * "a"] * 2 if finished else [None, 40 * "b", 40 * "b"])


def test_summary_has_the_runs_with_a_metric():
    record = MultiRunRecord(
        hfvit_version="0", command="", repeated_by="folds", planned=["fold_0", "fold_1"], recipe={}
    )
    run = make_record()
    record.add("fold_0", {"fold": 0}, run)
    run.metrics = {"validation": run.metrics["validation"]}
    record.add("fold_1", {"fold": 1}, run)
    assert {role: scores["accuracy"].runs for role, scores in record.metrics.items()} == {"validation": 2, "test": 1}
    assert record.table().splitlines()[2].split()[-1] == "-"


def test_interrupted_runs_are_resumed_and_finished_ones_kept(micro, trained, tmp_path):
    class StopInSecondRun(TrainerCallback):
        runs = 0

        def on_train_begin(self, args, state, control, **kwargs):
            self.runs += 1

        def on_step_end(self, args, state, control, **kwargs):
            if self.runs == 2 and state.global_step == 8:
                raise KeyboardInterrupt

    words = [str(micro), "--output_dir", str(tmp_path), "--seeds", "0", "1"]
    with pytest.raises(KeyboardInterrupt):
        main(words, [StopInSecondRun()])
    partial = MultiRunRecord.load(tmp_path)
    assert (partial.planned, [run.folder for run in partial.runs]) == (["seed_0", "seed_1"], ["seed_0"])
    assert partial.finished is None
    assert partial.metrics["test"]["accuracy"].std is None
    before = (tmp_path / "seed_0" / "run.json").read_bytes()
    main(words)
    assert (tmp_path / "seed_0" / "run.json").read_bytes() == before
    assert read_record(tmp_path / "seed_1")["training"]["resumed_at_step"] == 6
    for name in ("seed_0", "seed_1"):
        weights = [(folder / name / "model.safetensors").read_bytes() for folder in (tmp_path, trained)]
        assert weights[0] == weights[1], name


def test_runs_of_another_recipe_are_not_mixed(micro, trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "out")
    words = [str(micro), "--output_dir", str(out), "--max_steps", "1"]
    with pytest.raises(RecipeError, match=r"^output_dir: .*\bmax_steps\b"):
        main([*words, "--seeds", "2"])
    main([*words, "--seeds", "4", "5", "--overwrite_output_dir", "--run_name", "name"])
    record = MultiRunRecord.load(out)
    assert record.planned == ["seed_4", "seed_5"]
    last = read_record(out / "seed_5")
    assert (last["training"]["steps"], last["recipe"]["run_name"]) == (1, "name-seed_5")


@pytest.fixture(scope="module")
def folds(micro):
    """Train two folds of a recipe."""
    out = micro.parent / "folds"
    with pytest.raises(SystemExit) as ended:
        hfvit_command(["train", str(micro), "--folds", "2", "--num_train_epochs", "4", "--output_dir", str(out)])
    assert not ended.value.code
    return out


def test_folds_are_those_of_scikit_learn_and_do_not_evaluate_the_test_split(folds, colors):
    labels = datasets.load_dataset(str(colors), split="train")["label"][:]
    expected = StratifiedKFold(2, shuffle=True, random_state=3).split(labels, labels)
    for fold, (_, held_out) in enumerate(expected):
        record = RunRecord.load(folds / f"fold_{fold}")
        assert list(record.metrics) == ["validation"]
        assert (record.recipe["folds"], record.recipe["fold"], record.recipe["test_split"]) == (2, fold, None)
        table = parquet.read_table(folds / f"fold_{fold}" / "predictions.parquet").to_pandas()
        assert table["row"].tolist() == held_out.tolist()
        assert table["label"].tolist() == [LABELS[labels[row]] for row in held_out]
        predicted = np.stack(table["probabilities"]).argmax(axis=1)
        accuracy = np.mean(predicted == np.array(labels)[held_out])
        assert record.metrics["validation"].accuracy == pytest.approx(accuracy)


def test_out_of_fold_predictions_have_each_image_once(folds):
    table = parquet.read_table(folds / "out_of_fold.parquet")
    assert table["row"].to_pylist() == list(range(65))
    assert json.loads(table.schema.metadata[b"classes"]) == LABELS
    frame = table.to_pandas()
    assert frame.groupby("fold").size().tolist() == [33, 32]
    assert np.stack(frame["probabilities"]).sum(axis=1) == pytest.approx(1.0, abs=1e-5)
    record = MultiRunRecord.load(folds)
    assert (record.repeated_by, record.planned) == ("folds", ["fold_0", "fold_1"])
    accuracies = [RunRecord.load(folds / name).metrics["validation"].accuracy for name in record.planned]
    assert record.metrics["validation"]["accuracy"].mean == pytest.approx(np.mean(accuracies))
    suspects = [line.split(",") for line in (folds / "label_errors.csv").read_text().splitlines()]
    labels = dict(zip(frame["row"], frame["label"], strict=True))
    assert all(labels[int(row)] == label != predicted for row, _, label, predicted, *_ in suspects[1:])


def test_fold_without_predictions_is_an_error(micro, folds, tmp_path, monkeypatch):
    monkeypatch.setattr(hfvit.multirun, "start_run", Nothing())
    out = shutil.copytree(folds, tmp_path / "out")
    (out / "fold_1" / "predictions.parquet").unlink()
    with pytest.raises(RecipeError, match=r"^output_dir: .*fold_1\b.*\bpredictions\.parquet\b"):
        main([str(micro), "--folds", "2", "--num_train_epochs", "4", "--output_dir", str(out)])


def test_overwriting_deletes_the_results_of_all_folds_first(micro, folds, tmp_path, monkeypatch):
    monkeypatch.setattr(hfvit.multirun, "start_run", Nothing())
    out = shutil.copytree(folds, tmp_path / "out")
    (out / "label_errors.csv").touch()
    with pytest.raises(AssertionError):
        main([str(micro), "--folds", "2", "--output_dir", str(out), "--overwrite_output_dir"])
    assert not (out / "out_of_fold.parquet").exists()
    assert not (out / "label_errors.csv").exists()


def test_single_fold_equals_its_run_among_all_folds(micro, folds, tmp_path):
    words = [str(micro), "--folds", "2", "--fold", "1", "--num_train_epochs", "4", "--test_split", "none"]
    main([*words, "--save_predictions", "true", "--test_fraction", "0.1", "--output_dir", str(tmp_path / "alone")])
    assert_same_run(folds / "fold_1", tmp_path / "alone")


def test_run_of_a_fold_is_evaluated_again_on_its_fold(folds):
    rows = evaluate_again(folds / "fold_1", device="cpu").rows
    assert [(row.split, row.images, row.again) for row in rows] == [("validation", 32, rows[0].recorded)]


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--folds", "1"], "folds"),
        (["--folds", "3", "--fold", "3"], "fold"),
        (["--folds", "3", "--seeds", "2"], "seeds, folds"),
        (["--folds", "3", "--validation_split", "test"], "validation_split"),
        (["--folds", "3", "--streaming", "true"], "streaming"),
        (["--streaming", "true", "--validation_split", "test", "--save_predictions", "true"], "save_predictions"),
        (["--folds", "3", "--test_split", "test"], "test_split"),
        (["--folds", "3", "--push_to_hub", "--hub_model_id", "a/b"], "push_to_hub"),
    ],
)
def test_folds_that_cannot_be_run_are_an_error(micro, words, option):
    with pytest.raises(RecipeError) as caught:
        load_recipe([str(micro), *words])
    assert option_of(caught.value) == option


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--seeds", "1"], "seeds"),
        (["--seeds", "3", "3"], "seeds"),
        (["--seeds", "0", "-1"], "seeds"),
        (["--seeds", "2", "--seed", "7"], "seed"),
        (["--seeds", "2", "--push_to_hub", "--hub_model_id", "a/b"], "push_to_hub"),
        (["--seeds", "2", "--resume_from_checkpoint", "out/checkpoint-1"], "resume_from_checkpoint"),
    ],
)
def test_seeds_that_cannot_be_run_are_an_error(micro, words, option):
    with pytest.raises(RecipeError) as caught:
        load_recipe([str(micro), *words])
    assert option_of(caught.value) == option


def test_other_commands_refuse_seeds(micro, tmp_path):
    words = [str(micro), "--seeds", "2", "--output_dir", str(tmp_path / "out")]
    for refusing in (lambda: train_once(words), lambda: Sweep(words, {"learning_rate": [1e-3]})):
        with pytest.raises(RecipeError, match=r"^seeds: "):
            refusing()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.integration
def test_two_processes_train_all_seeds(micro, tmp_path):
    words = ["accelerate", "launch", "--config_file", ROOT / "accelerate_configs" / "multi_cpu.yaml", "hfvit/train.py"]
    words += [micro, "--output_dir", tmp_path / "out", "--seeds", "2"]
    for _ in range(2):  # the second time, both are finished
        done = run_command(*words)
        assert done.returncode == 0, done.stderr
        assert_names(done.stdout, "seed_0", "seed_1", "mean", "std")
    record = MultiRunRecord.load(tmp_path / "out")
    assert [run.folder for run in record.runs] == ["seed_0", "seed_1"]
    for run in record.runs:
        assert read_record(tmp_path / "out" / run.folder)["training"]["processes"] == 2
