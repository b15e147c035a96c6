"""Variants of a ViT by model_args: patch dropout, registers, LayerScale, QK norm, rotary positions."""

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.images import LABELS
from helpers.models import build_model
from transformers import AutoModelForImageClassification

from hfvit.errors import ModelError
from hfvit.export.onnx import export_onnx

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
    with pytest.raises(ModelError, match="patch_drop_rate"):
        build_model(LABELS, architecture="swin_tiny_patch4_window7_224", image_size=224, patch_drop_rate=0.5)
