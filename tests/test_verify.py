"""`hfvit verify`: bit-identical repetition, changed checkpoints and records."""

import json
import re
import shutil
from dataclasses import replace
from importlib import metadata

import numpy as np
import pytest
import torch
import yaml
from helpers.commands import ROOT
from helpers.loopback_hub import LoopbackHub
from helpers.messages import assert_names
from helpers.recipes import write_micro_recipe
from helpers.records import make_record
from safetensors.torch import load_file, save_file

from hfvit.artifacts.run_record import RunRecord
from hfvit.cli import main as hfvit_command
from hfvit.errors import InterruptedRunError, RecipeError
from hfvit.multirun import main as train_seeds
from hfvit.pipeline import main as train
from hfvit.recipe.loader import load_recipe
from hfvit.verify import check_reads, expected_accuracy

RANDOM = "drop_path_rate: 0.2\nmixup_alpha: 0.4\ncutmix_alpha: 1.0\nrandom_erasing: 0.2\npolicy: rand_augment\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, colors):
    """Train with all random options and full_determinism."""
    folder = tmp_path_factory.mktemp("verify")
    recipe = write_micro_recipe(folder, colors, f"{RANDOM}use_cpu: true\nfull_determinism: true\n")
    try:
        train([str(recipe)])
        yield folder / "out"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def out(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "out")


def verify(capsys, *words) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        hfvit_command(["verify", *map(str, words), "--allow_outside_paths"])
    printed = capsys.readouterr()
    return stop.value.code or 0, printed.out, printed.err


def change(out, edit) -> None:
    record = json.loads((out / "run.json").read_text())
    edit(record)
    (out / "run.json").write_text(json.dumps(record))


def test_verify_repeats_a_deterministic_run_exactly(out, capsys, tmp_path):
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, printed, _ = verify(capsys, out, "--output", tmp_path / "again")
    assert code == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert re.search(r"^weights ", printed, re.MULTILINE)
    assert len(re.findall(r"\+0\.00\b", printed)) == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    first, second = (json.loads((folder / "run.json").read_text())["history"] for folder in (out, tmp_path / "again"))
    for key in ("loss", "grad_norm", "learning_rate", "eval_loss"):
        assert [entry.get(key) for entry in first] == [entry.get(key) for entry in second]


def test_verify_eval_only_evaluates_the_checkpoint(out, capsys):
    code, printed, _ = verify(capsys, out, "--eval_only", "--device", "cpu")
    assert code == 0
    assert len(re.findall(r"\+0\.00\b", printed)) == 2
    assert not {"timm", "torch", "transformers"} & set(re.findall(r"\w+", printed))  # no version changed


def test_verify_eval_only_samples_the_same_rows(trained, capsys, tmp_path):
    words = [str(trained.parent / "micro.yaml"), "--output_dir", str(tmp_path / "out"), "--num_train_epochs", "1"]
    train([*words, "--max_eval_samples", "9"])
    code, printed, _ = verify(capsys, tmp_path / "out", "--eval_only", "--device", "cpu")
    assert code == 0
    assert len(re.findall(r"\+0\.00\b", printed)) == 2


def test_verify_names_other_versions(out, capsys):
    change(out, lambda record: record["versions"].update(timm="0.9"))
    change(out, lambda record: record.update(of_shipped("vit_tiny_cifar10")))
    code, printed, _ = verify(capsys, out, "--eval_only")
    assert code == 0
    assert_names(printed, "timm", 0.9, metadata.version("timm"))
    assert_names(printed, 93, 95, "recipes/vit_tiny_cifar10.yaml", "100.00")


def test_verify_of_damaged_weights_is_outside(out, capsys):
    state = load_file(out / "model.safetensors")
    state["head.weight"] = state["head.weight"].roll(1, 0)
    save_file(state, out / "model.safetensors", {"format": "pt"})
    change(out, lambda record: record.update(of_shipped("quickstart")))
    code, printed, error = verify(capsys, out, "--eval_only")
    assert code == 4
    low, high = json.loads((out / "run.json").read_text())["metrics"]["test"]["accuracy_interval"]
    assert_names(printed, "recipes/quickstart.yaml", f"{low:.2%}", f"{high:.2%}")
    assert_names(error, "test", f"{low:.2%}", f"{high:.2%}")  # outside the recorded interval
    expected = map("{:g}".format, expected_of("quickstart"))
    assert_names(error, *expected, "recipes/quickstart.yaml")  # below the expected accuracy


