"""Silence libraries: log levels, warnings, printed output and progress bars."""

import io
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

_silence = threading.RLock()


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
    """Suppress output, warnings and log messages in the context, unless `verbose`.

    One thread at a time is in it: the last of two would restore what the first one has set.
    """
    if verbose:
        yield
        return
    with _silence, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
        before = logging.root.manager.disable
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


@contextmanager
def quiet_run(verbose: bool = False, with_bars: bool = False) -> Iterator[None]:
    """Hide warnings and progress bars of Hugging Face libraries in the context.

    Errors are shown. All warnings of Python are hidden, since they come from libraries: hfvit logs its own.

    Args:
        verbose: hide nothing.
        with_bars: show the progress bars of downloads.
    """
    if verbose:
        yield
        return
    from datasets import utils as datasets_utils
    from datasets.utils import logging as datasets_logging
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    levels = [(library, library.get_verbosity()) for library in (transformers_logging, datasets_logging)]
    had_hub_bars = not are_progress_bars_disabled()
    had_model_bars = transformers_logging.is_progress_bar_enabled()
    had_data_bars = not datasets_utils.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for library, _ in levels:
                library.set_verbosity_error()
            transformers_logging.disable_progress_bar()  # those of the Hub, too
            datasets_utils.disable_progress_bars()
            if with_bars and had_hub_bars:
                enable_progress_bars()
            yield
        finally:
            for library, level in levels:
                library.set_verbosity(level)
            if had_model_bars:
                transformers_logging.enable_progress_bar()
            if had_data_bars:
                datasets_utils.enable_progress_bars()
            if had_hub_bars:
                enable_progress_bars()
            else:
                disable_progress_bars()


@contextmanager
def hidden_loading_bars() -> Iterator[None]:
    """Hide the "Loading weights" bars of transformers in the context.

    The bars of downloads are shown.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    had_hub_bars = not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # those of the Hub, too
    if had_hub_bars:
        enable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def hide_data_bars() -> None:
    """Disable the progress bars of `datasets`; those of downloads are shown."""
    from datasets.utils import disable_progress_bars

    disable_progress_bars()


def quiet_libraries() -> None:
    """Disable progress bars and warnings of transformers, and messages of onnxscript."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
