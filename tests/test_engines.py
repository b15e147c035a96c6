"""Engines on machines of all kinds: which one runs them, and what the others are told. None of it needs a GPU."""

import argparse
import dataclasses
import json
import shlex
import shutil

import pytest
import torch
from graphs import write_configs, write_graph

import hfvit
from hfvit.artefacts import find_artefact
from hfvit.engine_commands import add_arguments, export_tensorrt_command
from hfvit.engine_runtime import invalidity
from hfvit.engines import EngineFacts, Here, check_engine, driver_cuda, read_engine_facts, rebuild_line, this_machine
from hfvit.errors import ModelError, run
from hfvit.export.trt_backends import load_backend
from hfvit.export.trt_watch import message_log

RTX = load_backend("tensorrt_rtx")
needs_rtx = [
    pytest.mark.tensorrt,
    pytest.mark.skipif(isinstance(RTX, str), reason=f"tensorrt_rtx cannot be imported: {RTX}"),
]
A10, H100, T4 = ("NVIDIA A10", "8.6"), ("NVIDIA H100", "9.0"), ("Tesla T4", "7.5")
VERSIONS = {"tensorrt": "11.2.0.10", "tensorrt_rtx": "1.7.1.116"}
MACHINE = Here(
    gpus=(A10,),
    versions=VERSIONS,
    missing={},
    targets=("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
    cuda="13.0",
    driver="13.1",
)


def facts(tmp_path, backend="tensorrt_rtx", file="model.engine", options=None, **values) -> EngineFacts:
    held = {
        "source": "user/digits", "file": file, "sha256": "0" * 64, "bytes": 1, "dtype": "fp16",
        "backend": {"name": backend, "version": VERSIONS[backend], "cuda": "13"},
        "compute_capabilities": ["8.6", "8.9"] if backend == "tensorrt_rtx" else ["8.6"],
        "profile": {key: [batch, 3, 16, 16] for key, batch in (("min", 1), ("opt", 8), ("max", 64))},
        "onnx": {"name": "model_fp16.onnx"},
        "options": {
            "workspace": None, "optimization_level": None, "hardware_compatibility": "none",
            "version_compatible": False, **(options or {}),
        },
    }  # fmt: skip
    return EngineFacts(tmp_path / "engine", tmp_path / "engine" / file, {**held, **values})


def parsed(line: str) -> argparse.Namespace:
    """What the command makes of a line that a message offers."""
    words = shlex.split(line)
    assert words[:3] == ["optimum-cli", "export", "tensorrt"]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words[3:])


def offered(message: str) -> argparse.Namespace:
    line = message[message.index("optimum-cli export tensorrt") :]
    return parsed(line.split(" (or ")[0])


def test_a_machine_that_has_it_all_runs_the_engine(tmp_path):
    two = dataclasses.replace(MACHINE, gpus=(H100, A10))
    assert check_engine(facts(tmp_path), MACHINE) == 0
    assert check_engine(facts(tmp_path), MACHINE, "cuda") == 0
    assert check_engine(facts(tmp_path), two, "cuda:1") == 1
    assert check_engine(facts(tmp_path, "tensorrt"), MACHINE) == 0


@pytest.mark.parametrize(
    ("here", "why"),
    [
        ({"cuda": None}, "this PyTorch is built without CUDA"),
        ({"driver": None}, "there is no NVIDIA driver"),
        ({"driver": "12.4"}, r"PyTorch is for CUDA 13\.0, and the driver supports CUDA 12\.4"),
        ({}, "the driver shows no GPU"),
    ],
)
def test_without_a_gpu(tmp_path, here, why):
    machine = dataclasses.replace(MACHINE, gpus=(), **here)
    with pytest.raises(ModelError, match=rf"needs a CUDA GPU, and there is none here .*\({why}") as raised:
        check_engine(facts(tmp_path), machine)
    message = str(raised.value)
    assert (
        "built with TensorRT for RTX 1.7.1.116 for GPUs of compute capability 8.6, 8.9 (fp16, batches of 1" in message
    )
    assert f"optimum-cli export onnx --model user/digits {tmp_path / 'onnx'}" in message
    assert offered(message).compute_capability == ["8.6", "8.9"]


