"""Build models: image size, attention maps, freezing, gradients, errors."""

import json

import pytest
import timm
import torch
from helpers.images import LABELS
from helpers.messages import assert_names, option_of
from helpers.models import build_model
from helpers.recipes import ARCHITECTURE, MICRO
from timm.models import save_for_hf
from transformers import AutoModelForImageClassification, TimmWrapperForImageClassification

from hfvit.errors import ModelError
from hfvit.models.modeling import HFViTForImageClassification

# Position embeddings with the class token, without it (DINOv2 with registers), and no class token.
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", MICRO),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {**MICRO, "patch_size": 8}),
    "siglip": ("vit_base_patch16_siglip_224", MICRO),
    "deit": ("deit_tiny_distilled_patch16_224", MICRO),
}


def micro(labels=LABELS, image_size=32, family="vit", **kwargs):
    torch.manual_seed(0)
    architecture, args = FAMILIES[family]
    return build_model(list(labels), architecture=architecture, image_size=image_size, timm_kwargs={**args, **kwargs})


def test_model_name_of_timm_names_its_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("resnet18", "resnet18.a1_in1k"):
        with pytest.raises(ModelError, match=r"^model_name_or_path:") as caught:
            HFViTForImageClassification.from_pretrained(name)
        assert_names(caught.value, name, "timm/resnet18.a1_in1k")
    with pytest.raises(ModelError, match=r"^model_name_or_path:"):
        HFViTForImageClassification.from_pretrained("resnet18.unknown")
    micro().save_pretrained("resnet18")
    assert HFViTForImageClassification.from_pretrained("resnet18").config.label_names == LABELS


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [24, 48])
def test_set_image_size_resamples_position_embeddings_like_timm(family, size, tmp_path):
    start = 64 if family == "dinov2" else 32
    model = micro(family=family, image_size=start)
    torch.nn.init.normal_(model.timm_model.pos_embed)
    model.save_pretrained(tmp_path)
    resized = HFViTForImageClassification.from_pretrained(tmp_path, image_size=size)
    assert resized.config.image_size == (size, size)
    # timm's loader also resamples when it builds the model at another size.
    reference = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=size)
    torch.testing.assert_close(resized.timm_model.pos_embed, reference.pos_embed)
    resized.save_pretrained(tmp_path / "resized")
    stock = AutoModelForImageClassification.from_pretrained(tmp_path / "resized").eval()
    x = torch.randn(2, 3, size, size)
    assert torch.equal(stock(x).logits, resized.eval()(x).logits)


def test_set_image_size_keeps_features_unlike_the_stock_class(tmp_path):
    """Features of a smooth image barely change at twice the size."""
    model = micro(image_size=64).eval()
    grid = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij"), dim=-1)
    smooth = grid.reshape(64, 2) @ torch.randn(2, 32)
    with torch.no_grad():
        model.timm_model.pos_embed[0, 1:] = smooth
    model.save_pretrained(tmp_path)
    resized = HFViTForImageClassification.from_pretrained(tmp_path, image_size=128).eval()
    # An image of 8x8 flat tiles, each one patch at 64 px and four patches at 128 px.
    tiles = torch.randn(1, 3, 8, 8)
    small, large = (torch.nn.functional.interpolate(tiles, scale_factor=scale) for scale in (8, 16))

    def features(wrapped, pixel_values):
        with torch.no_grad():
            return wrapped.timm_model.forward_head(wrapped.timm_model.forward_features(pixel_values), pre_logits=True)

    original = features(model, small)
    assert torch.cosine_similarity(features(resized, large), original).item() > 0.99
    stock = TimmWrapperForImageClassification.from_pretrained(
        tmp_path, model_args={**MICRO, "img_size": 128}, ignore_mismatched_sizes=True
    )
    # The stock class leaves uninitialized memory, often NaN.
    assert not torch.allclose(stock.timm_model.pos_embed, resized.timm_model.pos_embed, atol=0.1)


