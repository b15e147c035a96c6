"""Parameter groups against timm's own optimizer factory."""

from fnmatch import fnmatch

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

from hfvit.errors import ModelError
from hfvit.models.freezing import freeze
from hfvit.training.param_groups import build_param_groups

MICRO = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}


@pytest.fixture
def vit():
    return timm.create_model("vit_tiny_patch16_224", **MICRO)


def by_parameter(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"] * group.get("lr_scale", 1.0), group["weight_decay"])
        for group in groups
        for p in group["params"]
    }


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_tiny_patch16_224", MICRO),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
    ],
)
def test_build_param_groups_equals_timms_optimizer(name, kwargs, layer_decay):
    model = timm.create_model(name, **kwargs)
    ours = by_parameter(model, build_param_groups(model, 1e-3, 0.05, layer_decay))
    reference = create_optimizer_v2(
        model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=layer_decay if layer_decay < 1 else None
    )
    expected = by_parameter(model, reference.param_groups)
    assert ours.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for parameter, (lr, weight_decay) in expected.items():
        assert ours[parameter] == (pytest.approx(lr), weight_decay), parameter


def test_layer_decay_applies_in_a_pytorch_optimizer(vit):
    optimizer = torch.optim.AdamW(build_param_groups(vit, 1e-3, 0.0, layer_decay=0.5), lr=1.0)
    before = {name: parameter.detach().clone() for name, parameter in vit.named_parameters()}
    for parameter in vit.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: (before[name] - p).abs().mean().item() for name, p in vit.named_parameters()}
    assert moved["head.weight"] == pytest.approx(1e-3, rel=1e-3)
    assert moved["blocks.1.attn.qkv.weight"] == pytest.approx(2 * moved["blocks.0.attn.qkv.weight"], rel=1e-3)


def test_first_group_has_the_recipes_learning_rate(vit):
    groups = build_param_groups(vit, 1e-3, 0.05, layer_decay=0.75)
    assert groups[0]["lr"] == 1e-3
    assert groups[-1]["lr"] == pytest.approx(1e-3 * 0.75**4)
    assert len(build_param_groups(vit, 1e-3, 0.05)) == 2  # with and without weight decay


def test_no_weight_decay_names_do_not_decay(vit):
    groups = by_parameter(vit, build_param_groups(vit, 1e-3, 0.05))
    for name, (_, weight_decay) in groups.items():
        exempt = name in ("pos_embed", "cls_token") or name.endswith(".bias") or "norm" in name
        assert weight_decay == (0.0 if exempt else 0.05), name


def test_build_param_groups_with_frozen_backbone(vit):
    freeze(vit, "backbone")
    assert {name for name, p in vit.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_build_param_groups_with_frozen_blocks(vit):
    freeze(vit, 2)
    trained = {name for name, p in vit.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in trained if name.startswith("blocks")} == {"2"}
    assert not trained & {"pos_embed", "cls_token", "patch_embed.proj.weight"}
    assert "head.weight" in trained
    assert "norm.weight" in trained
    # Frozen weights are in no group, and have no optimizer state.
    assert by_parameter(vit, build_param_groups(vit, 1e-3, 0.05, 0.75)).keys() == trained


def test_freeze_of_too_many_blocks_raises(vit):
    with pytest.raises(ModelError, match=r"^freeze: .*\b3\b.*\b4\b"):
        freeze(vit, 4)


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
@pytest.mark.parametrize(
    ("name", "kwargs", "first_and_last"),
    [
        ("vit_tiny_patch16_224", MICRO, ["patch_embed.*", "cls_token", "pos_embed", "head.*"]),
        (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
            ["patch_embed.*", "*relative_position_bias_table", "head.*"],
        ),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}, ["stem.*", "head.fc.*"]),
    ],
)
def test_fallback_groups_have_first_and_last_layer(name, kwargs, first_and_last, layer_decay):
    model = timm.create_model(name, **kwargs)
    groups = build_param_groups(model, 1e-3, 0.05, layer_decay, with_fallback=True)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    marked = {names[id(p)] for group in groups if group.get("use_fallback") for p in group["params"]}
    expected = {key for key in names.values() if any(fnmatch(key, pattern) for pattern in first_and_last)}
    assert marked == expected
    assert by_parameter(model, groups) == by_parameter(model, build_param_groups(model, 1e-3, 0.05, layer_decay))
