"""`export_onnx`: model families, precisions, metadata and errors."""

import errno
import json
import os
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import transformers
from helpers.commands import ROOT
from helpers.images import LABELS
from helpers.messages import assert_names
from helpers.models import build_model
from helpers.recipes import ARCHITECTURE, MICRO
from helpers.records import exported_file
from helpers.timm_models import build
from onnx import TensorProto
from transformers import AutoConfig, TimmWrapperConfig, ViTConfig, ViTForImageClassification

from hfvit.artifacts.export_folder import (
    check_same_model,
    claim_folder,
    file_name,
)
from hfvit.artifacts.export_record import ExportRecord
from hfvit.errors import ModelError
from hfvit.export.client_config import family_config
from hfvit.export.onnx import export_onnx, trace_onnx
from hfvit.export.parity import DEFAULT_ATOL, check_parity, tolerance
from hfvit.export.quantization import quantize_onnx

VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
STOCK = {
    "vit": ("ViT", {**VIT, "intermediate_size": 64}),
    "deit": ("DeiT", {**VIT, "intermediate_size": 64}),
    "beit": ("Beit", {**VIT, "intermediate_size": 64}),
    "dinov2": ("Dinov2", {**VIT, "mlp_ratio": 2}),
    "swin": ("Swin", {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2],
                      "window_size": 4}),
    "convnext": ("ConvNext", {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "image_size": 16}),
}  # fmt: skip


def timm_model(architecture=ARCHITECTURE, image_size=16, **timm_kwargs):
    torch.manual_seed(0)
    model = build_model(LABELS, architecture=architecture, image_size=image_size, timm_kwargs=timm_kwargs or MICRO)
    return model.eval()


def stock_model(family, base=None):
    name, values = STOCK[family]
    config = getattr(transformers, f"{name}Config")(num_labels=3, **values)
    torch.manual_seed(0)
    return (base or getattr(transformers, f"{name}ForImageClassification"))(config).eval()


@pytest.fixture(scope="module")
def micro():
    return timm_model()


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def batch(size, seed=0):
    return np.random.default_rng(seed).normal(size=(size, 3, 16, 16)).astype(np.float32)


@torch.inference_mode()
def expected(model, pixel_values):
    return model(torch.from_numpy(pixel_values)).logits.float().numpy()


@pytest.mark.parametrize("family", ["timm", *STOCK])
def test_export_onnx_of_family_gives_its_logits_in_one_file(family, tmp_path, capfd):
    model = timm_model() if family == "timm" else stock_model(family)
    path = tmp_path / "new" / "model.onnx"
    record = export_onnx(model, path)
    assert capfd.readouterr() == ("", "")
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    runtime = session(path)
    (source,), (target,) = runtime.get_inputs(), runtime.get_outputs()
    assert (source.name, source.type, source.shape) == ("pixel_values", "tensor(float)", ["batch_size", 3, 16, 16])
    assert (target.name, target.type, target.shape) == ("logits", "tensor(float)", ["batch_size", 3])
    for size in (1, 4):
        (logits,) = runtime.run(None, {"pixel_values": batch(size)})
        np.testing.assert_allclose(logits, expected(model, batch(size)), atol=1e-5)
    assert record.parity.max_abs_difference < 1e-5
    assert record.input.to_json() == {"name": "pixel_values", "type": "float32", "shape": ["batch_size", 3, 16, 16]}
    assert_no_local_metadata(path)


def assert_no_local_metadata(path):
    model = onnx.load(path)
    for place in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input):
        assert not place.metadata_props
        assert not place.doc_string
    content = path.read_bytes()
    for word in (str(ROOT), str(path.parent), "site-packages", ".py", "s99"):
        assert word.encode() not in content


