"""Two simulated machines, a killed process, and FSDP, on the CPU over the loopback."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from helpers.commands import ROOT, free_port, run_command
from helpers.killing import Killer
from helpers.messages import assert_names, last_error
from helpers.micro_trainer import make_trainer
from helpers.recipes import MICRO_RECIPE
from safetensors.torch import load_file

from hfvit.artifacts.checkpoint import newest_checkpoint
from hfvit.errors import run
from hfvit.pipeline import main

CONFIGS = ROOT / "accelerate_configs"
FIRST = "127.0.0.2"  # rendezvous address


@pytest.fixture(scope="module")
def micro(tmp_path_factory, colors):
    path = tmp_path_factory.mktemp("recipe") / "micro.yaml"
    path.write_text(f"{MICRO_RECIPE}dataset_name: {colors}\noutput_dir: unused\nuse_cpu: true\n")
    return path


@pytest.fixture(scope="module")
def single(micro, tmp_path_factory):
    """Train the recipe in one process."""
    out = tmp_path_factory.mktemp("single") / "out"
    assert run(lambda: main([str(micro), "--output_dir", str(out)])) == 0
    return out


def read_record(folder):
    return json.loads((folder / "run.json").read_text())


def step_losses(folder):
    return [entry["loss"] for entry in read_record(folder)["history"] if "loss" in entry]


def assert_same_result(several, single):
    assert step_losses(several) == pytest.approx(step_losses(single), rel=1e-3)
    for role, images in (("validation", 13), ("test", 31)):
        one, two = read_record(single)["metrics"][role], read_record(several)["metrics"][role]
        assert two["images"] == images
        assert two["confusion_matrix"] == one["confusion_matrix"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)


class Machines:
    """Run two simulated machines of one process each, and collect their output."""

    def __init__(self, logs: Path, *words):
        port = free_port(FIRST)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.logs = [logs / f"machine{rank}.txt" for rank in range(2)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            launch = ["accelerate", "launch", "--config_file", CONFIGS / "multi_cpu.yaml", "--num_machines", "2"]
            launch += ["--machine_rank", rank, "--main_process_ip", FIRST, "--main_process_port", port]
            command = [str(word) for word in (*launch, "hfvit/train.py", *words)]
            with log.open("w") as file:
                environment = {**os.environ, "PATH": path}
                self.processes.append(
                    psutil.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for rank in range(2):
            self.kill(rank)

    def kill(self, rank: int) -> None:
        """Send SIGKILL to the launcher and its processes, like a power cut."""
        if self.processes[rank].is_running():
            family = [self.processes[rank], *self.processes[rank].children(recursive=True)]
            for member in family:
                member.kill()
            psutil.wait_procs(family, timeout=30)

    def printed(self, rank: int) -> str:
        return self.logs[rank].read_text()


@pytest.mark.slow
@pytest.mark.integration
def test_two_machines_equal_a_single_process(micro, single, tmp_path):
    out = tmp_path / "out"
    with Machines(tmp_path, micro, "--output_dir", out) as machines:
        codes = [process.wait(timeout=200) for process in machines.processes]
        assert codes == [0, 0], machines.printed(0) + machines.printed(1)
    assert read_record(out)["training"]["processes"] == 2
    assert_same_result(out, single)
    assert {str(path.relative_to(out)) for path in out.rglob("*")} == {
        str(path.relative_to(single)) for path in single.rglob("*")
    }
    table = re.compile(r"^test +31 ", re.MULTILINE)
    assert table.search(machines.printed(0))
    assert not table.search(machines.printed(1))


@pytest.mark.slow
@pytest.mark.integration
def test_run_with_a_killed_machine_ends_with_an_error_and_resumes(micro, tmp_path):
    out = tmp_path / "out"
    words = [micro, "--output_dir", out, "--num_train_epochs", "3000", "--eval_strategy", "steps", "--eval_steps", "4"]
    with Machines(tmp_path, *words) as machines:
        deadline = time.monotonic() + 200
        while not newest_checkpoint(out):
            assert time.monotonic() < deadline, machines.printed(0)
            assert machines.processes[0].poll() is None, machines.printed(0)
            time.sleep(0.02)
        machines.kill(1)
        assert machines.processes[0].wait(timeout=60) != 0
        assert_names(last_error(machines.printed(0)), "--resume_from_checkpoint auto")
    saved = int(newest_checkpoint(out).name.removeprefix("checkpoint-"))
    again = [*words, "--max_steps", saved + 4, "--resume_from_checkpoint", "auto"]
    assert run(lambda: main([str(word) for word in again])) == 0
    assert read_record(out)["training"]["resumed_at_step"] == saved
    assert read_record(out)["training"]["steps"] == saved + 4


@pytest.mark.slow
@pytest.mark.integration
def test_elastic_run_waits_for_a_lost_machine_and_resumes(micro, tmp_path):
    """`torchrun` with the c10d rendezvous: the machine that is left starts again when another one has joined."""
    out, port = tmp_path / "out", free_port(FIRST)
    words = ["torchrun", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
    words += ["--rdzv-id=elastic", f"--rdzv-endpoint={FIRST}:{port}"]
    run_words = ["-m", "hfvit.train", str(micro), "--output_dir", str(out), "--num_train_epochs", "40"]
    run_words += ["--resume_from_checkpoint", "auto"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    # With a shared store, the address of a later round is not published to machines that are new (torch 2.14).
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"

    def machine(is_host=False):
        # On one computer, both would be at the address of the rendezvous.
        command = [*words, f"--rdzv-conf=is_host={is_host}", *run_words]
        return psutil.Popen(command, cwd=tmp_path, env=environment)

    machines = [machine(is_host=True), machine()]
    try:
        deadline = time.monotonic() + 120
        while not list(out.glob("checkpoint-*")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for process in [*machines[1].children(recursive=True), machines[1]]:
            process.kill()
        machines[1].wait()
        machines[1] = machine()
        assert [process.wait(240) for process in machines] == [0, 0]
    finally:
        for one in machines:
            for process in [*one.children(recursive=True), one] if one.is_running() else []:
                process.kill()
    training = read_record(out)["training"]
    assert training["processes"] == 2
    assert training["resumed_at_step"] > 0
    assert training["steps"] == 40 * 6


@pytest.mark.slow
@pytest.mark.integration
def test_error_in_two_processes_is_printed_once(micro, tmp_path):
    words = ("--config_file", CONFIGS / "multi_cpu.yaml", "--main_process_port", "0", "hfvit/train.py", micro)
    result = run_command("accelerate", "launch", *words, "--output_dir", tmp_path / "out", "--test_split", "tset")
    assert result.returncode != 0
    (printed,) = [line for line in result.stderr.splitlines() if "'tset'" in line]
    assert printed.startswith("hfvit: error: ")
    assert_names(printed, "train, test", "'test'")


@pytest.mark.slow
@pytest.mark.integration
def test_fsdp_equals_a_single_process_and_resumes(micro, single, tmp_path):
    """Use the shipped configuration with two processes on the CPU."""
    values = yaml.safe_load((CONFIGS / "fsdp.yaml").read_text())
    values |= {"use_cpu": True, "num_processes": 2, "mixed_precision": "no"}
    (tmp_path / "fsdp.yaml").write_text(yaml.safe_dump(values))
    words = ("--config_file", tmp_path / "fsdp.yaml", "--main_process_port", "0", "hfvit/train.py", micro)
    out = tmp_path / "out"
    words = ("accelerate", "launch", *words, "--output_dir", out, "--keep_checkpoints", "true")
    result = run_command(*words)
    assert result.returncode == 0, result.stderr
    assert_same_result(out, single)
    (out / "run.json").unlink()  # as if the run had been killed after its first epoch
    shutil.rmtree(out / "checkpoint-12")
    result = run_command(*words, "--resume_from_checkpoint", "auto")
    assert result.returncode == 0, result.stderr
    assert read_record(out)["training"]["resumed_at_step"] == 6
    assert_same_result(out, single)


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_evaluation_with_batch_norm_is_that_of_the_saved_model(tmp_path, ema_decay):
    options = {"network": ["test_resnet", {}], "num_train_epochs": 4, "ema_decay": ema_decay}
    options |= {"per_device_eval_batch_size": 2, "load_best_model_at_end": False}
    out = tmp_path / "out"
    assert Killer().run(out, options=options, processes=2) == [0, 0]
    history = json.loads(out.with_suffix(".json").read_text())["history"]
    trainer = make_trainer(tmp_path / "alone", **options)
    trainer.weight_average = None
    trainer.model.load_state_dict(load_file(out.with_suffix(".safetensors")))
    assert history[-1]["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


def test_processes_draw_different_random_numbers(tmp_path):
    out = tmp_path / "out"
    assert Killer().run(out, options={"num_train_epochs": 1}, processes=2) == [0, 0]
    files = [out / "checkpoint-5" / f"rng_state_{rank}.pth" for rank in range(2)]
    first, second = (torch.load(file, weights_only=False)["cpu"] for file in files)
    assert not torch.equal(first, second)
