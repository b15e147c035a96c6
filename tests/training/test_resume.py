"""Resume: damaged checkpoints, changed data and recipes, loss sums, and files on disk."""

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import resource
import shutil
import stat
import sys
from contextlib import nullcontext

import datasets
import numpy as np
import pytest
import torch
from helpers.commands import ROOT, run_command
from helpers.images import colored_split
from helpers.messages import assert_names
from helpers.micro_trainer import Stop, assert_resumes_exactly, losses, make_trainer, weights
from safetensors.torch import load_file
from transformers import TrainerCallback

from hfvit.artifacts.checkpoint import newest_checkpoint
from hfvit.data.factory import load_splits
from hfvit.errors import DataError, HFViTError, ModelError, RecipeError, StorageError
from hfvit.pipeline import main
from hfvit.recipe.arguments import DataArguments
from hfvit.training.resume import ResumeState, check_origin, describe_changes, describe_origin
from hfvit.training.workers import is_lost_worker
from hfvit.utils.environment import check_shared_memory

SPLITS = {role: {"source": role, "rows": 1, "fingerprint": "0"} for role in ("train", "validation")}


def interrupted(folder, **options):
    """Interrupt a run after step 8; returns it and checkpoint-5."""
    with pytest.raises(KeyboardInterrupt):
        make_trainer(folder, [Stop()], **options).train()
    return folder / "checkpoint-5"


def test_checkpoint_of_version_0_1_resumes(tmp_path):
    uninterrupted = make_trainer(tmp_path / "uninterrupted", ema_decay=0.9)
    uninterrupted.train()
    checkpoint = interrupted(tmp_path / "killed", ema_decay=0.9)
    file = checkpoint / "progress.json"
    content = json.loads(file.read_text())
    del content["logged_loss"], content["origin"]  # not written by that version
    file.write_text(json.dumps(content))
    rewrite_manifest(checkpoint)
    resumed = make_trainer(tmp_path / "killed", ema_decay=0.9)
    resumed.train(str(checkpoint))
    assert losses(resumed) == losses(uninterrupted)
    final = weights(uninterrupted)
    assert all(torch.equal(value, final[name]) for name, value in weights(resumed).items())


def test_evaluation_before_the_first_step_is_not_repeated_by_a_resume(tmp_path):
    options = {"eval_on_start": True, "metric_for_best_model": "loss"}
    uninterrupted = make_trainer(tmp_path / "uninterrupted", **options)
    uninterrupted.train()
    checkpoint = interrupted(tmp_path / "killed", **options)
    resumed = make_trainer(tmp_path / "killed", **options)
    resumed.train(str(checkpoint))
    steps = [[log["step"] for log in run.state.log_history if "eval_loss" in log] for run in (uninterrupted, resumed)]
    assert steps[0] == steps[1] == [0, 5, 10]
    assert losses(resumed) == losses(uninterrupted)


def rewrite_manifest(checkpoint):
    """Update the manifest for the current files."""
    listed = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in checkpoint.iterdir()
        if file.name != "checkpoint.json"
    }
    (checkpoint / "checkpoint.json").write_text(json.dumps({"files": listed}))


def test_train_loss_of_resumed_run_equals_uninterrupted(tmp_path):
    uninterrupted = make_trainer(tmp_path / "uninterrupted", logging_steps=3)
    expected = uninterrupted.train().metrics["train_loss"]
    checkpoint = interrupted(tmp_path / "killed", logging_steps=3)
    resumed = make_trainer(tmp_path / "killed", logging_steps=3)
    assert resumed.train(str(checkpoint)).metrics["train_loss"] == expected
    after_the_end = make_trainer(tmp_path / "killed", logging_steps=3)
    last = str(newest_checkpoint(tmp_path / "killed"))
    assert after_the_end.train(last).metrics["train_loss"] == expected
    assert resumed.state.log_history[-1]["train_loss"] == expected


