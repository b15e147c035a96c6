"""Fused, INT8 and FP8 graphs in ONNX Runtime: operators, difference from float, errors."""

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from helpers.images import LABELS
from helpers.messages import assert_names
from helpers.models import build_model
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hfvit.errors import DataError, HFViTError, ModelError
from hfvit.export.fusion import fuse
from hfvit.export.graph import constant, cpu_session
from hfvit.export.int8_kernels import measure_ranges, quantize_kernel, quantize_products
from hfvit.export.onnx import export_onnx
from hfvit.export.quantization import attention_products, load_float_graph, quantize_onnx

SIZE, DEPTH = 32, 3
SHAPE = {"patch_size": 8, "embed_dim": 64, "depth": DEPTH, "num_heads": 2, "init_values": 0.5}
KINDS = [("int8", "onnxruntime"), ("int8-dynamic", "onnxruntime"), ("int8", "tensorrt")]


def timm_vit(**kwargs):
    torch.manual_seed(0)
    model = build_model(LABELS, architecture="vit_tiny_patch16_224", image_size=SIZE, timm_kwargs={**SHAPE, **kwargs})
    return randomized(model)


def randomized(model):
    """Enlarge the weights so that every layer matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model.eval()


def dinov2():
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=SIZE, patch_size=8,
        num_labels=3,
    )  # fmt: skip
    return randomized(Dinov2ForImageClassification(config))


def vit():
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=SIZE,
        patch_size=8, num_labels=3,
    )  # fmt: skip
    return randomized(ViTForImageClassification(config))


def swin():
    config = SwinConfig(
        image_size=SIZE, patch_size=2, embed_dim=16, depths=[1, 2], num_heads=[2, 2], window_size=4, num_labels=3
    )
    return randomized(SwinForImageClassification(config))


def images(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 3, SIZE, SIZE), dtype=np.float32)


def batches():
    return [images(4, seed) for seed in range(1, 5)]


def run(path, pixels):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"pixel_values": pixels})[0]


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.fixture(scope="session")
def graphs(tmp_path_factory):
    """Export the float graphs once."""
    folder = tmp_path_factory.mktemp("float")
    models = {
        "timm": timm_vit(),
        "timm_mean": timm_vit(global_pool="avg"),
        "vit": vit(),
        "dinov2": dinov2(),
        "swin": swin(),
    }
    for name, model in models.items():
        export_onnx(model, folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in models}


@pytest.fixture(scope="session")
def int8(graphs, tmp_path_factory):
    """`int8(name, mode, runtime)` returns the quantized file and its details, cached."""
    folder, made = tmp_path_factory.mktemp("int8"), {}

    def of(name, mode="int8", runtime="onnxruntime"):
        key = (name, mode, runtime)
        if key not in made:
            path = folder / f"{'_'.join(key)}.onnx"
            calibration = batches() if mode == "int8" else None
            made[key] = path, quantize_onnx(graphs[name], path, mode=mode, runtime=runtime, calibration=calibration)
        return made[key]

    return of


@pytest.mark.parametrize(("mode", "runtime"), KINDS)
@pytest.mark.parametrize("name", ["timm", "timm_mean", "vit", "dinov2", "swin"])
def test_quantize_onnx_agrees_with_float_at_any_batch_size(graphs, int8, name, mode, runtime):
    path, _ = int8(name, mode, runtime)
    onnx.checker.check_model(onnx.load(path), full_check=runtime == "tensorrt")
    for count in (1, 7, 64):
        expected, found = run(graphs[name], images(count)), run(path, images(count))
        assert found.shape == expected.shape
        assert found.dtype == np.float32
    assert not np.array_equal(found, expected)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.995
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.9


@pytest.mark.parametrize(("mode", "runtime"), KINDS)
def test_quantize_onnx_stores_weights_as_one_byte(graphs, int8, mode, runtime):
    """Only biases, embeddings and (except for TensorRT) the patch projection stay float."""
    path, _ = int8("timm", mode, runtime)
    float_weights = {w.name: numpy_helper.to_array(w) for w in onnx.load(graphs["timm"]).graph.initializer}
    matrices = sum(array.size for array in float_weights.values() if array.ndim == 2)
    stored = [numpy_helper.to_array(w) for w in onnx.load(path).graph.initializer]
    assert sum(array.size for array in stored if array.dtype == np.int8 and array.ndim == 2) == matrices
    largest = max(array.size for array in stored if array.dtype == np.float32 and array.ndim != 4)
    assert largest <= (SIZE // 8) ** 2 * SHAPE["embed_dim"] + SHAPE["embed_dim"]  # the position embeddings


@pytest.mark.parametrize(("mode", "runtime"), KINDS)
@pytest.mark.parametrize(("name", "linears", "attentions"), [("timm", 13, 6), ("timm_mean", 13, 6), ("dinov2", 13, 4)])
def test_quantize_onnx_keeps_attention_products_float(int8, graphs, name, linears, attentions, mode, runtime):
    model = load_float_graph(graphs[name])
    assert len(attention_products(model)) == attentions
    path, details = int8(name, mode, runtime)
    found = operators(path)
    assert not {"QLinearMatMul", "MatMulInteger", "QLinearSoftmax", "QLinearAdd"} & set(found)
    if runtime == "tensorrt":
        assert details["integer_products"] == linears
        assert details["float_products"] == attentions
        assert not any("com.microsoft" in node.domain for node in onnx.load(path).graph.node)
        return
    assert "Gemm" not in found
    assert details["integer_products"] == found.count("QAttention") + sum(
        "MatMulInteger" in o or "QuantizeMatMul" in o for o in found
    )
    products = found.count("MatMul")
    assert products == details["float_products"]
    assert products + 2 * found.count("QAttention") + 2 * found.count("MultiHeadAttention") == attentions


@pytest.mark.parametrize(("name", "blocks"), [("vit", 2), ("dinov2", 2)])
def test_fuse_of_stock_attention_removes_its_mask(graphs, fused, int8, name, blocks):
    """transformers exports a mask without effect."""
    assert "Where" in operators(graphs[name])
    found = operators(fused[name])
    assert not {"Where", "Softmax"} & set(found)
    assert found.count("Attention") + found.count("MultiHeadAttention") == blocks
    assert found.count("MultiHeadAttention") == (name == "vit")  # DINOv2's head also reads the mean of the patches
    assert operators(int8(name)[0]).count("QAttention") == found.count("Attention")


@pytest.fixture(scope="module", params=["vit", "dinov2"])
def fixed(request, tmp_path_factory):
    """A stock model's graph with a fixed batch, whose attention masks are constants."""
    path = tmp_path_factory.mktemp("fixed") / f"{request.param}.onnx"
    export_onnx({"vit": vit, "dinov2": dinov2}[request.param](), path, batch_size=2, dynamic_axes=False)
    return path


