"""Check paths in cards and JSON files of a data set before `datasets` opens them.

`datasets` (5.2) accepts absolute paths, `..` and URLs in `data_files` of a card, also for data sets on the Hub, and
reads the file names of a saved data set from its JSON files.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from hfvit.errors import DataError, one_line

CARDS = (datasets.config.REPOCARD_FILENAME, datasets.config.REPOYAML_FILENAME)
STATE_FILES = (datasets.config.DATASETDICT_JSON_FILENAME, datasets.config.DATASET_STATE_JSON_FILENAME)
MAX_VALUES = 100_000
READ_ERRORS = (OSError, yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
ALLOW = "Pass --allow_outside_paths to allow it."


def leads_outside(path: str) -> bool:
    """Return whether a path is absolute, a URL, or has `..`."""
    parts = path.replace("\\", "/").split("/")
    return os.path.isabs(path) or ".." in parts or path.startswith("~") or ":" in parts[0] or "::" in path


def read_cards(source: str, revision: str | None = None) -> dict[str, dict[str, Any]]:
    """Read the metadata of the cards of a data set.

    Args:
        source: an existing folder, or the id of a data set on the Hub.
        revision: branch, tag or commit on the Hub.

    Returns:
        The metadata by the path of its card, without cards that have none.

    Raises:
        DataError: a card cannot be read, or its metadata is not a mapping.
    """
    found = {}
    for name in CARDS:
        path = _card(source, name, revision)
        if path is None:
            continue
        try:
            values = _metadata(path)
        except READ_ERRORS as error:
            raise DataError(
                f"dataset_name: {_shown(source, str(path))} cannot be read ({one_line(error)}). Correct or delete it."
            ) from None
        if values:
            found[str(path)] = values
    return found


def _metadata(path: Path) -> dict[str, Any]:
    """Parse the metadata of a card, as `DatasetCard.load` does."""
    if path.suffix == ".md":
        with path.open(encoding="utf-8-sig", newline="") as file:
            match = REGEX_YAML_BLOCK.search(file.read())
        text = match[2] if match else ""
    else:
        text = path.read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"metadata must be a mapping, got {type(values).__name__}")
    return values or {}


def _shown(source: str, path: str) -> str:
    return path if os.path.isdir(source) else f"{os.path.basename(path)} of {source}"


def _card(source: str, name: str, revision: str | None) -> Path | None:
    if os.path.isdir(source):
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, name, repo_type="dataset", revision=revision))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError):
        return None  # `datasets` raises the error later


def check_cards(source: str, allow_outside: bool, revision: str | None = None) -> bool:
    """Check that the cards of a data set refer to no files outside it.

    Args:
        source: an existing folder, or the id of a data set on the Hub.
        allow_outside: allow absolute paths, `..` and URLs in a folder.
        revision: branch, tag or commit on the Hub.

    Returns:
        Whether a card has `configs` or `dataset_info`, the files or features of the data set.

    Raises:
        DataError: a card cannot be read, or refers to files outside the data set.
    """
    cards = read_cards(source, revision)
    for path, values in cards.items():
        outside = [text for text in _strings(values.get("configs"), path) if leads_outside(text)]
        if outside and not allow_outside:
            raise DataError(
                f"dataset_name: {_shown(source, path)} refers to files outside ({', '.join(outside[:3])}). {ALLOW}"
            )
    return any(values.get("configs") or values.get("dataset_info") for values in cards.values())


def _blobs(root: Path) -> list[str]:
    """Return the folder that the files of a snapshot in the Hub's cache are links to."""
    real = Path(os.path.realpath(root))
    return [str(above.parent / "blobs") for above in real.parents if above.name == "snapshots"][:1]


def check_saved(root: Path, allow_outside: bool) -> None:
    """Check that a folder of `Dataset.save_to_disk` refers to no files elsewhere.

    Args:
        root: folder of the saved data set.
        allow_outside: allow absolute paths, `..` and URLs in its JSON files, and links to files outside.

    Raises:
        DataError: a name or link refers to a file outside the folder, or a JSON file has another format.
    """
    folders = [os.path.realpath(root), *_blobs(root)]
    for path in root.rglob("*"):
        if not path.is_file() and not path.is_dir():
            raise DataError(f"dataset_name: {path} is a pipe, socket, device or broken link, not a file. Remove it.")
        if path.is_symlink() and not allow_outside:
            real = Path(os.path.realpath(path))
            if not any(real.is_relative_to(folder) for folder in folders):
                raise DataError(f"dataset_name: {path} is a link to {real}, outside {root}. {ALLOW}")
        if path.name not in STATE_FILES:
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            files = [file["filename"] for file in values.get("_data_files") or []]
            names = [*(values.get("splits") or []), *files]  # a hostile file has both
            outside = [name for name in names if leads_outside(name)]
        except READ_ERRORS as error:
            raise DataError(
                f"dataset_name: {path} cannot be read ({type(error).__name__}: {one_line(error)})."
            ) from None
        if outside and not allow_outside:
            raise DataError(f"dataset_name: {path} refers to files outside ({', '.join(outside[:3])}). {ALLOW}")


def _strings(value: Any, path: str) -> Iterator[str]:
    """Yield all strings in nested mappings and lists.

    Raises `DataError` for too many values, since YAML aliases can multiply them.
    """
    stack = [value]
    for _ in range(MAX_VALUES):
        if not stack:
            return
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list | tuple | set):
            stack += value
    raise DataError(f"dataset_name: {path} has more than {MAX_VALUES:,} values in its configs. Correct or delete it.")
