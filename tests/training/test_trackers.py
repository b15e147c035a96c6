"""Trackers: real runs of TensorBoard, Trackio, MLflow's file store and offline Weights & Biases."""

import json
import os
import tempfile
from types import SimpleNamespace

import pytest
import yaml
from helpers.messages import option_of
from helpers.runs import fails

from hfvit.pipeline import main
from hfvit.recipe.training_args import HFViTTrainingArguments
from hfvit.training.trackers import TRACKERS, ArgumentsWithRecipe

TOKEN = "hf_" + "x" * 30
os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp())  # read when trackio is imported


@pytest.fixture
def tracked(recipe, tmp_path, monkeypatch):
    """Return a function that trains with a tracker: two epochs, or the second one of a run that was killed."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def run(tracker: str, *options: str) -> str:
        words = [
            str(recipe),
            "--report_to",
            tracker,
            "--run_name",
            TOKEN,
            "--keep_checkpoints",
            "--plots",
            "true",
            *options,
        ]
        main(words)
        return json.loads((tmp_path / "out" / "trackers.json").read_text())[tracker]

    return run


def resume(tmp_path) -> tuple[str, ...]:
    """Delete what is newer than the first checkpoint of a run."""
    out = tmp_path / "out"
    (out / "run.json").unlink()
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in last.rglob("*"):
        path.unlink()
    last.rmdir()
    return ("--resume_from_checkpoint", "auto")


def tensorboard_events(folder):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return events


def test_tensorboard_has_scalars_recipe_results_and_figures(tracked, tmp_path):
    run = tracked("tensorboard", "--num_train_epochs", "1")
    events = tensorboard_events(tmp_path / "out" / "runs" / run)
    tags = events.Tags()
    assert {"train/loss", "eval/accuracy", "test/accuracy", "validation/ece"} <= set(tags["scalars"])
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    [*_, last] = events.Scalars("test/accuracy")
    assert last.value == pytest.approx(record["metrics"]["test"]["accuracy"])
    assert {"training_images", "confusion_matrix"} <= set(tags["images"])
    [*_, text] = events.Tensors("recipe/text_summary")
    assert "vit_tiny_patch16_224" in text.tensor_proto.string_val[0].decode()
    assert not any(TOKEN.encode() in path.read_bytes() for path in (tmp_path / "out" / "runs").rglob("events*"))


@pytest.mark.slow
def test_tensorboard_continues_the_run_of_a_resume(tracked, tmp_path):
    run = tracked("tensorboard")
    assert tracked("tensorboard", *resume(tmp_path)) == run
    steps = [event.step for event in tensorboard_events(tmp_path / "out" / "runs" / run).Scalars("train/loss")]
    assert steps == sorted(set(steps))  # those after the checkpoint are not there twice


def test_tensorboard_writes_only_inside_the_run_folder(tmp_path):
    pytest.importorskip("tensorboard")
    args = HFViTTrainingArguments(output_dir=str(tmp_path / "out"))
    tracker = TRACKERS["tensorboard"](args, {}, "../../elsewhere", step=0)
    tracker.tb_writer.add_scalar("loss", 1.0, 1)
    tracker.tb_writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_trackio_continues_the_run_of_a_resume(tracked, tmp_path):
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    run = tracked("trackio", "--project", "tests", "--run_name", "first")
    assert run == "first"
    assert tracked("trackio", "--project", "tests", "--run_name", "first", *resume(tmp_path)) == run
    logs = SQLiteStorage.get_logs("tests", run)
    keys = {key for entry in logs for key in entry}
    assert {"train/loss", "eval/accuracy", "test/accuracy", "confusion_matrix"} <= keys
    config = SQLiteStorage.get_run_config("tests", run)
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert TOKEN not in json.dumps(config, default=str)
    again = tracked("trackio", "--project", "tests", "--run_name", "first", "--overwrite_output_dir")
    assert again != run
    assert again.startswith("first-")


@pytest.mark.slow
def test_mlflow_file_store_has_parameters_results_and_figures(tracked, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    run = tracked("mlflow")
    assert tracked("mlflow", *resume(tmp_path)) == run
    found = mlflow.get_run(run)
    values = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert found.info.status == "FINISHED"
    assert found.data.params["global_batch_size"] == str(values["global_batch_size"])
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert found.data.metrics["test/accuracy"] == pytest.approx(record["metrics"]["test"]["accuracy"])
    assert found.data.metrics["eval_loss"] > 0
    artifacts = {file.path for file in mlflow.artifacts.list_artifacts(run_id=run, artifact_path="figures")}
    assert {"figures/training_images.png", "figures/confusion_matrix.png"} <= artifacts
    assert TOKEN not in json.dumps(found.data.params)
    assert mlflow.active_run() is None


@pytest.mark.slow
def test_offline_wandb_continues_the_run_of_a_resume(tracked, tmp_path):
    pytest.importorskip("wandb")
    run = tracked("wandb")
    assert tracked("wandb", *resume(tmp_path)) == run
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{run}"))) == 2


@pytest.mark.parametrize("tracker", sorted(TRACKERS))
def test_missing_tracker_names_its_extra(recipe, capsys, tracker, monkeypatch):
    monkeypatch.setattr("hfvit.recipe.training_args.get_available_reporting_integrations", list)
    message = fails(capsys, recipe, "--report_to", tracker)
    assert option_of(message) == "report_to"
    assert f"hfvit[{tracker}]" in message


def test_tracker_that_cannot_be_started_is_one_error(recipe, capsys, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file" / "runs"))
    assert option_of(fails(capsys, recipe, "--report_to", "tensorboard")) == "report_to"


def test_arguments_of_a_tracker_have_no_token(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    args = HFViTTrainingArguments(output_dir=str(tmp_path), hub_token=TOKEN, run_name=f"run {TOKEN}", use_cpu=True)
    assert TOKEN not in args.to_json_string()
    assert ArgumentsWithRecipe(args, {"a": 1}).to_dict() == {"a": 1}
    assert ArgumentsWithRecipe(SimpleNamespace(x=2), {}, run_name="r").x == 2
