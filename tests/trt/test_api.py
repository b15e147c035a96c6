"""What a TensorRT backend can be asked for, said before anything is built."""

import pytest

from hfvit.errors import ModelError
from hfvit.trt.api import Backend, EngineOptions, check_options, check_precision, find_backend, load_backend

RTX = load_backend("tensorrt_rtx")
FULL = Backend("tensorrt", None, "11.0.0", "13")  # nothing of the module is asked before a build
GPU = [("NVIDIA A10", "8.6")]


@pytest.mark.parametrize(
    ("backend", "gpus", "options", "message"),
    [
        (RTX, [], {"min_batch": 4, "opt_batch": 2}, "must rise"),
        (RTX, [], {"optimization_level": 6}, "outside 0"),
        (RTX, [], {"hardware_compatibility": "all"}, "none of none, ampere_plus"),
        (RTX, [], {"compute_capability": ("9.0",)}, "has no target 9.0; it has 7.5, 8.0, .*--backend tensorrt"),
        (RTX, [], {"timing_cache": "cache"}, "measures nothing"),
        (RTX, [], {"version_compatible": True}, "build again after an upgrade"),
        (RTX, [], {"hardware_compatibility": "ampere_plus"}, "name those with --compute_capability"),
        (FULL, [], {}, "there is none here.*tensorrt_rtx"),
        (FULL, GPU, {"compute_capability": ("8.9",)}, "of compute capability 8.6"),
    ],
)
def test_what_a_backend_cannot_do_is_refused(backend, gpus, options, message):
    if isinstance(backend, str):
        pytest.skip(f"tensorrt_rtx cannot be imported: {backend}")
    with pytest.raises(ModelError, match=message):
        check_options(backend, EngineOptions(**options), gpus)


@pytest.mark.parametrize(
    ("dtype", "capabilities", "message"),
    [("bf16", ("7.5", "8.6"), "needs compute capability 8.0 for it, not 7.5"), ("fp8", ("8.6",), "int8 or fp16")],
)
def test_precisions_that_a_gpu_lacks_are_refused(dtype, capabilities, message):
    check_precision(FULL, dtype, ("8.9",))
    with pytest.raises(ModelError, match=message):
        check_precision(FULL, dtype, capabilities)
    check_precision(FULL, "int8", ("7.5",))


def test_full_tensorrt_takes_its_own_options():
    options = {"timing_cache": "cache", "version_compatible": True, "hardware_compatibility": "ampere_plus"}
    check_options(FULL, EngineOptions(compute_capability=("8.6",), **options), GPU)


def test_no_backend_says_what_to_install(monkeypatch):
    monkeypatch.setattr("sys.path", [])
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ModelError, match="pip install tensorrt-rtx-cu13"):
        find_backend()
    with pytest.raises(ModelError, match="none of auto"):
        find_backend("trt")
