"""config.json and preprocessor_config.json for transformers.js and ORTModel."""

import json
from collections.abc import Iterable
from typing import Any

from transformers import AutoConfig

from hfvit.artifacts.constants import CONFIG_FILE, PRETRAINED_CFG
from hfvit.artifacts.run_record import PREPROCESSING
from hfvit.errors import ModelError
from hfvit.export.processor_steps import crops_alike, image_steps, processor_name
from hfvit.export.text_inputs import reads_texts

# Prefix of timm's model name -> model_type of transformers; the first match applies, "vit" otherwise.
FAMILIES = {
    "beit": "beit",
    "convnextv2": "convnextv2",
    "convnext": "convnext",
    "deit3": "vit",
    "deit": "deit",
    "efficientnet": "efficientnet",
    "tf_efficientnet": "efficientnet",
    "mobilenetv2": "mobilenet_v2",
    "resnet": "resnet",
    "swin": "swin",
}
# Image classifiers of transformers.js 4.3.2 (src/models/registry.js). Others are written as "vit", which has the
# same input and output.
JS_FAMILIES = {
    "beit", "convnext", "convnextv2", "deit", "dinov2", "dinov2_with_registers", "efficientnet", "fastvit", "hiera",
    "ijepa", "mobilenet_v1", "mobilenet_v2", "mobilenet_v3", "mobilenet_v4", "mobilevit", "mobilevitv2", "pvt",
    "resnet", "segformer", "swin", "vit", "vit_msn",
}  # fmt: skip
# Image processors of transformers.js 4.3.2 with the steps of transformers' class.
JS_PROCESSORS = {
    "BitImageProcessor", "CLIPImageProcessor", "ConvNextImageProcessor", "DeiTImageProcessor",
    "DINOv3ViTImageProcessor", "EfficientNetImageProcessor", "MobileNetV1ImageProcessor", "MobileNetV2ImageProcessor",
    "MobileViTImageProcessor", "PvtImageProcessor", "SegformerImageProcessor", "SiglipImageProcessor",
    "ViTImageProcessor",
}  # fmt: skip
# Keys with local paths or training state.
PRIVATE = ("_name_or_path", "name_or_path", "use_cache")


def family_config(model) -> dict:
    """Return the config.json that transformers.js and ORTModel read beside ONNX files.

    Raises:
        ModelError: the configuration does not name each class once.
    """
    config = json.loads(model.config.to_json_string())
    if config["model_type"] == "timm_wrapper":
        config = _timm_config(model)
    elif config["model_type"] not in JS_FAMILIES and not reads_texts(model):
        config = _as_vit(config)
    config = {key: value for key, value in config.items() if key not in PRIVATE}
    labels = {index: model.config.id2label.get(index) for index in range(model.config.num_labels)}
    if None in labels.values():
        raise ModelError(
            f"The configuration has {len(labels)} classes (num_labels), but id2label names"
            f" {sorted(model.config.id2label)}. Correct {CONFIG_FILE} of the checkpoint."
        )
    config["id2label"] = {str(index): label for index, label in labels.items()}
    config["label2id"] = {label: index for index, label in labels.items()}
    config["num_labels"] = len(labels)
    if getattr(model.config, "problem_type", None):  # selects sigmoid or softmax
        config["problem_type"] = model.config.problem_type
    if getattr(model.config, "thresholds", None):
        config["thresholds"] = model.config.thresholds
    config["dtype"] = "float32"
    return config


def _as_vit(config: dict) -> dict:
    """Return a ViT's configuration with the input size of another model."""
    size = next((config[key] for key in ("image_size", "input_size") if config.get(key)), None)
    kept = {"image_size": _image_size(size), "num_channels": config.get("num_channels")}
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "source_model_type": config["model_type"],
        **{key: value for key, value in kept.items() if isinstance(value, int | list)},
    }


def _image_size(size: Any) -> Any:
    """Return one number for a square size, [height, width] for others."""
    if not isinstance(size, list | tuple):
        return size
    height, width = size[-2:] if len(size) > 1 else (size[0], size[0])
    return width if height == width else [height, width]


