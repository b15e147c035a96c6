"""Select the files to push."""

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.constants import EVAL_RESULTS_FOLDER
from yaml import YAMLError

from hfvit.artifacts.constants import (
    ADAPTER_FILES,
    ADAPTER_FOLDER,
    CARD_FILE,
    CONFIG_FILE,
    MULTIRUN_FILE,
    PREPROCESSOR_FILE,
    RECIPE_FILE,
    RUN_FILE,
    STATE_FILE,
    TOKENIZER_FILES,
    WEIGHT_FILES,
    WEIGHTS,
)
from hfvit.artifacts.export_folder import export_rows
from hfvit.artifacts.extension_record import ExtensionRecord
from hfvit.artifacts.run_record import RunRecord
from hfvit.artifacts.soup_record import SoupRecord
from hfvit.errors import ModelError, PushArgumentError, one_line
from hfvit.hub.derived_card import read_derived_record, render_derived_card
from hfvit.hub.model_card import CARD_PLOTS, is_generated, remove_generated_text, render_card
from hfvit.hub.redaction import redact_paths
from hfvit.utils.files import expand_user
from hfvit.utils.hub_ids import is_hub_id


def eval_results_file(record: RunRecord) -> tuple[str, str] | None:
    """Build the evaluation result of a run for the Hub's leaderboards.

    The result is the accuracy, or mAP of a multi-label run, in percent, on the full test split of a data set on the
    Hub.

    Returns:
        (path in the repository, YAML), or None for a local data set, a run without a test split, or a part of it.
    """
    data = record.data
    test = record.metrics.get("test")
    name = data.dataset_name
    if test is None or data.is_local or not is_hub_id(name) or record.recipe.get("max_eval_samples"):
        return None
    split = data.splits["test"]
    if split.left_out or split.held_out or "[" in split.source:
        return None
    score = "top-1 accuracy" if test.score.key == "accuracy" else test.score.name
    entry = EvalResultEntry(
        dataset_id=name,
        task_id=data.dataset_config_name or "default",
        value=round(100 * test.score.value, 2),
        dataset_revision=data.commit,
        date=record.finished,
        notes=f"{score} in percent, split {data.splits['test'].source}, {test.images:,} images",
    )
    text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
    return f"{EVAL_RESULTS_FOLDER}/{name.replace('/', '--')}.yaml", text


# An allowlist, since a pattern missing from a denylist would publish optimizer state or a pickle.
ROOT = (CONFIG_FILE, PREPROCESSOR_FILE, CARD_FILE, RUN_FILE, RECIPE_FILE, STATE_FILE)
ROOT += (SoupRecord.FILE, ExtensionRecord.FILE, *TOKENIZER_FILES, *WEIGHT_FILES)
PLOTS = ("plots/*.png",)
# Files that transformers would load with, or instead of, the pushed config.json unless a push replaces them.
LOADED = (*WEIGHT_FILES, PREPROCESSOR_FILE, "processor_config.json", "adapter_config.json")
# Files of a push of hfvit that describe its weights; further plots may be a user's.
DESCRIBING = (CARD_FILE, RUN_FILE, RECIPE_FILE, STATE_FILE, SoupRecord.FILE, ExtensionRecord.FILE)
DESCRIBING += tuple(f"plots/{name}{theme}.png" for name in CARD_PLOTS for theme in ("", "_dark"))
# Plots with images of the data set, which may be private.
PLOTS_WITH_IMAGES = tuple(
    f"plots/{name}*.png" for name in ("training_images", "mistakes", "label_errors", "explanations", "attention")
)
EXPORTS = {
    "onnx": ("*.onnx", "*.onnx_data", "*.json"),
    "executorch": ("*.pte", "*.json"),
    "openvino": ("*.xml", "*.bin", "*.json"),
    "tensorrt": ("*.engine", "*.plan", "*.json", "*.pbtxt", "labels.txt", "*.onnx"),
}
REDACTED_FILES = (RUN_FILE, RECIPE_FILE, STATE_FILE)