def best_and_newest(folder):
    """Train a run whose first checkpoint is the best, and copy checkpoints 5 and 10 to another folder."""
    trainer = make_trainer(
        folder / "run", num_train_epochs=3, metric_for_best_model="loss", greater_is_better=True, save_total_limit=9
    )
    trainer.train()
    assert trainer.state.best_global_step == 5
    for step in (5, 10):
        shutil.copytree(folder / "run" / f"checkpoint-{step}", folder / "moved" / f"checkpoint-{step}")
    return weights(trainer), folder / "moved"


def resume(folder, checkpoint):
    trainer = make_trainer(
        folder, num_train_epochs=3, metric_for_best_model="loss", greater_is_better=True, save_total_limit=9
    )
    trainer.train(str(checkpoint))
    return trainer


def test_best_checkpoint_is_found_in_a_moved_folder(tmp_path):
    expected, moved = best_and_newest(tmp_path)
    shutil.rmtree(tmp_path / "run")
    trainer = resume(moved, moved / "checkpoint-10")
    assert trainer.state.best_model_checkpoint == str(moved / "checkpoint-5")
    assert all(torch.equal(value, expected[name]) for name, value in weights(trainer).items())


def test_damaged_best_checkpoint_is_replaced_by_the_next_best(tmp_path, caplog):
    _, moved = best_and_newest(tmp_path)
    file = moved / "checkpoint-5" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 64
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        trainer = resume(moved, moved / "checkpoint-10")
    assert any(str(moved / "checkpoint-5") in record.getMessage() for record in caplog.records)
    assert trainer.state.best_global_step == 10
    saved = load_file(moved / "checkpoint-10" / "model.safetensors")
    final = {name.removeprefix("timm_model."): value for name, value in weights(trainer).items()}
    assert all(torch.equal(value, final[name.removeprefix("timm_model.")]) for name, value in saved.items())


def damage_json(name, **values):
    def damage(checkpoint):
        content = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps({**content, **values}))

    return damage


def write(name, content):
    return lambda checkpoint: (checkpoint / name).write_bytes(content)


