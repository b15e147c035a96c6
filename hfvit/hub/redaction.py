"""Redact local paths in pushed files."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from hfvit.artifacts.run_record import RunRecord
from hfvit.utils.files import json_text
from hfvit.utils.hub_ids import is_local
from hfvit.utils.yaml_files import load_yaml

# Class names are never paths, although some look like paths (/m/01abc).
_CLASS_NAME_KEYS = ("labels", "label", "label_names", "per_class", "true", "predicted", "label_separator")
_PATH_KEYS = ("output_dir", "best_model_checkpoint", "logging_dir")
# Names of a data set or model: a path or a Hub id.
_PATH_OR_ID_KEYS = (
    "dataset_name",
    "model_name_or_path",
    "base_model",
    "text_encoder",
    "teacher",
    "head_from_text",
)


def redact_paths(text: str, name: str, record: RunRecord | None) -> str:
    """Replace each local path in a JSON or YAML file by its last part.

    Args:
        text: content of the file.
        name: file name, whose suffix selects the format.
        record: record of the run, which has the names that were local folders during training; None without run.json.

    Returns:
        The redacted text; the same text, byte for byte, if it has no local path.
    """
    is_yaml = name.endswith((".yaml", ".yml"))
    content = load_yaml(text) if is_yaml else json.loads(text)
    redacted = _redact(content, local_folders(record) if record else set())
    if redacted == content:
        return text
    if is_yaml:
        return yaml.safe_dump(redacted, sort_keys=False, allow_unicode=True)
    return json_text(redacted, allow_nan=True)


def redact_record(record: RunRecord) -> RunRecord:
    """Return the record of a run with redacted paths."""
    return RunRecord.from_json(_redact(record.to_json(), local_folders(record)))


def local_folders(record: RunRecord) -> set[str]:
    """Return the names in the record that were local folders during training."""
    recipe = record.recipe
    texts = record.model.texts
    names = [
        (recipe.get("teacher"), None),  # first, so that what run.json records for the same name takes precedence
        (recipe.get("head_from_text"), None),
        (record.data.dataset_name, record.data.is_local),
        (record.model.base_model, record.model.is_local),
        (recipe.get("output_dir"), True),
        (texts and texts.text_encoder, texts and texts.is_local),
    ]
    was_local = {name: local for name, local in names if isinstance(name, str) and name}
    return {name for name, local in was_local.items() if (is_local(name) if local is None else local)}


def _redact(value: Any, local: set[str], key: str | None = None) -> Any:
    """Redact the strings of a JSON value; `local` are names of local folders."""
    if key in _CLASS_NAME_KEYS:
        return value
    if key == "examples" and isinstance(value, dict):
        value = {name: _without_files(inner) for name, inner in value.items()}
    if isinstance(value, dict):
        return {name: _redact(inner, local, name) for name, inner in value.items()}
    if key == "class_names" and isinstance(value, list) and len(value) > 1:  # one item is a file of class names
        return value
    if isinstance(value, list):
        return [_redact(inner, local, key) for inner in value]
    if not isinstance(value, str):
        return value
    if key == "command":
        return shlex.join(_redact_word(word, local) for word in shlex.split(value))
    if key in _PATH_KEYS or value in local or _is_local_path(value):
        return _last_part(value)
    return _last_part(value) if key in _PATH_OR_ID_KEYS and is_local(value) else value


def _without_files(images: Any) -> Any:
    """Remove the file names of example images, which may have names of persons."""
    if not isinstance(images, list):
        return images
    return [{key: each[key] for key in each if key != "file"} if isinstance(each, dict) else each for each in images]


def _redact_word(word: str, local: set[str]) -> str:
    option, equals, value = word.partition("=")
    if option.startswith("--") and equals:
        return f"{option}={_redact_word(value, local)}"
    is_absolute = "/" in word and Path(word).is_absolute()
    return _last_part(word) if word in local or is_absolute or _is_local_path(word) else word


def _is_local_path(text: str) -> bool:
    """Return whether a path is absolute or starts with `~`, `./` or `../`.

    This includes Windows paths, but no Hub ids and URLs.
    """
    return bool(re.match(r"(/|~|\.\.?[/\\]|[A-Za-z]:[/\\]|\\\\)", text)) and "\n" not in text


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path