@dataclass
class PushedFile:
    """File to push.

    Attributes:
        path: path in the repository.
        source: local file, or the content.
    """

    path: str
    source: Path | bytes

    @property
    def bytes(self) -> int:
        """Return the size in bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size


def files_to_push(
    folder: str | Path,
    repo_id: str,
    include: tuple[str, ...] = (),
    hub_card: str = "",
    revision: str | None = None,
) -> list[PushedFile]:
    """Select the files to push, sorted by path.

    Paths of this machine are redacted. The model card is rendered for `repo_id` and the exports, and keeps the text
    that users wrote into the local card and into `hub_card`. A folder without run.json has its own card, or one of its
    soup.json or extension.json, or that text.

    Args:
        folder: output folder of a run.
        repo_id: repository to push to, `user/name`.
        include: exports to push, of `onnx`, `openvino`, `executorch` and `tensorrt`.
        hub_card: model card in the repository, empty if it has none.
        revision: branch to push to. Default: main.

    Raises:
        PushArgumentError: the folder has no checkpoint, or an export is missing or of another model.
        ModelError: run.json cannot be read.
    """
    root = expand_user(folder)
    if not root.is_dir():
        raise PushArgumentError(f"OUTPUT_DIR: no folder {folder}.")
    if not (root / "config.json").is_file() or not any((root / name).is_file() for name in WEIGHTS):
        several = (root / MULTIRUN_FILE).is_file()
        advice = f" It has several runs: pass {folder}/seed_N or {folder}/fold_N." if several else ""
        raise PushArgumentError(
            "OUTPUT_DIR: must be the output_dir of a finished run, with config.json and model.safetensors, got"
            f" {folder}.{advice}"
        )
    record = RunRecord.load(root) if (root / RUN_FILE).exists() else None
    found: dict[str, Path | bytes] = {
        path: file
        for path, file in _matching(root, "", (*ROOT, *PLOTS))
        if not any(fnmatch(path, pattern) for pattern in PLOTS_WITH_IMAGES)
    }
    if record:
        for name in (SoupRecord.FILE, ExtensionRecord.FILE):  # of weights that the run has replaced
            found.pop(name, None)
        if _adapter_files(record):
            found |= dict(_matching(root, f"{ADAPTER_FOLDER}/", ADAPTER_FILES))
    for export in include:
        found |= _export(root, export)
    for name in REDACTED_FILES:
        if name in found:
            with _name_file_in_errors(found[name]):
                found[name] = redact_paths(found[name].read_text(encoding="utf-8"), name, record).encode()
    if record:
        local_card = ""
        if CARD_FILE in found:
            with _name_file_in_errors(found[CARD_FILE]):
                local_card = found[CARD_FILE].read_text(encoding="utf-8")
        exports = {export: export_rows(root / export) for export in include}
        with _name_file_in_errors(root / RUN_FILE):
            earlier = (hub_card, local_card)
            plots = any(path.startswith("plots/") for path in found)
            card = render_card(record, repo_id.split("/")[-1], repo_id, exports, earlier, plots, revision)
        found[CARD_FILE] = card.encode()
        if result := eval_results_file(record):
            found[result[0]] = result[1].encode()
    elif CARD_FILE not in found and (derived := read_derived_record(root)):
        config = _read_json(root / CONFIG_FILE)
        exports = [row for export in include for row in export_rows(root / export)]
        with _name_file_in_errors(root / CONFIG_FILE):
            card = render_derived_card(derived, config, _labels(config), repo_id, exports, (hub_card,))
        found[CARD_FILE] = card.encode()
    elif CARD_FILE not in found and (card := remove_generated_text(hub_card)):
        found[CARD_FILE] = card.encode()
    return [PushedFile(path, found[path]) for path in sorted(found)]


@dataclass
class Repository:
    """Repository on the Hub before a push.

    Attributes:
        files: paths of its files.
        card: its model card, empty if it has none.
        run: its run.json, empty if it has none.
    """

    files: list[str] = field(default_factory=list)
    card: str = ""
    run: str = ""


def outdated_files(repository: Repository, files: list[PushedFile], include: tuple[str, ...]) -> list[str]:
    """Return the files in the repository that belong to other weights.

    They would be loaded instead of the pushed files or with them, or are of an earlier push of hfvit, which is known
    by its run.json and model card. Other files stay.

    Args:
        repository: repository before the push.
        files: files to push.
        include: exports among them, whose folders are replaced.
    """
    sent = {file.path for file in files}
    folders = tuple(f"{name}/" for name in include)
    outdated = [*LOADED, *(TOKENIZER_FILES if sent & set(TOKENIZER_FILES) else ())]
    of_run = _files_of_run(repository.run)
    if of_run is not None or is_generated(repository.card):
        outdated += [*DESCRIBING, *(of_run or ())]
    return [
        path
        for path in repository.files
        if path not in sent and (path.startswith(folders) or any(_matches(path, pattern) for pattern in outdated))
    ]


def _files_of_run(text: str) -> list[str] | None:
    """Return the files that were pushed with a run.json and that only some runs have.

    Returns None if the text is no run.json of hfvit.
    """
    try:
        record = RunRecord.from_json(json.loads(text))
        result = eval_results_file(record)
    except (ModelError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    tokenizer = TOKENIZER_FILES if record.model.texts else ()
    return [*tokenizer, *_adapter_files(record), *([result[0]] if result else [])]


def _adapter_files(record: RunRecord) -> list[str]:
    """Return the paths of the adapter, none unless it is a LoRA run.

    In the folder of another run, adapter/ is left from an earlier one.
    """
    is_lora = record.recipe.get("finetuning") == "lora"
    return [f"{ADAPTER_FOLDER}/{name}" for name in ADAPTER_FILES] if is_lora else []


def exports_left_out(folder: str | Path, include: tuple[str, ...]) -> list[str]:
    """Return the exports in `folder` that are not in `include`."""
    root = expand_user(folder)
    # An export that failed may have left an empty folder.
    return [name for name in EXPORTS if name not in include and any((root / name).glob("[!.]*"))]


def _export(root: Path, name: str) -> dict[str, Path]:
    found = dict(_matching(root, f"{name}/", EXPORTS[name]))
    if all(path.endswith((".json", ".pbtxt", ".txt")) for path in found):
        raise PushArgumentError(
            f"--include {name}: no export in {root}/{name}. Write one with `optimum-cli export {name} --model {root}"
            f" {root}/{name}`."
        )
    checkpoint_config = _read_json(root / "config.json")
    for config in (file for file in found.values() if file.name == "config.json"):
        export_config = _read_json(config)
        with _name_file_in_errors(root / "config.json"):
            labels = _labels(checkpoint_config)
        with _name_file_in_errors(config):
            exported = _labels({"id2label": export_config.get("id2label")})
        if labels and labels != exported:
            raise PushArgumentError(
                f"--include {name}: the classes of {config.parent} differ from the checkpoint's. Export it again."
            )
    return found


def _matching(root: Path, prefix: str, patterns: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Return (path in the repository, file) of the files below `prefix` that match.

    Hidden and temporary files never match.

    Args:
        root: output folder of a run.
        prefix: name of a folder in `root` with a slash, empty for `root` itself.
        patterns: patterns of paths below `prefix`.

    Raises:
        PushArgumentError: a file that matches, or its folder, is a symbolic link.
    """
    folder = root / prefix if prefix else root
    if prefix:
        _check_not_a_link(root / prefix.rstrip("/"))
    folders = {pattern.rpartition("/")[0] for pattern in patterns}
    found = []
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        name = inside.as_posix() if not prefix else inside.name
        if any(part.startswith((".", "~")) for part in inside.parts):
            continue
        if name in folders:
            _check_not_a_link(file)
        if any(_matches(name, pattern) for pattern in patterns):
            _check_not_a_link(file)
            if file.is_file():
                found.append((f"{prefix}{inside.as_posix()}", file))
    return found