def _timm_config(model) -> dict:
    architecture = model.config.architecture
    family = next((name for prefix, name in FAMILIES.items() if architecture.startswith(prefix)), "vit")
    stock = type(AutoConfig.for_model(family))
    size = model.config.pretrained_cfg.get("input_size", (3, 224, 224))
    network = model.timm_model
    values = {"image_size": _image_size(size), "num_channels": size[0], "hidden_size": network.num_features}
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if patch:
        values["patch_size"] = patch[0] if isinstance(patch, tuple) else patch
    if hasattr(network, "blocks"):
        values |= _transformer_values(network)
    elif hasattr(network, "layers") or hasattr(network, "stages"):
        values |= _pyramid_values(network)
    known = set(stock().to_dict())
    return {
        "architectures": [f"{stock.__name__.removesuffix('Config')}ForImageClassification"],
        "model_type": family,
        **{key: value for key, value in values.items() if key in known},
        "timm_architecture": architecture,
    }


def _transformer_values(network) -> dict:
    values = {"num_hidden_layers": len(network.blocks)}
    block = network.blocks[0]
    attention = getattr(block, "attn", None)
    mlp = getattr(getattr(block, "mlp", None), "fc1", None)
    if hasattr(attention, "num_heads"):
        values["num_attention_heads"] = attention.num_heads
        values["qkv_bias"] = getattr(getattr(attention, "qkv", None), "bias", None) is not None
    if mlp is not None:
        values["intermediate_size"] = mlp.out_features
    if hasattr(getattr(block, "norm1", None), "eps"):
        values["layer_norm_eps"] = block.norm1.eps
    return values


def _pyramid_values(network) -> dict:
    found = (getattr(network, name, None) for name in ("layers", "stages"))
    stages = next((list(value) for value in found if isinstance(value, Iterable)), [])  # a method in HRNet
    blocks = [list(stage.blocks) for stage in stages if hasattr(stage, "blocks")]
    values = {"depths": [len(stage) for stage in blocks], "num_stages": len(blocks)}
    first = [stage[0] for stage in blocks if stage]
    if all(hasattr(getattr(block, "attn", None), "num_heads") for block in first):
        values["num_heads"] = [block.attn.num_heads for block in first]
    if isinstance(getattr(network, "embed_dim", None), int):
        values["embed_dim"] = network.embed_dim
    if all("num_chs" in info for info in getattr(network, "feature_info", [])):
        values["hidden_sizes"] = [info["num_chs"] for info in network.feature_info]
    return values


def stock_processor_config(processor) -> dict:
    """Return an equivalent preprocessor_config.json for transformers(.js).

    A processor of timm, or of a class that transformers.js does not have, becomes a BitImageProcessor if it crops,
    else a ViTImageProcessor. These start a crop with an odd margin one pixel earlier than timm's, if at all; where
    there can be one, `pretrained_cfg` is kept for `load_classifier` and the demo, which follow timm.
    """
    name = processor_name(processor)
    own = name != "TimmWrapperImageProcessor"
    if own and name in JS_PROCESSORS:
        return _own_config(processor)
    try:
        steps = image_steps(processor)
    except ModelError:
        if not own:
            raise
        return _own_config(processor)  # no client but transformers has it
    config = {
        "image_processor_type": "BitImageProcessor" if steps.crop else "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": steps.resize is not None,
        "resample": int(steps.resample),
        "do_center_crop": steps.crop is not None,
        "do_rescale": steps.scale is not None,
        "do_normalize": steps.mean is not None,
    }
    if steps.resize:
        config["size"] = {"shortest_edge": steps.resize} if isinstance(steps.resize, int) else _size(steps.resize)
    if steps.crop:
        config["crop_size"] = _size(steps.crop)
    if steps.scale is not None:
        config["rescale_factor"] = steps.scale
    if steps.mean is not None:
        config |= {"image_mean": list(steps.mean), "image_std": list(steps.std)}
    if not own and not crops_alike(steps):
        config[PRETRAINED_CFG] = {key: processor.data_config[key] for key in PREPROCESSING}
    return config


def _own_config(processor) -> dict:
    config = json.loads(processor.to_json_string())
    config["image_processor_type"] = processor_name(processor)
    return config


def _size(size: tuple[int, int]) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}
