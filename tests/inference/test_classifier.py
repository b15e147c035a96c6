"""`load_classifier`: checkpoints, ONNX files, inputs and errors."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import onnx
import pytest
import torch
from helpers.images import LABELS, colored_image
from helpers.messages import assert_names
from helpers.models import build_model
from helpers.onnx_graphs import BRIGHTEST, expected_logits, write_configs, write_graph
from helpers.recipes import ARCHITECTURE, MICRO
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
    pipeline,
)

import hfvit
from hfvit.errors import DataError, HFViTError, ModelError, one_line
from hfvit.inference.backends import OnnxBackend

STOCK = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(4)
    return [colored_image(index % 3, rng) for index in range(7)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Save an untrained micro ViT."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO).save_pretrained(folder)
    return folder


@pytest.fixture
def export(tmp_path):
    write_graph(tmp_path / "export" / "model.onnx")
    return write_configs(tmp_path / "export")


def logits_of(path, images, **kwargs) -> np.ndarray:
    return hfvit.load_classifier(path, device="cpu", **kwargs).logits(images, batch_size=3)


def test_backend_computes_in_its_tf32_mode(checkpoint):
    backend = hfvit.load_classifier(checkpoint, device="cpu").backend
    seen = []
    backend.model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    for backend.tf32 in (True, False):
        backend(np.zeros((1, 3, 16, 16), np.float32))
    assert seen == [True, False]


def test_classifier_of_onnx_file_equals_numpy(export, images):
    expected = np.stack([expected_logits(image) for image in images])
    for path in (export, str(export), export / "model.onnx"):
        np.testing.assert_allclose(logits_of(path, images, threads=1), expected, atol=1e-5)
    classifier = hfvit.load_classifier(export / "model.onnx")
    assert classifier.labels == LABELS
    answers = classifier.predict((image for image in images), batch_size=2, top_k=2)
    for answer, row in zip(answers, expected, strict=True):
        probabilities = np.exp(row) / np.exp(row).sum()
        best = np.argsort(-probabilities)[:2]
        assert list(answer) == [LABELS[index] for index in best]
        assert list(answer.values()) == pytest.approx(probabilities[best].tolist(), abs=1e-6)
    assert classifier.logits([]).shape == (0, 3)


def test_predict_accepts_arrays_files_and_urls(export, images, tmp_path):
    rgba = tmp_path / "an image.png"
    images[1].convert("RGBA").save(rgba)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/an%20image.png"
    try:
        given = [images[1], np.asarray(images[1]), rgba, str(rgba), url]
        logits = logits_of(export, given)
        with pytest.raises(DataError, match=r"nothing\.png: .*404"):
            logits_of(export, [url.replace("an%20image", "nothing")])
    finally:
        server.shutdown()
        server.server_close()
    assert (logits == logits[0]).all()
    with pytest.raises(DataError, match=r"\babsent\.png\b"):
        logits_of(export, [tmp_path / "absent.png"])


def test_classifier_with_preprocessing_graph_accepts_several_sizes(tmp_path):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in ((9, 5), (4, 4), (9, 5))]
    write_graph(tmp_path / "model_with_preprocessing.onnx", pixels=True)
    write_configs(tmp_path, processor=False)
    expected = np.stack([expected_logits(image) for image in images])
    np.testing.assert_allclose(logits_of(tmp_path, images), expected, atol=1e-4)


def test_calls_of_a_graph_with_preprocessing_have_limited_pixels(tmp_path, monkeypatch):
    write_graph(tmp_path / "model.onnx", pixels=True)
    classifier = hfvit.load_classifier(write_configs(tmp_path, processor=False), device="cpu")
    images = [colored_image(seed % 3, np.random.default_rng(seed), size=16 + 16 * (seed % 2)) for seed in range(10)]
    expected = np.stack([expected_logits(image) for image in images])
    shapes = []
    compute = OnnxBackend.__call__

    def recorded(backend, batch, texts=None):
        shapes.append(batch.shape[:3])
        return compute(backend, batch, texts)

    monkeypatch.setattr(OnnxBackend, "__call__", recorded)
    monkeypatch.setattr("hfvit.inference.classifier.CALL_PIXELS", 800)
    np.testing.assert_allclose(classifier.logits(images), expected, atol=1e-4)
    assert shapes == [(3, 16, 16), (2, 16, 16), *[(1, 32, 32)] * 5]  # one that is above the limit is run alone


def test_classifier_of_fixed_batch_graph_accepts_any_number_of_images(tmp_path, images):
    write_graph(tmp_path / "model.onnx", batch=4)
    expected = np.stack([expected_logits(image) for image in images])
    classifier = hfvit.load_classifier(write_configs(tmp_path))
    for batch_size in (1, 3, 4, 7):
        np.testing.assert_allclose(classifier.logits(images, batch_size), expected, atol=1e-5)


@pytest.mark.parametrize("batch", ["batch_size", 2])
def test_objective_of_throughput_returns_the_logits_of_each_image(tmp_path, images, batch, caplog):
    write_graph(tmp_path / "model.onnx", batch=batch)
    expected = np.stack([expected_logits(image) for image in images])
    with caplog.at_level("INFO", "hfvit"):
        classifier = hfvit.load_classifier(write_configs(tmp_path), threads=3, objective="throughput", device="cpu")
    assert_names(caplog.text, "model.onnx", "3 sessions")
    backend = classifier.backend
    ways = [(backend._sessions, backend._step)]
    if batch == "batch_size":  # whatever was the fastest here
        sessions = backend._sessions if len(backend._sessions) > 1 else [backend.session] * 3
        ways = [([backend.session], None), (sessions, None), (sessions, 1)]
    for backend._sessions, backend._step in ways:
        for batch_size in (1, 2, 5, 7):
            np.testing.assert_allclose(classifier.logits(images, batch_size), expected, atol=1e-5)
    with pytest.raises(ModelError, match=r"^objective:"):
        hfvit.load_classifier(tmp_path, objective="speed")


def test_objective_of_throughput_on_another_device_or_with_texts_raises(tmp_path, monkeypatch):
    write_graph(tmp_path / "model.onnx")
    monkeypatch.setattr("hfvit.inference.backends._providers", lambda *_: ("cuda:1", ["CPUExecutionProvider"]))
    monkeypatch.setattr("onnxruntime.InferenceSession.get_providers", lambda _: ["CUDAExecutionProvider"])
    with pytest.raises(ModelError, match=r"^objective: .*cuda:1"):
        OnnxBackend(tmp_path / "model.onnx", 3, objective="throughput")
    monkeypatch.undo()
    inputs = [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch_size", 3, 4, 4])]
    inputs.append(helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "tokens"]))
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", 3])
    nodes = [helper.make_node("ReduceMean", ["pixel_values"], ["means"], keepdims=0, noop_with_empty_axes=0)]
    nodes.append(helper.make_node("Expand", ["means", "shape"], ["logits"]))
    shape = numpy_helper.from_array(np.array([1, 3]), "shape")
    graph = helper.make_graph(nodes, "texts", inputs, [output], [shape])
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "texts.onnx")
    with pytest.raises(ModelError, match=r"^objective:"):
        OnnxBackend(tmp_path / "texts.onnx", 3, "cpu", objective="throughput")


@pytest.mark.parametrize(("batch_size", "most"), [(1, 1), (4, 4), (8, 8), (9, 9), (None, 32)])
def test_images_in_all_forward_passes_are_at_most_the_batch_size(checkpoint, images, batch_size, most):
    classifier = hfvit.load_classifier(checkpoint, device="cpu", threads=8)
    expected = classifier.logits(images)
    lock = threading.Lock()
    running = []
    counts = []

    def compute(worker, batch):
        with lock:
            running.append(len(batch))
            counts.append(sum(running))
        time.sleep(0.02)
        logits = worker.run(batch)
        with lock:
            running.remove(len(batch))
        return logits

    batches = classifier.run_batches(images * 10, classifier.prepare_image, batch_size, compute=compute)
    np.testing.assert_allclose(np.concatenate([logits for _, logits in batches])[:7], expected, atol=1e-5)
    assert max(counts) <= most


def test_option_without_effect_on_the_artifact_raises(checkpoint, tmp_path):
    write_configs(tmp_path)
    for name in ("model.engine", "model.pte"):
        (tmp_path / name).write_bytes(b"")
    for path, option in (
        (checkpoint, {"objective": "throughput"}),
        (tmp_path / "model.pte", {"objective": "throughput"}),
        (tmp_path / "model.engine", {"objective": "throughput"}),
        (tmp_path / "model.pte", {"threads": 2}),
        (tmp_path / "model.engine", {"threads": 2}),
        (checkpoint, {"threads": 0}),
        (checkpoint, {"threads": "2"}),
    ):
        with pytest.raises(ModelError, match=rf"^{next(iter(option))}:"):
            hfvit.load_classifier(path, **option)
    assert hfvit.load_classifier(checkpoint, objective="latency").labels == LABELS


def test_load_classifier_of_folder_finds_checkpoint_or_export(checkpoint, export, images, tmp_path):
    """A folder with weights is a checkpoint, else model.onnx is loaded, also from `onnx/`."""
    both = tmp_path / "both"
    shutil.copytree(checkpoint, both)
    write_graph(both / "onnx" / "model.onnx")
    assert np.array_equal(logits_of(both, images), logits_of(checkpoint, images))
    hub_layout = write_configs(tmp_path / "hub")
    write_graph(hub_layout / "onnx" / "model.onnx")
    write_graph(hub_layout / "onnx" / "model_other.onnx", -BRIGHTEST)
    assert np.array_equal(logits_of(hub_layout, images), logits_of(export, images))
    assert np.array_equal(logits_of(hub_layout / "onnx", images), logits_of(export, images))
    assert np.array_equal(logits_of(hub_layout / "onnx" / "model_other.onnx", images), -logits_of(export, images))


def test_classifier_of_half_precision_checkpoint_predicts(checkpoint, images, tmp_path):
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(checkpoint)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    logits = logits_of(tmp_path / "bf16", images)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, logits_of(checkpoint, images), atol=0.05)


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [(None, LABELS), ("single_label_classification", LABELS), ("multi_label_classification", LABELS), (None, ["odd"])],
)
def test_predict_equals_transformers_pipeline(problem_type, labels, images, tmp_path):
    torch.manual_seed(1)
    names = dict(enumerate(labels))
    ViTForImageClassification(ViTConfig(**STOCK, problem_type=problem_type, id2label=names)).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    expected = pipeline("image-classification", model=str(tmp_path), device="cpu")(images, top_k=3)
    found = hfvit.load_classifier(tmp_path, device="cpu").predict(images)
    for answer, entries in zip(found, expected, strict=True):
        assert answer == pytest.approx({entry["label"]: entry["score"] for entry in entries}, abs=1e-5)


def test_predict_of_multi_label_graph_uses_sigmoid(export, images):
    change_config(export, problem_type="multi_label_classification")
    probabilities = 1 / (1 + np.exp(-expected_logits(images[0])))
    assert hfvit.load_classifier(export).predict(images[:1])[0] == pytest.approx(
        dict(zip(LABELS, probabilities, strict=True)), abs=1e-5
    )


def test_a_graph_with_thresholds_answers_with_the_classes_that_reach_them(export, images):
    share = 1 / (1 + np.exp(-expected_logits(images[0])))
    limits = [float(share[0]) - 1e-3, float(share[1]) + 1e-3, 1.0]
    change_config(export, problem_type="multi_label_classification", thresholds=limits)
    classifier = hfvit.load_classifier(export)
    assert list(classifier.predict(images[:1])[0]) == [LABELS[0]]
    best = [LABELS[index] for index in np.argsort(-share)[:2]]
    assert list(classifier.predict(images[:1], top_k=2)[0]) == best
    classifier.thresholds = np.full(3, 0.5)
    assert len(classifier.best(np.zeros((1, 3)))[0]) == 3
    change_config(export, problem_type="single_label_classification")
    assert hfvit.load_classifier(export).thresholds is None


@pytest.mark.parametrize("thresholds", [[0.5], [0.5, 0.5, 1.5], [0.5, "a", 0.5], "0.5"])
def test_thresholds_that_are_no_probabilities_are_refused(export, thresholds):
    change_config(export, problem_type="multi_label_classification", thresholds=thresholds)
    with pytest.raises(ModelError) as caught:
        hfvit.load_classifier(export)
    assert_names(caught.value, "thresholds", export)


def test_load_classifier_numbers_repeated_class_names(export, images):
    write_configs(export, ["crane", "heron", "crane"])
    classifier = hfvit.load_classifier(export)
    assert classifier.labels == ["crane (0)", "heron", "crane (2)"]
    assert [next(iter(answer)) for answer in classifier.predict(images[:3])] == classifier.labels


def test_predict_accepts_gray_arrays_and_rejects_others(export, images):
    classifier = hfvit.load_classifier(export)
    gray = np.asarray(images[0].convert("L"))
    alpha = np.dstack([np.asarray(images[0]), gray])
    logits = classifier.logits([images[0].convert("L"), gray, gray[..., None], images[0], alpha])
    assert (logits[1:3] == logits[0]).all()
    assert (logits[4] == logits[3]).all()
    color = np.asarray(images[0])
    for array in (color / np.float32(255), gray / 255, color.astype(np.int64), color[None], color[..., :2]):
        with pytest.raises(DataError) as caught:
            classifier.predict([array])
        assert_names(caught.value, array.shape, array.dtype)
    with pytest.raises(DataError, match=r"\(0, 16, 3\)"):
        classifier.predict([color[:0]])


def test_a_checkpoint_that_fails_on_color_images_raises_model_error(tmp_path, images):
    ViTForImageClassification(ViTConfig(**STOCK, num_channels=1)).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    classifier = hfvit.load_classifier(tmp_path, device="cpu")
    with pytest.raises(ModelError, match=r"ViTForImageClassification.*\(1, 3, 16, 16\)"):
        classifier.predict(images[0])


@pytest.mark.parametrize("tta", [None, "flip"])
def test_images_of_several_sizes_are_classified_together(tmp_path, tta):
    """The image processor resizes the shorter side, and does not crop."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    torch.manual_seed(0)
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"shortest_edge": 24}).save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in ((30, 40), (40, 30), (30, 40))]
    classifier = hfvit.load_classifier(tmp_path, device="cpu", tta=tta)
    wanted = np.concatenate([classifier.logits([image]) for image in images])
    np.testing.assert_allclose(classifier.logits(images), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["large.png", "large.jpg"])
