"""The Gradio app of `hfvit demo`, with gradio's client and in a browser."""

import io
import json
import shutil
import signal
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.browser import Visit, chromium
from helpers.commands import free_port, running_command
from helpers.images import LABELS, colored_image
from helpers.models import build_model
from helpers.onnx_graphs import write_configs, write_graph
from helpers.recipes import ARCHITECTURE, MICRO
from PIL import Image

import hfvit
from hfvit.cli import main
from hfvit.demo.app import NOTHING_FOUND, ExplanationView, build_app, example_labels, load_gradio

client = pytest.importorskip("gradio_client")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photo(checkpoint):
    colored_image(1, np.random.default_rng(0), size=40).save(checkpoint.parent / "photo.png")
    return checkpoint.parent / "photo.png"


@pytest.fixture(scope="module")
def app(checkpoint, photo):
    """The running command, its first line, and its address."""
    port = free_port()
    words = ["demo", checkpoint, "--port", port, "--threads", 1, "--top_k", 2, "--examples", photo]
    with running_command("hfvit", *words) as (process, output):
        yield process, output, output.readline(), f"http://127.0.0.1:{port}/"


@pytest.mark.integration
def test_app_returns_predictions_of_the_classifier_until_ctrl_c(app, checkpoint, photo, tmp_path):
    process, output, line, address = app
    assert line.startswith(f"{checkpoint}: {address} ")
    asked = client.Client(address, verbose=False)
    answer, seen = asked.predict(client.handle_file(photo), api_name="/classify")
    (wanted,) = hfvit.load_classifier(checkpoint).predict([photo], top_k=2)
    found = {entry["label"]: entry["confidence"] for entry in answer["confidences"]}
    assert found == pytest.approx(wanted, abs=1e-6)
    assert answer["label"] == next(iter(wanted))
    assert seen.endswith(".webp")

    (tmp_path / "broken.png").write_bytes(photo.read_bytes()[:80])
    with pytest.raises(client.exceptions.AppError) as refused:
        asked.predict(client.handle_file(tmp_path / "broken.png"), api_name="/classify")
    assert "show_error" not in str(refused.value)  # part of gradio's message for an unexpected exception

    with chromium() as browser:
        visit = Visit(browser, address)
        visit.page.wait_for_selector("input[type=file]", state="attached")
        visit.page.set_input_files("input[type=file]", str(photo))
        visit.page.wait_for_selector(f"[data-testid=label-output-value]:has-text('{answer['label']}')")
        visit.page.wait_for_selector("img[src*='.webp']")  # explanation
        wraps = "names => names.map(name => getComputedStyle(name).overflowWrap)"
        assert set(visit.page.eval_on_selector_all(".confidence-set .text", wraps)) == {"anywhere"}
        visit.close()
    assert (visit.elsewhere, visit.errors) == ([], [])

    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    assert output.read() == ""


def classify_of(classifier, **options):
    """Return the function behind the app's endpoint `/classify`."""
    app = build_app(load_gradio(), classifier, **options)
    return next(each.fn for each in app.fns.values() if each.api_name == "classify")


def test_explained_image_is_the_models_crop_in_gray_and_orange(checkpoint):
    view = ExplanationView.create(hfvit.load_classifier(checkpoint))
    seen = view.explain(colored_image(1, np.random.default_rng(0), size=40), 1)
    assert seen.size == (448, 448)
    red, green, blue = np.asarray(seen).astype(int).transpose(2, 0, 1)
    assert (red >= green - 1).all()
    assert (green >= blue - 1).all()
    assert (red - blue).max() > 100


def test_explanation_waits_while_another_thread_uses_the_model(checkpoint):
    view = ExplanationView.create(hfvit.load_classifier(checkpoint))
    with ThreadPoolExecutor(1) as pool:
        with view.lock:
            explained = pool.submit(view.explain, colored_image(1, np.random.default_rng(0), size=40), 1)
            with pytest.raises(TimeoutError):
                explained.result(timeout=1)
        assert explained.result().size == (448, 448)


