"""The complete pipeline: launched processes, output files, kills, and errors."""

import os
import re
import subprocess
import sys
from importlib import metadata

import datasets
import numpy as np
import pytest
import torch
import yaml
from helpers.commands import ROOT, run_command
from helpers.image_text import tokenizer
from helpers.images import LABELS, colored_image, colored_split
from helpers.layouts import write_images
from helpers.messages import assert_names, option_of
from helpers.recipes import MICRO_RECIPE
from helpers.records import make_record
from helpers.runs import OUTPUT_FILES, fails, files, lasting_files, read_record, step_losses
from safetensors.torch import load_file
from transformers import TrainerCallback, pipeline

from hfvit.artifacts.constants import ADAPTER_FILES
from hfvit.artifacts.run_record import RunRecord
from hfvit.errors import run
from hfvit.evaluation.split import evaluation_split
from hfvit.hub.model_card import render_card
from hfvit.pipeline import main
from hfvit.report.page import write_page
from hfvit.verify import evaluate_again


@pytest.fixture(scope="module")
def module_recipe(tmp_path_factory, colors):
    path = tmp_path_factory.mktemp("recipe") / "micro.yaml"
    path.write_text(MICRO_RECIPE + f"dataset_name: {colors}\noutput_dir: unused\n")
    return path


@pytest.fixture(scope="module")
def launched(module_recipe, tmp_path_factory):
    """Train with `accelerate launch`; returns output folder and printed text."""
    out = tmp_path_factory.mktemp("launched") / "out"
    # Default of accelerate launch.
    words = ("accelerate", "launch", "hfvit/train.py", module_recipe, "--output_dir", out, "--plots", "true")
    result = run_command(*words, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    return out, result.stdout


@pytest.mark.integration
def test_output_folder_has_exactly_these_files(launched):
    assert files(launched[0]) == OUTPUT_FILES


@pytest.mark.integration
def test_run_prints_a_summary_table(launched):
    out, printed = launched
    table = printed[printed.index("split ") :]
    metrics = read_record(out)["metrics"]
    for split in ("validation", "test"):
        low, high = metrics[split]["accuracy_interval"]
        assert_names(table, split, f"{metrics[split]['accuracy']:.2%}", f"{low:.2%}", f"{high:.2%}")
    assert_names(table, "images/s", out)


@pytest.mark.integration
def test_run_json_has_metrics_versions_and_hardware(launched):
    recorded = read_record(launched[0])
    assert recorded["metrics"]["test"]["images"] == 31
    assert recorded["metrics"]["test"]["accuracy"] > 0.8
    assert sum(recorded["metrics"]["test"]["confusion_matrix"]["counts"]) == 31
    assert recorded["data"]["labels"] == LABELS
    assert recorded["data"]["selected_by"] == "validation"
    assert recorded["data"]["splits"]["train"]["rows"] == 52
    assert recorded["training"]["steps"] == 12
    assert recorded["training"]["images_per_second"] > 0
    assert recorded["recipe"]["global_batch_size"] == 8
    assert recorded["recipe"]["learning_rate"] == 3e-3
    assert recorded["seeds"]["seed"] == 3
    assert recorded["versions"]["torch"] == metadata.version("torch")
    assert recorded["hardware"]["threads"] == len(os.sched_getaffinity(0))  # 1 by default with accelerate launch
    assert [entry["eval_accuracy"] for entry in recorded["history"] if "eval_accuracy" in entry]
    # Only the last entry of the history is of the test split.
    assert recorded["training"]["best_metric"] == recorded["metrics"]["validation"]["accuracy"]


@pytest.mark.integration
def test_trained_model_classifies_images(launched):
    classify = pipeline("image-classification", model=str(launched[0]))
    rng = np.random.default_rng(9)
    answers = [classify(colored_image(row % 3, rng))[0]["label"] for row in range(12)]
    assert sum(answer == LABELS[row % 3] for row, answer in enumerate(answers)) >= 9


@pytest.mark.integration
def test_resolved_recipe_repeats_the_run(launched, tmp_path):
    out, _ = launched
    again = tmp_path / "again"
    assert run(lambda: main([str(out / "recipe.yaml"), "--output_dir", str(again)])) == 0
    first, second = read_record(out), read_record(again)
    assert second["metrics"]["test"]["confusion_matrix"] == first["metrics"]["test"]["confusion_matrix"]
    # Not bit for bit, as this process has fewer threads.
    assert step_losses(again) == pytest.approx(step_losses(out), rel=1e-3)
    written = [yaml.safe_load((folder / "recipe.yaml").read_text()) for folder in (out, again)]
    assert {**written[0], "output_dir": str(again)} == written[1]


@pytest.mark.slow
@pytest.mark.integration
def test_two_processes_equal_a_single_process(launched, module_recipe, tmp_path):
    out = tmp_path / "out"
    config = ROOT / "accelerate_configs" / "multi_cpu.yaml"
    words = ("--config_file", config, "--main_process_port", "0", "hfvit/train.py", module_recipe)
    result = run_command("accelerate", "launch", *words, "--output_dir", out, "--plots", "true")
    assert result.returncode == 0, result.stderr
    assert files(out) == OUTPUT_FILES
    one, two = read_record(launched[0]), read_record(out)
    assert two["training"]["processes"] == 2
    assert two["training"]["per_device_batch_size"] == 4
    assert step_losses(out) == pytest.approx(step_losses(launched[0]), rel=1e-3)
    for role, images in (("validation", 13), ("test", 31)):  # odd sizes: padded by the samplers, counted once
        assert two["metrics"][role]["images"] == images
        assert two["metrics"][role]["confusion_matrix"] == one["metrics"][role]["confusion_matrix"]
        assert two["metrics"][role]["loss"] == pytest.approx(one["metrics"][role]["loss"], rel=1e-3)
    assert len(re.findall(r"^test +31 ", result.stdout, re.MULTILINE)) == 1  # the table is printed once


def test_invalid_options_fail_before_training(recipe, capsys, tmp_path):
    message = fails(capsys, recipe, "--learning_rat", "1")
    assert option_of(message) == "learning_rat"
    assert_names(message, "'--learning_rate'")
    assert option_of(fails(capsys, recipe, "--dataset_name", "./missing")) == "dataset_name"
    assert_names(fails(capsys, recipe, "--test_split", "tost"), "'tost'", "train, test", "'test'")
    message = fails(capsys, recipe, "--image_size", "20")
    assert option_of(message) == "image_size"
    assert_names(message, 20, 16, 24)
    (tmp_path / "taken").touch()
    message = fails(capsys, recipe, "--output_dir", tmp_path / "taken")
    assert option_of(message) == "output_dir"
    assert_names(message, tmp_path / "taken")
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    ("words", "option"),
    [(["--architecture", "vit_tinny"], "architecture"), (["--model_name_or_path", "resnet18"], "model_name_or_path")],
)
def test_unknown_model_is_reported_before_the_data_are_read(recipe, capsys, tmp_path, words, option):
    message = fails(capsys, recipe, *words, "--dataset_name", tmp_path / "no_data")
    assert option_of(message) == option


