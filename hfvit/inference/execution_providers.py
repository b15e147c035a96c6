"""ONNX Runtime execution providers: parsing, checks and caches."""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from hfvit.errors import ModelError, nearest, wrap_library_errors
from hfvit.utils.environment import installed_versions
from hfvit.utils.files import cache_folder, file_sha256

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT, RTX = "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"
RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
INSTALL = {
    CUDA: "pip install onnxruntime-gpu",
    TENSORRT: "pip install onnxruntime-gpu, and the version of TensorRT that it was made with (its documentation)",
    RTX: "pip install onnxruntime-ep-nv-tensorrt-rtx",
    "DmlExecutionProvider": "pip install onnxruntime-directml",
    "OpenVINOExecutionProvider": "pip install onnxruntime-openvino",
}
# What an engine or its kernels in a cache depend on, beside the graph.
BUILDERS = (
    "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-cu12", "tensorrt-cu13",
    "onnxruntime-ep-nv-tensorrt-rtx-cu12", "onnxruntime-ep-nv-tensorrt-rtx-cu13",
)  # fmt: skip

Providers = Sequence[str | tuple[str, dict]]


def parse_provider(text: str) -> tuple[str, dict[str, str]]:
    """`NAME` or `NAME:key=value,key=value` of a command line; raises `ModelError` for anything else."""
    name, colon, rest = text.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",")] if colon else []
    if not name or not all(key and equals for key, equals, _ in pairs):
        raise ModelError(f"--providers: '{text}' is not NAME or NAME:key=value,key=value.")
    return name, {key: value for key, _, value in pairs}


def checked_providers(
    providers: Providers, available: Sequence[str], known: Sequence[str]
) -> list[tuple[str, dict[str, str]]]:
    """`providers` as (name, options); raises `ModelError` for what is no provider, or none that is here.

    `available` are those of this ONNX Runtime, `known` the names that any build of it has.
    """
    wanted = [(item, {}) if isinstance(item, str) else item for item in providers]
    for item in wanted:
        is_pair = isinstance(item, tuple | list) and len(item) == 2
        if not (is_pair and isinstance(item[0], str) and isinstance(item[1], dict)):
            raise ModelError(f"providers: {item!r} is neither a name nor (name, options).")
    names = [name for name, _ in wanted]
    here = ", ".join(available)
    if not wanted:
        raise ModelError(f"providers: none is named; here are {here}.")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ModelError(f"providers: {twice} is named twice.")
    if TENSORRT in names and RTX in names:
        raise ModelError(f"providers: {TENSORRT} and {RTX} cannot serve one session; take one of them.")
    for name in names:
        if name not in {*known, *available, RTX}:
            raise ModelError(
                f"providers: ONNX Runtime knows no '{name}'.{nearest(name, [*known, RTX])} Here are {here}."
            )
        if name not in available:
            how = INSTALL.get(name, "a build of ONNX Runtime that has it")
            raise ModelError(f"providers: {name} is not here, but {here}. It comes with: {how}.")
    return [(name, {str(key): str(value) for key, value in options.items()}) for name, options in wanted]


def with_caches(chosen: list[tuple[str, dict[str, str]]], folder: Path) -> list[tuple[str, dict[str, str]]]:
    """The providers with their engines kept in `folder`, unless their options say otherwise."""
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
    """The cache folder of a graph in the files `parts`.

    ONNX Runtime finds a cached engine by the names and the structure of its graph, not by the weights, so each file
    has a folder of its own; and one for each set of versions that might not read each other's.
    """
    digest = hashlib.sha256(json.dumps(installed_versions(BUILDERS), sort_keys=True).encode())
    for part in parts:
        digest.update(bytes.fromhex(file_sha256(part)))
    return cache_folder("onnxruntime") / digest.hexdigest()[:16]


def start_session(file: Path, parts: Sequence[Path], options, providers: Providers):
    """An ONNX Runtime session of `file` (its external data are in `parts`, too) on `providers`, in their order.

    Raises `ModelError` for a provider that is not here or that ONNX Runtime would silently do without.
    """
    import onnxruntime

    available = [*onnxruntime.get_available_providers(), *([RTX] if _has_plugin() else [])]
    chosen = checked_providers(providers, available, onnxruntime.get_all_providers())
    names = [name for name, _ in chosen]
    if {TENSORRT, RTX} & set(names):
        folder = graph_cache(parts)
        folder.mkdir(parents=True, exist_ok=True)
        chosen = with_caches(chosen, folder)
    if RTX in names:
        register_plugin(onnxruntime)
        for name, settings in chosen:
            if name != CPU:  # which every session ends with
                options.add_provider_for_devices([_device(onnxruntime, name, settings)], settings)
        chosen = None
    with wrap_library_errors(ModelError, f"{file} cannot be run with {', '.join(names)}"):
        session = onnxruntime.InferenceSession(file, options, providers=chosen)
    if absent := [name for name in names if name not in session.get_providers()]:
        raise ModelError(
            f"providers: ONNX Runtime could not start {', '.join(absent)} for {file} and would take"
            f" {', '.join(session.get_providers())}; what it printed says why."
        )
    return session


def _has_plugin() -> bool:
    return importlib.util.find_spec(RTX_PLUGIN) is not None


def register_plugin(onnxruntime) -> None:
    """Make the plugin of TensorRT for RTX known to ONNX Runtime, once a process."""
    if any(device.ep_name == RTX for device in onnxruntime.get_ep_devices()):
        return
    with wrap_library_errors(ModelError, f"providers: {RTX} cannot be loaded here"):
        plugin = importlib.import_module(RTX_PLUGIN)
        onnxruntime.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())


def _device(onnxruntime, name: str, settings: dict[str, str]):
    """The device that a provider's `device_id` names, or its first."""
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    asked = settings.get("device_id")
    found = [d for d in devices if asked is None or dict(d.ep_options).get("device_id") == asked]
    if not found:
        which = f" with device_id {asked}" if asked is not None and devices else ""
        raise ModelError(f"providers: {name} finds no device{which} here that it can use.")
    return found[0]
