"""Exact resume, atomic checkpoint saves and clean stops on SIGTERM and SIGINT."""

import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import rotate_checkpoints

from hfvit.artifacts.checkpoint import commit_checkpoint
from hfvit.artifacts.constants import STAGING, STATE_FILE
from hfvit.errors import InterruptedRunError, StorageError, one_line
from hfvit.training.out_of_memory import FittingTrainer
from hfvit.utils.files import temporary_file

# torchrun passes on to its processes what a terminal or a scheduler has sent to all of them: the same signal twice.
SAME_SIGNAL_SECONDS = 5.0
# Of a data worker, after the signal that was meant for the training: long enough to save, no orphan for ever.
WORKER_SECONDS = 30
# Processes on GPUs ask one another every so many steps: to ask is to wait for the device.
STEPS_BETWEEN_QUESTIONS = 10


class Interrupts:
    """Whether this run was told to stop, and when all its processes do."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received: int | None = None
        self._since = 0.0
        alone = accelerator.num_processes == 1
        self._patience = 0.0 if alone else SAME_SIGNAL_SECONDS
        self._every = 1 if alone or accelerator.device.type == "cpu" else STEPS_BETWEEN_QUESTIONS

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within, the first signal is noted and a later one ends the process at once."""
        if threading.current_thread() is not threading.main_thread():  # Python lets no other set a handler
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
            if self.accelerator.is_main_process:
                text = f"hfvit: {signal.Signals(number).name}: saving after this step; once more ends at once\n"
                os.write(2, text.encode())  # a print may be what was interrupted
        elif time.monotonic() - self._since >= self._patience:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self, step: int) -> int | None:
        """The signal that any process has received, told to all of them at the same `step`; to be called by all."""
        if self.accelerator.num_processes == 1:
            return self.received
        if step % self._every:
            return None
        mine = torch.tensor([self.received or 0], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max()) or None


def start_worker(then: Callable[[int], None] | None, worker: int) -> None:
    """A data worker's `worker_init_fn`: signals to the whole group are for the training, which still needs it.

    torch ends a worker at the first SIGTERM, and the training with it, before it could save.
    """
    if then:
        then(worker)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _outlive)


def _outlive(number: int, frame) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(WORKER_SECONDS)


PROGRESS_FILE = "progress.json"


@dataclass
class Progress:
    """`unlogged_loss` is each process's sum of the losses since `logged_step`; sizes are in images of one device."""

    logged_step: int
    unlogged_loss: list[float]
    device_batch: int
    micro_batch: int
    eval_batch: int
    events: list[dict] = field(default_factory=list)

    @classmethod
    def load(cls, checkpoint: str | Path) -> "Progress":
        return cls(**json.loads((Path(checkpoint) / PROGRESS_FILE).read_text(encoding="utf-8")))

    def save(self, checkpoint: str | Path) -> None:
        with temporary_file(Path(checkpoint) / PROGRESS_FILE) as file:
            file.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def loss_of(self, process: int, processes: int) -> float:
        """The unlogged loss of one of `processes`; their mean where there were others."""
        if len(self.unlogged_loss) == processes:
            return self.unlogged_loss[process]
        return sum(self.unlogged_loss) / len(self.unlogged_loss)


def rewinds(events: list[dict]) -> list[dict]:
    """The events of `nan_policy: rewind`, each with the `step` that is left out from then on."""
    return [event for event in events if event["event"] == "rewind"]


def learning_rate_factor(events: list[dict]) -> float:
    """By what the rewinds have multiplied the learning rate so far."""
    return rewinds(events)[-1]["learning_rate_factor"] if rewinds(events) else 1.0


logger = logging.getLogger(__name__)

TORCH_WRITER = ("PytorchStreamWriter", "inline_container.cc")  # torch.save tells of a full disk by a RuntimeError


