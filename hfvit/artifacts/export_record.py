"""`ExportRecord` (export.json): options and measurements of exported files."""

from collections.abc import Iterable
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
    """Input or output; a dynamic axis is a name in ONNX and -1 in an engine."""

    name: str
    type: str
    shape: list[int | str]


@dataclass(kw_only=True)
class PreprocessingParity(Record):
    """Difference of the graph's preprocessing from the image processor.

    `max_levels` is the largest one, in levels of 255, and `share_off` the fraction of values that differ.
    """

    picture_sizes: list[tuple[int, int]]
    max_levels: float
    share_off: float


@dataclass(kw_only=True)
class ImageParity(Record):
    """Difference from the checkpoint's logits on photographs, with preprocessing.

    `sizes` are those of all photographs. Logits are compared of those whose pixel values differ, and of two others.
    `spread` is the largest minus the smallest logit of the checkpoint, `same_class` the fraction of photographs with
    its class, `stock_max_abs_difference` the difference with the stock image processor of the folder.
    """

    sizes: list[tuple[int, int]]
    max_abs_difference: float
    spread: float
    same_class: float
    atol: float | None
    stock_max_abs_difference: float | None = None


@dataclass(kw_only=True)
class Parity(Record):
    """Difference of an ONNX file's logits from PyTorch's in float32.

    It is measured on random pixel values; `atol` is the largest difference that was allowed.
    """

    batch_sizes: list[int]
    max_abs_difference: float
    max_abs_logit: float
    relative_error: float
    atol: float | None
    preprocessing: PreprocessingParity | None = field(default=None, metadata=OPTIONAL)
    images: ImageParity | None = field(default=None, metadata=OPTIONAL)


@dataclass(kw_only=True)
class CalibrationData(Record):
    """Images of the INT8 calibration; `split` is a description."""

    dataset: str
    split: str
    images: int
    seed: int


@dataclass(kw_only=True)
class ExportedFile(Record):
    """ONNX, OpenVINO or ExecuTorch file.

    `quantization` is the result of `quantize_onnx` or of NNCF. Only an ONNX file has an `opset`. The weights of
    an OpenVINO file are in a .bin file with the digest `weights_sha256`, whose size is included in `bytes`.
    `float32_values` is the number of values of an fp16 file that stay in float32, as fp16 could not hold them.
    """

    sha256: str
    bytes: int
    dtype: str
    opset: int | None = field(default=None, metadata=OPTIONAL)
    versions: dict[str, str]
    input: TensorInfo
    optimized: bool
    with_preprocessing: bool
    quantization: dict[str, Any] | None = None
    calibration: CalibrationData | None = None
    parity: Parity | None = None
    gate: ArtifactGate | None = None
    text_inputs: list[TensorInfo] | None = field(default=None, metadata=OPTIONAL)
    float32_values: int | None = field(default=None, metadata=OPTIONAL)
    weights_sha256: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(kw_only=True)
class ExportRecord(FileRecord):
    """export.json of a folder.

    Attributes:
        source: Hub id of the model, or the name of its folder without the local path.
        weights_sha256: digest of the weights, before a change of the patch size.
        files: ONNX files by name.
    """

    FILE: ClassVar[str] = EXPORT_FILE
    REMEDY: ClassVar[str] = "Delete it and export again."

    hfvit_version: str = hfvit.__version__
    source: str | None = None
    weights_sha256: str | None = None
    files: dict[str, ExportedFile] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read export.json of `folder`, an empty record without the file."""
        if not (Path(folder) / EXPORT_FILE).exists():
            return cls()
        return super().load(folder)

    @classmethod
    def migrate(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Convert the content of a version 0.1 file."""
        files = content.get("files")
        if not isinstance(files, dict):
            return content
        return {**content, "files": {name: _migrate_file(entry) for name, entry in files.items()}}

    def enter(self, folder: str | Path, name: str, entry: ExportedFile) -> Path:
        """Add a file, remove files that no longer exist, and save the record.

        Args:
            folder: export folder.
            name: name of the ONNX file.
            entry: record of the ONNX file.

        Returns:
            The path of export.json.

        Raises:
            ModelError: export.json cannot be written.
        """
        self.hfvit_version = hfvit.__version__
        existing = {other: value for other, value in self.files.items() if (Path(folder) / other).exists()}
        self.files = dict(sorted({**existing, name: entry}.items()))
        return self._write(folder)

    def remove(self, folder: str | Path, names: Iterable[str]) -> None:
        """Remove files that are about to be replaced, and save the record.

        Raises:
            ModelError: export.json cannot be written.
        """
        for name in names:
            self.files.pop(name, None)
        self._write(folder)

    def _write(self, folder: str | Path) -> Path:
        with wrap_write_errors(Path(folder) / EXPORT_FILE):
            return self.save(folder)


def _migrate_file(entry: Any) -> Any:
    if not isinstance(entry, dict) or "gate" not in entry:
        return entry
    return {**entry, "gate": migrate_gate(entry["gate"])}
