"""Log of a run as JSON lines."""

import json
import logging
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from hfvit.errors import RecipeError, mask_credentials
from hfvit.recipe.training_args import HFViTTrainingArguments
from hfvit.utils.credentials import mask_values
from hfvit.utils.files import expand_user, finite

logger = logging.getLogger(__name__)


class JsonLog:
    """Append events to a file, one JSON object per line.

    Keys are `time` (seconds since 1970), `event` and the values. After a failed write, as on a full disk, a warning is
    logged and nothing more is written.

    Args:
        path: file; its folder is created.

    Raises:
        RecipeError: the file is not writable.
    """

    def __init__(self, path: str | Path):
        file = expand_user(path)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = file.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise RecipeError(
                f"json_log: cannot be written ({error.strerror or error}), got '{path}'. Choose another file."
            ) from None
        self._handler = _MessageHandler(self)
        logging.getLogger("hfvit").addHandler(self._handler)

    def write(self, event: str, **values: Any) -> None:
        """Append an event, with null for NaN and infinity, and masked credentials."""
        if self._file.closed:
            return
        content = {"time": round(time.time(), 3), "event": event, **finite(mask_values(values))}
        try:
            self._file.write(json.dumps(content, allow_nan=False, default=str) + "\n")
        except OSError as error:
            self._close_file()
            reason = error.strerror or error
            logger.warning("json_log: cannot be written (%s). The run continues without it.", reason)

    def close(self, kind: type[BaseException] | None = None) -> None:
        """Append the end of the run and close the file.

        Args:
            kind: type of the exception that ended the run, None for a finished run.
        """
        self.write("end", error=kind and kind.__name__)
        self._close_file()

    def _close_file(self) -> None:
        logging.getLogger("hfvit").removeHandler(self._handler)
        with suppress(OSError):  # lines that could not be written
            self._file.close()


class _MessageHandler(logging.Handler):
    """Append the warnings and messages of hfvit to a `JsonLog`."""

    def __init__(self, log: JsonLog):
        super().__init__()
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        self.log.write("message", level=record.levelname.lower(), text=mask_credentials(record.getMessage()))


def epochs_of(args: HFViTTrainingArguments, state: TrainerState) -> float | None:
    """Return the epochs of a run, None for a stream of unknown length.

    The Trainer's state, which rounds a fraction of an epoch up, is used if the arguments do not have them.
    """
    if args.max_steps > 0 and state.num_train_epochs >= sys.maxsize:
        return None
    return state.num_train_epochs if args.epochs is None else args.epochs


class JsonLogCallback(TrainerCallback):
    """Write what the Trainer logs to a `JsonLog`.

    Args:
        log: log of the run.
    """

    def __init__(self, log: JsonLog):
        self.log = log

    def on_train_begin(self, args, state, control, **kwargs):
        self.log.write("train_begin", step=state.global_step, steps=state.max_steps, epochs=epochs_of(args, state))

    def on_log(self, args, state, control, logs=None, **kwargs):
        event = "evaluation" if any(key.startswith("eval_") for key in logs) else "log"
        self.log.write(event, step=state.global_step, **logs)

    def on_save(self, args, state, control, **kwargs):
        self.log.write("checkpoint", step=state.global_step, best_step=state.best_global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self.log.write("train_end", step=state.global_step)
