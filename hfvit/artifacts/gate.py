"""Results of `hfvit validate` in run.json, export.json and engine.json."""

from dataclasses import dataclass, field, fields
from typing import Any

from hfvit.artifacts.json_record import OPTIONAL, FieldError, Record
from hfvit.artifacts.run_sections import Score

CHANGES = ("patch_size", "merge_tokens")  # changes of a checkpoint without training
MAX_DIGITS = 9


@dataclass(kw_only=True)
class Hardware(Record):
    """Machine of a run or a validation, without its host name."""

    processor: str
    cores: int
    threads: int | None = None
    gpus: list[str]
    system: str | None = None


@dataclass(kw_only=True)
class EvaluationData(Record):
    """Labeled images of a validation; `split` is a description."""

    dataset: str
    dataset_config_name: str | None
    split: str
    images: int
    fingerprint: str


@dataclass(kw_only=True)
class GateLimits(Record):
    """Limits of the accuracy gate.

    Attributes:
        max_accuracy_drop: largest drop in accuracy or micro F1, in percentage points; an artifact is refused if its
            drop is larger beyond chance.
        min_agreement: smallest fraction of images with the class, or all labels, that the reference predicts.
    """

    max_accuracy_drop: float
    min_agreement: float | None


@dataclass(kw_only=True)
class ArtifactResult(Record):
    """Results of one artifact.

    `patch_size`, `merge_tokens` and `bf16` are changes of a checkpoint, None without, and `tta` the test-time
    augmentation of any artifact. `change_points` (percentage points), `agreement` and `max_logit_difference` compare
    with the reference. `lost` and `gained` are the images that only the reference and only the artifact classify
    correctly, `change_interval` the 95 % interval of `change_points` and `p_value` that of no change
    (`metrics.paired`). `failure` is the reason why the artifact exceeds the limits, `warning` why the images are too
    few to tell, and `images_needed` how many would be enough. Older records have `failure` only.

    A single-label artifact has the accuracy; a multi-label one mAP, and micro F1 at its thresholds. `agreement` is the
    fraction of images with the same class, or with all labels the same.
    """

    artifact: str
    patch_size: int | None = field(default=None, metadata=OPTIONAL)
    merge_tokens: int | None = field(default=None, metadata=OPTIONAL)
    bf16: bool | None = field(default=None, metadata=OPTIONAL)
    tta: str | None = field(default=None, metadata=OPTIONAL)
    accuracy: float | None = field(default=None, metadata=OPTIONAL)
    accuracy_interval: tuple[float, float] | None = field(default=None, metadata=OPTIONAL)
    micro_f1: float | None = field(default=None, metadata=OPTIONAL)
    micro_f1_interval: tuple[float, float] | None = field(default=None, metadata=OPTIONAL)
    map: float | None = field(default=None, metadata=OPTIONAL)
    change_points: float
    change_interval: tuple[float, float] | None = field(default=None, metadata=OPTIONAL)
    lost: int | None = field(default=None, metadata=OPTIONAL)
    gained: int | None = field(default=None, metadata=OPTIONAL)
    p_value: float | None = field(default=None, metadata=OPTIONAL)
    images_needed: int | None = field(default=None, metadata=OPTIONAL)
    warning: str | None = field(default=None, metadata=OPTIONAL)
    agreement: float
    max_logit_difference: float
    not_finite: int
    megabytes: float
    latency_ms_p50: float
    latency_ms_p95: float
    images_per_second: float
    includes_preprocessing: bool
    device: str
    threads: int | None
    failure: str | None

    def check(self) -> None:
        if None in (self.accuracy, self.accuracy_interval) and None in (self.micro_f1, self.micro_f1_interval):
            raise FieldError("accuracy" if self.accuracy is None else "accuracy_interval")

    @property
    def score(self) -> Score:
        """Return the score that is compared with the reference."""
        if self.accuracy is not None:
            return Score("accuracy", "accuracy", self.accuracy, self.accuracy_interval)
        return Score("micro_f1", "micro F1", self.micro_f1, self.micro_f1_interval)

    @property
    def title(self) -> str:
        """Return the artifact with its changes, for tables and messages."""
        changes = [f"{key}={getattr(self, key)}" for key in CHANGES if getattr(self, key) is not None]
        changes += ["bf16"] if self.bf16 else []
        changes += [f"tta={self.tta}"] if self.tta else []
        return " ".join([self.artifact, *changes])

    @property
    def change(self) -> str:
        """Return the change in percentage points with its interval, for tables."""
        if self.change_interval is None:
            return f"{self.change_points:+.2f}"
        low, high = self.change_interval
        return f"{self.change_points:+.2f} ({low:+.2f} to {high:+.2f})"

    @property
    def verdict(self) -> str:
        """Return whether the artifact is within the limits, for tables."""
        if self.failure:
            return "REFUSED"
        return "passed, too few images" if self.warning else "passed"


@dataclass(kw_only=True)
class Conditions(Record):
    """Conditions of a comparison: version, time, data, limits and machine."""

    hfvit_version: str
    finished: str
    data: EvaluationData
    limits: GateLimits
    batch_size: int
    hardware: Hardware


@dataclass(kw_only=True)
class Gate(Conditions):
    """Complete comparison, in run.json; the first artifact is the reference."""

    passed: bool
    artifacts: list[ArtifactResult]

    def check(self) -> None:
        """Raise `FieldError` if there is no artifact."""
        if not self.artifacts:
            raise FieldError("artifacts", "must have the reference, got []")

    def of(self, row: ArtifactResult, reference: ArtifactResult | None = None) -> "ArtifactGate":
        """Return the result of one artifact.

        Args:
            row: the artifact.
            reference: the reference.
        """
        shared = {each.name: getattr(self, each.name) for each in fields(Conditions)}
        return ArtifactGate(**{**shared, **vars(row)}, passed=row.failure is None, reference=reference)


@dataclass(kw_only=True)
class ArtifactGate(ArtifactResult, Conditions):
    """Result of one artifact, in export.json and engine.json."""

    passed: bool
    reference: ArtifactResult | None = field(default=None, metadata=OPTIONAL)


def migrate_gate(gate: Any) -> Any:
    """Convert a gate of version 0.1, with the key `artefact` and changes in its value."""
    if not isinstance(gate, dict):
        return gate
    renamed = {{"artefacts": "artifacts", "artefact": "artifact"}.get(key, key): value for key, value in gate.items()}
    if isinstance(renamed.get("artifacts"), list):
        renamed["artifacts"] = [migrate_gate(row) for row in renamed["artifacts"]]
    if "reference" in renamed:
        renamed["reference"] = migrate_gate(renamed["reference"])
    if isinstance(renamed.get("artifact"), str):
        renamed |= _split_changes(renamed["artifact"])
    return renamed


def _split_changes(name: str) -> dict[str, Any]:
    """Split `run patch_size=4` into the artifact `run` and its patch size."""
    changes = {}
    while " " in name:
        rest, _, word = name.rpartition(" ")
        key, _, value = word.partition("=")
        if key not in CHANGES or not value.isdecimal() or len(value) > MAX_DIGITS:
            break
        changes[key] = int(value)
        name = rest
    return {"artifact": name, **changes}
