"""Python's garbage collector while libraries are imported."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

NEVER = 1_000_000  # threshold of full collections


@contextmanager
def importing() -> Iterator[None]:
    """Import libraries within the context without full garbage collections.

    torch, transformers, timm and datasets make half a million objects that stay to the end of the process, and a full
    collection goes through all of them. They are also left out of later collections (`gc.freeze`), which makes these
    shorter, and lets forked data loader workers share their memory. Does nothing if transformers is imported already,
    as objects of other code would then be left out for ever.
    """
    if "transformers" in sys.modules:
        yield
        return
    young, middle, full = gc.get_threshold()
    gc.set_threshold(young, middle, NEVER)
    try:
        yield
    finally:
        gc.set_threshold(young, middle, full)
        gc.freeze()
