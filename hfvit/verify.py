"""Repeat a finished run, or its evaluation, and compare with the recorded accuracy."""

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hfvit.artifacts.constants import RECIPE_FILE
from hfvit.artifacts.run_record import RunRecord
from hfvit.data.splits import DIGITS
from hfvit.errors import ModelError, RecipeError
from hfvit.evaluation.split import evaluation_split
from hfvit.inference.classifier import load_classifier
from hfvit.metrics.classification import ImageClassificationMetric
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
# Replaced when a run is repeated: a repetition writes into its own folder only, and tells nobody.
REPLACED_KEYS = {
    "push_to_hub": "false", "report_to": "none", "resume_from_checkpoint": "none", "overwrite_output_dir": "false",
}  # fmt: skip
HEADER = ("split", "images", "recorded", "95 % interval", "again", "change", "verdict")
WEIGHTS = "model.safetensors"


@dataclass
class SplitComparison:
    """Recorded and new accuracy of a split, with the recorded 95 % interval."""

    split: str
    images: int
    recorded: float
    low: float
    high: float
    again: float

    @property
    def is_inside(self) -> bool:
        return self.low - 1e-9 <= self.again <= self.high + 1e-9


@dataclass
class Verification:
    """A run and its repetition: one row a split, and what else is known of both in `notes`.

    `missed` is a sentence for what the recipe promises and the run did not reach.
    """

    rows: list[SplitComparison]
    notes: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """One sentence for each split whose accuracy is not what was recorded, or less than the recipe promises."""
        return [
            f"{row.split}: accuracy {row.again:.2%} on {row.images:,} images lies outside the recorded"
            f" {row.low:.2%} to {row.high:.2%}."
            for row in self.rows
            if not row.is_inside
        ] + self.missed

    def table(self) -> str:
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
        return "\n".join([*aligned([HEADER, *cells]), "", *self.notes])


