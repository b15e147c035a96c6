"""Train a recipe once, or several times: once for each seed or fold."""

import dataclasses
import gc
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, overload

import torch
import yaml
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from transformers import TrainerCallback

import hfvit
from hfvit.artifacts.checkpoint import remove_checkpoints
from hfvit.artifacts.constants import LABEL_ERRORS_FILE, OUT_OF_FOLD_FILE, PREDICTIONS_FILE
from hfvit.artifacts.multirun_record import MultiRunRecord
from hfvit.artifacts.output_dir import is_finished, lock_folder
from hfvit.artifacts.run_record import RunRecord, command_line
from hfvit.data.starting_recipe import find_and_load, load_given
from hfvit.errors import RecipeError, UnfinishedError, printable_lines
from hfvit.evaluation.predictions import join_folds
from hfvit.pipeline import fit_recipe
from hfvit.pipeline import start as start_run
from hfvit.recipe.arguments import SINGLE_LABEL
from hfvit.recipe.loader import PASSED_ON, Recipe, as_options, load_recipe, without_test_split
from hfvit.training.resume import describe_changes, describe_origin
from hfvit.training.trainer import check_functions, checked_callbacks
from hfvit.utils.credentials import mask_values
from hfvit.utils.global_state import kept_state

COMMIT = r"[0-9a-f]{40}"


