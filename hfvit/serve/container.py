"""`hfvit serve --docker`: build context, and files for Inference Endpoints."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import distribution, version
from pathlib import Path

from packaging.requirements import Requirement

from hfvit.artifacts.artifact import ONNX_SUFFIX, OPENVINO_SUFFIX, Artifact, read_head
from hfvit.artifacts.constants import CONFIG_FILE, PREPROCESSOR_FILE, PRETRAINED_CFG, RUN_FILE, WEIGHT_FILES
from hfvit.errors import ModelError
from hfvit.utils.files import check_writable, expand_user, read_object, sync, sync_tree, wrap_write_errors

PACKAGE = Path(__file__).resolve().parents[1]
# Beside transformers.
RUNTIMES = {ONNX_SUFFIX: "onnxruntime", OPENVINO_SUFFIX: "openvino"}

DOCKERFILE = """\
# Build: docker build -t hfvit-serve .
# Run: docker run -p 127.0.0.1:8000:8000 hfvit-serve
FROM python:{python}-slim
WORKDIR /app
COPY requirements-server.txt ./
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -r requirements-server.txt
COPY packages/ packages/
COPY model/ model/
RUN useradd --no-create-home server
USER server
ENV PYTHONPATH=/app/packages HF_HUB_OFFLINE=1 HOME=/tmp
EXPOSE 8000
HEALTHCHECK --start-period=60s \\
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
CMD {command}
"""
COMMAND = ("python", "-c", "from hfvit.cli import main; main()", "serve", "/app/model", "--host", "0.0.0.0")


def write_container(artifact: Artifact, output: str | Path, words: Sequence[str] = ()) -> None:
    """Write the files of a container and of an Inference Endpoint.

    `Dockerfile`, `requirements-server.txt` with the versions of this environment and `packages` with hfvit are the
    server; `handler.py`, `image_metadata.py` and `requirements.txt` make the folder a repository for Inference
    Endpoints; both run `model`.

    Args:
        artifact: local checkpoint, ONNX file or OpenVINO file.
        output: new or empty folder.
        words: options of the server, such as `["--top_k", "3"]`. The handler does not have them.

    Raises:
        ModelError: the artifact is not local, incomplete, an engine or an image-text model, or the folder is not
            empty.
    """
    files = _model_files(artifact)
    folder = Path(os.path.realpath(expand_user(output)))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"--docker: must be a new or an empty folder, got {output}.")
    check_writable(folder, "--docker", ModelError)
    with wrap_write_errors(f"--docker: {output}"), tempfile.TemporaryDirectory(prefix=".serve-", dir=folder) as name:
        staging = Path(name)
        (staging / "model").mkdir()
        for file in files:
            shutil.copyfile(file, staging / "model" / file.name)
        _copy_package(staging / "packages")
        for file in (PACKAGE / "serve" / "handler.py", PACKAGE / "data" / "image_metadata.py"):
            shutil.copyfile(file, staging / file.name)
        runtime = RUNTIMES[artifact.file.suffix] if artifact.file else "timm"
        libraries = dict.fromkeys([*_requirements(), *_requirements("serve"), runtime])  # each once
        lines = "\n".join(f"{name}=={_version(name)}" for name in libraries)
        (staging / "requirements-server.txt").write_text(f"{lines}\n", encoding="utf-8")
        libraries = dict.fromkeys([runtime, "transformers", *(["timm"] if _has_timm_processor(artifact) else [])])
        lines = "\n".join(f"{name}>={_version(name)}" for name in libraries)
        (staging / "requirements.txt").write_text(f"{lines}\n", encoding="utf-8")
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        dockerfile = DOCKERFILE.format(python=python, command=json.dumps([*COMMAND, *words]))
        (staging / "Dockerfile").write_text(dockerfile, encoding="utf-8")
        sync_tree(staging)
        for path in sorted(staging.iterdir(), reverse=True):  # the Dockerfile last
            path.replace(folder / path.name)
        sync(folder)


def _has_timm_processor(artifact: Artifact) -> bool:
    """Return whether the handler needs timm for the preprocessing of a graph."""
    return artifact.is_graph and PRETRAINED_CFG in read_object(artifact.beside(PREPROCESSOR_FILE))


def _model_files(artifact: Artifact) -> list[Path]:
    """Return the files of an artifact that a server needs."""
    if artifact.folder is None or not (artifact.is_checkpoint or artifact.file.suffix in RUNTIMES):
        raise ModelError(
            "ARTIFACT: --docker requires a local checkpoint, ONNX file or OpenVINO file, got"
            f" {artifact.file or artifact.source}."
        )
    from hfvit.models.image_text import HFViTFusionConfig  # imports torch

    if isinstance(read_head(artifact).config, HFViTFusionConfig):
        raise ModelError(f"ARTIFACT: image and text models cannot be served, got {artifact.source}.")
    if artifact.is_graph:
        external = [artifact.file.with_name(artifact.file.name + suffix) for suffix in (".data", "_data")]
        weights = [artifact.file, *external, *([artifact.file.with_suffix(".bin")] if artifact.is_openvino else [])]
    else:
        weights = [file for pattern in WEIGHT_FILES for file in sorted(artifact.folder.glob(pattern))]
    # timm's checkpoints have their preprocessing in config.json.
    configs = [artifact.beside(name) for name in (CONFIG_FILE, PREPROCESSOR_FILE)]
    if not weights or configs[0] is None or (configs[1] is None and artifact.is_graph):
        raise ModelError(
            f"ARTIFACT: {artifact.source} must have weights, {CONFIG_FILE} and {PREPROCESSOR_FILE} with --docker."
        )
    run = artifact.beside(RUN_FILE)  # has the temperature of --calibrated
    found = [file for file in (*weights, *configs, run) if file is not None and file.is_file()]
    if links := [file for file in found if file.is_symlink()]:
        raise ModelError(f"ARTIFACT: {links[0]} is a link. Copy the file that it names.")
    return found


def _copy_package(target: Path) -> None:
    """Copy hfvit and its metadata; `PYTHONPATH` then replaces an installation."""
    shutil.copytree(PACKAGE, target / "hfvit", ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    metadata = target / f"hfvit-{version('hfvit')}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: hfvit\nVersion: {version('hfvit')}\n", encoding="utf-8")


def _requirements(extra: str = "") -> list[str]:
    """Return the libraries of the base installation, or those of an extra.

    Each has its own extras, such as `uvicorn[standard]`.
    """
    names = []
    for line in distribution("hfvit").requires or []:
        library = Requirement(line)
        is_of_base = library.marker is None or library.marker.evaluate({"extra": ""})
        is_wanted = library.marker is None or library.marker.evaluate({"extra": extra})
        if is_wanted and is_of_base == (not extra):
            extras = f"[{','.join(sorted(library.extras))}]" if library.extras else ""
            names.append(f"{library.name}{extras}")
    return names


def _version(name: str) -> str:
    installed = version(name.partition("[")[0])
    return installed.partition("+")[0]  # without the build, such as cpu or cu130
