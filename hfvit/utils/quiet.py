"""Silence libraries: log levels, warnings, printed output and progress bars."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def log_level(name: str | None, level: int) -> Iterator[None]:
    """Set the level of the logger `name` (None: root) within the context."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def silenced(verbose: bool = False) -> Iterator[None]:
    """Suppress output, warnings and log messages within the context, unless `verbose`."""
    if verbose:
        yield
        return
    before = logging.root.manager.disable
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def quiet_libraries() -> None:
    """Disable progress bars and warnings of transformers, and messages of onnxscript."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
