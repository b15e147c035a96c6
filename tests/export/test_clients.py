"""Exported folders in transformers.js, ORTModel and a browser, without hfvit."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.browser import Visit, chromium, served
from helpers.images import LABELS
from helpers.loopback_hub import LoopbackHub
from helpers.models import build_model
from helpers.recipes import ARCHITECTURE, MICRO
from helpers.stock_models import FAMILIES, SIZE, stock_model, stock_processor
from helpers.timm_models import FAMILIES as TIMM_FAMILIES
from helpers.timm_models import save_resized
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

import hfvit
from hfvit.cli import main as hfvit_command
from hfvit.cli.export_onnx import main as export
from hfvit.demo.web_runtime import TESTED, TESTED_RUNTIME
from hfvit.export.image_parity import photographs
from hfvit.hub.push import Destination, push_to

CLIENTS = Path(__file__).parent / "clients"
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Save and export a checkpoint whose predictions differ between images."""
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
def images(tmp_path_factory) -> dict[str, Path]:
    """Save an image of the model's size, and one of another size."""
    folder = tmp_path_factory.mktemp("images")
    small = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    sizes = {"same": (32, 32), "other": (90, 70)}
    for number, (name, size) in enumerate(sizes.items()):
        Image.fromarray(small[number]).resize(size, Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in sizes}


def expected(path: Path, images: dict[str, Path]) -> list[dict[str, float]]:
    return hfvit.load_classifier(path).predict(images.values())


def agree(answers: list[dict[str, float]], scores: list[dict[str, float]], tolerances: tuple[float, float]) -> None:
    """Assert the same best class and close probabilities for each image."""
    assert max(max(row.values()) for row in scores) > 0.5, "the model must be confident"
    for answer, score, tolerance in zip(answers, scores, tolerances, strict=True):
        assert set(answer) == set(LABELS)
        assert max(answer, key=answer.get) == max(score, key=score.get)
        assert answer == pytest.approx(score, abs=tolerance)


@pytest.fixture(scope="module")
def npm_folder(tmp_path_factory):
    """Install transformers.js from npm, and copy the scripts of clients/."""
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
    for script in CLIENTS.glob("*.mjs"):
        shutil.copy(script, folder)
    shutil.copy(Path(hfvit.__file__).parent / "demo" / "web" / "pixels.js", folder / "pixels.mjs")
    yield folder
    shutil.rmtree(folder)  # half a gigabyte


@pytest.fixture(scope="module")
def classify(npm_folder):
    """Run transformers.js in Node, whose image library resizes differently from Pillow."""

    def run(*words, images: dict[str, Path], script: str = "classify.mjs") -> list[dict[str, float]]:
        command = ["node", npm_folder / script, *words, *images.values()]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return [{row["label"]: row["score"] for row in rows} for rows in json.loads(done.stdout)]

    return run


def test_transformers_js_agrees_with_pytorch(classify, exported, images):
    """Node's default dtype is fp32: `model.onnx`."""
    answers = classify(exported / "onnx", "default", images=images)
    agree(answers, expected(exported, images), (1e-4, 0.05))


@pytest.mark.parametrize("labels", [LABELS, ["only"]])
def test_transformers_js_scores_of_several_labels_or_one_class_equal_pytorch(classify, images, labels, tmp_path):
    """Its pipeline applies a softmax to any logits."""
    set_seed(1)
    model = build_model(labels, architecture=ARCHITECTURE, image_size=32, timm_kwargs=MICRO)
    with torch.no_grad():
        model.timm_model.get_classifier().weight.mul_(50.0)
    model.config.set_preprocessing(crop_pct=1.0)  # no resize
    if len(labels) > 1:
        model.config.set_problem_type("multi_label_classification")
        model.config.thresholds = [0.0] * len(labels)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as stop:
        export(["--model", str(tmp_path / "model"), str(tmp_path / "model" / "onnx")])
    assert stop.value.code == 0
    exact = {"same": images["same"]}
    (answer,) = classify(tmp_path / "model" / "onnx", images=exact, script="classify_labels.mjs")
    (score,) = expected(tmp_path / "model", exact)
    assert answer == pytest.approx(score, abs=1e-4)


def test_transformers_js_with_q8_loads_the_quantized_file(classify, exported, images):
    """`q8`, the default in browsers, is `model_quantized.onnx`."""
    quantized = expected(exported / "onnx" / "model_quantized.onnx", images)
    agree(classify(exported / "onnx", "q8", images=images), quantized, (1e-2, 0.05))


def test_transformers_js_with_pillows_resize_equals_the_checkpoint(classify, exported, images):
    """Use the documentation's lines, with the static page's arithmetic."""
    answers = classify(exported / "onnx", "fp32", images=images, script="classify_pillow.mjs")
    agree(answers, expected(exported, images), (1e-4, 1e-4))