def types(path) -> dict[str, int]:
    """Infer the element type of every value with ONNX."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    found = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.input)}
    return found | {constant.name: constant.data_type for constant in model.graph.initializer}


@pytest.mark.parametrize(("dtype", "half"), [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)])
@pytest.mark.parametrize("family", ["timm", "convnext"])
def test_export_onnx_in_half_precision_keeps_norms_and_softmax_in_float32(dtype, half, family, tmp_path):
    model = timm_model() if family == "timm" else stock_model(family)
    path = tmp_path / "half.onnx"
    record = export_onnx(model, path, dtype=dtype)
    graph, type_of = onnx.load(path).graph, types(path)
    found = {}
    for node in graph.node:
        found.setdefault(node.op_type, set()).update(
            type_of[name] for name in node.input if type_of.get(name) in (TensorProto.FLOAT, half)
        )
    assert found["MatMul"] == found["Gemm"] == {half}
    assert found["LayerNormalization"] == {TensorProto.FLOAT}
    assert found.get("Softmax", {TensorProto.FLOAT}) == {TensorProto.FLOAT}
    weights = sum(np.prod(constant.dims) for constant in graph.initializer if len(constant.dims) == 2)
    halves = sum(np.prod(c.dims) for c in graph.initializer if len(c.dims) == 2 and c.data_type == half)
    assert halves == weights
    assert [(value.name, value.type.tensor_type.elem_type) for value in (*graph.input, *graph.output)] == [
        ("pixel_values", TensorProto.FLOAT),
        ("logits", TensorProto.FLOAT),
    ]
    assert 1e-7 < record.parity.max_abs_difference < DEFAULT_ATOL[dtype]
    assert record.float32_values is None
    if dtype == "fp16":
        (logits,) = session(path).run(None, {"pixel_values": batch(2)})
        np.testing.assert_allclose(logits, expected(model, batch(2)), atol=2e-3)
    else:  # the difference is of the size of PyTorch's bf16 autocast
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = expected(model, batch(2))
        assert record.parity.max_abs_difference < 5 * np.abs(autocast - expected(model, batch(2))).max()
        with pytest.raises(Exception, match="NOT_IMPLEMENTED"):  # the reason for runnable_on_cpu
            session(path)


def test_export_onnx_in_half_precision_of_operators_that_the_exporter_rewrote(tmp_path):
    """The exporter leaves the inputs of Swin V2's Gather nodes without a type, and a weight that no node reads."""
    model = build("swinv2").eval()
    traced = trace_onnx(model)
    assert all(weight.uses() for weight in traced.graph.initializers.values())
    export_onnx(model, tmp_path / "half.onnx", dtype="bf16", traced=traced)
    onnx.checker.check_model(tmp_path / "half.onnx", full_check=True)


def test_export_onnx_in_fp16_keeps_values_beyond_its_range_in_float32(tmp_path):
    """Scale a hidden layer beyond 65504, which ONNX Runtime's float32 arithmetic on CPUs would hide."""
    model = stock_model("vit")
    layer = next(module for module in model.modules() if getattr(module, "out_features", 0) == 64)
    following = next(module for module in model.modules() if getattr(module, "in_features", 0) == 64)
    with torch.no_grad():
        layer.weight.mul_(1e7)
        following.weight.div_(1e7)
    record = export_onnx(model, tmp_path / "half.onnx", dtype="fp16", images=batch(5))
    assert record.float32_values > 0
    graph, type_of = onnx.load(tmp_path / "half.onnx").graph, types(tmp_path / "half.onnx")
    products = [type_of[node.input[0]] for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    assert {TensorProto.FLOAT, TensorProto.FLOAT16} == set(products)
    assert products.count(TensorProto.FLOAT) == 2  # of the layer and the following one
    (logits,) = session(tmp_path / "half.onnx").run(None, {"pixel_values": batch(2)})
    np.testing.assert_allclose(logits, expected(model, batch(2)), atol=2e-3)


def test_trace_onnx_once_for_several_files(micro, tmp_path):
    traced = trace_onnx(micro)
    for dtype in ("fp16", "fp32"):
        export_onnx(micro, tmp_path / f"{dtype}.onnx", dtype=dtype, traced=traced)
    export_onnx(micro, tmp_path / "fused.onnx", optimize=True, traced=traced)
    export_onnx(micro, tmp_path / "again.onnx")
    assert (tmp_path / "fp32.onnx").read_bytes() == (tmp_path / "again.onnx").read_bytes()


def test_export_onnx_of_naflex_has_constant_position_embeddings(tmp_path):
    """TensorRT cannot resample them: it has no antialiased Resize."""
    kwargs = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = timm_model("naflexvit_base_patch16_gap", image_size=48, **kwargs)
    torch.nn.init.normal_(model.timm_model.embeds.pos_embed)
    model.set_image_size(16)
    record = export_onnx(model, tmp_path / "model.onnx")
    assert record.parity.max_abs_difference < 1e-5
    assert "Resize" not in {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (lambda: transformers.ImageGPTForImageClassification(
            transformers.ImageGPTConfig(n_embd=16, n_layer=1, n_head=1, vocab_size=9, n_positions=16)),
         ["ImageGPTForImageClassification", "input_ids"]),
        (lambda: transformers.BitForImageClassification(
            transformers.BitConfig(embedding_size=32, hidden_sizes=[128] * 4, depths=[1] * 4)),
         ["BitForImageClassification", "8x8"]),
    ],
)  # fmt: skip
def test_export_onnx_of_model_that_cannot_compute_the_images_raises_one_error(model, data, tmp_path):
    with pytest.raises(ModelError) as caught:
        export_onnx(model().eval(), tmp_path / "model.onnx", image_size=(8, 8))
    assert_names(caught.value, *data)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_family_config_of_another_shape_has_height_and_width():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    stock = ViTForImageClassification(ViTConfig(**sizes, image_size=[16, 24], patch_size=8))
    assert family_config(stock)["image_size"] == [16, 24]
    model = timm_model(**MICRO)
    assert family_config(model)["image_size"] == 16
    model.config.pretrained_cfg = {**model.config.pretrained_cfg, "input_size": [3, 16, 24]}
    assert family_config(model)["image_size"] == [16, 24]