def test_examples_are_named_after_their_class_in_any_unicode_form():
    folder = unicodedata.normalize("NFD", "café")
    assert example_labels([f"/photos/{folder}/a.png", "/photos/b.png"], ["café"]) == ["café", "b"]


def test_app_with_test_time_augmentation_shows_its_probabilities(checkpoint, photo):
    classifier = hfvit.load_classifier(checkpoint, tta="flip")
    best, explained = classify_of(classifier, top_k=3)(photo.read_bytes())
    (wanted,) = classifier.predict([photo])
    (single,) = classifier.with_tta(None).predict([photo])
    assert best == pytest.approx(wanted, abs=1e-6)
    assert best != pytest.approx(single, abs=1e-6)
    assert explained.size == (448, 448)


def test_concurrent_requests_get_their_own_explanations(checkpoint):
    classifier = hfvit.load_classifier(checkpoint, threads=1)
    classify = classify_of(classifier)
    files = []
    for label in range(3):
        file = io.BytesIO()
        colored_image(label, np.random.default_rng(label), size=40).save(file, "PNG")
        files.append(file.getvalue())
    wanted = [classify(file) for file in files]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(classify, files * 12))
    finally:
        sys.setswitchinterval(before)
    for (best, seen), (wanted_best, wanted_seen) in zip(answers, wanted * 12, strict=True):
        assert best == wanted_best
        np.testing.assert_array_equal(seen, wanted_seen)
    assert all(block.attn.fused_attn for block in classifier.backend.model.timm_model.blocks)


@pytest.mark.parametrize(
    "steps",
    [
        {"image_processor_type": "ViTImageProcessor", "image_mean": [0.2, 0.5, 0.7], "image_std": [0.1, 0.2, 0.3]},
        {"image_processor_type": "ViTImageProcessor", "do_normalize": False},
        {"image_processor_type": "ViTImageProcessor", "do_normalize": False, "do_rescale": False},
        {"image_processor_type": "MobileViTImageProcessor", "do_center_crop": False},  # BGR, not normalized
    ],
)
def test_explained_crop_has_the_colors_of_the_image(stock, tmp_path, steps):
    shutil.copytree(stock, tmp_path / "checkpoint")
    config = {"size": {"height": 16, "width": 16}, **steps}
    (tmp_path / "checkpoint" / "preprocessor_config.json").write_text(json.dumps(config))
    classifier = hfvit.load_classifier(tmp_path / "checkpoint")
    image = Image.new("RGB", (30, 30), (250, 20, 120))
    pixels = ExplanationView.create(classifier).pixels(classifier.pixel_values([image])[0])
    np.testing.assert_array_equal(pixels, np.broadcast_to((250, 20, 120), (16, 16, 3)))


def test_explanation_view_of_an_onnx_file_is_none(tmp_path):
    write_graph(tmp_path / "model.onnx")
    assert ExplanationView.create(hfvit.load_classifier(write_configs(tmp_path))) is None


def test_app_of_several_labels_names_those_that_reach_their_thresholds(tmp_path, photo):
    write_graph(tmp_path / "model.onnx")
    config = json.loads((write_configs(tmp_path) / "config.json").read_text())
    for thresholds, found in (([0.0, 0.0, 1.0], "green, red"), ([1.0, 1.0, 1.0], NOTHING_FOUND)):
        config |= {"problem_type": "multi_label_classification", "thresholds": thresholds}
        (tmp_path / "config.json").write_text(json.dumps(config))
        best, told = classify_of(hfvit.load_classifier(tmp_path), top_k=2)(photo.read_bytes())
        assert len(best) == 2
        assert sorted(told.split(", ")) == sorted(found.split(", "))


def test_demo_without_gradio_names_the_install_command(tmp_path, monkeypatch, capsys):
    write_graph(tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as stop:
        main(["demo", str(write_configs(tmp_path))])
    assert stop.value.code == 2
    assert 'pip install "hfvit[demo]"' in capsys.readouterr().err