def test_an_opened_image_is_read_once_by_several_threads(export, tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    classifier = hfvit.load_classifier(export)
    expected = classifier.prepare_image(tmp_path / name).values
    for _ in range(3):
        image = Image.open(tmp_path / name)
        with ThreadPoolExecutor(8) as pool:
            prepared = list(pool.map(classifier.prepare_image, [image] * 8))
        assert all(np.array_equal(each.values, expected) for each in prepared)


def test_a_truncated_image_that_was_opened_is_a_data_error(export, images, tmp_path):
    images[0].resize((200, 200)).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-200])
    with pytest.raises(DataError, match=r"^images:"):
        hfvit.load_classifier(export).predict([Image.open(tmp_path / "half.jpg")])


@pytest.mark.parametrize("image", [b"\x89PNG", None, 3, torch.zeros(3, 16, 16)])
def test_image_of_another_type_raises_data_error(export, image):
    classifier = hfvit.load_classifier(export)
    for method in (classifier.predict, classifier.logits, classifier):
        with pytest.raises(DataError, match=r"^images:"):
            method([image])


@pytest.mark.parametrize("top_k", [0, -1, 1.5])
def test_top_k_below_one_raises(export, images, top_k):
    with pytest.raises(ModelError, match=r"^top_k:"):
        hfvit.load_classifier(export).predict(images, top_k=top_k)


