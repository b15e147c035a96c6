"""Resolve a path to a checkpoint, an ONNX file or a TensorRT engine, without loading it."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfvit.artifacts.constants import CONFIG_FILE, ENGINE_RECORD_FILE, PREPROCESSOR_FILE
from hfvit.artifacts.engine_record import EngineRecord
from hfvit.errors import ModelError, nearest, wrap_library_errors
from hfvit.utils.files import expand_user
from hfvit.utils.hub_ids import folder_or_hub_id

ENGINE_SUFFIXES = (".engine", ".plan")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


@dataclass
class Artifact:
    """A classifier that is yet to be loaded.

    `file` is the ONNX file or the engine, None for a checkpoint; `source` is the folder (or Hub id) of the weights or
    of that file's configuration.
    """

    source: str
    file: Path | None = None

    @property
    def is_checkpoint(self) -> bool:
        return self.file is None

    @property
    def is_engine(self) -> bool:
        return self.file is not None and self.file.suffix in ENGINE_SUFFIXES

    @property
    def is_graph(self) -> bool:
        """Whether it is an ONNX file."""
        return self.file is not None and not self.is_engine

    @property
    def folder(self) -> Path | None:
        """Where the artifact itself lies; None on the Hub."""
        if self.file:
            return self.file.parent
        return Path(self.source) if Path(self.source).is_dir() else None

    def beside(self, name: str) -> Path | None:
        """The file `name` in the artifact's folder, or in the one above it, as for an export below its checkpoint."""
        folder = self.folder and self.folder.resolve()
        candidates = (folder / name, folder.parent / name) if folder else ()
        return next((path for path in candidates if path.is_file()), None)


def find_artifact(path: str | Path) -> Artifact:
    """What `path` means; raises `ModelError` where it is nothing that can be loaded.

    It is a checkpoint folder, a Hub id, an `.onnx` file, or a folder of such files, of which `model.onnx` comes first;
    an engine, or the folder with its engine.json. A folder with weights is a checkpoint, whatever exports lie in it or
    below it; beside ONNX files an engine is named by its file.
    """
    file = expand_user(path)
    if file.suffix in (".onnx", *ENGINE_SUFFIXES):
        if not os.path.isfile(file):
            raise ModelError(f"There is no file {path}.{_other_graphs(file)}")
        return _file_artifact(file)
    source = folder_or_hub_id(path, ModelError)
    folder = Path(source)
    if not folder.is_dir() or any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        return Artifact(source)
    graphs = _graphs(folder)
    if not graphs and (folder / ENGINE_RECORD_FILE).is_file():
        return _file_artifact(_engine(folder))
    graphs = graphs or _graphs(folder / "onnx")
    if not graphs:
        raise ModelError(f"{path} holds no classifier: neither weights (model.safetensors) nor an ONNX file.")
    named = [graph for graph in graphs if graph.name == "model.onnx"]
    if not named and len(graphs) > 1:
        names = ", ".join(str(graph.relative_to(folder)) for graph in graphs)
        raise ModelError(f"{path} holds several ONNX files and none is named model.onnx; name one of {names}.")
    return _file_artifact((named or graphs)[0])


def _file_artifact(file: Path) -> Artifact:
    """The configuration lies beside the file, else in the folder above (the layout of transformers.js)."""
    config = Artifact(str(file.parent), file).beside(CONFIG_FILE)
    if config is None:
        raise ModelError(
            f"{file} has no {CONFIG_FILE} beside it, which holds the class names; copy {CONFIG_FILE} and"
            f" {PREPROCESSOR_FILE} of its checkpoint there."
        )
    return Artifact(str(config.parent), file)


def _engine(folder: Path) -> Path:
    """The engine that engine.json names: model.engine, or 1/model.plan in a model of Triton's."""
    name = EngineRecord.load(folder).file
    file = folder / name
    try:
        is_inside = file.resolve().is_relative_to(folder.resolve()) and file.suffix in ENGINE_SUFFIXES
        is_there = is_inside and file.is_file()
    except (OSError, ValueError):  # a null byte, a name that is too long
        is_there = False
    if not is_there:
        raise ModelError(
            f"{folder / ENGINE_RECORD_FILE} names the engine {name!r}, which is not there."
            f" {EngineRecord.REMEDY.format(folder=folder)}"
        )
    return file


def _graphs(folder: Path) -> list[Path]:
    """The ONNX files in a folder, but for those that are being written."""
    return sorted(path for path in folder.glob("*.onnx") if not path.name.startswith("."))


def _other_graphs(file: Path) -> str:
    names = [graph.name for graph in _graphs(file.parent)]
    return (f" The folder has {', '.join(names)}." + nearest(file.name, names)) if names else ""


@dataclass
class Head:
    """The classes of a classifier: distinct names in the order of the logits, and whether several may hold at once.

    `config` is the transformers configuration that tells it.
    """

    labels: list[str]
    multi_label: bool
    config: Any


def read_head(artifact: Artifact, **kwargs) -> Head:
    """The head, from the configuration alone; `kwargs` are `from_pretrained`'s.

    Raises `ModelError` where there is no readable configuration, or a regression.
    """
    from transformers import AutoConfig

    where = "" if artifact.folder else "there is no such folder here, and on the Hub "
    with wrap_library_errors(ModelError, f"{artifact.source}: {where}{CONFIG_FILE} cannot be read"):
        config = AutoConfig.from_pretrained(artifact.source, **{"trust_remote_code": False, **kwargs})
        labels = _distinct([config.id2label[index] for index in range(config.num_labels)])
        problem, given = config.problem_type, getattr(config, "label_names", labels)
    if len(given) != len(labels):  # transformers would call them LABEL_0, LABEL_1, ...
        raise ModelError(
            f"{artifact.source}: {CONFIG_FILE} has {len(given)} label_names for {len(labels)} classes (num_classes);"
            " give one name for each class."
        )
    if problem == "regression":
        raise ModelError(
            f"{artifact.source} is no classifier: its {CONFIG_FILE} has problem_type regression. If its outputs are"
            " logits of classes, set problem_type to single_label_classification or multi_label_classification there."
        )
    # transformers' image-classification pipeline takes the sigmoid for one class, too: its softmax is always 1.
    return Head(labels, problem == "multi_label_classification" or len(labels) == 1, config)


def _distinct(names: list[str]) -> list[str]:
    """Names that several classes have, each with its index: ImageNet's usual names call two classes `crane`."""
    counts = Counter(names)
    return [f"{name} ({index})" if counts[name] > 1 else name for index, name in enumerate(names)]


def class_names(artifact: Artifact, **kwargs) -> list[str]:
    """Class names in the order of the logits; otherwise as `read_head`."""
    return read_head(artifact, **kwargs).labels
