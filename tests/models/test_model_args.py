"""Variants of a ViT by model_args, and arguments that are refused."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.images import LABELS
from helpers.models import build_model
from helpers.raw_server import raw_server, response
from helpers.recipes import ARCHITECTURE, MICRO
from transformers import AutoModelForImageClassification

import hfvit
from hfvit.errors import ModelError, RecipeError
from hfvit.export.onnx import export_onnx
from hfvit.models.image_text import HFViTFusionForImageClassification, add_text_encoder
from hfvit.models.modeling import HFViTForImageClassification
from hfvit.recipe.arguments import ModelArguments

VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
KINDS = {
    "registers, LayerScale, QK norm": (
        "vit_tiny_patch16_224", {"reg_tokens": 2, "init_values": 1e-5, "qk_norm": True, "class_token": False,
                                 "global_pool": "avg"},
    ),
    "rotary positions": ("vit_small_patch16_rope_224", {"init_values": 1e-4}),
    "mixed rotary positions": ("vit_small_patch16_rope_mixed_224", {}),
}  # fmt: skip


def build(kind):
    architecture, args = KINDS[kind]
    torch.manual_seed(0)
    return build_model(
        LABELS, architecture=architecture, image_size=32, patch_drop_rate=0.5, timm_kwargs={**VIT, **args}
    )


@pytest.fixture
def pixel_values():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits(model, pixel_values):
    return model.eval()(pixel_values).logits


@pytest.mark.parametrize("kind", KINDS)
def test_variant_trains_saves_and_loads(kind, tmp_path, pixel_values):
    model = build(kind).train()
    seen = []
    model.timm_model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    torch.nn.functional.cross_entropy(model(pixel_values).logits, torch.tensor([0, 1, 2, 0])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    expected = logits(model, pixel_values)
    kept = model.timm_model.num_prefix_tokens + 16 // 2
    assert seen == [kept, kept + 16 // 2]  # in training and in evaluation
    model.save_pretrained(tmp_path)
    stock = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(stock, pixel_values), expected, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_export_onnx_of_a_variant_agrees(kind, tmp_path, pixel_values):
    model = build(kind)
    export_onnx(model.eval(), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (actual,) = session.run(["logits"], {"pixel_values": pixel_values.numpy()})
    np.testing.assert_allclose(actual, logits(model, pixel_values), atol=1e-5)


def test_patch_dropout_of_a_network_without_it_raises():
    with pytest.raises(ModelError, match=r"^patch_drop_rate:"):
        build_model(LABELS, architecture="swin_tiny_patch4_window7_224", image_size=224, patch_drop_rate=0.5)


@pytest.mark.parametrize(
    "model_args", [{"in_chans": 1}, {"features_only": True, "depth": 3}, {"global_pool": "", "class_token": True}]
)
def test_model_args_that_leave_no_classifier_raise(model_args):
    with pytest.raises(ModelError, match=r"^model_args: "):
        build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs={**MICRO, **model_args})


@pytest.mark.parametrize("size", [{}, {"embed_dim": 64, "depth": 1, "num_heads": 1}])
def test_architecture_without_a_head_raises(size):
    with torch.device("meta"), pytest.raises(ModelError, match=r"^architecture: .*\bqwen3_vit_306m_enc\b"):
        build_model(LABELS, architecture="qwen3_vit_306m_enc", timm_kwargs=size)


@pytest.mark.parametrize(
    "values",
    [
        {"pretrained_cfg": None}, {"pretrained_cfg": [1]}, {"architecture": 5}, {"architecture": None},
        {"model_args": "abc"}, {"label_names": 5}, {"num_classes": "x"}, {"initializer_range": "x"},
    ],
)  # fmt: skip
def test_wrong_value_in_a_configuration_is_one_error(tmp_path, values):
    build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises(ModelError, match=r"^model_name_or_path: .*config\.json"):
        HFViTForImageClassification.from_pretrained(tmp_path)


@pytest.fixture
def address():
    """URL of weights on a server that records requests."""
    with raw_server(lambda connection, path: connection.sendall(response(status="404 Not Found"))) as server:
        yield f"{server.url}/weights.pth"
        assert server.requests == []


@pytest.mark.parametrize(
    "key", ["pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"]
)
def test_recipe_with_model_args_that_load_weights_raises(key):
    with pytest.raises(RecipeError, match=rf"^model_args: .*{key}="):
        ModelArguments(architecture=ARCHITECTURE, model_args={**MICRO, key: "weights.pth"})


def refused_arguments(tmp_path, address) -> list[dict]:
    (tmp_path / "weights.pth").write_bytes(b"x")
    source = {"url": address, "architecture": ARCHITECTURE, "num_classes": 3, "input_size": [3, 16, 16]}
    return [{"checkpoint_path": str(tmp_path / "weights.pth")}, {"pretrained": True, "pretrained_cfg": source}]


@pytest.mark.parametrize("load", [hfvit.load_classifier, HFViTForImageClassification.from_pretrained])
def test_checkpoint_whose_configuration_loads_weights_is_refused(tmp_path, address, load):
    folder = tmp_path / "checkpoint"
    build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for arguments in refused_arguments(tmp_path, address):
        changed = {**config, "model_args": {**config["model_args"], **arguments}}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ModelError, match=r"\bmodel_args: "):
            load(folder)
    (folder / "config.json").write_text(json.dumps({**config, "architecture": f"local-dir:{folder}"}))
    with pytest.raises(ModelError, match=r"\barchitecture: "):
        load(folder)


TEXT = {
    "model_type": "bert", "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16,
}  # fmt: skip


def write_fusion(folder, model_args: dict, text: dict):
    values = {"model_type": "hfvit_fusion", "architectures": ["HFViTFusionForImageClassification"]}
    values |= {
        "architecture": ARCHITECTURE,
        "model_args": {**MICRO, "img_size": 16, **model_args},
        "label_names": LABELS,
    }
    values |= {"num_classes": 3, "pretrained_cfg": {}, "fusion": "concatenation", "text_encoder_config": text}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return HFViTFusionForImageClassification.config_class.from_pretrained(folder)


def test_fusion_whose_configuration_loads_weights_is_refused(tmp_path, address):
    assert HFViTFusionForImageClassification(write_fusion(tmp_path / "plain", {}, TEXT)).num_labels == 3
    for arguments in refused_arguments(tmp_path, address):
        with pytest.raises(ModelError, match=r"^model_args: "):
            HFViTFusionForImageClassification(write_fusion(tmp_path / "fusion", arguments, TEXT))
        text = {"model_type": "timm_wrapper", "architecture": ARCHITECTURE, "model_args": arguments}
        with pytest.raises(ModelError, match=r"^text_encoder_config: "):
            HFViTFusionForImageClassification(write_fusion(tmp_path / "fusion", {}, text))


def test_text_encoder_that_loads_weights_from_elsewhere_is_refused(tmp_path, address):
    for arguments in refused_arguments(tmp_path, address):
        config = {"model_type": "timm_wrapper", "architecture": ARCHITECTURE, "model_args": arguments}
        (tmp_path / "encoder").mkdir(exist_ok=True)
        (tmp_path / "encoder" / "config.json").write_text(
            json.dumps({**config, "num_classes": 3, "label_names": LABELS})
        )
        recipe = ModelArguments(architecture=ARCHITECTURE, text_encoder=str(tmp_path / "encoder"))
        image = build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO)
        with pytest.raises(ModelError, match=r"^text_encoder: .*must be a text encoder"):
            add_text_encoder(image, recipe)
