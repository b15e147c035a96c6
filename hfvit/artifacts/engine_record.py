"""`EngineRecord` (engine.json): source, GPUs and batch sizes of a TensorRT engine."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from hfvit.artifacts.constants import ENGINE_RECORD_FILE
from hfvit.artifacts.export_record import CalibrationData, Parity, TensorInfo
from hfvit.artifacts.gate import ArtifactGate, migrate_gate
from hfvit.artifacts.json_record import OPTIONAL, FieldError, FileRecord, Record


@dataclass(kw_only=True)
class BackendVersion(Record):
    """Backend that built an engine.

    Attributes:
        name: `tensorrt` or `tensorrt_rtx`.
        version: version of the package.
        cuda: major CUDA version of the package.
    """

    name: str
    version: str
    cuda: str | None

    def check(self) -> None:
        """Raise `FieldError` unless `cuda` is a major version."""
        if self.cuda is not None and not self.cuda.isdecimal():
            raise FieldError("cuda", f"must be a major version such as '13', got {self.cuda!r}")


@dataclass(kw_only=True)
class Profile(Record):
    """Optimization profile: shapes of the input, `(batch, channels, height, width)`."""

    min: tuple[int, int, int, int]
    opt: tuple[int, int, int, int]
    max: tuple[int, int, int, int]

    @property
    def batches(self) -> tuple[int, int, int]:
        """Return the smallest, optimal and largest batch size."""
        return self.min[0], self.opt[0], self.max[0]


@dataclass(kw_only=True)
class Network(Record):
    """Number of layers of the parsed network by kind, and of matrix products by dtype."""

    layers: dict[str, int]
    products: dict[str, int]


@dataclass(kw_only=True)
class BuildOptions(Record):
    """Options of a build; calibration options only if they were given."""

    workspace: int | None = None
    optimization_level: int | None = None
    hardware_compatibility: str
    version_compatible: bool
    calibration_dataset: str | None = field(default=None, metadata=OPTIONAL)
    calibration_split: str | None = field(default=None, metadata=OPTIONAL)
    calibration_samples: int | None = field(default=None, metadata=OPTIONAL)


@dataclass(kw_only=True)
class SourceGraph(Record):
    """ONNX file that an engine was built from, and its measurements."""

    name: str
    sha256: str
    bytes: int
    opset: int | None = None
    parity: Parity | None = None
    quantization: dict[str, Any] | None = None
    calibration: CalibrationData | None = None
    gate: ArtifactGate | None = None


@dataclass(kw_only=True)
class BuiltEngine(Record):
    """Result of `build_engine`.

    `built_on` is the name of the GPU, `seconds` the duration of the build.
    """

    sha256: str
    bytes: int
    backend: BackendVersion
    compute_capabilities: list[str]
    built_on: str | None = None
    dtype: str
    profile: Profile
    input: TensorInfo
    output: TensorInfo
    network: Network
    options: BuildOptions
    seconds: float | None = None


@dataclass(kw_only=True)
class EngineRecord(BuiltEngine, FileRecord):
    """engine.json of an engine.

    `file` is the path of the engine in the folder; `source` and `weights_sha256` are as in export.json; `gate` is the
    result of `hfvit validate` for the engine.
    """

    FILE: ClassVar[str] = ENGINE_RECORD_FILE
    REMEDY: ClassVar[str] = "Build the engine again with: optimum-cli export tensorrt --model MODEL {folder}"

    hfvit_version: str | None = None
    source: str
    weights_sha256: str | None = None
    file: str
    onnx: SourceGraph
    labels: list[str] = field(default_factory=list)
    preprocessing: dict[str, Any] = field(default_factory=dict)
    gate: ArtifactGate | None = field(default=None, metadata=OPTIONAL)

    @classmethod
    def migrate(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Convert the content of a version 0.1 file."""
        migrated = {key: migrate_gate(value) if key == "gate" else value for key, value in content.items()}
        onnx = migrated.get("onnx")
        if isinstance(onnx, dict) and "gate" in onnx:
            migrated["onnx"] = {**onnx, "gate": migrate_gate(onnx["gate"])}
        return migrated
