"""Descriptions of networks, by the sizes that were built."""

import pytest
from helpers.images import LABELS
from helpers.models import build_model
from helpers.recipes import ARCHITECTURE, MICRO

from hfvit.models.describe import describe_architecture


@pytest.mark.parametrize(
    ("architecture", "image_size", "arguments", "expected"),
    [
        (ARCHITECTURE, 16, MICRO, "Vision Transformer with patches of 8 px, 2 blocks of width 32, 2 heads"),
        ("vit_base_patch14_reg4_dinov2", 28, {"embed_dim": 32, "depth": 1, "num_heads": 2},
         "Vision Transformer with patches of 14 px, 1 blocks of width 32, 2 heads, 4 registers"),
        ("test_resnet", 32, {}, "Res Net"),
    ],
)  # fmt: skip
def test_description_has_the_sizes_of_the_network(architecture, image_size, arguments, expected):
    model = build_model(LABELS, architecture=architecture, image_size=image_size, timm_kwargs=arguments)
    assert describe_architecture(model.timm_model) == expected


def test_configuration_of_an_untrained_model_has_nothing_of_timms_weights():
    config = build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO).config
    assert not {"tag", "custom_load", "license"} & config.pretrained_cfg.keys()
    assert config.pretrained_cfg["mean"]
