"""Repeat a finished run, or its evaluation, and compare the accuracy or mAP."""

import os
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from hfvit.artifacts.constants import RECIPE_FILE
from hfvit.artifacts.run_record import RunRecord
from hfvit.data.splits import DIGITS
from hfvit.errors import ModelError, RecipeError, printable
from hfvit.evaluation.split import evaluation_split
from hfvit.inference.classifier import load_classifier
from hfvit.metrics.task import TASKS
from hfvit.recipe.arguments import SINGLE_LABEL
from hfvit.recipe.files import read_yaml, shipped_recipes
from hfvit.recipe.loader import Recipe, load_recipe
from hfvit.utils.environment import hardware, installed_versions
from hfvit.utils.files import expand_user, file_sha256
from hfvit.utils.formatting import aligned
from hfvit.utils.hub_ids import is_local

# Keys of a recipe that name data, models or files, on this machine or on the Hub.
READ_KEYS = (
    "dataset_name", "class_names", "model_name_or_path", "text_encoder", "teacher", "head_from_text",
    "accelerator_config", "fsdp_config", "deepspeed",
)  # fmt: skip
# Overridden in a repetition, which only writes to its folder: no push, no trackers, no log file.
REPLACED_KEYS = {
    "push_to_hub": "false", "report_to": "none", "resume_from_checkpoint": "none", "overwrite_output_dir": "false",
    "json_log": "none",
}  # fmt: skip
HEADER = ("split", "images", "recorded", "95 % interval", "again", "change", "verdict")
WEIGHTS = "model.safetensors"


@dataclass
class SplitComparison:
    """Hold recorded and repeated accuracy or mAP of a split, with the 95 % interval."""

    split: str
    images: int
    metric: str
    recorded: float
    low: float
    high: float
    again: float

    @property
    def is_inside(self) -> bool:
        """Return whether the repeated accuracy is inside the interval."""
        return self.low - 1e-9 <= self.again <= self.high + 1e-9


@dataclass
class Verification:
    """Compare a run with its repetition.

    Args:
        rows: comparison of each split.
        notes: other differences.
        missed: failures to reach the expected accuracy of the recipe.
    """

    rows: list[SplitComparison]
    notes: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """Return messages about scores outside the interval or below expectation."""
        return [
            f"{row.split}: {row.metric} {row.again:.2%} on {row.images:,} images is outside the recorded interval"
            f" {row.low:.2%} to {row.high:.2%}."
            for row in self.rows
            if not row.is_inside
        ] + self.missed

    def table(self) -> str:
        """Return a table of the splits, and the notes."""
        cells = [
            (
                row.split,
                f"{row.images:,}",
                f"{row.recorded:.2%}",
                f"{row.low:.2%} - {row.high:.2%}",
                f"{row.again:.2%}",
                f"{100 * (row.again - row.recorded):+.2f}",
                "inside" if row.is_inside else "OUTSIDE",
            )
            for row in self.rows
        ]
        return "\n".join([*aligned([HEADER, *cells]), "", *map(printable, self.notes)])


def check_reads(folder: str | Path, allow_outside: bool = False) -> None:
    """Check that the recipe of a run reads no local files and no URLs.

    Args:
        folder: output folder of the run, which may be untrusted.
        allow_outside: skip the check.

    Raises:
        RecipeError: the recipe reads local files or URLs; the message lists them.
    """
    path = expand_user(folder) / RECIPE_FILE
    try:
        values = read_yaml(path)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    if allow_outside or not isinstance(values, dict):
        return
    replaced = {"output_dir", *REPLACED_KEYS}
    reads = [
        f"{key} {text}"
        for key, value in values.items()
        if key not in replaced and not _has_class_names(key, value)
        for text in _texts(value)
        if _is_outside(text) or (key in READ_KEYS and text != DIGITS and is_local(text))
    ]
    if values.get("allow_outside_paths"):
        reads.append("any file that a row of the data set names (allow_outside_paths)")
    if reads:
        raise RecipeError(f"RUN_DIR: {path} reads {'; '.join(reads)}. Pass --allow_outside_paths to allow it.")