def check_reads(folder: str | Path, allow_outside: bool = False) -> None:
    """Check that recipe.yaml of a run names no files of this machine and no URLs, in whatever key.

    Args:
        folder: of the run, which may be somebody else's.
        allow_outside: allow them.

    Raises:
        RecipeError: it does; the message lists them.
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
        if key not in replaced
        for text in _texts(value)
        if _is_outside(text) or (key in READ_KEYS and text != DIGITS and is_local(text))
    ]
    if values.get("allow_outside_paths"):
        reads.append("any file that a row of the data set names (allow_outside_paths)")
    if reads:
        raise RecipeError(f"RUN_DIR: {path} reads {'; '.join(reads)}. Pass --allow_outside_paths to allow it.")


def _is_outside(text: str) -> bool:
    """Whether a value can only be a path that leaves the working folder, or a URL."""
    return "://" in text or os.path.isabs(text) or text.startswith("~") or ".." in text.replace("\\", "/").split("/")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def repeat_command(folder: str | Path, output_dir: str | Path) -> list[str]:
    """Arguments of `hfvit train` that train recipe.yaml of a run again, without a push or a tracker.

    Args:
        folder: of the run.
        output_dir: of the new run.
    """
    replaced = [word for key, value in REPLACED_KEYS.items() for word in (f"--{key}", value)]
    return [str(expand_user(folder) / RECIPE_FILE), "--output_dir", str(output_dir), *replaced]


def compare_runs(folder: str | Path, again: str | Path) -> Verification:
    """The run in `folder` against the one in `again`, which came of its recipe."""
    old = RunRecord.load(folder)
    new = RunRecord.load(again)
    found = _judged(old, {role: metrics.accuracy for role, metrics in new.metrics.items()})
    first, second = (expand_user(root) / WEIGHTS for root in (folder, again))
    if first.is_file():
        same = file_sha256(first) == file_sha256(second)
        found.notes.append(f"weights    {'the same to the last bit' if same else 'not the same bits'}")
    here = {**new.versions, **_machine(new)}
    found.notes += _notes(old, here)
    _compare_with_expected(found, old)
    return found


def evaluate_again(folder: str | Path, batch_size: int = 32, device: str | None = None) -> Verification:
    """The checkpoint in `folder` on the splits that run.json names, read by its recipe."""
    record = RunRecord.load(folder)
    classifier = load_classifier(folder, device)
    accuracies = {}
    drawn = {"max_samples": record.recipe.get("max_eval_samples"), "seed": record.recipe.get("seed", 42)}
    for role, metrics in record.metrics.items():
        name = None if role == "validation" else record.data.splits[role].source
        split = evaluation_split(folder, split=name, labels=classifier.labels, **drawn)
        logits = classifier.logits(split.images(), batch_size)
        metric = ImageClassificationMetric(classifier.labels)
        accuracies[role] = metric.compute(predictions=logits, references=split.labels)["accuracy"]
        if len(split) != metrics.images:
            raise ModelError(
                f"split '{split.source}' has {len(split):,} images now, and had {metrics.images:,}: the data set is"
                " another one."
            )
    found = _judged(record, accuracies)
    here = installed_versions(name for name in record.versions if name not in ("python", "cuda"))
    found.notes += _notes(record, {**here, "processor": hardware()["processor"]})
    _compare_with_expected(found, record)
    return found


def _judged(record: RunRecord, accuracies: dict[str, float]) -> Verification:
    rows = []
    for role, metrics in record.metrics.items():
        low, high = metrics.accuracy_interval
        if role not in accuracies:
            raise ModelError(f"The run of the recipe has no {role} split, which the recorded one had.")
        rows.append(SplitComparison(role, metrics.images, metrics.accuracy, low, high, accuracies[role]))
    return Verification(rows)


def _machine(record: RunRecord) -> dict:
    """How and where the run was trained, by the words of the notes."""
    known = {key: getattr(record.training, key) for key in ("processes", "precision", "data_workers")}
    return known | {key: getattr(record.hardware, key) for key in ("processor", "threads", "gpus")}


def _notes(record: RunRecord, here: dict) -> list[str]:
    """What differs between then and `here`."""
    then = {**record.versions, **_machine(record)}
    differs = [f"{key} {then[key]} then, {here[key]} now" for key in then if key in here and then[key] != here[key]]
    notes = [f"differs    {difference}" for difference in differs]
    return notes or ["differs    nothing: the same versions on the same kind of machine"]


def _compare_with_expected(found: Verification, record: RunRecord) -> None:
    """Note the expected accuracy of a shipped recipe; to fall short of one that was measured is a failure."""
    expected = expected_accuracy(record)
    again = {row.split: 100 * row.again for row in found.rows}
    if not expected or "test" not in again:
        return
    reached, source = again["test"], f"recipes/{expected.file}"
    words = f"{expected.low:g} to {expected.high:g} %"
    verdict = "BELOW" if reached < expected.low else "above" if reached > expected.high else "inside"
    guess = "" if expected.is_measured else ", a guess"
    found.notes.append(f"expected   {words} by {source}{guess}; {reached:.2f} % is {verdict}")
    if verdict == "BELOW" and expected.is_measured:
        found.missed.append(f"test: accuracy {reached:.2f} % is below the {words} that {source} states.")


class Expected(NamedTuple):
    """Test accuracy in percent that the shipped recipe `file` expects."""

    low: float
    high: float
    is_measured: bool
    file: str


def expected_accuracy(record: RunRecord) -> Expected | None:
    """What a shipped recipe expects, where the run was one of it as it stands.

    A user's own recipe may have the name of a shipped one; so the command tells which it could be, and the values of
    the run whether it is.
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
        except RecipeError:  # it asks for what this machine has not
            continue
        training = recipe.training
        if training.expected_accuracy and _is_run_of(recipe, record):
            return Expected(*training.expected_accuracy, training.expected_accuracy_measured, path.name)
    return None


def _is_run_of(recipe: Recipe, record: RunRecord) -> bool:
    """Whether a run was of `recipe`; where it wrote, and the commit of its data, are its own."""
    own = {"output_dir", "dataset_revision"}
    return all(recipe.values.get(key) == value for key, value in record.recipe.items() if key not in own)
