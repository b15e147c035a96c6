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

from hfvit.artifacts.constants import CONFIG_FILE, ENGINE_RECORD_FILE, EXPORT_FILE
from hfvit.artifacts.engine_record import EngineRecord
from hfvit.artifacts.export_record import ExportRecord, Parity
from hfvit.artifacts.gate import ArtifactGate
from hfvit.artifacts.run_record import RunRecord
from hfvit.errors import ModelError
from hfvit.utils.files import check_writable, expand_user, file_sha256
from hfvit.utils.formatting import size

STAGING = ".export-"  # then the machine, the process and a random end, by which a killed export's is known
STALE_SECONDS = 24 * 3600  # no export takes so long: one of another machine (or a container's, by then) was killed
PACKAGES = ("hfvit", "torch", "transformers", "timm", "onnx", "onnxscript", "onnxruntime")


def file_name(
    dtype: str = "fp32",
    *,
    optimize: bool = False,
    quantize: str | None = None,
    target: str = "onnxruntime",
    with_preprocessing: bool = False,
) -> str:
    """The name of one variant: those that transformers.js and ORTModel look for, where they have one."""
    if quantize:
        stem = "model_int8_tensorrt" if target == "tensorrt" else "model_quantized"
    elif optimize:
        stem = "model_optimized"
    else:
        stem = "model" if dtype == "fp32" else f"model_{dtype}"
    return f"{stem}{'_with_preprocessing' if with_preprocessing else ''}.onnx"


def claim_folder(output: str | Path) -> Path:
    """The folder `output`, made if need be; `ModelError` when it cannot be written or is no place for an export."""
    folder = expand_user(output)
    check_writable(folder, "output", ModelError)
    has_engine = (folder / ENGINE_RECORD_FILE).exists()
    owned = (*(() if has_engine else (folder / CONFIG_FILE,)), *folder.glob("[!.]*.onnx"))
    foreign = [path.name for path in owned if path.exists()]
    if foreign and not (folder / EXPORT_FILE).exists():
        raise ModelError(
            f"output: {output} holds a {foreign[0]} that is no export's and might be replaced; choose another folder,"
            f" such as {folder / 'onnx'}."
        )
    ExportRecord.load(folder)  # one that cannot be read is told before the work
    return folder


def check_same_model(folder: Path, config: dict, weights: str | None) -> None:
    """Raise `ModelError` when the exports in `folder` are of a model with another configuration or other weights.

    `weights` is the checkpoint's `weights_sha256` (onnx.py): a training that was repeated leaves the configuration as
    it was. Another patch size of the same checkpoint is another configuration.
    """
    path = folder / CONFIG_FILE
    held = ExportRecord.load(folder).weights_sha256
    try:
        differs = path.exists() and json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(config))
    except ValueError as error:
        raise ModelError(f"{path} cannot be read ({error}); delete it and export again.") from None
    if differs or held not in (None, weights):
        what = f"another {CONFIG_FILE}" if differs else "other weights"
        raise ModelError(
            f"output: {folder} holds exports of another model, with {what}; choose another folder, or delete that one."
        )


@contextmanager
def staging_folder(folder: Path):
    """A folder inside `folder` for files that are not to be seen yet; it is gone at the end.

    What a killed export left of its own goes first.
    """
    sweep_staging(folder)
    with tempfile.TemporaryDirectory(prefix=f"{STAGING}{platform.node()}-{os.getpid()}-", dir=folder) as name:
        yield Path(name)


def sweep_staging(folder: Path) -> None:
    """Remove the staging folders in `folder` whose process has ended, or that are a day old."""
    for left in folder.glob(f"{STAGING}*-*-*"):
        machine, process, _ = left.name.removeprefix(STAGING).rsplit("-", 2)
        is_dead = machine == platform.node() and process.isdecimal() and not _is_running(int(process))
        with suppress(FileNotFoundError):  # another export sweeps, too, or has just ended
            if is_dead or time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":
        return True  # elsewhere signal 0 would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def file_facts(path: Path) -> dict:
    """`sha256` and `bytes` of a file."""
    return {"sha256": file_sha256(path), "bytes": path.stat().st_size}


@dataclass
class ExportRow:
    """An exported file in the tables of card and report; an empty string stands for what was not measured."""

    name: str
    file: str
    size: str
    difference: str
    accuracy: str
    agreement: str


def export_rows(folder: Path) -> list[ExportRow]:
    """A row for each file of an export folder, from its export.json or engine.json; none where there is neither."""
    rows = [
        _row(folder, name, entry.bytes, entry.parity, entry.gate)
        for name, entry in ExportRecord.load(folder).files.items()
    ]
    if (folder / ENGINE_RECORD_FILE).is_file():
        engine = EngineRecord.load(folder)
        # Parity and gate of its ONNX file were not measured on the engine.
        rows.append(_row(folder, engine.file, engine.bytes, None, engine.gate))
    return rows


def find_exports(output_dir: str | Path, record: RunRecord) -> tuple[dict[str, list[ExportRow]], list[str]]:
    """Find the exports right below `output_dir`.

    Returns:
        The `export_rows` of each folder by its name, and the names of folders that are older than the run: a training
        that was repeated leaves the exports of the one before.
    """
    since = datetime.fromisoformat(record.finished).timestamp() if record.finished else 0.0
    found = {}
    stale = []
    for folder in sorted(path for path in Path(output_dir).iterdir() if path.is_dir()):
        files = [folder / name for name in (EXPORT_FILE, ENGINE_RECORD_FILE) if (folder / name).is_file()]
        if files and max(file.stat().st_mtime for file in files) < since:
            stale.append(folder.name)
        elif files:
            found[folder.name] = export_rows(folder)
    return found, stale


def _row(folder: Path, name: str, count: int, parity: Parity | None, gate: ArtifactGate | None) -> ExportRow:
    difference = parity.max_abs_difference if parity else gate.max_logit_difference if gate else None
    return ExportRow(
        name=name,
        file=f"{folder.name}/{name}",
        size=size(count),
        difference="" if difference is None else f"{difference:.2g}",
        accuracy=f"{gate.accuracy:.2%}" if gate else "",
        agreement=f"{gate.agreement:.2%}" if gate else "",
    )
