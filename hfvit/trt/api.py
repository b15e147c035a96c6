"""The installed TensorRT packages, their options, logger and progress monitor."""

import importlib
import re
import sys
from dataclasses import dataclass
from importlib.metadata import distributions
from threading import Event
from types import ModuleType

from tqdm import tqdm

from hfvit.errors import ModelError, one_line, printable_lines
from hfvit.utils.files import output_file

NAMES = ("tensorrt", "tensorrt_rtx")
TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}
INSTALL = {
    "tensorrt": "pip install tensorrt, from NVIDIA's package index: see its installation guide",
    "tensorrt_rtx": "pip install tensorrt-rtx-cu13",
}
# Default targets of TensorRT for RTX (its guide, "CPU-Only AOT").
RTX_DEFAULT = ("8.0", "8.6", "8.9", "12.0")
# Lowest compute capability by precision. TensorRT for RTX 1.7 compiles no float32 matrix product for 7.5.
LOWEST = {"bf16": (8, 0), "fp8": (8, 9)}
LOWEST_RTX = {**LOWEST, "fp32": (8, 0)}
HARDWARE_LEVELS = ("none", "ampere_plus", "same_compute_capability")


@dataclass(frozen=True)
class Backend:
    """Hold an imported TensorRT package.

    Args:
        name: package name, one of `NAMES`.
        module: the imported package.
        version: version of the package.
        cuda: CUDA major version of the installed wheels, None when unknown.
    """

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
        """Map target compute capabilities, such as "8.6", to `ComputeCapability`."""
        members = self.module.ComputeCapability.__members__ if self.builds_without_gpu else {}
        found = {name: re.fullmatch(r"SM(\d+)(\d)", name) for name in members}
        return {f"{m[1]}.{m[2]}": members[name] for name, m in found.items() if m}


