"""Compare checkpoints and exports on one split and record the result."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

import hfvit
from hfvit.artifacts.artifact import Artifact, find_artifact
from hfvit.artifacts.constants import ENGINE_RECORD_FILE, RUN_FILE
from hfvit.artifacts.engine_record import EngineRecord
from hfvit.artifacts.export_record import ExportRecord
from hfvit.artifacts.gate import ArtifactResult, Gate, GateLimits, Hardware
from hfvit.artifacts.run_record import RunRecord
from hfvit.artifacts.run_sections import MultiLabelMetrics, SplitMetrics
from hfvit.errors import ModelError, printable
from hfvit.evaluation.split import EvaluationSplit
from hfvit.inference.classifier import Classifier, PreparedImage, batched, load_classifier
from hfvit.inference.execution_providers import Providers
from hfvit.metrics.classification import accuracy_interval, classification_metrics
from hfvit.metrics.multilabel import (
    bootstrap_intervals,
    decisions,
    multilabel_metrics,
    multilabel_scalars,
    probabilities_of,
)
from hfvit.metrics.paired import CONFIDENCE, LARGEST_SAMPLE, PairedCounts, bootstrap_loss
from hfvit.utils.environment import hardware
from hfvit.utils.files import check_replaceable, wrap_write_errors
from hfvit.utils.formatting import aligned, shortened
from hfvit.utils.threads import map_in_threads

# Latency is measured in rounds over all artifacts, so that changes of the machine's load affect all of them.
ROUNDS = 5
CALLS = 10  # per round, at most
ROUND_SECONDS = 1.0  # per round, at most
PREPROCESSING_MARK = "*"  # marks rows whose speed includes the preprocessing
HEADER = (
    "95 % interval", "change (95 % interval)", "p", "agreement", "max |dlogit|", "MB", "p50 ms", "p95 ms", "images/s",
    "threads", "gate",
)  # fmt: skip
_SHOWN_BY_ROWS = ("images", "95 % interval")  # columns of the metrics that the table of artifacts has
SIGNIFICANCE = 1 - CONFIDENCE
SIGNIFICANT_FLIPS = 6  # fewer in one direction are not significant in McNemar's exact test
SAME_LOGITS = 1e-3  # largest difference, relative to max(1, largest logit), that cannot change the accuracy


@dataclass
class Comparison:
    """Result of `compare`.

    Attributes:
        gate: limits and results of the artifacts.
        metrics: all metrics of the reference, as in run.json. None if they were not computed, or its logits are not
            finite.
        saved: files that the result was saved to.
    """

    gate: Gate
    metrics: SplitMetrics | MultiLabelMetrics | None = None
    saved: list[Path] = field(default_factory=list)

    def __repr__(self) -> str:
        first = self.rows[0]
        state = "passed" if self.passed else "failed"
        score = f"{first.score.name} {first.score.value:.2%}"
        return f"Comparison({first.title}: {score}, {len(self.rows) - 1} compared with it, {state})"

    def __str__(self) -> str:
        return self.table()

    @property
    def rows(self) -> list[ArtifactResult]:
        """Return the results of the artifacts, the reference first."""
        return self.gate.artifacts

    @property
    def failures(self) -> list[str]:
        """Return why artifacts exceed the limits, one sentence each."""
        return [f"{row.title}: {row.failure}" for row in self.rows if row.failure]

    @property
    def warnings(self) -> list[str]:
        """Return for which artifacts the images are too few to tell, one sentence each."""
        return [f"{row.title}: {row.warning}" for row in self.rows if row.warning]

    @property
    def passed(self) -> bool:
        """Return whether all artifacts are within the limits."""
        return self.gate.passed

    def table(self) -> str:
        """Format accuracy and speed of the artifacts, data and limits."""
        data = self.gate.data
        limits = self.gate.limits
        score = self.rows[0].score
        cells = [
            ("artifact", score.name, *HEADER),
            *(_cells(row, is_reference=index == 0) for index, row in enumerate(self.rows)),
        ]
        requirement = f"{score.name} at most {limits.max_accuracy_drop:g} points below the reference, beyond chance"
        if limits.min_agreement is not None:
            what = "top-1 agreement" if score.key == "accuracy" else "agreement on all labels"
            requirement += f", {what} at least {limits.min_agreement:.2%}"
        lines = [
            *aligned(cells),
            "",
            f"data     {data.dataset}, {data.split}",
            f"speed    without preprocessing; latency at batch size 1, images/s at batch size {self.gate.batch_size}",
        ]
        if any(row.includes_preprocessing for row in self.rows):
            lines.append(f"         {PREPROCESSING_MARK} with preprocessing, which is part of the graph")
        if len(self.rows) > 1 or not self.passed:
            lines.append(f"gate     {requirement}: {'passed' if self.passed else 'FAILED'}")
        if self.metrics is not None:
            shown = {*_SHOWN_BY_ROWS, score.name}
            columns = self.metrics.columns() | self.metrics.further_columns()
            others = [f"{name} {value}" for name, value in columns.items() if name not in shown]
            lines.append(f"metrics  {', '.join(others)}{' (reference)' if len(self.rows) > 1 else ''}")
        lines += [f"warning  {warning}" for warning in self.warnings]
        return "\n".join(map(printable, lines))

    def class_table(self) -> str:
        """Format precision, recall and F1 of each class, an empty string without."""
        if self.metrics is None:
            return ""
        is_multi_label = isinstance(self.metrics, MultiLabelMetrics)
        rows = [("class", "images", "precision", "recall", "F1", *(("AP", "threshold") if is_multi_label else ()))]
        for each in self.metrics.per_class:
            cells = (each.label, f"{each.images:,}", f"{each.precision:.4f}", f"{each.recall:.4f}", f"{each.f1:.4f}")
            if is_multi_label:
                average_precision = each.average_precision
                cells += ("" if average_precision is None else f"{average_precision:.4f}", f"{each.threshold:.2f}")
            rows.append(cells)
        return "\n".join(aligned(rows))


def compare(
    reference: str | Path | Classifier,
    others: Sequence[str | Path | Classifier],
    split: EvaluationSplit,
    *,
    max_accuracy_drop: float = 0.5,
    min_agreement: float | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    providers: Providers | None = None,
    tta: str | None = None,
    all_metrics: bool = False,
    show_progress: bool = True,
) -> Comparison:
    """Evaluate artifacts on `split` and compare them with the reference.

    Args:
        reference: artifact to compare with, as a path, Hub id or `Classifier`.
        others: artifacts to compare.
        split: labeled images.
        max_accuracy_drop: largest drop in accuracy, of a multi-label model in micro F1, in percentage points. An
            artifact fails if the 95 % interval of its drop lies above, and the exact test of McNemar is significant.
        min_agreement: smallest fraction of images, 0 to 1, with the class, or all labels, that the reference predicts.
            It is a limit for these images, without a test. Default: none.
        batch_size: images per batch, also for the throughput. Default: that of the reference's device.
        device: device of the artifacts that are loaded here. Default: CUDA if available.
        threads: CPU threads of the artifacts that are loaded here. Default: PyTorch's.
        providers: ONNX Runtime execution providers of the ONNX files that are loaded here, instead of `device`.
        tta: also evaluate each artifact with this test-time augmentation, see `Classifier`.
        all_metrics: also compute all metrics of the reference, whose logits are then held in memory.
        show_progress: show a progress bar on a terminal.

    Returns:
        Accuracy, agreement and speed of each artifact.

    Raises:
        ModelError: an artifact cannot be loaded or has other classes than the reference.
    """
    classifiers = _load_all((reference, *others), device, threads, providers)
    if tta is not None:
        classifiers += [classifier.with_tta(tta) for classifier in classifiers]
    batch_size = classifiers[0].batch_size if batch_size is None else batch_size
    tallies, logits = _tally_all(classifiers, split, batch_size, show_progress, all_metrics)
    first = list(split.images(range(min(batch_size, len(split)))))
    speeds = measure_speed(classifiers, [first[index % len(first)] for index in range(batch_size)])
    limits = GateLimits(max_accuracy_drop=max_accuracy_drop, min_agreement=min_agreement)
    rows = [
        ArtifactResult(
            artifact=classifier.name,
            patch_size=classifier.patch_size,
            merge_tokens=classifier.merge_tokens,
            bf16=classifier.bf16 or None,
            tta=classifier.tta,
            **tally.result(tallies[0]),
            megabytes=classifier.backend.bytes / 1e6,
            **speed,
            includes_preprocessing=classifier.backend.takes_pixels,
            device=classifier.backend.device,
            threads=classifier.backend.threads,
            failure=None,
        )
        for classifier, tally, speed in zip(classifiers, tallies, speeds, strict=True)
    ]
    for row, tally in zip(rows[1:], tallies[1:], strict=True):
        for key, value in tally.paired(tallies[0], limits.max_accuracy_drop / 100).items():
            setattr(row, key, value)
        row.failure = _failure(row, rows[0], limits)
        row.warning = None if row.failure else _warning(row, limits, len(split))
    rows[0].failure = _failure(rows[0], rows[0], limits)
    gate = Gate(
        hfvit_version=hfvit.__version__,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        data=split.record,
        limits=limits,
        batch_size=batch_size,
        hardware=Hardware.from_json(hardware()),
        passed=not any(row.failure for row in rows),
        artifacts=rows,
    )
    thresholds = classifiers[0].thresholds
    order = _class_order(classifiers[0], split.classes)
    return Comparison(gate, _metrics(logits, split, None if thresholds is None else thresholds[order]))


def _metrics(
    logits: np.ndarray | None, split: EvaluationSplit, thresholds: np.ndarray | None
) -> SplitMetrics | MultiLabelMetrics | None:
    """Compute all metrics of an artifact, None without finite logits.

    Args:
        logits: its logits `(images, classes)`, or None.
        split: labeled images.
        thresholds: thresholds of a multi-label model `(classes,)`. Default: 0.5.
    """
    if logits is None or not np.isfinite(logits).all():
        return None
    if split.labels.ndim == 1:
        return SplitMetrics.from_json(classification_metrics(logits, split.labels, split.classes))
    targets = split.labels.astype(np.int64)
    return MultiLabelMetrics.from_json(multilabel_metrics(logits, targets, split.classes, thresholds))


def _tally_all(
    classifiers: Sequence[Classifier],
    split: EvaluationSplit,
    batch_size: int,
    show_progress: bool,
    keep_logits: bool,
) -> "tuple[list[_Tally | _LabelTally], np.ndarray | None]":
    """Count the answers of all artifacts in one pass over the images.

    Args:
        classifiers: classifiers of the artifacts, the reference first.
        split: labeled images.
        batch_size: images per batch.
        show_progress: show a progress bar on a terminal.
        keep_logits: return the logits of the reference.

    Returns:
        (tally of each artifact, logits of the reference `(images, classes)` or None).
    """
    orders = [_class_order(classifier, split.classes) for classifier in classifiers]
    tallies = [_tally(classifier, order, split) for classifier, order in zip(classifiers, orders, strict=True)]
    kept = np.empty((len(split), len(split.classes)), np.float32) if keep_logits else None
    keys = [classifier.preprocessing for classifier in classifiers]
    by_key = dict(zip(keys, classifiers, strict=True))  # classifiers with equal preprocessing share it

    def prepare(row: int) -> dict[str, PreparedImage]:
        (image,) = split.images([row])
        return {key: classifier.prepare_image(image) for key, classifier in by_key.items()}

    # disable=None: tqdm draws on a terminal only, not in a log.
    with tqdm(total=len(split), unit="image", desc="validate", disable=None if show_progress else True) as bar:
        prepared = map_in_threads(prepare, range(len(split)), 2 * batch_size)
        for rows in batched(range(len(split)), batch_size):
            images = list(islice(prepared, len(rows)))
            inputs = {key: classifier.collate([image[key] for image in images]) for key, classifier in by_key.items()}
            expected = None
            for classifier, key, order, tally in zip(classifiers, keys, orders, tallies, strict=True):
                logits = classifier.run(inputs[key])[:, order]
                if expected is None:
                    expected = logits
                    if kept is not None:
                        kept[rows] = logits
                tally.add(logits, expected, split.labels[rows])
            bar.update(len(rows))
    return tallies, kept


def _load_all(artifacts, device: str | None, threads: int | None, providers: Providers | None) -> list[Classifier]:
    """Load artifacts.

    Args:
        artifacts: paths, Hub ids, or classifiers that are returned as they are.
        device: device of artifacts without `providers`.
        threads: CPU threads of those that take them.
        providers: execution providers of ONNX files.
    """
    found = {item: find_artifact(item) for item in artifacts if not isinstance(item, Classifier)}
    if providers is not None and not any(artifact.is_onnx for artifact in found.values()):
        raise ModelError("providers: only available for ONNX files, but none of the artifacts is one.")
    if threads is not None and found and not any(artifact.takes_threads for artifact in found.values()):
        raise ModelError("threads: only available for checkpoints, ONNX and OpenVINO files, but there is none.")

    def load(item: str | Path) -> Classifier:
        place = {"providers": providers} if found[item].is_onnx and providers else {"device": device}
        return load_classifier(item, threads=threads if found[item].takes_threads else None, **place)

    return [item if isinstance(item, Classifier) else load(item) for item in artifacts]


def _tally(classifier: Classifier, order: list[int], split: EvaluationSplit) -> "_Tally | _LabelTally":
    """Create the counts of an artifact.

    Args:
        classifier: classifier of the artifact.
        order: index in the logits of each class of the split.
        split: split with one class or several labels per image.
    """
    if split.labels.ndim == 1:
        return _Tally()
    return _LabelTally(None if classifier.thresholds is None else classifier.thresholds[order])


class _Tally:
    """Running counts of one artifact, so that only one batch of logits is in memory."""

    def __init__(self):
        self.agreed = self.not_finite = 0
        self.difference = self.largest = 0.0
        self._correct: list[np.ndarray] = []

    def add(self, logits: np.ndarray, expected: np.ndarray, labels: np.ndarray) -> None:
        """Count the answers of a batch.

        Args:
            logits: logits of the artifact `(batch, classes)`.
            expected: logits of the reference `(batch, classes)`.
            labels: class indices `(batch,)`.
        """
        finite = np.isfinite(logits).all(axis=1)
        predicted = np.where(finite, logits.argmax(axis=1), -1)  # NaN would count as the first class
        self._correct.append(predicted == labels)
        self.agreed += int((predicted == expected.argmax(axis=1)).sum())
        self.not_finite += int((~finite).sum())
        both = finite & np.isfinite(expected).all(axis=1)
        self.difference = max(self.difference, float(np.abs(logits[both] - expected[both]).max(initial=0.0)))
        self.largest = max(self.largest, float(np.abs(expected[both]).max(initial=0.0)))

    @cached_property
    def correct(self) -> np.ndarray:
        """Return whether each image is classified correctly (images,)."""
        return np.concatenate(self._correct)

    def result(self, reference: "_Tally") -> dict:
        """Return the accuracy and the differences from the reference."""
        count = len(self.correct)
        hits = int(self.correct.sum())
        return {
            "accuracy": hits / count,
            "accuracy_interval": tuple(accuracy_interval(hits, count)),
            "change_points": 100 * (hits - int(reference.correct.sum())) / count,
            "agreement": self.agreed / count,
            "max_logit_difference": self.difference,
            "not_finite": self.not_finite,
        }

    def paired(self, reference: "_Tally", allowed: float) -> dict:
        """Return test, interval and sample size of the loss of accuracy.

        Args:
            reference: counts of the reference.
            allowed: largest allowed loss, 0 to 1.
        """
        counts = PairedCounts.of(reference.correct, self.correct)
        found = {
            "lost": int(counts.lost),
            "gained": int(counts.gained),
            "change_interval": _change(counts.loss_interval()),
            "p_value": counts.p_value(),
        }
        same = self.agreed == len(self.correct) and self.difference <= SAME_LOGITS * max(1.0, self.largest)
        if not same:
            needed = counts.images_needed(allowed)
            found["images_needed"] = LARGEST_SAMPLE if needed is None else needed
        return found


class _LabelTally:
    """Multi-label logits of one artifact, which average precision needs all at once.

    Args:
        thresholds: thresholds of the probabilities `(classes,)`. Default: 0.5.
    """

    def __init__(self, thresholds: np.ndarray | None):
        self.thresholds = thresholds
        self._logits: list[np.ndarray] = []
        self._targets: list[np.ndarray] = []

    def add(self, logits: np.ndarray, expected: np.ndarray, labels: np.ndarray) -> None:
        """Keep the logits of a batch.

        Args:
            logits: logits of the artifact `(batch, classes)`.
            expected: ignored.
            labels: 0/1 targets `(batch, classes)`.
        """
        self._logits.append(logits)
        self._targets.append(labels)

    @cached_property
    def logits(self) -> np.ndarray:
        return np.concatenate(self._logits)

    @cached_property
    def targets(self) -> np.ndarray:
        return np.concatenate(self._targets).astype(np.int64)

    @cached_property
    def probabilities(self) -> np.ndarray:
        return probabilities_of(self.logits)

    @cached_property
    def predicted(self) -> np.ndarray:
        return decisions(self.probabilities, self.thresholds)

    @cached_property
    def scores(self) -> dict[str, float]:
        return multilabel_scalars(self.logits, self.targets, self.thresholds)

    def result(self, reference: "_LabelTally") -> dict:
        """Return micro F1, mAP and the differences from the reference."""
        interval = bootstrap_intervals(self.probabilities, self.targets, self.predicted)["micro_f1_interval"]
        finite = np.isfinite(self.logits).all(axis=1)
        return {
            "micro_f1": self.scores["micro_f1"],
            "micro_f1_interval": tuple(interval),
            "map": self.scores["map"],
            "change_points": 100 * (self.scores["micro_f1"] - reference.scores["micro_f1"]),
            "agreement": float((finite & (self.predicted == reference.predicted).all(axis=1)).mean()),
            "max_logit_difference": self._difference(reference),
            "not_finite": int((~finite).sum()),
        }

    def paired(self, reference: "_LabelTally", allowed: float) -> dict:
        """Test the loss of micro F1 by a paired bootstrap.

        Args:
            reference: logits of the reference.
            allowed: largest allowed loss, 0 to 1.

        Returns:
            Interval, p-value and required sample size, by the names of the record.
        """
        (low, high), p_value = bootstrap_loss(reference.predicted, self.predicted, self.targets)
        found = {"change_interval": _change((low, high)), "p_value": p_value}
        largest = float(np.abs(reference.logits).max(initial=0.0))
        same = (self.predicted == reference.predicted).all()
        if not (same and self._difference(reference) <= SAME_LOGITS * max(1.0, largest)):
            decided = low > allowed or high <= allowed
            distance = abs(allowed - (reference.scores["micro_f1"] - self.scores["micro_f1"]))
            # The width of the interval is proportional to the root of the number of images.
            factor = 1.0 if decided else ((high - low) / 2 / max(distance, 1e-9)) ** 2
            found["images_needed"] = min(LARGEST_SAMPLE, math.ceil(len(self.targets) * max(1.0, factor)))
        return found

    def _difference(self, reference: "_LabelTally") -> float:
        both = np.isfinite(self.logits).all(axis=1) & np.isfinite(reference.logits).all(axis=1)
        return float(np.abs(self.logits[both] - reference.logits[both]).max(initial=0.0))


def _change(loss: tuple[float, float]) -> tuple[float, float]:
    """Convert the interval of a loss, 0 to 1, to a change in percentage points."""
    return -100 * loss[1], -100 * loss[0]


def measure_speed(classifiers: Sequence[Classifier], images: list) -> list[dict]:
    """Measure latency at batch size 1 and throughput at batch size `len(images)`.

    Preprocessing is not included, unless it is part of an ONNX graph.

    Args:
        classifiers: classifiers to measure, in rounds over all of them.
        images: RGB images, or pairs of image and text.

    Returns:
        For each classifier: `latency_ms_p50`, `latency_ms_p95`, `images_per_second`.
    """
    seconds = [{1: [], len(images): []} for _ in classifiers]
    for _ in range(ROUNDS):
        for classifier, seconds_by_size in zip(classifiers, seconds, strict=True):
            for size, times in seconds_by_size.items():
                times += _time_calls(classifier, images[:size])
    return [
        {
            "latency_ms_p50": 1000 * float(np.percentile(seconds_by_size[1], 50)),
            "latency_ms_p95": 1000 * float(np.percentile(seconds_by_size[1], 95)),
            "images_per_second": len(images) / float(np.median(seconds_by_size[len(images)])),
        }
        for seconds_by_size in seconds
    ]


def _time_calls(classifier: Classifier, images: list) -> list[float]:
    """Return the seconds of each call in a round of measurements."""
    prepared = classifier.prepare(images)
    classifier.run(prepared)  # warm-up
    times: list[float] = []
    end = time.perf_counter() + ROUND_SECONDS
    for _ in range(CALLS):
        start = time.perf_counter()
        classifier.run(prepared)
        times.append(time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return times


def _class_order(classifier: Classifier, classes: list[str]) -> list[int]:
    """Return the index of each of `classes` in the classifier's labels."""
    if sorted(classifier.labels) != sorted(classes):
        odd = sorted(set(classifier.labels) ^ set(classes))
        raise ModelError(
            f"{classifier.name}: its classes differ from the reference's (only in one of them: {shortened(odd, 6)})."
        )
    return [classifier.labels.index(name) for name in classes]


