"""Check an engine against this machine before it is loaded."""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from hfvit.artifacts.artifact import Artifact
from hfvit.artifacts.constants import ENGINE_RECORD_FILE
from hfvit.artifacts.engine_record import EngineRecord
from hfvit.artifacts.export_folder import file_digest
from hfvit.errors import ModelError
from hfvit.trt.api import INSTALL, NAMES, TITLES, Backend, load_backend, local_gpus

REBUILD = "Build the engine again on this machine with `optimum-cli export tensorrt`; its options are in engine.json."
SUPPORTED_ACROSS_MAJORS = {(10, 11), (8, 10)}  # for version-compatible engines (TensorRT's support matrix)


@dataclass(frozen=True)
class Engine:
    """Hold an engine file, its folder and its record (engine.json)."""

    folder: Path
    file: Path
    record: EngineRecord

    @property
    def backend(self) -> str:
        return self.record.backend.name

    @property
    def version(self) -> str:
        return self.record.backend.version

    def __str__(self) -> str:
        low, _, high = self.record.profile.batches
        gpus = ", ".join(self.record.compute_capabilities)
        if self.record.options.hardware_compatibility == "ampere_plus":
            gpus = "8.0 and above"
        batches = f"batches of {low} to {high}" if low < high else f"batches of {low}"
        return (
            f"{TITLES[self.backend]} {self.version} for GPUs of compute capability {gpus} ({self.record.dtype},"
            f" {batches})"
        )


@dataclass(frozen=True)
class Machine:
    """Describe what a machine has to run engines.

    Args:
        gpus: name and compute capability of each GPU.
        versions: version of each TensorRT package that can be imported.
        missing: reason why each other package cannot be imported.
        targets: compute capabilities that TensorRT for RTX builds for.
        cuda: CUDA version of PyTorch, such as "13.0", or None.
        driver: newest CUDA version that the driver supports, or None without a driver.
    """

    gpus: tuple[tuple[str, str], ...]
    versions: dict[str, str]
    missing: dict[str, str]
    targets: tuple[str, ...]
    cuda: str | None
    driver: str | None


def this_machine() -> Machine:
    """Describe this machine for `check_engine`."""
    found = {name: load_backend(name) for name in NAMES}
    installed = {name: backend for name, backend in found.items() if isinstance(backend, Backend)}
    rtx = installed.get("tensorrt_rtx")
    return Machine(
        gpus=tuple(local_gpus()),
        versions={name: backend.version for name, backend in installed.items()},
        missing={name: reason for name, reason in found.items() if isinstance(reason, str)},
        targets=tuple(rtx.targets) if rtx else (),
        cuda=torch.version.cuda,
        driver=driver_cuda(),
    )