def test_verify_of_unreached_accuracy_is_outside(out, capsys):
    change(out, lambda record: record["metrics"]["test"].update(accuracy=0.01, accuracy_interval=[0.0, 0.02]))
    code, printed, error = verify(capsys, out)
    assert code == 4
    assert_names(printed, "0.00%", "2.00%")
    assert len(error[error.index("hfvit: error: ") :].splitlines()) == 1
    assert_names(error, "test", "0.00%", "2.00%")


OUTSIDE = {
    "dataset_name": ["/home/user/photos", "~/photos", "../photos", "photos", "https://host/a.parquet"],
    "model_name_or_path": ["/srv/model", "./model", "photos"],
    "teacher": ["/srv/teacher"],
    "text_encoder": ["../encoder"],
    "class_names": [["/etc/passwd"]],
    "model_args": [{"pretrained_cfg_overlay": {"file": "/etc/passwd"}}],
    "fsdp_config": ["/etc/passwd"],
    "allow_outside_paths": [True],
    "run_name": ["file:///etc/passwd"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in OUTSIDE.items() for value in values])
def test_recipe_that_reads_outside_needs_consent(tmp_path, monkeypatch, key, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    values = {"dataset_name": "user/set", "architecture": "vit_tiny_patch16_224", "output_dir": "/any", key: value}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError, match=r"^RUN_DIR: ") as caught:
        check_reads(tmp_path)
    assert_names(caught.value, key, "--allow_outside_paths")
    check_reads(tmp_path, allow_outside=True)


@pytest.mark.parametrize("name", ["digits", "user/set", "cifar10"])
def test_recipe_of_data_on_the_hub_needs_no_consent(tmp_path, name):
    values = {"dataset_name": name, "train_split": "train[:80%]", "head_templates": ["a photo of {}."]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**values, "output_dir": "/any", "dataset_revision": "main"}))
    check_reads(tmp_path)


def test_class_names_that_look_like_paths_need_no_consent(tmp_path):
    values = {"dataset_name": "user/set", "class_names": ["/m/01abc", "~cat"], "label_separator": "/"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    check_reads(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**values, "class_names": ["/etc/passwd"]}))
    with pytest.raises(RecipeError, match=r"^RUN_DIR: "):
        check_reads(tmp_path)