def fuse_file(source, target):
    graph = onnx_ir.load(source)
    fuse(graph)
    onnx_ir.save(graph, target)
    return target


def test_fuse_of_stock_attention_with_a_fixed_batch_removes_its_mask(fixed, tmp_path):
    found = fuse_file(fixed, tmp_path / "fused.onnx")
    assert not {"Where", "Softmax"} & set(operators(found))
    assert operators(found).count("Attention") + operators(found).count("MultiHeadAttention") == 2
    np.testing.assert_allclose(run(found, images(2)), run(fixed, images(2)), rtol=1e-4, atol=1e-4)


def test_fuse_keeps_a_constant_mask_with_effect(fixed, tmp_path):
    model = onnx.load(fixed)
    masks = [
        w for w in model.graph.initializer if len(w.dims) == 4 and w.dims[2] > 8 and not numpy_helper.to_array(w).any()
    ]
    assert masks
    for mask in masks:
        values = numpy_helper.to_array(mask).copy()
        values.reshape(-1)[3] = True
        mask.CopyFrom(numpy_helper.from_array(values, mask.name))
    onnx.save(model, tmp_path / "masked.onnx")
    found = fuse_file(tmp_path / "masked.onnx", tmp_path / "fused.onnx")
    expected = run(tmp_path / "masked.onnx", images(2))
    assert not np.allclose(expected, run(fixed, images(2)), atol=1e-3)
    np.testing.assert_allclose(run(found, images(2)), expected, rtol=1e-4, atol=1e-4)


