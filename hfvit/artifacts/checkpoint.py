"""Atomic checkpoints: staging directory, fsync, manifest, rename."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open

from hfvit.artifacts.constants import MANIFEST, STAGING, STATE_FILE
from hfvit.errors import ModelError, wrap_library_errors
from hfvit.recipe.arguments import SINGLE_LABEL
from hfvit.utils.files import file_sha256, sync, sync_tree

MODEL_ONLY = "it has no training state (save_only_model)"


def checkpoint_error(checkpoint: str | Path, read: bool = False) -> str | None:
    """Return why training cannot resume from a checkpoint, None if it can.

    Args:
        checkpoint: folder of the checkpoint.
        read: also compare the SHA-256 of all files, which reads them completely.
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
        return f"it has no {MANIFEST}, which is written last" if folder.is_dir() else "the folder does not exist"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"it cannot be read ({type(error).__name__})"
    if STATE_FILE not in files or not any(name.startswith("rng_state") for name in files):
        return MODEL_ONLY
    return None


def commit_checkpoint(staged: Path, final: Path) -> None:
    """Write the manifest of `staged`, fsync, and rename it to `final`.

    Args:
        staged: folder with the files of the checkpoint.
        final: path of the checkpoint, on the same file system.
    """
    listed = {
        path.relative_to(staged).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(staged.rglob("*"))
        if path.is_file()
    }
    (staged / MANIFEST).write_text(json.dumps({"files": listed}, indent=2) + "\n", encoding="utf-8")
    sync_tree(staged)
    if final.exists():  # of the same step, before the run was rewound
        shutil.rmtree(final)
    staged.rename(final)
    sync(final.parent)


BROKEN = "broken-"


def checkpoints(output_dir: str | Path) -> list[Path]:
    """List all `checkpoint-*` folders, oldest first, including invalid ones."""
    matches = [f for f in Path(output_dir).glob("checkpoint-*") if f.name.removeprefix("checkpoint-").isdigit()]
    return sorted((f for f in matches if f.is_dir()), key=step_of)


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest checkpoint without a `checkpoint_error`."""
    return next((folder for folder in reversed(checkpoints(output_dir)) if checkpoint_error(folder) is None), None)


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step of a checkpoint, which may have been renamed."""
    number = checkpoint.name.removeprefix("checkpoint-")
    if number.isdecimal():
        return int(number)
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["global_step"]


def is_of_run(checkpoint: str | Path | None, output_dir: str | Path) -> bool:
    """Return whether `checkpoint` is in `output_dir`."""
    return checkpoint is not None and Path(checkpoint).resolve().parent == Path(output_dir).resolve()


def remove_checkpoints(output_dir: str | Path) -> None:
    """Delete all checkpoints, including those renamed as broken."""
    for folder in [*checkpoints(output_dir), *Path(output_dir).glob(f"{BROKEN}checkpoint-*")]:
        remove_checkpoint(folder)


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint; if it is a symbolic link, delete the link.

    The folder is first renamed to the staging folder, so that a kill leaves no partial checkpoint.
    """
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    staged = checkpoint.parent / STAGING / checkpoint.name
    shutil.rmtree(staged, ignore_errors=True)
    staged.parent.mkdir(exist_ok=True)
    checkpoint.rename(staged)
    shutil.rmtree(staged.parent)


def check_same_model(checkpoint: str | Path, model) -> None:
    """Raise `ModelError` if training of `model` cannot resume from a checkpoint.

    Architecture, size, classes and LoRA must be equal.

    Args:
        checkpoint: folder of the checkpoint.
        model: the model to train.
    """
    try:
        saved = dict(json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"resume_from_checkpoint: cannot read {checkpoint}/config.json ({error}).") from None
    before, now = (_compared(values) for values in (saved, json.loads(json.dumps(model.config.to_dict()))))
    for key, value in now.items():
        if before[key] != value and not (key == "image_size" and None in (before[key], value)):
            raise ModelError(
                f"resume_from_checkpoint: {key} of {checkpoint} is {before[key]}, but {value} in the recipe. Use the"
                " recipe of the checkpoint, or another output_dir."
            )
    weights: dict[str, tuple[int, ...]] = {}
    for file in Path(checkpoint).glob("model*.safetensors"):
        with (
            wrap_library_errors(ModelError, f"resume_from_checkpoint: cannot read {file}"),
            safe_open(file, framework="np") as tensors,
        ):
            weights |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    saved_lora = _lora_shapes(weights)
    model_lora = _lora_shapes({name: tuple(value.shape) for name, value in model.state_dict().items()})
    if weights and saved_lora != model_lora:
        if saved_lora and model_lora:
            problem = f"the LoRA of {checkpoint} has another rank or other targets than the recipe's"
        elif saved_lora:
            problem = f"{checkpoint} has LoRA weights, but the recipe does not use LoRA"
        else:
            problem = f"{checkpoint} has no LoRA weights, but the recipe uses LoRA"
        raise ModelError(
            f"resume_from_checkpoint: {problem}. Use the recipe of the checkpoint, or another output_dir."
        )


def _compared(config: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a config.json that a resumed training must share."""
    keys = ("architecture", "model_args", "label_names", "fusion", "fusion_layers", "text_encoder_config")
    input_size = (config.get("pretrained_cfg") or {}).get("input_size")
    return {
        **{key: config.get(key) for key in keys},
        "image_size": input_size and input_size[-2:],
        "problem_type": config.get("problem_type") or SINGLE_LABEL,
    }


def _lora_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix("timm_model."): shape for name, shape in shapes.items() if ".lora_" in name}