def main(argv: list[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Train a recipe with command-line options.

    Args:
        argv: `RECIPE [--key value ...]`, or a local data set in place of the recipe; `sys.argv` by default.
        callbacks: callbacks of the trainer.
    """
    start(find_and_load(sys.argv[1:] if argv is None else argv), callbacks)


@overload
def train(
    recipe: str | Path | Mapping[str, Any], *, seeds: int | Sequence[int], **options: Any
) -> MultiRunRecord | None: ...


@overload
def train(recipe: str | Path | Mapping[str, Any], *, folds: int, **options: Any) -> MultiRunRecord | None: ...


@overload
def train(recipe: str | Path | Mapping[str, Any], **options: Any) -> RunRecord | None: ...


def train(
    recipe: str | Path | Mapping[str, Any],
    *,
    callbacks: Iterable[TrainerCallback] | None = None,
    train_transforms: Callable | None = None,
    compute_metrics: Callable | None = None,
    compute_loss_func: Callable | None = None,
    from_scratch: bool = False,
    **fields: Any,
) -> RunRecord | MultiRunRecord | None:
    """Train, evaluate, save and report a run, as `hfvit train` does.

    Args:
        recipe: name of a shipped recipe, YAML file, a dict with the keys of a recipe, or a local data set.
        callbacks: callbacks of the trainer.
        train_transforms: replaces the augmentation, see `data.transform_reader.TransformReader`.
        compute_metrics: `EvalPrediction -> dict` of metrics in addition to hfvit's.
        compute_loss_func: `(outputs, labels, num_items_in_batch) -> loss`, a mean over its batch.
        from_scratch: train a small model without pretrained weights, for a data set in place of a recipe.
        **fields: keys of the recipe to override: `output_dir="out"`, `learning_rate=1e-3`, ...

    Returns:
        The run's record, also saved as `run.json`; with `seeds` or `folds` the record of all runs, also saved
        as `multirun.json`. None on all processes but the first.

    Raises:
        TypeError: an argument is not a recipe, a function or a callback.
        RecipeError: the recipe is invalid; nothing was trained.
        DataError: the data is unusable; nothing was trained.
        ModelError: the model is unusable; nothing was trained.
        NonFiniteLossError: the loss, or a logit of the final evaluation, is NaN or infinite.
        OutOfMemoryError: a single image does not fit into memory.
        StorageError: a checkpoint cannot be written.
        InterruptedRunError: the run was stopped by a signal and saved.
    """
    functions = {"compute_metrics": compute_metrics, "compute_loss_func": compute_loss_func}
    check_functions({"train_transforms": train_transforms, **functions})
    callbacks = checked_callbacks(callbacks)
    options = {key: value for key, value in functions.items() if value}
    with kept_state():
        return start(load_given(recipe, fields, from_scratch), callbacks, train_transforms, **options)


def start(
    recipe: Recipe,
    callbacks: Sequence[TrainerCallback] = (),
    train_transforms: Callable | None = None,
    **options: Any,
) -> RunRecord | MultiRunRecord | None:
    """Run a recipe as often as it says.

    Args:
        recipe: recipe of `load_recipe`.
        callbacks: callbacks of the trainer; several runs share them.
        train_transforms: replaces the augmentation.
        **options: further arguments of `HFViTTrainer`.
    """
    if recipe.repeated_by is None:
        return start_run(recipe, callbacks, train_transforms, **options)
    return MultiRun(recipe).run(callbacks, train_transforms, **options)


class MultiRun:
    """Train a recipe once for each seed or fold, in folders of its `output_dir`.

    Each folder, such as `seed_0`, has the run of the recipe with that seed, as if it was trained alone. Finished runs
    are not repeated; an interrupted one is resumed. Runs of folds do not evaluate the test split: it is for the model
    that is trained with what cross-validation has selected.

    Args:
        recipe: recipe with `seeds` or `folds`.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.args = recipe.training
        self.folder = Path(self.args.output_dir)
        if recipe.repeated_by == "folds":
            self.values = {**without_test_split(recipe.values), "save_predictions": True}
            self.differences = {f"fold_{fold}": {"fold": fold} for fold in range(recipe.data.folds)}
        else:
            self.values = dict(recipe.values)
            self.differences = {f"seed_{seed}": {"seed": seed} for seed in self.args.seed_list}
        self.record = MultiRunRecord(
            hfvit_version=hfvit.__version__,
            command=command_line(),
            repeated_by=recipe.repeated_by,
            planned=list(self.differences),
            recipe=json.loads(json.dumps(mask_values(self.values), default=str)),
        )

    def run(self, *arguments: Any, **options: Any) -> MultiRunRecord | None:
        """Train what is not finished, and summarize all runs.

        Args:
            *arguments: further arguments of `pipeline.start`.
            **options: further arguments of `HFViTTrainer`.

        Returns:
            The record, on the main process.

        Raises:
            RecipeError: the folder has runs of another recipe.
        """
        with lock_folder(self.folder, "training") if self.args.should_save else nullcontext():
            finished = self._prepare() if self.args.should_save else {}
            # Decided by one process, since others may see the files of a shared folder later.
            [names] = broadcast_object_list([sorted(finished)])
            self._pin(self.values)
            for number, (name, values) in enumerate(self.differences.items(), 1):
                if self.args.should_save and not self.args.quiet:
                    state = ", finished before" if name in names else ""
                    print(f"\n{name} ({number} of {len(self.differences)}){state}", flush=True)
                run = finished.get(name) if name in names else self._run(name, values, *arguments, **options)
                if self.args.should_save:
                    self.record.add(name, values, run)
                    self.record.save(self.folder)
        if not self.args.should_save:
            return None
        out_of_fold = join_folds(self.folder, self.differences) if self.record.repeated_by == "folds" else None
        self.record.finished = datetime.now(UTC).isoformat(timespec="seconds")
        path = self.record.save(self.folder)
        if not self.args.quiet:
            lines = [self.record.table(), "", f"summary      {path}", *([out_of_fold] if out_of_fold else [])]
            print("\n" + "\n".join(map(printable_lines, lines)), flush=True)
        return self.record

    def _prepare(self) -> dict[str, RunRecord]:
        """Check the folder, and return the records of finished runs."""
        if self.args.overwrite_output_dir:
            if (self.folder / MultiRunRecord.FILE).exists():
                for file in (OUT_OF_FOLD_FILE, LABEL_ERRORS_FILE):
                    (self.folder / file).unlink(missing_ok=True)
            finished = {}
        else:
            self._check_unchanged()
            folders = {name: self.folder / name for name in self.differences}
            finished = {name: RunRecord.load(folder) for name, folder in folders.items() if is_finished(folder)}
        commits = [record.data.dataset_commit for record in finished.values()]
        if any(commits) and not re.fullmatch(COMMIT, self.values.get("dataset_revision") or ""):
            self.values["dataset_revision"] = next(filter(None, commits))
        for name, record in finished.items():
            self._check_finished(name, record)
        if not self.args.keep_checkpoints:
            for name in finished:
                remove_checkpoints(self.folder / name)  # which a kill may have left
        self.record.save(self.folder)
        return finished

    def _pin(self, values: Mapping[str, Any]) -> None:
        """Pin the data set's commit of the first process for the further runs."""
        [revision] = broadcast_object_list([values.get("dataset_revision")])
        if revision:
            self.values["dataset_revision"] = revision

    def _check_finished(self, name: str, record: RunRecord) -> None:
        """Raise `RecipeError` if a finished run is not the one that would be trained here.

        Args:
            name: name of its folder.
            record: its record.
        """
        folder = self.folder / name
        if self.record.repeated_by == "folds" and not (folder / PREDICTIONS_FILE).is_file():
            fraction = self.values.get("test_fraction")
            alike = "--save_predictions true --test_split none"
            alike += "" if fraction is None else f" --test_fraction {fraction:g}"
            raise RecipeError(
                f"output_dir: {folder} has no {PREDICTIONS_FILE}. Delete this folder, or train the fold with {alike}."
            )
        recipe = self._load_recipe(name, self.differences[name])
        if "label_separator" not in recipe.values:
            recipe.pin(None, record.recipe.get("label_separator"))
        images = None if recipe.data.streaming else record.data.splits["train"].rows
        fit_recipe(recipe, record.data.problem_type or SINGLE_LABEL, images)
        now = json.loads(json.dumps(mask_values(recipe.values), default=str))
        if changes := describe_changes(describe_origin(record.recipe, {}), describe_origin(now, {})):
            raise self._other_recipe(folder, changes)

    def _other_recipe(self, folder: Path, changes: Sequence[str]) -> RecipeError:
        return RecipeError(
            f"output_dir: {folder} has runs of another recipe ({'; '.join(changes)}). Pass --overwrite_output_dir to"
            " start them again, or choose another output_dir."
        )

    def _check_unchanged(self) -> None:
        """Raise `RecipeError` if the folder has runs of another recipe."""
        if not (self.folder / MultiRunRecord.FILE).exists():
            return
        before = MultiRunRecord.load(self.folder)
        old, new = (describe_origin(values, {}) for values in (before.recipe, self.record.recipe))
        for origin in (old, new):
            for values in self.differences.values():
                origin["recipe"] = {key: value for key, value in origin["recipe"].items() if key not in values}
        changes = describe_changes(old, new)
        if before.repeated_by != self.record.repeated_by:
            changes.append(f"{before.repeated_by} -> {self.record.repeated_by}")
        if changes:
            raise self._other_recipe(self.folder, changes)

    def _run(self, name: str, values: Mapping[str, Any], *arguments: Any, **options: Any) -> RunRecord | None:
        """Train a run, and pin the commit of its data set for the runs after it.

        Args:
            name: name of its folder.
            values: values in its recipe that differ from other runs.
            *arguments: further arguments of `pipeline.start`.
            **options: further arguments of `HFViTTrainer`.
        """
        recipe = self._load_recipe(name, values)
        try:
            record = start_run(recipe, *arguments, **options)
        except UnfinishedError as error:
            without = ", without --overwrite_output_dir" if self.args.overwrite_output_dir else ""
            raise type(error)(error.cause, f"Resume with the same hfvit train command{without}.") from None
        finally:
            self._forget()
        self._pin(recipe.values)
        return record

    def _load_recipe(self, name: str, values: Mapping[str, Any]) -> Recipe:
        """Load the recipe of a run, which resumes from its own checkpoints.

        Args:
            name: name of its folder.
            values: values that differ from other runs.
        """
        passed_on = {key: getattr(self.args, key) for key in PASSED_ON}
        resume = None if self.args.overwrite_output_dir else "auto"
        # Files of a run that was killed before its first checkpoint are overwritten, too.
        own = {"output_dir": str(self.folder / name), "resume_from_checkpoint": resume, "overwrite_output_dir": True}
        if self.args.run_name:  # trackers would continue the run of this name
            own["run_name"] = f"{self.args.run_name}-{name}"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / self.recipe.source.name
            path.write_text(yaml.safe_dump(self.values, sort_keys=False, allow_unicode=True), encoding="utf-8")
            recipe = load_recipe([str(path), *as_options({**values, **own, **passed_on})])
        # A resolved recipe sets every key, so its own list of ignored options is useless; its file is deleted.
        return dataclasses.replace(recipe, ignored=self.recipe.ignored, source=self.recipe.source)

    def _forget(self) -> None:
        """Free the memory and the compiled code of a run."""
        gc.collect()
        clear_device_cache()
        if self.args.torch_compile:
            torch.compiler.reset()
