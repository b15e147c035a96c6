"""`hfvit serve --docker`: handler, Dockerfile, and the folder that they are in."""

import base64
import io
import json
import re
import runpy
import shutil
import struct
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from helpers.images import LABELS, colored_image
from helpers.messages import option_of
from helpers.models import build_model
from helpers.onnx_graphs import write_configs, write_graph
from helpers.recipes import ARCHITECTURE, MICRO
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image, PngImagePlugin

import hfvit
from hfvit.artifacts.artifact import Artifact, find_artifact
from hfvit.cli import build_parser, main
from hfvit.data.open_image import UPLOAD_LIMITS
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


def file_of(image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
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


@pytest.mark.parametrize("top_k", [0, -1, 1.5, "2", True])
def test_handler_refuses_a_top_k_that_is_no_positive_integer(containers, top_k):
    handler = runpy.run_path(str(containers / "onnx_container" / "handler.py"))["EndpointHandler"]
    with pytest.raises(ValueError, match=r"^top_k:"):
        handler(str(containers / "onnx_container"))(
            {"inputs": Image.new("RGB", (8, 8)), "parameters": {"top_k": top_k}}
        )


def write_artifact(folder: Path, kind: str) -> Path:
    """Write an ONNX file whose server has to do more than to run the graph on pixel values."""
    write_configs(folder, labels=["crane", "bird", "crane"] if kind == "two classes of one name" else LABELS)
    write_graph(
        folder / "model.onnx",
        np.diag([2.0, 4.0, 6.0]),  # so that the level of a gray image matters
        batch=4 if kind == "fixed batch" else "batch_size",
        pixels=kind == "graph with preprocessing",
    )
    if kind == "crop of timm":
        steps = json.loads((folder / "preprocessor_config.json").read_text())
        timm = {"input_size": [3, 16, 16], "crop_pct": 0.94, "crop_mode": "center", "interpolation": "bilinear"}
        steps["pretrained_cfg"] = {**timm, "mean": [0.5] * 3, "std": [0.25] * 3}
        (folder / "preprocessor_config.json").write_text(json.dumps(steps))
    return folder


@pytest.mark.parametrize(
    "kind", ["plain", "fixed batch", "graph with preprocessing", "crop of timm", "two classes of one name"]
)
def test_handler_and_server_agree_on_images_of_any_mode(tmp_path, kind):
    folder = write_artifact(tmp_path / "export", kind)
    write_container(find_artifact(folder), tmp_path / "container")
    handler = runpy.run_path(str(tmp_path / "container" / "handler.py"))["EndpointHandler"](tmp_path / "container")
    classifier = hfvit.load_classifier(tmp_path / "container" / "model", device="cpu")
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)),
        Image.fromarray(rng.integers(0, 256, (33, 20, 3), dtype=np.uint8)),
        Image.fromarray(rng.integers(0, 40_000, (16, 20), dtype=np.uint16)),
        Image.fromarray(rng.integers(0, 256, (20, 16, 4), dtype=np.uint8)),
    ]
    wanted = [
        [{"label": label, "score": pytest.approx(score, abs=1e-6)} for label, score in each.items()]
        for each in classifier.predict(images)
    ]
    assert handler({"inputs": [file_of(image) for image in images]}) == wanted


def test_handler_inverts_deep_tiff_files_whose_zero_is_white(tmp_path):
    folder = write_artifact(tmp_path / "export", "plain")
    write_container(find_artifact(folder), tmp_path / "container")
    handler = runpy.run_path(str(tmp_path / "container" / "handler.py"))["EndpointHandler"](tmp_path / "container")
    levels = np.random.default_rng(0).integers(0, 40_000, (16, 20), dtype=np.uint16)
    for values in (levels, levels.astype(np.float32)):
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, format="TIFF")
        black_is_zero, white_is_zero = (struct.pack("<HHIH", 262, 3, 1, value) for value in (1, 0))
        content = buffer.getvalue().replace(black_is_zero, white_is_zero)
        [wanted] = hfvit.load_classifier(folder, device="cpu").predict([Image.open(io.BytesIO(content))])
        assert {each["label"]: each["score"] for each in handler({"inputs": content})} == pytest.approx(wanted)


def test_handler_refuses_images_above_the_limits_of_the_server(containers):
    handler = runpy.run_path(str(containers / "onnx_container" / "handler.py"))["EndpointHandler"]
    handler = handler(str(containers / "onnx_container"))
    values = b"".join(struct.pack(">HHLL", 1000 + number, 7, 20_000, 8) for number in range(200))
    overlapping = b"MM\0*" + struct.pack(">LH", 8, 200) + values + bytes(20_000)  # all the same bytes
    profile = PngImagePlugin.PngInfo()
    profile.add_text("Raw profile type exif", f"\nexif\n{200_000:8}\n{bytes(200_000).hex()}\n", zip=True)
    scans = file_of(Image.new("RGB", (8, 8)), "JPEG").replace(b"\xff\xd9", b"\xff\xda" * 65 + b"\xff\xd9")
    for image in (
        file_of(Image.new("1", (51, 1))),
        file_of(Image.new("1", (6000, 6000))),
        Image.new("L", (1, 51)),
        file_of(Image.new("RGB", (8, 8))) + bytes(UPLOAD_LIMITS.max_bytes),
        scans,
        file_of(Image.new("RGB", (8, 8)), "JPEG", exif=b"Exif\0\0" + overlapping),
        file_of(Image.new("RGB", (8, 8)), pnginfo=profile),
    ):
        with pytest.raises(ValueError, match=r"\d"):
            handler({"inputs": image})
    assert handler({"inputs": file_of(Image.new("RGB", (50, 1)))})


