"""Find the checkpoint, export or TensorRT engine of a path without loading it."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfvit.artifacts.constants import CONFIG_FILE, ENGINE_RECORD_FILE, MULTIRUN_FILE, PREPROCESSOR_FILE, RUN_FILE
from hfvit.artifacts.engine_record import EngineRecord
from hfvit.errors import ModelError, nearest, wrap_library_errors
from hfvit.recipe.arguments import MULTI_LABEL, check_network
from hfvit.utils.checks import check_name
from hfvit.utils.files import expand_user
from hfvit.utils.hub_ids import folder_or_hub_id

MAX_CLASSES = 1_000_000
ENGINE_SUFFIXES = (".engine", ".plan")
ONNX_SUFFIX, OPENVINO_SUFFIX, EXECUTORCH_SUFFIX = ".onnx", ".xml", ".pte"
DEFAULT_GRAPHS = {
    ONNX_SUFFIX: "model.onnx", OPENVINO_SUFFIX: "openvino_model.xml", EXECUTORCH_SUFFIX: "model.pte",
}  # fmt: skip
FILE_SUFFIXES = (*DEFAULT_GRAPHS, *ENGINE_SUFFIXES)  # of all exports
EXPORT_FOLDERS = ("onnx", "openvino", "executorch")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


@dataclass
class Artifact:
    """Classifier on disk or on the Hub.

    Attributes:
        source: folder or Hub id of the weights, or of the configuration of `file`.
        file: ONNX file, OpenVINO file (.xml, its weights are in the .bin file beside it) or TensorRT engine, None for
            a checkpoint.
    """

    source: str
    file: Path | None = None

    @property
    def is_checkpoint(self) -> bool:
        """Return whether it is a checkpoint with PyTorch weights."""
        return self.file is None

    @property
    def is_engine(self) -> bool:
        """Return whether it is a TensorRT engine."""
        return self.file is not None and self.file.suffix in ENGINE_SUFFIXES

    @property
    def is_graph(self) -> bool:
        """Return whether it is an ONNX, OpenVINO or ExecuTorch file."""
        return self.file is not None and not self.is_engine

    @property
    def is_onnx(self) -> bool:
        """Return whether it is an ONNX file."""
        return self.file is not None and self.file.suffix == ONNX_SUFFIX

    @property
    def is_openvino(self) -> bool:
        """Return whether it is an OpenVINO file."""
        return self.file is not None and self.file.suffix == OPENVINO_SUFFIX

    @property
    def is_executorch(self) -> bool:
        """Return whether it is an ExecuTorch file."""
        return self.file is not None and self.file.suffix == EXECUTORCH_SUFFIX

    @property
    def takes_threads(self) -> bool:
        """Return whether its number of CPU threads can be set."""
        return not (self.is_engine or self.is_executorch)

    @property
    def folder(self) -> Path | None:
        """Return the folder of the artifact, None on the Hub."""
        if self.file:
            return self.file.parent
        return Path(self.source) if Path(self.source).is_dir() else None

    def beside(self, name: str) -> Path | None:
        """Find the file `name` in the artifact's folder or in its parent folder.

        The parent folder is that of the checkpoint, if the artifact is an export in a subfolder. Of a checkpoint in
        the folder of a run, it has the recipe, but the results are those of other weights.
        """
        folder = self.folder and self.folder.resolve()
        candidates = (folder / name, folder.parent / name) if folder else ()
        if self.is_checkpoint and name == RUN_FILE:
            candidates = candidates[:1]
        return next((path for path in candidates if path.is_file()), None)


def find_artifact(path: str | Path) -> Artifact:
    """Find the artifact of a path or Hub id.

    A folder with weights is a checkpoint, even if it also contains exports. In a folder with ONNX files, `model.onnx`
    is chosen, or the only file; in one with OpenVINO files, `openvino_model.xml`, or the only file; likewise
    `model.pte`. A folder with engine.json and without such files is an engine.

    Args:
        path: checkpoint folder, Hub id, ONNX, OpenVINO or ExecuTorch file, TensorRT engine, or folder of an export.

    Raises:
        ModelError: nothing that can be loaded was found.
        TypeError: `path` is neither a path nor a Hub id.
    """
    check_name("model", path, "Save a model with save_pretrained, and pass its folder.")
    if not str(path):  # would be the current folder
        raise ModelError("model: must be a path or Hub id, got ''.")
    file = expand_user(path)
    if file.suffix in FILE_SUFFIXES:
        if not os.path.isfile(file):
            raise ModelError(f"{path}: no such file.{_other_graphs(file)}")
        return _file_artifact(file)
    source = folder_or_hub_id(path, ModelError)
    folder = Path(source)
    if not folder.is_dir() or any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        return Artifact(source)
    graphs = _graphs(folder)
    if not graphs and (folder / ENGINE_RECORD_FILE).is_file():
        return _file_artifact(_engine(folder))
    graphs = graphs or next(filter(None, (_graphs(folder / name) for name in EXPORT_FOLDERS)), [])
    if not graphs:
        several = (folder / MULTIRUN_FILE).is_file()
        advice = f" It has several runs: pass {path}/seed_N or {path}/fold_N." if several else ""
        raise ModelError(f"{path}: no classifier found, neither weights (model.safetensors) nor an ONNX file.{advice}")
    default = DEFAULT_GRAPHS[graphs[0].suffix]
    preferred = [graph for graph in graphs if graph.name == default]
    if not preferred and len(graphs) > 1:
        names = ", ".join(str(graph.relative_to(folder)) for graph in graphs)
        raise ModelError(f"{path}: several files, and none is {default}. Pass one of {names}.")
    return _file_artifact((preferred or graphs)[0])


def revision_arguments(path: str | Path, revision: str | None) -> dict[str, str]:
    """Return the arguments of `from_pretrained` for a revision of an artifact.

    Raises:
        ModelError: there is no artifact, or it is local and has no revision.
    """
    artifact = find_artifact(path)
    if revision is None:
        return {}
    if artifact.folder is not None:
        raise ModelError(f"--revision: only used with a Hub id, but {path} is local.")
    return {"revision": revision}


def _file_artifact(file: Path) -> Artifact:
    """Create the artifact of an ONNX file, OpenVINO file or engine.

    Its configuration is next to it or, in the layout of transformers.js, in the parent folder.
    """
    config = Artifact(str(file.parent), file).beside(CONFIG_FILE)
    if config is None:
        raise ModelError(
            f"{file}: no {CONFIG_FILE} with the class names next to it. Copy {CONFIG_FILE} and {PREPROCESSOR_FILE} of"
            " its checkpoint there."
        )
    return Artifact(str(config.parent), file)


def _engine(folder: Path) -> Path:
    """Return the engine of engine.json: model.engine, or 1/model.plan for Triton."""
    name = EngineRecord.load(folder).file
    file = folder / name
    try:
        is_inside = file.resolve().is_relative_to(folder.resolve()) and file.suffix in ENGINE_SUFFIXES
        exists = is_inside and file.is_file()
    except (OSError, ValueError):  # a null byte, a name that is too long
        exists = False
    if not exists:
        raise ModelError(
            f"{folder / ENGINE_RECORD_FILE}: its engine {name!r} does not exist."
            f" {EngineRecord.REMEDY.format(folder=folder)}"
        )
    return file


def _graphs(folder: Path) -> list[Path]:
    """Return a folder's ONNX files or, without any, those of the next format.

    Temporary files are left out.
    """
    for pattern in (f"*{ONNX_SUFFIX}", f"openvino_model*{OPENVINO_SUFFIX}", f"*{EXECUTORCH_SUFFIX}"):
        if found := sorted(path for path in folder.glob(pattern) if not path.name.startswith(".")):
            return found
    return []


def _other_graphs(file: Path) -> str:
    names = [graph.name for graph in _graphs(file.parent)]
    return (f" The folder has {', '.join(names)}." + nearest(file.name, names)) if names else ""


@dataclass
class Head:
    """Classes of a classifier, from its configuration.

    Attributes:
        labels: distinct class names, in the order of the logits.
        multi_label: whether an image can have several classes.
        config: the transformers configuration.
        thresholds: probabilities from which on an image has a class, in the order of the logits, of a multi-label
            model that hfvit trained.
    """

    labels: list[str]
    multi_label: bool
    config: Any
    thresholds: list[float] | None = None


def read_head(artifact: Artifact, **kwargs) -> Head:
    """Read the classes from the configuration of an artifact.

    Args:
        artifact: artifact to read.
        **kwargs: arguments of `AutoConfig.from_pretrained`.

    Raises:
        ModelError: the configuration cannot be read, is that of a regression model, or would load other weights.
    """
    from transformers import AutoConfig, PretrainedConfig

    where = "" if artifact.folder else "no such local folder, and on the Hub "
    with wrap_library_errors(ModelError, f"{artifact.source}: {where}{CONFIG_FILE} cannot be read"):
        kwargs = {"trust_remote_code": False, **kwargs}
        values, _ = PretrainedConfig.get_config_dict(artifact.source, **kwargs)
        for key in ("num_labels", "num_classes"):  # the configuration makes a name for each class
            if isinstance(values.get(key), int) and values[key] > MAX_CLASSES:
                raise ModelError(
                    f"{artifact.source}: {key} in {CONFIG_FILE} must be at most {MAX_CLASSES:,}, got {values[key]}."
                )
        config = AutoConfig.from_pretrained(artifact.source, **kwargs)
        labels = _distinct([config.id2label[index] for index in range(config.num_labels)])
        problem_type = config.problem_type
        label_names = getattr(config, "label_names", None) or labels
        if not all(isinstance(name, str) for name in (*labels, *label_names)):
            raise ModelError(f"{artifact.source}: class names in {CONFIG_FILE} must be strings.")
    check_network(
        getattr(config, "architecture", None), getattr(config, "model_args", None), ModelError, artifact.source
    )
    if len(label_names) != len(labels):  # transformers would call them LABEL_0, LABEL_1, ...
        raise ModelError(
            f"{artifact.source}: {CONFIG_FILE} must have one label_names entry per class, got {len(label_names)} for"
            f" {len(labels)} classes (num_classes)."
        )
    if problem_type == "regression":
        raise ModelError(
            f"{artifact.source}: not a classifier, since its {CONFIG_FILE} has problem_type regression. If its outputs"
            " are logits of classes, set problem_type to single_label_classification or multi_label_classification."
        )
    # A softmax over one class is always 1; transformers' image-classification pipeline uses the sigmoid, too.
    multi_label = problem_type == MULTI_LABEL or len(labels) == 1
    return Head(labels, multi_label, config, _thresholds(config, artifact) if multi_label else None)


def _thresholds(config: Any, artifact: Artifact) -> list[float] | None:
    """Return the checked thresholds of a configuration."""
    values = getattr(config, "thresholds", None)
    if values is None:
        return None
    is_number = isinstance(values, list) and all(type(value) in (int, float) and 0 <= value <= 1 for value in values)
    if not is_number or len(values) != config.num_labels:
        raise ModelError(
            f"{artifact.source}: thresholds in {CONFIG_FILE} must be {config.num_labels} probabilities, one for each"
            f" class, got {repr(values)[:60]}."
        )
    return [float(value) for value in values]


def _distinct(names: list[str]) -> list[str]:
    """Add the index to names that several classes have, such as ImageNet's `crane`."""
    counts = Counter(names)
    return [f"{name} ({index})" if counts[name] > 1 else name for index, name in enumerate(names)]
