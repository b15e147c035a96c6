"""Select the files to push."""

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.constants import EVAL_RESULTS_FOLDER
from yaml import YAMLError

from hfvit.artifacts.constants import ADAPTER_FILES, ADAPTER_FOLDER, RUN_FILE, TOKENIZER_FILES, WEIGHT_FILES, WEIGHTS
from hfvit.artifacts.export_folder import export_rows
from hfvit.artifacts.run_record import RunRecord
from hfvit.errors import PushArgumentError, one_line
from hfvit.hub.model_card import render_card
from hfvit.hub.redaction import public_text
from hfvit.utils.files import expand_user
from hfvit.utils.hub_ids import is_hub_id


def eval_results_file(record: RunRecord) -> tuple[str, str] | None:
    """(path in the repository, YAML), or None where there is no result of a data set on the Hub.

    A result is the accuracy, in percent, on the whole test split: figures of rows that selected the checkpoint, or of
    a part of the split, do not belong beside those of others.
    """
    data = record.data
    test = record.metrics.get("test")
    name = data.dataset_name
    if test is None or data.is_local or not is_hub_id(name) or record.recipe.get("max_eval_samples"):
        return None
    entry = EvalResultEntry(
        dataset_id=name,
        task_id=data.dataset_config_name or "default",
        value=round(100 * test.accuracy, 2),
        dataset_revision=data.commit,
        date=record.finished,
        notes=f"top-1 accuracy in percent, split {data.splits['test'].source}, {test.images:,} images",
    )
    text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
    return f"{EVAL_RESULTS_FOLDER}/{name.replace('/', '--')}.yaml", text


# A list of what belongs there, not of what does not: a forgotten pattern would publish optimizer state or a pickle.
ROOT = ("config.json", "preprocessor_config.json", "README.md", RUN_FILE, "recipe.yaml", "trainer_state.json")
ROOT += (*TOKENIZER_FILES, *WEIGHT_FILES, "plots/*.png")
# Pictures of the data set, which need not be anybody else's to see.
OF_THE_DATA = tuple(f"plots/{name}*.png" for name in ("training_images", "mistakes", "attention"))
EXPORTS = {
    "onnx": ("*.onnx", "*.onnx_data", "*.json"),
    "tensorrt": ("*.engine", "*.plan", "*.json", "*.pbtxt", "*.onnx"),
}
WITHOUT_PATHS = (RUN_FILE, "recipe.yaml", "trainer_state.json")


