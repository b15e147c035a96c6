"""Atomic checkpoint saves, restored runs, and clean stops on SIGTERM and SIGINT."""

import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy, rotate_checkpoints
from transformers.utils import is_in_notebook

from hfvit.artifacts.checkpoint import MODEL_ONLY, checkpoint_error, commit_checkpoint, is_of_run, remove_checkpoint
from hfvit.artifacts.constants import STAGING, STATE_FILE
from hfvit.errors import InterruptedRunError, ModelError, RecipeError, StorageError, one_line
from hfvit.training.resume import (
    IN_OPTIMIZER,
    ResumeState,
    changes_in_optimizer,
    learning_rate_factor,
    scale_learning_rates,
)
from hfvit.utils.environment import free_shared_memory

logger = logging.getLogger(__name__)

# torchrun forwards signals that a terminal or scheduler also sends to every process, so each arrives twice.
SAME_SIGNAL_SECONDS = 5.0
# Steps between comparisons of signals on GPUs, as gathering synchronizes with the device.
STEPS_BETWEEN_CHECKS = 10


class StopSignals:
    """Record SIGTERM and SIGINT during training, and let all processes agree to stop."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received: int | None = None
        self._received_at = 0.0
        is_single = accelerator.num_processes == 1
        is_launched = not is_single or "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun
        self._same_signal_seconds = SAME_SIGNAL_SECONDS if is_launched else 0.0
        self._every = 1 if is_single or accelerator.device.type == "cpu" else STEPS_BETWEEN_CHECKS

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Record the first signal within the context; a later one ends the process.

        In a notebook or a Python prompt, a later SIGINT raises `KeyboardInterrupt` instead.
        """
        self.received = None  # a signal of an earlier training
        if threading.current_thread() is not threading.main_thread():  # only it may set handlers
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
            self.received = number
            self._received_at = time.monotonic()
            if self.accelerator.is_main_process:
                name = signal.Signals(number).name
                text = f"hfvit: received {name}: saving after this step. Send it again to stop immediately.\n"
                os.write(2, text.encode())  # print is not safe in a signal handler
        elif number == signal.SIGINT and (is_in_notebook() or hasattr(sys, "ps1")):
            raise KeyboardInterrupt
        elif time.monotonic() - self._received_at >= self._same_signal_seconds:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self, step: int) -> int | None:
        """Return the signal that any process received; must be called by every process."""
        if self.accelerator.num_processes == 1:
            return self.received
        if step % self._every:
            return None
        received = torch.tensor([self.received or 0], device=self.accelerator.device)
        return int(self.accelerator.gather(received).max()) or None


# torch.save raises RuntimeError with these names for a full disk.
TORCH_WRITER = ("PytorchStreamWriter", "inline_container.cc")


