"""Dataclasses that read, check and write JSON objects."""

import reprlib
import types
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

from hfvit.errors import ModelError, printable
from hfvit.utils.files import expand_user, json_text, read_object, write_text


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included; as `Annotated[int, Range(0)]`."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"from {self.low:g} to {self.high:g}"


LARGEST_COUNT = 2**53  # integers above are not exact in every reader of JSON
LARGEST = 1e100  # of a number that can still be formatted, plotted and multiplied
ROUNDING = 1e-9
Count = Annotated[int, Range(0, LARGEST_COUNT)]
Share = Annotated[float, Range(0, 1)]
KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
OPTIONAL = {"optional": True}  # metadata of a field that is not written if it is None
MAX_VALUE_LENGTH = 60  # characters of a value in a message


class FieldError(ValueError):
    """Error for a field of a JSON object that is missing or has a wrong type.

    Args:
        path: path of the field, such as `data.labels[0]`.
        problem: what is wrong with the value; empty if the field is missing.
    """

    def __init__(self, path: str, problem: str = ""):
        super().__init__(path, problem)
        self.path = path
        self.problem = problem

    def __str__(self) -> str:
        path = printable(self.path)  # with keys of the file
        return f"{path} {self.problem}".strip() if self.problem else f"missing key {path}"

    def inside(self, name: str) -> "FieldError":
        """Return the error with `name` of the enclosing object or list before its path."""
        separator = "." if self.path and not self.path.startswith("[") else ""
        return FieldError(f"{name}{separator}{self.path}", self.problem)


class _ShortRepr(reprlib.Repr):
    """Shorten the representation of a field.

    It has a few items of a list or dict, and the types of nested records.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = 4
        self.maxstring = self.maxother = 50

    def repr_float(self, x: float, level: int) -> str:
        return f"{x:.6g}"

    def repr_instance(self, x: Any, level: int) -> str:
        return f"{type(x).__name__}(...)" if isinstance(x, Record) else super().repr_instance(x, level)


_short = _ShortRepr().repr


@dataclass(kw_only=True)
class Record:
    """JSON object whose keys and types are those of the dataclass's fields.

    Fields without a default are required. Null is accepted only if the type includes None. Unknown keys are kept in
    `extra`, so that writing a file again loses nothing.
    """

    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in vars(cls):  # before `dataclass` writes one of several pages
            cls.__repr__ = Record.__repr__

    def __repr__(self) -> str:
        values = ((each.name, getattr(self, each.name)) for each in fields(self) if each.repr)
        shown = [f"{name}={_short(value)}" for name, value in values if value is not None]
        return f"{type(self).__name__}({', '.join(shown)})"

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """Check a JSON object and build the record.

        Raises:
            ModelError: a field is missing or has a wrong type.
        """
        try:
            return cls._parse(content)
        except FieldError as error:
            raise ModelError(f"{cls.__name__}: cannot be read: {error}.") from None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object: fields in their order, then `extra`."""
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
        """Raise `FieldError` for values that the types do not exclude."""


