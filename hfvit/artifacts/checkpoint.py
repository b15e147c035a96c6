"""Atomic checkpoints: staging directory, fsync, manifest, rename; validation and cleanup."""

import hashlib
import json
import os
import shutil
from pathlib import Path

MANIFEST = "checkpoint.json"
STATE_FILE = "trainer_state.json"
MODEL_ALONE = "it holds the model alone (save_only_model)"
STAGING = ".saving"  # in the output folder; checkpoints() does not see it


def flaw(checkpoint: str | Path, read: bool = False) -> str | None:
    """Why training cannot go on from the folder `checkpoint`, in words; None when it can.

    With `read` the contents are compared, too, which takes as long as reading every file.
    """
    folder = Path(checkpoint)
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != expected["bytes"]:
                return f"{name} has {size:,} bytes of {expected['bytes']:,}"
            if read and _digest(path) != expected["sha256"]:
                return f"{name} has changed since it was written"
    except FileNotFoundError:
        return f"it has no {MANIFEST}, which is written last" if folder.is_dir() else "there is no such folder"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({type(error).__name__})"
    if STATE_FILE not in files or not any(name.startswith("rng_state") for name in files):
        return MODEL_ALONE
    return None


def publish(staged: Path, final: Path) -> None:
    """Make the folder `staged` last and give it the name `final`, on the same file system."""
    paths = sorted(staged.rglob("*"))
    files = [path for path in paths if path.is_file()]
    for path in files:
        _sync(path)
    listed = {
        path.relative_to(staged).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in files
    }
    manifest = staged / MANIFEST
    manifest.write_text(json.dumps({"files": listed}, indent=2) + "\n", encoding="utf-8")
    for path in (manifest, *(path for path in paths if path.is_dir()), staged):
        _sync(path)
    if final.exists():  # of the same step in a run that this one has taken back
        shutil.rmtree(final)
    staged.rename(final)
    _sync(final.parent)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
