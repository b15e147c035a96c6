"""Remove local paths from published files."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from hfvit.artifacts.run_record import RunRecord
from hfvit.utils.hub_ids import is_local

# Class names may look like paths (/m/01abc) and are none.
_NAMES_OF_CLASSES = ("labels", "label", "label_names", "per_class")
_ALWAYS_A_PATH = ("output_dir", "best_model_checkpoint", "logging_dir")
_MAY_BE_LOCAL = ("dataset_name", "model_name_or_path", "base_model", "text_encoder", "teacher", "head_from_text")


def public_text(text: str, name: str, record: RunRecord | None) -> str:
    """The file `name` (JSON or YAML) with each path of this machine reduced to its last part.

    `record` knows what was a folder here when the run was made; None where there is no run.json.
    """
    is_yaml = name.endswith((".yaml", ".yml"))
    content = yaml.safe_load(text) if is_yaml else json.loads(text)
    public = _reduced(content, local_names(record) if record else set())
    if public == content:
        return text  # byte for byte, so that nothing changes on the Hub
    if is_yaml:
        return yaml.safe_dump(public, sort_keys=False, allow_unicode=True)
    return json.dumps(public, indent=2) + "\n"


def public_record(record: RunRecord) -> RunRecord:
    """A run's record as it may be published."""
    return RunRecord.from_json(_reduced(record.to_json(), local_names(record)))


def local_names(record: RunRecord) -> set[str]:
    """The names in a run's record that were folders of this machine."""
    recipe = record.recipe
    texts = record.model.texts
    named = [
        (recipe.get("teacher"), None),  # first: what run.json says of the same name below comes before a look here
        (recipe.get("head_from_text"), None),
        (record.data.dataset_name, record.data.is_local),
        (record.model.base_model, record.model.is_local),
        (recipe.get("output_dir"), True),
        (texts and texts.text_encoder, texts and texts.is_local),
    ]
    was_local = {name: local for name, local in named if isinstance(name, str) and name}
    return {name for name, local in was_local.items() if (is_local(name) if local is None else local)}


def _reduced(value: Any, local: set[str], key: str | None = None) -> Any:
    if key in _NAMES_OF_CLASSES:
        return value
    if isinstance(value, dict):
        return {name: _reduced(inner, local, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_reduced(inner, local, key) for inner in value]
    if not isinstance(value, str):
        return value
    if key == "command":
        return shlex.join(_reduced_word(word, local) for word in shlex.split(value))
    if key in _ALWAYS_A_PATH or value in local or _is_of_this_machine(value):
        return _last_part(value)
    return _last_part(value) if key in _MAY_BE_LOCAL and is_local(value) else value


def _reduced_word(word: str, local: set[str]) -> str:
    option, equals, value = word.partition("=")
    if option.startswith("--") and equals:
        return f"{option}={_reduced_word(value, local)}"
    is_folder = "/" in word and Path(word).is_absolute()
    return _last_part(word) if word in local or is_folder or _is_of_this_machine(word) else word


def _is_of_this_machine(text: str) -> bool:
    """Absolute, from the home folder or from the folder above; Windows' too. A URL or a Hub id is none of these."""
    return bool(re.match(r"(/|~|\.\.?[/\\]|[A-Za-z]:[/\\]|\\\\)", text)) and "\n" not in text


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path