def test_transformers_js_loads_a_pushed_export(classify, exported, images, monkeypatch, tmp_path):
    """Pass the configurations of `onnx/` as the model card does; the root's is timm's."""
    with LoopbackHub() as hub:
        hub.take_over(monkeypatch, tmp_path / "cache")
        push_to(exported, Destination("user/js"), include=["onnx"])
        answers = classify(hub.url, "user/js", "fp32", images=images, script="classify_hub.mjs")
    agree(answers, expected(exported, images), (1e-4, 0.05))


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


def write_page(*words) -> None:
    with pytest.raises(SystemExit) as stop:
        hfvit_command(["demo", *map(str, words)])
    assert stop.value.code == 0


def test_static_page_agrees_with_pytorch(browser, exported, npm_folder, images, tmp_path):
    """Drop and choose images of any size, and a file that is not an image, offline."""
    write_page(exported / "onnx", "--static", tmp_path / "page", "--vendor", npm_folder, "--examples", images["other"])
    quantized = expected(exported / "onnx" / "model_quantized.onnx", images)
    (tmp_path / "notes.png").write_text("not an image")
    with served(tmp_path / "page") as address:
        visit = Visit(browser, address)
        visit.wait("ready", "failed")
        assert visit.page.get_attribute("body", "data-state") == "ready"
        visit.drop(images["same"])
        answers = [visit.bars()]
        assert visit.choose(tmp_path / "notes.png")
        assert visit.page.get_attribute("body", "data-state") == "refused"
        assert visit.bars() == {}
        said = visit.choose(images["other"])
        answers.append(visit.bars())
        visit.press_example()
        assert visit.bars() == pytest.approx(answers[1], abs=0.1)  # a copy in WebP
        pixels = "document.querySelector('#seen').toDataURL()"
        before = visit.page.evaluate(pixels)
        visit.page.click("#explain")
        visit.wait("explained")
        assert visit.page.evaluate(pixels) != before
        visit.close()
    # Unlike Node's, the page's resize equals Pillow's.
    agree(answers, quantized, (1e-2, 1e-2))
    assert [max(row, key=row.get) for row in answers] == [max(row, key=row.get) for row in expected(exported, images)]
    assert said.startswith(max(answers[1], key=answers[1].get))
    assert (visit.elsewhere, visit.errors) == ([], [])


def test_static_page_loads_float32_model_from_cdn(browser, exported, npm_folder, images, tmp_path):
    """Serve npm's files as the CDN's, with the headers that allow several threads."""
    write_page(exported / "onnx" / "model.onnx", "--static", tmp_path / "page")
    isolating = (("Cross-Origin-Opener-Policy", "same-origin"), ("Cross-Origin-Embedder-Policy", "require-corp"))
    with served(tmp_path / "page", isolating) as address:
        visit = Visit(
            browser, address, lambda url: npm_folder / "node_modules" / re.sub(r"^.*/npm/|@\d[^/]*", "", url)
        )
        visit.choose(images["same"])  # before the model has loaded
        answers = [visit.bars()]
        visit.choose(images["other"])
        answers.append(visit.bars())
        isolated = visit.page.evaluate("crossOriginIsolated")
        visit.close()
    agree(answers, expected(exported, images), (1e-4, 1e-2))
    runtime = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{TESTED_RUNTIME}/dist/ort-wasm-simd-threaded"
    library = f"https://cdn.jsdelivr.net/npm/@huggingface/transformers@{TESTED}/dist/transformers.min.js"
    assert set(visit.elsewhere) == {library, f"{runtime}.mjs", f"{runtime}.wasm"}
    assert (isolated, visit.errors) == (True, [])


def test_static_page_resize_equals_pillow(browser, exported, tmp_path):
    """Compare every filter, for smaller and larger sizes, bit for bit."""
    write_page(exported / "onnx", "--static", tmp_path / "page")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 61, 3), dtype=np.uint8))
    with served(tmp_path / "page") as address:
        visit = Visit(browser, address)
        for filter, (height, width) in itertools.product(range(6), ((16, 24), (80, 70), (37, 20), (50, 61))):
            steps = {"resize": [height, width], "crop": None, "resample": filter}
            got = visit.page.evaluate(
                """async ([data, width, height, steps]) => {
                    const { resizeAndCrop } = await import("./pixels.js");
                    return Array.from(resizeAndCrop({ data, width, height }, steps).data);
                }""",
                [np.asarray(image.convert("RGBA")).ravel().tolist(), 61, 37, steps],
            )
            wanted = np.asarray(image.resize((width, height), Image.Resampling(filter)))
            np.testing.assert_array_equal(np.array(got).reshape(height, width, 4)[..., :3], wanted)
        visit.close()