class CheckpointWriter(TrainerCallback):
    """Write checkpoints atomically, restore resumed runs, and stop after a signal.

    The Trainer writes to a staging directory; `artifacts.checkpoint` then syncs it, writes a manifest and renames it.
    The save of an epoch's last step is postponed to the end of the epoch, so that the checkpoint has its evaluation
    and log; with `save_strategy: best`, so is the evaluation that decides on it.

    Args:
        trainer: the `HFViTTrainer` that owns this callback.

    Attributes:
        last: the last checkpoint that was written or resumed from.
        is_restored: whether the checkpoint of a resumed run has been read completely.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.signals = StopSignals(trainer.accelerator)
        self.last: str | None = None
        self.is_restored = True
        self._stopping: int | None = None
        self._postponed_save = False
        self._postponed_evaluation = False
        self._only_by_signal = False

    # Callbacks

    def on_train_begin(self, args, state, control, **kwargs):
        self._postponed_save = False
        self._postponed_evaluation = False
        state.num_train_epochs = self.trainer.num_train_epochs
        if self.trainer.resumed_from:
            # The Trainer keeps the intervals of the checkpoint (transformers 5.24).
            state.compute_steps(args, state.max_steps)
            self._restore(self.trainer.resumed_from)

    def on_step_begin(self, args, state, control, **kwargs):
        self.is_restored = True

    def on_step_end(self, args, state, control, **kwargs):
        self._stopping = self.signals.agreed(state.global_step)
        ends_training = control.should_training_stop or control.should_epoch_stop
        if ends_training or state.global_step % self.trainer.steps_per_epoch == 0:
            self._postponed_save = control.should_save
            control.should_save = False
            if args.save_strategy == SaveStrategy.BEST:
                self._postponed_evaluation = control.should_evaluate
                control.should_evaluate = False
        else:
            self._save_if_stopping(control)

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save |= self._postponed_save
        control.should_evaluate |= self._postponed_evaluation
        self._save_if_stopping(control)
        self._postponed_save = False
        self._postponed_evaluation = False

    def _save_if_stopping(self, control) -> None:
        if self._stopping is not None:
            self._only_by_signal = not control.should_save
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self._stopping is None:
            return
        if not state.is_world_process_zero:
            raise InterruptedRunError("", resume_hint="")
        raise InterruptedRunError(f"Received {signal.Signals(self._stopping).name}. Saved {self.last}.")

    # Restore

    def _restore(self, checkpoint: str) -> None:
        trainer = self.trainer
        self._check_steps(checkpoint)
        self._check_optimizer(checkpoint)
        trainer.load_extra_state(checkpoint)
        trainer.restore_loss(trainer.resume_state)
        self._restore_best(Path(checkpoint))
        self._apply_changes()
        for callback in trainer.callback_handler.callbacks:
            # The checkpoint restores the counter, but the patience is the recipe's.
            if isinstance(callback, EarlyStoppingCallback) and trainer.args.early_stopping_patience:
                callback.early_stopping_patience = trainer.args.early_stopping_patience
            if isinstance(callback, ExportableState):  # one that is new has no state in the checkpoint
                trainer.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())

    def _apply_changes(self) -> None:
        """Set values of the recipe that the optimizer's state has overwritten."""
        trainer = self.trainer
        changes = changes_in_optimizer(trainer.resume_state.origin, trainer.origin)
        if not changes:
            return
        if trainer.is_sharded:
            raise RecipeError(
                f"{next(iter(changes))}: cannot change in a resumed run with sharded weights (FSDP, DeepSpeed). Resume"
                " with that of the checkpoint, or start a new run in another output_dir."
            )
        names = {IN_OPTIMIZER[key] for key in changes}
        groups = list(zip(trainer.optimizer.param_groups, trainer.own_groups, strict=True))
        for group, own in groups:
            group |= {name: own[name] for name in names - {"lr"} if name in own}
        if "lr" in names:
            after_rewinds = learning_rate_factor(trainer.events)
            rates = [(group["initial_lr"], own["lr"] * after_rewinds) for group, own in groups]
            factors = [now / before if before else 1.0 for before, now in rates]
            scale_learning_rates(trainer.optimizer, trainer.lr_scheduler, factors)

    def _check_steps(self, checkpoint: str) -> None:
        """Raise `RecipeError` if the run would end before the step of `checkpoint`."""
        state = self.trainer.state
        if state.global_step > state.max_steps:
            key = "max_steps" if self.trainer.args.max_steps > 0 else "num_train_epochs"
            raise RecipeError(
                f"{key}: the run would have {state.max_steps} steps, and {checkpoint} is at step {state.global_step}."
                " Train at least as long, or start a new run in another output_dir."
            )

    def _check_optimizer(self, checkpoint: str) -> None:
        """Raise `ModelError` if `checkpoint` has the state of another optimizer.

        torch would load the state without an error.
        """
        optimizer = self.trainer.optimizer
        if optimizer is None:  # sharded
            return
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        # torch adds `differentiable` to the defaults of every optimizer that loads a state (2.13).
        expected = set(optimizer.defaults) - {"differentiable"}
        missing = {key for group in optimizer.param_groups for key in expected - set(group)}
        if missing:
            optim = self.trainer.args.optim
            raise ModelError(
                f"optim: must be that of the checkpoint, whose state has no {', '.join(sorted(missing))}, got"
                f" '{getattr(optim, 'value', optim)}'. Resume {checkpoint} with its optimizer, or start a new run in"
                " another output_dir."
            )

    def _restore_best(self, checkpoint: Path) -> None:
        """Find and verify the best checkpoint beside `checkpoint` (it may have moved).

        A damaged one is reported and replaced by the next best.
        """
        trainer = self.trainer
        state = trainer.state
        if state.best_global_step is None:
            return
        found = [None]
        if trainer.args.process_index == 0:
            found = [self._best_of(checkpoint)]
        broadcast_object_list(found)
        state.best_global_step, state.best_metric, state.best_model_checkpoint = found[0]

    def _best_of(self, checkpoint: Path) -> tuple[int | None, float | None, str | None]:
        """Return step, metric and folder of the best complete checkpoint, or Nones."""
        trainer = self.trainer
        state = trainer.state
        name = f"eval_{(trainer.args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        metrics = {entry["step"]: entry[name] for entry in state.log_history if name in entry}
        if not metrics:  # best_metric is of another metric_for_best_model
            return None, None, None
        metrics.setdefault(state.best_global_step, state.best_metric)
        others = sorted(metrics, key=metrics.get, reverse=bool(trainer.args.greater_is_better))
        for step in dict.fromkeys([state.best_global_step, *others]):
            folder = checkpoint.with_name(f"checkpoint-{step}")
            if not folder.is_dir() and step != state.best_global_step:
                continue
            error = checkpoint_error(folder, read=folder != checkpoint)
            if error is None or error == MODEL_ONLY:
                return step, metrics[step], str(folder)
            logger.warning("%s, the best checkpoint, is damaged: %s. Using the next best one.", folder, error)
        return None, None, None

    # Save

    def write(self, save: Callable[[], None]) -> None:
        """Write the checkpoint of the current step; must be called by every process.

        Args:
            save: writes `checkpoint-STEP` to `args.output_dir`, as `Trainer._save_checkpoint`.

        Raises:
            StorageError: the disk is full or not writable; earlier checkpoints are not affected.
        """
        trainer = self.trainer
        args = trainer.args
        final = Path(args.output_dir) / f"checkpoint-{trainer.state.global_step}"
        staged = final.parent / STAGING / final.name
        with self._staged(final):
            save()
            if not args.save_only_model:
                self._save_resume_state(staged)
            self._set_best_checkpoint(final)
            trainer.accelerator.wait_for_everyone()
            if args.should_save:
                trainer.state.save_to_json(str(staged / STATE_FILE))  # with the final path of the best checkpoint
                commit_checkpoint(staged, final)
        if args.should_save:
            self._remove_extra_checkpoint(final)
            if not (args.soup and self._only_by_signal):  # a member of the soup would make room for the extra one
                rotate_checkpoints(str(final.parent), args.save_total_limit, trainer.state.best_model_checkpoint)
        trainer.accelerator.wait_for_everyone()
        self.last = str(final)

    def _remove_extra_checkpoint(self, final: Path) -> None:
        """Remove the checkpoint that only a signal caused, if the run makes a soup.

        The soup then has the members of a run that was not stopped.

        Args:
            final: the checkpoint that was written.
        """
        trainer = self.trainer
        if not (trainer.args.soup and trainer.resume_state and trainer.resume_state.only_by_signal):
            return
        extra = Path(trainer.resumed_from)
        kept = {final.name, Path(trainer.state.best_model_checkpoint or "").name}
        if extra.is_dir() and is_of_run(extra, final.parent) and extra.name not in kept:
            remove_checkpoint(extra)

    @contextmanager
    def _staged(self, final: Path) -> Iterator[None]:
        """Redirect the Trainer to the staging directory; convert errors to `StorageError`."""
        args = self.trainer.args
        output_dir = args.output_dir
        only_model = args.save_only_model
        args.output_dir = str(final.parent / STAGING)
        args.save_only_model = only_model and self._stopping is None  # a stopped run must be resumable
        try:
            with self.storage_errors(final):
                yield
        finally:
            args.output_dir = output_dir
            args.save_only_model = only_model
            if args.should_save:
                shutil.rmtree(final.parent / STAGING, ignore_errors=True)

    def _save_resume_state(self, staged: Path) -> None:
        trainer = self.trainer
        last_loss = torch.tensor([trainer.non_finite.losses.last_good[0]], device=trainer.args.device)
        own = torch.cat([trainer.unlogged_loss.reshape(1), last_loss.to(trainer.unlogged_loss)])
        losses, last_losses = trainer.accelerator.gather(own).reshape(-1, 2).T.tolist()
        stream_states = trainer.gather_stream_states()
        if trainer.args.should_save:
            trainer.save_extra_state(staged, stream_states)
            memory = trainer.out_of_memory
            ResumeState(
                logged_step=trainer.logged_step,
                unlogged_loss=losses,
                device_batch=memory.micro.images,
                micro_batch=memory.micro.size,
                eval_batch=memory.eval_batch_size,
                events=trainer.events,
                logged_loss=trainer.logged_loss,
                origin=trainer.origin,
                last_loss=last_losses,
                only_by_signal=self._only_by_signal,
            ).save(staged)

    def _set_best_checkpoint(self, final: Path) -> None:
        """Set the best checkpoint, which the Trainer searched in the staging directory."""
        state = self.trainer.state
        if state.best_global_step:
            best = final.with_name(f"checkpoint-{state.best_global_step}")
            if best == final or best.is_dir():
                state.best_model_checkpoint = str(best)

    @contextmanager
    def storage_errors(self, path: Path) -> Iterator[None]:
        """Convert errors of a full disk to `StorageError`, including torch's."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and not any(name in str(error) for name in TORCH_WRITER):
                raise
            raise self._storage_error(path, error) from None

    def _storage_error(self, final: Path, error: Exception) -> StorageError:
        free = ""
        with suppress(OSError):
            free = f"; {shutil.disk_usage(final.parent).free / 2**20:,.0f} MiB free"
        reason = getattr(error, "strerror", None) or one_line(error)
        if isinstance(error, RuntimeError):
            reason = f"a file was truncated: {reason}"
        kept = f"{self.last} is not affected" if self.last else "No checkpoint was saved before"
        return StorageError(
            f"output_dir: {final} cannot be written ({reason}{free}). {kept}. Free disk space, or lower"
            " save_total_limit."
        )

    def lost_worker_error(self, error: Exception) -> StorageError:
        """Create the error for a data loader worker that was killed for lack of memory."""
        kept = f"{self.last} is complete" if self.last else "No checkpoint was saved before"
        return StorageError(
            f"dataloader_num_workers: {one_line(error)[:200]} ({free_shared_memory()}). {kept}. Use fewer workers, or"
            " enlarge the shared memory (docker run --shm-size=1g)."
        )
