"""Small random image classifiers of timm's families."""

import torch
from helpers.images import LABELS
from helpers.models import build_model

from hfvit.models.freezing import classifier_parameters
from hfvit.models.modeling import HFViTForImageClassification

# Swin for 32 px with the arguments of recipes/swin_tiny.yaml; not in FAMILIES.
SWIN = {"patch_size": 2, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2), "window_size": 4}
VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
# family -> timm model, image size in pixels, arguments for a small network
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", 32, VIT),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", 32, VIT),
    "deit3": ("deit3_small_patch16_224", 32, VIT),
    "beitv2": ("beitv2_base_patch16_224", 32, VIT),
    "eva02": ("eva02_tiny_patch14_224", 32, VIT),
    "dinov2": ("vit_small_patch14_reg4_dinov2", 32, VIT),
    "dinov3": ("vit_small_patch16_dinov3", 32, VIT),
    "siglip": ("vit_base_patch16_siglip_224", 32, VIT),
    "naflex": ("naflexvit_base_patch16_map", 32, VIT),
    "flexivit": ("flexivit_small", 32, VIT),
    "swinv2": ("swinv2_tiny_window8_256", 32, SWIN),
    "hiera": ("hiera_tiny_224", 32, {"embed_dim": 16, "stages": (1, 1, 1, 1), "patch_stride": (2, 2),
              "patch_kernel": (3, 3), "patch_padding": (1, 1)}),
    "maxvit": ("maxvit_pico_rw_256", 32,
               {"embed_dim": (8, 16), "depths": (1, 1), "block_type": ("M", "M"), "stem_width": (8, 8),
                "transformer_dim_head": 8, "transformer_partition_ratio": 16}),
    "convnextv2": ("convnextv2_atto", 64, {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
    "mobilevitv2": ("mobilevitv2_050", 64, {}),
    "fastvit": ("fastvit_t8", 64, {"layers": (1, 1, 1, 1), "embed_dims": (8, 8, 16, 16)}),
    "efficientformerv2": ("efficientformerv2_s0", 64,
                          {"depths": (1, 1, 2, 2), "embed_dims": (8, 8, 16, 16), "num_vit": 1,
                           "mlp_ratios": (2, 2, 2, 2)}),
}  # fmt: skip
FIXED_SIZE = ("hiera", "efficientformerv2")  # families whose checkpoints cannot change the image size


def build(family, image_size=None, **kwargs):
    """Build an untrained model of a family."""
    architecture, size, args = {**FAMILIES, "swin": ("swin_tiny_patch4_window7_224", 32, SWIN)}[family]
    torch.manual_seed(0)
    return build_model(LABELS, architecture=architecture, image_size=image_size or size, timm_kwargs=args, **kwargs)


def save_resized(family, folder, image_size):
    """Save a checkpoint for another image size, whose logits differ between images."""
    model = build(family, image_size if family in FIXED_SIZE else None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos_embed" in name:
                parameter.normal_(std=0.5)
            if name.rpartition(".")[2].startswith("gamma"):  # LayerScale
                parameter.fill_(0.5)
        for parameter in classifier_parameters(model.timm_model):
            if parameter.ndim > 1:
                parameter.normal_()
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.momentum = None  # statistics of the next batches
        size = model.config.image_size
        model.train()(torch.randn(8, 3, *((size, size) if isinstance(size, int) else size)))
        model.eval()
    model.config.set_preprocessing(crop_pct=1.0)
    model.config.set_crop_mode("squash")
    model.save_pretrained(folder)
    HFViTForImageClassification.from_pretrained(folder, image_size=image_size).save_pretrained(folder)
