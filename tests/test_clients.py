"""Programs that never heard of hfvit, on a folder that it exported: transformers.js and ORTModel."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURE, LABELS, MICRO
from PIL import Image
from transformers import set_seed

import hfvit
from hfvit.commands import main as export
from hfvit.modeling import build_model

CLIENTS = Path(__file__).parent / "clients"
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint whose answers differ from picture to picture, and its export."""
    folder = tmp_path_factory.mktemp("clients") / "checkpoint"
    set_seed(0)
    model = build_model(LABELS, architecture=ARCHITECTURE, image_size=32, timm_kwargs=MICRO)
    with torch.no_grad():
        model.timm_model.get_classifier().weight.mul_(200.0)
    model.save_pretrained(folder)
    with pytest.raises(SystemExit) as stop:
        export(["--model", str(folder), str(folder / "onnx"), "--quantize", "int8-dynamic"])
    assert stop.value.code == 0
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, Path]:
    """Of the model's size, which no client has to resize, and of another."""
    folder = tmp_path_factory.mktemp("pictures")
    small = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    sizes = {"same": (32, 32), "other": (90, 70)}
    for number, (name, size) in enumerate(sizes.items()):
        Image.fromarray(small[number]).resize(size, Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in sizes}


def expected(path: Path, pictures: dict[str, Path]) -> list[dict[str, float]]:
    return hfvit.load_classifier(path).predict(pictures.values())


def agree(answers: list[dict[str, float]], scores: list[dict[str, float]], tolerances: tuple[float, float]) -> None:
    """The same best class, and every probability within the tolerance of its picture."""
    assert max(max(row.values()) for row in scores) > 0.5, "the model must have an opinion"
    for answer, score, tolerance in zip(answers, scores, tolerances, strict=True):
        assert set(answer) == set(LABELS)
        assert max(answer, key=answer.get) == max(score, key=score.get)
        assert answer == pytest.approx(score, abs=tolerance)


@pytest.fixture(scope="module")
def classify(tmp_path_factory):
    """transformers.js, installed from npm; its image library resizes in other ways than Pillow."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("transformers.js needs node and npm")
    folder = tmp_path_factory.mktemp("transformers_js")
    packages = ["@huggingface/transformers@4"]
    command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder), *packages]
    try:
        installed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("npm did not install transformers.js in 120 s")
    if installed.returncode:
        pytest.skip(f"npm cannot install transformers.js: {installed.stderr.strip().splitlines()[-1]}")
    script = shutil.copy(CLIENTS / "classify.mjs", folder)

    def run(export_folder: Path, dtype: str, pictures: dict[str, Path]) -> list[dict[str, float]]:
        command = ["node", script, export_folder, dtype, *pictures.values()]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return [{row["label"]: row["score"] for row in rows} for rows in json.loads(done.stdout)]

    yield run
    shutil.rmtree(folder)  # half a gigabyte


def test_transformers_js_agrees_with_pytorch(classify, exported, pictures):
    """Its default dtype in Node is fp32: `model.onnx`."""
    agree(classify(exported / "onnx", "default", pictures), expected(exported, pictures), (1e-4, 0.05))


def test_transformers_js_finds_the_quantised_file(classify, exported, pictures):
    """`q8`, the default of browsers, is `model_quantized.onnx`: what it computes, not what PyTorch does."""
    quantised = expected(exported / "onnx" / "model_quantized.onnx", pictures)
    agree(classify(exported / "onnx", "q8", pictures), quantised, (1e-2, 0.05))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ortmodel_agrees_with_pytorch(exported, pictures, tmp_path):
    """optimum-onnx needs transformers 4, so it gets an environment of its own."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    packages = ["optimum-onnx[onnxruntime]==0.1.0", "transformers==4.57.*", "torch", "pillow"]
    installed = subprocess.run(
        [python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True, timeout=800
    )
    if installed.returncode:
        pytest.skip(f"pip cannot install optimum-onnx: {installed.stderr.strip().splitlines()[-1]}")
    command = [python, CLIENTS / "ortmodel.py", exported / "onnx", *pictures.values()]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    agree(json.loads(done.stdout.splitlines()[-1]), expected(exported, pictures), (1e-4, 0.05))
