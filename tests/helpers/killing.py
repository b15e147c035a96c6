"""Kill trainings, and send them signals.

`Killer` runs jobs (`python -m helpers.killing JOB RANK`) in forks of a process that has imported all libraries; their
output goes to files beside `log` (by default `out`). A job trains the micro Trainer (`options`), or calls
`hfvit.pipeline.main` (`argv`; with `machines`, each process simulates a machine and gets these additional arguments,
and with `caches` its own cache of datasets). `environment` adds environment variables.
It is killed, or gets a signal, at its n-th file operation below `out`, or after a step. Python's audit hook counts
file operations: opening a file, and each rename and deletion.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from helpers.commands import ROOT, command_environment, fork_server, free_port

OPERATIONS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")


class Killer:
    """Run jobs and return their exit codes, negative for a signal."""

    def run(self, out: Path, **job) -> list[int]:
        """Run the processes of a job.

        If one fails, the others are killed as by a launcher, unless they are `alone`.
        """
        job = {"out": str(out), **job}
        world = job.get("processes", 1)
        port = free_port()
        forks = [self._start(job, rank, world, port) for rank in range(world)]
        while None in [fork.poll() for fork in forks]:
            if any(fork.returncode for fork in forks) and not job.get("alone"):
                for fork in forks:
                    fork.kill()
            time.sleep(0.005)
        return [fork.returncode for fork in forks]

    def _start(self, job: dict, rank: int, world: int, port: int):
        environment = command_environment(**job.get("environment", {}))
        if world > 1:
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            if "machines" in job:
                places |= {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
            places |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment |= {key: str(value) for key, value in places.items()}
        words = ["python", "-m", "helpers.killing", json.dumps(job), str(rank)]
        with open(f"{job.get('log', job['out'])}.{rank}.log", "w") as log:
            return fork_server().start(words, ROOT / "tests", environment, log.fileno(), log.fileno())


@contextmanager
def launched_until_a_checkpoint(words: list[str], out: Path):
    """Launch a training, wait for its first checkpoint, and kill it at the end."""
    import psutil

    from hfvit.artifacts.checkpoint import newest_checkpoint

    process = psutil.Popen(
        words, cwd=ROOT, env=command_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 200
        while not newest_checkpoint(out):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "no checkpoint appeared"
            time.sleep(0.002)
        yield process
    finally:
        if process.poll() is None:
            # The launcher first: it would notice a killed worker and stop the others.
            family = [process, *process.children(recursive=True)]
            for member in family:
                member.kill()
            psutil.wait_procs(family, timeout=60)


def _work(job: dict, rank: int) -> int:
    from hfvit import pipeline
    from hfvit.training.distributed import run_one_of_many

    if job.get("rank", rank) == rank and "operation" in job:
        _kill_at_operation(job["out"], job["operation"])
    callbacks = [_after_step(**job["after"])] if job.get("rank", rank) == rank and "after" in job else []
    if "caches" in job:
        import datasets

        datasets.config.HF_DATASETS_CACHE = Path(job["caches"][rank])
    if "argv" in job:
        own = job["machines"][rank] if "machines" in job else []
        return run_one_of_many(lambda: pipeline.main([*job["argv"], *own], callbacks))
    return run_one_of_many(lambda: _train(job, callbacks))


def _kill_at_operation(out: str, number: int) -> None:
    """Send SIGKILL at file operation `number`, counted from 1.

    If it is 0, log all operations to a file.
    """
    done = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal done
        if event in OPERATIONS and any(isinstance(arg, (str, Path)) and f"{out}/" in f"{arg}/" for arg in args[:2]):
            done += 1
            if done == number:
                os.kill(os.getpid(), signal.SIGKILL)
            if not number:
                os.write(lines, f"{event} {args[event == 'os.rename']}\n".encode())

    lines = os.open(f"{out}.operations", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.addaudithook(hook)


def _after_step(step: int, send: int = 0, group: bool = False, file_bytes: int = 0, again: bool = False):
    """Return a callback that sends a signal, or limits the file size, after a step."""
    import resource

    from transformers import TrainerCallback

    class AfterStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step and file_bytes:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
            elif state.global_step == step:
                for _ in range(1 + again):
                    (os.killpg if group else os.kill)(os.getpid(), send)
                    time.sleep(0.2 * group)  # until the signal has reached the group

    return AfterStep()


def _train(job: dict, callbacks: list) -> None:
    from helpers.micro_trainer import make_trainer
    from safetensors.torch import save_file
    from timm.layers import DropPath

    from hfvit.artifacts.output_dir import claim_output_dir

    out = job["out"]
    trainer = make_trainer(out, callbacks, **job["options"])
    if "fits" in job:
        _limit_memory(trainer, **job["fits"])
    trainer._measure_device = lambda: None  # takes most of the time of a short run
    if "network" not in job["options"]:
        trainer.model.timm_model.blocks[0].drop_path1 = DropPath(job.get("drop_path", 0.3))
    with trainer.args.main_process_first(local=False):
        checkpoint = claim_output_dir(out, "auto", overwrite=False, is_main=trainer.args.should_save)
    trainer.train(checkpoint)
    if trainer.args.process_index == 0:
        kept = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy", "step", "epoch")
        history = [{key: entry[key] for key in kept if key in entry} for entry in trainer.state.log_history[:-1]]
        out = job.get("log", out)
        Path(f"{out}.events").write_text(json.dumps(trainer.events))
        end = {"history": history, "best": trainer.state.best_metric, "best_step": trainer.state.best_global_step}
        Path(f"{out}.json").write_text(json.dumps(end))
        save_file(trainer.model.state_dict(), f"{out}.safetensors")


def _limit_memory(trainer, rank: int, images: int, from_step: int = 0) -> None:
    """Simulate an out-of-memory error in training with more images than this."""
    import torch

    forward = trainer.model.timm_model.forward_features

    def limited(pixel_values, *args, **kwargs):
        features = forward(pixel_values, *args, **kwargs)
        is_due = trainer.state.global_step >= from_step and torch.is_grad_enabled()
        if trainer.args.process_index == rank and is_due and len(pixel_values) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return features

    trainer.model.timm_model.forward_features = limited


if __name__ == "__main__":
    os.setpgid(0, 0)
    sys.exit(_work(json.loads(sys.argv[1]), int(sys.argv[2])))