def test_static_page_crop_starts_where_the_processors_does(browser, exported, tmp_path):
    """timm rounds an odd margin to the even pixel, transformers down."""
    write_page(exported / "onnx", "--static", tmp_path / "page")
    pixels = np.random.default_rng(0).integers(0, 256, (27, 24, 3), dtype=np.uint8)
    with served(tmp_path / "page") as address:
        visit = Visit(browser, address)
        for down, start in ((False, 2), (True, 1)):
            steps = {"resize": [27, 24], "crop": [24, 24], "resample": 3, "rounds_crop_down": down}
            got = visit.page.evaluate(
                """async ([data, steps]) => {
                    const { resizeAndCrop } = await import("./pixels.js");
                    const image = { data: new Uint8ClampedArray(data), width: 24, height: 27 };
                    return Array.from(resizeAndCrop(image, steps).data);
                }""",
                [np.asarray(Image.fromarray(pixels).convert("RGBA")).ravel().tolist(), steps],
            )
            np.testing.assert_array_equal(
                np.array(got).reshape(24, 24, 4)[..., :3], pixels[start : start + 24], err_msg=str(down)
            )
        visit.close()


def test_static_page_opened_as_file_asks_for_a_server(browser, exported, tmp_path):
    write_page(exported / "onnx", "--static", tmp_path / "page")
    visit = Visit(browser, (tmp_path / "page" / "index.html").as_uri())
    visit.page.wait_for_timeout(1600)
    assert "http.server" in visit.page.inner_text("#needs-server:visible")
    visit.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_transformers_js_opens_every_family(npm_folder, tmp_path):
    """Export each family of transformers and timm; the client finds the class of PyTorch."""
    image = tmp_path / "image.png"
    flower = Image.fromarray(load_sample_image("flower.jpg"))
    flower.crop((100, 50, 420, 370)).resize((SIZE, SIZE)).save(image)
    wanted = {}
    for family in (*FAMILIES, *(f"timm_{name}" for name in TIMM_FAMILIES)):
        folder = tmp_path / family
        if family in FAMILIES:
            stock_model(family).save_pretrained(folder)
            stock_processor(family).save_pretrained(folder)
        else:
            save_resized(family.removeprefix("timm_"), folder, SIZE)
        with pytest.raises(SystemExit) as stop:
            export(["--model", str(folder), str(folder / "onnx")])
        assert stop.value.code == 0, family
        wanted[str(folder / "onnx")] = hfvit.load_classifier(folder, device="cpu").predict([image])[0]
    command = ["node", npm_folder / "classify_many.mjs", image, *wanted]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    found = {
        Path(folder).parent.name: rows if isinstance(rows, str) else max(rows, key=lambda row: row["score"])["label"]
        for folder, rows in answers.items()
    }
    assert found == {Path(folder).parent.name: max(row, key=row.get) for folder, row in wanted.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", TIMM_FAMILIES)
def test_onnxruntime_and_stock_processor_agree_on_timm_family_at_another_size(family, tmp_path):
    """Compare with stock transformers on photographs of odd sizes, in fp32 and fp16."""
    save_resized(family, tmp_path, SIZE)
    model = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    with torch.inference_mode():
        expected = [model(**processor(image, return_tensors="pt")).logits[0].numpy() for image in photographs()]
    limits = {"fp32": ("model.onnx", 2e-3), "fp16": ("model_fp16.onnx", 2e-2)}
    for dtype, (name, limit) in limits.items():
        with pytest.raises(SystemExit) as stop:
            export(["--model", str(tmp_path), "--dtype", dtype, str(tmp_path / "onnx")])
        assert stop.value.code == 0
        processor = AutoImageProcessor.from_pretrained(tmp_path / "onnx")
        session = onnxruntime.InferenceSession(tmp_path / "onnx" / name)
        inputs = [{"pixel_values": processor(image, return_tensors="np")["pixel_values"]} for image in photographs()]
        found = [session.run(["logits"], feed)[0][0] for feed in inputs]
        np.testing.assert_allclose(found, expected, atol=limit * np.ptp(expected), rtol=0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ortmodel_agrees_with_pytorch(exported, images, tmp_path):
    """Use a separate environment, as optimum-onnx needs transformers 4."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    packages = ["optimum-onnx[onnxruntime]==0.1.0", "transformers==4.57.*", "torch", "pillow"]
    installed = subprocess.run(
        [python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True, timeout=800
    )
    if installed.returncode:
        pytest.skip(f"pip cannot install optimum-onnx: {installed.stderr.strip().splitlines()[-1]}")
    command = [python, CLIENTS / "ortmodel.py", exported / "onnx", *images.values()]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    agree(json.loads(done.stdout.splitlines()[-1]), expected(exported, images), (1e-4, 0.05))