@pytest.mark.parametrize("function", [hfvit.predict, hfvit.embed])
def test_options_with_a_loaded_classifier_raise(function, checkpoint, images):
    classifier = hfvit.load_classifier(checkpoint, device="cpu")
    with pytest.raises(TypeError, match=r"^tta: "):
        function(classifier, images[0], tta="flip")


def test_load_classifier_takes_a_torch_device_but_no_number(checkpoint, images):
    classifier = hfvit.load_classifier(checkpoint, device=torch.device("cpu"))
    np.testing.assert_allclose(classifier.logits(images), logits_of(checkpoint, images), rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match=r"^device: .* 0"):
        hfvit.load_classifier(checkpoint, device=0)


def test_batch_size_below_one_raises(export, images):
    for size in (0, -1):
        with pytest.raises(ModelError, match=rf"^batch_size: .*{size}\b"):
            hfvit.load_classifier(export).predict(images, batch_size=size)


def test_load_classifier_with_revision_uses_it_for_all_files(tmp_path):
    """Write two revisions of a repository to a cache_dir of huggingface_hub."""
    cache = tmp_path / "models--user--colors"
    (cache / "refs").mkdir(parents=True)
    for revision, commit, labels, side in (("main", "a" * 40, ["no", "yes"], 16), ("v1", "b" * 40, LABELS, 24)):
        (cache / "refs" / revision).write_text(commit)
        config = ViTConfig(**{**STOCK, "image_size": side}, id2label=dict(enumerate(labels)))
        ViTForImageClassification(config).save_pretrained(cache / "snapshots" / commit)
        ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(cache / "snapshots" / commit)
    for kwargs, labels, side in (({}, ["no", "yes"], 16), ({"revision": "v1"}, LABELS, 24)):
        classifier = hfvit.load_classifier("user/colors", cache_dir=tmp_path, **kwargs)
        assert classifier.labels == labels
        assert classifier.pixel_values([Image.new("RGB", (9, 9))]).shape == (1, 3, side, side)
        assert classifier.logits([Image.new("RGB", (9, 9))]).shape == (1, len(labels))