def _has_class_names(key: str, value: Any) -> bool:
    """Return whether a recipe value is class names or their separator.

    These may look like paths.
    """
    return key == "label_separator" or (key == "class_names" and isinstance(value, list) and len(value) > 1)


def _is_outside(text: str) -> bool:
    """Return whether a value is a URL, or a path outside the working folder."""
    return "://" in text or os.path.isabs(text) or text.startswith("~") or ".." in text.replace("\\", "/").split("/")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def repeat_command(folder: str | Path, output_dir: str | Path) -> list[str]:
    """Return arguments of `hfvit train` that repeat a run, without push and trackers.

    Args:
        folder: output folder of the run.
        output_dir: output folder of the new run.
    """
    replaced = [word for key, value in REPLACED_KEYS.items() for word in (f"--{key}", value)]
    if "crop_mode" not in RunRecord.load(folder).recipe:  # runs before hfvit 0.2
        replaced += ["--crop_mode", "center"]
    return [str(expand_user(folder) / RECIPE_FILE), "--output_dir", str(output_dir), *replaced]


def compare_runs(folder: str | Path, again: str | Path) -> Verification:
    """Compare the run in `folder` with its repetition in `again`."""
    old = RunRecord.load(folder)
    new = RunRecord.load(again)
    verification = _compare_scores(old, {role: metrics.score.value for role, metrics in new.metrics.items()})
    first, second = (expand_user(root) / WEIGHTS for root in (folder, again))
    if first.is_file():
        same = file_sha256(first) == file_sha256(second)
        verification.notes.append(f"weights    {'bit-identical' if same else 'different'}")
    now = {**new.versions, **_machine(new)}
    verification.notes += _notes(old, now)
    return verification


def evaluate_again(folder: str | Path, batch_size: int = 32, device: str | None = None) -> Verification:
    """Evaluate the checkpoint of a run again on the splits of its record.

    Args:
        folder: output folder of the run.
        batch_size: number of images per forward pass.
        device: PyTorch device; None is CUDA if available, else the CPU.

    Raises:
        ModelError: the data set has changed.
    """
    record = RunRecord.load(folder)
    classifier = load_classifier(folder, device, tta=record.eval_tta)
    task = TASKS[record.data.problem_type or SINGLE_LABEL]
    scores = {}
    sample = {"max_samples": record.recipe.get("max_eval_samples"), "seed": record.recipe.get("seed", 42)}
    for role, metrics in record.metrics.items():
        name = None if role == "validation" else record.data.splits[role].source
        split = evaluation_split(folder, split=name, **sample)
        if len(split) != metrics.images:
            raise ModelError(
                f"RUN_DIR: the data set has changed: split '{split.source}' must have {metrics.images:,} images, got"
                f" {len(split):,}. Restore the data set."
            )
        logits = classifier.logits(split.images(), batch_size)
        scores[role] = task.metrics(logits, split.labels, classifier.labels, record.thresholds).score.value
    verification = _compare_scores(record, scores)
    now = installed_versions(name for name in record.versions if name not in ("python", "cuda"))
    verification.notes += _notes(record, {**now, "processor": hardware()["processor"]})
    return verification


def _compare_scores(record: RunRecord, scores: dict[str, float]) -> Verification:
    rows = []
    for role, metrics in record.metrics.items():
        score = metrics.score
        if role not in scores:
            raise ModelError(f"The repeated run has no {role} split, unlike the recorded one.")
        rows.append(
            SplitComparison(role, metrics.images, score.name, score.value, *score.interval, again=scores[role])
        )
    return Verification(rows)


def _machine(record: RunRecord) -> dict:
    """Return training settings and hardware of a run."""
    training = {key: getattr(record.training, key) for key in ("processes", "precision", "data_workers")}
    return training | {key: getattr(record.hardware, key) for key in ("processor", "threads", "gpus")}