@dataclass(frozen=True)
class EngineOptions:
    """Hold the build options of an engine; its precision is that of the ONNX graph.

    Args:
        min_batch: smallest batch size of the optimization profile.
        opt_batch: batch size that the kernels are tuned for.
        max_batch: largest batch size of the optimization profile.
        workspace: memory limit of the build in bytes; None is the backend's own limit.
        compute_capability: target GPUs, such as ("8.6",); empty for the backend's default.
        timing_cache: file to read and update, or None.
        optimization_level: 0 (fastest build) to 5, None for the backend's default.
        hardware_compatibility: one of `HARDWARE_LEVELS`.
        version_compatible: whether newer versions of TensorRT have to run the engine.
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
    """Import the backend `name`; returns the reason as a string when that fails."""
    try:
        module = importlib.import_module(name)
    except Exception as error:  # OSError for a missing library, ImportError and others for a wrong wheel
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return Backend(name, module, module.__version__, _cuda_of_wheels(name))


def find_backend(wanted: str = "auto", needs_no_gpu: bool = False) -> Backend:
    """Import a TensorRT backend.

    Args:
        wanted: a package of `NAMES`, or "auto": TensorRT where there is a GPU, else TensorRT for RTX.
        needs_no_gpu: prefer the backend that builds without a GPU, for engines that run on another machine.

    Raises:
        ModelError: `wanted` is unknown, or no backend can be imported.
    """
    if wanted not in ("auto", *NAMES):
        raise ModelError(f"--backend: must be one of auto, {', '.join(NAMES)}, got '{wanted}'.")
    names = [wanted] if wanted != "auto" else list(NAMES)
    found = {name: load_backend(name) for name in names}
    usable = [backend for backend in found.values() if isinstance(backend, Backend)]
    if not usable:
        reasons = "; ".join(f"{name}: {reason} ({INSTALL[name]})" for name, reason in found.items())
        raise ModelError(f"TensorRT cannot be imported. {reasons}.")
    if needs_no_gpu or not local_gpus():
        usable.sort(key=lambda backend: not backend.builds_without_gpu)
    return usable[0]


def local_gpus() -> list[tuple[str, str]]:
    """Return name and compute capability of each GPU that PyTorch sees."""
    import torch

    indices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return [(torch.cuda.get_device_name(i), "{}.{}".format(*torch.cuda.get_device_capability(i))) for i in indices]


def check_options(backend: Backend, options: EngineOptions, gpus: list[tuple[str, str]]) -> None:
    """Check that a backend can build with these options on this machine.

    Args:
        backend: the TensorRT package to build with.
        options: build options.
        gpus: name and compute capability of the local GPUs, as `local_gpus` returns them.

    Raises:
        ModelError: the message names the option and an alternative.
        HFViTError: the timing cache cannot be written.
    """
    if not 1 <= options.min_batch <= options.opt_batch <= options.max_batch:
        raise ModelError(
            "--min_batch, --opt_batch, --max_batch: must be positive and in ascending order, got"
            f" {options.min_batch}, {options.opt_batch}, {options.max_batch}."
        )
    if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
        raise ModelError(
            f"--optimization_level: must be between 0 (fastest build) and 5, got {options.optimization_level}."
        )
    if options.hardware_compatibility not in HARDWARE_LEVELS:
        raise ModelError(
            f"--hardware_compatibility: must be one of {', '.join(HARDWARE_LEVELS)}, got"
            f" '{options.hardware_compatibility}'."
        )
    if backend.builds_without_gpu:
        _check_rtx(backend, options)
    else:
        _check_full(backend, options, gpus)


def _check_full(backend: Backend, options: EngineOptions, gpus: list[tuple[str, str]]) -> None:
    if not gpus:
        raise ModelError(
            f"--backend: {backend.title} needs the GPU that will run the engine, but this machine has no GPU. Build"
            f" on that machine, or pass --backend tensorrt_rtx ({INSTALL['tensorrt_rtx']}), which needs no GPU."
        )
    local = gpus[0][1]
    if options.compute_capability and options.compute_capability != (local,):
        raise ModelError(
            f"--compute_capability: {backend.title} builds for the local GPU only, of compute capability {local}, got"
            f" {', '.join(options.compute_capability)}. Omit it (with --hardware_compatibility ampere_plus for GPUs of"
            " newer generations), or pass --backend tensorrt_rtx."
        )
    output_file(options.timing_cache, "--timing_cache")


def _check_rtx(backend: Backend, options: EngineOptions) -> None:
    known = backend.targets
    for capability in options.compute_capability:
        if capability not in known:
            raise ModelError(
                f"--compute_capability: {backend.title} has no target {capability} (found: {', '.join(known)}). For"
                " other GPUs, such as those of data centers, pass --backend tensorrt on a machine with that GPU."
            )
    if options.timing_cache is not None:
        raise ModelError(
            f"--timing_cache: not supported by {backend.title}, which compiles kernels when the engine is loaded."
            " Omit it."
        )
    if options.version_compatible:
        raise ModelError(
            f"--version_compatible: not supported by {backend.title}. Omit it and build again after an upgrade, or"
            " pass --backend tensorrt."
        )
    if options.hardware_compatibility != "none":
        raise ModelError(
            f"--hardware_compatibility: not supported by {backend.title}, got '{options.hardware_compatibility}'. List"
            f" the target GPUs with --compute_capability [{' '.join(RTX_DEFAULT)}]."
        )


def check_precision(backend: Backend, dtype: str, capabilities: tuple[str, ...]) -> None:
    """Check that all target GPUs support a precision.

    Args:
        backend: the TensorRT package to build with.
        dtype: fp32, fp16, bf16, int8 or fp8.
        capabilities: compute capabilities of the target GPUs.

    Raises:
        ModelError: a target GPU does not support `dtype` with this backend.
    """
    wrong = [capability for capability in capabilities if _level(capability) < _lowest(backend, dtype)]
    if wrong:
        lowest = _lowest(backend, dtype)
        instead = "int8 or fp16" if dtype == "fp8" else "fp16"
        raise ModelError(
            f"--dtype {dtype}: {backend.title} requires compute capability {lowest[0]}.{lowest[1]} or above, got"
            f" {', '.join(wrong)}. Pass --dtype {instead}, or omit --compute_capability {' '.join(wrong)}."
        )


def target_capabilities(
    backend: Backend, options: EngineOptions, gpus: list[tuple[str, str]], dtype: str
) -> tuple[str, ...]:
    """Return the compute capabilities to build an engine for.

    Args:
        backend: the TensorRT package to build with.
        options: build options; `compute_capability` takes precedence when set.
        gpus: name and compute capability of the local GPUs.
        dtype: precision, which limits the default targets to GPUs that support it.
    """
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
    """Read the CUDA version from the installed wheels: "13" for `tensorrt_rtx_cu13`."""
    pattern = re.compile(rf"{name}_cu(\d+)(_bindings|_libs)?")
    names = ((d.metadata["Name"] or "").lower().replace("-", "_") for d in distributions())
    return next((match[1] for match in map(pattern.fullmatch, names) if match), None)


BAR = "{desc} {percentage:3.0f}% |{bar}| {elapsed}"


def message_log(trt, verbose: bool):
    """Return a TensorRT logger that collects errors, and prints the rest if `verbose`."""

    class Log(trt.ILogger):
        def __init__(self):
            super().__init__()
            self.errors = []

        def log(self, severity, message) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(one_line(message))
            elif verbose:
                print(f"{trt.__name__}: {severity.name.lower()}: {printable_lines(str(message))}", file=sys.stderr)

        def reason(self) -> str:
            """Return the first error, which usually causes the others."""
            return self.errors[0][:400] if self.errors else "no reason reported. Pass --verbose to see the log."

    return Log()


def build_progress(trt, stopped: Event, show: bool):
    """Return a TensorRT progress monitor with one progress bar.

    Args:
        trt: the imported TensorRT package.
        stopped: the build is canceled once this event is set.
        show: draw the bar, if stderr is a terminal.
    """

    class Progress(trt.IProgressMonitor):
        def __init__(self):
            super().__init__()
            self.percent = 0.0
            hidden = None if show else True
            self.bar = tqdm(total=100, desc="build", disable=hidden, leave=False, bar_format=BAR, miniters=0)
            self.phases = {}  # running phases, outermost first: name -> [steps, completed steps]

        def phase_start(self, phase_name, parent_phase, num_steps) -> None:
            """Start a phase of the build, called by TensorRT.

            Args:
                phase_name: name of the phase.
                parent_phase: name of the enclosing phase, None for the outermost.
                num_steps: number of steps of the phase.
            """
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
            """Update the bar; a nested phase advances one step of its parent."""
            fraction = 0.0
            for steps, done in reversed(self.phases.values()):
                fraction = min(1.0, (done + fraction) / steps)
            self.percent = max(self.percent, 100 * fraction)
            self.bar.update(self.percent - self.bar.n)

        def close(self) -> None:
            self.bar.close()

    return Progress()