def change_config(folder, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def damaged(name: str, folder):
    """Write a folder with one defect; returns the path to load."""
    write_graph(folder / "model.onnx")
    write_configs(folder)
    if name == "text":
        (folder / "model.onnx").write_text("version https://git-lfs.github.com/spec/v1\n")
    elif name == "classes":
        write_configs(folder, ["cat", "dog"])
    elif name == "no config":
        (folder / "config.json").unlink()
    elif name == "no processor":
        (folder / "preprocessor_config.json").unlink()
    elif name == "image size":
        write_configs(folder, size=32)
    elif name == "several":
        (folder / "model.onnx").rename(folder / "model_fp16.onnx")
        write_graph(folder / "model_quantized.onnx")
    elif name == "types":
        change_config(folder, hidden_size="large")
    elif name == "regression":
        change_config(folder, problem_type="regression")
    elif name == "processor's types":
        (folder / "preprocessor_config.json").write_text(
            '{"image_processor_type": "ViTImageProcessor", "size": "big"}'
        )
    elif name == "misspelt":
        return folder / "modle.onnx"
    elif name == "empty":
        (folder / "model.onnx").unlink()
    return folder


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("text", ["model.onnx", "ONNXRuntimeError"]),
        ("classes", ["model.onnx", "logits", "3]", "config.json", 2]),
        ("no config", ["model.onnx", "config.json"]),
        ("no processor", ["model.onnx", "preprocessor_config.json"]),
        ("image size", ["model.onnx", (3, 16, 16), (3, 32, 32)]),
        ("several", ["model.onnx", "model_fp16.onnx, model_quantized.onnx"]),
        ("types", ["config.json", "'hidden_size'"]),
        ("regression", ["config.json", "problem_type", "regression"]),
        ("processor's types", ["model.onnx", "preprocessor_config.json"]),
        ("misspelt", ["modle.onnx", "'model.onnx'"]),
        ("empty", ["model.safetensors", "ONNX"]),
    ],
)
def test_load_classifier_from_a_damaged_folder_names_file_and_data(name, data, tmp_path, images):
    with pytest.raises(ModelError) as raised:
        logits_of(damaged(name, tmp_path / "export"), images)
    assert_names(raised.value, tmp_path / "export", *data)
    assert "\n" not in str(raised.value)


