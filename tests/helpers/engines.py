"""Build engine records without a GPU."""

import pytest

from hfvit.artifacts.engine_record import EngineRecord
from hfvit.trt.api import load_backend
from hfvit.trt.compatibility import Engine

RTX = load_backend("tensorrt_rtx")
needs_rtx = [
    pytest.mark.tensorrt,
    pytest.mark.skipif(isinstance(RTX, str), reason=f"tensorrt_rtx cannot be imported: {RTX}"),
]
VERSIONS = {"tensorrt": "11.2.0.10", "tensorrt_rtx": "1.7.1.116"}


def engine_of(tmp_path, backend="tensorrt_rtx", file="model.engine", options=None, **values) -> Engine:
    content = {
        "source": "user/digits", "file": file, "sha256": "0" * 64, "bytes": 1, "dtype": "fp16",
        "backend": {"name": backend, "version": VERSIONS[backend], "cuda": "13"},
        "compute_capabilities": ["8.6", "8.9"] if backend == "tensorrt_rtx" else ["8.6"],
        "profile": {key: [batch, 3, 16, 16] for key, batch in (("min", 1), ("opt", 8), ("max", 64))},
        "onnx": {"name": "model_fp16.onnx", "sha256": "0" * 64, "bytes": 1},
        "input": {"name": "pixel_values", "type": "FLOAT", "shape": [-1, 3, 16, 16]},
        "output": {"name": "logits", "type": "FLOAT", "shape": [-1, 3]},
        "network": {"layers": {}, "products": {}},
        "options": {
            "workspace": None, "optimization_level": None, "hardware_compatibility": "none",
            "version_compatible": False, **(options or {}),
        },
    }  # fmt: skip
    record = EngineRecord.from_json({**content, **values})
    return Engine(tmp_path / "engine", tmp_path / "engine" / file, record)