def _failure(row: ArtifactResult, reference: ArtifactResult, limits: GateLimits) -> str | None:
    reasons = []
    if row.not_finite:
        reasons.append(f"its logits are NaN or infinite for {row.not_finite:,} images")
    if row.change_interval is not None and _is_beyond_chance(row, limits.max_accuracy_drop):
        low, high = row.change_interval
        reasons.append(
            f"its {row.score.name} of {row.score.value:.2%} is {-row.change_points:.2f} points below the reference's"
            f" {reference.score.value:.2%} (95 % interval {-high:.2f} to {-low:.2f}; max_accuracy_drop is"
            f" {limits.max_accuracy_drop:g})"
        )
    if limits.min_agreement is not None and row.agreement < limits.min_agreement - 1e-9:
        reasons.append(
            f"it agrees with the reference on {row.agreement:.2%} of the images (min_agreement is"
            f" {limits.min_agreement:.2%})"
        )
    return f"{', and '.join(reasons)}." if reasons else None


def _is_beyond_chance(row: ArtifactResult, allowed: float) -> bool:
    """Return whether the drop exceeds `allowed` percentage points beyond chance."""
    # McNemar's test is of no drop at all, which says nothing about a demanded rise (a negative `allowed`).
    return -row.change_interval[1] > allowed + 1e-9 and (allowed < 0 or row.p_value < SIGNIFICANCE)


