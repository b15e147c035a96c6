"""Run trainings in forks of one process that has imported all libraries, and kill them.

`Killer` starts that process (`python -m helpers.killing FOLDER`). It reads one JSON job per line and answers with the
exit codes of the job's processes; their output goes to a file beside `log` (by default `out`). A job trains the micro
Trainer (`options`), or calls `hfvit.multirun.main` (`argv`; with `machines`, each process simulates a machine and gets
these additional arguments). It is killed, or gets a signal, at its n-th file operation below `out`, or after a step.
Python's audit hook counts file operations: opening a file, and each rename and deletion.
"""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

OPERATIONS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")


class Killer:
    """Process that forks; `run` executes a job and returns the exit codes, negative for a signal."""

    def __init__(self, folder: Path):
        words = [sys.executable, "-m", "helpers.killing", str(folder)]
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        )

    def run(self, out: Path, **job) -> list[int]:
        self.process.stdin.write(json.dumps({"out": str(out), **job}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


@contextmanager
def launched_until_a_checkpoint(words: list[str], out: Path):
    """Launch a training, wait for its first checkpoint, and kill all its processes at the end."""
    import psutil
    from helpers.commands import ROOT

    from hfvit.artifacts.checkpoint import newest_checkpoint

    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    process = psutil.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
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


def serve(folder: Path) -> None:
    import datasets
    import evaluate  # noqa: F401 (imported where it is used, and so are the next two)
    import helpers.micro_trainer  # noqa: F401
    import scipy.stats  # noqa: F401
    import sklearn.metrics  # noqa: F401
    from PIL import Image

    import hfvit.multirun  # noqa: F401 (imported before the forks)

    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    Image.init()  # otherwise each fork imports Pillow's plugins
    gc.freeze()  # otherwise garbage collection copies the shared pages in each fork
    for line in sys.stdin:
        job = json.loads(line)
        world = job.get("processes", 1)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [_fork(job, rank, world, port) for rank in range(world)]
        print(json.dumps(_wait(children, alone=job.get("alone", False))), flush=True)


def _wait(children: list[int], alone: bool) -> list[int]:
    """Return exit codes; if one process fails, kill the others as a launcher does, unless `alone`."""
    codes = {}
    while len(codes) < len(children):
        pid, status = os.wait()
        if pid not in children:
            continue
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] and not alone:
            for other in set(children) - set(codes):
                os.kill(other, signal.SIGKILL)
    return [codes[pid] for pid in children]


def _fork(job: dict, rank: int, world: int, port: int) -> int:
    if pid := os.fork():
        return pid
    log = os.open(f"{job.get('log', job['out'])}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.setpgid(0, 0)
    if world > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        if "machines" in job:
            places |= {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        os.environ |= {**{key: str(value) for key, value in places.items()}, "ACCELERATE_USE_CPU": "true"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = 1
    try:
        code = _work(job, rank)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _work(job: dict, rank: int) -> int:
    from hfvit import multirun
    from hfvit.training.distributed import run_one_of_many

    if job.get("rank", rank) == rank and "operation" in job:
        _kill_at_operation(job["out"], job["operation"])
    callbacks = [_after_step(**job["after"])] if job.get("rank", rank) == rank and "after" in job else []
    if "argv" in job:
        own = job["machines"][rank] if "machines" in job else []
        return run_one_of_many(lambda: multirun.main([*job["argv"], *own], callbacks))
    return run_one_of_many(lambda: _train(job, callbacks))


def _kill_at_operation(out: str, number: int) -> None:
    """Send SIGKILL at file operation `number`, counted from 1; if it is 0, log all operations to a file."""
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
    """Simulate an out-of-memory error in training with more than this number of images."""
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
    serve(Path(sys.argv[1]))