def test_a_processor_is_no_device_for_an_engine(tmp_path):
    for device in ("cpu", "mps", "cuda:x"):
        with pytest.raises(ModelError, match=f"runs on a CUDA GPU, not on '{device}'"):
            check_engine(facts(tmp_path), MACHINE, device)
    with pytest.raises(ModelError, match=r"there is no 'cuda:1' here; PyTorch sees 1 GPU"):
        check_engine(facts(tmp_path), MACHINE, "cuda:1")


def test_another_gpu_is_told_how_to_build_for_it(tmp_path):
    machine = dataclasses.replace(MACHINE, gpus=(T4,))
    with pytest.raises(ModelError, match=r"Here is Tesla T4 of compute capability 7\.5") as raised:
        check_engine(facts(tmp_path), machine)
    assert offered(str(raised.value)).compute_capability == ["7.5"]
    with pytest.raises(ModelError, match=r"H100 of compute capability 9\.0, for which TensorRT for RTX") as raised:
        check_engine(facts(tmp_path), dataclasses.replace(MACHINE, gpus=(H100,)))
    assert offered(str(raised.value)).backend == "tensorrt"


@pytest.mark.parametrize(
    ("level", "gpu", "runs"),
    [
        ("none", A10, True),
        ("none", H100, False),
        ("same_compute_capability", ("NVIDIA A40", "8.6"), True),
        ("same_compute_capability", H100, False),
        ("ampere_plus", H100, True),
        ("ampere_plus", ("NVIDIA RTX PRO 6000", "12.0"), True),
        ("ampere_plus", T4, False),
    ],
)
def test_hardware_compatibility(tmp_path, level, gpu, runs):
    engine = facts(tmp_path, "tensorrt", options={"hardware_compatibility": level})
    machine = dataclasses.replace(MACHINE, gpus=(gpu,))
    if runs:
        assert check_engine(engine, machine) == 0
        return
    with pytest.raises(ModelError, match=f"Here is {gpu[0]}") as raised:
        check_engine(engine, machine)
    assert offered(str(raised.value)).hardware_compatibility == level


def test_a_backend_that_is_not_installed(tmp_path):
    only = dataclasses.replace(
        MACHINE, versions={"tensorrt": "11.2.0.10"}, missing={"tensorrt_rtx": "No module named 'tensorrt_rtx'"}
    )
    with pytest.raises(ModelError, match=r"No module named 'tensorrt_rtx'.*pip install tensorrt-rtx-cu13") as raised:
        check_engine(facts(tmp_path), only)
    assert "version 1.7.1.116" in str(raised.value)
    again = offered(str(raised.value))
    assert (again.backend, again.compute_capability) == ("tensorrt", ())
    with pytest.raises(ModelError, match="NVIDIA's package index"):
        check_engine(facts(tmp_path, "tensorrt"), dataclasses.replace(MACHINE, versions={}))


@pytest.mark.parametrize(
    ("backend", "built", "here", "compatible", "runs"),
    [
        ("tensorrt_rtx", "1.7.1.116", "1.7.1.116", False, True),
        ("tensorrt_rtx", "1.7.1.116", "1.8.0.1", False, False),
        ("tensorrt", "11.1.0.1", "11.2.0.10", False, False),
        ("tensorrt", "11.1.0.1", "11.2.0.10", True, True),
        ("tensorrt", "11.2.0.10", "11.1.0.1", True, False),
        ("tensorrt", "10.9.0.34", "11.2.0.10", True, True),
        ("tensorrt", "11.2.0.10", "12.0.0.1", True, False),
        ("tensorrt", "8.6.1.6", "11.2.0.10", True, False),
    ],
)
def test_versions(tmp_path, backend, built, here, compatible, runs):
    engine = facts(tmp_path, backend, options={"version_compatible": compatible})
    engine.values["backend"]["version"] = built
    machine = dataclasses.replace(MACHINE, versions={backend: here})
    if runs:
        assert check_engine(engine, machine, allow_code=True) == 0
        return
    with pytest.raises(ModelError, match=f"Here is version {here}, and its engines run in that") as raised:
        check_engine(engine, machine)
    assert f"install version {built}" in str(raised.value)
    assert offered(str(raised.value)).version_compatible == compatible


