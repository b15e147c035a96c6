"""Escape untrusted text for Markdown, YAML and HTML."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader

from hfvit.errors import printable


class SafeText(str):
    """Text that templates do not escape."""

    def __html__(self) -> str:
        return self


# Entities, as backslash escapes would begin a formula on the Hub (\\( and $$). A `_` inside a word has no meaning.
_ENTITIES = {"\\": "&#92;", "$": "&#36;", "&": "&amp;", "<": "&lt;", ">": "&gt;"}
_SPECIAL = re.compile(r"[\\$&<>`*\[\]{}|~#!:@^]|(?<![^\W_])_|_(?![^\W_])")
_BLOCK_START = re.compile(r"[-+=](?=[-=\s]|$)|\d{1,9}(?=[.)](?:\s|$))")
_WEB_ADDRESS = re.compile(r"(?i)\b(www)\.")


def markdown(text: str) -> str:
    """Escape text for one line or table cell of Markdown.

    Special characters of CommonMark, of GitHub's dialect and of the Hub's formulas are escaped.
    """
    shown = printable(text).strip()
    escaped = _SPECIAL.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), shown)
    escaped = _WEB_ADDRESS.sub(lambda found: f"{found[1]}&#46;", escaped)
    begin = _BLOCK_START.match(escaped)
    if not begin:
        return escaped
    return f"{begin[0]}\\{escaped[begin.end() :]}" if begin[0].isdigit() else f"\\{escaped}"


def markdown_code(text: str, in_table: bool = False) -> SafeText:
    """Format text as a code span."""
    shown = printable(text)
    longest = max(map(len, re.findall("`+", shown)), default=0)
    space = " " if shown.startswith("`") or shown.endswith("`") or not shown.strip() else ""
    fence = "`" * (longest + 1)
    span = f"{fence}{space}{shown}{space}{fence}"
    return SafeText(span.replace("|", "\\|") if in_table else span)


def markdown_fenced(text: str) -> SafeText:
    """Escape text for a fenced code block."""
    return SafeText(printable(text))


def yaml_string(text: str) -> SafeText:
    """Format text as a quoted YAML string: JSON without surrogate pairs."""
    return SafeText(json.dumps(printable(text), ensure_ascii=False))


def web_address(text: str) -> SafeText:
    """Percent-encode the target of a link or an image."""
    return SafeText(quote(text.encode("utf-8", "backslashreplace"), safe="/:.-_~?=&#%"))


def _escaped_value(value: Any) -> Any:
    return markdown(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _printable_value(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


@cache
def markdown_environment(folder: Path, **options: Any) -> Environment:
    """Create an environment for Markdown templates that escapes all values.

    Values are escaped with `markdown`, or the filters `code`, `fenced`, `yaml` and `address`; `safe` is for text of
    the template.

    Args:
        folder: folder of the templates.
        **options: arguments of `jinja2.Environment`.
    """
    environment = Environment(loader=FileSystemLoader(folder), autoescape=False, finalize=_escaped_value, **options)
    filters = {"code": markdown_code, "fenced": markdown_fenced, "yaml": yaml_string, "address": web_address}
    environment.filters |= filters
    return environment


@cache
def html_environment(folder: Path, **options: Any) -> Environment:
    """Create an environment for HTML templates, which escapes values and line breaks."""
    return Environment(loader=FileSystemLoader(folder), autoescape=True, finalize=_printable_value, **options)
