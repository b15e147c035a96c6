"""`optimum-cli export openvino` and the OpenVINO backend, against PyTorch."""

import errno
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers.images import LABELS, colored_image
from helpers.messages import assert_names, option_of
from helpers.models import build_model
from helpers.onnx_graphs import BRIGHTEST, expected_logits, write_configs, write_graph
from helpers.recipes import write_micro_recipe
from transformers import SwinConfig, SwinForImageClassification

import hfvit
from hfvit.artifacts.artifact import find_artifact
from hfvit.artifacts.export_record import ExportRecord
from hfvit.cli.export_openvino import main
from hfvit.errors import DataError, ModelError, StorageError, run
from hfvit.export import openvino as openvino_export
from hfvit.export import pipeline
from hfvit.export.openvino import export_openvino
from hfvit.inference.openvino_backend import OpenVINOBackend
from hfvit.pipeline import main as train

openvino = pytest.importorskip("openvino")
FOLDER = {"config.json", "preprocessor_config.json", "export.json"}


def export(*words) -> int:
    """Run the command in this process and return its exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code


def images(count: int):
    return [colored_image(index % 3, np.random.default_rng(index), size=16 + index) for index in range(count)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, colors):
    """Train a checkpoint that classifies colors, and export it with the gate."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_micro_recipe(folder, colors)
    assert run(lambda: train([str(recipe), "--num_train_epochs", "6"])) == 0
    assert export("--model", folder / "out", "--quantize", "int8", folder / "out" / "openvino") == 0
    return folder / "out"


@pytest.fixture
def graph(tmp_path):
    """Write an OpenVINO file whose logits are the mean of each channel."""
    write_graph(tmp_path / "source.onnx")
    write_configs(tmp_path / "openvino")
    model = openvino.convert_model(tmp_path / "source.onnx")
    openvino.save_model(model, tmp_path / "openvino" / "openvino_model.xml")
    (tmp_path / "source.onnx").unlink()
    return tmp_path / "openvino" / "openvino_model.xml"


def test_export_of_run_validates_and_records_each_file(exported):
    folder = exported / "openvino"
    stems = ("openvino_model", "openvino_model_int8")
    assert {path.name for path in folder.iterdir()} == {
        f"{stem}{s}" for stem in stems for s in (".xml", ".bin")
    } | FOLDER
    record = ExportRecord.load(folder)
    for stem, dtype in zip(stems, ("fp32", "int8"), strict=True):
        entry = record.files[f"{stem}.xml"]
        assert entry.dtype == dtype
        assert entry.bytes == sum((folder / f"{stem}{suffix}").stat().st_size for suffix in (".xml", ".bin"))
        assert entry.gate.passed
        assert entry.gate.data.images == 13
    assert record.files["openvino_model_int8.xml"].calibration.images == 52
    assert json.loads((exported / "run.json").read_text())["gate"]["passed"]


def test_export_that_fails_between_two_files_leaves_no_file_of_other_weights(exported, tmp_path, monkeypatch):
    out = shutil.copytree(exported / "openvino", tmp_path / "openvino")
    commit_file = openvino_export.commit_file

    def fail_on_xml(finished, path):
        if path.suffix == ".xml":
            raise OSError(errno.ENOSPC, "No space left on device")
        commit_file(finished, path)

    for module in (openvino_export, pipeline):
        monkeypatch.setattr(module, "commit_file", fail_on_xml)
    assert export("--model", exported, "--no_gate", out) == StorageError.exit_code
    assert {path.name for path in out.iterdir()} == {
        "openvino_model.bin", "openvino_model_int8.xml", "openvino_model_int8.bin", *FOLDER,
    }  # fmt: skip


def test_classifier_of_the_folder_returns_the_logits_of_the_checkpoint(exported):
    expected = hfvit.load_classifier(exported).logits(images(5))
    for name, tolerance in (("", 1e-4), ("openvino_model_int8.xml", 0.3)):
        classifier = hfvit.load_classifier(exported / "openvino" / name)
        assert isinstance(classifier.backend, OpenVINOBackend)
        logits = classifier.logits(images(5), batch_size=3)
        np.testing.assert_allclose(logits, expected, atol=tolerance)
        np.testing.assert_array_equal(logits.argmax(axis=1), expected.argmax(axis=1))