def _warning(row: ArtifactResult, limits: GateLimits, images: int) -> str | None:
    """Return why the images are too few to tell whether the drop is allowed."""
    needed = row.images_needed
    if needed is None or (needed <= images and (row.lost is None or -row.change_points <= limits.max_accuracy_drop)):
        return None
    low, high = row.change_interval
    if needed <= images:  # decided by the interval, but not significant
        needed = math.ceil(images * SIGNIFICANT_FLIPS / max(1, row.lost - row.gained))
    many = f"more than {LARGEST_SAMPLE:,}" if needed >= LARGEST_SAMPLE else f"about {needed:,}"
    return (
        f"{images:,} images are too few to tell a change of {row.change_points:+.2f} points (95 % interval {low:+.2f}"
        f" to {high:+.2f}) from the allowed {-limits.max_accuracy_drop:g}; {many} would be enough."
    )


def _cells(row: ArtifactResult, is_reference: bool) -> tuple[str, ...]:
    low, high = row.score.interval
    against = ("reference", "", "", "")
    if not is_reference:
        p_value = f"{row.p_value:.2g}"
        against = (row.change, p_value, f"{row.agreement:.2%}", f"{row.max_logit_difference:.2g}")
    return (
        row.title + (f" {PREPROCESSING_MARK}" if row.includes_preprocessing else ""),
        f"{row.score.value:.2%}",
        f"{low:.2%} - {high:.2%}",
        *against,
        f"{row.megabytes:.1f}",
        f"{row.latency_ms_p50:.1f}",
        f"{row.latency_ms_p95:.1f}",
        f"{row.images_per_second:,.0f}",
        str(row.threads) if row.device == "cpu" else row.device,
        "" if is_reference and not row.failure else row.verdict,
    )