def test_verify_without_consent_trains_nothing(out, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        hfvit_command(["verify", str(out), "--output", str(tmp_path / "again")])
    assert stop.value.code == 2
    assert_names(capsys.readouterr().err, "dataset_name", "--allow_outside_paths")
    assert not (tmp_path / "again").exists()


def test_verify_neither_pushes_nor_resumes_nor_leaves_its_folder(trained, monkeypatch, capsys, tmp_path):
    """A hostile recipe: each key that would reach out is replaced."""
    out = shutil.copytree(trained, tmp_path / "out")
    victim = tmp_path / "victim"
    shutil.copytree(trained, victim)
    values = yaml.safe_load((out / "recipe.yaml").read_text()) | {
        "push_to_hub": True, "hub_model_id": "user/stolen", "report_to": "tensorboard", "output_dir": str(victim),
        "overwrite_output_dir": True, "resume_from_checkpoint": str(victim), "max_steps": 2,
        "json_log": "log.jsonl",
    }  # fmt: skip
    (out / "recipe.yaml").write_text(yaml.safe_dump(values))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.chdir(tmp_path)
    with LoopbackHub() as hub:
        hub.take_over(monkeypatch, tmp_path.parent / "cache")
        code, printed, _ = verify(capsys, out)
        assert hub.requests == []
    assert code in (0, 4)
    assert re.search(r"^test ", printed, re.MULTILINE)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def seeds(tmp_path_factory, colors):
    """Train with two seeds."""
    folder = tmp_path_factory.mktemp("seeds")
    train_seeds([str(write_micro_recipe(folder, colors, "use_cpu: true\nseeds: 2\n"))])
    return folder / "out"


def test_verify_of_several_seeds_holds_their_mean_to_the_expected_accuracy(seeds, tmp_path, capsys):
    out = shutil.copytree(seeds, tmp_path / "out")
    for seed in range(2):
        change(
            out / f"seed_{seed}",
            lambda record, seed=seed: record.update(of_shipped("quickstart", "--seed", str(seed))),
        )
    code, printed, _ = verify(capsys, out, "--eval_only", "--device", "cpu")
    again = [RunRecord.load(out / f"seed_{seed}").metrics["test"].accuracy for seed in range(2)]
    assert code == (0 if np.mean(again) >= 0.95 else 4)
    rows = [line.split()[:2] for line in printed.splitlines() if line.startswith("seed_")]
    assert ["seed_0", "test"] in rows
    assert ["seed_1", "validation"] in rows
    assert_names(printed, f"{np.mean(again):.2%}", f"{np.std(again, ddof=1):.2%}", "recipes/quickstart.yaml")

    for seed in range(2):  # within its own interval, and below the expected accuracy
        low = {"accuracy": 0.9, "accuracy_interval": [0.0, 1.0]}
        change(out / f"seed_{seed}", lambda record, low=low: record["metrics"]["test"].update(low))
    state = load_file(out / "seed_1" / "model.safetensors")
    state["head.weight"] = state["head.weight"].roll(1, 0)
    save_file(state, out / "seed_1" / "model.safetensors", {"format": "pt"})
    change(out / "seed_1", lambda record: record["metrics"]["validation"].update(low))
    code, _, error = verify(capsys, out, "--eval_only", "--device", "cpu")
    assert code == 4
    assert_names(error, *map("{:g}".format, expected_of("quickstart")), 2, "recipes/quickstart.yaml")


def test_verify_of_runs_outside_the_folder_is_an_error(seeds, tmp_path, capsys):
    out = shutil.copytree(seeds, tmp_path / "out")
    record = json.loads((out / "multirun.json").read_text())
    record["runs"][0]["folder"] = "../../victim"
    (out / "multirun.json").write_text(json.dumps(record))
    code, _, error = verify(capsys, out, "--eval_only")
    assert code == 2
    assert_names(error, "runs[0].folder")


def of_shipped(name: str, *options: str) -> dict:
    """Return the recipe in run.json of a shipped recipe's run."""
    return {"command": f"train.py recipes/{name}.yaml", "recipe": load_recipe([name, *options]).values}


def expected_of(name: str) -> list[float]:
    """Return the range that the file of a shipped recipe has."""
    return yaml.safe_load((ROOT / f"recipes/{name}.yaml").read_text())["expected_accuracy"]


def run_of_shipped(name: str, *options: str, **values) -> RunRecord:
    return replace(make_record(), **{**of_shipped(name, *options), **values})


def test_expected_accuracy_of_shipped_recipe():
    quickstart = (*expected_of("quickstart"), True, "quickstart.yaml")
    assert expected_accuracy(run_of_shipped("quickstart", "--output_dir", "x", "--overwrite_output_dir")) == quickstart
    assert expected_accuracy(run_of_shipped("quickstart", command="hfvit train quickstart")) == quickstart
    assert expected_accuracy(run_of_shipped("swin_tiny")) == (96.5, 98.5, False, "swin_tiny.yaml")
    other_seed = run_of_shipped("quickstart", "--seed", "7")
    assert expected_accuracy(other_seed) is None
    assert expected_accuracy(other_seed, any_seed=True) == quickstart
    for word in ("--max_steps", "--max_train_samples"):  # a user's own recipe with the same name
        assert expected_accuracy(run_of_shipped("quickstart", word, "3")) is None
    assert expected_accuracy(run_of_shipped("quickstart", command="hfvit train my.yaml")) is None


@pytest.mark.parametrize("has_output", [True, False])
def test_verify_that_is_interrupted_advises_no_resume(out, capsys, tmp_path, monkeypatch, has_output):
    def stopped(argv):
        raise InterruptedRunError("Received SIGTERM.")

    monkeypatch.setattr("hfvit.pipeline.main", stopped)
    code, _, message = verify(capsys, out, *(["--output", tmp_path / "again"] if has_output else []))
    assert code == InterruptedRunError.exit_code
    assert_names(message, "SIGTERM")
    assert "--resume_from_checkpoint" not in message
