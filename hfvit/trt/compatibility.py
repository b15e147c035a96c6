"""Check an engine against this machine before it is loaded."""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hfvit.artifacts.artifact import Artifact
from hfvit.artifacts.constants import ENGINE_FACTS_FILE
from hfvit.artifacts.export_folder import file_facts
from hfvit.errors import ModelError, one_line
from hfvit.trt.api import INSTALL, NAMES, TITLES, Backend, load_backend, local_gpus
from hfvit.utils.files import read_object

REBUILD = "Build the engine again on this machine with `optimum-cli export tensorrt`; its options are in engine.json."
SUPPORTED_ACROSS_MAJORS = {(10, 11), (8, 10)}  # of version-compatible engines, by TensorRT's support matrix


@dataclass(frozen=True)
class EngineFacts:
    """What engine.json holds of an engine. `folder` is where engine.json lies, `file` the engine itself."""

    folder: Path
    file: Path
    values: dict[str, Any]

    @property
    def backend(self) -> str:
        return self.values["backend"]["name"]

    @property
    def version(self) -> str:
        return self.values["backend"]["version"]

    @property
    def cuda(self) -> str | None:
        """The major version of CUDA that the backend's wheels were made for."""
        return self.values["backend"]["cuda"]

    @property
    def capabilities(self) -> list[str]:
        return self.values["compute_capabilities"]

    @property
    def compatibility(self) -> str:
        return self.values["options"]["hardware_compatibility"]

    @property
    def is_version_compatible(self) -> bool:
        return self.values["options"]["version_compatible"]

    @property
    def batches(self) -> list[int]:
        """Smallest, best and largest."""
        return [self.values["profile"][key][0] for key in ("min", "opt", "max")]

    def __str__(self) -> str:
        low, _, high = self.batches
        gpus = ", ".join(self.capabilities)
        if self.compatibility == "ampere_plus":
            gpus = "8.0 and above"
        batches = f"batches of {low} to {high}" if low < high else f"batches of {low}"
        return (
            f"{TITLES[self.backend]} {self.version} for GPUs of compute capability {gpus} ({self.values['dtype']},"
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


def read_engine_facts(artifact: Artifact) -> EngineFacts:
    """The facts of the engine at `artifact`; `ModelError` where they, or the engine's own bytes, are not as built."""
    path = artifact.beside(ENGINE_FACTS_FILE)
    if path is None:
        raise ModelError(
            f"{artifact.file} has no {ENGINE_FACTS_FILE} beside it, which tells what can run it. Build it with:"
            " optimum-cli export tensorrt --model MODEL OUTPUT"
        )
    facts = EngineFacts(path.parent, artifact.file, read_object(path))
    try:
        str(facts), facts.cuda, facts.is_version_compatible
        expected = {key: facts.values[key] for key in ("sha256", "bytes")}
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise ModelError(
            f"{path} is not what `optimum-cli export tensorrt` writes ({type(error).__name__}: {one_line(error)});"
            " build the engine again with: optimum-cli export tensorrt --model MODEL OUTPUT"
        ) from None
    size = artifact.file.stat().st_size
    if size != expected["bytes"] or file_facts(artifact.file)["sha256"] != expected["sha256"]:
        what = f"has {size:,} bytes in place of {expected['bytes']:,}" if size != expected["bytes"] else "was changed"
        raise ModelError(
            f"{artifact.file} is not the engine that {ENGINE_FACTS_FILE} describes: it {what}. It was built with"
            f" {facts}. Copy it again, or else: {REBUILD}"
        )
    return facts


def check_engine(facts: EngineFacts, here: Here, device: str | None = None, allow_code: bool = False) -> int:
    """The index of the GPU that runs the engine: that of `device`, or the first one.

    Raises `ModelError` for what keeps this machine from running it, the hardest to change first.
    """
    kind, _, index = (device or "cuda").partition(":")
    if kind != "cuda" or not (index or "0").isdecimal():
        raise ModelError(f"device: {facts.file} is a TensorRT engine, which runs on a CUDA GPU, not on '{device}'.")
    _check_gpu(facts, here)
    number = int(index or 0)
    if number >= len(here.gpus):
        raise ModelError(f"device: there is no '{device}' here; PyTorch sees {len(here.gpus)} GPU(s), from cuda:0 on.")
    _check_capability(facts, here, *here.gpus[number])
    _check_backend(facts, here)
    if facts.cuda and here.driver and _level(here.driver)[0] < int(facts.cuda):
        raise ModelError(
            f"{_cannot(facts)} Its wheels are for CUDA {facts.cuda}, and the driver here supports CUDA {here.driver}:"
            f" update the driver, or install wheels for CUDA {_level(here.driver)[0]}. {REBUILD}"
        )
    if facts.is_version_compatible and not allow_code:
        raise ModelError(
            f"{_cannot(facts)} A version-compatible engine carries code for the processor, its own runtime, and hfvit"
            " runs no code of a file unasked. Where you trust who built it, load it with"
            " hfvit.load_classifier(path, trust_remote_code=True); or build it again without --version_compatible"
            " (`optimum-cli export tensorrt`)."
        )
    return number


def _check_gpu(facts: EngineFacts, here: Here) -> None:
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
        f"{facts.file} needs a CUDA GPU, and there is none here that PyTorch can use ({why}). It was built with"
        f" {facts}. On a processor take an ONNX file, from `optimum-cli export onnx`; for another GPU build the engine"
        " again on its machine, with `optimum-cli export tensorrt`."
    )


def _check_capability(facts: EngineFacts, here: Here, name: str, capability: str) -> None:
    is_wide = facts.compatibility == "ampere_plus" and _level(capability) >= (8, 0)
    if is_wide or capability in facts.capabilities:
        return
    if facts.backend == "tensorrt_rtx" and here.targets and capability not in here.targets:
        raise ModelError(
            f"{_cannot(facts)} Here is {name} of compute capability {capability}, for which TensorRT for RTX builds"
            " nothing. Build the engine again on this machine with `optimum-cli export tensorrt --backend tensorrt`."
        )
    raise ModelError(f"{_cannot(facts)} Here is {name} of compute capability {capability}. {REBUILD}")


def _check_backend(facts: EngineFacts, here: Here) -> None:
    if facts.backend not in here.versions:
        other = next((name for name in NAMES if name in here.versions), None)
        instead = f" Or use {TITLES[other]} {here.versions[other]}, which is here. {REBUILD}" if other else ""
        raise ModelError(
            f"{_cannot(facts)} {TITLES[facts.backend]} cannot be imported here"
            f" ({here.missing.get(facts.backend, 'it is not installed')}): {INSTALL[facts.backend]}, version"
            f" {facts.version}.{instead}"
        )
    version = here.versions[facts.backend]
    if not _runs(facts, version):
        later = " or later" if facts.is_version_compatible else ""
        raise ModelError(
            f"{_cannot(facts)} Here is version {version}, and its engines run in that version{later} alone: install"
            f" version {facts.version}. {REBUILD}"
        )


def _runs(facts: EngineFacts, version: str) -> bool:
    if version == facts.version:
        return True
    if not facts.is_version_compatible or facts.backend != "tensorrt":
        return False
    built, here = _level(facts.version), _level(version)
    return here >= built and (here[0] == built[0] or (built[0], here[0]) in SUPPORTED_ACROSS_MAJORS)


def _cannot(facts: EngineFacts) -> str:
    return f"{facts.file} cannot run here. It was built with {facts}."


def _level(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())