def test_finished_run_is_overwritten_only_with_the_option(recipe, capsys, tmp_path):
    out = tmp_path / "out"
    assert run(lambda: main([str(recipe)])) == 0
    before = (out / "run.json").read_bytes()
    message = fails(capsys, recipe)
    assert option_of(message) == "output_dir"
    assert_names(message, out, "--overwrite_output_dir")
    assert "--resume_from_checkpoint" not in message  # it is finished
    onto_itself = tmp_path / "onto_itself.yaml"
    onto_itself.write_text(recipe.read_text().replace("architecture: vit_tiny", f"model_name_or_path: {out} #"))
    assert option_of(fails(capsys, onto_itself, "--overwrite_output_dir")) == "model_name_or_path"
    assert (out / "run.json").read_bytes() == before

    tokenizer().save_pretrained(out)  # as runs with texts or LoRA
    (out / "adapter").mkdir()
    for name in (*ADAPTER_FILES, "notes.txt"):
        (out / "adapter" / name).write_text("{}")
    card = out / "README.md"
    card.write_text(card.read_text() + "\n## My notes\n\nKept.\n")
    assert (
        run(lambda: main([str(recipe), "--overwrite_output_dir", "--num_train_epochs", "1", "--plots", "true"])) == 0
    )
    assert read_record(out)["training"]["steps"] == 6
    assert lasting_files(out) == OUTPUT_FILES | {"adapter/notes.txt"}
    assert "Kept." in card.read_text()
    assert "overwrite_output_dir" not in yaml.safe_load((out / "recipe.yaml").read_text())


