"""`optimum-cli export executorch` and its backend, against PyTorch."""

import json
import sys

import numpy as np
import pytest
from helpers.images import LABELS, colored_image
from helpers.models import build_model
from helpers.recipes import ARCHITECTURE, MICRO

import hfvit
from hfvit.artifacts.export_record import ExportRecord
from hfvit.cli.export_executorch import main
from hfvit.errors import ModelError
from hfvit.inference.executorch_backend import ExecuTorchBackend


def export(*words) -> int:
    """Run the command in this process and return its exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Write a checkpoint, and export it."""
    pytest.importorskip("executorch")
    folder = tmp_path_factory.mktemp("executorch") / "checkpoint"
    build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO).save_pretrained(folder)
    assert export("--model", folder, "--max_batch_size", 4, folder / "executorch") == 0
    return folder


def test_export_writes_a_checked_file_with_its_record(checkpoint):
    folder = checkpoint / "executorch"
    assert {path.name for path in folder.iterdir()} == {
        "model.pte", "config.json", "preprocessor_config.json", "export.json",
    }  # fmt: skip
    entry = ExportRecord.load(folder).files["model.pte"]
    assert entry.bytes == (folder / "model.pte").stat().st_size
    assert entry.parity.max_abs_difference < 1e-4
    assert entry.parity.images.max_abs_difference <= entry.parity.images.atol
    assert entry.parity.images.same_class == 1.0
    assert "opset" not in json.loads((folder / "export.json").read_text())["files"]["model.pte"]


@pytest.mark.parametrize("count", [1, 4, 7])
def test_classifier_returns_the_logits_of_the_checkpoint(checkpoint, count):
    images = [colored_image(index % 3, np.random.default_rng(index), size=20) for index in range(count)]
    classifier = hfvit.load_classifier(checkpoint / "executorch")
    assert isinstance(classifier.backend, ExecuTorchBackend)
    expected = hfvit.load_classifier(checkpoint, device="cpu").logits(images)
    np.testing.assert_allclose(classifier.logits(images), expected, atol=1e-4)


def test_unusable_file_raises_model_error(checkpoint):
    file = checkpoint / "executorch" / "model.pte"
    with pytest.raises(ModelError, match="4 classes"):
        ExecuTorchBackend(file, 4)
    with pytest.raises(ModelError, match=r"^device:"):
        ExecuTorchBackend(file, 3, device="cuda")
    with pytest.raises(ModelError, match="preprocessor_config"):
        ExecuTorchBackend(file, 3)(np.zeros((1, 3, 8, 8), np.float32))
    damaged = file.with_name("damaged.pte")
    damaged.write_bytes(b"no program")
    with pytest.raises(ModelError, match="damaged"):
        ExecuTorchBackend(damaged, 3)


def test_export_without_executorch_names_the_install_command(tmp_path, stock, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "executorch.runtime", None)
    assert export("--model", stock, tmp_path / "out") == 2
    assert 'pip install "hfvit[executorch]"' in capsys.readouterr().err
