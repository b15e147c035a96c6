"""Options that a TensorRT backend does not support, reported before the build."""

import pytest
from helpers.messages import assert_names, option_of

from hfvit.errors import HFViTError, ModelError
from hfvit.trt.api import Backend, EngineOptions, check_options, check_precision, find_backend, load_backend

RTX = load_backend("tensorrt_rtx")
FULL = Backend("tensorrt", None, "11.0.0", "13")  # the module is not used before the build
GPU = [("NVIDIA A10", "8.6")]


@pytest.mark.parametrize(
    ("backend", "gpus", "options", "option", "data"),
    [
        (RTX, [], {"min_batch": 4, "opt_batch": 2}, "min_batch, opt_batch, max_batch", [4, 2]),
        (RTX, [], {"optimization_level": 6}, "optimization_level", [6, 0, 5]),
        (RTX, [], {"hardware_compatibility": "all"}, "hardware_compatibility", ["'all'", "none, ampere_plus"]),
        (RTX, [], {"compute_capability": ("9.0",)}, "compute_capability", ["9.0", "7.5, 8.0", "--backend tensorrt"]),
        (RTX, [], {"timing_cache": "cache"}, "timing_cache", []),
        (RTX, [], {"version_compatible": True}, "version_compatible", ["--backend tensorrt"]),
        (RTX, [], {"hardware_compatibility": "ampere_plus"}, "hardware_compatibility", ["--compute_capability"]),
        (FULL, [], {}, "backend", ["--backend tensorrt_rtx"]),
        (FULL, GPU, {"compute_capability": ("8.9",)}, "compute_capability", ["8.6", "--backend tensorrt_rtx"]),
    ],
)
def test_check_options_of_unsupported_value_names_the_option(backend, gpus, options, option, data):
    if isinstance(backend, str):
        pytest.skip(f"tensorrt_rtx cannot be imported: {backend}")
    with pytest.raises(ModelError) as caught:
        check_options(backend, EngineOptions(**options), gpus)
    assert option_of(caught.value) == option
    assert_names(caught.value, *data)


@pytest.mark.parametrize(
    ("dtype", "capabilities", "data"),
    [("bf16", ("7.5", "8.6"), ["8.0", "7.5"]), ("fp8", ("8.6",), ["8.9", "8.6", "int8", "fp16"])],
)
def test_check_precision_of_unsupported_gpu_raises(dtype, capabilities, data):
    check_precision(FULL, dtype, ("8.9",))
    with pytest.raises(ModelError, match=f"^--dtype {dtype}: ") as caught:
        check_precision(FULL, dtype, capabilities)
    assert_names(caught.value, *data)
    check_precision(FULL, "int8", ("7.5",))


@pytest.mark.parametrize("place", [".", "missing/cache"])
def test_check_options_with_unwritable_timing_cache_names_the_option(place, tmp_path):
    with pytest.raises(HFViTError, match=r"^--timing_cache:"):
        check_options(FULL, EngineOptions(timing_cache=str(tmp_path / place)), GPU)
    assert not list(tmp_path.iterdir())


def test_check_options_of_full_tensorrt_accepts_its_options(tmp_path):
    options = {
        "timing_cache": str(tmp_path / "cache"),
        "version_compatible": True,
        "hardware_compatibility": "ampere_plus",
    }
    check_options(FULL, EngineOptions(compute_capability=("8.6",), **options), GPU)


def test_find_backend_without_packages_names_what_to_install(monkeypatch):
    monkeypatch.setattr("sys.path", [])
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ModelError, match="pip install tensorrt-rtx-cu13"):
        find_backend()
    with pytest.raises(ModelError, match=r"^--backend: .*\bauto, .*'trt'"):
        find_backend("trt")


@pytest.mark.parametrize(
    ("gpus", "needs_no_gpu", "name"),
    [(GPU, False, "tensorrt"), (GPU, True, "tensorrt_rtx"), ([], False, "tensorrt_rtx")],
)
def test_find_backend_auto_depends_on_gpu_and_target(monkeypatch, gpus, needs_no_gpu, name):
    monkeypatch.setattr("hfvit.trt.api.load_backend", lambda name: Backend(name, None, "1", "13"))
    monkeypatch.setattr("hfvit.trt.api.local_gpus", lambda: gpus)
    assert find_backend("auto", needs_no_gpu).name == name
