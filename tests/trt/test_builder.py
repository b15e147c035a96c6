"""Engines built without a GPU by TensorRT for RTX: precision, profile, errors, cleanup."""

import os
import signal
import threading

import numpy as np
import onnx
import pytest
import torch
from helpers.images import LABELS
from helpers.messages import assert_logged
from helpers.models import build_model
from helpers.onnx_graphs import write_graph
from onnx import TensorProto, helper

from hfvit.errors import ModelError
from hfvit.export.onnx import export_onnx
from hfvit.export.quantization import quantize_onnx
from hfvit.trt.api import Backend, EngineOptions, build_progress, load_backend, message_log
from hfvit.trt.builder import build_engine, check_types, network_info, parse, read_graph, save_timings

RTX = load_backend("tensorrt_rtx")
needs_rtx = pytest.mark.skipif(isinstance(RTX, str), reason=f"tensorrt_rtx cannot be imported: {RTX}")
FULL = Backend("tensorrt", None, "11.0.0", "13")  # the module is not used before the build
SIZE, DEPTH, WIDTH = 32, 2, 256
GPU = [("NVIDIA A10", "8.6")]
PRODUCTS = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "int8": "HALF"}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Export one small ViT in four precisions."""
    folder = tmp_path_factory.mktemp("graphs")
    torch.manual_seed(0)
    shape = {"patch_size": 8, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 4}
    model = build_model(LABELS, architecture="vit_tiny_patch16_224", image_size=SIZE, timm_kwargs=shape).eval()
    files = {dtype: folder / f"{dtype}.onnx" for dtype in PRODUCTS}
    for dtype in ("fp32", "fp16", "bf16"):
        export_onnx(model, files[dtype], dtype=dtype)
    images = np.random.default_rng(0).standard_normal((8, 3, SIZE, SIZE), dtype=np.float32)
    quantize_onnx(files["fp32"], files["int8"], runtime="tensorrt", calibration=[images[:4], images[4:]])
    return files


@pytest.fixture(scope="module")
def engines(graphs, tmp_path_factory):
    """Build an engine of each graph; returns file and record by precision."""
    folder = tmp_path_factory.mktemp("engines")
    options = EngineOptions(min_batch=1, opt_batch=4, max_batch=16, workspace=2**28, optimization_level=2)
    return {
        dtype: (folder / f"{dtype}.engine", build_engine(path, folder / f"{dtype}.engine", RTX, options))
        for dtype, path in graphs.items()
    }


def network(path):
    """Return the parsed network, and the builder and log that must outlive it."""
    log = message_log(RTX.module, False)
    builder = RTX.module.Builder(log)
    return parse(RTX.module, builder, path, log), builder, log


@needs_rtx
@pytest.mark.tensorrt
@pytest.mark.parametrize("dtype", PRODUCTS)
def test_build_engine_keeps_the_precision_of_the_graph(engines, dtype):
    path, record = engines[dtype]
    assert record.dtype == dtype
    linears = 4 * DEPTH + 2  # query-key-value, projection, two of the MLP in each block; the head and the patches
    products = record.network.products
    assert sum(products.values()) == linears + 2 * DEPTH
    assert products[PRODUCTS[dtype]] >= linears + 2 * DEPTH - (
        dtype == "bf16"
    )  # ONNX has no bf16 Conv before opset 22
    layers = record.network.layers
    assert layers["NORMALIZATION"] == 2 * DEPTH + 1
    assert layers.get("DEQUANTIZE", 0) == (2 * linears if dtype == "int8" else 0)
    assert record.bytes == path.stat().st_size > 0
    assert record.profile.to_json() == {
        "min": [1, 3, SIZE, SIZE], "opt": [4, 3, SIZE, SIZE], "max": [16, 3, SIZE, SIZE],
    }  # fmt: skip
    assert record.input.to_json() == {"name": "pixel_values", "type": "FLOAT", "shape": [-1, 3, SIZE, SIZE]}
    assert record.output.to_json() == {"name": "logits", "type": "FLOAT", "shape": [-1, len(LABELS)]}
    assert record.compute_capabilities == ["8.0", "8.6", "8.9", "12.0"]
    assert record.backend.to_json() == {"name": "tensorrt_rtx", "version": RTX.version, "cuda": RTX.cuda}
    assert {file.name for file in path.parent.iterdir()} == {f"{name}.engine" for name in PRODUCTS}


@needs_rtx
@pytest.mark.tensorrt
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_parse_keeps_layer_norm_and_softmax_in_float32(graphs, dtype):
    parsed, *_ = network(graphs[dtype])
    layers = [parsed.get_layer(index) for index in range(parsed.num_layers)]
    kept = [layer for layer in layers if layer.type.name in ("NORMALIZATION", "SOFTMAX")]
    assert len(kept) == 3 * DEPTH + 1
    assert {layer.get_output(0).dtype.name for layer in kept} == {"FLOAT"}


@needs_rtx
@pytest.mark.tensorrt
def test_build_engine_in_half_precision_or_int8_is_smaller(engines):
    size = {dtype: record.bytes for dtype, (_, record) in engines.items()}
    print({dtype: round(size[dtype] / size["fp32"], 3) for dtype in size})
    assert size["fp16"] < 0.75 * size["fp32"]
    assert size["bf16"] < 0.75 * size["fp32"]
    assert size["int8"] < 0.75 * size["fp32"]


@needs_rtx
@pytest.mark.tensorrt
def test_check_types_of_other_precision_raises(graphs):
    parsed, *_ = network(graphs["fp32"])
    info = network_info(parsed)
    check_types(info, "fp32", graphs["fp32"])
    for dtype in ("fp16", "bf16", "int8"):
        with pytest.raises(ModelError, match=rf"^{graphs['fp32'].name} .*\b{dtype}\b"):
            check_types(info, dtype, graphs["fp32"])


def test_failed_write_of_the_timing_cache_is_a_warning(tmp_path, caplog):
    (tmp_path / "cache").mkdir()
    save_timings(tmp_path / "cache", b"timings")
    assert_logged(caplog, "WARNING", tmp_path / "cache")
    save_timings(tmp_path / "other", b"timings")
    assert (tmp_path / "other").read_bytes() == b"timings"
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "other"}


@needs_rtx
@pytest.mark.tensorrt
def test_build_engine_for_compute_capability_records_it(graphs, tmp_path):
    for dtype, named in (("fp16", ("8.6",)), ("fp16", ("8.6", "8.9", "12.0")), ("int8", ("7.5",))):
        record = build_engine(graphs[dtype], tmp_path / "m.engine", RTX, EngineOptions(compute_capability=named))
        assert record.compute_capabilities == list(named)
    for dtype in ("fp32", "bf16"):
        with pytest.raises(ModelError, match=rf"^--dtype {dtype}: .*\b8\.0\b.*\b7\.5\b.*--dtype fp16\b"):
            build_engine(graphs[dtype], tmp_path / "m.engine", RTX, EngineOptions(compute_capability=("7.5",)))


@needs_rtx
@pytest.mark.tensorrt
def test_build_engine_of_fixed_batch_size_requires_that_profile(tmp_path):
    path = write_graph(tmp_path / "model.onnx", batch=4)
    with pytest.raises(ModelError, match=r"^--min_batch, .*--min_batch 4 --opt_batch 4 --max_batch 4\b"):
        build_engine(path, tmp_path / "model.engine", RTX)
    record = build_engine(path, tmp_path / "model.engine", RTX, EngineOptions(4, 4, 4))
    assert record.input.shape == [4, 3, 16, 16]
    assert record.profile.max[0] == 4


@needs_rtx
@pytest.mark.tensorrt
def test_build_engine_of_fp8_graph_targets_gpus_with_fp8(graphs, tmp_path):
    images = np.random.default_rng(0).standard_normal((4, 3, SIZE, SIZE), dtype=np.float32)
    quantize_onnx(graphs["fp32"], tmp_path / "fp8.onnx", mode="fp8", runtime="tensorrt", calibration=[images])
    record = build_engine(tmp_path / "fp8.onnx", tmp_path / "model.engine", RTX)
    assert record.dtype == "fp8"
    assert record.compute_capabilities == ["8.9", "12.0"]
    with pytest.raises(ModelError, match=r"^--dtype fp8: .*\b8\.9\b.*\b8\.6\b"):
        build_engine(tmp_path / "fp8.onnx", tmp_path / "m.engine", RTX, EngineOptions(compute_capability=("8.6",)))


def odd_graph(path, op_type, **attributes):
    """Write a classifier with one more node, named `odd`, before its logits."""
    write_graph(path)
    model = onnx.load(path)
    product = model.graph.node[-1]
    product.output[0] = "before"
    model.graph.node.append(helper.make_node(op_type, ["before"], ["logits"], name="odd", **attributes))
    onnx.save(model, path)
    return path


@needs_rtx
@pytest.mark.tensorrt
def test_build_engine_with_unsupported_operator_names_the_node(tmp_path):
    path = odd_graph(tmp_path / "model.onnx", "Bernoulli", dtype=TensorProto.FLOAT)
    with pytest.raises(ModelError, match=r"\bmodel\.onnx\b.*\bBernoulli\b.*\bodd\b"):
        build_engine(path, tmp_path / "model.engine", RTX)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@needs_rtx
@pytest.mark.tensorrt
def test_build_engine_when_the_builder_fails_names_the_node(tmp_path):
    """Compute capability 7.5 supports matrix products in fp16 only; the last one is in float32."""
    nodes = [
        helper.make_node("ReduceMean", ["pixel_values", "spatial"], ["means"], keepdims=0),
        helper.make_node("Cast", ["means"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["half", "first"], ["a"], name="first_product"),
        helper.make_node("MatMul", ["a", "second"], ["b"], name="second_product"),
        helper.make_node("Cast", ["b"], ["single"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["single", "third"], ["logits"], name="odd_product"),
    ]
    rng, weights = np.random.default_rng(0), {"spatial": np.array([2, 3])}
    for name, kind, shape in (("first", "f2", (3, 64)), ("second", "f2", (64, 64)), ("third", "f4", (64, 3))):
        weights[name] = rng.standard_normal(shape).astype(kind)
    graph = helper.make_graph(
        nodes,
        "mixed",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch_size", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", 3])],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "model.engine").write_bytes(b"previous engine")
    with pytest.raises(ModelError, match=r"\bmodel\.onnx\b.*\bodd_product\b") as error:
        build_engine(
            tmp_path / "model.onnx", tmp_path / "model.engine", RTX, EngineOptions(compute_capability=("7.5",))
        )
    assert "\n" not in str(error.value)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.engine"}
    assert (tmp_path / "model.engine").read_bytes() == b"previous engine"


@needs_rtx
@pytest.mark.tensorrt
def test_build_engine_stops_on_ctrl_c(graphs, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    timer = threading.Timer(0.25, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        build_engine(graphs["fp32"], tmp_path / "model.engine", RTX)
    timer.join()
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGINT) is before


@needs_rtx
@pytest.mark.tensorrt
def test_build_progress_advances_in_many_steps(graphs, tmp_path):
    trt, log = RTX.module, message_log(RTX.module, False)
    progress = build_progress(trt, threading.Event(), show=False)
    seen, draw = [], progress._draw
    progress._draw = lambda: (draw(), seen.append(progress.percent))
    builder = trt.Builder(log)
    parsed = parse(trt, builder, graphs["fp16"], log)
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("pixel_values", (1, 3, SIZE, SIZE), (1, 3, SIZE, SIZE), (2, 3, SIZE, SIZE))
    config.add_optimization_profile(profile)
    config.progress_monitor = progress
    assert builder.build_serialized_network(parsed, config) is not None
    assert seen == sorted(seen)
    assert seen[0] < 20
    assert 50 < seen[-1] <= 100
    assert len(set(seen)) > 5
    assert not progress.phases


def test_read_graph_of_onnx_runtime_operators_names_the_node(graphs, tmp_path):
    quantize_onnx(graphs["fp32"], tmp_path / "dynamic.onnx", mode="int8-dynamic")
    with pytest.raises(ModelError, match=r"\bdynamic\.onnx\b.*\bONNX Runtime\b.*--target tensorrt\b"):
        read_graph(tmp_path / "dynamic.onnx")
    unsigned = tmp_path / "unsigned.onnx"
    model = onnx.load(graphs["int8"])
    node = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    zero = next(weight for weight in model.graph.initializer if weight.name == node.input[2])
    zero.CopyFrom(onnx.numpy_helper.from_array(np.int8(3), zero.name))
    onnx.save(model, unsigned)
    with pytest.raises(ModelError, match=r"\bunsigned\.onnx\b.*\bint8, 3\b"):
        read_graph(unsigned)


def test_read_graph_of_unsupported_inputs_raises(tmp_path):
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(ModelError, match=r"\btext\.onnx\b"):
        read_graph(tmp_path / "text.onnx")
    with pytest.raises(ModelError, match=r"\bpixels\.onnx\b.*--with_preprocessing\b"):
        read_graph(write_graph(tmp_path / "pixels.onnx", pixels=True))
    with pytest.raises(ModelError, match=r"\bfree\.onnx\b.*\bpixel_values\b.*\bNone, None\]"):
        read_graph(write_graph(tmp_path / "free.onnx", size="side"))


def test_read_graph_finds_the_precision(graphs):
    assert {dtype: read_graph(path).dtype for dtype, path in graphs.items()} == {dtype: dtype for dtype in PRODUCTS}
    graph = read_graph(graphs["fp16"])
    assert (graph.image, graph.classes, graph.batch, graph.input) == ((3, SIZE, SIZE), 3, None, "pixel_values")
