"""Engines on a GPU: logits equal PyTorch's at any batch size, with and without CUDA graphs."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.images import LABELS, colored_image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import hfvit
from hfvit.artifacts.artifact import find_artifact
from hfvit.cli import main
from hfvit.errors import ModelError
from hfvit.export.onnx import export_onnx
from hfvit.export.quantization import quantize_onnx
from hfvit.trt.api import LOWEST, EngineOptions, find_backend, load_backend, local_gpus
from hfvit.trt.builder import build_engine
from hfvit.trt.runtime import TensorRTBackend

FOUND = [name for name in ("tensorrt_rtx", "tensorrt") if not isinstance(load_backend(name), str)]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.tensorrt,
    pytest.mark.skipif(not FOUND, reason="neither tensorrt nor tensorrt_rtx can be imported"),
]
SIZE, LARGEST = 32, 8
# Absolute, for logits up to about 4; TensorRT multiplies float32 in TF32.
TOLERANCE = {"fp32": 3e-2, "fp16": 5e-2, "int8": 0.8}
COUNTS = (1, 3, LARGEST, 2 * LARGEST + 3)


@pytest.fixture(scope="module")
def backend():
    """Return a backend that can build for the local GPU."""
    capability = local_gpus()[0][1]
    for name in FOUND:
        found = find_backend(name)
        if not found.builds_without_gpu or capability in found.targets:
            return found
    pytest.skip(f"tensorrt_rtx has no target {capability}, and tensorrt is not installed")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, image_size=SIZE,
        patch_size=8, id2label=dict(enumerate(LABELS)), initializer_range=0.2,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).standard_normal((max(COUNTS), 3, SIZE, SIZE), dtype=np.float32)


@pytest.fixture(scope="module")
def expected(checkpoint, pixels):
    """Return PyTorch's float32 logits on the CPU."""
    return hfvit.load_classifier(checkpoint, device="cpu").run(pixels)


@pytest.fixture(scope="module")
def engines(checkpoint, backend, pixels, tmp_path_factory):
    """Build an engine file by precision."""
    folder = tmp_path_factory.mktemp("engines")
    model = ViTForImageClassification.from_pretrained(checkpoint).eval()
    for dtype in ("fp32", "fp16"):
        export_onnx(model, folder / f"{dtype}.onnx", dtype=dtype)
    quantize_onnx(folder / "fp32.onnx", folder / "int8.onnx", runtime="tensorrt", calibration=[pixels])
    own = (local_gpus()[0][1],) if backend.builds_without_gpu else ()
    options = EngineOptions(1, 4, LARGEST, compute_capability=own)
    for dtype in TOLERANCE:
        build_engine(folder / f"{dtype}.onnx", folder / f"{dtype}.engine", backend, options, show_progress=False)
    return {dtype: folder / f"{dtype}.engine" for dtype in TOLERANCE}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_engine_logits_equal_pytorchs_at_any_batch_size(dtype, engines, backend, pixels, expected):
    engine = TensorRTBackend(backend, engines[dtype], len(LABELS))
    for _ in range(3):  # plain, captured, replayed
        for count in COUNTS:
            logits = engine(pixels[:count])
            assert logits.shape == (count, len(LABELS))
            assert logits.dtype == np.float32
            np.testing.assert_allclose(logits, expected[:count], atol=TOLERANCE[dtype])
    assert engine(pixels[:0]).shape == (0, len(LABELS))


def test_fp8_engine_logits_are_close_to_pytorchs(checkpoint, backend, pixels, expected, tmp_path):
    capability = local_gpus()[0][1]
    if tuple(map(int, capability.split("."))) < LOWEST["fp8"]:
        pytest.skip(f"compute capability {capability} has no FP8")
    export_onnx(ViTForImageClassification.from_pretrained(checkpoint).eval(), tmp_path / "fp32.onnx")
    quantize_onnx(tmp_path / "fp32.onnx", tmp_path / "fp8.onnx", mode="fp8", runtime="tensorrt", calibration=[pixels])
    own = (capability,) if backend.builds_without_gpu else ()
    options = EngineOptions(1, 4, LARGEST, compute_capability=own)
    build_engine(tmp_path / "fp8.onnx", tmp_path / "fp8.engine", backend, options, show_progress=False)
    engine = TensorRTBackend(backend, tmp_path / "fp8.engine", len(LABELS))
    np.testing.assert_allclose(engine(pixels), expected, atol=TOLERANCE["int8"])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_engine_with_cuda_graphs_gives_the_same_logits(dtype, engines, backend, pixels):
    plain = TensorRTBackend(backend, engines[dtype], len(LABELS), graphs=False)
    graphed = TensorRTBackend(backend, engines[dtype], len(LABELS))
    for turn in range(4):
        for count in (1, 3, LARGEST):
            given = np.roll(pixels, turn, axis=0)[:count]
            np.testing.assert_allclose(graphed(given), plain(given), rtol=0, atol=1e-5)
    assert plain._graphs is None
    assert list(graphed._graphs.graphs) == [1, 3, LARGEST]
    assert graphed._graphs.is_possible


