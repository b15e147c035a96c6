"""Record versions, GPU, FLOP/s of matrix products, memory bandwidth, and `hfvit doctor`."""

import platform
import subprocess
import time
import tomllib

import torch
from kit import CUDA, DEVICE, SOURCE, TINY, attempt, record, synchronize
from packaging.requirements import Requirement

from hfvit.utils.environment import installed_versions

PACKAGES = (
    "torch", "torchvision", "timm", "transformers", "accelerate", "huggingface_hub", "datasets", "evaluate", "optimum",
    "onnx", "onnxruntime", "onnxruntime-gpu", "onnxscript", "safetensors", "tokenizers", "triton", "numpy", "scipy",
    "scikit-learn", "matplotlib", "pillow", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "psutil", "peft",
    "tensorboard", "pandas", "pyarrow", "filelock", "jinja2", "tensorrt", "tensorrt-rtx-cu13",
)  # fmt: skip
SMI_FIELDS = "name,driver_version,memory.total,clocks.max.sm,power.limit"
COPIES = 20


def versions() -> None:
    """Record the Python and package versions, and the GPU with its driver."""
    record(
        "facts",
        python=platform.python_version(),
        versions=installed_versions(PACKAGES),
        unmet_requirements=unmet_requirements(),
    )
    if not CUDA:
        return
    command = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"]
    properties = torch.cuda.get_device_properties(0)
    record(
        "facts",
        smi=subprocess.run(command, capture_output=True, text=True).stdout.strip(),
        capability=f"{properties.major}.{properties.minor}",
        sms=properties.multi_processor_count,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
    )


def unmet_requirements() -> list[str]:
    """Return the requirements of hfvit that are not installed, or in another version."""
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    unmet = []
    for requirement in map(Requirement, project["dependencies"]):
        found = installed_versions([requirement.name]).get(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            unmet.append(f"{requirement} (found: {found})")
    return unmet


def ceilings() -> None:
    """Record TFLOP/s of a large matrix product, burst and sustained, and TB/s of a copy in device memory."""
    from hfvit.utils.matmul import matmul_rate

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if CUDA:
        dtypes["fp16"] = torch.float16  # a CPU takes 20 seconds
    rates = {name: matmul_rate(DEVICE, dtype) / 1e12 for name, dtype in dtypes.items()}
    torch.set_float32_matmul_precision("high")
    rates["tf32"] = matmul_rate(DEVICE, torch.float32) / 1e12
    torch.set_float32_matmul_precision("highest")
    rates["bf16 sustained"] = sustained_rate() / 1e12
    record("facts", tflops=rates, copy_tb_s=copy_rate() / 1e12)


def sustained_rate() -> float:
    """Measure sustained FLOP/s of bf16 matrix products, over ten times the length of a burst."""
    side, count = (8192, 400) if CUDA and not TINY else (512, 4)
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        a @ b
    synchronize()
    return count * 2 * side**3 / (time.perf_counter() - start)


def copy_rate() -> float:
    """Measure bytes per second, read and written, of a copy in device memory."""
    source = torch.empty(2**30 if CUDA and not TINY else 2**20, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    synchronize()
    start = time.perf_counter()
    for _ in range(COPIES):
        target.copy_(source)
    synchronize()
    return COPIES * 2 * source.numel() / (time.perf_counter() - start)


def doctor() -> None:
    """Record the report of `hfvit doctor`."""
    from hfvit.doctor import report

    text = report()
    print(text, flush=True)
    record("facts", doctor=text.splitlines())


def main() -> None:
    attempt("facts", "versions", versions)
    attempt("facts", "ceilings", ceilings)
    attempt("facts", "doctor", doctor)


if __name__ == "__main__":
    main()
