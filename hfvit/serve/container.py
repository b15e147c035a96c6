"""`hfvit serve --docker`: build context, and files for Inference Endpoints."""

import os
import re
import shutil
import sys
import tempfile
from importlib.metadata import distribution, version
from pathlib import Path

from hfvit.artifacts.artifact import ONNX_SUFFIX, OPENVINO_SUFFIX, Artifact
from hfvit.artifacts.constants import CONFIG_FILE, PREPROCESSOR_FILE, WEIGHT_FILES
from hfvit.errors import ModelError
from hfvit.utils.files import check_writable, expand_user, sync_tree

PACKAGE = Path(__file__).resolve().parents[1]
SERVER_LIBRARIES = ("fastapi", "uvicorn", "python-multipart", "prometheus-client")
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
CMD ["python", "-c", "from hfvit.cli import main; main()", "serve", "/app/model", "--host", "0.0.0.0"]
"""


def write_container(artifact: Artifact, output: str | Path) -> None:
    """Write the files of a container and of an Inference Endpoint.

    `Dockerfile`, `requirements-server.txt` with the versions of this environment and `packages` with hfvit are the
    server; `handler.py` and `requirements.txt` make the folder a repository for Inference Endpoints; both run `model`.

    Args:
        artifact: local checkpoint, ONNX file or OpenVINO file.
        output: new or empty folder.

    Raises:
        ModelError: the artifact is not local, an engine or incomplete, or the folder is not empty.
    """
    files = _model_files(artifact)
    folder = expand_user(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"--docker: must be a new or an empty folder, got {output}.")
    check_writable(folder, "--docker", ModelError)
    with tempfile.TemporaryDirectory(prefix=".serve-", dir=folder.resolve().parent) as name:
        staging = Path(name) / "files"
        (staging / "model").mkdir(parents=True)
        for file in files:
            shutil.copyfile(file, staging / "model" / file.name)
        _copy_package(staging / "packages")
        shutil.copyfile(PACKAGE / "serve" / "handler.py", staging / "handler.py")
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        (staging / "Dockerfile").write_text(DOCKERFILE.format(python=python), encoding="utf-8")
        runtime = RUNTIMES[artifact.file.suffix] if artifact.file else "timm"
        libraries = dict.fromkeys([*_base_requirements(), *SERVER_LIBRARIES, runtime])  # each once
        lines = "\n".join(map(_pinned, libraries))
        (staging / "requirements-server.txt").write_text(f"{lines}\n", encoding="utf-8")
        lines = "\n".join(f"{name}>={_version(name)}" for name in (runtime, "transformers"))
        (staging / "requirements.txt").write_text(f"{lines}\n", encoding="utf-8")
        sync_tree(staging)
        folder.rmdir()
        os.replace(staging, folder)


def _model_files(artifact: Artifact) -> list[Path]:
    """Return the files of an artifact that a server needs."""
    if artifact.folder is None or not (artifact.is_checkpoint or artifact.file.suffix in RUNTIMES):
        kind = "a TensorRT engine" if artifact.is_engine else "not a local folder"
        raise ModelError(
            f"ARTIFACT: --docker requires a local checkpoint or ONNX file, but {artifact.source} is {kind}."
        )
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
    found = [file for file in (*weights, *configs) if file is not None and file.is_file()]
    if links := [file for file in found if file.is_symlink()]:
        raise ModelError(f"ARTIFACT: {links[0]} is a link. Copy the file that it names.")
    return found


def _copy_package(target: Path) -> None:
    """Copy hfvit and its metadata; `PYTHONPATH` then replaces an installation."""
    shutil.copytree(PACKAGE, target / "hfvit", ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    metadata = target / f"hfvit-{version('hfvit')}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: hfvit\nVersion: {version('hfvit')}\n", encoding="utf-8")


def _base_requirements() -> list[str]:
    """Return the names of the libraries of the base installation."""
    lines = distribution("hfvit").requires or []
    return [re.match(r"[\w.-]+", line)[0] for line in lines if "extra ==" not in line]


def _pinned(name: str) -> str:
    return f"{name}=={_version(name)}"


def _version(name: str) -> str:
    return version(name).partition("+")[0]  # without the build, such as cpu or cu130