def test_train_from_checkpoint_with_other_size_and_classes(recipe, tmp_path):
    assert run(lambda: main([str(recipe), "--num_train_epochs", "1", "--keep_checkpoints"])) == 0
    assert (tmp_path / "out" / "checkpoint-6" / "optimizer.pt").exists()
    four = tmp_path / "four"
    split = colored_split(40, 5).cast_column("label", datasets.Value("int64"))
    split = split.map(lambda row, i: {"label": i % 4}, with_indices=True)
    for name in ("train", "test"):
        split.to_parquet(four / "data" / f"{name}-00000-of-00001.parquet")
    tuned = tmp_path / "tuned.yaml"
    values = yaml.safe_load(recipe.read_text())
    values.pop("architecture"), values.pop("model_args")
    values |= {"model_name_or_path": str(tmp_path / "out"), "image_size": 32, "freeze": 1, "layer_decay": 0.7}
    values |= {"dataset_name": str(four), "output_dir": str(tmp_path / "tuned"), "num_train_epochs": 1}
    tuned.write_text(yaml.safe_dump(values))
    assert run(lambda: main([str(tuned)])) == 0
    recorded = read_record(tmp_path / "tuned")
    assert recorded["model"]["image_size"] == [32, 32]
    assert recorded["model"]["trained_parameters"] < recorded["model"]["parameters"]
    before = load_file(tmp_path / "out" / "model.safetensors")
    after = load_file(tmp_path / "tuned" / "model.safetensors")
    assert torch.equal(before["blocks.0.attn.qkv.weight"], after["blocks.0.attn.qkv.weight"])
    assert not torch.equal(before["blocks.1.attn.qkv.weight"], after["blocks.1.attn.qkv.weight"])
    assert after["head.weight"].shape == (4, 32)


def test_run_killed_after_its_last_step_is_only_evaluated(recipe, tmp_path, monkeypatch):
    """End the schedule within an epoch, and fail between training and evaluation."""

    def dies(*_, **__):
        raise RuntimeError("a power cut")

    words = [str(recipe), "--max_steps", "4", "--keep_checkpoints"]
    with monkeypatch.context() as patch:
        patch.setattr("hfvit.finetuning.factory.HFViTTrainer.predict", dies)
        with pytest.raises(RuntimeError, match="power cut"):
            main(words)
    before = load_file(tmp_path / "out" / "checkpoint-4" / "model.safetensors")
    assert run(lambda: main([*words, "--resume_from_checkpoint", "auto"])) == 0
    assert read_record(tmp_path / "out")["training"]["steps"] == 4
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-4"]


def test_corrupt_image_in_a_worker_is_one_error(recipe, capsys, tmp_path):
    folder = tmp_path / "broken"
    for split in ("train", "test"):
        for row in range(20):
            path = folder / split / LABELS[row % 3] / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            colored_image(row % 3, np.random.default_rng(row)).save(path)
    (folder / "train" / "red" / "3.png").write_bytes(b"not an image")
    message = fails(capsys, recipe, "--dataset_name", folder, "--dataloader_num_workers", "1")
    assert_names(message, "'train'", folder / "train" / "red" / "3.png", "UnidentifiedImageError")


def test_run_without_test_split_is_reported(recipe, tmp_path, capsys):
    assert run(lambda: main([str(recipe), "--max_steps", "2", "--test_split", "none"])) == 0
    out = tmp_path / "out"
    assert list(read_record(out)["metrics"]) == ["validation"]
    assert read_record(out)["recipe"]["test_split"] is None
    selected = re.search(r"^selected +(.*)$", capsys.readouterr().out, re.MULTILINE)[1]
    assert_names(selected, "no test split", "optimistic")
    card = (out / "README.md").read_text()
    assert "| validation |" in card
    assert "| test |" not in card
    page = write_page(RunRecord.load(out), out, {}).read_text()
    for text in (card, page):
        assert_names(text, "no test split", "optimistic")


def test_train_on_class_folders_evaluates_held_out_test_images(recipe, tmp_path):
    folder = write_images(tmp_path / "photos", dict.fromkeys(LABELS, 20))
    (folder / "red" / ".DS_Store").write_bytes(b"x")
    words = ["--dataset_name", folder, "--num_train_epochs", "1"]
    assert run(lambda: main([str(word) for word in (recipe, *words)])) == 0
    out = tmp_path / "out"
    data = read_record(out)["data"]
    assert {role: split["rows"] for role, split in data["splits"].items()} == {
        "train": 42,
        "validation": 12,
        "test": 6,
    }
    assert data["splits"]["test"]["held_out"] == 0.1
    assert data["left_out"] == {"hidden or system file": 1}
    split = evaluation_split(out, split="test")
    assert len(split) == 6
    again = {row.split: row.again for row in evaluate_again(out).rows}
    assert again == {role: metrics["accuracy"] for role, metrics in read_record(out)["metrics"].items()}


