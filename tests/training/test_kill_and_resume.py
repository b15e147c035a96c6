"""Runs that are killed, interrupted or out of disk resume to the same result, bit for bit."""

import errno
import json
import os
import shutil
import signal
import subprocess

import pytest
import torch
from helpers.commands import ROOT, run_command
from helpers.killing import Killer, launched_until_a_checkpoint
from helpers.messages import assert_names, last_error, option_of
from helpers.runs import assert_same_run
from safetensors.torch import load_file

from hfvit.artifacts.checkpoint import newest_checkpoint

STEPS = {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 2, "num_train_epochs": 3}
# Options that need state in a checkpoint: unlogged losses, EMA, dropout, mixing, accumulation, early stopping.
EVERYTHING = {
    **STEPS, "ema_decay": 0.9, "mixing": {"mixup_alpha": 0.5, "random_erasing": 0.3}, "per_device_train_batch_size": 4,
    "early_stopping_patience": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def killer():
    return Killer()


@pytest.fixture(scope="module")
def uninterrupted(killer, tmp_path_factory):
    """Train an uninterrupted run with these options once; returns its output folder."""
    ran = {}

    def run(options, **job):
        key = json.dumps([options, job])
        if key not in ran:
            ran[key] = tmp_path_factory.mktemp("uninterrupted") / "out"
            assert set(killer.run(ran[key], options=options, operation=0, **job)) == {0}
        return ran[key]

    return run


def assert_same_end(out, other):
    assert json.loads(out.with_name("out.json").read_text()) == json.loads(other.with_name("out.json").read_text())
    first, second = (load_file(folder.with_name("out.safetensors")) for folder in (out, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert not (out / ".saving").exists()


def operations_of(out):
    return out.with_name(f"{out.name}.operations").read_text().splitlines()


def messages(out, rank=0):
    return out.with_name(f"out.{rank}.log").read_text()


def test_run_killed_at_any_file_operation_resumes_exactly(killer, uninterrupted, tmp_path):
    full = uninterrupted(EVERYTHING)
    operations = len(operations_of(full))
    assert operations > 60
    resumed_at = set()
    for number in range(1, operations + 1, 8):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        assert killer.run(out, options=EVERYTHING, operation=number) == [-signal.SIGKILL], messages(out)
        checkpoint = newest_checkpoint(out)
        resumed_at.add(checkpoint and checkpoint.name)
        assert killer.run(out, options=EVERYTHING) == [0], messages(out)
        assert_same_end(out, full)
        shutil.rmtree(out.parent)
    assert len(resumed_at) >= 5


@pytest.mark.parametrize("step", [0, 4, 10])
def test_run_killed_between_steps_resumes_exactly(killer, uninterrupted, tmp_path, step):
    out = tmp_path / "out"
    assert killer.run(out, options=EVERYTHING, after={"step": step + 1, "send": 9}) == [-signal.SIGKILL]
    assert killer.run(out, options=EVERYTHING) == [0], messages(out)
    assert_same_end(out, uninterrupted(EVERYTHING))


@pytest.mark.parametrize(
    ("step", "number", "options"),
    [
        (4, signal.SIGTERM, {}),  # between two checkpoints and two logs
        (5, signal.SIGINT, {"eval_strategy": "epoch"}),  # at the end of an epoch, before its evaluation
        (6, signal.SIGTERM, {}),  # at a step that is also evaluated and saved
        (15, signal.SIGTERM, {}),  # at the last step
        (7, signal.SIGTERM, {"save_strategy": "no", "eval_strategy": "no", "early_stopping_patience": None}),
    ],
)
def test_signal_saves_and_stops_the_run(killer, uninterrupted, tmp_path, step, number, options):
    options = {**EVERYTHING, **options}
    out = tmp_path / "out"
    assert killer.run(out, options=options, after={"step": step, "send": number}) == [75], messages(out)
    assert last_error(messages(out)).startswith("hfvit: stopped: ")
    assert_names(last_error(messages(out)), number.name, f"{out}/checkpoint-{step}")
    assert newest_checkpoint(out).name == f"checkpoint-{step}"
    assert killer.run(out, options=options) == [0], messages(out)
    assert_same_end(out, uninterrupted(options))


def test_second_signal_ends_the_run_immediately(killer, tmp_path):
    out = tmp_path / "out"
    job = {"options": {**EVERYTHING, "save_strategy": "no", "load_best_model_at_end": False}}
    assert killer.run(out, after={"step": 4, "send": 15, "again": True}, **job) == [-signal.SIGTERM]
    assert newest_checkpoint(out) is None


def test_signal_that_torchrun_forwards_to_its_only_process_saves_once(killer, tmp_path):
    out = tmp_path / "out"
    after = {"step": 4, "send": signal.SIGTERM, "again": True}
    environment = {"TORCHELASTIC_RUN_ID": "1"}
    assert killer.run(out, options=EVERYTHING, after=after, environment=environment) == [75], messages(out)
    assert newest_checkpoint(out).name == "checkpoint-4"


def test_signal_to_the_process_group_keeps_workers_alive(killer, uninterrupted, tmp_path):
    options = {**EVERYTHING, "dataloader_num_workers": 1}
    out = tmp_path / "out"
    after = {"step": 4, "send": signal.SIGTERM, "group": True}
    assert killer.run(out, options=options, after=after) == [75], messages(out)
    assert newest_checkpoint(out).name == "checkpoint-4"
    assert killer.run(out, options=options) == [0], messages(out)
    assert_same_end(out, uninterrupted(EVERYTHING))  # independent of workers


def test_early_stopped_run_is_not_trained_further(killer, uninterrupted, tmp_path):
    options = {**STEPS, "learning_rate": 1e-9, "warmup_steps": 0, "early_stopping_patience": 2}
    full = uninterrupted(options)
    operations = len(operations_of(full))
    out = tmp_path / "out"
    assert killer.run(out, options=options, operation=operations) == [-signal.SIGKILL]
    assert newest_checkpoint(out).name == "checkpoint-9"
    assert killer.run(out, options=options) == [0], messages(out)
    assert_same_end(out, full)


# Two processes with the environment of torchrun.

TWO = {"processes": 2}


@pytest.mark.slow
def test_two_processes_killed_at_any_file_operation_resume_exactly(killer, uninterrupted, tmp_path):
    full = uninterrupted(EVERYTHING, **TWO)
    operations = len(operations_of(full))
    for rank, number in ((0, operations // 3), (0, operations * 2 // 3), (1, 3), (1, 8)):
        out = tmp_path / f"{rank}-{number}" / "out"
        out.parent.mkdir()
        codes = killer.run(out, options=EVERYTHING, operation=number, rank=rank, **TWO)
        assert codes[rank] == -signal.SIGKILL, messages(out, rank)
        assert killer.run(out, options=EVERYTHING, **TWO) == [0, 0], messages(out)
        assert_same_end(out, full)


@pytest.mark.slow
def test_signal_to_one_of_two_processes_stops_both_at_the_same_step(killer, uninterrupted, tmp_path):
    out = tmp_path / "out"
    after = {"step": 4, "send": signal.SIGTERM}
    assert killer.run(out, options=EVERYTHING, after=after, rank=1, alone=True, **TWO) == [75, 75], messages(out, 1)
    assert newest_checkpoint(out).name == "checkpoint-4"
    assert killer.run(out, options=EVERYTHING, **TWO) == [0, 0], messages(out)
    assert_same_end(out, uninterrupted(EVERYTHING, **TWO))


@pytest.mark.slow
def test_two_processes_agree_on_the_micro_batch(killer, tmp_path):
    """The process that runs out of memory is not the one that writes."""
    job = {"options": STEPS, "drop_path": 0.0, **TWO}  # 4 images per process
    losses = []
    for name, fits in (("full", {}), ("cut", {"fits": {"rank": 1, "images": 2}})):
        out = tmp_path / name / "out"
        out.parent.mkdir()
        assert killer.run(out, **job, **fits) == [0, 0], messages(out, 1)
        history = json.loads(out.with_name("out.json").read_text())["history"]
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    events = json.loads(out.with_name("out.events").read_text())
    assert events == [{"event": "out_of_memory", "step": 1, "images": 4, "then": 2}]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_later_out_of_memory_in_one_of_two_processes_is_one_error(killer, tmp_path):
    out = tmp_path / "out"
    fits = {"rank": 1, "images": 2, "from_step": 4}
    assert killer.run(out, fits=fits, options=STEPS, alone=True, **TWO) == [8, 6], messages(out)
    assert_names(last_error(messages(out)), "--resume_from_checkpoint auto")
    message = last_error(messages(out, 1))
    assert_names(message, 4, "--resume_from_checkpoint auto --per_device_train_batch_size 2")
    assert newest_checkpoint(out).name == "checkpoint-3"


@pytest.mark.slow
@pytest.mark.integration
def test_sigterm_to_the_launcher_saves_and_resumes(line, tmp_path):
    config = ROOT / "accelerate_configs" / "multi_cpu.yaml"
    options = ["--num_train_epochs", "40", "--eval_strategy", "steps", "--eval_steps", "10"]

    def words(out):
        launch = ["accelerate", "launch", "--config_file", str(config), "--main_process_port", "0"]
        return [*launch, "hfvit/train.py", *line, *options, "--output_dir", str(out)]

    full, out = tmp_path / "full", tmp_path / "out"
    result = run_command(*words(full))
    assert result.returncode == 0, result.stderr
    with launched_until_a_checkpoint(words(out), out) as process:
        process.terminate()
        printed = process.communicate(timeout=60)[1].decode()
    assert printed.count("hfvit: stopped: ") == 1, printed
    assert process.returncode != 0
    assert_names(last_error(printed), "SIGTERM", newest_checkpoint(out).name)
    resumed = run_command(*words(out))
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(out, full)


# Full disks.


@pytest.mark.parametrize("file_bytes", [60_000, 150_000])  # below the size of the weights, of the optimizer state
def test_full_disk_is_one_error_and_keeps_the_last_checkpoint(killer, uninterrupted, tmp_path, file_bytes):
    out = tmp_path / "out"
    after = {"step": 4, "file_bytes": file_bytes}
    assert killer.run(out, options=EVERYTHING, after=after) == [7], messages(out)
    printed = messages(out)
    assert "Traceback" not in printed
    assert_names(last_error(printed), f"{out}/checkpoint-6", f"{out}/checkpoint-3")
    assert not (out / ".saving").exists()
    assert newest_checkpoint(out).name == "checkpoint-3"
    assert killer.run(out, options=EVERYTHING) == [0], messages(out)
    assert_same_end(out, uninterrupted(EVERYTHING))


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 700 KiB, for one checkpoint of 500 KiB but not two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_really_full_or_read_only_disk_is_one_error(killer, uninterrupted, small_disk, tmp_path):
    out, logs = small_disk / "out", tmp_path / "out"
    logs.mkdir()
    out.mkdir()
    job = {"options": EVERYTHING, "log": str(logs)}
    assert killer.run(out, **job) == [7], messages(logs)
    assert_names(last_error(messages(logs)), f"{out}/checkpoint-6", f"{out}/checkpoint-3")
    assert newest_checkpoint(out).name == "checkpoint-3"
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert killer.run(out, **job) == [2], messages(logs)
    assert option_of(last_error(messages(logs))) == "output_dir"
    assert_names(last_error(messages(logs)), out, os.strerror(errno.EROFS))
    subprocess.run(["mount", "-o", "remount,rw,size=9m", str(small_disk)], check=True)
    assert killer.run(out, **job) == [0], messages(logs)
    assert_same_end(logs, uninterrupted(EVERYTHING))


# The complete pipeline.


@pytest.fixture
def line(recipe):
    return [str(recipe), "--resume_from_checkpoint", "auto", "--drop_path_rate", "0.3"]


def step_losses(record):
    return [entry["loss"] for entry in record["history"] if "loss" in entry]


def test_machines_without_shared_folder_fail_early(killer, line, tmp_path):
    folders = [tmp_path / "one", tmp_path / "other"]
    argv = [word for word in line if word not in ("--resume_from_checkpoint", "auto")]
    job = {"argv": [*argv, "--max_steps", "1"], "processes": 2, "alone": True}
    apart = [["--output_dir", str(folder)] for folder in folders]
    assert killer.run(tmp_path / "out", machines=apart, **job) == [2, 2], messages(tmp_path / "out")
    for rank, folder in enumerate(folders):
        message = last_error(messages(tmp_path / "out", rank))
        assert option_of(message) == "output_dir"
        assert_names(message, folder)
        assert not list(folder.glob("*"))  # the process with the file deletes it
    assert killer.run(tmp_path / "out", machines=[apart[0]] * 2, **job) == [0, 0], messages(tmp_path / "out")
    assert not list(folders[0].glob(".*"))


@pytest.mark.slow
def test_run_killed_while_reporting_resumes(killer, line, tmp_path):
    """Kill between training and the last file: missing files are written, finished runs unchanged."""
    full = tmp_path / "full"
    assert killer.run(full, argv=[*line, "--output_dir", str(full)], operation=0) == [0], messages(full)
    expected = json.loads((full / "run.json").read_text())
    operations, out = operations_of(full), tmp_path / "out"
    named = [operations.index(f"os.rename {full / name}") + 1 for name in ("run.json", "README.md")]
    for number in named:  # before run.json, and before the model card
        assert killer.run(out, argv=line, operation=number) == [-signal.SIGKILL], messages(out)
        assert (out / "run.json").exists() == (number > named[0])
        assert not (out / "README.md").exists()
        assert killer.run(out, argv=line) == [0], messages(out)
        record = json.loads((out / "run.json").read_text())
        assert step_losses(record) == step_losses(expected)
        assert record["metrics"] == expected["metrics"]
        first, second = (load_file(folder / "model.safetensors") for folder in (full, out))
        assert all(torch.equal(second[name], value) for name, value in first.items())
        assert {f.name for f in out.iterdir()} == {f.name for f in full.iterdir()}
        before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
        assert killer.run(out, argv=line) == [0], messages(out)  # a scheduler may start it again
        assert {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()} == before
        shutil.rmtree(out)
