"""Tiny random image classifiers of all families of transformers.

Each has its image processor.
"""

import torch
import transformers
from helpers.images import LABELS
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

SIZE = 64
VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
       "image_size": SIZE, "patch_size": 16}  # fmt: skip
SWIN = {"image_size": SIZE, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
PYRAMID = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "image_size": SIZE}
# model type -> values of its configuration, except for models without fixed image size or logits
FAMILIES = {
    "beit": VIT,
    "bit": {"embedding_size": 32, "hidden_sizes": [128, 128], "depths": [1, 1]},
    "clip": {"vision_config": VIT, "text_config": TOWER},
    "convnext": PYRAMID,
    "convnextv2": PYRAMID,
    "cvt": {"embed_dim": [16, 32, 32], "num_heads": [1, 1, 2]},
    "data2vec-vision": VIT,
    "deit": VIT,
    "dinov2": {**VIT, "mlp_ratio": 2},
    "dinov2_with_registers": {**VIT, "mlp_ratio": 2},
    "donut-swin": SWIN,
    "efficientnet": {"image_size": SIZE, "width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320},
    "focalnet": {"image_size": SIZE, "embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32],
                 "focal_levels": [2, 2], "focal_windows": [3, 3]},
    "hgnet_v2": {},
    "hiera": {"embed_dim": 16, "image_size": [SIZE, SIZE], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    "ijepa": VIT,
    "levit": {"image_size": SIZE, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1],
              "key_dim": [8, 8, 8]},
    "metaclip_2": {"vision_config": VIT, "text_config": TOWER},
    "mobilenet_v1": {"image_size": SIZE, "depth_multiplier": 0.25},
    "mobilenet_v2": {"image_size": SIZE, "depth_multiplier": 0.25},
    "mobilevit": {"image_size": SIZE, "hidden_sizes": [24, 24, 24], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32]},
    "mobilevitv2": {"image_size": SIZE, "width_multiplier": 0.25},
    "poolformer": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "pvt": {"image_size": SIZE, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 1, 1]},
    "pvt_v2": {"image_size": SIZE, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1],
               "num_attention_heads": [1, 1, 1, 1]},
    "regnet": {**STAGES, "groups_width": 8},
    "resnet": STAGES,
    "segformer": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]},
    "siglip": {"vision_config": VIT, "text_config": TOWER},
    "swiftformer": {"image_size": SIZE, "embed_dims": [16, 16, 16, 16], "depths": [1, 1, 1, 1]},
    "swin": SWIN,
    "swinv2": SWIN,
    "vit": VIT,
    "vit_msn": VIT,
}  # fmt: skip


def stock_model(family: str):
    """Build the model of a family, with a head that is confident."""
    config = AutoConfig.for_model(family, **FAMILIES[family], num_labels=len(LABELS))
    config.id2label = dict(enumerate(LABELS))
    config.label2id = {label: index for index, label in enumerate(LABELS)}
    config.architectures = []
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(config).eval()
    heads = [module for module in model.modules() if getattr(module, "out_features", None) == len(LABELS)]
    with torch.no_grad():
        heads[-1].weight.mul_(100.0)
    return model


def stock_processor(family: str):
    """Build the image processor of a family for images of `SIZE` pixels."""
    name = IMAGE_PROCESSOR_MAPPING_NAMES.get(family, {}).get("torchvision") or "ViTImageProcessor"
    kind = getattr(transformers, name)
    square = {"height": SIZE, "width": SIZE}
    keeps_ratio = "shortest_edge" in (kind.size or {})
    values = {"size": {"shortest_edge": SIZE} if keeps_ratio else square}
    if getattr(kind, "do_center_crop", False):
        values["crop_size"] = square
    return kind(**values)