DAMAGES = {
    "no resume state": lambda checkpoint: (checkpoint / "progress.json").unlink(),
    "an unknown key": damage_json("progress.json", new=1),
    "a text for a number": damage_json("progress.json", micro_batch="four"),
    "a batch of 0": damage_json("progress.json", micro_batch=0),
    "no losses": damage_json("progress.json", unlogged_loss=[]),
    "events that are none": damage_json("progress.json", events=[1]),
    "nested JSON": write("progress.json", b'{"a":' * 100_000),
    "an unknown key in the trainer's state": damage_json("trainer_state.json", new=1),
    "a pickle that runs code": write("optimizer.pt", b"\x80\x04cos\nsystem\n."),
    "a scheduler cut short": write("scheduler.pt", b"PK"),
    "random states of another kind": write("rng_state.pth", b"x" * 100),
    "weights cut short": write("model.safetensors", b"\x10"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_resume_of_damaged_checkpoint_is_one_error(tmp_path, name):
    checkpoint = interrupted(tmp_path)
    DAMAGES[name](checkpoint)
    rewrite_manifest(checkpoint)
    with pytest.raises(ModelError, match=r"^resume_from_checkpoint: .*checkpoint-5"):
        make_trainer(tmp_path).train(str(checkpoint))


def test_deeply_nested_manifest_is_a_damaged_checkpoint(tmp_path):
    checkpoint = interrupted(tmp_path)
    (checkpoint / "checkpoint.json").write_text('{"files":' * 100_000)
    assert newest_checkpoint(tmp_path) is None


@pytest.fixture
def killed_run(tmp_path, recipe):
    """Interrupt a run of the micro recipe after its first epoch, on its own data folder."""

    class Break(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            if state.global_step:
                raise KeyboardInterrupt

    data = tmp_path / "set" / "data"
    colored_split(65, 1).to_parquet(data / "train-00000-of-00001.parquet")
    colored_split(31, 2).to_parquet(data / "test-00000-of-00001.parquet")
    words = [str(recipe), "--dataset_name", str(tmp_path / "set")]
    with pytest.raises(KeyboardInterrupt):
        main(words, [Break()])
    return [*words, "--resume_from_checkpoint", "auto"]


@pytest.mark.parametrize("change", ["seed", "validation_fraction", "data added"])
def test_resume_with_changed_split_raises(killed_run, tmp_path, change):
    words = {"seed": ["--seed", "9"], "validation_fraction": ["--validation_fraction", "0.4"]}.get(change, [])
    if change == "data added":
        more = datasets.concatenate_datasets([colored_split(65, 1), colored_split(9, 5)])
        more.to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"^resume_from_checkpoint: .*validation"):
        main([*killed_run, *words])
    main([*killed_run, *words, "--allow_changed_data", "true"])
    assert (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize("role", ["train", "validation"])
@pytest.mark.parametrize(
    ("train", "validation", "may_leak"),
    [
        ("train", "train, 0.2 held out", True),
        ("train", "training, 0.2 held out", True),  # another name of a local split
        ("train[:80%]", "train[80%:]", True),
        ("extra+train", "train, fold 0 of 5 held out", True),
        ("train", "validation", False),
    ],
)
def test_resume_with_a_changed_part_of_the_training_split_raises(tmp_path, role, train, validation, may_leak):
    splits = {role: {**SPLITS[role], "source": name} for role, name in (("train", train), ("validation", validation))}
    ResumeState(1, [0.0], 1, 1, 1, origin=describe_origin({}, splits)).save(tmp_path)
    changed = describe_origin({}, {**splits, role: {**splits[role], "fingerprint": "1"}})
    check_origin(str(tmp_path), changed, allow_changed_data=True)
    with pytest.raises(DataError, match=r"^resume_from_checkpoint: ") if may_leak else nullcontext():
        check_origin(str(tmp_path), changed)


@pytest.mark.parametrize("role", ["validation", "test"])
def test_resume_that_evaluates_images_of_the_training_split_raises(tmp_path, role):
    ResumeState(1, [0.0], 1, 1, 1, origin=describe_origin({}, SPLITS)).save(tmp_path)
    train, held_out = ({"source": source, "rows": 1, "fingerprint": "1"} for source in ("train[:80%]", "train[80%:]"))
    with pytest.raises(DataError, match=r"^resume_from_checkpoint: "):
        check_origin(str(tmp_path), describe_origin({}, {**SPLITS, "train": train, role: held_out}))


def test_resume_with_other_optim_args_raises(tmp_path):
    origin = describe_origin({"optim": "timm/lion"}, {})
    ResumeState(1, [0.0], 1, 1, 1, origin=origin).save(tmp_path)
    check_origin(str(tmp_path), origin)
    with pytest.raises(RecipeError, match=r"^optim_args: "):
        check_origin(str(tmp_path), describe_origin({"optim": "timm/lion", "optim_args": "caution=True"}, {}))


@pytest.mark.parametrize(
    ("old", "new", "option"),
    [
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, {"lr_scheduler_type": "cosine"}, "lr_scheduler_type"),
        ({"lr_scheduler_type": "linear"}, {"lr_scheduler_type": "greedy"}, "lr_scheduler_type"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"factor": 0.5}},
            {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"factor": 0.1}},
            "lr_scheduler_kwargs",
        ),
        (
            {"lr_scheduler_type": "greedy", "metric_for_best_model": "accuracy"},
            {"lr_scheduler_type": "greedy", "metric_for_best_model": "loss"},
            "metric_for_best_model",
        ),
    ],
)
def test_resume_with_another_schedule_that_follows_evaluations_raises(tmp_path, old, new, option):
    ResumeState(1, [0.0], 1, 1, 1, origin=describe_origin(old, SPLITS)).save(tmp_path)
    check_origin(str(tmp_path), describe_origin(old, SPLITS))
    with pytest.raises(RecipeError, match=rf"^{option}: "):
        check_origin(str(tmp_path), describe_origin(new, SPLITS))


def test_resume_with_another_schedule_of_steps_continues(tmp_path):
    recipes = ({"lr_scheduler_type": "cosine"}, {"lr_scheduler_type": "linear", "metric_for_best_model": "loss"})
    old, new = (describe_origin(recipe, SPLITS) for recipe in recipes)
    ResumeState(1, [0.0], 1, 1, 1, origin=old).save(tmp_path)
    check_origin(str(tmp_path), new)


