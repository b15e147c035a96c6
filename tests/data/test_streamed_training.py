"""Training on a stream: result, resume, and options that are not supported."""

import logging
import shutil
from pathlib import Path

import datasets
import pytest
import yaml
from helpers.commands import ROOT, run_command
from helpers.images import colored_split
from helpers.killing import launched_until_a_checkpoint
from helpers.messages import assert_logged, assert_names, option_of
from helpers.recipes import MICRO_RECIPE
from helpers.runs import OUTPUT_FILES, assert_same_run, fails, lasting_files, read_record
from helpers.shards import ROWS, with_card, write_shards
from sklearn.metrics import accuracy_score
from transformers import TrainerCallback

import hfvit
from hfvit.artifacts.checkpoint import newest_checkpoint
from hfvit.errors import run
from hfvit.pipeline import load_data, main
from hfvit.recipe.loader import load_recipe


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def stream_recipe(tmp_path_factory, sharded):
    path = tmp_path_factory.mktemp("recipe") / "micro.yaml"
    values = yaml.safe_load(MICRO_RECIPE)
    del values["validation_fraction"], values["num_train_epochs"]
    values |= {"dataset_name": str(sharded), "streaming": True, "validation_split": "validation"}
    values |= {"max_steps": 18, "eval_strategy": "steps", "eval_steps": 9, "shuffle_buffer_size": 20}
    path.write_text(yaml.safe_dump(values))
    return path


def test_training_on_a_stream(stream_recipe, tmp_path, caplog):
    out = tmp_path / "out"
    words = [str(stream_recipe), "--output_dir", str(out), "--mixup_alpha", "0.2", "--policy", "trivial_augment"]
    words += ["--plots", "true"]
    with caplog.at_level(logging.INFO, "hfvit"):
        assert run(lambda: main([*words, "--max_steps", "45", "--dataloader_num_workers", "9"])) == 0
    assert_logged(caplog, "INFO", "train", 20, 4)
    assert_logged(caplog, "INFO", "train", 4, 9, logger="hfvit.data")
    assert lasting_files(out) == OUTPUT_FILES
    recorded = read_record(out)
    assert recorded["metrics"]["test"]["images"] == 31
    assert recorded["metrics"]["validation"]["images"] == 13
    assert recorded["metrics"]["test"]["accuracy"] > 0.8
    assert_metrics_of_saved_model(out, recorded)
    assert max(example["row"] for example in recorded["examples"]["explanations"]) < 31
    assert recorded["training"]["steps"] == 45
    assert recorded["training"]["epochs"] is None
    assert recorded["data"]["splits"]["train"]["rows"] is None
    assert yaml.safe_load((out / "recipe.yaml").read_text())["streaming"] is True


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_resumed_run_equals_uninterrupted_run(stream_recipe, tmp_path, workers, monkeypatch):
    words = [str(stream_recipe), "--dataloader_num_workers", str(workers), "--random_erasing", "0.5", "--eval_steps"]
    words += ["5", "--per_device_train_batch_size", "4", "--save_total_limit", "9"]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert run(lambda: main([*words, "--output_dir", str(unbroken)])) == 0

    def dies(*_, **__):
        raise RuntimeError("a power cut")

    with monkeypatch.context() as patch:
        patch.setattr("hfvit.finetuning.factory.HFViTTrainer.predict", dies)
        with pytest.raises(RuntimeError, match="power cut"):
            main([*words, "--output_dir", str(broken)])
    for checkpoint in broken.glob("checkpoint-*"):
        if checkpoint.name not in ("checkpoint-5", "checkpoint-10"):  # an older one may be the best
            shutil.rmtree(checkpoint)
    assert Path(newest_checkpoint(broken)).name == "checkpoint-10"
    words += ["--output_dir", str(broken), "--resume_from_checkpoint", "auto"]
    assert run(lambda: main(words)) == 0
    assert_same_run(broken, unbroken)


def test_resume_with_another_buffer_and_batch_trains_on(stream_recipe, tmp_path, caplog):
    words = [str(stream_recipe), "--output_dir", str(tmp_path / "out"), "--max_steps"]
    with pytest.raises(KeyboardInterrupt):
        main([*words, "8", "--eval_steps", "4"], [StopAfter(6)])
    changed = ["--shuffle_buffer_size", "7", "--per_device_train_batch_size", "4", "--resume_from_checkpoint", "auto"]
    assert run(lambda: main([*words, "8", "--eval_steps", "4", *changed])) == 0
    assert_logged(caplog, "WARNING", 20, 7, 8, 4)
    assert read_record(tmp_path / "out")["training"]["resumed_at_step"] == 4


def test_stream_of_known_length_has_epochs(sharded, stream_recipe, tmp_path):
    folder, out = tmp_path / "counted", tmp_path / "out"
    shutil.copytree(sharded, folder)
    with_card(folder, sum(ROWS))
    words = [str(stream_recipe), "--dataset_name", str(folder), "--output_dir", str(out)]
    words += ["--max_steps", "-1", "--num_train_epochs", "2", "--eval_strategy", "epoch"]
    assert run(lambda: main([*words, "--mixup_alpha", "0.2", "--mix_off_epochs", "1"])) == 0
    recorded = read_record(out)
    assert recorded["training"]["epochs"] == 2.0
    assert recorded["training"]["steps"] == 18
    assert recorded["data"]["splits"]["train"]["rows"] == 72
    assert [entry["epoch"] for entry in recorded["history"] if "eval_accuracy" in entry] == [1.0, 2.0]