def test_load_classifier_of_damaged_weights_raises_one_error(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    content = (folder / "model.safetensors").read_bytes()
    for size in (0, 5, 1000, len(content) - 8):
        (folder / "model.safetensors").write_bytes(content[:size])
        with pytest.raises(ModelError) as raised:
            hfvit.load_classifier(folder)
        assert_names(raised.value, folder, one_line(raised.value.__cause__))
        assert "\n" not in str(raised.value)


def test_load_classifier_of_missing_path_names_it(tmp_path):
    for path in (tmp_path / "nothing", str(tmp_path / "nothing"), "./nothing", "a/b/c"):
        with pytest.raises(ModelError) as raised:
            hfvit.load_classifier(path)
        assert_names(raised.value, path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError) as raised:
        hfvit.load_classifier(tmp_path / "file")
    assert_names(raised.value, tmp_path / "file")


def test_load_classifier_on_unavailable_device_raises(export, checkpoint):
    with pytest.raises(HFViTError, match=r"^device: .*\bONNX Runtime\b.*'npu'"):
        hfvit.load_classifier(export, device="npu")
    for name in ("npu", "no such device"):
        with pytest.raises(HFViTError, match=f"^device: .*PyTorch.*'{name}'"):
            hfvit.load_classifier(checkpoint, device=name)


def test_load_classifier_without_head_raises(tmp_path):
    """transformers would initialize the head randomly, with a warning."""
    ViTModel(ViTConfig(**STOCK), add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"\b2\b.*\bclassifier\.bias\b"):
        hfvit.load_classifier(tmp_path)


def test_logits_in_several_threads_equal_those_of_one_batch(tmp_path):
    build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO).save_pretrained(tmp_path)
    images = [colored_image(index % 3, np.random.default_rng(index)) for index in range(11)]
    one = hfvit.load_classifier(tmp_path, device="cpu", threads=1)
    expected = one.run(one.prepare(images))
    for threads, batch_size in ((1, 3), (3, 1), (3, 16), (9, 8)):
        several = hfvit.load_classifier(tmp_path, device="cpu", threads=threads)
        np.testing.assert_allclose(several.logits(images, batch_size), expected, rtol=1e-4, atol=1e-6)
        assert several.backend.threads == threads