def test_family_config_with_unnamed_classes_raises():
    model = stock_model("vit")
    model.config.id2label = {0: "red", 1: "green", 5: "blue"}
    with pytest.raises(ModelError, match=r"id2label"):
        family_config(model)


@pytest.mark.parametrize("family", ["timm", "vit"])
def test_export_onnx_with_optimize_has_fused_operators(family, micro, tmp_path):
    model = micro if family == "timm" else stock_model(family)
    record = export_onnx(model, tmp_path / "fused.onnx", optimize=True)
    domains = {node.domain for node in onnx.load(tmp_path / "fused.onnx").graph.node}
    assert "com.microsoft" in domains
    assert record.optimized
    (logits,) = session(tmp_path / "fused.onnx").run(None, {"pixel_values": batch(5)})
    np.testing.assert_allclose(logits, expected(model, batch(5)), atol=1e-5)
    onnx.checker.check_model(str(tmp_path / "fused.onnx"), full_check=True)


@pytest.mark.parametrize("size", [1, 3])
def test_fused_graph_of_fixed_batch_computes_the_logits(size, micro, tmp_path):
    export_onnx(micro, tmp_path / "fused.onnx", optimize=True, batch_size=size, dynamic_axes=False)
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node)
    assert operators["Attention"] == 1  # of two blocks; the last one computes the class token only
    (logits,) = session(tmp_path / "fused.onnx").run(None, {"pixel_values": batch(size)})
    np.testing.assert_allclose(logits, expected(micro, batch(size)), atol=1e-5)


def test_export_onnx_with_fixed_batch_and_opset(micro, tmp_path):
    record = export_onnx(micro, tmp_path / "fixed.onnx", batch_size=2, dynamic_axes=False, opset=18)
    assert record.opset == 18
    assert record.input.shape == [2, 3, 16, 16]
    assert record.parity.batch_sizes == [2]
    runtime = session(tmp_path / "fixed.onnx")
    (logits,) = runtime.run(None, {"pixel_values": batch(2)})
    np.testing.assert_allclose(logits, expected(micro, batch(2)), atol=1e-5)
    with pytest.raises(Exception, match="Got: 3 Expected: 2"):
        runtime.run(None, {"pixel_values": batch(3)})


def test_export_onnx_of_several_outputs_keeps_the_logits(tmp_path):
    model = stock_model("deit", transformers.DeiTForImageClassificationWithTeacher)
    for optimize in (False, True):
        export_onnx(model, tmp_path / "model.onnx", optimize=optimize)
        assert [output.name for output in onnx.load(tmp_path / "model.onnx").graph.output] == ["logits"]
    model = stock_model("vit")
    model.config.output_hidden_states = True
    export_onnx(model, tmp_path / "model.onnx")
    assert [output.name for output in session(tmp_path / "model.onnx").get_outputs()] == ["logits"]


def test_export_onnx_beyond_atol_keeps_the_old_file(micro, tmp_path):
    (tmp_path / "model.onnx").write_text("an older export")
    with pytest.raises(ModelError, match=r"^model\.onnx: .*\b1e-12\b.*--atol\b"):
        export_onnx(micro, tmp_path / "model.onnx", atol=1e-12)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "an older export"


class Branching(transformers.ViTForImageClassification):
    def forward(self, pixel_values, **kwargs):
        return super().forward(pixel_values if pixel_values.sum() > 0 else -pixel_values)


