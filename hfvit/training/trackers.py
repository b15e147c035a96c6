"""Experiment trackers: the Trainer's integrations with recipe and results.

Figures are logged, too, and a resumed run continues its tracker's run.
"""

import io
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import (
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from hfvit.artifacts.checkpoint import step_of
from hfvit.artifacts.constants import TRACKERS_FILE
from hfvit.errors import RecipeError, one_line, wrap_library_errors
from hfvit.utils.credentials import mask_values
from hfvit.utils.files import write_text

logger = logging.getLogger(__name__)

FIGURES = ("training_images", "learning_curves", "confusion_matrix", "precision_recall", "mistakes")


class ArgumentsWithRecipe:
    """Training arguments whose `to_dict` returns the recipe.

    An integration logs it as the configuration.

    Args:
        args: training arguments.
        values: values of the recipe without credentials.
        **overrides: attributes to replace.
    """

    def __init__(self, args: TrainingArguments, values: dict[str, Any], **overrides: Any):
        self._args = args
        self._values = values
        vars(self).update(overrides)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._args, name)

    def to_dict(self) -> dict[str, Any]:
        """Return the values of the recipe."""
        return self._values

    def to_json_string(self) -> str:
        """Return the values of the recipe as JSON."""
        return json.dumps(self._values, indent=2, default=str)


class Tracker:
    """Mixin for an integration's callback, which keeps its run open for results.

    Args:
        args: training arguments.
        values: values of the recipe without credentials.
        run: identifier of the run to continue, None for a new one.
        step: step that the training continues from.
    """

    integration: ClassVar[type[TrainerCallback]]

    def __init__(self, args: TrainingArguments, values: dict[str, Any], run: str | None, step: int):
        self.args = args
        self.values = values
        self.run = run
        self.step = step
        super().__init__(**self.options())

    def options(self) -> dict[str, Any]:
        """Return arguments of the integration's callback."""
        return {}

    def on_train_end(self, args, state, control, **kwargs):
        """Keep the run open for the results."""

    def on_predict(self, args, state, control, **kwargs):
        """Log nothing: the results are logged at the end."""

    def log_results(self, scalars: dict[str, float], figures: dict[str, Path], step: int) -> None:
        """Log results and figures to the run.

        Args:
            scalars: metrics, `split/metric`.
            figures: PNG files by name.
            step: last step of the training.
        """
        raise NotImplementedError

    def close(self, error: BaseException | None = None) -> None:
        """End the run.

        Args:
            error: exception that ended the training, None if it is finished.
        """
        raise NotImplementedError


class TensorBoardTracker(Tracker, TensorBoardCallback):
    """Log to TensorBoard.

    Event files are in `output_dir/runs/TIME`, or in TENSORBOARD_LOGGING_DIR.
    """

    integration = TensorBoardCallback

    def options(self) -> dict[str, Any]:
        from torch.utils.tensorboard import SummaryWriter

        # A name without folders, whatever the run's trackers.json says.
        self.run = os.path.basename(self.run or "") or datetime.now(UTC).strftime("%Y-%m-%d_%H-%M-%S")
        folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or os.path.join(self.args.output_dir, "runs", self.run)
        # Entries after the checkpoint, which a killed run may have written, are hidden.
        return {"tb_writer": SummaryWriter(folder, purge_step=self.step + 1 if self.step else None)}

    def on_train_begin(self, args, state, control, **kwargs):
        self.tb_writer.add_text("recipe", f"```yaml\n{yaml.safe_dump(self.values, sort_keys=False)}\n```")
        super().on_train_begin(ArgumentsWithRecipe(args, self.values), state, control, **kwargs)

    def log_results(self, scalars: dict[str, float], figures: dict[str, Path], step: int) -> None:
        for name, value in scalars.items():
            self.tb_writer.add_scalar(name, value, step)
        for name, path in figures.items():
            with Image.open(path) as image:
                self.tb_writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self, error: BaseException | None = None) -> None:
        self.tb_writer.close()