def test_bf16_classifier_agrees_to_two_digits(tmp_path):
    build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO).save_pretrained(tmp_path)
    images = [colored_image(index, np.random.default_rng(index)) for index in range(3)]
    half = hfvit.load_classifier(tmp_path, device="cpu", bf16=True)
    assert half.backend.model.dtype == torch.bfloat16
    np.testing.assert_allclose(
        half.logits(images), hfvit.load_classifier(tmp_path, device="cpu").logits(images), atol=0.02
    )


def test_methods_take_one_image_as_a_batch_of_one(export, images):
    classifier = hfvit.load_classifier(export, device="cpu")
    array = np.asarray(images[0])  # rows of an array are gray images of one column, too
    expected = classifier.logits([images[0]])
    pixels = classifier.pixel_values([images[0]])
    for one in (array, images[0]):
        np.testing.assert_array_equal(classifier.logits(one), expected)
        np.testing.assert_array_equal(classifier.pixel_values(one), pixels)
        np.testing.assert_array_equal(classifier.prepare(one), pixels)


def test_folder_or_pattern_is_all_of_its_images(checkpoint, images, tmp_path):
    files = [tmp_path / "b" / "1.png", tmp_path / "a" / "2.png", tmp_path / "a" / "1[0].png"]
    for file, image in zip(files, images, strict=False):
        file.parent.mkdir(exist_ok=True)
        image.save(file)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    classifier = hfvit.load_classifier(checkpoint, device="cpu")
    names = sorted(map(str, files))
    for folder in (tmp_path, str(tmp_path), tmp_path / "*"):
        found = hfvit.predict(classifier, folder, 1)
        assert found.names == names
        assert found == classifier.predict(names, 1) == classifier.predict(folder, 1)
        np.testing.assert_array_equal(hfvit.embed(classifier, folder), hfvit.embed(classifier, names))
    html = hfvit.predict(classifier, tmp_path)._repr_html_()
    assert "1[0].png" in html
    assert set(classifier(files[2])) == set(LABELS)  # an existing file is no pattern


