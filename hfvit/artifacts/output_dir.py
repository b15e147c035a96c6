"""Claim, lock, resume and clear the output directory of a run."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hfvit.artifacts.checkpoint import (
    BROKEN,
    MODEL_ALONE,
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
# Neither the card, where edits of a user's may be, nor the plots, which a run draws anew or deletes.
DISCARDED = (CONFIG_FILE, *WEIGHT_FILES, RECIPE_FILE, STATE_FILE, EXAMPLES_FILE, *TOKENIZER_FILES)
DISCARDED += tuple(f"{ADAPTER_FOLDER}/{name}" for name in ADAPTER_FILES)


def claim_output_dir(output_dir: str, resume: str | None, overwrite: bool, is_main: bool = True) -> str | None:
    """The checkpoint to resume from, or None for a new run in a folder that may be written.

    The main process, which must be the first to call, reads a checkpoint whole, moves those that are not out of the
    way and deletes what a save that was killed has left. Raises `RecipeError` when the folder already holds a run that
    neither `resume` nor `overwrite` accounts for, or other files that a run would replace; when it holds checkpoints
    of another program, which the run would delete with its own; when it cannot be written; or when there is no such
    checkpoint.
    """
    folder = Path(output_dir)
    check_writable(folder, "output_dir")
    if is_main:
        _remove_leftovers(folder)
    _refuse_foreign(folder)

    if resume == "auto":
        checkpoint = _newest_read_whole(folder) if is_main else newest_checkpoint(folder)
    else:
        checkpoint = Path(resume) if resume else None
        if checkpoint and (reason := checkpoint_error(checkpoint, read=is_main)):
            raise RecipeError(f"resume_from_checkpoint: {resume} is no whole checkpoint of a run: {reason}.")
    if not overwrite:
        if is_finished(folder) or not is_of_run(checkpoint, folder):
            _refuse_if_held(folder)
        elif resume != "auto" and (later := _later(checkpoint, folder)):
            raise RecipeError(
                f"resume_from_checkpoint: the run went on after {checkpoint.name}, to {later[-1].name}. Continue it"
                " with --resume_from_checkpoint auto, discard what came later with --overwrite_output_dir, or choose"
                " another output_dir."
            )
    return str(checkpoint) if checkpoint else None


def _remove_leftovers(folder: Path) -> None:
    """What a kill has left half-written, under the temporary names that nothing else has."""
    shutil.rmtree(folder / STAGING, ignore_errors=True)
    for name in (RUN_FILE, CARD_FILE, RECIPE_FILE, EXAMPLES_FILE):
        sweep_temporary(folder / name)


def _refuse_foreign(folder: Path) -> None:
    """Among a run's own a checkpoint may have lost its manifest; where none has one they are somebody else's."""
    held = checkpoints(folder)
    if held and not (folder / RUN_FILE).exists() and not any((f / MANIFEST).exists() for f in held):
        raise RecipeError(
            f"output_dir: {folder} holds {held[-1].name}, which is not hfvit's, and which a run would delete with its"
            " own; choose another output_dir."
        )


def _newest_read_whole(folder: Path) -> Path | None:
    for checkpoint in reversed(checkpoints(folder)):
        reason = checkpoint_error(checkpoint, read=True)
        if reason is None:
            return checkpoint
        if reason == MODEL_ALONE:
            logger.warning("%s is no checkpoint to go on from: %s", checkpoint, reason)
            continue
        aside = checkpoint.with_name(f"{BROKEN}{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        logger.warning("%s is no whole checkpoint and is now %s: %s", checkpoint, aside.name, reason)
    return None


def is_finished(output_dir: str | Path) -> bool:
    """Whether the run got to its last file, the card."""
    return all((Path(output_dir) / name).exists() for name in (RUN_FILE, CARD_FILE))


def _later(checkpoint: Path, folder: Path) -> list[Path]:
    """The checkpoints of a run that came after the one that it is to go on from."""
    return [other for other in checkpoints(folder) if step_of(other) > step_of(checkpoint)]


def _refuse_if_held(folder: Path) -> None:
    unfinished = newest_checkpoint(folder)
    if is_finished(folder):
        held, way_on = "a finished run", "Discard it"
    elif unfinished:
        held, way_on = (
            f"an unfinished run ({unfinished.name})",
            "Continue it with --resume_from_checkpoint auto, discard it",
        )
    elif names := sorted({path.name for name in (CARD_FILE, RUN_FILE, *DISCARDED) for path in folder.glob(name)}):
        shown = f"{', '.join(names[:3])}{', …' if names[3:] else ''}"
        held, way_on = f"files that are not a run's, and that one would replace or delete ({shown})", "Give them up"
    else:
        return
    raise RecipeError(
        f"output_dir: {folder} holds {held}. {way_on} with --overwrite_output_dir, or choose another output_dir."
    )


def refuse_to_discard(output_dir: str, reads: dict[str, str | None]) -> None:
    """Raise `RecipeError` where `clear_run` would delete what the new run is made from.

    `reads` maps keys of the recipe to the checkpoints that they name.
    """
    folder = Path(output_dir).resolve()
    for key, name in reads.items():
        path = expand_user(name).resolve() if name else None
        if path and path.is_dir() and (path == folder or path in checkpoints(folder)):
            raise RecipeError(
                f"{key}: {name} is in output_dir, which --overwrite_output_dir clears before it trains; choose another"
                " output_dir."
            )


def clear_run(output_dir: str | Path, resumed: str | None = None, recipe: Path | None = None) -> None:
    """Delete a run (its files by their names, its checkpoints), and nothing else of a user's folder.

    A run that is `resumed` from one of its own checkpoints keeps this one and those before it, and a run of the
    `recipe` that lies there keeps that, or it could not be started again. In a folder without run.json and checkpoints
    there is no run, and whatever lies there stays.
    """
    folder = Path(output_dir)
    if (folder / RUN_FILE).exists() or checkpoints(folder):
        for path in [path for name in DISCARDED for path in folder.glob(name)]:
            if recipe is None or not path.samefile(recipe):
                path.unlink()
        with suppress(OSError):  # not there, or with files of a user's own
            (folder / ADAPTER_FOLDER).rmdir()
    (folder / RUN_FILE).unlink(missing_ok=True)  # last: until then it is known for a run's folder
    if is_of_run(resumed, folder):
        for later in _later(Path(resumed), folder):
            remove_checkpoint(later)
    else:
        remove_checkpoints(folder)


logger = logging.getLogger(__name__)

LOCK_FILE = ".hfvit.lock"  # a name that no file of a user's has: taking the lock empties it, letting go deletes it
PATIENCE = 5.0  # seconds for the processes of a run that was just killed to end


@contextmanager
def alone_in(folder: str | Path, work: str) -> Iterator[None]:
    """Hold `folder` for this process; the system lets go of it when the process dies, however it does.

    A folder that was made for this, and in which nothing came of the work, is deleted at the end. Raises `RecipeError`
    when another process holds it, and when it cannot be written.
    """
    file, is_new = Path(folder) / LOCK_FILE, not Path(folder).exists()
    check_writable(file.parent, "output_dir")
    lock = FileLock(file, fallback_to_soft=False)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise RecipeError(
            f"output_dir: another {work} is at work in {folder}; wait for its end, or choose another output_dir."
        ) from None
    except OSError as error:
        logger.debug("%s is not guarded: its file system has no locks (%s)", folder, error)
    try:
        yield
    finally:
        if lock.is_locked:
            file.unlink(missing_ok=True)  # before the release: who comes then sees that the file has no name any more
            lock.release()
        if is_new:
            with suppress(OSError):  # not empty
                file.parent.rmdir()
