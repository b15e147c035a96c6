"""Compare artifacts on one split and record the result."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from tqdm import tqdm

import hfvit
from hfvit.artifacts.artifact import Artifact, find_artifact
from hfvit.artifacts.constants import ENGINE_FACTS_FILE, RUN_FILE
from hfvit.artifacts.export_folder import FACTS_FILE, read_export_facts, write_export_facts
from hfvit.errors import ModelError
from hfvit.evaluation.split import EvaluationSplit
from hfvit.inference.classifier import Classifier, batched, load_classifier
from hfvit.inference.execution_providers import Providers
from hfvit.metrics.classification import accuracy_interval
from hfvit.utils.environment import hardware
from hfvit.utils.files import check_replaceable, read_object, wrap_write_errors, write_object
from hfvit.utils.formatting import aligned

# Latency: rounds over all artifacts, so that each meets the same moments of the machine; each round at most so long.
ROUNDS, CALLS, ROUND_SECONDS = 5, 10, 1.0
MARK = "*"  # of a row whose speed is not the model's alone
HEADER = (
    "artifact", "accuracy", "95 % interval", "change", "agreement", "max |dlogit|", "MB", "p50 ms", "p95 ms",
    "images/s", "threads",
)  # fmt: skip


@dataclass
class Comparison:
    """What `validate` found: one plain dict an artifact, the reference first."""

    rows: list[dict]
    facts: dict

    @property
    def failures(self) -> list[str]:
        """One sentence for each artifact that is worse than was allowed."""
        return [f"{row['artifact']}: {row['failure']}" for row in self.rows if row["failure"]]

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_dict(self) -> dict:
        """Plain JSON values."""
        return {**self.facts, "passed": self.passed, "artifacts": self.rows}

    def table(self) -> str:
        """Accuracy and speed of every artifact, and which rows and limits they were held to."""
        data, limits = self.facts["data"], self.facts["limits"]
        shown = [HEADER, *(_cells(row, is_reference=index == 0) for index, row in enumerate(self.rows))]
        asked = f"accuracy at most {limits['max_accuracy_drop']:g} points below the reference"
        if limits["min_agreement"] is not None:
            asked += f", top-1 agreement at least {limits['min_agreement']:.2%}"
        any_inside = any(row["includes_preprocessing"] for row in self.rows)
        lines = [
            *aligned(shown),
            "",
            f"data     {data['dataset']}, {data['split']}",
            f"speed    the model alone: latency at batch 1, images/s at batch {self.facts['batch_size']}",
            *([f"         {MARK} its preprocessing too, which the graph does by itself"] if any_inside else []),
            f"gate     {asked}: {'passed' if self.passed else 'FAILED'}",
        ]
        return "\n".join(lines)


def validate(
    reference: str | Path | Classifier,
    others: Sequence[str | Path | Classifier],
    split: EvaluationSplit,
    *,
    max_accuracy_drop: float = 0.5,
    min_agreement: float | None = None,
    batch_size: int = 16,
    device: str | None = None,
    threads: int | None = None,
    providers: Providers | None = None,
    show_progress: bool = True,
) -> Comparison:
    """Run each artifact over `split` and hold it to the reference.

    Args:
        max_accuracy_drop: in points (0.5 is half a percent of the pictures).
        min_agreement: smallest share of the pictures, in [0, 1], that must get the reference's class.
        device, threads: of what is loaded here, as `load_classifier` takes them; a `Classifier` stays where it is.
        providers: of the ONNX files that are loaded here, in the place of `device`.

    Raises `ModelError` where an artifact cannot be loaded or has other classes than the reference.
    """
    given = (reference, *others)
    classifiers = _loaded(given, device, threads, providers)
    orders = [_order(classifier, split.classes) for classifier in classifiers]
    tallies = [_Tally() for _ in classifiers]
    keys = [classifier.preprocessing for classifier in classifiers]
    # The bar is drawn on a terminal only; a log would fill with it.
    with tqdm(total=len(split), unit="image", desc="validate", disable=None if show_progress else True) as bar:
        for rows in batched(range(len(split)), batch_size):
            images, prepared, expected = list(split.images(rows)), {}, None
            for classifier, key, order, tally in zip(classifiers, keys, orders, tallies, strict=True):
                if key not in prepared:
                    prepared[key] = classifier.prepare(images)
                logits = classifier.run(prepared[key])[:, order]
                expected = logits if expected is None else expected
                tally.add(logits, expected, split.labels[rows])
            bar.update(len(rows))
    first = list(split.images(range(min(batch_size, len(split)))))
    speeds = measure_speed(classifiers, [first[index % len(first)] for index in range(batch_size)])
    rows = [
        {
            "artifact": classifier.name,
            **tally.result(tallies[0], len(split)),
            "megabytes": classifier.backend.bytes / 1e6,
            **speed,
            "includes_preprocessing": classifier.backend.takes_pixels,
            "device": classifier.backend.device,
            "threads": classifier.backend.threads,
        }
        for classifier, tally, speed in zip(classifiers, tallies, speeds, strict=True)
    ]
    facts = {
        "hfvit_version": hfvit.__version__,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": split.facts,
        "limits": {"max_accuracy_drop": max_accuracy_drop, "min_agreement": min_agreement},
        "batch_size": batch_size,
        "hardware": hardware(),
    }
    for row in rows:
        row["failure"] = _failure(row, rows[0], max_accuracy_drop, min_agreement)
    return Comparison(rows, facts)


def _loaded(given, device: str | None, threads: int | None, providers: Providers | None) -> list[Classifier]:
    is_graph = [not isinstance(c, Classifier) and find_artifact(c).is_graph for c in given]
    if providers is not None and not any(is_graph):
        raise ModelError("providers: none of the artifacts is an ONNX file, which alone ONNX Runtime's providers run.")
    where = [{"providers": providers} if graph and providers else {"device": device} for graph in is_graph]
    return [
        c if isinstance(c, Classifier) else load_classifier(c, threads=threads, **place)
        for c, place in zip(given, where, strict=True)
    ]


class _Tally:
    """Counts of one artifact, so that no more than a batch of logits is held."""

    def __init__(self):
        self.hits = self.agreed = self.not_finite = 0
        self.difference = 0.0

    def add(self, logits: np.ndarray, expected: np.ndarray, labels: np.ndarray) -> None:
        finite = np.isfinite(logits).all(axis=1)
        predicted = np.where(finite, logits.argmax(axis=1), -1)  # NaN would count as the first class
        self.hits += int((predicted == labels).sum())
        self.agreed += int((predicted == expected.argmax(axis=1)).sum())
        self.not_finite += int((~finite).sum())
        both = finite & np.isfinite(expected).all(axis=1)
        self.difference = max(self.difference, float(np.abs(logits[both] - expected[both]).max(initial=0.0)))

    def result(self, reference: "_Tally", count: int) -> dict:
        return {
            "accuracy": self.hits / count,
            "accuracy_interval": accuracy_interval(self.hits, count),
            "change_points": 100 * (self.hits - reference.hits) / count,
            "agreement": self.agreed / count,
            "max_logit_difference": self.difference,
            "not_finite": self.not_finite,
        }


def measure_speed(classifiers: Sequence[Classifier], images: list) -> list[dict]:
    """Latency at batch 1 (milliseconds) and images a second at `len(images)`, of each classifier without what
    `prepare` does (a graph's own preprocessing is in its figures); in rounds over all of them."""
    seconds = [{1: [], len(images): []} for _ in classifiers]
    for _ in range(ROUNDS):
        for classifier, taken in zip(classifiers, seconds, strict=True):
            for size, times in taken.items():
                prepared = classifier.prepare(images[:size])
                classifier.run(prepared)  # what the artifact before left in the caches is not its fault
                end = time.perf_counter() + ROUND_SECONDS
                for _ in range(CALLS):
                    start = time.perf_counter()
                    classifier.run(prepared)
                    times.append(time.perf_counter() - start)
                    if time.perf_counter() > end:
                        break
    return [
        {
            "latency_ms_p50": 1000 * float(np.percentile(taken[1], 50)),
            "latency_ms_p95": 1000 * float(np.percentile(taken[1], 95)),
            "images_per_second": len(images) / float(np.median(taken[len(images)])),
        }
        for taken in seconds
    ]


def _order(classifier: Classifier, classes: list[str]) -> list[int]:
    """Where this artifact has each of `classes`."""
    if sorted(classifier.labels) != sorted(classes):
        odd = sorted(set(classifier.labels) ^ set(classes))
        raise ModelError(
            f"{classifier.name} has other classes than the reference: {', '.join(odd[:6])}"
            f"{', ...' if len(odd) > 6 else ''} are in one of them only."
        )
    return [classifier.labels.index(name) for name in classes]


def _failure(row: dict, reference: dict, max_accuracy_drop: float, min_agreement: float | None) -> str | None:
    reasons = []
    if row["not_finite"]:
        reasons.append(f"its logits are NaN or infinite for {row['not_finite']:,} images")
    if -row["change_points"] > max_accuracy_drop + 1e-9:
        reasons.append(
            f"its accuracy {row['accuracy']:.2%} is {-row['change_points']:.2f} points below the reference's"
            f" {reference['accuracy']:.2%} (at most {max_accuracy_drop:g} allowed)"
        )
    if min_agreement is not None and row["agreement"] < min_agreement - 1e-9:
        reasons.append(
            f"it agrees with the reference on {row['agreement']:.2%} of the images (at least {min_agreement:.2%}"
            " asked)"
        )
    return f"{', and '.join(reasons)}." if reasons else None


def _cells(row: dict, is_reference: bool) -> tuple[str, ...]:
    low, high = row["accuracy_interval"]
    against = ("reference", "", "")
    if not is_reference:
        against = (f"{row['change_points']:+.2f}", f"{row['agreement']:.2%}", f"{row['max_logit_difference']:.2g}")
    return (
        row["artifact"] + (f" {MARK}" if row["includes_preprocessing"] else ""),
        f"{row['accuracy']:.2%}",
        f"{low:.2%} - {high:.2%}",
        *against,
        f"{row['megabytes']:.1f}",
        f"{row['latency_ms_p50']:.1f}",
        f"{row['latency_ms_p95']:.1f}",
        f"{row['images_per_second']:,.0f}",
        str(row["threads"]) if row["device"] == "cpu" else row["device"],
    )


def check_recordable(paths: Sequence[str | Path]) -> None:
    """For before the work: raise `ModelError` where `record` of the same `paths` could not read or replace a file."""
    artifacts = [find_artifact(path) for path in paths]
    files = [_run_file(artifacts[0])] + [a.folder / FACTS_FILE for a in artifacts if _export_entry(a) is not None]
    files += [_engine_file(a) for a in artifacts]
    for file in dict.fromkeys(filter(None, files)):
        check_replaceable(file)


def record(comparison: Comparison, paths: Sequence[str | Path]) -> list[Path]:
    """Enter the result beside the artifacts: run.json of the reference, export.json of each ONNX file and engine.json
    of each engine. The files written.

    `paths` are those of `comparison.rows`. Nothing written names a folder of this machine. Raises `ModelError` for a
    file that cannot be read or written.
    """
    artifacts = [find_artifact(path) for path in paths]
    base = artifacts[0].folder if artifacts[0].is_checkpoint else None
    rows = [
        {**row, "artifact": " ".join([_public_name(artifact, base), *_changes(row["artifact"])])}
        for row, artifact in zip(comparison.rows, artifacts, strict=True)
    ]
    written = []
    if run_file := _run_file(artifacts[0]):
        write_object(run_file, {**read_object(run_file), "gate": Comparison(rows, comparison.facts).to_dict()})
        written.append(run_file)
    for artifact, row in zip(artifacts, rows, strict=True):
        if engine_file := _engine_file(artifact):
            write_object(engine_file, {**read_object(engine_file), "gate": _gate(comparison, row, rows[0])})
            written.append(engine_file)
        if (entry := _export_entry(artifact)) is not None:
            gate = _gate(comparison, row, rows[0])
            with wrap_write_errors(artifact.folder / FACTS_FILE):
                write_export_facts(artifact.folder, artifact.file.name, {**entry, "gate": gate})
            written.append(artifact.folder / FACTS_FILE)
    return list(dict.fromkeys(written))


def _gate(comparison: Comparison, row: dict, reference: dict) -> dict:
    return {**comparison.facts, **row, "passed": row["failure"] is None, "reference": reference}


def _engine_file(artifact: Artifact) -> Path | None:
    """engine.json of an engine."""
    return artifact.beside(ENGINE_FACTS_FILE) if artifact.is_engine else None


def _run_file(reference: Artifact) -> Path | None:
    """run.json of a checkpoint that a run left."""
    file = reference.folder / RUN_FILE if reference.is_checkpoint and reference.folder else None
    return file if file and file.is_file() else None


def _export_entry(artifact: Artifact) -> dict | None:
    """What the export.json beside an ONNX file tells of it."""
    if not artifact.is_graph:
        return None
    files = read_export_facts(artifact.folder)["files"]
    if not isinstance(files, dict) or not isinstance(files.get(artifact.file.name, {}), dict):
        raise ModelError(f"{artifact.folder / FACTS_FILE} holds no table of files; delete it and export again.")
    return files.get(artifact.file.name)


def _changes(name: str) -> list[str]:
    """What `load_classifier` was asked to change of a checkpoint, as its name says."""
    return [word for word in name.split(" ") if word.startswith(("patch_size=", "merge_tokens="))]


def _public_name(artifact: Artifact, base: Path | None) -> str:
    """The artifact's place below the reference, else its last two names, else its Hub id."""
    path = artifact.file or artifact.folder
    if path is None:
        return artifact.source
    path = path.resolve()
    if base and path != base.resolve() and path.is_relative_to(base.resolve()):
        return path.relative_to(base.resolve()).as_posix()
    return f"{path.parent.name}/{path.name}" if artifact.file else path.name
