"""Check an engine against this machine before it is loaded."""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from hfvit.artifacts.artifact import Artifact
from hfvit.artifacts.constants import ENGINE_RECORD_FILE
from hfvit.artifacts.engine_record import EngineRecord
from hfvit.artifacts.export_folder import file_facts
from hfvit.errors import ModelError
from hfvit.trt.api import INSTALL, NAMES, TITLES, Backend, load_backend, local_gpus

REBUILD = "Build the engine again on this machine with `optimum-cli export tensorrt`; its options are in engine.json."
SUPPORTED_ACROSS_MAJORS = {(10, 11), (8, 10)}  # of version-compatible engines, by TensorRT's support matrix


@dataclass(frozen=True)
class Engine:
    """An engine file, and engine.json of its `folder`."""

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
class Here:
    """What this machine has for an engine.

    `versions` are of the backends that can be imported, `missing` the reasons of the others; `targets` are the compute
    capabilities that TensorRT for RTX builds for. `cuda` is that of PyTorch, `driver` what the driver supports, such
    as "13.0"; both None where there is none.
    """

    gpus: tuple[tuple[str, str], ...]
    versions: dict[str, str]
    missing: dict[str, str]
    targets: tuple[str, ...]
    cuda: str | None
    driver: str | None


def this_machine() -> Here:
    """What `check_engine` asks of this machine."""
    found = {name: load_backend(name) for name in NAMES}
    installed = {name: backend for name, backend in found.items() if isinstance(backend, Backend)}
    rtx = installed.get("tensorrt_rtx")
    return Here(
        gpus=tuple(local_gpus()),
        versions={name: backend.version for name, backend in installed.items()},
        missing={name: reason for name, reason in found.items() if isinstance(reason, str)},
        targets=tuple(rtx.targets) if rtx else (),
        cuda=torch.version.cuda,
        driver=driver_cuda(),
    )


def driver_cuda() -> str | None:
    """The newest CUDA that the driver supports, asked of the driver itself; None without one."""
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
    """The engine at `artifact`; `ModelError` where engine.json, or the engine's own bytes, are not as built."""
    path = artifact.beside(ENGINE_RECORD_FILE)
    if path is None:
        raise ModelError(
            f"{artifact.file} has no {ENGINE_RECORD_FILE} beside it, which tells what can run it. Build it with:"
            " optimum-cli export tensorrt --model MODEL OUTPUT"
        )
    engine = Engine(path.parent, artifact.file, EngineRecord.load(path.parent))
    if engine.backend not in NAMES:
        raise ModelError(
            f"{path}: backend.name must be one of {', '.join(NAMES)}, got '{engine.backend}'."
            f" {EngineRecord.REMEDY.format(folder=path.parent)}"
        )
    record = engine.record
    size = artifact.file.stat().st_size
    if size != record.bytes or file_facts(artifact.file)["sha256"] != record.sha256:
        what = f"has {size:,} bytes in place of {record.bytes:,}" if size != record.bytes else "was changed"
        raise ModelError(
            f"{artifact.file} is not the engine that {ENGINE_RECORD_FILE} describes: it {what}. It was built with"
            f" {engine}. Copy it again, or else: {REBUILD}"
        )
    return engine


def check_engine(engine: Engine, here: Here, device: str | None = None, allow_code: bool = False) -> int:
    """The index of the GPU that runs the engine: that of `device`, or the first one.

    Raises `ModelError` for what keeps this machine from running it, the hardest to change first.
    """
    kind, _, index = (device or "cuda").partition(":")
    if kind != "cuda" or not (index or "0").isdecimal():
        raise ModelError(f"device: {engine.file} is a TensorRT engine, which runs on a CUDA GPU, not on '{device}'.")
    _check_gpu(engine, here)
    number = int(index or 0)
    if number >= len(here.gpus):
        raise ModelError(f"device: there is no '{device}' here; PyTorch sees {len(here.gpus)} GPU(s), from cuda:0 on.")
    _check_capability(engine, here, *here.gpus[number])
    _check_backend(engine, here)
    cuda = engine.record.backend.cuda
    if cuda and here.driver and _level(here.driver)[0] < int(cuda):
        raise ModelError(
            f"{_cannot(engine)} Its wheels are for CUDA {cuda}, and the driver here supports CUDA {here.driver}:"
            f" update the driver, or install wheels for CUDA {_level(here.driver)[0]}. {REBUILD}"
        )
    if engine.record.options.version_compatible and not allow_code:
        raise ModelError(
            f"{_cannot(engine)} A version-compatible engine carries code for the processor, its own runtime, and hfvit"
            " runs no code of a file unasked. Where you trust who built it, load it with"
            " hfvit.load_classifier(path, trust_remote_code=True); or build it again without --version_compatible"
            " (`optimum-cli export tensorrt`)."
        )
    return number


def _check_gpu(engine: Engine, here: Here) -> None:
    if here.gpus:
        return
    if not here.cuda:
        why = "this PyTorch is built without CUDA"
    elif not here.driver:
        why = "there is no NVIDIA driver"
    elif _level(here.driver)[0] < _level(here.cuda)[0]:
        why = f"PyTorch is for CUDA {here.cuda}, and the driver supports CUDA {here.driver}: update the driver"
    else:
        why = "the driver shows no GPU to this process"
    raise ModelError(
        f"{engine.file} needs a CUDA GPU, and there is none here that PyTorch can use ({why}). It was built with"
        f" {engine}. On a processor take an ONNX file, from `optimum-cli export onnx`; for another GPU build the"
        " engine again on its machine, with `optimum-cli export tensorrt`."
    )


def _check_capability(engine: Engine, here: Here, name: str, capability: str) -> None:
    is_wide = engine.record.options.hardware_compatibility == "ampere_plus" and _level(capability) >= (8, 0)
    if is_wide or capability in engine.record.compute_capabilities:
        return
    if engine.backend == "tensorrt_rtx" and here.targets and capability not in here.targets:
        raise ModelError(
            f"{_cannot(engine)} Here is {name} of compute capability {capability}, for which TensorRT for RTX builds"
            " nothing. Build the engine again on this machine with `optimum-cli export tensorrt --backend tensorrt`."
        )
    raise ModelError(f"{_cannot(engine)} Here is {name} of compute capability {capability}. {REBUILD}")


def _check_backend(engine: Engine, here: Here) -> None:
    if engine.backend not in here.versions:
        other = next((name for name in NAMES if name in here.versions), None)
        instead = f" Or use {TITLES[other]} {here.versions[other]}, which is here. {REBUILD}" if other else ""
        raise ModelError(
            f"{_cannot(engine)} {TITLES[engine.backend]} cannot be imported here"
            f" ({here.missing.get(engine.backend, 'it is not installed')}): {INSTALL[engine.backend]}, version"
            f" {engine.version}.{instead}"
        )
    version = here.versions[engine.backend]
    if not _runs(engine, version):
        later = " or later" if engine.record.options.version_compatible else ""
        raise ModelError(
            f"{_cannot(engine)} Here is version {version}, and its engines run in that version{later} alone: install"
            f" version {engine.version}. {REBUILD}"
        )


def _runs(engine: Engine, version: str) -> bool:
    if version == engine.version:
        return True
    if not engine.record.options.version_compatible or engine.backend != "tensorrt":
        return False
    built, here = _level(engine.version), _level(version)
    return here >= built and (here[0] == built[0] or (built[0], here[0]) in SUPPORTED_ACROSS_MAJORS)


def _cannot(engine: Engine) -> str:
    return f"{engine.file} cannot run here. It was built with {engine}."


def _level(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())
