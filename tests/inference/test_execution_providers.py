"""ONNX Runtime's execution providers: selection, caches and errors."""

import json

import numpy as np
import onnxruntime
import pytest
from helpers.images import LABELS, colored_image
from helpers.messages import assert_names, option_of
from helpers.onnx_graphs import expected_logits, write_configs, write_graph
from huggingface_hub import constants

import hfvit
from hfvit.cli import main
from hfvit.errors import ModelError
from hfvit.inference.execution_providers import (
    CPU,
    CUDA,
    RTX,
    TENSORRT,
    checked_providers,
    graph_cache,
    parse_provider,
    register_plugin,
    with_caches,
)

HERE = onnxruntime.get_available_providers()
KNOWN = onnxruntime.get_all_providers()


@pytest.fixture
def export(tmp_path):
    write_graph(tmp_path / "export" / "model.onnx")
    return write_configs(tmp_path / "export")


@pytest.fixture
def images():
    rng = np.random.default_rng(4)
    return [colored_image(index % 3, rng) for index in range(5)]


@pytest.mark.parametrize(
    "providers", [[CPU], [(CPU, {})], [(CPU, {"arena_extend_strategy": "kSameAsRequested"})], HERE]
)
def test_load_classifier_with_providers_runs_on_them(export, images, providers):
    classifier = hfvit.load_classifier(export, providers=providers, threads=1)
    expected = np.stack([expected_logits(image) for image in images])
    np.testing.assert_allclose(classifier.logits(images), expected, atol=1e-5)
    names = [name if isinstance(name, str) else name[0] for name in providers]
    assert classifier.backend.session.get_providers()[: len(names)] == names
    assert classifier.backend.device == ("cpu" if names == [CPU] else names[0].removesuffix("ExecutionProvider"))


def test_load_classifier_without_prepacking_returns_the_same_logits(export, images):
    expected = hfvit.load_classifier(export, threads=1).logits(images)
    np.testing.assert_allclose(hfvit.load_classifier(export, prepack=False).logits(images), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("providers", "data"),
    [
        ([], [CPU]),
        (["CPU"], ["'CPU'", CPU]),
        (["CUDAExecutionProvidr"], ["'CUDAExecutionProvidr'", f"'{CUDA}'"]),
        ([CPU, CPU], [CPU]),
        ([(CPU, "fast")], [(CPU, "fast")]),
        ([4], [4]),
        ([TENSORRT, RTX, CPU], [TENSORRT, RTX]),
        (["QNNExecutionProvider"], ["QNNExecutionProvider", CPU]),
    ],
)
def test_load_classifier_with_invalid_providers_names_them(export, providers, data):
    with pytest.raises(ModelError, match=r"^providers: ") as raised:
        hfvit.load_classifier(export, providers=providers)
    assert_names(raised.value, *data)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "install"), [(CUDA, "onnxruntime-gpu"), (TENSORRT, "onnxruntime-gpu"), (RTX, "onnxruntime-ep-nv")]
)
def test_providers_not_installed_name_the_package(name, install):
    with pytest.raises(ModelError, match=f"^providers: {name} .*{CPU}.*pip install {install}"):
        checked_providers([name], [CPU], KNOWN)
    assert checked_providers([(name, {"device_id": 1}), CPU], [name, CPU], KNOWN) == [
        (name, {"device_id": "1"}),
        (CPU, {}),
    ]


def test_options_of_onnx_files_with_checkpoint_or_device_raise(stock, export):
    with pytest.raises(ModelError, match=r"^providers: ") as raised:
        hfvit.load_classifier(stock, providers=[CPU])
    assert_names(raised.value, stock)
    with pytest.raises(ModelError, match=r"^prepack: "):
        hfvit.load_classifier(stock, prepack=False)
    with pytest.raises(ModelError, match=r"^device: .*\('CUDAExecutionProvider'"):
        hfvit.load_classifier(export, "cpu", providers=[CPU])


def test_with_caches_keeps_explicit_options(tmp_path):
    kept = dict(with_caches([(TENSORRT, {}), (CUDA, {}), (CPU, {})], tmp_path))
    assert kept[TENSORRT]["trt_engine_cache_enable"] == "1"
    assert kept[TENSORRT]["trt_engine_cache_path"] == str(tmp_path)
    assert kept[CUDA] == kept[CPU] == {}
    own = {"trt_engine_cache_enable": "0", "trt_fp16_enable": "1"}
    assert dict(with_caches([(TENSORRT, own)], tmp_path))[TENSORRT].items() >= own.items()
    assert with_caches([(RTX, {})], tmp_path) == [(RTX, {"nv_runtime_cache_path": str(tmp_path)})]


def test_graph_cache_depends_on_weights_and_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    first, second, same = (tmp_path / f"{name}.onnx" for name in "abc")
    write_graph(first)
    write_graph(second, np.eye(3))
    same.write_bytes(first.read_bytes())
    folder = graph_cache([first])
    assert folder.parent == tmp_path / "home" / "hfvit" / "onnxruntime"
    assert graph_cache([same]) == folder
    assert graph_cache([second]) != folder
    assert graph_cache([first, second]) != folder


def test_providers_with_damaged_plugin_raise_one_error(tmp_path, monkeypatch):
    """Replace the plugin's library by an invalid file."""
    (tmp_path / "onnxruntime_ep_nv_tensorrt_rtx.py").write_text(
        f"get_ep_name = lambda: '{RTX}'\nget_library_path = lambda: '{tmp_path / 'plugin.so'}'\n"
    )
    (tmp_path / "plugin.so").write_text("no library")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=rf"^providers: {RTX} .*\bplugin\.so\b"):
        register_plugin(onnxruntime)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CPU, (CPU, {})),
        (f"{TENSORRT}:trt_fp16_enable=1,device_id=0", (TENSORRT, {"trt_fp16_enable": "1", "device_id": "0"})),
        (f"{RTX}:nv_profile_max_shapes=x:8x3x16x16", (RTX, {"nv_profile_max_shapes": "x:8x3x16x16"})),
    ],
)  # fmt: skip
def test_parse_provider_reads_name_and_options(text, expected):
    assert parse_provider(text) == expected


@pytest.mark.parametrize("text", ["", ":a=1", f"{CPU}:", f"{CPU}:a", f"{CPU}:=1"])
def test_parse_provider_of_invalid_text_raises(text):
    with pytest.raises(ModelError, match=r"^--providers: ") as raised:
        parse_provider(text)
    assert f"'{text}'" in str(raised.value)


def command(*words) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code


def test_predict_with_providers_option(export, images, tmp_path, capsys):
    images[1].save(tmp_path / "green.png")
    words = ("predict", export, tmp_path / "green.png", "--json", "--providers")
    assert command(*words, f"{CPU}:use_arena=0") == 0
    assert json.loads(capsys.readouterr().out)["predictions"][0]["label"] == LABELS[1]
    assert command(*words, "NoExecutionProvider") == 2
    error = capsys.readouterr().err
    assert option_of(error) == "providers"
    assert_names(error, "'NoExecutionProvider'")


def test_validate_passes_providers_to_onnx_files_only(stock, export, colors, capsys):
    words = ("--dataset_name", colors, "--split", "test", "--providers", *HERE)
    assert command("validate", stock, export, "--max_accuracy_drop", 100, *words) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[1].startswith(str(stock))
    assert ("cpu" if HERE == [CPU] else HERE[0].removesuffix("ExecutionProvider")) in rows[2].split()
    assert command("validate", stock, *words) == 2
    assert option_of(capsys.readouterr().err) == "providers"