def test_fuse_keeps_a_mask_with_effect(graphs, tmp_path):
    """Set one cell of the additive mask."""
    model = onnx.load(graphs["vit"])
    mask = next(w for w in model.graph.initializer if w.data_type == TensorProto.BOOL)
    values = numpy_helper.to_array(mask).copy()
    values.reshape(-1)[3] = False
    mask.CopyFrom(numpy_helper.from_array(values, mask.name))
    onnx.save(model, tmp_path / "masked.onnx")
    rewritten = onnx_ir.load(tmp_path / "masked.onnx")
    fuse(rewritten)
    onnx_ir.save(rewritten, tmp_path / "fused.onnx")
    expected, found = run(tmp_path / "masked.onnx", images(3)), run(tmp_path / "fused.onnx", images(3))
    assert not np.allclose(expected, run(graphs["vit"], images(3)), atol=1e-3)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_fuse_of_timm_vit_has_one_attention_per_block(int8):
    """The last block computes only the class token, the only one that the head reads."""
    found = operators(int8("timm")[0])
    assert found.count("QAttention") == DEPTH - 1
    assert found.count("MultiHeadAttention") == 1
    assert "Mul" not in found  # LayerScale is folded into the weights
    mean = operators(int8("timm_mean")[0])
    assert mean.count("QAttention") == DEPTH


@pytest.mark.parametrize("mode", ["int8", "int8-dynamic"])
def test_quantize_onnx_weights_of_adjacent_inputs_cannot_saturate(int8, mode):
    """CPUs without VNNI add two products of uint8 and int8 in 16 bits."""
    stored = [numpy_helper.to_array(w) for w in onnx.load(int8("timm", mode)[0]).graph.initializer]
    kernels = [array for array in stored if array.dtype == np.int8 and array.ndim == 2]
    assert kernels
    for kernel in kernels:
        pairs = kernel.astype(int).reshape(-1, 2, kernel.shape[1])
        sums = np.stack([np.maximum(sign * pairs, 0).sum(axis=1).max(axis=0) for sign in (1, -1)])
        assert sums.max() <= 128
        assert sums.max(axis=0).min() >= 126  # the range is used


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("inputs", [3, 6, 33, 700])
def test_integer_product_of_largest_values_is_exact(rows, inputs):
    rng = np.random.default_rng(inputs)
    integer, _ = quantize_kernel(rng.uniform(0.5, 1, (inputs, 20)).astype(np.float32))
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "kernel"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [None, inputs])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [None, 20])],
        [numpy_helper.from_array(integer, "kernel")],
    )
    session = cpu_session(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))
    x = np.full((rows, inputs), 255, np.uint8)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x.astype(np.int32) @ integer.astype(np.int32))


def test_quantize_onnx_zero_points_follow_the_runtime(int8):
    def zero_points(path):
        model = onnx.load(path)
        weights = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
        return [weights[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"]

    unsigned = zero_points(int8("timm")[0])
    assert unsigned
    assert {array.dtype for array in unsigned} == {np.dtype(np.uint8)}
    assert any(array.any() for array in unsigned)
    symmetric = zero_points(int8("timm", "int8", "tensorrt")[0])
    assert symmetric
    assert {array.dtype for array in symmetric} == {np.dtype(np.int8)}
    assert not any(array.any() for array in symmetric)


def test_quantize_onnx_for_tensorrt_has_scales_per_channel_and_float_biases(int8):
    model = onnx.load(int8("timm", "int8", "tensorrt")[0])
    weights = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    kernels = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in weights]
    assert kernels
    for node in kernels:
        axis = next(a.i for a in node.attribute if a.name == "axis")
        assert weights[node.input[0]].dtype == np.int8
        assert weights[node.input[1]].shape == (weights[node.input[0]].shape[axis],)
    assert not any(array.dtype == np.int32 and array.size > 16 for array in weights.values())
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert convolutions[0].input[1] in {output for node in kernels for output in node.output}


def test_quantize_onnx_to_fp8_scales_to_the_largest_magnitudes(graphs, int8, tmp_path):
    """Compare weights with the INT8 graph's, and logits with the float graph's and ONNX's reference."""
    path = tmp_path / "fp8.onnx"
    details = quantize_onnx(graphs["timm"], path, mode="fp8", runtime="tensorrt", calibration=batches())
    assert (details["mode"], details["activations"]) == ("fp8", "fp8 symmetric")
    onnx.checker.check_model(path, full_check=True)

    def pairs(file):
        model = onnx.load(file)
        values = {w.name: numpy_helper.to_array(w).astype(np.float32) for w in model.graph.initializer}
        nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in values]
        products = [n.input[1] for n in model.graph.node if n.op_type in ("MatMul", "Gemm")]
        kernels = {n.output[0]: [values[name] for name in n.input] for n in nodes if n.output[0] in products}
        return [kernels[name] for name in products if name in kernels]

    found, reference = pairs(path), pairs(int8("timm", "int8", "tensorrt")[0])
    assert len(found) == len(reference) == details["integer_products"] == 13
    for (kernel, scale, zero), (integer, step, _) in zip(found, reference, strict=True):
        assert not zero.any()
        axis = kernel.shape.index(len(scale)) if kernel.shape[0] != kernel.shape[1] else 1
        assert (np.abs(kernel).max(axis=1 - axis) == 448).all()
        np.testing.assert_allclose(448 * scale, 127 * step, rtol=2e-3)  # rounded to fp16
        expected = integer * np.expand_dims(step, 1 - axis)
        np.testing.assert_allclose(kernel * np.expand_dims(scale, 1 - axis), expected, rtol=0.08, atol=step.max())
    stored = [w.data_type for w in onnx.load(path).graph.initializer if len(w.dims) == 2]
    assert stored.count(TensorProto.FLOAT8E4M3FN) == 13
    expected, logits = run(graphs["timm"], images(64)), run(path, images(64))
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.99
    (evaluated,) = ReferenceEvaluator(str(path)).run(["logits"], {"pixel_values": images(64)[:2]})
    assert np.linalg.norm(evaluated - logits[:2]) < 0.1 * np.linalg.norm(logits[:2])


