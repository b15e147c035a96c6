"""`ExportRecord` (export.json): how each ONNX file of a folder was made and what was measured on it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import hfvit
from hfvit.artifacts.constants import EXPORT_FILE
from hfvit.artifacts.gate import ArtifactGate, migrate_gate
from hfvit.artifacts.json_record import OPTIONAL, FileRecord, Record
from hfvit.utils.files import wrap_write_errors


@dataclass(kw_only=True)
class TensorInfo(Record):
    """An input or output; free axes of `shape` are names in an ONNX graph and -1 in an engine."""

    name: str
    type: str
    shape: list[int | str]


@dataclass(kw_only=True)
class PreprocessingParity(Record):
    """Preprocessing inside the graph against the image processor, in levels of 255."""

    picture_sizes: list[tuple[int, int]]
    max_levels: float
    share_off: float


@dataclass(kw_only=True)
class Parity(Record):
    """Logits of an ONNX file against PyTorch's in float32, on random pixel values; `atol` is what was allowed."""

    batch_sizes: list[int]
    max_abs_difference: float
    max_abs_logit: float
    relative_error: float
    atol: float | None
    preprocessing: PreprocessingParity | None = field(default=None, metadata=OPTIONAL)


@dataclass(kw_only=True)
class CalibrationData(Record):
    """The images that INT8 ranges were calibrated with; `split` describes them in words."""

    dataset: str
    split: str
    images: int
    seed: int


@dataclass(kw_only=True)
class ExportedFile(Record):
    """One ONNX file. `quantization` is what `quantize_onnx` returned."""

    sha256: str
    bytes: int
    dtype: str
    opset: int
    versions: dict[str, str]
    input: TensorInfo
    optimized: bool
    with_preprocessing: bool
    quantization: dict[str, Any] | None = None
    calibration: CalibrationData | None = None
    parity: Parity | None = None
    gate: ArtifactGate | None = None
    text_inputs: list[TensorInfo] | None = field(default=None, metadata=OPTIONAL)


@dataclass(kw_only=True)
class ExportRecord(FileRecord):
    """export.json of a folder; `files` are by name.

    `source` is the model's Hub id, or the name of its folder without the path on this machine; `weights_sha256` is the
    digest of its weights before any change of its patch size.
    """

    FILE: ClassVar[str] = EXPORT_FILE
    REMEDY: ClassVar[str] = "Delete it and export again."

    hfvit_version: str = hfvit.__version__
    source: str | None = None
    weights_sha256: str | None = None
    files: dict[str, ExportedFile] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read export.json of `folder`; an empty record where there is none."""
        if not (Path(folder) / EXPORT_FILE).exists():
            return cls()
        return super().load(folder)

    @classmethod
    def migrate(cls, content: dict[str, Any]) -> dict[str, Any]:
        files = content.get("files")
        if not isinstance(files, dict):
            return content
        return {**content, "files": {name: _migrate_file(entry) for name, entry in files.items()}}

    def enter(self, folder: str | Path, name: str, entry: ExportedFile) -> Path:
        """Enter the file `name` of `folder` and save the record; files that are gone leave it.

        Raises `ModelError` where export.json cannot be written.
        """
        self.hfvit_version = hfvit.__version__
        kept = {other: held for other, held in self.files.items() if (Path(folder) / other).exists()}
        self.files = dict(sorted({**kept, name: entry}.items()))
        with wrap_write_errors(Path(folder) / EXPORT_FILE):
            return self.save(folder)


def _migrate_file(entry: Any) -> Any:
    if not isinstance(entry, dict) or "gate" not in entry:
        return entry
    return {**entry, "gate": migrate_gate(entry["gate"])}