def test_a_driver_that_is_too_old_for_the_backend(tmp_path):
    machine = dataclasses.replace(MACHINE, cuda="12.8", driver="12.8")
    with pytest.raises(ModelError, match=r"wheels are for CUDA 13, and the driver here supports CUDA 12\.8: update"):
        check_engine(facts(tmp_path), machine)
    unknown = facts(tmp_path, backend="tensorrt")
    unknown.values["backend"]["cuda"] = None
    assert check_engine(unknown, machine) == 0


def test_an_engine_with_code_of_its_own_is_loaded_when_asked_for_alone(tmp_path):
    engine = facts(tmp_path, "tensorrt", options={"version_compatible": True})
    with pytest.raises(ModelError, match="trust_remote_code=True") as raised:
        check_engine(engine, MACHINE)
    assert not offered(str(raised.value)).version_compatible
    assert check_engine(engine, MACHINE, allow_code=True) == 0


def test_the_command_asks_for_what_the_engine_was_built_with(tmp_path):
    options = {
        "workspace": 2**29, "optimization_level": 4, "calibration_dataset": "owner/pictures",
        "calibration_split": None, "calibration_samples": 64,
    }  # fmt: skip
    again = parsed(rebuild_line(facts(tmp_path, options=options, dtype="int8")))
    assert (again.model, again.output) == ("user/digits", str(tmp_path / "engine"))
    assert (again.dtype, again.backend, again.compute_capability) == ("int8", "tensorrt_rtx", ["8.6", "8.9"])
    assert (again.min_batch, again.opt_batch, again.max_batch) == (1, 8, 64)
    assert (again.workspace, again.optimization_level) == (2**29, 4)
    assert (again.calibration_dataset, again.calibration_split, again.calibration_samples) == (
        "owner/pictures",
        None,
        64,
    )
    triton = parsed(rebuild_line(facts(tmp_path, "tensorrt", "1/model.plan")))
    assert (triton.triton, triton.output) == ("engine", str(tmp_path))
    assert parsed(rebuild_line(facts(tmp_path, source="digits"))).model == "path/to/digits"
    assert parsed(rebuild_line(facts(tmp_path, dtype="fp8"))).model == "path/to/model_fp16.onnx"


@pytest.fixture(scope="module")
def checkpoint(stock):
    """A checkpoint with an engine below it."""
    if not isinstance(RTX, str):
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        words = ["--model", str(stock), str(stock / "tensorrt"), "--dtype", "fp16", "--max_batch", "16"]
        assert run(lambda: export_tensorrt_command(parser.parse_args(words))) == 0
    return stock


