"""Scripts for SLURM, Ray, SkyPilot and Hugging Face's jobs."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time

import pytest
import yaml
from helpers.commands import ROOT
from helpers.loopback_hub import LoopbackHub

import hfvit.cli

EXAMPLES = ROOT / "examples"


def run_script(*words, **environment):
    words = [str(word) for word in words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=280, cwd=environment["CWD"])


SRUN = """\
echo srun "$@" >> calls
trap 'echo saved >> calls; exit 75' TERM
[ -n "$SRUN_CODE" ] && exit "$SRUN_CODE"
while true; do sleep 0.05; done
"""


@pytest.mark.parametrize("code", [0, 2, None])
def test_slurm_script_launches_torchrun_and_requeues_a_stopped_run(tmp_path, code):
    """Run the script with commands that print how they were called; without a code, SLURM stops the job."""
    for name, body in {"scontrol": 'echo scontrol "$@" >> calls; echo node1', "srun": SRUN}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_GPUS_ON_NODE": "4",
    }
    job |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SRUN_CODE": "" if code is None else str(code)}
    words = ["bash", EXAMPLES / "slurm" / "train.sbatch", "vit_base", "--output_dir", "/shared/my out"]
    script = subprocess.Popen([str(word) for word in words], cwd=tmp_path, env={**os.environ, **job})
    calls = tmp_path / "calls"
    if code is None:
        deadline = time.monotonic() + 20
        while not calls.exists() or "srun" not in calls.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)  # to set the trap
        script.send_signal(signal.SIGTERM)
    assert script.wait(20) == (75 if code is None else code)
    lines = calls.read_text().splitlines()
    assert lines[0] == "scontrol show hostnames node[1-2]"
    assert lines[1].startswith("srun --kill-on-bad-exit=0 torchrun --nnodes=2 --nproc-per-node=4 ")
    assert "--rdzv-id=7 --rdzv-backend=c10d --rdzv-endpoint=node1:29500 -m hfvit.train vit_base" in lines[1]
    assert lines[1].endswith("--output_dir /shared/my out --resume_from_checkpoint auto")
    assert lines[2:] == (["saved", "scontrol requeue 7"] if code is None else [])


def test_skypilot_file_parses():
    task = yaml.safe_load((EXAMPLES / "skypilot" / "train.yaml").read_text())
    assert {"resources", "setup", "run", "envs"} <= set(task)
    assert "-m hfvit.train" in task["run"]
    assert subprocess.run(["bash", "-n"], input=task["run"], text=True).returncode == 0


def test_job_without_repository_exits_before_training(tmp_path):
    result = run_script(sys.executable, EXAMPLES / "hf_job.py", "quickstart", CWD=str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.startswith("hub_model_id: ")


@pytest.mark.parametrize("spelling", ["--output_dir out", "--output_dir=out", "--output-dir=out"])
def test_job_keeps_an_output_dir_in_any_spelling(monkeypatch, spelling):
    started = []
    monkeypatch.setattr(hfvit.cli, "main", started.append)
    monkeypatch.setattr(sys, "argv", ["hf_job.py", "quickstart", "--hub-model-id=user/job", *spelling.split()])
    runpy.run_path(str(EXAMPLES / "hf_job.py"), run_name="__main__")
    assert started == [["train", "quickstart", "--hub-model-id=user/job", *spelling.split(), "--push_to_hub", "true"]]


def test_job_pushes_its_run(tmp_path, recipe, monkeypatch):
    words = ["hf_job.py", str(recipe), "--hub_model_id", "user/job", "--num_train_epochs", "1"]
    with LoopbackHub() as hub:
        hub.take_over(monkeypatch, tmp_path)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EXAMPLES / "hf_job.py"), run_name="__main__")
        assert not ended.value.code
        assert {"model.safetensors", "README.md"} <= set(hub.model("user/job").files())
    assert (tmp_path / "outputs" / "job" / "run.json").exists()


@pytest.mark.slow
@pytest.mark.integration
def test_ray_trains_on_two_workers(tmp_path, recipe):
    pytest.importorskip("ray")
    out = tmp_path / "out"
    words = (sys.executable, EXAMPLES / "ray" / "train.py", recipe, "--num_workers", "2", "--output_dir", out)
    result = run_script(*words, CWD=str(tmp_path), RAY_TRAIN_V2_ENABLED="1")
    assert result.returncode == 0, result.stderr
    training = json.loads((out / "run.json").read_text())["training"]
    assert training["processes"] == 2
