"""ONNX Runtime execution providers: parsing, checks and caches."""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfvit.errors import ModelError, nearest, wrap_library_errors
from hfvit.utils.environment import installed_versions
from hfvit.utils.files import cache_folder, file_sha256

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT, RTX = "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"
RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
INSTALL = {
    CUDA: "pip install onnxruntime-gpu",
    TENSORRT: "pip install onnxruntime-gpu, and the version of TensorRT named in its documentation",
    RTX: "pip install onnxruntime-ep-nv-tensorrt-rtx",
    "DmlExecutionProvider": "pip install onnxruntime-directml",
    "OpenVINOExecutionProvider": "pip install onnxruntime-openvino",
}
# Packages whose versions invalidate cached engines and kernels.
BUILDERS = (
    "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-cu12", "tensorrt-cu13",
    "onnxruntime-ep-nv-tensorrt-rtx-cu12", "onnxruntime-ep-nv-tensorrt-rtx-cu13",
)  # fmt: skip

Providers = str | Sequence[str | tuple[str, dict[str, Any]]]


def parse_provider(text: str) -> tuple[str, dict[str, str]]:
    """Parse `NAME` or `NAME:key=value,key=value`; raises `ModelError` for other text."""
    name, colon, rest = text.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",")] if colon else []
    if not name or not all(key and equals for key, equals, _ in pairs):
        raise ModelError(f"--providers: must be NAME or NAME:key=value,key=value, got '{text}'.")
    return name, {key: value for key, _, value in pairs}


def checked_providers(
    providers: Providers, available: Sequence[str], known: Sequence[str]
) -> list[tuple[str, dict[str, str]]]:
    """Check execution providers and convert them to (name, options).

    Args:
        providers: names or (name, options).
        available: providers of the installed ONNX Runtime.
        known: providers of all builds of ONNX Runtime.

    Raises:
        ModelError: a provider is unknown, not installed, repeated, or of the wrong type.
    """
    providers = [providers] if isinstance(providers, str) else providers
    wanted = [(item, {}) if isinstance(item, str) else item for item in providers]
    for item in wanted:
        is_pair = isinstance(item, tuple | list) and len(item) == 2
        if not (is_pair and isinstance(item[0], str) and isinstance(item[1], dict)):
            raise ModelError(f"providers: must be names or (name, options), got {item!r}.")
    names = [name for name, _ in wanted]
    installed = ", ".join(available)
    if not wanted:
        raise ModelError(f"providers: must have at least one provider (found: {installed}).")
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ModelError(f"providers: {repeated} is repeated.")
    if TENSORRT in names and RTX in names:
        raise ModelError(f"providers: {TENSORRT} and {RTX} cannot be combined. Pass one of them.")
    for name in names:
        if name not in {*known, *available, RTX}:
            raise ModelError(
                f"providers: unknown provider '{name}'.{nearest(name, [*known, RTX])} Installed: {installed}."
            )
        if name not in available:
            source = INSTALL.get(name, "use a build of ONNX Runtime that has it")
            raise ModelError(f"providers: {name} is not installed (found: {installed}). To install it: {source}.")
    return [(name, {str(key): str(value) for key, value in options.items()}) for name, options in wanted]


def with_caches(chosen: list[tuple[str, dict[str, str]]], folder: Path) -> list[tuple[str, dict[str, str]]]:
    """Add default options that cache engines in `folder`."""
    defaults = {
        TENSORRT: {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(folder),
        },
        RTX: {"nv_runtime_cache_path": str(folder)},
    }
    return [(name, {**defaults.get(name, {}), **options}) for name, options in chosen]


def graph_cache(parts: Sequence[Path]) -> Path:
    """Return the engine cache folder of an ONNX file with external data.

    ONNX Runtime identifies a cached engine by the graph's names and structure but not its weights, so the folder
    depends on the content of `parts` and on the versions of `BUILDERS`.
    """
    digest = hashlib.sha256(json.dumps(installed_versions(BUILDERS), sort_keys=True).encode())
    for part in parts:
        digest.update(bytes.fromhex(file_sha256(part)))
    return cache_folder("onnxruntime") / digest.hexdigest()[:16]


def start_session(file: Path, parts: Sequence[Path], options, providers: Providers):
    """Create an ONNX Runtime session with execution providers.

    Args:
        file: ONNX file.
        parts: the file and its external data.
        options: `onnxruntime.SessionOptions`.
        providers: names or (name, options) by priority.

    Raises:
        ModelError: a provider is not installed, or ONNX Runtime would silently fall back from it.
    """
    import onnxruntime

    plugins = [RTX] if importlib.util.find_spec(RTX_PLUGIN) else []
    available = [*onnxruntime.get_available_providers(), *plugins]
    chosen = checked_providers(providers, available, onnxruntime.get_all_providers())
    names = [name for name, _ in chosen]
    if {TENSORRT, RTX} & set(names):
        folder = graph_cache(parts)
        folder.mkdir(parents=True, exist_ok=True)
        chosen = with_caches(chosen, folder)
    if RTX in names:
        register_plugin(onnxruntime)
        for name, settings in chosen:
            if name != CPU:  # implicit at the end of every session
                options.add_provider_for_devices([_device(onnxruntime, name, settings)], settings)
        chosen = None
    with wrap_library_errors(ModelError, f"{file} cannot be run with {', '.join(names)}"):
        session = onnxruntime.InferenceSession(file, options, providers=chosen)
    if absent := [name for name in names if name not in session.get_providers()]:
        raise ModelError(
            f"providers: ONNX Runtime could not start {', '.join(absent)} for {file} and fell back to"
            f" {', '.join(session.get_providers())}. See its messages above."
        )
    return session


def register_plugin(onnxruntime) -> None:
    """Register the TensorRT for RTX plugin with ONNX Runtime, once per process."""
    if any(device.ep_name == RTX for device in onnxruntime.get_ep_devices()):
        return
    with wrap_library_errors(ModelError, f"providers: {RTX} cannot be loaded"):
        plugin = importlib.import_module(RTX_PLUGIN)
        onnxruntime.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())


def _device(onnxruntime, name: str, settings: dict[str, str]):
    """Return the device with the `device_id` of the settings, or the first one."""
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    device_id = settings.get("device_id")
    found = [d for d in devices if device_id is None or dict(d.ep_options).get("device_id") == device_id]
    if not found:
        which = f" with device_id {device_id}" if device_id is not None and devices else ""
        raise ModelError(f"providers: {name} found no usable device{which}.")
    return found[0]