class SavingTrainer(FittingTrainer):
    """A Trainer that can be killed at any moment; what it wrote last before that is whole (whole.py)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._interrupts = Interrupts(self.accelerator)
        self._last_checkpoint: str | None = None
        self._is_saving = self._owes_save = False
        self._stopping: int | None = None
        self._closed_step = -1

    def train(self, resume_from_checkpoint: str | None = None, *args, **kwargs):
        """The Trainer's; raises `InterruptedRunError` after a signal, once the run is saved."""
        self._last_checkpoint = resume_from_checkpoint
        if resume_from_checkpoint:
            self._adopt(Progress.load(resume_from_checkpoint))
        with self._interrupts.noted():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _adopt(self, progress: Progress) -> None:
        self.events = progress.events
        if progress.device_batch == self.micro.images and progress.micro_batch < self.micro.size:
            self.micro.shrink(progress.micro_batch)
        self.eval_batch = min(self.eval_batch, progress.eval_batch)

    # Between two steps: stop after a signal; save when everything that belongs to the step is done.

    def _run_epoch(self, *args, num_update_steps_per_epoch: int, **kwargs):
        if self._is_over():
            self.control.should_training_stop = True
            return
        self._steps_an_epoch, self._closed_step = num_update_steps_per_epoch, -1
        super()._run_epoch(*args, num_update_steps_per_epoch=num_update_steps_per_epoch, **kwargs)

    def _is_over(self) -> bool:
        """Whether a resumed run had ended when it was saved: early, or by its last step."""
        callbacks = [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        is_early = any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in callbacks)
        return is_early or self.state.global_step >= self.state.max_steps

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        for callback in self.callback_handler.callbacks:  # the count is the checkpoint's, the patience the recipe's
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience = self.args.early_stopping_patience

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        step = self.state.global_step
        ends_step, self._closed_step = step != self._closed_step, step
        ends_epoch = ends_step and self._is_last_step()
        if ends_step:
            self._stopping = self._interrupts.agreed(step)
        if ends_epoch:  # the Trainer calls again, for what it does at an epoch's end, which a checkpoint must hold
            self._owes_save, self.control.should_save = self.control.should_save, False
        else:
            self.control.should_save |= self._owes_save or self._stopping is not None
            self._owes_save = False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._stopping and not ends_epoch:
            self._stop()

    def _is_last_step(self) -> bool:
        """Whether this step is the last of its epoch."""
        stops = self.control.should_training_stop or self.control.should_epoch_stop
        return stops or self.state.global_step % self._steps_an_epoch == 0

    def _stop(self) -> None:
        if not self.is_world_process_zero():
            raise InterruptedRunError("", way_on="")
        name = signal.Signals(self._stopping).name
        raise InterruptedRunError(f"{name} came; {self._last_checkpoint} holds the run.")

    def _get_dataloader(self, *args, **kwargs):
        loader = super()._get_dataloader(*args, **kwargs)
        loader.worker_init_fn = partial(start_worker, loader.worker_init_fn)
        return loader

    # Checkpoints: written aside by the Trainer, then made whole and given their name.

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / STAGING) if self._is_saving else folder

    def _save_checkpoint(self, model, trial) -> None:
        final = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        staged = final.parent / STAGING / final.name
        with self._written_aside(final):
            super()._save_checkpoint(model, trial)
            self._name_best(final)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(staged / STATE_FILE)  # again: the best one has its name now
                commit_checkpoint(staged, final)
        if self.args.should_save:
            rotate_checkpoints(str(final.parent), self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        self._last_checkpoint = str(final)

    def _name_best(self, final: Path) -> None:
        """The Trainer looks for the best checkpoint where it writes."""
        if self.state.best_global_step:
            best = final.with_name(f"checkpoint-{self.state.best_global_step}")
            if best == final or best.is_dir():
                self.state.best_model_checkpoint = str(best)

    @contextmanager
    def _written_aside(self, final: Path) -> Iterator[None]:
        only_model = self.args.save_only_model
        self._is_saving, self.args.save_only_model = True, only_model and self._stopping is None
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and not any(name in str(error) for name in TORCH_WRITER):
                raise
            raise self._not_written(final, error) from None
        finally:
            self._is_saving, self.args.save_only_model = False, only_model
            if self.args.should_save:
                shutil.rmtree(final.parent / STAGING, ignore_errors=True)

    def _not_written(self, final: Path, error: Exception) -> StorageError:
        room = ""
        with suppress(OSError):
            room = f"; {shutil.disk_usage(final.parent).free / 2**20:,.0f} MiB are free there"
        told = getattr(error, "strerror", None) or one_line(error)
        if isinstance(error, RuntimeError):
            told = f"the disk took only part of a file: {told}"
        kept = f"{self._last_checkpoint} still stands" if self._last_checkpoint else "none was saved before"
        return StorageError(
            f"{final} could not be written ({told}{room}). {kept}: make room, or save less (save_total_limit)."
        )

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        losses = self.accelerator.gather(self._tr_loss.reshape(1)).tolist()
        if self.args.should_save:
            batches = self.micro.images, self.micro.size, self.eval_batch
            Progress(self._globalstep_last_logged, losses, *batches, self.events).save(output_dir)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        progress = Progress.load(checkpoint)
        loss = progress.loss_of(self.args.process_index, self.args.world_size)
        self._tr_loss, self._globalstep_last_logged = torch.full_like(self._tr_loss, loss), progress.logged_step