@pytest.fixture
def engine(checkpoint, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(checkpoint, tmp_path / checkpoint.name) / "tensorrt"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is of machines without a GPU")
class TestOnThisMachine:
    pytestmark = needs_rtx

    def test_an_engine_needs_a_gpu(self, engine):
        for path in (engine, str(engine), engine / "model.engine"):
            with pytest.raises(
                ModelError, match="needs a CUDA GPU, and there is none here that PyTorch can"
            ) as raised:
                hfvit.load_classifier(path)
            assert "\n" not in str(raised.value)
            assert RTX.version in str(raised.value)
        with pytest.raises(ModelError, match="not on 'cpu'"):
            hfvit.load_classifier(engine, device="cpu")

    def test_the_command_that_a_refusal_offers_builds_the_engine_again(self, engine, capsys):
        before = json.loads((engine / "engine.json").read_text())
        (engine / "model.engine").write_bytes(b"damaged")
        with pytest.raises(ModelError, match=r"has 7 bytes in place of [\d,]+\. It was built with") as raised:
            hfvit.load_classifier(engine)
        assert run(lambda: export_tensorrt_command(offered(str(raised.value)))) == 0
        after = json.loads((engine / "engine.json").read_text())
        same = ("source", "weights_sha256", "dtype", "profile", "compute_capabilities", "options", "labels", "backend")
        assert [after[key] for key in same] == [before[key] for key in same]
        with pytest.raises(ModelError, match="needs a CUDA GPU"):
            hfvit.load_classifier(engine)

    def test_tensorrts_own_look_at_an_engine_finds_no_gpu_or_no_engine(self, checkpoint):
        """Of an engine that is whole, and of bytes that are none."""
        log = message_log(RTX.module, False)
        runtime = RTX.module.Runtime(log)
        assert invalidity(RTX.module, runtime, b"no engine" * 20, log) == "malformed engine"
        blob = (checkpoint / "tensorrt" / "model.engine").read_bytes()
        assert "CUDA" in invalidity(RTX.module, runtime, blob, log)

    def test_predict_and_validate_say_so(self, engine, colours, capsys):
        from conftest import coloured_image
        from numpy.random import default_rng

        from hfvit.cli import main

        picture = engine / "red.png"
        coloured_image(0, default_rng(0)).save(picture)
        data = ["--dataset_name", str(colours), "--split", "test"]
        for words in (["predict", engine, picture], ["validate", engine.parent, engine, *data]):
            with pytest.raises(SystemExit) as stop:
                main([str(word) for word in words])
            assert stop.value.code == 2
            error = capsys.readouterr().err
            assert error.count("needs a CUDA GPU") == 1
            assert "Traceback" not in error


def change(folder, **values):
    path = folder / "engine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda e: (e / "engine.json").write_text("{"), "engine.json cannot be read"),
        (lambda e: (e / "engine.json").write_text("[]"), "engine.json cannot be read"),
        (lambda e: (e / "model.engine").unlink(), "names the engine model.engine, which is not there"),
        (lambda e: change(e, file="../../elsewhere.engine"), "which is not there"),
        (lambda e: change(e, backend=None), "is not what .* writes .TypeError"),
        (lambda e: change(e, backend={"name": "other"}), "is not what .* writes .KeyError"),
        (lambda e: change(e, options={}), "is not what .* writes .KeyError"),
        (lambda e: change(e, profile={"min": []}), "is not what .* writes"),
        (lambda e: change(e, sha256="0" * 64), "is not the engine that engine.json describes: it was changed"),
    ],
)
def test_damaged_folders_are_told_in_one_message(tmp_path, damage, message):
    folder = write_configs(tmp_path / "engine")
    (folder / "model.engine").write_bytes(b"x")
    (folder / "engine.json").write_text(json.dumps(facts(tmp_path).values))
    damage(folder)
    with pytest.raises(ModelError, match=message) as raised:
        hfvit.load_classifier(folder)
    assert "\n" not in str(raised.value)
    assert "optimum-cli export tensorrt --model" in str(raised.value)


def test_what_names_an_engine(tmp_path):
    folder = write_configs(tmp_path / "engine")
    (folder / "1").mkdir()
    (folder / "1" / "model.plan").write_bytes(b"x")
    held = facts(tmp_path, "tensorrt", "1/model.plan").values
    (folder / "engine.json").write_text(json.dumps(held))
    for path in (folder, folder / "1" / "model.plan"):
        artefact = find_artefact(path)
        assert artefact.is_engine
        assert not artefact.is_checkpoint
        assert artefact.file == folder / "1" / "model.plan"
        assert artefact.source == str(folder)
    write_graph(folder / "model.onnx")  # beside an ONNX file the engine is named by its own
    assert find_artefact(folder).file.name == "model.onnx"
    assert find_artefact(folder / "1" / "model.plan").is_engine
    with pytest.raises(ModelError, match="There is no file"):
        find_artefact(folder / "2.engine")
    (folder / "engine.json").unlink()
    with pytest.raises(ModelError, match=r"has no engine.json beside it"):
        read_engine_facts(find_artefact(folder / "1" / "model.plan"))


def test_what_is_here_is_found():
    here = this_machine()
    assert bool(here.gpus) == torch.cuda.is_available()
    assert here.cuda == torch.version.cuda
    assert (driver_cuda() is None) <= (not here.gpus)
    assert set(here.versions) | set(here.missing) == {"tensorrt", "tensorrt_rtx"}
    if not isinstance(RTX, str):
        assert here.versions["tensorrt_rtx"] == RTX.version
        assert "8.6" in here.targets