@pytest.mark.parametrize("schedule", ["cosine", "reduce_lr_on_plateau"])
def test_changed_layer_decay_applies_after_a_resume(tmp_path, schedule):
    class Read(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            read.append([group["lr"] for group in optimizer.param_groups])

    rates = {}
    for name, changes in (("same", {}), ("changed", {"layer_decay": 0.5, "learning_rate": 1e-3})):
        read = rates[name] = []
        values = {"layer_decay": 0.75, "learning_rate": 3e-3, "lr_scheduler_type": schedule}
        for callback in (Stop(), Read()):
            trainer = make_trainer(tmp_path / name, [callback], **values)
            trainer.origin = describe_origin(values, SPLITS)
            if isinstance(callback, Stop):
                with pytest.raises(KeyboardInterrupt):
                    trainer.train()
                values |= changes
            else:
                trainer.train(str(tmp_path / name / "checkpoint-5"))
    assert len(rates["same"]) == len(rates["changed"]) == 5
    for same, changed in zip(rates["same"], rates["changed"], strict=True):
        # head, 2 blocks and stem, with and without weight decay
        factors = [(0.5 / 0.75) ** layer / 3 for layer in (0, 0, 1, 1, 2, 2, 3, 3)]
        assert changed == pytest.approx([rate * factor for rate, factor in zip(same, factors, strict=True)])


@pytest.mark.parametrize("before", [{"eval_strategy": "steps", "eval_steps": 5}, {"eval_strategy": "epoch"}])
def test_changed_intervals_apply_after_a_resume(tmp_path, before):
    checkpoint = interrupted(tmp_path, logging_steps=5, **before)
    resumed = make_trainer(tmp_path, logging_steps=2, eval_strategy="steps", eval_steps=3)
    resumed.train(str(checkpoint))
    steps = {key: [log["step"] for log in resumed.state.log_history if key in log] for key in ("loss", "eval_loss")}
    assert steps == {"loss": [5, 6, 8, 10], "eval_loss": [5, 6, 9, 10]}


def test_resume_names_every_changed_key(killed_run, caplog):
    with caplog.at_level(logging.WARNING):
        main([*killed_run, "--learning_rate", "0.001", "--mixup_alpha", "0.2"])
    (message,) = [r.getMessage() for r in caplog.records if r.name == "hfvit.training.resume"]
    assert "learning_rate: 0.003 -> 0.001" in message
    assert "mixup_alpha: 0.0 -> 0.2" in message


def test_run_resumes_from_a_renamed_checkpoint(killed_run, tmp_path):
    moved = shutil.copytree(newest_checkpoint(tmp_path / "out"), tmp_path / "moved" / "best")
    main([*killed_run[:-1], str(moved), "--output_dir", str(tmp_path / "new")])
    main(killed_run)
    files = [tmp_path / folder / "trainer_state.json" for folder in ("new", "out")]
    states = [json.loads(file.read_text()) for file in files]
    logs = [[log["loss"] for log in state["log_history"] if "loss" in log] for state in states]
    assert logs[0] == logs[1]


def test_changed_hyperparameters_of_the_optimizer_apply_after_a_resume(killed_run, tmp_path):
    class Read(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            read.append([(group["lr"], group["betas"], group["eps"]) for group in optimizer.param_groups])

    shutil.copytree(tmp_path / "out", tmp_path / "same")
    groups = {}
    for out, words in (("same", ""), ("out", "--learning_rate 0.001 --adam_beta1 0.5 --adam_epsilon 1e-6")):
        read = groups[out] = []
        main([*killed_run, "--output_dir", str(tmp_path / out), "--logging_steps", "1", *words.split()], [Read()])
    for same, changed in zip(groups["same"], groups["out"], strict=True):
        assert [rate for rate, _, _ in changed] == pytest.approx([rate / 3 for rate, _, _ in same])
        assert {values[1:] for values in changed} == {((0.5, 0.999), 1e-6)}


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("--optim sgd", "optim"),
        ("--optim adafactor", "optim"),
        ("--optim timm/adam", "optim"),
        ("--optim timm/adamw", "optim"),
        ("--max_steps 3", "max_steps"),
        ("--global_batch_size 4", "global_batch_size"),
        ("--num_train_epochs 0.5", "num_train_epochs"),
        ("--freeze backbone", "resume_from_checkpoint"),
        ("--layer_decay 0.7", "resume_from_checkpoint"),
    ],
)
def test_resume_with_what_the_checkpoint_cannot_continue_is_one_error(killed_run, words, option):
    with pytest.raises(HFViTError, match=rf"^{option}: ") as caught:
        main([*killed_run, *words.split()])
    assert_names(caught.value, words.split()[0].removeprefix("--"))