class TrackioTracker(Tracker, TrackioCallback):
    """Log to Trackio; the identifier of a run is its name."""

    integration = TrackioCallback
    _end: Callable[[], None] | None = None

    def options(self) -> dict[str, Any]:
        if self.run is None:
            self.run = self.args.run_name or f"{Path(self.args.output_dir).name}-{secrets.token_hex(3)}"
            if self.run in self._runs_of_project():  # it would continue that run
                self.run = f"{self.run}-{secrets.token_hex(3)}"
        return {}

    def _runs_of_project(self) -> set[str]:
        import trackio

        try:
            return {run.name for run in trackio.Api().runs(self.args.project)}
        except ValueError:  # no such project yet
            return set()

    def setup(self, args, state, model, **kwargs):
        """Start the run, without the instructions that trackio prints.

        Args:
            args: training arguments.
            state: state of the Trainer.
            model: model, whose configuration is logged.
            **kwargs: further arguments of the event.
        """
        with redirect_stdout(io.StringIO()):
            super().setup(ArgumentsWithRecipe(args, self.values, run_name=self.run), state, model, **kwargs)

    def log_results(self, scalars: dict[str, float], figures: dict[str, Path], step: int) -> None:
        images = {name: self._trackio.Image(str(path)) for name, path in figures.items()}
        self._trackio.log({**scalars, **images, "train/global_step": step})

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Keep the run open for the results.

        Args:
            args: training arguments.
            state: state of the Trainer.
            control: control of the Trainer.
            model: model, whose card links to the Space of the run, if there is one.
            **kwargs: further arguments of the event.
        """
        self._end = partial(super().on_train_end, args, state, control, model=model)

    def close(self, error: BaseException | None = None) -> None:
        with redirect_stdout(io.StringIO()):
            self._end() if self._end else self._trackio.finish()


class WandbTracker(Tracker, WandbCallback):
    """Log to Weights & Biases."""

    integration = WandbCallback

    def options(self) -> dict[str, Any]:
        os.environ.setdefault("WANDB_SILENT", "true")
        return {}

    def setup(self, args, state, model, **kwargs):
        """Start or continue the run.

        Args:
            args: training arguments.
            state: state of the Trainer.
            model: model, whose configuration is logged.
            **kwargs: further arguments of the event.
        """
        if self._wandb.run is None:
            project = os.environ.get("WANDB_PROJECT", "huggingface")
            self._wandb.init(project=project, name=args.run_name, id=self.run, resume="allow")
        self.run = self._wandb.run.id
        super().setup(ArgumentsWithRecipe(args, self.values), state, model, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        """Upload the model if WANDB_LOG_MODEL is set."""
        WandbCallback.on_train_end(self, args, state, control, **kwargs)

    def log_results(self, scalars: dict[str, float], figures: dict[str, Path], step: int) -> None:
        images = {name: self._wandb.Image(str(path)) for name, path in figures.items()}
        self._wandb.log({**scalars, **images, "train/global_step": step})
        self._wandb.run.summary.update(scalars)

    def close(self, error: BaseException | None = None) -> None:
        self._wandb.finish(exit_code=1 if error else 0)


class MLflowTracker(Tracker, MLflowCallback):
    """Log to MLflow.

    MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME choose store and experiment.
    """

    integration = MLflowCallback

    def setup(self, args, state, model):
        """Start or continue the run, and log the parameters that it does not have yet.

        Args:
            args: training arguments.
            state: state of the Trainer.
            model: not logged; the recipe describes it.
        """
        mlflow = self._ml_flow
        self.is_own = mlflow.active_run() is None
        if self.is_own:
            if name := os.environ.get("MLFLOW_EXPERIMENT_NAME"):
                mlflow.set_experiment(name)
            mlflow.start_run(run_id=self.run, run_name=args.run_name)
        self.run = mlflow.active_run().info.run_id
        logged = mlflow.get_run(self.run).data.params  # cannot be changed
        values = {key: value for key, value in self.values.items() if key not in logged}
        super().setup(ArgumentsWithRecipe(args, values), state, None)

    def log_results(self, scalars: dict[str, float], figures: dict[str, Path], step: int) -> None:
        self._ml_flow.log_metrics(scalars, step=step)
        for path in figures.values():
            self._ml_flow.log_artifact(str(path), "figures")

    def close(self, error: BaseException | None = None) -> None:
        if self.is_own and self._ml_flow.active_run():
            self._ml_flow.end_run("FAILED" if error else "FINISHED")


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "trackio": TrackioTracker,
    "wandb": WandbTracker,
    "mlflow": MLflowTracker,
}


class Tracking(TrainerCallback):
    """Hold the trackers of a run.

    Their identifiers are in `trackers.json`, so that a resumed run continues them.

    Args:
        trainer: trainer whose integrations are replaced by those of `TRACKERS`.
        values: values of the recipe.
        checkpoint: checkpoint that the run resumes from, or None.

    Raises:
        RecipeError: a tracker cannot be started.
    """

    def __init__(self, trainer: Trainer, values: Mapping[str, Any], checkpoint: str | None):
        args = trainer.args
        self.file = Path(args.output_dir) / TRACKERS_FILE
        self.trackers: dict[str, Any] = {}
        self.has_begun = False
        if not args.should_save:
            return
        if not checkpoint:
            self.file.unlink(missing_ok=True)  # of an earlier run
        runs = self._read()
        step = step_of(Path(checkpoint)) if checkpoint else 0
        masked = mask_values(dict(values))
        for name in args.report_to:
            if name in TRACKERS:
                kind = TRACKERS[name]
                trainer.remove_callback(kind.integration)
                # Such as a folder that is not writable; trackers raise various types.
                with wrap_library_errors(RecipeError, f"report_to: {name} cannot be started"):
                    tracker = kind(args, masked, runs.get(name), step)
                self.trackers[name] = tracker
                trainer.add_callback(tracker)
        if self.trackers:
            trainer.add_callback(self)  # after them, so that their runs have begun

    def _read(self) -> dict[str, str]:
        try:
            runs = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # missing or damaged: a new run of the tracker
            return {}
        is_valid = isinstance(runs, dict) and all(isinstance(run, str) for run in runs.values())
        return runs if is_valid else {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.has_begun = True
        runs = {name: tracker.run for name, tracker in self.trackers.items()}
        write_text(self.file, json.dumps(runs, indent=2) + "\n")

    @contextmanager
    def closing(self) -> Iterator[None]:
        """End the trackers' runs at the end of the context, as failed after an exception."""
        error = None
        try:
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            for tracker in self.trackers.values():
                with suppress(Exception):  # the run itself must not fail for its tracker
                    tracker.close(error)

    def log_results(self, metrics: Mapping[str, Mapping[str, Any]], step: int) -> None:
        """Log metrics and figures of the finished run.

        Args:
            metrics: metrics of each split.
            step: last step of the training.
        """
        if not self.has_begun:  # a linear probe, which is fitted without the Trainer's loop, starts no runs
            return
        scalars = {
            f"{split}/{name}": float(value)
            for split, values in metrics.items()
            for name, value in values.items()
            if isinstance(value, int | float)
        }
        files = {name: self.file.parent / "plots" / f"{name}.png" for name in FIGURES}
        figures = {name: file for name, file in files.items() if file.is_file()}
        for name, tracker in self.trackers.items():
            try:
                tracker.log_results(scalars, figures, step)
            except Exception as error:  # the run is finished and saved
                logger.warning("report_to: the results were not logged to %s: %s", name, one_line(error))
