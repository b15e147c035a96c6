"""`hfvit serve --docker`: handler, Dockerfile, and the folder that they are in."""

import base64
import json
import re
import runpy
import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from helpers.images import LABELS, colored_image
from helpers.models import build_model
from helpers.onnx_graphs import write_configs, write_graph
from helpers.recipes import ARCHITECTURE, MICRO
from packaging.requirements import Requirement

import hfvit
from hfvit.artifacts.artifact import Artifact, find_artifact
from hfvit.cli import build_parser
from hfvit.errors import ModelError
from hfvit.serve.container import write_container

KINDS = ["onnx", "timm", *(["openvino"] if find_spec("openvino") else [])]
INSTRUCTIONS = {"FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "EXPOSE", "HEALTHCHECK", "CMD"}


@pytest.fixture(scope="module")
def containers(tmp_path_factory):
    """Folders with a graph of several labels, its OpenVINO file, and a timm checkpoint."""
    root = tmp_path_factory.mktemp("containers")
    write_graph(write_configs(root / "onnx") / "model.onnx")
    config = json.loads((root / "onnx" / "config.json").read_text())
    config |= {"problem_type": "multi_label_classification", "thresholds": [0.0, 0.0, 1.0]}
    (root / "onnx" / "config.json").write_text(json.dumps(config))
    build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO).save_pretrained(root / "timm")
    if find_spec("openvino"):
        import openvino

        shutil.copytree(root / "onnx", root / "openvino", ignore=shutil.ignore_patterns("*.onnx"))
        graph = openvino.convert_model(root / "onnx" / "model.onnx")
        openvino.save_model(graph, root / "openvino" / "openvino_model.xml", compress_to_fp16=False)
    for kind in KINDS:
        write_container(find_artifact(root / kind), root / f"{kind}_container")
    return root


def file_of(image) -> bytes:
    import io

    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_handler_returns_the_classes_of_the_classifier(containers, kind):
    handler = runpy.run_path(str(containers / f"{kind}_container" / "handler.py"))["EndpointHandler"]
    handler = handler(str(containers / f"{kind}_container"))
    images = [colored_image(label, np.random.default_rng(label), size=20) for label in range(3)]
    classifier = hfvit.load_classifier(containers / kind, device="cpu")
    for top_k in (None, 2):
        wanted = [
            [{"label": label, "score": pytest.approx(score, abs=1e-5)} for label, score in each.items()]
            for each in classifier.predict(images, top_k=top_k)
        ]
        parameters = {"parameters": {"top_k": top_k}} if top_k else {}
        inputs = [images[0], file_of(images[1]), base64.b64encode(file_of(images[2])).decode()]
        assert handler({"inputs": inputs, **parameters}) == wanted
        assert handler({"inputs": images[0], **parameters}) == wanted[0]


def test_dockerfile_starts_the_server_with_the_files_of_the_folder(containers):
    folder = containers / "onnx_container"
    lines = (folder / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    assert {line.split()[0] for line in lines} == INSTRUCTIONS
    assert lines[0].startswith("FROM ")
    for line in lines:
        if line.startswith("COPY"):
            assert (folder / line.split()[1]).exists()
        if re.match(r"(HEALTHCHECK.* )?CMD ", line):
            assert json.loads(line.partition("CMD ")[2])
    command = json.loads(lines[-1].removeprefix("CMD "))
    assert command[:3] == ["python", "-c", "from hfvit.cli import main; main()"]
    assert build_parser().parse_args(command[3:]).host == "0.0.0.0"


def test_requirements_are_the_installed_versions(containers):
    for name, operator in (("requirements-server.txt", "=="), ("requirements.txt", ">=")):
        for line in (containers / "onnx_container" / name).read_text().splitlines():
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == operator
            assert specifier.version == version(requirement.name).partition("+")[0]


def test_folder_has_no_other_files_of_the_artifact(containers):
    for kind, weights in (("onnx", "model.onnx"), ("timm", "model.safetensors")):
        folder = containers / f"{kind}_container"
        assert {path.name for path in folder.iterdir()} == {
            "Dockerfile", "handler.py", "model", "packages", "requirements.txt", "requirements-server.txt",
        }  # fmt: skip
        assert {path.name for path in (folder / "model").iterdir()} == {
            weights, "config.json", *(["preprocessor_config.json"] * (kind == "onnx")),
        }  # fmt: skip
    assert not list(containers.glob(".serve-*"))


def test_unusable_artifact_or_folder_raises_model_error(containers, tmp_path):
    with pytest.raises(ModelError, match=r"^--docker:"):
        write_container(find_artifact(containers / "onnx"), containers / "onnx_container")
    for artifact in (Artifact("user/name"), Artifact(str(tmp_path), tmp_path / "model.engine")):
        with pytest.raises(ModelError, match=r"^ARTIFACT:"):
            write_container(artifact, tmp_path / "out")
    assert not Path(tmp_path / "out").exists()
