"""Import packages of hfvit's extras."""

from importlib import import_module
from types import ModuleType

from hfvit.errors import HFViTError, one_line


def import_optional(name: str, extra: str, subject: str, kind: type[HFViTError] = HFViTError) -> ModuleType:
    """Import a package that an extra of hfvit installs.

    Args:
        name: module to import.
        extra: name of the extra.
        subject: what needs it, the start of the message.
        kind: type of the error.

    Raises:
        HFViTError: the package is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise kind(
            f'{subject} needs {package} ({one_line(error)}). Install it with: pip install "hfvit[{extra}]"'
        ) from None
