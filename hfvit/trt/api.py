"""The installed TensorRT packages, their options, logger and progress monitor."""

import importlib
import re
import sys
from dataclasses import dataclass
from importlib.metadata import distributions
from threading import Event
from types import ModuleType

from tqdm import tqdm

from hfvit.errors import ModelError, one_line

NAMES = ("tensorrt", "tensorrt_rtx")
TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}
INSTALL = {
    "tensorrt": "pip install tensorrt, from NVIDIA's package index: see its installation guide",
    "tensorrt_rtx": "pip install tensorrt-rtx-cu13",
}
# What TensorRT for RTX builds for when no compute capability is named (its guide, "CPU-Only AOT").
RTX_DEFAULT = ("8.0", "8.6", "8.9", "12.0")
# The lowest compute capability that computes in a precision. For 7.5 TensorRT for RTX compiles no products in float32,
# nor with INT8 weights, whose products it has in float32 (1.7).
LOWEST = {"bf16": (8, 0), "fp8": (8, 9)}
LOWEST_RTX = {**LOWEST, "fp32": (8, 0), "int8": (8, 0)}
HARDWARE_LEVELS = ("none", "ampere_plus", "same_compute_capability")


@dataclass(frozen=True)
class Backend:
    """An importable TensorRT; `cuda` is the major version that its wheels were made for, None when unknown."""

    name: str
    module: ModuleType
    version: str
    cuda: str | None

    @property
    def title(self) -> str:
        return f"{TITLES[self.name]} {self.version}"

    @property
    def builds_without_gpu(self) -> bool:
        return self.name == "tensorrt_rtx"

    @property
    def targets(self) -> dict[str, object]:
        """Compute capabilities to build for, such as "8.6", with the enum's member."""
        members = self.module.ComputeCapability.__members__ if self.builds_without_gpu else {}
        found = {name: re.fullmatch(r"SM(\d+)(\d)", name) for name in members}
        return {f"{m[1]}.{m[2]}": members[name] for name, m in found.items() if m}


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built, but for its precision, which the ONNX graph holds.

    `workspace` is in bytes, the backend's own limit when None. `timing_cache` is a file that is read and written.
    """

    min_batch: int = 1
    opt_batch: int = 8
    max_batch: int = 64
    workspace: int | None = None
    compute_capability: tuple[str, ...] = ()
    timing_cache: str | None = None
    optimization_level: int | None = None
    hardware_compatibility: str = "none"
    version_compatible: bool = False


def load_backend(name: str) -> Backend | str:
    """The backend `name`, or the reason why it cannot be imported."""
    try:
        module = importlib.import_module(name)
    except Exception as error:  # missing libraries raise OSError, a wheel for another Python ImportError or others
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return Backend(name, module, module.__version__, _cuda_of_wheels(name))


def find_backend(wanted: str = "auto", needs_no_gpu: bool = False) -> Backend:
    """The backend `wanted`; by `auto` full TensorRT where it can build, else TensorRT for RTX.

    `needs_no_gpu` says that the engine is for GPUs that are not here. Raises `ModelError` where none can be imported.
    """
    if wanted not in ("auto", *NAMES):
        raise ModelError(f"--backend: '{wanted}' is none of auto, {', '.join(NAMES)}.")
    names = [wanted] if wanted != "auto" else list(NAMES)
    found = {name: load_backend(name) for name in names}
    usable = [backend for backend in found.values() if isinstance(backend, Backend)]
    if not usable:
        reasons = "; ".join(f"{name}: {reason} ({INSTALL[name]})" for name, reason in found.items())
        raise ModelError(f"No TensorRT can be imported here. {reasons}.")
    if needs_no_gpu or not local_gpus():
        usable.sort(key=lambda backend: not backend.builds_without_gpu)
    return usable[0]


def local_gpus() -> list[tuple[str, str]]:
    """Name and compute capability of each GPU here."""
    import torch

    indices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return [(torch.cuda.get_device_name(i), "{}.{}".format(*torch.cuda.get_device_capability(i))) for i in indices]


def check_options(backend: Backend, options: EngineOptions, gpus: list[tuple[str, str]]) -> None:
    """Raise `ModelError` for what `backend` cannot do on a machine with `gpus`, and name what works instead."""
    if not 1 <= options.min_batch <= options.opt_batch <= options.max_batch:
        raise ModelError(
            f"--min_batch {options.min_batch}, --opt_batch {options.opt_batch}, --max_batch {options.max_batch}:"
            " these must rise, from 1 on."
        )
    if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
        raise ModelError(f"--optimization_level: {options.optimization_level} is outside 0 (fast build) to 5.")
    if options.hardware_compatibility not in HARDWARE_LEVELS:
        raise ModelError(
            f"--hardware_compatibility: '{options.hardware_compatibility}' is none of {', '.join(HARDWARE_LEVELS)}."
        )
    (_check_rtx if backend.builds_without_gpu else _check_full)(backend, options, gpus)


def _check_full(backend: Backend, options: EngineOptions, gpus: list[tuple[str, str]]) -> None:
    if not gpus:
        raise ModelError(
            f"--backend: {backend.title} builds on the GPU that will run the engine, and there is none here. Build"
            f" there, or take --backend tensorrt_rtx ({INSTALL['tensorrt_rtx']}), which needs no GPU."
        )
    here = gpus[0][1]
    if options.compute_capability and options.compute_capability != (here,):
        raise ModelError(
            f"--compute_capability: {backend.title} builds for the GPU that is here, of compute capability {here}."
            " Leave it out (with --hardware_compatibility ampere_plus for other GPUs of that or a newer generation),"
            " or take --backend tensorrt_rtx."
        )


def _check_rtx(backend: Backend, options: EngineOptions, gpus: list[tuple[str, str]]) -> None:
    known = backend.targets
    for capability in options.compute_capability:
        if capability not in known:
            raise ModelError(
                f"--compute_capability: {backend.title} has no target {capability}; it has {', '.join(known)}. Other"
                " GPUs, such as a data centre's, take --backend tensorrt, on a machine that has one."
            )
    if options.timing_cache is not None:
        raise ModelError(
            f"--timing_cache: {backend.title} measures nothing while it builds, so a cache would change nothing; leave"
            " it out. (It compiles for the GPU when the engine is loaded.)"
        )
    if options.version_compatible:
        raise ModelError(
            f"--version_compatible: {backend.title} cannot; leave it out and build again after an upgrade, or take"
            " --backend tensorrt."
        )
    if options.hardware_compatibility != "none":
        raise ModelError(
            f"--hardware_compatibility: the engines of {backend.title} run on every compute capability that they were"
            f" built for; name those with --compute_capability [{' '.join(RTX_DEFAULT)}]."
        )


def check_precision(backend: Backend, dtype: str, capabilities: tuple[str, ...]) -> None:
    """Raise `ModelError` when GPUs of one of the `capabilities` do not compute in `dtype` with this backend."""
    wrong = [capability for capability in capabilities if _level(capability) < _lowest(backend, dtype)]
    if wrong:
        lowest = _lowest(backend, dtype)
        instead = "int8 or fp16" if dtype == "fp8" else "fp16"
        raise ModelError(
            f"--dtype {dtype}: {backend.title} needs compute capability {lowest[0]}.{lowest[1]} for it, not"
            f" {', '.join(wrong)}. Take --dtype {instead}, or leave out --compute_capability {' '.join(wrong)}."
        )


def target_capabilities(
    backend: Backend, options: EngineOptions, gpus: list[tuple[str, str]], dtype: str
) -> tuple[str, ...]:
    """The compute capabilities that an engine will run on: those named, or those of the backend that have `dtype`."""
    if options.compute_capability:
        return tuple(dict.fromkeys(options.compute_capability))
    if backend.builds_without_gpu:
        return tuple(capability for capability in RTX_DEFAULT if _level(capability) >= _lowest(backend, dtype))
    return (gpus[0][1],)


def _level(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))


def _lowest(backend: Backend, dtype: str) -> tuple[int, int]:
    return (LOWEST_RTX if backend.builds_without_gpu else LOWEST).get(dtype, (0, 0))


def _cuda_of_wheels(name: str) -> str | None:
    """13 for `tensorrt_rtx_cu13`, from the names of what is installed."""
    pattern = re.compile(rf"{name}_cu(\d+)(_bindings|_libs)?")
    names = ((d.metadata["Name"] or "").lower().replace("-", "_") for d in distributions())
    return next((match[1] for match in map(pattern.fullmatch, names) if match), None)


BAR = "{desc} {percentage:3.0f}% |{bar}| {elapsed}"


def message_log(trt, verbose: bool):
    """A logger that keeps errors for `reason()` and shows the rest on standard error when `verbose`."""

    class Log(trt.ILogger):
        def __init__(self):
            super().__init__()
            self.errors = []

        def log(self, severity, message) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(one_line(message))
            elif verbose:
                print(f"{trt.__name__}: {severity.name.lower()}: {message}", file=sys.stderr)

        def reason(self) -> str:
            """The first error, which causes those that follow."""
            return self.errors[0][:400] if self.errors else "it gives no reason; --verbose shows what it did."

    return Log()


def build_progress(trt, stopped: Event, show: bool):
    """A progress monitor that draws one bar, on a terminal only, and ends the build once `stopped` is set."""

    class Progress(trt.IProgressMonitor):
        def __init__(self):
            super().__init__()
            self.percent = 0.0
            hidden = None if show else True
            self.bar = tqdm(total=100, desc="build", disable=hidden, leave=False, bar_format=BAR, miniters=0)
            self.phases = {}  # name -> [steps, done], outermost first; those that have begun and not ended

        def phase_start(self, phase_name, parent_phase, num_steps) -> None:
            self.phases[phase_name] = [max(num_steps, 1), 0]
            self.bar.set_description(phase_name, refresh=False)

        def step_complete(self, phase_name, step) -> bool:
            if phase_name in self.phases:
                self.phases[phase_name][1] = step + 1
                self._draw()
            return not stopped.is_set()

        def phase_finish(self, phase_name) -> None:
            self.phases.pop(phase_name, None)

        def _draw(self) -> None:
            """A phase counts inside the step of its parent that it is part of."""
            share = 0.0
            for steps, done in reversed(self.phases.values()):
                share = min(1.0, (done + share) / steps)
            self.percent = max(self.percent, 100 * share)
            self.bar.update(self.percent - self.bar.n)

        def close(self) -> None:
            self.bar.close()

    return Progress()