@pytest.mark.parametrize("words", ["--early_stopping_patience 3", "--optim adamw_torch", "--max_steps 9"])
def test_resume_with_a_change_that_a_checkpoint_can_continue(killed_run, tmp_path, words):
    main([*killed_run, *words.split()])
    assert (tmp_path / "out" / "README.md").exists()


def test_best_checkpoint_of_the_end_of_an_epoch_has_its_log(tmp_path):
    def prepared(folder, callbacks=None):
        options = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 5, "logging_strategy": "epoch"}
        return make_trainer(folder, callbacks, metric_for_best_model="loss", num_train_epochs=3, **options)

    assert_resumes_exactly(prepared, tmp_path)
    histories = [
        [(log["step"], "loss" in log, log.get("eval_loss")) for log in json.loads(file.read_text())["log_history"]]
        for file in sorted(tmp_path.glob("*/checkpoint-15/trainer_state.json"))
    ]
    assert len(histories) == 2
    assert histories[0] == histories[1]
    assert [step for step, is_loss, _ in histories[0] if is_loss] == [5, 10, 15]


@pytest.mark.parametrize(("patience", "steps"), [(2, 15), (None, 50), (9, 50)])
def test_early_stopped_run_resumes_with_another_patience(tmp_path, patience, steps):
    options = {"num_train_epochs": 10, "learning_rate": 1e-9, "warmup_steps": 0}
    make_trainer(tmp_path, early_stopping_patience=2, **options).train()
    resumed = make_trainer(tmp_path, early_stopping_patience=patience, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.resumed_at_step == 15
    assert resumed.state.global_step == steps


def test_resume_with_a_metric_that_was_not_computed_before_selects_by_it(tmp_path):
    options = {"num_train_epochs": 2, "learning_rate": 1e-4, "metric_for_best_model": "loss"}
    make_trainer(tmp_path, **options).train()
    resumed = make_trainer(tmp_path, **options | {"num_train_epochs": 4, "metric_for_best_model": "auc"})
    resumed.train(resume_from_checkpoint=True)
    found = [log["eval_auc"] for log in resumed.state.log_history if "eval_auc" in log]
    assert len(found) == 2
    assert resumed.state.best_metric == max(found)


def test_resume_without_changes_reports_none(killed_run, caplog):
    with caplog.at_level(logging.WARNING):
        main(killed_run)
    assert not [record for record in caplog.records if record.name == "hfvit.training.resume"]


def test_split_fingerprints_are_stable_across_processes(colors, tmp_path):
    code = (
        "import datasets, json, pathlib, sys\n"
        "datasets.config.HF_DATASETS_CACHE = pathlib.Path(sys.argv[2])\n"
        "from hfvit.data.factory import load_splits\n"
        "from hfvit.recipe.arguments import DataArguments\n"
        "splits = load_splits(DataArguments(sys.argv[1], max_train_samples=40), seed=3).metadata['splits']\n"
        "print(json.dumps({role: split['fingerprint'] for role, split in splits.items()}))"
    )
    # Of another process, whose hashes have another seed.
    result = run_command(sys.executable, "-c", code, colors, tmp_path / "cache", PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    splits = load_splits(DataArguments(str(colors), max_train_samples=40), seed=3).metadata["splits"]
    assert json.loads(result.stdout) == {role: split["fingerprint"] for role, split in splits.items()}
    assert set(splits) == {"train", "validation", "test"}


def test_run_files_follow_the_umask(recipe, tmp_path):
    before = os.umask(0o027)
    try:
        main([str(recipe), "--max_steps", "1"])
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir() if file.is_file()}
    assert set(modes.values()) == {0o640}, modes


def test_run_after_a_kill_in_the_last_save_leaves_no_temporary_files(recipe, tmp_path):
    staging = tmp_path / "out" / ".saving"
    staging.mkdir(parents=True)
    (staging / ".tmpAbC123").write_bytes(b"half of the weights")
    main([str(recipe), "--max_steps", "1"])
    assert not staging.exists()
    assert not [file for file in (tmp_path / "out").rglob("*") if file.name.startswith(".")]


def test_final_files_are_synced_before_the_checkpoints_are_deleted(recipe, tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda *paths: (calls.append(f"rename {paths[0]}"), rename(*paths)))
    main([str(recipe)])
    out = tmp_path / "out"
    deleted = next(place for place, call in enumerate(calls) if call.startswith(f"rename {out}/checkpoint-"))
    synced = set(calls[:deleted])
    for name in ("config.json", "model.safetensors", "run.json", "recipe.yaml", "README.md", "trainer_state.json"):
        assert str(out / name) in synced, name
    assert str(out) in synced
    assert not list(out.glob("checkpoint-*"))


def test_losses_are_finite_after_any_resume(tmp_path):
    checkpoint = interrupted(tmp_path)
    trainer = make_trainer(tmp_path)
    trainer.train(str(checkpoint))
    assert np.isfinite(losses(trainer)).all()
    with pytest.raises(HFViTError, match=r"^resume_from_checkpoint: "):
        make_trainer(tmp_path).train(str(tmp_path / "checkpoint-99"))


def test_full_disk_below_the_final_model_is_one_error(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    before = {path.name for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))  # less than the weights
    try:
        with pytest.raises(StorageError, match=r"^output_dir: ") as caught:
            trainer.save_model(str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_names(caught.value, tmp_path, trainer.checkpoints.last)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_shared_memory_that_is_too_small_for_workers_is_one_error(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    check_shared_memory(2)
    monkeypatch.setattr(multiprocessing.get_context(), "Semaphore", full)
    check_shared_memory(0)
    with pytest.raises(RecipeError, match=r"^dataloader_num_workers: "):
        make_trainer(tmp_path, dataloader_num_workers=2).train()


def test_worker_that_is_killed_is_one_error(tmp_path):
    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step >= 6:
                for child in multiprocessing.active_children():
                    child.kill()

    # Within an epoch and without evaluations, so that nothing forks: if torch's handler of SIGCHLD raises its error
    # within a fork, this thread keeps the lock of `logging`, for which threads of later tests wait.
    options = {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 5}
    with pytest.raises(StorageError, match=r"^dataloader_num_workers: ") as caught:
        make_trainer(tmp_path, [Kill()], dataloader_num_workers=1, num_train_epochs=5, **options).train()
    assert_names(caught.value, "--resume_from_checkpoint auto")


@pytest.mark.parametrize(
    ("error", "workers", "lost"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 1, True),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), 1, True),
        (ConnectionResetError(104, "Connection reset by peer"), 1, True),
        (EOFError(), 1, True),
        (ConnectionResetError(104, "Connection reset by peer"), 0, False),
        (ConnectionError("Caught ConnectionError in DataLoader worker process 0."), 1, False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 1, False),
    ],
)
def test_is_lost_worker_knows_both_ways_to_notice(error, workers, lost):
    assert is_lost_worker(error, workers) is lost


def test_describe_changes_takes_defaults_for_keys_of_later_versions():
    before = {"recipe": {"seed": 1}, "splits": {}}
    assert describe_changes(before, {"recipe": {"seed": 1, "on_bad_image": "error"}, "splits": {}}) == []
    (change,) = describe_changes(before, {"recipe": {"seed": 1, "on_bad_image": "skip"}, "splits": {}})
    assert_names(change, "on_bad_image", "error", "skip")
    (change,) = describe_changes(before, {"recipe": {"seed": 1, "crop_mode": "squash"}, "splits": {}})
    assert_names(change, "crop_mode", "center", "squash")