def test_requirements_of_the_handler_have_timm_for_its_preprocessing(tmp_path):
    for kind, libraries in (
        ("plain", {"onnxruntime", "transformers"}),
        ("crop of timm", {"onnxruntime", "transformers", "timm"}),
    ):
        write_container(find_artifact(write_artifact(tmp_path / kind, kind)), tmp_path / f"{kind} container")
        lines = (tmp_path / f"{kind} container" / "requirements.txt").read_text().splitlines()
        assert {Requirement(line).name for line in lines} == libraries


def serve(capsys, *words) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(["serve", *(str(word) for word in words)])
    return stop.value.code, capsys.readouterr().err


def parsed_command(folder: Path):
    """Return the options of the command that starts the container."""
    return build_parser().parse_args(json.loads((folder / "Dockerfile").read_text().rpartition("CMD ")[2])[3:])


def test_options_of_the_server_are_in_the_command_of_the_container(containers, tmp_path, capsys):
    given = {
        "top_k": 3, "batch_size": 4, "threads": 2, "objective": "throughput", "tta": "flip", "max_delay_ms": 0.0,
        "queue_size": 64, "timeout": 5.5, "max_image_mib": 3, "max_pixels": 1000, "max_images": 7,
    }  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    assert serve(capsys, containers / "onnx", "--docker", tmp_path / "out", *words) == (0, "")
    options = vars(parsed_command(tmp_path / "out"))
    assert {name: options[name] for name in given} == given


def test_calibrated_container_has_the_temperature(containers, tmp_path, capsys):
    folder = shutil.copytree(containers / "onnx", tmp_path / "onnx")
    words = [folder, "--docker", tmp_path / "out", "--calibrated"]
    code, error = serve(capsys, *words)
    assert (code, option_of(error)) == (2, "calibrated")
    assert not (tmp_path / "out").exists()
    (folder / "run.json").write_text(json.dumps({"temperature": {"value": 2.0}, "recipe": {}}))
    assert serve(capsys, *words) == (0, "")
    assert parsed_command(tmp_path / "out").calibrated
    assert hfvit.load_classifier(tmp_path / "out" / "model", calibrated=True).temperature == 2.0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("host", "0.0.0.0"), ("port", 9000), ("device", "cpu"), ("providers", "CPUExecutionProvider"), ("bf16", None),
        ("timeout", 0), ("max_images", 129),
    ],
)  # fmt: skip
def test_option_that_a_container_does_not_have_is_refused(containers, tmp_path, capsys, option, value):
    words = [f"--{option}", *([] if value is None else [value])]
    code, error = serve(capsys, containers / "onnx", "--docker", tmp_path / "out", *words)
    assert (code, option_of(error)) == (2, option)
    assert not (tmp_path / "out").exists()


def test_option_without_effect_on_the_artifact_of_a_container_is_refused(containers, tmp_path, capsys):
    code, error = serve(capsys, containers / "timm", "--docker", tmp_path / "out", "--objective", "throughput")
    assert (code, option_of(error)) == (2, "objective")
    assert not (tmp_path / "out").exists()


def test_container_is_written_to_the_current_folder_and_to_the_folder_of_a_link(containers, tmp_path, monkeypatch):
    for name in ("current", "target"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    monkeypatch.chdir(tmp_path / "current")
    for output in (".", tmp_path / "link"):
        write_container(find_artifact(containers / "onnx"), output)
    wanted = {path.name for path in (containers / "onnx_container").iterdir()}
    for folder in (Path.cwd(), tmp_path / "target"):
        assert {path.name for path in folder.iterdir()} == wanted
    assert (tmp_path / "link").is_symlink()


def test_image_text_model_is_refused(tmp_path):
    folder = write_artifact(tmp_path / "export", "plain")
    config = {"model_type": "hfvit_fusion", "architecture": ARCHITECTURE, "label_names": LABELS, "num_classes": 3}
    (folder / "config.json").write_text(json.dumps({**config, "text_encoder_config": {"model_type": "bert"}}))
    with pytest.raises(ModelError, match=r"^ARTIFACT:"):
        write_container(find_artifact(folder), tmp_path / "out")


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


def installed_with(lines: list[str]) -> set[str]:
    """Return the names of the libraries that pip installs for requirements."""
    done: set[tuple[str, frozenset[str]]] = set()
    left = [Requirement(line) for line in lines]
    while left:
        library = left.pop()
        key = (canonicalize_name(library.name), frozenset(library.extras))
        if key in done:
            continue
        done.add(key)
        try:
            needed = [Requirement(line) for line in distribution(library.name).requires or []]
        except PackageNotFoundError:
            needed = []
        for each in needed:
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ("", *library.extras)):
                left.append(each)
    return {name for name, _ in done}


@pytest.mark.parametrize("kind", KINDS)
def test_server_of_the_container_has_all_libraries_of_the_extra(containers, kind):
    lines = (containers / f"{kind}_container" / "requirements-server.txt").read_text().splitlines()
    assert installed_with(["hfvit[serve]"]) - {"hfvit"} <= installed_with(lines)


def test_folder_has_no_other_files_of_the_artifact(containers):
    for kind, weights in (("onnx", "model.onnx"), ("timm", "model.safetensors")):
        folder = containers / f"{kind}_container"
        assert {path.name for path in folder.iterdir()} == {
            "Dockerfile", "handler.py", "image_metadata.py", "model", "packages", "requirements.txt",
            "requirements-server.txt",
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