def _matches(path: str, pattern: str) -> bool:
    """Return whether a path matches a pattern whose `*` is within one folder."""
    return fnmatch(path, pattern) and pattern.count("/") == path.count("/")


def _check_not_a_link(path: Path) -> None:
    """Raise `PushArgumentError` for a symbolic link, which may lead to any file."""
    if path.is_symlink():
        raise PushArgumentError(
            f"OUTPUT_DIR: {path} is a symbolic link to {os.readlink(path)}, which is not pushed. Replace it by a copy"
            " of the target, or delete it."
        )


def _labels(config: dict) -> list[str]:
    """Return the class names of a config.json, in the order of the logits."""
    if names := config.get("label_names"):
        return names
    by_index = {int(index): name for index, name in (config.get("id2label") or {}).items()}
    return [by_index[index] for index in sorted(by_index)]  # files may have 0, 1, 10, 11, ..., 2


def _read_json(path: Path) -> dict:
    with _name_file_in_errors(path):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise PushArgumentError(f"{path}: must be a JSON object, got {type(content).__name__}.")
    return content


@contextmanager
def _name_file_in_errors(path: Path):
    """Raise `PushArgumentError` with the file's name if the block cannot read it."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, YAMLError, RecursionError) as error:
        reason = f"missing key {error}" if isinstance(error, LookupError) else one_line(error)
        raise PushArgumentError(f"{path}: not a file of a run ({reason}).") from None
