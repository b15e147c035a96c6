"""JSON with a wrong value at any place."""

import json
from collections.abc import Iterator
from typing import Any


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths to all values; of a list those inside its first item alone."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def with_value(content: Any, path: tuple, value: Any) -> Any:
    """A copy of the content with `value` at the place `path`."""
    if not path:
        return value
    copied = dict(content) if isinstance(content, dict) else list(content)
    copied[path[0]] = with_value(content[path[0]], path[1:], value)
    return copied


def damaged(content: Any, values: list) -> Iterator[tuple[tuple, Any, str]]:
    """Yield (place, value, JSON) with each place replaced by each of `values`."""
    for path in places(content):
        for value in values:
            yield path, value, json.dumps(with_value(content, path, value))
