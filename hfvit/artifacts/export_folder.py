"""Export folders: file names, staging and table rows."""

import json
import os
import platform
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from hfvit.artifacts.artifact import FILE_SUFFIXES
from hfvit.artifacts.constants import CONFIG_FILE, ENGINE_RECORD_FILE, EXPORT_FILE
from hfvit.artifacts.engine_record import EngineRecord
from hfvit.artifacts.export_record import ExportRecord, Parity
from hfvit.artifacts.gate import ArtifactGate
from hfvit.artifacts.run_record import RunRecord
from hfvit.errors import ModelError
from hfvit.utils.files import check_writable, expand_user, file_sha256, read_object
from hfvit.utils.formatting import size

STAGING = ".export-"  # followed by machine name, process id and a random part, which identify a killed export
STALE_SECONDS = 24 * 3600  # age at which a staging folder of another machine or container is deleted
PACKAGES = (
    "hfvit",
    "torch",
    "transformers",
    "timm",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "nncf",
    "executorch",
)


def file_name(
    dtype: str = "fp32",
    *,
    optimize: bool = False,
    quantize: str | None = None,
    target: str = "onnxruntime",
    with_preprocessing: bool = False,
) -> str:
    """Return the file name of an ONNX variant for transformers.js and ORTModel.

    Args:
        dtype: fp32, fp16 or bf16.
        optimize: operators fused for ONNX Runtime.
        quantize: int8, int8-dynamic, fp8 (for tensorrt) or None.
        target: runtime of the quantized graph: onnxruntime or tensorrt.
        with_preprocessing: preprocessing is part of the graph.
    """
    if quantize:
        stem = f"model_{quantize}_tensorrt" if target == "tensorrt" else "model_quantized"
    elif optimize:
        stem = "model_optimized"
    else:
        stem = "model" if dtype == "fp32" else f"model_{dtype}"
    return f"{stem}{'_with_preprocessing' if with_preprocessing else ''}.onnx"


def claim_folder(output: str | Path) -> Path:
    """Create or check an export folder and return its path.

    Args:
        output: folder to export to.

    Raises:
        ModelError: the folder is not writable, has model files of another origin, or an export.json that is damaged.
    """
    folder = expand_user(output)
    check_writable(folder, "output", ModelError)
    has_engine = (folder / ENGINE_RECORD_FILE).exists()
    model_files = (
        *(() if has_engine else (folder / CONFIG_FILE,)),
        *folder.glob("[!.]*.onnx"),
        *folder.glob("openvino_model*.xml"),
        *folder.glob("*.pte"),
    )
    foreign = [path.name for path in model_files if path.exists()]
    if foreign and not (folder / EXPORT_FILE).exists():
        raise ModelError(
            f"output: {output} has a {foreign[0]} that no export wrote and that could be replaced. Choose another"
            f" folder, such as {folder / 'onnx'}."
        )
    ExportRecord.load(folder)  # raises if it is damaged
    return folder


def check_same_model(folder: Path, config: dict, weights: str | None) -> None:
    """Raise `ModelError` if an export folder has exports of another model.

    Args:
        folder: export folder.
        config: configuration of the model; another patch size of the same checkpoint is another configuration.
        weights: `weights_sha256` of the model, since a repeated training has the same configuration.
    """
    path = folder / CONFIG_FILE
    recorded_weights = ExportRecord.load(folder).weights_sha256
    differs = path.exists() and _without_version(read_object(path)) != _without_version(json.loads(json.dumps(config)))
    if differs or recorded_weights not in (None, weights):
        difference = f"another {CONFIG_FILE}" if differs else "other weights"
        raise ModelError(
            f"output: {folder} has exports of another model ({difference}). Choose another folder, or delete it."
        )


def _without_version(config: dict) -> dict:
    """Return a configuration without the version of transformers that wrote it."""
    return {key: value for key, value in config.items() if key != "transformers_version"}


