"""One run at a time in a folder: a second one would take what the first is writing for what a kill has left."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hfvit.errors import RecipeError
from hfvit.paths import check_writable

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
