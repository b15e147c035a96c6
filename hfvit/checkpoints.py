"""The output folder of a run: who may write there, and which checkpoint a run goes on from."""

import json
import shutil
import tempfile
from pathlib import Path

from hfvit.errors import ModelError, RecipeError
from hfvit.paths import temporary_file

RUN_FILE = "run.json"


def checkpoints(output_dir: str | Path) -> list[Path]:
    """All `checkpoint-*` folders, oldest first, whole or not."""
    folders = [f for f in Path(output_dir).glob("checkpoint-*") if f.name.removeprefix("checkpoint-").isdigit()]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest whole checkpoint: the Trainer writes trainer_state.json last, so that file must be readable."""
    for folder in reversed(checkpoints(output_dir)):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return folder
    return None


def claim_output_dir(output_dir: str, resume: str | None, overwrite: bool) -> str | None:
    """The checkpoint to resume from, or None for a new run in a folder that may be written.

    Raises `RecipeError` when the folder already holds a run that neither `resume` nor `overwrite` accounts for, or
    other files that a run would replace; when it cannot be written; or when there is no such checkpoint.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RecipeError(f"output_dir: {output_dir} cannot be written: {error.strerror or error}.") from None

    checkpoint = newest_checkpoint(folder) if resume == "auto" else Path(resume) if resume else None
    if checkpoint and not (checkpoint / "trainer_state.json").is_file():
        raise RecipeError(f"resume_from_checkpoint: {resume} is no whole checkpoint of a run.")
    if not overwrite and ((folder / RUN_FILE).exists() or not is_of_run(checkpoint, folder)):
        _refuse_if_held(folder)
    return str(checkpoint) if checkpoint else None


def is_of_run(checkpoint: str | Path | None, output_dir: str | Path) -> bool:
    """Whether `checkpoint` is one that the run in `output_dir` left there."""
    return checkpoint is not None and Path(checkpoint).resolve().parent == Path(output_dir).resolve()


def _refuse_if_held(folder: Path) -> None:
    unfinished = newest_checkpoint(folder)
    if (folder / RUN_FILE).exists():
        held, way_on = "a finished run", "Discard"
    elif unfinished:
        held, way_on = (
            f"an unfinished run ({unfinished.name})",
            "Continue it with --resume_from_checkpoint auto, discard",
        )
    elif any((folder / name).exists() for name in ("README.md", "config.json", "model.safetensors", "recipe.yaml")):
        held, way_on = "files that are not a run's, and that a run would replace", "Replace"
    else:
        return
    raise RecipeError(
        f"output_dir: {folder} holds {held}. {way_on} it with --overwrite_output_dir, or choose another output_dir."
    )


def clear_run(output_dir: str | Path) -> None:
    """Delete what marks a run (its checkpoints and run.json), and nothing else of a user's folder."""
    remove_checkpoints(output_dir)
    (Path(output_dir) / RUN_FILE).unlink(missing_ok=True)


def remove_checkpoints(output_dir: str | Path) -> None:
    for folder in checkpoints(output_dir):
        shutil.rmtree(folder)


def check_same_model(checkpoint: str, config) -> None:
    """Raise `ModelError` when `checkpoint` belongs to another architecture, size or set of classes than `config`."""
    try:
        saved = dict(json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"resume_from_checkpoint: {checkpoint}/config.json cannot be read: {error}") from None
    current = config.to_dict()
    for key in ("architecture", "model_args", "label_names"):
        if saved.get(key) != json.loads(json.dumps(current.get(key))):
            raise ModelError(
                f"resume_from_checkpoint: {checkpoint} is of another model: its {key} is {saved.get(key)}, the"
                f" recipe's is {current.get(key)}. Use the recipe that made it, or another output_dir."
            )


def write_text(path: str | Path, text: str) -> None:
    """Write under a temporary name, then rename: a reader never sees half a file."""
    with temporary_file(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")