def test_output_attentions_equal_the_softmax():
    model = micro().eval()
    x = torch.randn(2, 3, 32, 32)
    plain = model(x)
    outputs = model(x, output_attentions=True)
    torch.testing.assert_close(outputs.logits, plain.logits)
    assert plain.attentions is None
    assert len(outputs.attentions) == 2
    assert outputs.attentions[0].shape == (2, 2, 17, 17)
    torch.testing.assert_close(outputs.attentions[0].sum(dim=-1), torch.ones(2, 2, 17))
    block = model.timm_model.blocks[0]
    tokens = block.norm1(model.timm_model._pos_embed(model.timm_model.patch_embed(x)))
    q, k, _ = block.attn.qkv(tokens).reshape(2, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(outputs.attentions[0], (q @ k.transpose(-1, -2) / 4).softmax(dim=-1))
    assert isinstance(model(x, output_attentions=True, return_dict=False)[-1], tuple)
    assert all(layer.attn.fused_attn for layer in model.timm_model.blocks)


def test_output_attentions_of_convnext_raises():
    model = build_model(
        LABELS, architecture="convnext_atto", timm_kwargs={"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}
    )
    with pytest.raises(ModelError, match=r"^output_attentions: .*\bConvNeXt\b"):
        model(torch.zeros(1, 3, 64, 64), output_attentions=True)


def test_freeze_backbone_has_no_gradient_and_no_dropout():
    model = micro(drop_path_rate=0.5, proj_drop_rate=0.5)
    model.freeze("backbone")
    model.train()
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(model(x).logits, model(x).logits)
    model(x).logits.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        "timm_model.head.weight",
        "timm_model.head.bias",
    }


def test_freeze_of_a_block_keeps_the_dropout_of_the_others():
    model = micro(proj_drop_rate=0.5)
    model.freeze(1)
    model.train()
    first, *others = (block.training for block in model.timm_model.blocks)
    assert (first, set(others)) == (False, {True})
    x = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model(x).logits, model(x).logits)


def test_activation_checkpointing_gives_the_same_gradients():
    x, grads = torch.randn(2, 3, 32, 32), []
    for checkpointing in (False, True):
        model = micro().train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.timm_model.grad_checkpointing
        model(x).logits.square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_from_pretrained_loads_layer_scale(tmp_path):
    """transformers renames `gamma` in old checkpoints (transformers#33687)."""
    model = micro(init_values=0.3)
    torch.nn.init.normal_(model.timm_model.blocks[0].ls1.gamma)
    model.save_pretrained(tmp_path)
    loaded = HFViTForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.timm_model.blocks[0].ls1.gamma, model.timm_model.blocks[0].ls1.gamma)


@pytest.mark.parametrize(
    ("kwargs", "option", "data"),
    [
        ({"architecture": "vit_tinny_patch16_224"}, "architecture", ["'vit_tiny_patch16_224'"]),
        ({"architecture": ARCHITECTURE, "image_size": 50}, "image_size", [50, 16, 48, 64]),
        ({"architecture": "efficientformer_l1", "image_size": 96}, "image_size", ["EfficientFormer", 96]),
        ({"architecture": ARCHITECTURE, "timm_kwargs": {"heads": 2}}, "model_args", [ARCHITECTURE, "{'heads': 2}"]),
        ({"architecture": ARCHITECTURE, "timm_kwargs": {"embed_dim": 32}}, None, [ARCHITECTURE, "{'embed_dim': 32}"]),
        ({"architecture": ARCHITECTURE, "timm_kwargs": MICRO, "freeze": 9}, "freeze", [9]),
        ({"model_name_or_path": "/nowhere"}, "model_name_or_path", ["/nowhere"]),
    ],
)
def test_build_model_with_a_wrong_value_names_option_and_data(kwargs, option, data):
    with pytest.raises(ModelError) as caught:
        build_model(LABELS, **kwargs)
    assert option_of(caught.value) == option
    assert_names(caught.value, *data)


def test_build_model_of_convnext_accepts_image_size():
    kwargs = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}
    model = build_model(LABELS, architecture="convnext_atto", image_size=64, timm_kwargs=kwargs)
    assert model.config.image_size == (64, 64)
    assert "img_size" not in model.config.model_args
    assert model(torch.zeros(1, 3, 64, 64)).logits.shape == (1, 3)


def test_no_split_modules_names_the_blocks():
    assert micro()._no_split_modules == ["Block"]


def test_build_model_of_unreachable_repository_names_it():
    with pytest.raises(ModelError, match=r"^model_name_or_path: timm/no-such-model\b"):
        build_model(LABELS, model_name_or_path="timm/no-such-model")


def test_build_model_of_other_model_type_names_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_size": 32}))
    with pytest.raises(ModelError, match=r"^model_name_or_path: .*'vit'") as caught:
        build_model(LABELS, model_name_or_path=str(tmp_path))
    assert_names(caught.value, tmp_path)


def test_from_pretrained_loads_what_timm_saves(tmp_path):
    network = timm.create_model(ARCHITECTURE, num_classes=7, img_size=16, **MICRO).eval()
    save_for_hf(network, tmp_path, model_args={"num_classes": 7, "img_size": 16, **MICRO}, safe_serialization=True)
    model = HFViTForImageClassification.from_pretrained(tmp_path, labels=LABELS).eval()
    assert model.timm_model.head.weight.shape[0] == len(LABELS)
    assert "num_classes" not in model.config.model_args
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.timm_model.forward_features(images), network.forward_features(images))