def _notes(record: RunRecord, now: dict) -> list[str]:
    """List the differences between a record and `now`."""
    before = {**record.versions, **_machine(record)}
    differs = [f"{key}: {before[key]} -> {now[key]}" for key in before if key in now and before[key] != now[key]]
    notes = [f"changed    {difference}" for difference in differs]
    return notes or ["changed    nothing (same versions, same kind of machine)"]


def compare_with_expected(verification: Verification, records: Sequence[RunRecord]) -> None:
    """Note the expected accuracy of a shipped recipe; below a measured one is failure.

    Args:
        verification: comparison of a run, or of several that `join` has joined; changed in place.
        records: records of the runs. The mean of several runs is compared, which may have any seeds.
    """
    expected = [expected_accuracy(record, any_seed=len(records) > 1) for record in records]
    again = [100 * row.again for row in verification.rows if row.split.rpartition(" ")[2] == "test"]
    if len(set(expected)) != 1 or not expected[0] or len(again) != len(records):
        return
    found = expected[0]
    reached = statistics.fmean(again)
    name = f"{reached:.2f} %" if len(again) == 1 else f"the mean {reached:.2f} % of {len(again)} runs"
    source = f"recipes/{found.file}"
    interval = f"{found.low:g} to {found.high:g} %"
    verdict = "BELOW" if reached < found.low else "above" if reached > found.high else "inside"
    estimate = "" if found.is_measured else " (an estimate, not measured)"
    verification.notes.append(f"expected   {interval} in {source}{estimate}; {name} is {verdict}")
    if verdict == "BELOW" and found.is_measured:
        verification.missed.append(f"test: accuracy: {name} is below the {interval} expected in {source}.")


def join(verifications: Mapping[str, Verification]) -> Verification:
    """Join the comparisons of several runs.

    Args:
        verifications: comparisons by name of the run.

    Returns:
        All rows; the notes have the mean and standard deviation of each split.
    """
    rows = [replace(row, split=f"{name} {row.split}") for name, found in verifications.items() for row in found.rows]
    notes = []
    for split in dict.fromkeys(row.split for found in verifications.values() for row in found.rows):
        own = [row for found in verifications.values() for row in found.rows if row.split == split]
        recorded, again = ([getattr(row, key) for row in own] for key in ("recorded", "again"))
        std = f", std {statistics.stdev(again):.2%}" if len(again) > 1 else ""
        mean = statistics.fmean(again)
        notes.append(f"mean       {split}: {mean:.2%}{std}; recorded {statistics.fmean(recorded):.2%}")
    for name, found in verifications.items():
        notes += [f"{name}: {note}" for note in found.notes]
    return Verification(rows, notes)


class Expected(NamedTuple):
    """Hold the expected test accuracy of a shipped recipe in percent."""

    low: float
    high: float
    is_measured: bool
    file: str


def expected_accuracy(record: RunRecord, any_seed: bool = False) -> Expected | None:
    """Return the expected accuracy of a run with an unmodified shipped recipe.

    Candidates are found by name in the recorded command, and compared by value.

    Args:
        record: record of the run.
        any_seed: accept another seed than that of the recipe.
    """
    shipped = shipped_recipes()
    try:
        words = shlex.split(record.command or "")
    except ValueError:  # not a command line
        words = []
    stems = [Path(word).stem for word in words]
    for path in (shipped[stem] for stem in stems if stem in shipped):
        try:
            recipe = load_recipe([str(path)])
        except RecipeError:  # not supported on this machine
            continue
        training = recipe.training
        if training.expected_accuracy and _is_run_of(recipe, record, any_seed):
            return Expected(*training.expected_accuracy, training.expected_accuracy_measured, path.name)
    return None


def _is_run_of(recipe: Recipe, record: RunRecord, any_seed: bool) -> bool:
    """Return whether a run has the values of a recipe.

    Args:
        recipe: recipe; its folder and the commit of its data may differ.
        record: record of the run.
        any_seed: accept another seed.
    """
    ignored = {"output_dir", "dataset_revision", *(["seed"] if any_seed else [])}
    return all(recipe.values.get(key) == value for key, value in record.recipe.items() if key not in ignored)