def check_recordable(paths: Sequence[str | Path]) -> None:
    """Raise `ModelError` if `record` could not update a file of these artifacts."""
    artifacts = [find_artifact(path) for path in paths]
    folders = [(RunRecord, _run_folder(artifacts[0]))]
    folders += [(EngineRecord, _engine_folder(artifact)) for artifact in artifacts]
    folders += [(ExportRecord, _export_folder(artifact)) for artifact in artifacts]
    for kind, folder in dict.fromkeys(folders):
        if folder is not None:
            kind.load(folder)
            check_replaceable(folder / kind.FILE)


def record(comparison: Comparison, paths: Sequence[str | Path]) -> list[Path]:
    """Save the result in the records of the artifacts.

    These are run.json of the reference, export.json of ONNX files and engine.json of engines, with local paths
    redacted.

    Args:
        comparison: result of `compare`.
        paths: the artifacts of `comparison.rows`.

    Returns:
        The files written.

    Raises:
        ModelError: a file cannot be read or written.
    """
    artifacts = [find_artifact(path) for path in paths]
    base = artifacts[0].folder if artifacts[0].is_checkpoint else None
    rows = [
        replace(row, artifact=_redacted_name(artifact, base) or row.artifact)
        for row, artifact in zip(comparison.rows, artifacts, strict=True)
    ]
    gate = replace(comparison.gate, artifacts=rows)
    written = []
    if (folder := _run_folder(artifacts[0])) is not None:
        run = RunRecord.load(folder)
        run.gate = gate
        with wrap_write_errors(folder / RUN_FILE):
            written.append(run.save(folder))
    for artifact, row in zip(artifacts, rows, strict=True):
        if row.tta is not None:  # an export does not mirror its input by itself
            continue
        if (folder := _engine_folder(artifact)) is not None:
            engine = EngineRecord.load(folder)
            engine.gate = gate.of(row, rows[0])
            with wrap_write_errors(folder / ENGINE_RECORD_FILE):
                written.append(engine.save(folder))
        if (folder := _export_folder(artifact)) is not None:
            export = ExportRecord.load(folder)
            entry = replace(export.files[artifact.file.name], gate=gate.of(row, rows[0]))
            written.append(export.enter(folder, artifact.file.name, entry))
    return list(dict.fromkeys(written))


