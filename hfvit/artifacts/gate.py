"""What `hfvit validate` found, as run.json, export.json and engine.json hold it."""

from dataclasses import dataclass, field, fields
from typing import Any

from hfvit.artifacts.json_record import OPTIONAL, Record

CHANGES = ("patch_size", "merge_tokens")  # of a checkpoint, without training
LONGEST_NUMBER = 9  # digits


@dataclass(kw_only=True)
class Hardware(Record):
    """The machine of a run or a validation, without its name."""

    processor: str
    cores: int
    threads: int | None = None
    gpus: list[str]
    system: str | None = None


@dataclass(kw_only=True)
class EvaluationData(Record):
    """The labelled images of a validation; `split` describes them in words."""

    dataset: str
    dataset_config_name: str | None
    split: str
    images: int
    fingerprint: str


@dataclass(kw_only=True)
class GateLimits(Record):
    """What an artifact may lose: accuracy in points; the smallest share of images with the reference's class."""

    max_accuracy_drop: float
    min_agreement: float | None


@dataclass(kw_only=True)
class ArtifactResult(Record):
    """Figures of one artifact.

    `patch_size` and `merge_tokens` are what a checkpoint was changed to, None where it was not. Differences, in
    `change_points`, `agreement` and `max_logit_difference`, are from the reference. `failure` is a sentence.
    """

    artifact: str
    patch_size: int | None = field(default=None, metadata=OPTIONAL)
    merge_tokens: int | None = field(default=None, metadata=OPTIONAL)
    accuracy: float
    accuracy_interval: tuple[float, float]
    change_points: float
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

    @property
    def title(self) -> str:
        """The artifact with its changes, for tables and messages."""
        changes = [f"{key}={getattr(self, key)}" for key in CHANGES if getattr(self, key) is not None]
        return " ".join([self.artifact, *changes])


@dataclass(kw_only=True)
class Conditions(Record):
    """When, on what and where artifacts were compared."""

    hfvit_version: str
    finished: str
    data: EvaluationData
    limits: GateLimits
    batch_size: int
    hardware: Hardware


@dataclass(kw_only=True)
class Gate(Conditions):
    """A whole comparison, the reference first; in run.json."""

    passed: bool
    artifacts: list[ArtifactResult]

    def of(self, row: ArtifactResult, reference: ArtifactResult | None = None) -> "ArtifactGate":
        """The part of the comparison that is about one artifact."""
        shared = {each.name: getattr(self, each.name) for each in fields(Conditions)}
        return ArtifactGate(**{**shared, **vars(row)}, passed=row.failure is None, reference=reference)


@dataclass(kw_only=True)
class ArtifactGate(ArtifactResult, Conditions):
    """The result of one artifact; in export.json and engine.json."""

    passed: bool
    reference: ArtifactResult | None = field(default=None, metadata=OPTIONAL)


def migrate_gate(gate: Any) -> Any:
    """A gate of version 0.1: `artefact` is `artifact`, and the changes stand in that name."""
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
    """`run patch_size=4` as the artifact `run` with its patch size."""
    changes = {}
    while " " in name:
        rest, _, word = name.rpartition(" ")
        key, _, value = word.partition("=")
        if key not in CHANGES or not value.isdecimal() or len(value) > LONGEST_NUMBER:
            break
        changes[key] = int(value)
        name = rest
    return {"artifact": name, **changes}
