"""Report the hardware, runtimes and precisions available on this machine."""

import platform
import re
from pathlib import Path

import torch

from hfvit.trt.api import INSTALL, NAMES, TITLES, Backend, load_backend, local_gpus
from hfvit.utils.environment import cores, hardware, installed_versions
from hfvit.utils.formatting import aligned, counted

LIBRARIES = ("hfvit", "torch", "transformers", "timm", "optimum", "onnx")
# Flags of /proc/cpuinfo with which a precision is faster than float32.
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
INT8_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}
DRIVER_FILE = Path("/proc/driver/nvidia/version")
CPU_FILE = Path("/proc/cpuinfo")


def report() -> str:
    """Return the report of `hfvit doctor`."""
    sections = [("machine", machine()), ("runtimes", runtimes()), ("precisions worth using", precisions())]
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in aligned(rows))]) for title, rows in sections)


def machine() -> list[tuple[str, str]]:
    """Describe CPU, GPUs, driver, system and library versions."""
    info = hardware()
    gpus = [f"{name}, compute capability {capability}" for name, capability in local_gpus()]
    return [
        ("processor", f"{info['processor']}, {counted(cores(), 'core')}"),
        *(("GPU", gpu) for gpu in gpus or ["none that PyTorch can use"]),
        ("driver", driver_version(DRIVER_FILE) or "no NVIDIA driver"),
        ("system", f"{info['system']}, Python {platform.python_version()}"),
        ("libraries", ", ".join(map(" ".join, installed_versions(LIBRARIES).items()))),
    ]


def runtimes() -> list[tuple[str, str]]:
    """Describe version and devices of each runtime, or how to install it."""
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return [
        ("PyTorch", f"{torch.__version__} ({cuda}{'' if torch.cuda.is_available() else ', no GPU in use'})"),
        ("ONNX Runtime", _onnx_runtime()),
        *((TITLES[name], _tensorrt(name)) for name in NAMES),
    ]


def precisions() -> list[tuple[str, str]]:
    """List the precisions worth using on the CPU and each GPU, fastest last."""
    flags = processor_flags(CPU_FILE)
    found = ["fp32"]
    if flags & BF16_FLAGS:
        found.append("bf16 (PyTorch)")
    found.append(f"int8 (ONNX Runtime){'' if flags & INT8_FLAGS else ', gains less without VNNI'}")
    rows = [("processor", ", ".join(found))]
    return rows + [(name, ", ".join(gpu_precisions(capability))) for name, capability in local_gpus()]


def gpu_precisions(capability: str) -> list[str]:
    """Return the precisions faster than float32 for a capability such as "8.6"."""
    level = tuple(map(int, capability.split(".")))
    lowest = {"tf32": (8, 0), "bf16": (8, 0), "fp16": (7, 0), "int8": (7, 5), "fp8": (8, 9)}
    found = [name for name, minimum in lowest.items() if level >= minimum]
    return found or ["fp32"]


def driver_version(file: Path) -> str | None:
    """Read the version of the NVIDIA driver from the kernel module's file, or None."""
    match = re.search(r"Kernel Module(?: for \S+)?\s+(\d[\d.]*)", file.read_text()) if file.is_file() else None
    return match[1] if match else None


def processor_flags(file: Path) -> set[str]:
    """Read the flags of the first core."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


def _onnx_runtime() -> str:
    import onnxruntime

    providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    hint = "" if "CUDA" in providers or not local_gpus() else "; for this GPU: pip install onnxruntime-gpu"
    return f"{onnxruntime.__version__} (execution providers: {', '.join(providers)}){hint}"


def _tensorrt(name: str) -> str:
    backend = load_backend(name)
    if not isinstance(backend, Backend):
        is_missing = f"No module named '{name}'" in backend
        return f"not installed: {INSTALL[name]}" if is_missing else f"cannot be imported: {backend}"
    cuda = f", CUDA {backend.cuda}" if backend.cuda else ""
    if backend.builds_without_gpu:
        builds = f"builds without a GPU, for {', '.join(backend.targets)}"
    else:
        builds = "builds on this GPU" if local_gpus() else "requires a GPU to build"
    return f"{backend.version}{cuda} ({builds})"