WRONG_IMAGES = (
    None, 3, b"file", {"image": "a.png"}, np.array("a.png"), [None], [b"file"], [()], "", [""], torch.zeros(3, 4, 4),
)  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_IMAGES, ids=lambda wrong: repr(wrong)[:20])
def test_objects_that_are_no_images_are_errors_of_images(checkpoint, wrong):
    classifier = hfvit.load_classifier(checkpoint, device="cpu")
    for function in (classifier, classifier.predict, classifier.logits, partial(hfvit.embed, classifier)):
        with pytest.raises(DataError, match=r"^images:"):
            function(wrong)


def test_pairs_without_text_are_no_images(checkpoint, images):
    classifier = hfvit.load_classifier(checkpoint, device="cpu")
    assert classifier.logits([(images[0], "text"), (images[1], None)]).shape == (2, 3)
    with pytest.raises(DataError, match=r"^images:"):
        classifier.logits([(images[0], images[1])])


@pytest.mark.parametrize("name", ["empty", "nothing*"])
def test_folder_without_images_is_an_error(checkpoint, tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"^images:"):
        hfvit.predict(checkpoint, tmp_path / name, device="cpu")


def test_predict_function_takes_batch_size_and_texts(export, images):
    expected = hfvit.predict(export, images, device="cpu")
    assert hfvit.predict(export, images, device="cpu", batch_size=2) == expected
    assert hfvit.predict(hfvit.load_classifier(export, device="cpu"), images, batch_size=2) == expected
    with pytest.raises(ModelError, match=r"^texts:"):
        hfvit.predict(export, images, texts=["a"] * len(images), device="cpu")
    for size in (0, 2.5, "4", True):
        with pytest.raises(ModelError, match=r"^batch_size:"):
            hfvit.predict(export, images, batch_size=size, device="cpu")


def test_unknown_arguments_for_an_export_are_errors(export):
    with pytest.raises(TypeError, match=r"^devcie: .*'device'"):
        hfvit.load_classifier(export, devcie="cpu")
    with pytest.raises(TypeError, match=r"^dtype:"):
        hfvit.load_classifier(export, dtype="float16")
    assert hfvit.load_classifier(export, revision="main", local_files_only=True).labels == LABELS
    assert hfvit.load_classifier(export, providers="CPUExecutionProvider").labels == LABELS


@pytest.mark.parametrize("option", [{"patch_size": "8"}, {"merge_tokens": "2"}, {"threads": True}, {"threads": "2"}])
def test_options_of_a_wrong_type_are_errors(checkpoint, option):
    with pytest.raises(ModelError, match=rf"^{next(iter(option))}:"):
        hfvit.load_classifier(checkpoint, device="cpu", **option)


def test_names_that_are_no_models_are_errors():
    with pytest.raises(ModelError, match=r"^model:"):
        hfvit.load_classifier("")  # not the current folder
    with pytest.raises(TypeError, match=r"^model:"):
        hfvit.load_classifier(None)


def test_representation_names_model_and_device(export):
    assert repr(hfvit.load_classifier(export, device="cpu")) == f"Classifier({export}: 3 classes, Onnx on cpu)"