def _engine_folder(artifact: Artifact) -> Path | None:
    """Return the folder of an engine's engine.json."""
    file = artifact.beside(ENGINE_RECORD_FILE) if artifact.is_engine else None
    return file and file.parent


def _run_folder(reference: Artifact) -> Path | None:
    """Return the folder of a checkpoint with run.json."""
    folder = reference.folder if reference.is_checkpoint else None
    return folder if folder and (folder / RUN_FILE).is_file() else None


def _export_folder(artifact: Artifact) -> Path | None:
    """Return the folder of an ONNX or OpenVINO file that is listed in its export.json."""
    is_known = artifact.is_graph and artifact.file.name in ExportRecord.load(artifact.folder).files
    return artifact.folder if is_known else None


def _redacted_name(artifact: Artifact, base: Path | None) -> str | None:
    """Name an artifact without local folders.

    Args:
        artifact: artifact to name.
        base: folder of the reference.

    Returns:
        The path relative to `base`, or the last two parts of another path; None for a Hub id.
    """
    path = artifact.file or artifact.folder
    if path is None:
        return None
    path = path.resolve()
    if base and path != base.resolve() and path.is_relative_to(base.resolve()):
        return path.relative_to(base.resolve()).as_posix()
    return f"{path.parent.name}/{path.name}" if artifact.file else path.name
