"""Hyperparameter search over recipe keys with optuna, in one process or several."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from transformers import TrainerCallback

from hfvit.artifacts.constants import RUN_FILE
from hfvit.artifacts.run_record import RunRecord
from hfvit.errors import NonFiniteLossError, OutOfMemoryError, RecipeError, UnfinishedError, one_line
from hfvit.pipeline import main as train
from hfvit.recipe.files import read_yaml
from hfvit.recipe.loader import PASSED_ON, as_options, default_of, load_recipe, without_test_split
from hfvit.recipe.training_args import HFViTTrainingArguments, is_better_when_greater
from hfvit.utils.files import check_writable, write_text
from hfvit.utils.formatting import aligned
from hfvit.utils.optional import import_optional

BEST_FILE = "best.yaml"
STUDY_FILE = "sweep.journal"
LOCKS = ".locks"  # of the study, and of each running trial
FAILURES = (NonFiniteLossError, OutOfMemoryError)  # end the trial, but not the search
# Keys that trials must have in common: the search sets them, or trials would be compared by different metrics, or on
# different images or classes.
NOT_SEARCHABLE = (
    "output_dir", "test_split", "metric_for_best_model", "greater_is_better", "dataset_name", "dataset_config_name",
    "dataset_revision", "label_column", "problem_type", "label_separator", "class_names", "validation_split",
    "validation_fraction", "test_fraction", "group_column", "max_eval_samples", "folds", "fold", "seeds",
)  # fmt: skip
KINDS = "a list of choices, {range: [low, high]} or {log: [low, high]}"


def read_space(path: str | Path) -> dict[str, Any]:
    """Read a search space from a YAML file.

    Returns:
        The search space (`KINDS`) of each recipe key.

    Raises:
        RecipeError: the file or a search space is invalid.
    """
    try:
        space = read_yaml(Path(path))
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    if not isinstance(space, dict) or not space:
        raise RecipeError(f"{path}: must be a mapping of recipe keys to {KINDS}.")
    return {key: _checked(path, key, values) for key, values in space.items()}


def _checked(path: str | Path, key: str, values: Any) -> Any:
    if key in NOT_SEARCHABLE:
        raise RecipeError(f"{path}: {key}: must be the same in all trials, got {values}. Set it in the recipe.")
    if isinstance(values, list) and values and all(isinstance(v, str | int | float) or v is None for v in values):
        return values
    kind, bounds = next(iter(values.items())) if isinstance(values, dict) and len(values) == 1 else (None, None)
    if kind not in ("range", "log") or not isinstance(bounds, list) or len(bounds) != 2:
        raise RecipeError(f"{path}: {key}: must be {KINDS}, got {values}.")
    try:  # YAML 1.1 reads 1e-4 as text
        low, high = (bound if isinstance(bound, int) else float(bound) for bound in bounds)
    except (TypeError, ValueError):
        raise RecipeError(f"{path}: {key}: bounds must be numbers, got {bounds}.") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high and (kind == "range" or low > 0)):
        positive = " positive" if kind == "log" else ""
        raise RecipeError(
            f"{path}: {key}: {kind} must have two{positive} numbers, the smaller one first, got {bounds}."
        )
    return {kind: [low, high]}


def _bounds(values: list | dict[str, list]) -> list:
    """Return the choices of a search space, or its lower and upper bound."""
    return values if isinstance(values, list) else next(iter(values.values()))


def suggest(trial, space: dict[str, Any]) -> dict[str, Any]:
    """Sample a value for every key of `space`; bounds of integers give integers."""
    chosen = {}
    for key, values in space.items():
        if isinstance(values, list):
            chosen[key] = trial.suggest_categorical(key, values)
            continue
        kind, (low, high) = next(iter(values.items()))
        is_integer = isinstance(low, int) and isinstance(high, int)
        sample = trial.suggest_int if is_integer else trial.suggest_float
        chosen[key] = sample(key, low, high, log=kind == "log")
    return chosen


class Sweep:
    """Search hyperparameters in the `output_dir` of a recipe.

    The folder has `sweep.journal` (optuna's study), the recipe of each trial in `recipes/`, its run in `trial-*`, and
    at the end `best.yaml`. Trials are compared by `metric_for_best_model` on the validation split; they have no test
    split. Several processes, also of several machines that share the folder, may work on one study: each takes the
    next trial.

    Args:
        argv: `RECIPE [--key value ...]`.
        space: search space of `read_space`.
        seed: seed of optuna's sampler TPE (Bergstra et al., https://doi.org/10.5555/2986459.2986743).
        prune: stop a trial that is worse than the median of the others after as many steps.

    Raises:
        RecipeError: optuna is not installed, the recipe does not allow a value of the space, or the folder has a
            search of another recipe or space.
    """

    def __init__(self, argv: list[str], space: dict[str, Any], seed: int = 0, prune: bool = False):
        self.optuna = import_optional("optuna", "sweep", "hfvit sweep", RecipeError)
        self.space = space
        recipe = load_recipe(argv)
        recipe.check_is_one_run()
        training = recipe.training
        _check_options(training)
        self.values = recipe.values
        self.options = as_options({key: getattr(training, key) for key in PASSED_ON})  # `values` do not have them
        self.quiet = training.quiet
        self.data = recipe.data
        self.folder = Path(training.output_dir)
        self.metric = (training.metric_for_best_model or "accuracy").removeprefix("eval_")
        self.seed = seed
        check_writable(self.folder, "output_dir")
        (self.folder / LOCKS).mkdir(exist_ok=True)
        self._lock = FileLock(self.folder / LOCKS / "study", is_singleton=False)
        with self._lock:
            self._open(prune)

    def _open(self, prune: bool) -> None:
        """Check the space, and create or load the study."""
        optuna = self.optuna
        space = self.space
        self._check_same_images()
        for number in range(max(len(_bounds(values)) for values in space.values())):
            tried = {key: _bounds(values)[number % len(_bounds(values))] for key, values in space.items()}
            load_recipe([str(self._write_recipe("check", tried))])
        (self.folder / "recipes" / "check.yaml").unlink(missing_ok=True)
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # a failed trial would print a traceback
        path = self.folder / STUDY_FILE
        try:
            self.study = optuna.create_study(
                study_name="sweep",
                storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path))),
                direction="maximize" if is_better_when_greater(self.metric) else "minimize",
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner() if prune else optuna.pruners.NopPruner(),
            )
        except OSError:
            raise
        except Exception as error:  # optuna raises various types for a damaged file
            raise RecipeError(
                f"output_dir: {path} is no study of optuna ({one_line(error)[:200]}). Delete it, or choose another"
                " output_dir."
            ) from None
        others = sorted(self.folder.glob("trial-*"))  # before its trials, which another worker may add
        if others and not self.study.trials:
            raise RecipeError(
                f"output_dir: {self.folder} has {others[0].name} of another search, whose result would count for a new"
                " trial. Delete the trials, or choose another output_dir."
            )
        self._check_unchanged({"recipe": self.values, "space": space})

    def _check_same_images(self) -> None:
        """Raise `RecipeError` if the space would change the validation images."""
        holds_out = not self.data.validation_split
        changes = {"train_split": holds_out, "seed": holds_out or self.data.max_eval_samples is not None}
        for key in self.space:
            if changes.get(key):
                raise RecipeError(
                    f"{key}: must be the same in all trials, as it selects the validation images, got"
                    f" {self.space[key]}. Set it in the recipe, or set validation_split and omit max_eval_samples."
                )

    def run(self, trials: int) -> str:
        """Run until `trials` trials have ended (or failed); returns the summary."""
        while self._run_next(trials):
            pass
        return self.summary()

    def _run_next(self, trials: int) -> bool:
        """Run one more trial; returns False if all of them have been started."""
        with self._lock:
            self._requeue_interrupted()
            running = [trial for trial in self.study.trials if trial.state.name == "RUNNING"]
            begun = len(self.ended()) + len(running)
            if begun >= trials:
                return False
            # The samples of a trial depend on its number: not on the process, and not on earlier resumes.
            self.study.sampler = self.optuna.samplers.TPESampler(seed=self.seed + len(self.study.trials))
            trial = self.study.ask()
            lock = self._trial_lock(trial)
            lock.acquire(timeout=0)
        if not self.quiet:
            print(f"\ntrial {begun + 1} of {trials}", flush=True)
        with self._told(trial, lock):
            self.study.tell(trial, self._trial(trial))
        return True

    def _trial_lock(self, trial) -> FileLock:
        """Return the lock that a process holds while it runs a trial.

        The system releases it if the process dies.
        """
        return FileLock(self.folder / LOCKS / f"trial-{trial.number}", is_singleton=False)

    @contextmanager
    def _told(self, trial, lock: FileLock) -> Iterator[None]:
        """Tell the study how a trial ended that has no value, and release its lock."""
        states = self.optuna.trial.TrialState
        try:
            yield
        except self.optuna.TrialPruned:
            self.study.tell(trial, state=states.PRUNED)
        except FAILURES:
            self.study.tell(trial, state=states.FAIL)
        except BaseException:
            self.study.tell(trial, state=states.FAIL)  # without "failed": it will run again
            raise
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)

    def ended(self) -> list:
        """Return the trials that ended without interruption, including failed ones."""
        states = ("COMPLETE", "PRUNED")
        return [trial for trial in self.study.trials if trial.state.name in states or "failed" in trial.user_attrs]

    def best(self):
        """Return the best complete trial, or None."""
        done = [trial for trial in self.ended() if trial.state.name == "COMPLETE"]
        pick = max if self.study.direction.name == "MAXIMIZE" else min
        return pick(done, key=lambda trial: trial.value, default=None)

    def summary(self) -> str:
        """Write the recipe of the best trial, and return a table of all trials."""
        best = self.best()
        sign = -1 if self.study.direction.name == "MAXIMIZE" else 1
        if best is None:
            return f"No trial completed. See the messages above and {self.folder}."
        trials = sorted(self.ended(), key=lambda t: (t.state.name != "COMPLETE", sign * (t.value or 0.0)))
        rows = [("run", self.metric, "", *self.space)]
        for trial in trials:
            complete = trial.state.name == "COMPLETE"
            score = f"{trial.value:.4f}" if complete else "-"
            state = "" if complete else trial.state.name.lower()
            parameters = (_shown(trial.params.get(key, "-")) for key in self.space)
            rows.append((_name(trial), score, state, *parameters))
        values = {**self.values, **best.params, "output_dir": str(self.folder / "best")}
        path = self.folder / BEST_FILE
        head = f"# Best of {len(trials)} trials: {self.metric} {best.value:.4f} on the validation split.\n"
        write_text(path, head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        return "\n".join([*aligned(rows), "", f"best     {path}", f"train it: hfvit train {path}"])

    def _trial(self, trial) -> float:
        parameters = suggest(trial, self.space)
        name = _name(trial)
        folder = self.folder / name
        if not self.quiet:
            print(", ".join(f"{key} {_shown(value)}" for key, value in parameters.items()), flush=True)
        if not (folder / RUN_FILE).exists():  # exists if the search was killed after the run, before its record
            callbacks = [] if isinstance(self.study.pruner, self.optuna.pruners.NopPruner) else [_Pruning(self, trial)]
            recipe = self._write_recipe(name, parameters)
            # A trial without a checkpoint starts again.
            try:
                resume = ["--resume_from_checkpoint", "auto", "--overwrite_output_dir", "true"]
                train([str(recipe), *self.options, *resume], callbacks)
            except FAILURES as error:
                trial.set_user_attr("failed", one_line(error))
                print(f"failed: {one_line(error)}", flush=True)
                raise
            except UnfinishedError as error:
                raise type(error)(error.cause, "Resume with the same hfvit sweep command.") from None
        record = RunRecord.load(folder)
        metric = record.recipe.get("metric_for_best_model") or self.metric  # multi-label: mAP instead of accuracy
        self.metric = metric.removeprefix("eval_")
        return getattr(record.metrics["validation"], self.metric)

    def _write_recipe(self, name: str, parameters: dict[str, Any]) -> Path:
        values = {**without_test_split(self.values), **parameters}
        values |= {"plots": False, "output_dir": str(self.folder / name)}
        path = self.folder / "recipes" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        return path

    def _check_unchanged(self, values: dict[str, Any]) -> None:
        """Raise `RecipeError` if a resumed search has another recipe or space."""
        for key, value in values.items():
            text = json.dumps(value, sort_keys=True, default=str)
            if not _is_equal(self.study.user_attrs.get(key, text), text):
                raise RecipeError(
                    f"output_dir: {self.folder} has a search of another {key}. Pass the original one, or another"
                    " output_dir."
                )
            self.study.set_user_attr(key, text)

    def _requeue_interrupted(self) -> None:
        """Queue trials whose process has died again, with the same values and folder."""
        for trial in self.study.trials:
            if trial.state.name == "RUNNING" and not self._is_alive(trial):
                self.study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)
        ended = {trial.number for trial in self.ended()}
        latest = {_name(trial): trial for trial in self.study.trials}
        for name, trial in latest.items():
            if trial.state.name == "FAIL" and trial.number not in ended and trial.params:
                self.study.enqueue_trial(trial.params, user_attrs={"run": name})

    def _is_alive(self, trial) -> bool:
        """Return whether a process runs a trial."""
        lock = self._trial_lock(trial)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False


def _check_options(training: HFViTTrainingArguments) -> None:
    """Raise `RecipeError` for options that a search would ignore."""
    found = {
        "overwrite_output_dir": training.overwrite_output_dir,
        "resume_from_checkpoint": training.resume_from_checkpoint not in (None, "auto"),
        "push_to_hub": training.push_at_end,
    }
    advice = "Delete the folder of the search, or choose another output_dir"
    remedies = {"resume_from_checkpoint": "The same command resumes a search", "push_to_hub": "Use `hfvit push`"}
    for key in (key for key, is_set in found.items() if is_set):
        raise RecipeError(f"{key}: not available in `hfvit sweep`. {remedies.get(key, advice)}.")


class _Pruning(TrainerCallback):
    """Report each evaluation to optuna, and end the trial when optuna prunes it."""

    def __init__(self, sweep: Sweep, trial):
        self.sweep = sweep
        self.trial = trial

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metric = (args.metric_for_best_model or self.sweep.metric).removeprefix("eval_")
        self.trial.report(metrics[f"eval_{metric}"], state.global_step)
        if self.trial.should_prune():
            raise self.sweep.optuna.TrialPruned


def _name(trial) -> str:
    return trial.user_attrs.get("run", f"trial-{trial.number:03d}")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_equal(before: str, now: str) -> bool:
    """Return whether two mappings of recipe keys are equal, with defaults."""
    old = json.loads(before)
    new = json.loads(now)
    return all(old.get(key, default_of(key)) == new.get(key, default_of(key)) for key in {*old, *new})
