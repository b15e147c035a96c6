"""Configurations, graphs and weights with a wrong value at any place: one error, or a classifier that answers."""

import json

import numpy as np
import pytest
import timm
from helpers.damage import damaged
from helpers.onnx_graphs import write_configs, write_graph
from helpers.recipes import ARCHITECTURE, MICRO
from PIL import Image

from hfvit.artifacts.artifact import find_artifact, read_head
from hfvit.artifacts.checkpoint import checkpoint_error
from hfvit.artifacts.run_record import read_examples
from hfvit.artifacts.run_sections import ExampleImage, ExampleImages
from hfvit.errors import HFViTError
from hfvit.hub.files import files_to_push
from hfvit.inference.classifier import load_classifier
from hfvit.training.resume import ResumeState

VALUES = [None, [], {}, "x", float("nan"), 10**30, -1, -1.5, 0, True, [1], {"a": 1}]
IMAGE = Image.fromarray(np.zeros((20, 24, 3), np.uint8))
LIBRARIES = "ignore::UserWarning", "ignore::RuntimeWarning"


def outcome(action) -> str | None:
    """The message of the error that `action` ends in; None where it ends well."""
    try:
        action()
    except HFViTError as error:
        return str(error)
    return None


@pytest.fixture
def export(tmp_path):
    write_graph(tmp_path / "onnx" / "model.onnx")
    return write_configs(tmp_path / "onnx")


@pytest.mark.filterwarnings(*LIBRARIES)
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_wrong_value_in_a_configuration_is_one_error_or_harmless(name, export):
    file = export / name
    content = json.loads(file.read_text())
    refused = 0
    for path, value, text in damaged(content, VALUES):
        file.write_text(text)
        message = outcome(lambda: load_classifier(export, device="cpu").predict([IMAGE]))
        if message is not None:
            refused += 1
            assert str(export) in message, (path, value, message)
            assert len(message.splitlines()) == 1, (path, value, message)
    assert refused > 20


@pytest.mark.filterwarnings(*LIBRARIES)
def test_a_wrong_value_in_a_timm_configuration_is_one_error_or_harmless(tmp_path):
    config = {
        "model_type": "timm_wrapper", "architecture": ARCHITECTURE, "model_args": MICRO, "num_classes": 2,
        "label_names": ["a", "b"], "id2label": {"0": "a", "1": "b"}, "problem_type": None,
        "pretrained_cfg": {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3},
    }  # fmt: skip
    (tmp_path / "model.safetensors").write_bytes(b"")
    for path, value, text in damaged(config, VALUES):
        (tmp_path / "config.json").write_text(text)
        message = outcome(lambda: read_head(find_artifact(tmp_path)))
        assert message is None or str(tmp_path) in message, (path, value, message)
    assert timm.is_model(ARCHITECTURE)


def test_a_push_with_wrong_configurations_is_one_error_or_harmless(export, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"0")
    content = json.loads((export / "config.json").read_text()) | {"label_names": ["a"]}
    for changed, other in ((tmp_path, export), (export, tmp_path)):
        (other / "config.json").write_text(json.dumps(content))
        for path, value, text in damaged(content, VALUES):
            (changed / "config.json").write_text(text)
            message = outcome(lambda: files_to_push(tmp_path, "user/x", ("onnx",)))
            assert message is None or "onnx" in message or str(tmp_path) in message, (path, value, message)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_damaged_graph_is_one_error(damage, export):
    file = export / "model.onnx"
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(30):
        changed = bytearray(content)
        if damage == "flipped":
            changed[rng.integers(len(content))] ^= 1 << rng.integers(8)
        elif damage == "cut":
            del changed[rng.integers(len(content)) :]
        else:
            changed = b"" if damage == "empty" else b"no graph"
        file.write_bytes(bytes(changed))
        message = outcome(lambda: load_classifier(export, device="cpu").predict([IMAGE]))
        assert message is not None or damage in ("cut", "flipped")


def test_wrong_values_in_a_resume_state_are_one_error(tmp_path):
    state = ResumeState(3, [0.5], 8, 8, 8, [{"event": "rewind", "step": 1, "learning_rate_factor": 0.5}])
    state.save(tmp_path)
    file = tmp_path / "progress.json"
    for path, value, text in damaged(json.loads(file.read_text()), VALUES):
        file.write_text(text)
        message = outcome(lambda: ResumeState.load(tmp_path))
        assert message is None or str(file) in message, (path, value)


def test_wrong_values_in_a_manifest_are_a_reason(tmp_path):
    file = tmp_path / "checkpoint.json"
    manifest = {
        "files": {"model.safetensors": {"bytes": 1, "sha256": "0"}, "rng_state.pth": {"bytes": 1, "sha256": "0"}}
    }
    (tmp_path / "model.safetensors").write_bytes(b"0")
    (tmp_path / "rng_state.pth").write_bytes(b"0")
    for path, value, text in damaged(manifest, VALUES):
        file.write_text(text)
        assert isinstance(checkpoint_error(tmp_path, read=True), str), (path, value)


@pytest.mark.parametrize("size", [0, 10, 300, -1])
def test_damaged_examples_are_left_out(size, tmp_path):
    row = ExampleImage(row=0, true="a", predicted="b", confidence=0.5)
    file = tmp_path / "examples.npz"
    np.savez_compressed(file, mistakes=np.zeros((1, 8, 8, 3), np.uint8), attention=np.zeros((4, 4)), other=np.zeros(1))
    content = file.read_bytes()
    file.write_bytes(content[:size] if size >= 0 else content[:200] + bytes(50) + content[250:])
    found = read_examples(tmp_path, ExampleImages(split="test", mistakes=[row], explanations=[row]))
    assert set(found) <= {"mistakes"}
