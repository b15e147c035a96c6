"""Engines on machines of all kinds: which one runs them, and what the others are told. None of it needs a GPU."""

import dataclasses

import pytest
import torch
from helpers.engines import RTX, VERSIONS, engine_of, offered, parsed

from hfvit.errors import ModelError
from hfvit.trt.compatibility import Here, check_engine, driver_cuda, rebuild_line, this_machine

A10, H100, T4 = ("NVIDIA A10", "8.6"), ("NVIDIA H100", "9.0"), ("Tesla T4", "7.5")
MACHINE = Here(
    gpus=(A10,),
    versions=VERSIONS,
    missing={},
    targets=("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
    cuda="13.0",
    driver="13.1",
)


def test_a_machine_that_has_it_all_runs_the_engine(tmp_path):
    two = dataclasses.replace(MACHINE, gpus=(H100, A10))
    assert check_engine(engine_of(tmp_path), MACHINE) == 0
    assert check_engine(engine_of(tmp_path), MACHINE, "cuda") == 0
    assert check_engine(engine_of(tmp_path), two, "cuda:1") == 1
    assert check_engine(engine_of(tmp_path, "tensorrt"), MACHINE) == 0


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
        check_engine(engine_of(tmp_path), machine)
    message = str(raised.value)
    assert (
        "built with TensorRT for RTX 1.7.1.116 for GPUs of compute capability 8.6, 8.9 (fp16, batches of 1" in message
    )
    assert f"optimum-cli export onnx --model user/digits {tmp_path / 'onnx'}" in message
    assert offered(message).compute_capability == ["8.6", "8.9"]


def test_a_processor_is_no_device_for_an_engine(tmp_path):
    for device in ("cpu", "mps", "cuda:x"):
        with pytest.raises(ModelError, match=f"runs on a CUDA GPU, not on '{device}'"):
            check_engine(engine_of(tmp_path), MACHINE, device)
    with pytest.raises(ModelError, match=r"there is no 'cuda:1' here; PyTorch sees 1 GPU"):
        check_engine(engine_of(tmp_path), MACHINE, "cuda:1")


def test_another_gpu_is_told_how_to_build_for_it(tmp_path):
    machine = dataclasses.replace(MACHINE, gpus=(T4,))
    with pytest.raises(ModelError, match=r"Here is Tesla T4 of compute capability 7\.5") as raised:
        check_engine(engine_of(tmp_path), machine)
    assert offered(str(raised.value)).compute_capability == ["7.5"]
    with pytest.raises(ModelError, match=r"H100 of compute capability 9\.0, for which TensorRT for RTX") as raised:
        check_engine(engine_of(tmp_path), dataclasses.replace(MACHINE, gpus=(H100,)))
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
    engine = engine_of(tmp_path, "tensorrt", options={"hardware_compatibility": level})
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
        check_engine(engine_of(tmp_path), only)
    assert "version 1.7.1.116" in str(raised.value)
    again = offered(str(raised.value))
    assert (again.backend, again.compute_capability) == ("tensorrt", ())
    with pytest.raises(ModelError, match="NVIDIA's package index"):
        check_engine(engine_of(tmp_path, "tensorrt"), dataclasses.replace(MACHINE, versions={}))


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
    engine = engine_of(tmp_path, backend, options={"version_compatible": compatible})
    engine.record.backend.version = built
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
        check_engine(engine_of(tmp_path), machine)
    unknown = engine_of(tmp_path, backend="tensorrt")
    unknown.record.backend.cuda = None
    assert check_engine(unknown, machine) == 0


def test_an_engine_with_code_of_its_own_is_loaded_when_asked_for_alone(tmp_path):
    engine = engine_of(tmp_path, "tensorrt", options={"version_compatible": True})
    with pytest.raises(ModelError, match="trust_remote_code=True") as raised:
        check_engine(engine, MACHINE)
    assert not offered(str(raised.value)).version_compatible
    assert check_engine(engine, MACHINE, allow_code=True) == 0


def test_the_command_asks_for_what_the_engine_was_built_with(tmp_path):
    options = {
        "workspace": 2**29, "optimization_level": 4, "calibration_dataset": "owner/pictures",
        "calibration_split": None, "calibration_samples": 64,
    }  # fmt: skip
    again = parsed(rebuild_line(engine_of(tmp_path, options=options, dtype="int8")))
    assert (again.model, again.output) == ("user/digits", str(tmp_path / "engine"))
    assert (again.dtype, again.backend, again.compute_capability) == ("int8", "tensorrt_rtx", ["8.6", "8.9"])
    assert (again.min_batch, again.opt_batch, again.max_batch) == (1, 8, 64)
    assert (again.workspace, again.optimization_level) == (2**29, 4)
    assert (again.calibration_dataset, again.calibration_split, again.calibration_samples) == (
        "owner/pictures",
        None,
        64,
    )
    triton = parsed(rebuild_line(engine_of(tmp_path, "tensorrt", "1/model.plan")))
    assert (triton.triton, triton.output) == ("engine", str(tmp_path))
    assert parsed(rebuild_line(engine_of(tmp_path, source="digits"))).model == "path/to/digits"
    assert parsed(rebuild_line(engine_of(tmp_path, dtype="fp8"))).model == "path/to/model_fp16.onnx"


def test_what_is_here_is_found():
    here = this_machine()
    assert bool(here.gpus) == torch.cuda.is_available()
    assert here.cuda == torch.version.cuda
    assert (driver_cuda() is None) <= (not here.gpus)
    assert set(here.versions) | set(here.missing) == {"tensorrt", "tensorrt_rtx"}
    if not isinstance(RTX, str):
        assert here.versions["tensorrt_rtx"] == RTX.version
        assert "8.6" in here.targets
