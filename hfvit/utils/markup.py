"""Escape names for Markdown, YAML and HTML; `errors.printable` and utils/terminal.py do it for terminals."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader

from hfvit.errors import printable


class SafeText(str):
    """Text that a template takes as it is."""

    def __html__(self) -> str:
        return self


# As entities, for the Hub takes \\( and $$ as the begin of a formula. A `_` inside a word emphasizes nothing.
_ENTITIES = {"\\": "&#92;", "$": "&#36;", "&": "&amp;", "<": "&lt;", ">": "&gt;"}
_SPECIAL = re.compile(r"[\\$&<>`*\[\]{}|~#!:@^]|(?<![^\W_])_|_(?![^\W_])")
_BEGIN_OF_BLOCK = re.compile(r"[-+=](?=[-=\s]|$)|\d{1,9}(?=[.)](?:\s|$))")
_WEB_ADDRESS = re.compile(r"(?i)\b(www)\.")


def markdown(text: str) -> str:
    """`text` as inline text of a Markdown document, in a cell of a table, too: one line, without any markup.

    Characters that have a meaning in CommonMark, in GitHub's dialect or in the Hub's formulas are escaped.
    """
    shown = printable(text).strip()
    escaped = _SPECIAL.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), shown)
    escaped = _WEB_ADDRESS.sub(lambda found: f"{found[1]}&#46;", escaped)
    begin = _BEGIN_OF_BLOCK.match(escaped)
    if not begin:
        return escaped
    return f"{begin[0]}\\{escaped[begin.end() :]}" if begin[0].isdigit() else f"\\{escaped}"


def markdown_code(text: str, in_table: bool = False) -> SafeText:
    """`text` as a code span."""
    shown = printable(text)
    longest = max(map(len, re.findall("`+", shown)), default=0)
    space = " " if shown.startswith("`") or shown.endswith("`") or not shown.strip() else ""
    fence = "`" * (longest + 1)
    span = f"{fence}{space}{shown}{space}{fence}"
    return SafeText(span.replace("|", "\\|") if in_table else span)


def markdown_fenced(text: str) -> SafeText:
    """`text` as part of a line in a fenced block of code."""
    return SafeText(printable(text))


def yaml_string(text: str) -> SafeText:
    """`text` as a quoted string of YAML: one of JSON, but of whole characters, for YAML knows no surrogate pairs."""
    return SafeText(json.dumps(printable(text), ensure_ascii=False))


def web_address(text: str) -> SafeText:
    """`text` as the target of a link or an image, percent-encoded."""
    return SafeText(quote(text.encode("utf-8", "backslashreplace"), safe="/:.-_~?=&#%"))


def _escaped_value(value: Any) -> Any:
    return markdown(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _printable_value(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


@cache
def markdown_environment(folder: Path, **options: Any) -> Environment:
    """Templates of Markdown, where every value is escaped by `markdown` unless a filter says what else it is.

    Filters: `code`, `fenced`, `yaml`, `address`, and `safe` for what the template itself wrote.

    Args:
        folder: of the templates.
        options: further ones of `jinja2.Environment`.
    """
    environment = Environment(loader=FileSystemLoader(folder), autoescape=False, finalize=_escaped_value, **options)
    filters = {"code": markdown_code, "fenced": markdown_fenced, "yaml": yaml_string, "address": web_address}
    environment.filters |= filters
    return environment


@cache
def html_environment(folder: Path, **options: Any) -> Environment:
    """Templates of HTML, where every value is escaped, and shown as one line; `options` as above."""
    return Environment(loader=FileSystemLoader(folder), autoescape=True, finalize=_printable_value, **options)