@contextmanager
def staging_folder(folder: Path):
    """Create a temporary folder inside `folder`, deleted at the end of the block.

    Temporary folders of killed exports are deleted first.
    """
    sweep_staging(folder)
    with tempfile.TemporaryDirectory(prefix=f"{STAGING}{platform.node()}-{os.getpid()}-", dir=folder) as name:
        yield Path(name)


def sweep_staging(folder: Path) -> None:
    """Delete the staging folders of ended processes, and those older than a day."""
    for left in folder.glob(f"{STAGING}*-*-*"):
        machine, process, _ = left.name.removeprefix(STAGING).rsplit("-", 2)
        is_dead = machine == platform.node() and process.isdecimal() and not _is_running(int(process))
        with suppress(FileNotFoundError):  # another export has just deleted it
            if is_dead or time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":
        return True  # os.kill(pid, 0) would end the process on Windows
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def file_digest(path: Path) -> dict:
    """Return `sha256` and `bytes` of a file."""
    return {"sha256": file_sha256(path), "bytes": path.stat().st_size}


@dataclass
class ExportRow:
    """Exported file in the tables of model card and report; empty if not measured."""

    name: str
    file: str
    size: str
    difference: str
    score: str
    agreement: str


def export_rows(folder: Path) -> list[ExportRow]:
    """Return a row for each file in export.json and engine.json that exists.

    The engines may also be those of a Triton model repository, in subfolders.
    """
    rows = [
        _row(folder, name, entry.bytes, entry.parity, entry.gate)
        for name, entry in ExportRecord.load(folder).files.items()
        if os.path.isfile(folder / name)  # False where `Path.is_file` raises: a name too long
    ]
    for file in _engine_records(folder):
        engine = EngineRecord.load(file.parent)
        if os.path.isfile(file.parent / engine.file):
            inside = "" if file.parent == folder else f"{file.parent.name}/"
            # Parity was measured on the ONNX file, not on the engine.
            rows.append(_row(folder, f"{inside}{engine.file}", engine.bytes, None, engine.gate))
    return rows


def _engine_records(folder: Path) -> list[Path]:
    """Return engine.json of a folder and of its subfolders."""
    found = [folder / ENGINE_RECORD_FILE, *sorted(folder.glob(f"[!.]*/{ENGINE_RECORD_FILE}"))]
    return [file for file in found if file.is_file()]


def find_exports(output_dir: str | Path, record: RunRecord) -> tuple[dict[str, list[ExportRow]], list[str]]:
    """Find the export folders in `output_dir`.

    Args:
        output_dir: output folder of the run.
        record: record of the run.

    Returns:
        (`export_rows` by folder name, names of folders that are older than the run and so of an earlier training).
    """
    since = datetime.fromisoformat(record.finished).timestamp() if record.finished else 0.0
    found = {}
    stale = []
    for folder in sorted(path for path in Path(output_dir).iterdir() if path.is_dir()):
        exported = folder / EXPORT_FILE
        files = [*([exported] if exported.is_file() else []), *_engine_records(folder)]
        if files and max(file.stat().st_mtime for file in files) < since:
            stale.append(folder.name)
        elif files:
            found[folder.name] = export_rows(folder)
    return found, stale


def _row(folder: Path, name: str, count: int, parity: Parity | None, gate: ArtifactGate | None) -> ExportRow:
    # `hfvit validate` also compares an export with itself or with another one.
    reference = gate.reference.artifact if gate and gate.reference else ""
    with_pytorch = gate if not reference.endswith(FILE_SUFFIXES) else None
    difference = with_pytorch.max_logit_difference if with_pytorch else None
    if parity:
        difference = parity.max_abs_difference
    return ExportRow(
        name=name,
        file=f"{folder.name}/{name}",
        size=size(count),
        difference="" if difference is None else f"{difference:.2g}",
        score=f"{gate.score.value:.2%}" if gate else "",
        agreement=f"{with_pytorch.agreement:.2%}" if with_pytorch else "",
    )
