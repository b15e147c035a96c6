"""Error reporting, shared-folder check and sharding for several processes."""

import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from hfvit.errors import HFViTError, RecipeError, run
from hfvit.utils.terminal import prepare_streams

REPORT_SECONDS = 10.0  # for the first local process to print the error and exit, and the launcher to notice
# Messages of gloo, NCCL and their store when another process has died.
LOST = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Read timeout", "Socket Timeout",
    "Timed out waiting", "remote process exited", "failed to recv, got 0 bytes", "recvValue failed",
)  # fmt: skip


class ProcessLostError(HFViTError):
    """Raised when another process of the run died or cannot be reached."""

    exit_code = 8


def are_weights_sharded() -> bool:
    """Return whether the launcher shards the weights, by FSDP or DeepSpeed."""
    from accelerate.utils import parse_flag_from_env  # imports torch

    return parse_flag_from_env("ACCELERATE_USE_FSDP") or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")


def require_shared_folder(folder: str | Path) -> None:
    """Raise `RecipeError` unless all machines share a folder; all processes call it.

    Every process writes to a checkpoint, and every machine loads the best one.
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
        gather_object([0])  # barrier
        exists = gather_object([mark.exists()])
    finally:
        if is_main:
            mark.unlink(missing_ok=True)
    if not all(exists):
        raise RecipeError(f"output_dir: must be a folder that all machines share, got {folder}.")


def run_one_of_many(command: Callable[[], int | None]) -> int:
    """Call `errors.run` in a process that `accelerate launch` may have started."""
    prepare_streams()
    return run(lambda: _reported_once(command))


def _reported_once(command: Callable[[], int | None]) -> int | None:
    try:
        return command()
    except HFViTError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(REPORT_SECONDS)
        raise
    except RuntimeError as error:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not any(words in str(error) for words in LOST):
            raise
        raise ProcessLostError(
            f"another process of this run died or cannot be reached ({str(error).strip().splitlines()[-1]}). See its"
            " message on its machine. Restart all processes with --resume_from_checkpoint auto."
        ) from None
