"""Atomic checkpoints: staging directory, fsync, manifest, rename; validation and cleanup."""

import json
import shutil
from pathlib import Path

from safetensors import safe_open

from hfvit.artifacts.constants import MANIFEST, STAGING, STATE_FILE
from hfvit.errors import ModelError
from hfvit.utils.files import file_sha256, sync, sync_tree

MODEL_ALONE = "it holds the model alone (save_only_model)"


def checkpoint_error(checkpoint: str | Path, read: bool = False) -> str | None:
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
            if read and file_sha256(path) != expected["sha256"]:
                return f"{name} has changed since it was written"
    except FileNotFoundError:
        return f"it has no {MANIFEST}, which is written last" if folder.is_dir() else "there is no such folder"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"it cannot be read ({type(error).__name__})"
    if STATE_FILE not in files or not any(name.startswith("rng_state") for name in files):
        return MODEL_ALONE
    return None


def commit_checkpoint(staged: Path, final: Path) -> None:
    """Write the manifest of the folder `staged`, sync it and rename it to `final`, on the same file system."""
    listed = {
        path.relative_to(staged).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(staged.rglob("*"))
        if path.is_file()
    }
    (staged / MANIFEST).write_text(json.dumps({"files": listed}, indent=2) + "\n", encoding="utf-8")
    sync_tree(staged)
    if final.exists():  # of the same step in a run that this one has taken back
        shutil.rmtree(final)
    staged.rename(final)
    sync(final.parent)


BROKEN = "broken-"


def checkpoints(output_dir: str | Path) -> list[Path]:
    """All `checkpoint-*` folders, oldest first, whole or not."""
    named = [f for f in Path(output_dir).glob("checkpoint-*") if f.name.removeprefix("checkpoint-").isdigit()]
    return sorted((f for f in named if f.is_dir()), key=step_of)


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint without a `checkpoint_error`."""
    return next((folder for folder in reversed(checkpoints(output_dir)) if checkpoint_error(folder) is None), None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def is_of_run(checkpoint: str | Path | None, output_dir: str | Path) -> bool:
    """Whether `checkpoint` is one that the run in `output_dir` left there."""
    return checkpoint is not None and Path(checkpoint).resolve().parent == Path(output_dir).resolve()


def remove_checkpoints(output_dir: str | Path) -> None:
    """Delete all checkpoints, those that were moved out of the way included."""
    for folder in [*checkpoints(output_dir), *Path(output_dir).glob(f"{BROKEN}checkpoint-*")]:
        remove_checkpoint(folder)


def remove_checkpoint(checkpoint: Path) -> None:
    """Under the name of what was never finished: a kill leaves no half of a checkpoint. Of a link, the link alone."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    staged = checkpoint.parent / STAGING / checkpoint.name
    shutil.rmtree(staged, ignore_errors=True)
    staged.parent.mkdir(exist_ok=True)
    checkpoint.rename(staged)
    shutil.rmtree(staged.parent)


def check_same_model(checkpoint: str | Path, model) -> None:
    """Raise `ModelError` when `checkpoint` is of another architecture, size, set of classes or LoRA than `model`."""
    try:
        saved = dict(json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"resume_from_checkpoint: {checkpoint}/config.json cannot be read: {error}") from None
    current = model.config.to_dict()
    for key in ("architecture", "model_args", "label_names", "fusion", "fusion_layers", "text_encoder_config"):
        if saved.get(key) != json.loads(json.dumps(current.get(key))):
            raise ModelError(
                f"resume_from_checkpoint: {checkpoint} is of another model: its {key} is {saved.get(key)}, the"
                f" recipe's is {current.get(key)}. Use the recipe that made it, or another output_dir."
            )
    weights: dict[str, tuple[int, ...]] = {}
    for file in Path(checkpoint).glob("model*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            weights |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    held, wanted = _adapters(weights), _adapters({name: tuple(v.shape) for name, v in model.state_dict().items()})
    if weights and held != wanted:
        differs = "its LoRA has another rank or other targets than the recipe's"
        if not (held and wanted):
            differs = f"it has {'a' if held else 'no'} LoRA, and the recipe has {'one' if wanted else 'none'}"
        raise ModelError(
            f"resume_from_checkpoint: {checkpoint} was trained another way: {differs}. Use the recipe that made it, or"
            " another output_dir."
        )


def _adapters(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix("timm_model."): shape for name, shape in shapes.items() if ".lora_" in name}
