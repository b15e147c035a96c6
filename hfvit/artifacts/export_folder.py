"""Export folders: file names, export.json, staging and summary rows."""

import json
import os
import platform
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import hfvit
from hfvit.artifacts.constants import CONFIG_FILE, ENGINE_FACTS_FILE
from hfvit.errors import ModelError
from hfvit.utils.files import check_writable, file_sha256, read_object, write_object
from hfvit.utils.formatting import size

FACTS_FILE = "export.json"
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
    folder = Path(output).expanduser()
    check_writable(folder, "output", ModelError)
    has_engine = (folder / ENGINE_FACTS_FILE).exists()
    owned = (*(() if has_engine else (folder / CONFIG_FILE,)), *folder.glob("[!.]*.onnx"))
    foreign = [path.name for path in owned if path.exists()]
    if foreign and not (folder / FACTS_FILE).exists():
        raise ModelError(
            f"output: {output} holds a {foreign[0]} that is no export's and might be replaced; choose another folder,"
            f" such as {folder / 'onnx'}."
        )
    read_export_facts(folder)
    return folder


def check_same_model(folder: Path, config: dict, weights: str | None) -> None:
    """Raise `ModelError` when the exports in `folder` are of a model with another configuration or other weights.

    `weights` is the checkpoint's `weights_sha256` (onnx.py): a training that was repeated leaves the configuration as
    it was. Another patch size of the same checkpoint is another configuration.
    """
    path, held = folder / CONFIG_FILE, read_export_facts(folder)
    try:
        differs = path.exists() and json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(config))
    except ValueError as error:
        raise ModelError(f"{path} cannot be read ({error}); delete it and export again.") from None
    if differs or held["weights_sha256"] not in (None, weights):
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


def read_export_facts(folder: str | Path) -> dict:
    """export.json of a folder, or an empty one."""
    path = Path(folder) / FACTS_FILE
    facts = {"hfvit_version": hfvit.__version__, "source": None, "weights_sha256": None, "files": {}}
    if not path.exists():
        return facts
    try:
        return facts | json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} cannot be read ({error}); delete it and export again.") from None


def write_export_facts(
    folder: str | Path, file: str, facts: dict, source: str | None = None, weights: str | None = None
) -> None:
    """Enter the facts of one file into export.json; files that are gone leave it.

    `source` is the model's Hub id, or the name of its folder without the path on this machine; `weights` are its
    `weights_sha256` before any change of its patches. Where they are not given, those that the file tells stay.
    """
    folder = Path(folder)
    held = read_export_facts(folder)
    files = {name: known for name, known in held["files"].items() if (folder / name).exists()}
    write_object(
        folder / FACTS_FILE,
        {
            "hfvit_version": hfvit.__version__,
            "source": source or held["source"],
            "weights_sha256": weights or held["weights_sha256"],
            "files": dict(sorted({**files, file: facts}.items())),
        },
    )


def export_facts(folder: Path) -> dict[str, dict]:
    """File name -> facts of an export folder, from its export.json or engine.json; empty where there is neither."""
    files = read_export_facts(folder)["files"]
    if not isinstance(files, dict):
        raise ModelError(f"{folder / FACTS_FILE} holds no table of files; delete it and export again.")
    found = {name: facts for name, facts in files.items() if isinstance(facts, dict)}
    engine = folder / ENGINE_FACTS_FILE
    if engine.is_file():
        facts = read_object(engine)
        # What is told there of the graph (parity, gate) was not measured on the engine, and is no line of its own.
        found |= {facts.get("file", "model.engine"): {key: facts[key] for key in ("bytes", "gate") if key in facts}}
    return found


def find_exports(output_dir: str | Path, facts: dict) -> tuple[dict[str, dict], list[str]]:
    """Folder -> its `export_facts`, of the exports right below `output_dir`, and the folders that are older than the
    run in it: a training that was repeated leaves the exports of the one before."""
    finished = facts.get("finished")
    since = datetime.fromisoformat(finished).timestamp() if finished else 0.0
    found, stale = {}, []
    for folder in sorted(path for path in Path(output_dir).iterdir() if path.is_dir()):
        files = [folder / name for name in (FACTS_FILE, ENGINE_FACTS_FILE) if (folder / name).is_file()]
        if files and max(file.stat().st_mtime for file in files) < since:
            stale.append(folder.name)
        elif files:
            found[folder.name] = export_facts(folder)
    return found, stale


def export_rows(exports: dict[str, dict]) -> list[dict]:
    """Rows of the table: an empty string for what was not measured."""
    return [_row(f"{folder}/{file}", facts) for folder, files in exports.items() for file, facts in files.items()]


def _row(name: str, facts: dict) -> dict:
    parity, gate = facts.get("parity") or {}, facts.get("gate") or {}
    difference = parity.get("max_abs_difference", gate.get("max_logit_difference"))
    return {
        "file": name,
        "size": size(facts["bytes"]) if "bytes" in facts else "",
        "difference": "" if difference is None else f"{difference:.2g}",
        "accuracy": f"{gate['accuracy']:.2%}" if "accuracy" in gate else "",
        "agreement": f"{gate['agreement']:.2%}" if gate.get("agreement") is not None else "",
    }