def driver_cuda() -> str | None:
    """Return the newest CUDA version that the driver supports, None without a driver."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        version = ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(version)) == 0:
            return f"{version.value // 1000}.{version.value % 1000 // 10}"
    return None


def read_engine(artifact: Artifact) -> Engine:
    """Read engine.json and compare the engine file with its size and SHA-256.

    Raises:
        ModelError: there is no valid engine.json, or the file differs from it.
    """
    path = artifact.beside(ENGINE_RECORD_FILE)
    if path is None:
        raise ModelError(
            f"{artifact.file}: {ENGINE_RECORD_FILE} is missing beside the engine. Build it with: optimum-cli export"
            " tensorrt --model MODEL OUTPUT"
        )
    engine = Engine(path.parent, artifact.file, EngineRecord.load(path.parent))
    if engine.backend not in NAMES:
        raise ModelError(
            f"{path}: backend.name must be one of {', '.join(NAMES)}, got '{engine.backend}'."
            f" {EngineRecord.REMEDY.format(folder=path.parent)}"
        )
    record = engine.record
    size = artifact.file.stat().st_size
    if size != record.bytes or file_digest(artifact.file)["sha256"] != record.sha256:
        difference = "the SHA-256 differs"
        if size != record.bytes:
            difference = f"must have {record.bytes:,} bytes, got {size:,} bytes"
        raise ModelError(
            f"{artifact.file} does not match {ENGINE_RECORD_FILE}: {difference}. It was built with {engine}. Copy it"
            f" again, or: {REBUILD}"
        )
    return engine


def check_engine(engine: Engine, machine: Machine, device: str | None = None, allow_code: bool = False) -> int:
    """Check that a machine can run an engine.

    Args:
        engine: the engine and its record.
        machine: what the machine has, of `this_machine`.
        device: "cuda" or "cuda:N"; None is the first GPU.
        allow_code: accept version-compatible engines, which contain host code.

    Returns:
        The index of the GPU.

    Raises:
        ModelError: the machine cannot run the engine; reports GPU, then library, then driver.
    """
    kind, _, index = (device or "cuda").partition(":")
    if kind != "cuda" or not (index or "0").isdecimal():
        raise ModelError(f"device: must be a CUDA GPU to run the TensorRT engine {engine.file}, got '{device}'.")
    _check_gpu(engine, machine)
    number = int(index or 0)
    if number >= len(machine.gpus):
        raise ModelError(f"device: no GPU '{device}'; PyTorch sees {len(machine.gpus)} GPU(s), starting at cuda:0.")
    _check_capability(engine, machine, *machine.gpus[number])
    _check_backend(engine, machine)
    cuda = engine.record.backend.cuda
    if cuda and machine.driver and _level(machine.driver)[0] < int(cuda):
        raise ModelError(
            f"{_cannot(engine)} Its wheels are for CUDA {cuda}, but the driver supports CUDA {machine.driver}."
            f" Update the driver, or install wheels for CUDA {_level(machine.driver)[0]}. {REBUILD}"
        )
    if engine.record.options.version_compatible and not allow_code:
        raise ModelError(
            f"{_cannot(engine)} A version-compatible engine contains host code. If you trust its author, load it with"
            " hfvit.load_classifier(path, trust_remote_code=True); or build it again without --version_compatible"
            " (`optimum-cli export tensorrt`)."
        )
    return number


def _check_gpu(engine: Engine, machine: Machine) -> None:
    if machine.gpus:
        return
    if not machine.cuda:
        reason = "PyTorch was built without CUDA"
    elif not machine.driver:
        reason = "no NVIDIA driver found"
    elif _level(machine.driver)[0] < _level(machine.cuda)[0]:
        reason = f"PyTorch requires CUDA {machine.cuda}, but the driver supports CUDA {machine.driver}"
    else:
        reason = "the driver reports no GPU to this process"
    raise ModelError(
        f"{engine.file} needs a CUDA GPU that PyTorch can use ({reason}). It was built with {engine}. On a CPU use an"
        " ONNX file, from `optimum-cli export onnx`; for another GPU build the engine again on its machine, with"
        " `optimum-cli export tensorrt`."
    )


def _check_capability(engine: Engine, machine: Machine, name: str, capability: str) -> None:
    is_ampere_plus = engine.record.options.hardware_compatibility == "ampere_plus" and _level(capability) >= (8, 0)
    if is_ampere_plus or capability in engine.record.compute_capabilities:
        return
    if engine.backend == "tensorrt_rtx" and machine.targets and capability not in machine.targets:
        raise ModelError(
            f"{_cannot(engine)} The GPU is {name} of compute capability {capability}, which TensorRT for RTX does not"
            " support. Build the engine again on this machine with `optimum-cli export tensorrt --backend tensorrt`."
        )
    raise ModelError(f"{_cannot(engine)} The GPU is {name} of compute capability {capability}. {REBUILD}")


def _check_backend(engine: Engine, machine: Machine) -> None:
    if engine.backend not in machine.versions:
        other = next((name for name in NAMES if name in machine.versions), None)
        alternative = ""
        if other:
            alternative = f" Or use the installed {TITLES[other]} {machine.versions[other]}. {REBUILD}"
        raise ModelError(
            f"{_cannot(engine)} {TITLES[engine.backend]} cannot be imported"
            f" ({machine.missing.get(engine.backend, 'not installed')}): {INSTALL[engine.backend]}, version"
            f" {engine.version}.{alternative}"
        )
    version = machine.versions[engine.backend]
    if not _runs(engine, version):
        later = " or later" if engine.record.options.version_compatible else ""
        raise ModelError(
            f"{_cannot(engine)} It requires version {engine.version}{later}, but version {version} is installed."
            f" Install version {engine.version}. {REBUILD}"
        )


def _runs(engine: Engine, version: str) -> bool:
    if version == engine.version:
        return True
    if not engine.record.options.version_compatible or engine.backend != "tensorrt":
        return False
    built = _level(engine.version)
    installed = _level(version)
    same_major = installed[0] == built[0]
    return installed >= built and (same_major or (built[0], installed[0]) in SUPPORTED_ACROSS_MAJORS)


def _cannot(engine: Engine) -> str:
    return f"{engine.file} cannot run on this machine. It was built with {engine}."


def _level(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())
