"""Error reporting and shared-folder check for several processes."""

import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from hfvit.errors import HFViTError, RecipeError, run
from hfvit.utils.terminal import prepare_streams

PATIENCE = 3.0  # seconds for the first process of a machine to say the same and end the others
# What gloo, NCCL and the store that they meet at say when another process is no longer there.
LOST = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Read timeout", "Socket Timeout",
    "Timed out waiting", "remote process exited", "failed to recv, got 0 bytes", "recvValue failed",
)  # fmt: skip


class ProcessLostError(HFViTError):
    """Another process of the run died, or its machine cannot be reached any more."""

    exit_code = 8


def require_shared_folder(folder: str | Path) -> None:
    """Raise `RecipeError` where `folder` is not one and the same on all machines; to be called by all processes.

    A checkpoint holds what every process has written. Without the others' parts no run could go on from it, and the
    best one would be loaded on a single machine, beside the last one on the others.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == int(os.environ.get("LOCAL_WORLD_SIZE", world)):
        return
    from accelerate.utils import broadcast_object_list, gather_object

    is_main = os.environ.get("RANK") == "0"
    [name] = broadcast_object_list([f".shared-{secrets.token_hex(8)}"])
    mark = Path(folder) / name
    try:
        if is_main:
            mark.touch()
        gather_object([0])  # it is there now
        is_there = gather_object([mark.exists()])
    finally:
        if is_main:
            mark.unlink(missing_ok=True)
    if not all(is_there):
        raise RecipeError(
            f"output_dir: {folder} is not the same folder on every machine of this run. Name one that they share."
        )


def run_one_of_many(command: Callable[[], int | None]) -> int:
    """`errors.run` for a process that `accelerate launch` may have started beside others."""
    prepare_streams()
    return run(lambda: _told_once(command))


def _told_once(command: Callable[[], int | None]) -> int | None:
    try:
        return command()
    except HFViTError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(PATIENCE)
        raise
    except RuntimeError as error:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not any(words in str(error) for words in LOST):
            raise
        raise ProcessLostError(
            f"another process of this run died or cannot be reached ({str(error).strip().splitlines()[-1]}). Its own"
            " message, on its machine, says why. What was saved stays: start all processes again, with"
            " --resume_from_checkpoint auto."
        ) from None