def test_int8_file_has_integer_weights(exported):
    model = openvino.Core().read_model(exported / "openvino" / "openvino_model_int8.xml")
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    weights = [node.get_data() for node in constants if node.get_element_type() == openvino.Type.i8]
    assert len(weights) >= 9  # four products of two blocks, and the head
    largest = [np.abs(array.astype(int)).max() for array in weights]
    assert min(largest) > 32
    assert max(largest) <= 64  # CPUs without VNNI add two products of uint8 and int8 in 16 bits


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 2e-3), ("bf16", 5e-2)])
def test_half_precision_halves_the_weights(tmp_path, dtype, tolerance):
    model = build_model(
        LABELS, architecture="vit_tiny_patch16_224", image_size=16, timm_kwargs={"patch_size": 8, "depth": 1}
    )
    full = export_openvino(model, tmp_path / "full.xml", image_size=(16, 16))
    half = export_openvino(model, tmp_path / "half.xml", dtype=dtype, image_size=(16, 16))
    assert half.bytes < 0.6 * full.bytes
    assert half.parity.max_abs_difference <= tolerance * max(1.0, half.parity.max_abs_logit)
    hint = (
        openvino.Core().read_model(tmp_path / "half.xml").get_rt_info(["runtime_options", "INFERENCE_PRECISION_HINT"])
    )
    assert hint.astype(str) == {"fp16": "f32", "bf16": "bf16"}[dtype]


@pytest.mark.slow
def test_windowed_attention_equals_pytorch(tmp_path):
    torch.manual_seed(0)
    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[1, 2], num_heads=[2, 2], window_size=4, num_labels=3
    )
    entry = export_openvino(SwinForImageClassification(config), tmp_path / "swin.xml")
    assert entry.parity.max_abs_difference < 1e-3


def test_export_with_empty_calibration_raises_data_error(tmp_path):
    model = build_model(
        LABELS, architecture="vit_tiny_patch16_224", image_size=16, timm_kwargs={"patch_size": 8, "depth": 1}
    )
    with pytest.raises(DataError, match=r"^calibration:"):
        export_openvino(model, tmp_path / "a.xml", calibration=[], image_size=(16, 16))
    with pytest.raises(ModelError, match=r"^dtype:"):
        export_openvino(model, tmp_path / "a.xml", dtype="fp8", image_size=(16, 16))
    assert not list(tmp_path.iterdir())


def test_export_of_an_export_exits_with_2(graph, capsys):
    assert export("--model", graph, graph.parent / "other") == 2
    assert_names(capsys.readouterr().err, "--model", str(graph))


@pytest.mark.parametrize("option", ["calibration_samples", "min_agreement"])
def test_option_without_effect_exits_with_2(option, tmp_path, stock, capsys):
    assert export("--model", stock, f"--{option}", 1, tmp_path / "out") == 2
    assert option_of(capsys.readouterr().err) == option


def test_export_without_openvino_names_the_install_command(tmp_path, stock, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert export("--model", stock, tmp_path / "out") == 2
    assert 'pip install "hfvit[openvino]"' in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_backend_returns_the_logits_of_each_image(graph, objective):
    pixels = np.random.default_rng(0).standard_normal((7, 3, 16, 16), dtype=np.float32)
    backend = OpenVINOBackend(graph, 3, threads=2, objective=objective)
    np.testing.assert_allclose(backend(pixels), pixels.mean(axis=(2, 3)) @ BRIGHTEST, atol=1e-5)
    with ThreadPoolExecutor(4) as pool:
        for logits in pool.map(backend, [pixels, pixels[:1], pixels, pixels[:1]]):
            np.testing.assert_allclose(logits, (pixels.mean(axis=(2, 3)) @ BRIGHTEST)[: len(logits)], atol=1e-5)
    assert backend.device == "cpu"
    assert backend.bytes == sum(path.stat().st_size for path in (graph, graph.with_suffix(".bin")))


def test_predictions_of_a_folder_without_a_checkpoint(graph):
    classifier = hfvit.load_classifier(graph.parent.parent)
    (image,) = images(1)
    np.testing.assert_allclose(classifier.logits([image])[0], expected_logits(image), atol=1e-4)


def test_unusable_file_raises_model_error(graph):
    with pytest.raises(ModelError, match=r"^device:"):
        OpenVINOBackend(graph, 3, device="cuda")
    with pytest.raises(ModelError, match="4 classes"):
        OpenVINOBackend(graph, 4)
    with pytest.raises(ModelError, match="preprocessor_config"):
        OpenVINOBackend(graph, 3)(np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(ModelError, match=r"^providers:"):
        hfvit.load_classifier(graph, providers=["CPUExecutionProvider"])
    other = shutil.copy(graph, graph.with_name("openvino_model_other.xml"))
    with pytest.raises(ModelError, match="openvino_model_other"):
        hfvit.load_classifier(other)  # without its .bin
    graph.write_text("<net")
    with pytest.raises(ModelError, match="openvino_model"):
        hfvit.load_classifier(graph)


def test_folder_with_several_files_takes_the_default_one(graph):
    shutil.copy(graph, graph.with_name("openvino_model_int8.xml"))
    assert find_artifact(graph.parent).file == graph
    graph.rename(graph.with_name("openvino_model_fp16.xml"))
    with pytest.raises(ModelError, match="openvino_model_int8"):
        find_artifact(graph.parent)
