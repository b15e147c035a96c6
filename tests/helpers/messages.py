"""Read the option and the values of a message, whatever its wording."""

import logging
import re

# After argparse's `argument ` or the recipe's file: `lora_rank: `, `--dtype fp8: `, `--min_batch 9, --max_batch 4: `.
_OPTION = r"(?:-\w/)?(?:--[a-z][\w-]*(?: [^\s,:]+)?|\w+)"
_HEAD = re.compile(rf"(?:argument )?(?:\S+\.yaml: )?(?P<options>{_OPTION}(?:, {_OPTION})*): ")


def option_of(message: object) -> str | None:
    """Return the options at the start of a message or exception, None without one."""
    text = str(message)
    found = _HEAD.match(text.partition(" error: ")[2] or text)
    if not found:
        return None
    return ", ".join(item.split()[0].rpartition("/")[2].lstrip("-") for item in found["options"].split(", "))


def assert_names(message: object, *data: object) -> None:
    """Assert that a message contains each of `data` as a complete word.

    1 is not in 12, 0.1 or run-1.
    """
    text = str(message)
    missing = [item for item in data if not re.search(_word(item), text)]
    assert not missing, f"{missing} not in: {text}"


def _word(item: object) -> str:
    is_number = re.fullmatch(r"-?[\d.,]+", str(item))
    before = r"(?<![\w./-])" if is_number else r"(?<![\w.])"
    return rf"{before}(?<!\d,){re.escape(str(item))}(?!\.?\w|,\d)"


def assert_logged(caplog, level: str, *data: object, logger: str = "hfvit") -> None:
    """Assert that a log record of this level and logger contains each of `data`."""
    messages = [
        record.getMessage()
        for record in caplog.records
        if record.levelno == getattr(logging, level) and f"{record.name}.".startswith(f"{logger}.")
    ]
    for message in messages:
        try:
            return assert_names(message, *data)
        except AssertionError:
            continue
    raise AssertionError(f"no {level} of {logger} names {data}: {messages}")


def last_error(printed: str) -> str:
    """Return the last error line of a command."""
    lines = [line for line in printed.splitlines() if line.startswith(("hfvit: error: ", "hfvit: stopped: "))]
    assert lines, printed
    return lines[-1]