def test_train_with_fewer_images_than_a_batch_reduces_batch_and_steps(recipe, tmp_path):
    folder = write_images(tmp_path / "photos", {f"train/{label}": 10 for label in LABELS})
    words = ["--dataset_name", folder, "--global_batch_size", "64", "--eval_strategy", "steps", "--eval_steps", "371"]
    words += ["--logging_steps", "25", "--num_train_epochs", "2"]
    assert run(lambda: main([str(word) for word in (recipe, *words)])) == 0
    record = read_record(tmp_path / "out")
    assert {key: record["recipe"][key] for key in ("global_batch_size", "eval_steps", "logging_steps")} == {
        "global_batch_size": 16, "eval_steps": 1, "logging_steps": 1,
    }  # fmt: skip
    assert record["training"]["steps"] == 2
    assert sum("eval_loss" in entry for entry in record["history"]) == 2
    assert list(record["metrics"]) == ["validation"]
    assert "no test split" in (tmp_path / "out" / "README.md").read_text()


def test_report_to_tensorboard_writes_events(recipe, tmp_path):
    pytest.importorskip("tensorboard", reason="install hfvit[tensorboard]")
    assert run(lambda: main([str(recipe), "--max_steps", "2", "--report_to", "tensorboard"])) == 0
    assert list((tmp_path / "out").rglob("events.out.tfevents.*"))


def test_training_images_are_drawn_once_after_the_first_step(recipe, tmp_path):
    image = tmp_path / "out" / "plots" / "training_images.png"
    times = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            times.append(image.stat().st_mtime_ns if image.exists() else None)

    main([str(recipe), "--max_steps", "3", "--plots", "true"], callbacks=[Watch()])
    first, second, third = times
    assert first is None
    assert second == third == image.stat().st_mtime_ns


def test_training_starts_without_importing_the_plots_and_scikit_learn():
    code = "import sys, hfvit.pipeline; print(*{'matplotlib', 'sklearn'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert loaded.split() == []


def test_failed_report_keeps_model_and_checkpoints(recipe, tmp_path, monkeypatch, capsys):
    """Fill the disk at the end."""

    def no_space(*_):
        raise OSError(28, "No space left on device", "plots/reliability.png")

    monkeypatch.setattr("hfvit.report.plots.write_plots", no_space)
    message = fails(capsys, recipe, "--max_steps", "2", "--plots", "true", code=7)
    assert_names(message, "No space left on device", "plots/reliability.png")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert read_record(tmp_path / "out")["training"]["steps"] == 2
    assert list((tmp_path / "out").glob("checkpoint-*"))


def test_evaluation_with_nan_logits_is_one_error(recipe, tmp_path, capsys):
    class Damage(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.timm_model.get_classifier().bias[0] = torch.nan

    assert run(lambda: main([str(recipe), "--max_steps", "2"], [Damage()])) == 3
    error = capsys.readouterr().err
    assert "hfvit: error: validation: " in error
    assert "Traceback" not in error
    assert list((tmp_path / "out").glob("checkpoint-*"))


def test_run_json_is_written_atomically(tmp_path):
    record = make_record()
    record.save(tmp_path)
    held = (tmp_path / "run.json").read_bytes()
    record.training.seconds = float("nan")
    with pytest.raises(ValueError, match=r"\bJSON\b"):
        record.save(tmp_path)
    assert (tmp_path / "run.json").read_bytes() == held
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_invalid_option_keeps_the_old_run(recipe, capsys, tmp_path):
    assert run(lambda: main([str(recipe), "--max_steps", "2", "--keep_checkpoints"])) == 0
    before = files(tmp_path / "out")
    assert option_of(fails(capsys, recipe, "--overwrite_output_dir", "--dataset_name", "./typo")) == "dataset_name"
    assert files(tmp_path / "out") == before


def test_run_without_selection_is_reported(recipe, tmp_path):
    assert run(lambda: main([str(recipe), "--load_best_model_at_end", "false"])) == 0
    record = RunRecord.load(tmp_path / "out")
    assert record.data.selected_by is None
    assert record.training.best_step is None
    card = render_card(record, "x")
    record.data.selected_by = "validation"
    assert render_card(record, "x") != card  # the model card distinguishes them