@dataclass(kw_only=True)
class FileRecord(Record):
    """Record in a file of its own, with a `schema_version`.

    Files of version 0.1 have no `schema_version`; `migrate` converts them.
    """

    FILE: ClassVar[str]
    REMEDY: ClassVar[str]  # advice for a file that cannot be read; may contain {folder}
    SCHEMA_VERSION: ClassVar[int] = 1

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read the file of a folder.

        Raises:
            ModelError: the file is missing or invalid.
        """
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
            raise ModelError(f"{path}: cannot be read: {error} (written by {writer}). {remedy}") from None

    def save(self, folder: str | Path) -> Path:
        """Write the file atomically and return its path.

        Raises:
            OSError: the file cannot be written; an old file is unchanged.
            ValueError: a value is NaN or infinite.
        """
        path = Path(folder) / self.FILE
        write_text(path, json_text(self.to_json()))
        return path

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object, `schema_version` first."""
        return {"schema_version": self.SCHEMA_VERSION, **super().to_json()}

    @classmethod
    def migrate(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Convert the content of a version 0.1 file, which may be any JSON object."""
        return content

    @classmethod
    def _parse(cls, content: Any) -> Self:
        _require(content, dict, "an object")
        content = dict(content)
        version = content.pop("schema_version", None)
        if version is None:
            content = cls.migrate(content)
        elif type(version) is not int or not 0 < version <= cls.SCHEMA_VERSION:
            raise FieldError("schema_version", f"must be at most {cls.SCHEMA_VERSION}, got {shown(version)}")
        return super()._parse(content)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number that can be plotted."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _value(hint: Any, value: Any) -> Any:
    """Convert a JSON value to the type `hint`, or raise `FieldError`."""
    origin = get_origin(hint)
    arguments = get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        found = _value(arguments[0], value)
        if not arguments[1].low - ROUNDING <= found <= arguments[1].high + ROUNDING:
            raise FieldError("", f"must be {KINDS[arguments[0]]} {arguments[1]}, got {shown(value)}")
        return found
    if origin in (Union, types.UnionType):
        return _one_of(arguments, value)
    if origin is list:
        _require(value, list, "a list")
        return _items(arguments[0], value)
    if origin is tuple:
        _require(value, list, f"a list of {len(arguments)}")
        if len(value) != len(arguments):
            raise FieldError("", f"must be a list of {len(arguments)}, got {shown(value)}")
        return tuple(_items(arguments[0], value))
    if origin is dict:
        _require(value, dict, "an object")
        return dict(zip(value, _items(arguments[1], list(value.values()), list(value)), strict=True))
    if issubclass(hint, Record):
        return hint._parse(value)
    is_number = hint is float and type(value) is int
    if type(value) is not hint and not is_number:
        raise FieldError("", f"must be {KINDS[hint]}, got {shown(value)}")
    if hint in (int, float) and not -LARGEST <= value <= LARGEST:  # nor NaN
        raise FieldError("", f"must be a number from -{LARGEST:g} to {LARGEST:g}, got {shown(value)}")
    return value


def _one_of(hints: tuple, value: Any) -> Any:
    if value is None and type(None) in hints:
        return None
    *others, last = (hint for hint in hints if hint is not type(None))
    for hint in others:
        try:
            return _value(hint, value)
        except FieldError:
            if _has_keys_of(hint, value):
                raise
    return _value(last, value)


def _has_keys_of(hint: Any, value: Any) -> bool:
    """Return whether a value is an object with all required keys of a record."""
    if not (isinstance(hint, type) and issubclass(hint, Record) and isinstance(value, dict)):
        return False
    required = (each.name for each in fields(hint) if each.default is MISSING and each.default_factory is MISSING)
    return all(name in value for name in required)


def _items(hint: Any, values: list, names: list[str] | None = None) -> list:
    if hint is Any or (hint in (bool, str) and all(type(value) is hint for value in values)):
        return values
    is_integers = hint is int and values and all(type(value) is int for value in values)
    if is_integers and -LARGEST_COUNT <= min(values) <= max(values) <= LARGEST_COUNT:
        return values  # a confusion matrix may hold millions of numbers
    found = []
    for place, value in enumerate(values):
        try:
            found.append(_value(hint, value))
        except FieldError as error:
            raise error.inside(names[place] if names else f"[{place}]") from None
    return found


def _require(value: Any, kind: type, description: str) -> None:
    if not isinstance(value, kind):
        raise FieldError("", f"must be {description}, got {shown(value)}")


def shown(value: Any) -> str:
    """Return a wrong value as a message shows it."""
    text = repr(value)
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[: MAX_VALUE_LENGTH - 3]}..."


def _plain(value: Any) -> Any:
    """Convert the value of a field to plain JSON values."""
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
