"""Claim, lock, resume and clear the output directory of a run."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hfvit.artifacts.checkpoint import (
    BROKEN,
    MODEL_ONLY,
    checkpoint_error,
    checkpoints,
    is_of_run,
    newest_checkpoint,
    remove_checkpoint,
    remove_checkpoints,
    step_of,
)
from hfvit.artifacts.constants import (
    ADAPTER_FILES,
    ADAPTER_FOLDER,
    CARD_FILE,
    CONFIG_FILE,
    EXAMPLES_FILE,
    MANIFEST,
    MISTAKES_FILE,
    OVERWRITING,
    PREDICTIONS_FILE,
    RECIPE_FILE,
    RUN_FILE,
    STAGING,
    STATE_FILE,
    TOKENIZER_FILES,
    WEIGHT_FILES,
)
from hfvit.errors import RecipeError
from hfvit.utils.files import check_writable, expand_user, sweep_temporary

logger = logging.getLogger(__name__)
# Files of a run that a new run deletes: not the card, which may have edits, and the plots, which are drawn again.
RUN_FILES = (CONFIG_FILE, *WEIGHT_FILES, RECIPE_FILE, STATE_FILE, EXAMPLES_FILE, MISTAKES_FILE, PREDICTIONS_FILE)
RUN_FILES += TOKENIZER_FILES
RUN_FILES += tuple(f"{ADAPTER_FOLDER}/{name}" for name in ADAPTER_FILES)


def claim_output_dir(output_dir: str, resume: str | None, overwrite: bool, is_main: bool = True) -> str | None:
    """Check the output folder and choose the checkpoint to resume from.

    The main process, which must call first, verifies the checksums of checkpoints, renames broken ones and deletes
    files of an interrupted save.

    Args:
        output_dir: output folder of the run; must be writable.
        resume: checkpoint folder, `auto` for the newest valid one in `output_dir`, or None.
        overwrite: accept a folder with another run.
        is_main: whether this is the main process of the run.

    Returns:
        The checkpoint to resume from, None for a new run.

    Raises:
        RecipeError: the folder has another run without `resume` or `overwrite`, files that the run would replace or
            checkpoints of another program; it is not writable; or the checkpoint is invalid.
    """
    folder = Path(output_dir)
    check_writable(folder, "output_dir")
    if is_main:
        _remove_leftovers(folder)
    _check_checkpoints_are_own(folder)

    if resume == "auto":
        checkpoint = _newest_verified(folder) if is_main else newest_checkpoint(folder)
    else:
        checkpoint = Path(resume) if resume else None
        if checkpoint and (reason := checkpoint_error(checkpoint, read=is_main)):
            advice = " Pass auto for the newest one." if str(resume).lower() == "true" else ""
            raise RecipeError(f"resume_from_checkpoint: not a valid checkpoint, got {resume}: {reason}.{advice}")
    if not overwrite:
        if is_finished(folder) or not is_of_run(checkpoint, folder):
            _check_unused(folder)
        elif resume != "auto" and (later := _later(checkpoint, folder)):
            raise RecipeError(
                f"resume_from_checkpoint: the run has later checkpoints than {checkpoint.name} (to {later[-1].name})."
                " Resume with --resume_from_checkpoint auto, delete the later checkpoints with"
                " --overwrite_output_dir, or choose another output_dir."
            )
    return str(checkpoint) if checkpoint else None


def _remove_leftovers(folder: Path) -> None:
    """Delete temporary files of a killed run."""
    shutil.rmtree(folder / STAGING, ignore_errors=True)
    for name in (RUN_FILE, CARD_FILE, RECIPE_FILE, EXAMPLES_FILE, MISTAKES_FILE, PREDICTIONS_FILE):
        sweep_temporary(folder / name)


def _check_checkpoints_are_own(folder: Path) -> None:
    """Raise `RecipeError` for checkpoints of another program, which have no manifest."""
    found = checkpoints(folder)
    if found and not (folder / RUN_FILE).exists() and not any((f / MANIFEST).exists() for f in found):
        raise RecipeError(
            f"output_dir: {folder} has {found[-1].name} of another program, which the run would delete. Choose another"
            " output_dir."
        )


def _newest_verified(folder: Path) -> Path | None:
    """Return the newest checkpoint with matching checksums, and rename broken ones."""
    for checkpoint in reversed(checkpoints(folder)):
        reason = checkpoint_error(checkpoint, read=True)
        if reason is None:
            return checkpoint
        if reason == MODEL_ONLY:
            logger.warning("Cannot resume from %s: %s", checkpoint, reason)
            continue
        renamed = checkpoint.with_name(f"{BROKEN}{checkpoint.name}")
        shutil.rmtree(renamed, ignore_errors=True)
        checkpoint.rename(renamed)
        logger.warning("Renamed the broken checkpoint %s to %s: %s", checkpoint, renamed.name, reason)
    return None


def is_finished(output_dir: str | Path) -> bool:
    """Return whether the run has written its last file, the model card."""
    folder = Path(output_dir)
    return all((folder / name).exists() for name in (RUN_FILE, CARD_FILE)) and not (folder / OVERWRITING).exists()


def mark_finished(output_dir: str | Path) -> None:
    """Record that the model card is that of the run, after it was written."""
    (Path(output_dir) / OVERWRITING).unlink(missing_ok=True)


def _later(checkpoint: Path, folder: Path) -> list[Path]:
    """Return the checkpoints of a run after the one to resume from."""
    return [other for other in checkpoints(folder) if step_of(other) > step_of(checkpoint)]


def _check_unused(folder: Path) -> None:
    """Raise `RecipeError` if the folder has a run, or files that a run would replace."""
    unfinished = newest_checkpoint(folder)
    if is_finished(folder):
        content = "a finished run"
        advice = "Delete it"
    elif unfinished:
        content = f"an unfinished run ({unfinished.name})"
        advice = "Resume it with --resume_from_checkpoint auto, delete it"
    elif names := _files_of_runs(folder):
        content = f"files that the run would replace or delete ({', '.join(names[:3])}{', …' if names[3:] else ''})"
        advice = "Delete them"
    else:
        return
    raise RecipeError(
        f"output_dir: {folder} has {content}. {advice} with --overwrite_output_dir, or choose another output_dir."
    )


def _files_of_runs(folder: Path) -> list[str]:
    """List the files that a run would replace or delete.

    A card that it was told to overwrite before is left out.
    """
    names = {path.name for name in (CARD_FILE, RUN_FILE, *RUN_FILES) for path in folder.glob(name)}
    if (folder / OVERWRITING).exists():
        names.discard(CARD_FILE)
    return sorted(names)


def check_inputs_are_kept(output_dir: str, reads: dict[str, str | None]) -> None:
    """Raise `RecipeError` if `clear_run` would delete a checkpoint that a run reads.

    Args:
        output_dir: output folder of the new run.
        reads: checkpoints that the run reads, by key of the recipe.
    """
    folder = Path(output_dir).resolve()
    for key, name in reads.items():
        path = expand_user(name).resolve() if name else None
        if path and path.is_dir() and (path == folder or path in checkpoints(folder)):
            raise RecipeError(
                f"{key}: {name} is in output_dir, which --overwrite_output_dir clears. Choose another output_dir."
            )


def clear_run(output_dir: str | Path, resumed: str | None = None, recipe: Path | None = None) -> None:
    """Delete the files and checkpoints of a run, and no other files of the folder.

    Nothing is deleted in a folder without run.json and checkpoints. Call `mark_finished` when the new run has written
    its model card.

    Args:
        output_dir: output folder of the run.
        resumed: checkpoint that the run resumes from; it and earlier checkpoints are kept.
        recipe: recipe file of the new run, which is kept even if it is in the folder.
    """
    folder = Path(output_dir)
    if (folder / CARD_FILE).exists():
        (folder / OVERWRITING).touch()
    if (folder / RUN_FILE).exists() or checkpoints(folder):
        for path in [path for name in RUN_FILES for path in folder.glob(name)]:
            if recipe is None or not recipe.exists() or not path.samefile(recipe):
                path.unlink()
        with suppress(OSError):  # missing, or with files of the user
            (folder / ADAPTER_FOLDER).rmdir()
    (folder / RUN_FILE).unlink(missing_ok=True)  # last, since it marks the folder as that of a run
    if is_of_run(resumed, folder):
        for later in _later(Path(resumed), folder):
            remove_checkpoint(later)
    else:
        remove_checkpoints(folder)


def remove_plots(output_dir: str | Path) -> None:
    """Delete the plots of an earlier run."""
    for plot in (Path(output_dir) / "plots").glob("*.png"):
        plot.unlink(missing_ok=True)


LOCK_FILE = ".hfvit.lock"
TIMEOUT = 5.0  # seconds, in which the processes of a killed run end


@contextmanager
def lock_folder(folder: str | Path, work: str) -> Iterator[None]:
    """Lock `folder` for this process.

    The operating system releases the lock if the process dies. A folder that was created for this is deleted at the
    end if it is empty.

    Args:
        folder: folder to lock.
        work: what runs in the folder, for messages, such as "training".

    Raises:
        RecipeError: another process has locked the folder, or it is not writable.
    """
    file = Path(folder) / LOCK_FILE
    is_new = not Path(folder).exists()
    check_writable(file.parent, "output_dir")
    lock = FileLock(file, fallback_to_soft=False)
    try:
        lock.acquire(timeout=TIMEOUT)
    except Timeout:
        raise RecipeError(
            f"output_dir: another {work} is running in {folder}. Wait for its end, or choose another output_dir."
        ) from None
    except OSError as error:
        logger.debug("%s is not locked: its file system does not support locks (%s)", folder, error)
    try:
        yield
    finally:
        if lock.is_locked:
            # Before the release, so that a waiting process notices that the file was deleted.
            with suppress(PermissionError):  # Windows does not delete an open file
                file.unlink(missing_ok=True)
            lock.release()
        if is_new:
            with suppress(OSError):  # not empty
                file.parent.rmdir()
