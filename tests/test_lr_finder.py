"""`hfvit train --find_lr`: files, suggestions, and what it leaves alone."""

import json

import pytest
from helpers.images import LABELS
from helpers.messages import assert_names
from helpers.models import build_model
from helpers.recipes import ARCHITECTURE, MICRO
from helpers.runs import files
from PIL import Image

from hfvit.artifacts.lr_finder_record import LearningRateCurve
from hfvit.cli import main as hfvit_command
from hfvit.errors import RecipeError
from hfvit.lr_finder import find_lr
from hfvit.recipe.training_args import HFViTTrainingArguments

SCHEDULE = ("--lr_scheduler_type", "cosine_with_restarts", "--lr_scheduler_kwargs", '{"num_cycles": 2}')
WRITTEN = {"lr_finder/lr_finder.json", "lr_finder/lr_finder.png"}


def test_find_lr_writes_curve_and_plot_and_keeps_the_run(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("run.json", "model.safetensors", "README.md", "recipe.yaml"):
        (out / name).write_text("of a run")
    before = {name: (out / name).read_bytes() for name in files(out)}
    with pytest.raises(SystemExit) as ended:
        hfvit_command(["train", str(recipe), "--find_lr", "--layer_decay", "0.8", "--soup", "greedy", *SCHEDULE])
    assert not ended.value.code
    assert files(out) == {*before, *WRITTEN}
    assert all((out / name).read_bytes() == content for name, content in before.items())
    curve = LearningRateCurve.load(out / "lr_finder")
    assert curve.recipe == 3e-3
    assert curve.learning_rates[0] == pytest.approx(1e-7)
    assert 20 < len(curve.losses) == len(curve.smoothed) <= 100
    assert 1e-6 < curve.steepest < 1
    assert_names(capsys.readouterr().out, f"{curve.steepest:.1e}", f"{curve.minimum_tenth:.1e}", "3.0e-03")
    with Image.open(out / "lr_finder" / "lr_finder.png") as image:
        assert min(image.size) > 300


def test_find_lr_with_lora_trains_adapters(recipe, tmp_path):
    pytest.importorskip("peft")
    build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO).save_pretrained(tmp_path / "base")
    fields = {"model_name_or_path": str(tmp_path / "base"), "architecture": None, "model_args": None}
    curve = find_lr(recipe, low=1e-4, high=1.0, steps=30, finetuning="lora", **fields)
    assert curve.learning_rates[-1] <= 1.0
    assert json.loads((tmp_path / "out" / "lr_finder" / "lr_finder.json").read_text())["losses"] == curve.losses


def test_find_lr_of_one_fold_trains(recipe):
    assert len(find_lr(recipe, steps=30, folds=3, fold=1).losses) > 1


def test_find_lr_of_a_linear_probe_is_refused_before_loading(recipe, tmp_path):
    (tmp_path / "base").mkdir()
    fields = {"model_name_or_path": str(tmp_path / "base"), "architecture": None, "model_args": None}
    with pytest.raises(RecipeError, match=r"^--find_lr: .*\blinear_probe\b"):
        find_lr(recipe, finetuning="linear_probe", **fields)
    assert not (tmp_path / "out").exists()


def test_find_lr_with_a_wrong_range_raises(recipe):
    with pytest.raises(ValueError, match="low, high"):
        find_lr(recipe, low=1.0, high=0.1)


def test_find_lr_with_few_steps_raises(recipe):
    with pytest.raises(ValueError, match=r"^steps: "):
        find_lr(recipe, steps=19)


def test_find_lr_with_several_processes_is_refused(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(HFViTTrainingArguments, "world_size", 2)
    with pytest.raises(RecipeError, match=r"^--find_lr: .*\b2\b"):
        find_lr(recipe)
    assert not (tmp_path / "out").exists()