def test_run_of_gpu_tensors_stays_on_the_gpu_in_stream_order(engines, backend, pixels, expected):
    """Synchronize with the caller's stream; accept strided tensors of any float type."""
    engine = TensorRTBackend(backend, engines["fp32"], len(LABELS))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(5):
            given = torch.zeros(max(COUNTS), 3, SIZE, SIZE, device="cuda")
            torch.cuda._sleep(1_000_000)
            given.copy_(torch.from_numpy(pixels))
            logits = engine.run(given)
            given.fill_(float("nan"))
            assert logits.is_cuda
            total = logits + 1
        np.testing.assert_allclose(total.cpu().numpy() - 1, expected, atol=TOLERANCE["fp32"])
        strided = torch.from_numpy(pixels).cuda().repeat_interleave(2, dim=0)[::2]
        np.testing.assert_allclose(engine.run(strided).cpu().numpy(), expected, atol=TOLERANCE["fp32"])
        half = torch.from_numpy(pixels).cuda().half()
        np.testing.assert_allclose(engine.run(half).cpu().numpy(), expected, atol=TOLERANCE["fp16"])


def test_engine_with_other_image_size_or_classes_raises(engines, backend, pixels):
    engine = TensorRTBackend(backend, engines["fp32"], len(LABELS))
    with pytest.raises(ModelError, match=r"\(3, 32, 32\).*\(3, 16, 16\)"):
        engine(pixels[:, :, :16, :16])
    with pytest.raises(ModelError, match=r"\bconfig\.json\b.*\b7\b"):
        TensorRTBackend(backend, engines["fp32"], 7)


def test_engine_kernel_cache_is_written_and_read(engines, backend, pixels, tmp_path):
    cache = tmp_path / "cache" / "engine.kernels"
    first = TensorRTBackend(backend, engines["fp32"], len(LABELS), cache=cache)(pixels[:3])
    assert cache.is_file() == backend.builds_without_gpu
    again = TensorRTBackend(backend, engines["fp32"], len(LABELS), cache=cache)(pixels[:3])
    np.testing.assert_allclose(again, first, rtol=0, atol=1e-5)
    if backend.builds_without_gpu:
        cache.write_bytes(b"no kernels")
        damaged = TensorRTBackend(backend, engines["fp32"], len(LABELS), cache=cache)(pixels[:3])
        np.testing.assert_allclose(damaged, first, rtol=0, atol=1e-5)


@pytest.fixture
def exported(checkpoint, backend, tmp_path):
    """Return the output folder of the export command, inside its checkpoint."""
    import argparse

    from hfvit.cli.export_tensorrt import add_arguments, export_tensorrt_command

    run = shutil.copytree(checkpoint, tmp_path / "run")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    own = ["--compute_capability", local_gpus()[0][1]] if backend.builds_without_gpu else []
    words = ["--model", run, run / "tensorrt", "--dtype", "fp16", "--max_batch", LARGEST, "--backend", backend.name]
    export_tensorrt_command(parser.parse_args([*map(str, words), *own]))
    return run / "tensorrt"


def command(*words) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code


def test_predict_and_validate_accept_an_engine(exported, colors, tmp_path, capsys):
    classifier = hfvit.load_classifier(exported)
    assert classifier.backend.device == "cuda:0"
    image = tmp_path / "red.png"
    colored_image(0, np.random.default_rng(0), SIZE).save(image)
    expected = hfvit.load_classifier(exported.parent, device="cpu").predict([image])[0]
    assert classifier.predict([image])[0] == pytest.approx(expected, abs=0.02)
    capsys.readouterr()
    assert command("predict", find_artifact(exported).file, image, "--json") == 0
    best = json.loads(capsys.readouterr().out)["predictions"][0]
    assert best["label"] == next(iter(expected))

    words = ("--dataset_name", colors, "--split", "test", "--max_accuracy_drop", 10)
    assert command("validate", exported.parent, exported, *words) == 0
    row = capsys.readouterr().out.splitlines()[2]
    assert row.startswith(str(exported))
    assert row.split()[-1] == "cuda:0"
    gate = json.loads((exported / "engine.json").read_text())["gate"]
    assert gate["passed"]
    assert gate["latency_ms_p50"] > 0
    hfvit.load_classifier(exported)  # the gate in engine.json does not invalidate the engine
