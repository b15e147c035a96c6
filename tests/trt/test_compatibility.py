"""Engine compatibility with simulated machines, without a GPU."""

import dataclasses

import pytest
import torch
from helpers.engines import RTX, VERSIONS, engine_of
from helpers.messages import assert_names

from hfvit.errors import ModelError
from hfvit.trt.api import INSTALL
from hfvit.trt.compatibility import Machine, check_engine, driver_cuda, this_machine

A10, H100, T4 = ("NVIDIA A10", "8.6"), ("NVIDIA H100", "9.0"), ("Tesla T4", "7.5")
MACHINE = Machine(
    gpus=(A10,),
    versions=VERSIONS,
    missing={},
    targets=("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
    cuda="13.0",
    driver="13.1",
)


def test_check_engine_on_suitable_machine_returns_the_gpu(tmp_path):
    two = dataclasses.replace(MACHINE, gpus=(H100, A10))
    assert check_engine(engine_of(tmp_path), MACHINE) == 0
    assert check_engine(engine_of(tmp_path), MACHINE, "cuda") == 0
    assert check_engine(engine_of(tmp_path), two, "cuda:1") == 1
    assert check_engine(engine_of(tmp_path, "tensorrt"), MACHINE) == 0


@pytest.mark.parametrize(
    ("here", "data"),
    [
        ({"cuda": None}, ["PyTorch", "CUDA"]),
        ({"driver": None}, ["driver"]),
        ({"driver": "12.4"}, ["CUDA 13.0", "CUDA 12.4"]),
        ({}, ["driver"]),
    ],
)
def test_check_engine_without_gpu_names_the_cause(tmp_path, here, data):
    machine = dataclasses.replace(MACHINE, gpus=(), **here)
    with pytest.raises(ModelError, match=r"\bGPU\b") as raised:
        check_engine(engine_of(tmp_path), machine)
    message = str(raised.value)
    assert_names(message, engine_of(tmp_path).file, *data, "1.7.1.116", "8.6, 8.9", "fp16", 1)
    assert "optimum-cli export onnx" in message
    assert "optimum-cli export tensorrt" in message


def test_check_engine_on_cpu_raises(tmp_path):
    for device in ("cpu", "mps", "cuda:x"):
        with pytest.raises(ModelError, match=f"^device: .*'{device}'"):
            check_engine(engine_of(tmp_path), MACHINE, device)
    with pytest.raises(ModelError, match=r"^device: .*'cuda:1'.*\b1\b"):
        check_engine(engine_of(tmp_path), MACHINE, "cuda:1")


def test_check_engine_on_other_gpu_raises(tmp_path):
    machine = dataclasses.replace(MACHINE, gpus=(T4,))
    with pytest.raises(ModelError, match=r"\bTesla T4\b.*\b7\.5\b"):
        check_engine(engine_of(tmp_path), machine)
    with pytest.raises(ModelError, match=r"\bH100\b.*\b9\.0\b.*--backend tensorrt"):
        check_engine(engine_of(tmp_path), dataclasses.replace(MACHINE, gpus=(H100,)))


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
def test_check_engine_with_hardware_compatibility(tmp_path, level, gpu, runs):
    engine = engine_of(tmp_path, "tensorrt", options={"hardware_compatibility": level})
    machine = dataclasses.replace(MACHINE, gpus=(gpu,))
    if runs:
        assert check_engine(engine, machine) == 0
        return
    with pytest.raises(ModelError, match=f"{gpu[0]}.*{gpu[1]}"):
        check_engine(engine, machine)


def test_check_engine_without_backend_names_the_package(tmp_path):
    only = dataclasses.replace(
        MACHINE, versions={"tensorrt": "11.2.0.10"}, missing={"tensorrt_rtx": "No module named 'tensorrt_rtx'"}
    )
    with pytest.raises(ModelError, match=r"No module named 'tensorrt_rtx'.*pip install tensorrt-rtx-cu13") as raised:
        check_engine(engine_of(tmp_path), only)
    assert_names(raised.value, "1.7.1.116", "11.2.0.10")
    with pytest.raises(ModelError) as raised:
        check_engine(engine_of(tmp_path, "tensorrt"), dataclasses.replace(MACHINE, versions={}))
    assert INSTALL["tensorrt"] in str(raised.value)


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
def test_check_engine_with_other_version(tmp_path, backend, built, here, compatible, runs):
    engine = engine_of(tmp_path, backend, options={"version_compatible": compatible})
    engine.record.backend.version = built
    machine = dataclasses.replace(MACHINE, versions={backend: here})
    if runs:
        assert check_engine(engine, machine, allow_code=True) == 0
        return
    with pytest.raises(ModelError) as raised:
        check_engine(engine, machine)
    assert_names(raised.value, engine.file, here, built)


def test_check_engine_with_old_driver_raises(tmp_path):
    machine = dataclasses.replace(MACHINE, cuda="12.8", driver="12.8")
    with pytest.raises(ModelError, match=r"\bCUDA 13\b.*\bCUDA 12\.8\b"):
        check_engine(engine_of(tmp_path), machine)
    unknown = engine_of(tmp_path, backend="tensorrt")
    unknown.record.backend.cuda = None
    assert check_engine(unknown, machine) == 0


def test_check_engine_with_host_code_requires_allow_code(tmp_path):
    engine = engine_of(tmp_path, "tensorrt", options={"version_compatible": True})
    with pytest.raises(ModelError, match=r"trust_remote_code=True.*without --version_compatible"):
        check_engine(engine, MACHINE)
    assert check_engine(engine, MACHINE, allow_code=True) == 0


def test_this_machine_finds_gpus_and_packages():
    here = this_machine()
    assert bool(here.gpus) == torch.cuda.is_available()
    assert here.cuda == torch.version.cuda
    assert (driver_cuda() is None) <= (not here.gpus)
    assert set(here.versions) | set(here.missing) == {"tensorrt", "tensorrt_rtx"}
    if not isinstance(RTX, str):
        assert here.versions["tensorrt_rtx"] == RTX.version
        assert "8.6" in here.targets