def test_quantize_onnx_keeps_names_and_axes(int8):
    for kind in KINDS:
        path, details = int8("timm", *kind)
        model = onnx.load(path)
        assert [value.name for value in model.graph.input] == ["pixel_values"]
        assert [value.name for value in model.graph.output] == ["logits"]
        for value in (*model.graph.input, *model.graph.output):
            assert value.type.tensor_type.shape.dim[0].dim_param == "batch_size"
        assert (details["mode"], details["runtime"]) == kind
        assert details["tool"] == f"onnxruntime {onnxruntime.__version__}"
        assert details.get("calibration_images") == (16 if kind[0] == "int8" else None)
        assert str(path.parent).encode() not in path.read_bytes()
        assert b"/tmp/" not in path.read_bytes()
    assert {file.suffix for file in path.parent.iterdir()} == {".onnx"}  # no temporary or external files


def test_quantize_onnx_for_tensorrt_requires_opset_19(graphs, tmp_path):
    model = onnx.load(graphs["timm"])
    (opset,) = [entry for entry in model.opset_import if not entry.domain]
    for opset.version in (18, 24):
        onnx.save(model, tmp_path / f"{opset.version}.onnx")
    with pytest.raises(ModelError, match=r"^opset: .*19"):
        quantize_onnx(tmp_path / "18.onnx", tmp_path / "int8.onnx", runtime="tensorrt", calibration=batches())
    quantize_onnx(tmp_path / "24.onnx", tmp_path / "int8.onnx", runtime="tensorrt", calibration=batches())
    expected, logits = run(graphs["timm"], images(64)), run(tmp_path / "int8.onnx", images(64))
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.99


def small_model(inputs, nodes, weights=()):
    values = [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs]
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", values, [output], list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def bad_files(tmp_path, int8):
    """Return invalid files by their defect."""
    relu = helper.make_node("Relu", ["pixel_values"], ["logits"])
    image = ("pixel_values", TensorProto.FLOAT, ["batch_size", 3, 4, 4])
    onnx.save(small_model([image], [relu]), tmp_path / "no product.onnx")
    cast = helper.make_node("Cast", ["pixels"], ["logits"], to=1)
    onnx.save(small_model([("pixels", TensorProto.UINT8, ["b", "h", "w", 3])], [cast]), tmp_path / "uint8.onnx")
    (tmp_path / "text.onnx").write_text("not a graph")
    return {"missing": tmp_path / "none.onnx", "quantized": int8("timm")[0]} | {
        name: tmp_path / f"{name}.onnx" for name in ("no product", "uint8", "text")
    }


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("missing", []),
        ("text", ["ONNX"]),
        ("no product", []),
        ("uint8", ["float32", "pixels"]),
        ("quantized", ["float32"]),
    ],
)
def test_quantize_onnx_of_unsupported_file_names_it(bad_files, tmp_path, what, data):
    with pytest.raises(ModelError) as caught:
        quantize_onnx(bad_files[what], tmp_path / "out" / "int8.onnx", calibration=batches())
    assert_names(caught.value, bad_files[what], *data)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "data"),
    [
        ({"calibration": None}, ["int8-dynamic"]),
        ({"calibration": []}, []),
        ({"calibration": 3}, [3]),
        ({"calibration": "photos"}, ["'photos'"]),
        ({"calibration": [images(2)[:, :, :16]]}, ["float32", "('batch_size', 3, 32, 32)", (2, 3, 16, 32)]),
        ({"calibration": [images(2).astype(np.float64)]}, ["float32", "float64"]),
        ({"calibration": [images(2)[0]]}, ["('batch_size', 3, 32, 32)", (3, 32, 32)]),
        ({"calibration": [images(2), np.full((1, 3, SIZE, SIZE), np.nan, np.float32)]}, ["NaN"]),
    ],
)
@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
def test_quantize_onnx_with_bad_calibration_names_it(graphs, tmp_path, arguments, data, runtime):
    with pytest.raises(DataError, match=r"^calibration: ") as caught:
        quantize_onnx(graphs["timm"], tmp_path / "int8.onnx", runtime=runtime, **arguments)
    assert_names(caught.value, *data)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "option", "data"),
    [
        ({"mode": "int4"}, "mode", ["'int4'", "int8, int8-dynamic, fp8"]),
        ({"mode": None}, "mode", ["None"]),
        ({"mode": "fp8"}, "runtime", ["tensorrt", "'onnxruntime'"]),
        ({"runtime": "onnxruntimes"}, "runtime", ["'onnxruntimes'", "'onnxruntime'"]),
        ({"mode": "int8-dynamic", "runtime": "tensorrt"}, "mode", ["TensorRT"]),
    ],
)
def test_quantize_onnx_with_an_unknown_mode_names_the_option(graphs, tmp_path, arguments, option, data):
    with pytest.raises(HFViTError, match=f"^{option}: ") as caught:
        quantize_onnx(graphs["timm"], tmp_path / "int8.onnx", calibration=batches(), **arguments)
    assert_names(caught.value, *data)