def test_export_onnx_of_untraceable_model_raises_one_error(tmp_path, capfd):
    with pytest.raises(ModelError, match=r"^Branching\b") as caught:
        export_onnx(stock_model("vit", base=Branching), tmp_path / "model.onnx")
    assert_names(caught.value, f"transformers {transformers.__version__}", type(caught.value.__cause__).__name__)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "option", "data"),
    [
        ({"dtype": "int8"}, "dtype", ["'int8'", "fp32, fp16, bf16"]),
        ({"opset": 12}, "opset", [12, 18, 23]),
        ({"opset": 18.0}, "opset", [18.0]),
        ({"batch_size": 0}, "batch_size", [0]),
        ({"optimize": True, "dtype": "fp16"}, "optimize", ["fp16"]),
        ({"batch_size": "2"}, "batch_size", ["'2'"]),
        ({"batch_size": 1.5, "dynamic_axes": False}, "batch_size", [1.5]),
        ({"atol": -1}, "atol", [-1]),
        ({"atol": "1e-3"}, "atol", ["'1e-3'"]),
        ({"image_size": 32}, "image_size", [32]),
        ({"image_size": (32.0, 32)}, "image_size", ["(32.0, 32)"]),
        ({"images": np.zeros((2, 3, 8, 8), np.float32), "dtype": "fp16"}, "images", ["(2, 3, 8, 8)"]),
        ({"images": np.zeros((0, 3, 16, 16), np.float32), "dtype": "fp16"}, "images", ["(0, 3, 16, 16)"]),
    ],
    ids=str,
)
def test_export_onnx_with_a_wrong_argument_names_it(options, option, data, micro, tmp_path):
    with pytest.raises(ModelError, match=f"^{option}: ") as caught:
        export_onnx(micro, tmp_path / "model.onnx", **options)
    assert_names(caught.value, *data)


@pytest.mark.parametrize(("path", "kind"), [(None, TypeError), (3, TypeError), ("", ModelError), (".", ModelError)])
def test_export_onnx_and_quantize_onnx_check_the_path_first(path, kind, micro, monkeypatch):
    monkeypatch.setattr("hfvit.export.onnx.trace_onnx", None)  # the long work
    with pytest.raises(kind, match=r"^path:"):
        export_onnx(micro, path)
    with pytest.raises(kind, match=r"^target:"):
        quantize_onnx("model.onnx", path, mode="int8-dynamic")


def test_export_onnx_with_an_object_as_preprocessing_raises_before_the_export(micro, tmp_path, monkeypatch):
    monkeypatch.setattr("hfvit.export.onnx.trace_onnx", None)
    with pytest.raises(ModelError):
        export_onnx(micro, tmp_path / "model.onnx", preprocessing=True)


