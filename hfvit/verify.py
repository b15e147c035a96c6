"""Repeat a finished run, or its evaluation, and compare with the recorded accuracy."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from hfvit.artifacts.run_record import read_run
from hfvit.errors import ModelError, RecipeError
from hfvit.evaluation.split import evaluation_split
from hfvit.inference.classifier import load_classifier
from hfvit.metrics.classification import ImageClassificationMetric
from hfvit.recipe.files import shipped_recipes
from hfvit.recipe.loader import load_recipe
from hfvit.utils.environment import hardware, installed_versions
from hfvit.utils.files import file_sha256
from hfvit.utils.formatting import aligned

HEADER = ("split", "images", "recorded", "95 % interval", "again", "change", "verdict")
WEIGHTS = "model.safetensors"
SCORE = re.compile(r"^# Expected score: ([\d.]+) to ([\d.]+) %(, a guess)?", re.MULTILINE)


@dataclass
class Verification:
    """`rows`, one a split, hold the recorded and the new accuracy; `notes` what else is known of both.

    `missed` is a sentence for what the recipe promises and the run did not reach.
    """

    rows: list[dict]
    notes: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """One sentence for each split whose accuracy is not what was recorded, or less than the recipe promises."""
        return [
            f"{row['split']}: accuracy {row['again']:.2%} on {row['images']:,} images lies outside the recorded"
            f" {row['low']:.2%} to {row['high']:.2%}."
            for row in self.rows
            if not row["inside"]
        ] + self.missed

    def table(self) -> str:
        cells = [
            (
                row["split"],
                f"{row['images']:,}",
                f"{row['recorded']:.2%}",
                f"{row['low']:.2%} - {row['high']:.2%}",
                f"{row['again']:.2%}",
                f"{100 * (row['again'] - row['recorded']):+.2f}",
                "inside" if row["inside"] else "OUTSIDE",
            )
            for row in self.rows
        ]
        return "\n".join([*aligned([HEADER, *cells]), "", *self.notes])


def compare_runs(folder: str | Path, again: str | Path) -> Verification:
    """The run in `folder` against the one in `again`, which came of its recipe."""
    old, new = read_run(folder), read_run(again)
    found = _judged(old, {role: metrics["accuracy"] for role, metrics in new["metrics"].items()})
    first, second = (Path(root).expanduser() / WEIGHTS for root in (folder, again))
    if first.is_file():
        same = file_sha256(first) == file_sha256(second)
        found.notes.append(f"weights    {'the same to the last bit' if same else 'not the same bits'}")
    here = {**new["versions"], **_machine(new)}
    found.notes += _notes(old, here)
    _compare_with_the_head(found, old)
    return found


def evaluate_again(folder: str | Path, batch_size: int = 32, device: str | None = None) -> Verification:
    """The checkpoint in `folder` on the splits that run.json names, read by its recipe."""
    facts = read_run(folder)
    classifier = load_classifier(folder, device)
    accuracies, recipe = {}, facts["recipe"]
    drawn = {"max_samples": recipe.get("max_eval_samples"), "seed": recipe.get("seed", 42)}
    for role in facts["metrics"]:
        name = None if role == "validation" else facts["data"]["splits"][role]["source"]
        split = evaluation_split(folder, split=name, labels=classifier.labels, **drawn)
        logits = classifier.logits(split.images(), batch_size)
        metric = ImageClassificationMetric(classifier.labels)
        accuracies[role] = metric.compute(predictions=logits, references=split.labels)["accuracy"]
        if len(split) != facts["metrics"][role]["images"]:
            raise ModelError(
                f"split '{split.source}' has {len(split):,} images now, and had {facts['metrics'][role]['images']:,}:"
                " the data set is another one."
            )
    found = _judged(facts, accuracies)
    here = installed_versions(name for name in facts["versions"] if name not in ("python", "cuda"))
    found.notes += _notes(facts, {**here, "processor": hardware()["processor"]})
    _compare_with_the_head(found, facts)
    return found


def _judged(facts: dict, accuracies: dict[str, float]) -> Verification:
    rows = []
    for role, metrics in facts["metrics"].items():
        low, high = metrics["accuracy_interval"]
        if role not in accuracies:
            raise ModelError(f"The run of the recipe has no {role} split, which the recorded one had.")
        inside = low - 1e-9 <= accuracies[role] <= high + 1e-9
        recorded = {"recorded": metrics["accuracy"], "low": low, "high": high, "images": metrics["images"]}
        rows.append({"split": role, **recorded, "again": accuracies[role], "inside": inside})
    return Verification(rows)


def _machine(facts: dict) -> dict:
    training, machine = facts["training"], facts["hardware"]
    known = {key: training.get(key) for key in ("processes", "precision", "data_workers")}
    return known | {key: machine.get(key) for key in ("processor", "threads", "gpus")}


def _notes(facts: dict, here: dict) -> list[str]:
    """What differs between then and `here`."""
    then = {**facts["versions"], **_machine(facts)}
    differs = [f"{key} {then[key]} then, {here[key]} now" for key in then if key in here and then[key] != here[key]]
    notes = [f"differs    {difference}" for difference in differs]
    return notes or ["differs    nothing: the same versions on the same kind of machine"]


def _compare_with_the_head(found: Verification, facts: dict) -> None:
    """Note what the head of a shipped recipe promises; to fall short of it is a failure where it is no guess."""
    expected = expected_score(facts)
    again = {row["split"]: 100 * row["again"] for row in found.rows}
    if not expected or "test" not in again:
        return
    reached, source = again["test"], f"recipes/{expected.file}"
    words = f"{expected.low:g} to {expected.high:g} %"
    verdict = "BELOW" if reached < expected.low else "above" if reached > expected.high else "inside"
    guess = ", a guess" if expected.is_guess else ""
    found.notes.append(f"expected   {words} by the head of {source}{guess}; {reached:.2f} % is {verdict}")
    if verdict == "BELOW" and not expected.is_guess:
        found.missed.append(f"test: accuracy {reached:.2f} % is below the {words} that {source} states.")


class Expected(NamedTuple):
    """Test accuracy in per cent that the shipped recipe `file` states in its head."""

    low: float
    high: float
    is_guess: bool
    file: str


def expected_score(facts: dict) -> Expected | None:
    """What a shipped recipe states, where the run of `facts` was one of it as it stands.

    A user's own recipe may have the name of a shipped one; so the command tells which it could be, and the values of
    the run whether it is.
    """
    shipped = shipped_recipes()
    for path in (
        shipped[stem] for word in shlex.split(facts.get("command") or "") if (stem := Path(word).stem) in shipped
    ):
        found = SCORE.search(path.read_text(encoding="utf-8"))
        if found and _has_values_of(path, facts["recipe"]):
            return Expected(float(found[1]), float(found[2]), bool(found[3]), path.name)
    return None


def _has_values_of(path: Path, run: dict) -> bool:
    """Whether a run was of the recipe `path`; where it wrote, and the commit of its data, are its own."""
    try:
        recipe = load_recipe([str(path)]).values
    except RecipeError:  # it asks for what this machine has not
        return False
    own = {"output_dir", "dataset_revision"}
    return all(recipe.get(key) == run[key] for key in run.keys() - own)
