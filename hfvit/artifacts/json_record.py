"""Typed records of JSON files: dataclasses that read, check and write JSON objects."""

import json
import types
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

from hfvit.errors import ModelError
from hfvit.utils.files import expand_user, read_object, write_text

KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
OPTIONAL = {"optional": True}  # metadata of a field whose key is left out of the file where it is None
SHOWN_CHARACTERS = 60  # of a wrong value in a message


class FieldError(ValueError):
    """A field of a JSON object that is missing or of another type; `path` leads to it, as `data.labels[0]`."""

    def __init__(self, path: str, problem: str = ""):
        super().__init__(path, problem)
        self.path = path
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.path} {self.problem}".strip() if self.problem else f"it lacks {self.path}"

    def inside(self, name: str) -> "FieldError":
        """The same error, seen from the object or list that holds the field."""
        separator = "." if self.path and not self.path.startswith("[") else ""
        return FieldError(f"{name}{separator}{self.path}", self.problem)


@dataclass(kw_only=True)
class Record:
    """A JSON object with the keys and types of the dataclass's fields.

    A field without a default must be in the object, as null only where its type has None. `extra` holds the keys that
    are no fields, so that nothing of a file is lost when it is written again.
    """

    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_json(cls, content: Any, source: str | Path | None = None) -> Self:
        """Check a JSON object and build the record.

        Args:
            content: what `json.loads` gave.
            source: the file's name for messages; the class name when None.

        Raises:
            ModelError: a field is missing or of another type.
        """
        try:
            return cls._parse(content)
        except FieldError as error:
            raise ModelError(f"{source or cls.__name__} cannot be read: {error}.") from None

    def to_json(self) -> dict[str, Any]:
        """The JSON object: fields in their order, then `extra`."""
        content = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name != "extra" and not (value is None and each.metadata == OPTIONAL):
                content[each.name] = _plain(value)
        return content | self.extra

    @classmethod
    def _parse(cls, content: Any) -> Self:
        _require(content, dict, "an object")
        hints = _hints(cls)
        values = {}
        for each in fields(cls):
            if each.name == "extra":
                continue
            if each.name in content:
                try:
                    values[each.name] = _value(hints[each.name], content[each.name])
                except FieldError as error:
                    raise error.inside(each.name) from None
            elif each.default is MISSING and each.default_factory is MISSING:
                raise FieldError(each.name)
        record = cls(**values, extra={key: value for key, value in content.items() if key not in values})
        record.check()
        return record

    def check(self) -> None:
        """Raise `FieldError` for what the types alone do not say."""


@dataclass(kw_only=True)
class FileRecord(Record):
    """A record that is a file of its own; `schema_version` in the file says which layout it has.

    Files of version 0.1 have no `schema_version`: `migrate` gives them today's layout.
    """

    FILE: ClassVar[str]
    REMEDY: ClassVar[str]  # what to do with a file that cannot be read; may name {folder}
    SCHEMA_VERSION: ClassVar[int] = 1

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read the file of `folder`; raises `ModelError` where it is missing or not of this layout."""
        path = expand_user(folder) / cls.FILE
        remedy = cls.REMEDY.format(folder=folder)
        try:
            content = read_object(path)
        except ModelError as error:
            raise ModelError(f"{error} {remedy}") from None
        try:
            return cls._parse(content)
        except FieldError as error:
            writer = f"hfvit {content['hfvit_version']}" if content.get("hfvit_version") else "an older hfvit"
            raise ModelError(f"{path} cannot be read: {error} (written by {writer}). {remedy}") from None

    def save(self, folder: str | Path) -> Path:
        """Write the file atomically; raises `OSError`, or `ValueError` for NaN, and leaves the old file then."""
        path = Path(folder) / self.FILE
        write_text(path, json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")
        return path

    def to_json(self) -> dict[str, Any]:
        return {"schema_version": self.SCHEMA_VERSION, **super().to_json()}

    @classmethod
    def migrate(cls, content: dict[str, Any]) -> dict[str, Any]:
        """The content of a version 0.1 file under today's keys; must take any JSON object."""
        return content

    @classmethod
    def _parse(cls, content: Any) -> Self:
        _require(content, dict, "an object")
        content = dict(content)
        version = content.pop("schema_version", None)
        if version is None:
            content = cls.migrate(content)
        elif type(version) is not int or not 0 < version <= cls.SCHEMA_VERSION:
            raise FieldError("schema_version", f"must be at most {cls.SCHEMA_VERSION}, got {_shown(version)}")
        return super()._parse(content)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _value(hint: Any, value: Any) -> Any:
    """`value` as the type `hint`; raises `FieldError` with the path inside the value."""
    origin = get_origin(hint)
    arguments = get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _one_of(arguments, value)
    if origin is list:
        _require(value, list, "a list")
        return _items(arguments[0], value)
    if origin is tuple:
        _require(value, list, f"a list of {len(arguments)}")
        if len(value) != len(arguments):
            raise FieldError("", f"must be a list of {len(arguments)}, got {_shown(value)}")
        return tuple(_items(arguments[0], value))
    if origin is dict:
        _require(value, dict, "an object")
        return dict(zip(value, _items(arguments[1], list(value.values()), list(value)), strict=True))
    if issubclass(hint, Record):
        return hint._parse(value)
    is_number = hint is float and type(value) is int
    if type(value) is not hint and not is_number:
        raise FieldError("", f"must be {KINDS[hint]}, got {_shown(value)}")
    return value


def _one_of(hints: tuple, value: Any) -> Any:
    if value is None and type(None) in hints:
        return None
    choices = [hint for hint in hints if hint is not type(None)]
    for hint in choices[:-1]:
        try:
            return _value(hint, value)
        except FieldError:
            continue
    return _value(choices[-1], value)


def _items(hint: Any, values: list, names: list[str] | None = None) -> list:
    if hint is Any or (hint in KINDS and all(type(value) is hint for value in values)):
        return values  # a confusion matrix may hold millions of numbers
    found = []
    for place, value in enumerate(values):
        try:
            found.append(_value(hint, value))
        except FieldError as error:
            raise error.inside(names[place] if names else f"[{place}]") from None
    return found


def _require(value: Any, kind: type, words: str) -> None:
    if not isinstance(value, kind):
        raise FieldError("", f"must be {words}, got {_shown(value)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."


def _plain(value: Any) -> Any:
    """Plain JSON values of a field."""
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