def test_export_onnx_expands_the_home_folder(micro, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    export_onnx(micro, "~/new/model.onnx")
    assert (tmp_path / "new" / "model.onnx").is_file()


@pytest.mark.parametrize(
    ("architecture", "timm_kwargs", "family", "values"),
    [
        (ARCHITECTURE, MICRO, "vit", {"patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "image_size": 16}),
        ("deit_tiny_patch16_224", MICRO, "deit", {"num_attention_heads": 2, "intermediate_size": 128}),
        ("swin_tiny_patch4_window7_224",
         {"patch_size": 2, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4},
         "swin", {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}, "convnext",
         {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16]}),
    ],
)  # fmt: skip
def test_family_config_of_timm_model_has_a_known_model_type(architecture, timm_kwargs, family, values, tmp_path):
    config = family_config(timm_model(architecture, image_size=32 if family == "convnext" else 16, **timm_kwargs))
    (tmp_path / "config.json").write_text(json.dumps(config))
    stock = AutoConfig.from_pretrained(tmp_path)
    assert stock.model_type == family
    assert stock.id2label == dict(enumerate(LABELS))
    assert stock.label2id == {label: index for index, label in enumerate(LABELS)}
    assert {key: getattr(stock, key) for key in values} == values
    assert config["num_labels"] == 3


def test_family_config_of_network_with_a_method_of_the_name_stages():
    with torch.device("meta"):
        network = timm.create_model("hrnet_w18_small", num_classes=2)
    config = TimmWrapperConfig(architecture="hrnet_w18_small", num_labels=2, pretrained_cfg=network.pretrained_cfg)
    config.id2label = {0: "a", 1: "b"}
    assert family_config(SimpleNamespace(config=config, timm_model=network))["num_labels"] == 2


def test_family_config_keeps_problem_type():
    model = timm_model()
    model.config.problem_type = "multi_label_classification"
    assert family_config(model)["problem_type"] == "multi_label_classification"


def test_family_config_of_stock_model_keeps_its_values(tmp_path):
    model = stock_model("dinov2")
    model.config._name_or_path = "/some/local/path"
    config = family_config(model)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(tmp_path).mlp_ratio == 2
    assert config["model_type"] == "dinov2"
    assert "/some/local" not in json.dumps(config)


def test_file_name_of_variants():
    assert file_name() == "model.onnx"
    assert file_name("bf16") == "model_bf16.onnx"
    assert file_name(optimize=True) == "model_optimized.onnx"
    assert file_name(quantize="int8-dynamic") == "model_quantized.onnx"
    assert file_name(quantize="int8", target="tensorrt") == "model_int8_tensorrt.onnx"
    assert file_name(quantize="fp8", target="tensorrt") == "model_fp8_tensorrt.onnx"
    assert file_name(quantize="int8", with_preprocessing=True) == "model_quantized_with_preprocessing.onnx"


def test_export_record_merges_files_and_drops_missing_ones(tmp_path):
    for name in ("model.onnx", "model_fp16.onnx"):
        (tmp_path / name).write_text("")
        ExportRecord(source="out", files=ExportRecord.load(tmp_path).files).enter(tmp_path, name, exported_file())
    (tmp_path / "model.onnx").unlink()
    (tmp_path / "model_quantized.onnx").write_text("")
    ExportRecord.load(tmp_path).enter(tmp_path, "model_quantized.onnx", exported_file())
    record = ExportRecord.load(tmp_path)
    assert record.source == "out"
    assert set(record.files) == {"model_fp16.onnx", "model_quantized.onnx"}


def test_claim_folder_of_unsuitable_folder_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=rf"^output: .*{tmp_path}/file "):
        claim_folder(tmp_path / "file")
    with pytest.raises(ModelError, match=rf"^output: {tmp_path}/file/below .*{os.strerror(errno.ENOTDIR)}"):
        claim_folder(tmp_path / "file" / "below")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError, match=rf"^output: {tmp_path} .*\bconfig\.json\b"):
        claim_folder(tmp_path)
    (tmp_path / "export.json").write_text("{}")
    claim_folder(tmp_path)
    check_same_model(tmp_path, {"model_type": "vit"}, "1f")
    with pytest.raises(ModelError, match=rf"^output: {tmp_path} .*\bconfig\.json\b"):
        check_same_model(tmp_path, {"model_type": "swin"}, "1f")
    (tmp_path / "config.json").write_text('{"model_type": "vit", "transformers_version": "5.1.0"}')
    check_same_model(tmp_path, {"model_type": "vit", "transformers_version": "5.2.0"}, "1f")
    (tmp_path / "export.json").write_text("[]")
    with pytest.raises(ModelError, match=rf"^{tmp_path}/export\.json\b"):
        ExportRecord.load(tmp_path)


def test_export_onnx_keeps_the_mode_of_each_module(tmp_path):
    model = timm_model().train()
    model.timm_model.norm.eval()
    modes = [module.training for module in model.modules()]
    export_onnx(model, tmp_path / "model.onnx")
    assert [module.training for module in model.modules()] == modes
    assert not all(modes)
    assert any(modes)


def test_int8_limit_of_a_single_class_is_relative_to_its_logits(tmp_path):
    torch.manual_seed(0)
    model = build_model(["yes"], architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO).eval()
    export_onnx(model, tmp_path / "model.onnx")
    bias = model.timm_model.head.bias
    for change, is_refused in ((0.05, False), (5.0, True), (float("nan"), True)):
        with torch.no_grad():
            bias += change
        with pytest.raises(ModelError) if is_refused else nullcontext():
            limit = tolerance("int8", None)
            found = check_parity(tmp_path / "model.onnx", model, (3, 16, 16), [1, 3], limit, "model.onnx")
            assert found.relative_error == pytest.approx(0.05, rel=0.2)


@pytest.mark.parametrize("model", ["outputs/quickstart", torch.nn.Linear(3, 3)])
def test_export_onnx_of_another_object_raises_type_error(tmp_path, model):
    with pytest.raises(TypeError, match=r"^model:"):
        export_onnx(model, tmp_path / "model.onnx")


def test_export_onnx_in_fp16_takes_images_of_other_types(micro, tmp_path):
    images = np.random.default_rng(0).normal(size=(2, 3, 16, 16))
    for name, values in (("array", images.astype(np.float32)), ("double", images), ("tensor", torch.tensor(images))):
        export_onnx(micro, tmp_path / name, dtype="fp16", images=values)
    assert len({(tmp_path / name).read_bytes() for name in ("array", "double", "tensor")}) == 1