def test_mix_off_epochs_longer_than_the_run_are_reported(stream_recipe, sharded, tmp_path, caplog):
    shutil.copytree(sharded, tmp_path / "set")
    with_card(tmp_path / "set", sum(ROWS))
    words = [str(stream_recipe), "--dataset_name", str(tmp_path / "set"), "--output_dir", str(tmp_path / "out")]
    load_data(load_recipe([*words, "--mix_off_epochs", "1.5"]))
    assert "mix_off_epochs:" not in caplog.text
    load_data(load_recipe([*words, "--mix_off_epochs", "2"]))
    assert_logged(caplog, "WARNING", "mix_off_epochs", 2)


# Mistakes


def test_unsupported_options_raise_before_anything_is_read(stream_recipe, capsys, tmp_path, monkeypatch):
    def reads(*_, **__):
        raise AssertionError("a split was read")

    monkeypatch.setattr("hfvit.data.stream_splits._written", reads)
    monkeypatch.setattr("hfvit.data.stream_splits._drop_unlabeled", reads)
    words = [stream_recipe, "--output_dir", tmp_path / "out"]
    assert option_of(fails(capsys, *words, "--max_steps", "-1")) == "max_steps"
    assert option_of(fails(capsys, *words, "--eval_strategy", "epoch")) == "eval_strategy"
    by_epoch = [*words, "--save_strategy", "epoch", "--load_best_model_at_end", "false"]
    assert option_of(fails(capsys, *by_epoch)) == "save_strategy"
    assert_names(fails(capsys, *words, "--test_split", "tost"), "'tost'", "train, validation, test")
    assert option_of(fails(capsys, *words, "--dataset_name", "./missing")) == "dataset_name"
    assert option_of(fails(capsys, *words, "--dataset_name", "digits")) == "streaming"
    message = fails(capsys, *words, "--train_split", "train[:100]")
    assert option_of(message) == "train_split"
    assert_names(message, "'train[:100]'", "max_train_samples")
    message = fails(capsys, *words, "--test_split", "test[:100]")
    assert option_of(message) == "test_split"
    assert_names(message, "'test[:100]'", "max_eval_samples")
    assert option_of(fails(capsys, *words, "--validation_split", "train")) == "validation_split"
    unsplit = tmp_path / "unsplit.yaml"
    unsplit.write_text(stream_recipe.read_text().replace("validation_split: validation\n", ""))
    message = fails(capsys, unsplit, *words[1:])
    assert option_of(message) == "streaming"
    assert_names(message, "validation_split")


def test_mix_off_epochs_without_a_length_raises(stream_recipe, capsys, tmp_path):
    words = [stream_recipe, "--output_dir", tmp_path / "out", "--mixup_alpha", "0.2", "--mix_off_epochs", "1"]
    assert option_of(fails(capsys, *words)) == "mix_off_epochs"


def test_corrupt_image_in_the_stream_names_the_row(stream_recipe, tmp_path, capsys):
    split = colored_split(sum(ROWS), 1).cast_column("img", datasets.Image(decode=False))
    broken = {"bytes": b"not a picture", "path": "forty.png"}
    split = split.map(lambda row, i: {"img": broken if i == 40 else row["img"]}, with_indices=True)
    write_shards(tmp_path / "set", split)
    words = ["--output_dir", tmp_path / "out", "--dataset_name", tmp_path / "set", "--dataloader_num_workers", "2"]
    message = fails(capsys, stream_recipe, *words)
    assert_names(message, "'train'", 0, "forty.png")


# Processes


def assert_metrics_of_saved_model(out, recorded):
    """Compare the recorded test metrics with predictions of the saved model for all images."""
    split = colored_split(31, 2)
    predicted = hfvit.load_classifier(out).logits(list(split["img"])).argmax(axis=1)
    assert recorded["data"]["splits"]["test"]["rows"] == recorded["metrics"]["test"]["images"] == 31
    assert recorded["metrics"]["test"]["accuracy"] == pytest.approx(accuracy_score(split["label"], predicted))


@pytest.mark.integration
@pytest.mark.slow
def test_two_processes_train_and_resume_on_one_stream(stream_recipe, tmp_path):
    options = ["--max_steps", "16", "--eval_steps", "4", "--dataloader_num_workers", "1"]
    config = ROOT / "accelerate_configs" / "multi_cpu.yaml"

    def words(out):
        launch = ["accelerate", "launch", "--config_file", str(config), "--main_process_port", "0"]
        return [*launch, "hfvit/train.py", str(stream_recipe), "--output_dir", str(out), *options]

    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    result = run_command(*words(unbroken))
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stderr.splitlines() if "train: " in line)
    assert_names(line, 20, 4, 2)
    recorded = read_record(unbroken)
    assert recorded["training"]["processes"] == 2
    assert recorded["training"]["steps"] == 16
    assert recorded["metrics"]["test"]["images"] == 31
    assert recorded["metrics"]["test"]["accuracy"] > 0.8
    assert_metrics_of_saved_model(unbroken, recorded)
    with launched_until_a_checkpoint(words(broken), broken):
        pass
    resumed = run_command(*words(broken), "--resume_from_checkpoint", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(broken, unbroken)