@dataclass
class PushedFile:
    """`path` in the repository; `source` is a file here or the content itself."""

    path: str
    source: Path | bytes

    @property
    def bytes(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size


def files_to_push(
    folder: str | Path, repo_id: str, include: tuple[str, ...] = (), card_there: str = ""
) -> list[PushedFile]:
    """The files of a checkpoint folder and of the exports named in `include`, in the order of their paths.

    Paths of this machine are reduced to their last part in what is JSON or YAML of a run. The card names `repo_id` and
    the exports, and keeps what users wrote into it here and in `card_there`, the repository's. The result of a data
    set on the Hub comes as `.eval_results` too. Raises `HubError` where the folder holds no checkpoint or not what
    `include` names, `ModelError` for a run.json that cannot be read.
    """
    root = expand_user(folder)
    if not root.is_dir():
        raise PushArgumentError(f"OUTPUT_DIR: no folder {folder}.")
    if not (root / "config.json").is_file() or not any((root / name).is_file() for name in WEIGHTS):
        raise PushArgumentError(
            "OUTPUT_DIR: must be the output_dir of a finished run, with config.json and model.safetensors, got"
            f" {folder}."
        )
    record = RunRecord.load(root) if (root / RUN_FILE).exists() else None
    found: dict[str, Path | bytes] = {
        path: file
        for path, file in _matching(root, "", ROOT)
        if not any(fnmatch(path, pattern) for pattern in OF_THE_DATA)
    }
    if record and record.recipe.get("finetuning") == "lora":  # else the folder is of an earlier run
        found |= dict(_matching(root, f"{ADAPTER_FOLDER}/", ADAPTER_FILES))
    for export in include:
        found |= _export(root, export)
    for name in WITHOUT_PATHS:
        if name in found:
            with _told_of(found[name]):
                found[name] = public_text(found[name].read_text(encoding="utf-8"), name, record).encode()
    if record:
        card_here = ""
        if "README.md" in found:
            with _told_of(found["README.md"]):
                card_here = found["README.md"].read_text(encoding="utf-8")
        exports = {export: export_rows(root / export) for export in include}
        with _told_of(root / RUN_FILE):
            card = render_card(record, repo_id.split("/")[-1], repo_id, exports, earlier=(card_there, card_here))
        found["README.md"] = card.encode()
        if result := eval_results_file(record):
            found[result[0]] = result[1].encode()
    return [PushedFile(path, found[path]) for path in sorted(found)]


def left_out(folder: str | Path, include: tuple[str, ...]) -> list[str]:
    """The exports that lie in `folder` and are not in `include`."""
    return [name for name in EXPORTS if name not in include and (expand_user(folder) / name).is_dir()]


def _export(root: Path, name: str) -> dict[str, Path]:
    found = dict(_matching(root, f"{name}/", EXPORTS[name]))
    if all(path.endswith((".json", ".pbtxt")) for path in found):
        raise PushArgumentError(
            f"--include {name}: no export in {root}/{name}. Make one with `optimum-cli export {name} --model {root}"
            f" {root}/{name}`."
        )
    config = root / name / "config.json"
    if config.exists():
        mine, theirs = _read_json(root / "config.json"), _read_json(config)
        labels = mine.get("label_names") or list((mine.get("id2label") or {}).values())
        if labels and labels != list((theirs.get("id2label") or {}).values()):
            raise PushArgumentError(
                f"--include {name}: {root}/{name} is of a model with other classes. Export this model again."
            )
    return found


def _matching(root: Path, prefix: str, patterns: tuple[str, ...]) -> list[tuple[str, Path]]:
    """(path in the repository, file) of what matches, below `prefix`; hidden and temporary files never do.

    Args:
        root: output folder of a run.
        prefix: of the paths, the name of a folder in `root` and a slash; empty for `root` itself.
        patterns: of the paths below `prefix`.

    Raises:
        PushArgumentError: what matches, or a folder that it may be in, is a symbolic link.
    """
    folder = root / prefix if prefix else root
    if prefix:
        _refuse_link(root / prefix.rstrip("/"))
    folders = {pattern.rpartition("/")[0] for pattern in patterns}
    found = []
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        named = inside.as_posix() if not prefix else inside.name
        if any(part.startswith((".", "~")) for part in inside.parts):
            continue
        if named in folders:
            _refuse_link(file)
        if any(fnmatch(named, pattern) and pattern.count("/") == named.count("/") for pattern in patterns):
            _refuse_link(file)
            if file.is_file():
                found.append((f"{prefix}{inside.as_posix()}", file))
    return found


def _refuse_link(path: Path) -> None:
    """Raise `PushArgumentError` for a symbolic link: what it leads to may be any file of this machine."""
    if path.is_symlink():
        raise PushArgumentError(
            f"OUTPUT_DIR: {path} is a symbolic link to {os.readlink(path)}. A push follows no links; replace it with"
            " what it stands for, or delete it."
        )


def _read_json(path: Path) -> dict:
    with _told_of(path):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise PushArgumentError(f"{path} cannot be read: it holds no JSON object.")
    return content


@contextmanager
def _told_of(path: Path):
    """Whatever keeps the file from being what hfvit wrote is told with its name."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, YAMLError) as error:
        why = f"it lacks {error}" if isinstance(error, LookupError) else one_line(error)
        raise PushArgumentError(f"{path} cannot be read as what a run wrote: {why}.") from None