def test_quantize_onnx_accepts_a_generator(graphs, int8, tmp_path):
    quantize_onnx(graphs["timm"], tmp_path / "int8.onnx", calibration=(batch for batch in batches()))
    assert (tmp_path / "int8.onnx").read_bytes() == int8("timm")[0].read_bytes()


@pytest.fixture(scope="session")
def fused(graphs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused")
    for path in graphs.values():
        model = onnx_ir.load(path)
        fuse(model)
        onnx_ir.save(model, folder / path.name)
    return {name: folder / path.name for name, path in graphs.items()}


@pytest.mark.parametrize("name", ["timm", "timm_mean", "vit", "dinov2", "swin"])
def test_fuse_keeps_the_logits(graphs, fused, name):
    for count in (1, 5):
        expected, found = run(graphs[name], images(count)), run(fused[name], images(count))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_fuse_of_timm_vit_has_the_expected_operators(fused):
    found = [node.op_type for node in onnx.load(fused["timm"]).graph.node]
    assert found.count("Attention") == DEPTH - 1
    assert found.count("MultiHeadAttention") == 1  # the last block, for the class token
    assert not {"SkipLayerNormalization", "Softmax", "Mul"} & set(found)


def test_fuse_with_mean_pooling_keeps_all_tokens(fused):
    found = [node.op_type for node in onnx.load(fused["timm_mean"]).graph.node]
    assert found.count("Attention") == DEPTH
    assert "MultiHeadAttention" not in found


@pytest.mark.parametrize("spans", [((1, 2), (3, 7)), ((-7, -3), (-2, -1)), ((-1, 3), (-3, 5))], ids=["1", "-1", "0"])
def test_static_range_is_the_mean_over_batches_with_zero(spans):
    rng = np.random.default_rng(0)
    pixels = [rng.uniform(*span, (4, 3, 4, 4)).astype(np.float32) for span in spans]
    kernel = numpy_helper.from_array(rng.normal(size=(48, 5)).astype(np.float32), "kernel")
    flatten = helper.make_node("Flatten", ["pixel_values"], ["x"])
    product = helper.make_node("MatMul", ["x", "kernel"], ["logits"])
    image = ("pixel_values", TensorProto.FLOAT, ["batch_size", 3, 4, 4])
    graph = onnx_ir.from_proto(small_model([image], [flatten, product], [kernel]))
    ranges = measure_ranges(graph, ({"pixel_values": batch} for batch in pixels))
    low, high = (np.mean([reduced(batch) for batch in pixels]) for reduced in (np.min, np.max))
    assert ranges["x"] == pytest.approx((low, high))
    assert quantize_products(graph, ranges) == 1
    quantizer = next(node for node in graph.graph if node.op_type == "QuantizeLinear")
    scale, zero_point = (constant(value) for value in quantizer.inputs[1:])
    low, high = min(low, 0), max(high, 0)
    assert scale == pytest.approx((high - low) / 255, rel=1e-5)
    assert zero_point == round(-low / ((high - low) / 255))
