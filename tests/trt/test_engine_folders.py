"""Engine folders: without a GPU, damaged, and found by path."""

import argparse
import json
import shutil

import pytest
import torch
from helpers.engines import RTX, engine_of, needs_rtx
from helpers.messages import assert_names
from helpers.onnx_graphs import write_configs, write_graph

import hfvit
from hfvit.artifacts.artifact import find_artifact
from hfvit.cli.export_tensorrt import add_arguments, export_tensorrt_command
from hfvit.errors import ModelError, run
from hfvit.trt.api import message_log
from hfvit.trt.compatibility import read_engine
from hfvit.trt.runtime import validity_error


@pytest.fixture(scope="module")
def checkpoint(stock):
    """Return a checkpoint with an engine in a subfolder."""
    if not isinstance(RTX, str):
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        words = ["--model", str(stock), str(stock / "tensorrt"), "--dtype", "fp16", "--max_batch", "16"]
        assert run(lambda: export_tensorrt_command(parser.parse_args(words))) == 0
    return stock


@pytest.fixture
def engine(checkpoint, tmp_path):
    """Return a copy of the engine's folder."""
    return shutil.copytree(checkpoint, tmp_path / checkpoint.name) / "tensorrt"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
class TestOnThisMachine:
    pytestmark = needs_rtx

    def test_load_classifier_of_engine_without_gpu_raises(self, engine):
        for path in (engine, str(engine), engine / "model.engine"):
            with pytest.raises(ModelError, match=r"\bGPU\b") as raised:
                hfvit.load_classifier(path)
            assert "\n" not in str(raised.value)
            assert_names(raised.value, engine / "model.engine", RTX.version)
        with pytest.raises(ModelError, match=r"^device: .*'cpu'"):
            hfvit.load_classifier(engine, device="cpu")

    def test_load_classifier_of_engine_with_other_bytes_raises(self, engine):
        good = (engine / "model.engine").read_bytes()
        (engine / "model.engine").write_bytes(b"damaged")
        with pytest.raises(ModelError, match=r"\b7 bytes\b"):
            hfvit.load_classifier(engine)
        (engine / "model.engine").write_bytes(good)
        with pytest.raises(ModelError, match=r"\bGPU\b") as raised:
            hfvit.load_classifier(engine)
        assert " bytes" not in str(raised.value)

    def test_validity_error_without_gpu_or_engine_gives_the_reason(self, checkpoint):
        """Check a valid engine and bytes that are not an engine."""
        log = message_log(RTX.module, False)
        runtime = RTX.module.Runtime(log)
        assert validity_error(RTX.module, runtime, b"no engine" * 20, log) == "malformed engine"
        blob = (checkpoint / "tensorrt" / "model.engine").read_bytes()
        assert "CUDA" in validity_error(RTX.module, runtime, blob, log)

    def test_predict_and_validate_of_engine_without_gpu_exit_with_2(self, engine, colors, capsys):
        from helpers.images import colored_image
        from numpy.random import default_rng

        from hfvit.cli import main

        image = engine / "red.png"
        colored_image(0, default_rng(0)).save(image)
        data = ["--dataset_name", str(colors), "--split", "test"]
        for words in (["predict", engine, image], ["validate", engine.parent, engine, *data]):
            with pytest.raises(SystemExit) as stop:
                main([str(word) for word in words])
            assert stop.value.code == 2
            error = capsys.readouterr().err
            assert error.count("hfvit: error: ") == 1
            assert_names(error, engine / "model.engine", "GPU")
            assert "Traceback" not in error


def change(folder, **values):
    path = folder / "engine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "data"),
    [
        (lambda e: (e / "engine.json").write_text("{"), ["engine.json", "JSON"]),
        (lambda e: (e / "engine.json").write_text("[]"), ["engine.json", "JSON"]),
        (lambda e: (e / "model.engine").unlink(), ["engine.json", "model.engine"]),
        (lambda e: change(e, file="../../elsewhere.engine"), ["engine.json", "../../elsewhere.engine"]),
        (lambda e: change(e, schema_version=99), ["engine.json", "schema_version"]),
        (lambda e: change(e, backend=None), ["engine.json", "backend"]),
        (lambda e: change(e, backend={"name": "other"}), ["engine.json", "backend.version"]),
        (lambda e: change(e, backend={"name": "other", "version": "1", "cuda": None}), ["engine.json", "'other'"]),
        (lambda e: change(e, options={}), ["engine.json", "options.hardware_compatibility"]),
        (lambda e: change(e, profile={"min": []}), ["engine.json", "profile.min"]),
        (lambda e: change(e, sha256="0" * 64), ["engine.json", "model.engine"]),
    ],
)
def test_load_classifier_from_a_damaged_engine_names_file_and_cause(tmp_path, damage, data):
    folder = write_configs(tmp_path / "engine")
    (folder / "model.engine").write_bytes(b"x")
    engine_of(tmp_path).record.save(folder)
    damage(folder)
    with pytest.raises(ModelError) as raised:
        hfvit.load_classifier(folder)
    assert_names(raised.value, folder, *data)
    assert "\n" not in str(raised.value)
    assert "optimum-cli export tensorrt" in str(raised.value)


def test_find_artifact_accepts_folder_and_engine_file(tmp_path):
    folder = write_configs(tmp_path / "engine")
    (folder / "1").mkdir()
    (folder / "1" / "model.plan").write_bytes(b"x")
    engine_of(tmp_path, "tensorrt", "1/model.plan").record.save(folder)
    for path in (folder, folder / "1" / "model.plan"):
        artifact = find_artifact(path)
        assert artifact.is_engine
        assert not artifact.is_checkpoint
        assert artifact.file == folder / "1" / "model.plan"
        assert artifact.source == str(folder)
    write_graph(folder / "model.onnx")  # an ONNX file in the folder takes precedence
    assert find_artifact(folder).file.name == "model.onnx"
    assert find_artifact(folder / "1" / "model.plan").is_engine
    with pytest.raises(ModelError, match=r"\b2\.engine\b"):
        find_artifact(folder / "2.engine")
    (folder / "engine.json").unlink()
    with pytest.raises(ModelError, match=r"\bmodel\.plan\b.*\bengine\.json\b"):
        read_engine(find_artifact(folder / "1" / "model.plan"))
