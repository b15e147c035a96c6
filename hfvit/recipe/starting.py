"""Choose the starting recipe for the number and size of a data set's images."""

import math
import re
from dataclasses import dataclass
from typing import Any

import yaml

from hfvit.errors import printable

SMALL_MODEL = "timm/vit_small_patch14_dinov2.lvd142m"
LARGE_MODEL = "timm/vit_base_patch14_dinov2.lvd142m"
MANY_IMAGES = 10_000  # smallest number for the larger model on a GPU
MIN_IMAGES_FOR_TEST = 300  # a tenth of fewer images is too small for a test accuracy
MIN_VALIDATION_IMAGES = 30
IMAGES_SEEN = 30_000  # in all epochs of fine-tuning, within the limits on epochs
IMAGES_SEEN_FROM_SCRATCH = 300_000
MIN_IMAGES_TO_SELECT = 500  # with fewer validation images, accuracy is too coarse to select a checkpoint
IMBALANCE = 10.0  # smallest ratio of the largest to the smallest class for class_balance
SECTIONS = {
    "Model": "model_name_or_path architecture model_args image_size",
    "Data": "dataset_name dataset_config_name validation_fraction test_split",
    "Augmentation": "crop_scale crop_pct",
    "Optimization": "class_balance global_batch_size num_train_epochs learning_rate layer_decay weight_decay"
    " warmup_steps max_grad_norm bf16",
    "Evaluation": "metric_for_best_model eval_strategy eval_steps logging_steps",
    "Output": "output_dir",
}


@dataclass(frozen=True)
class DataSize:
    """Properties of a data set that the starting recipe depends on.

    Args:
        images: number of training images, including held-out images.
        smallest_class: number of training images of the smallest class.
        largest_class: number of training images of the largest class.
        classes: number of classes.
        side: shorter side of a typical image, in pixels.
        validation: number of images of the validation split, 0 if there is none.
        holds_out_test: whether test images are held out of the training split.
        is_multi_label: whether an image can have several labels.
    """

    images: int
    smallest_class: int
    largest_class: int
    classes: int
    side: int
    validation: int = 0
    holds_out_test: bool = False
    is_multi_label: bool = False


def starting_recipe(
    size: DataSize, dataset_name: str, *, has_gpu: bool, has_bf16: bool = False, from_scratch: bool = False
) -> dict[str, Any]:
    """Choose model, image size, batch size, epochs and evaluation for a data set.

    Args:
        size: properties of the data set.
        dataset_name: data set of the recipe.
        has_gpu: choose a larger model, images and batches.
        has_bf16: whether the GPU supports bfloat16.
        from_scratch: train a small model without pretrained weights.

    Returns:
        Keys and values of the recipe.
    """
    values: dict[str, Any] = {"dataset_name": dataset_name}
    kept = 1.0
    validation = size.validation
    if not validation:
        fraction = 0.05 if size.images >= 20_000 else min(0.3, max(0.1, MIN_VALIDATION_IMAGES / size.images))
        values["validation_fraction"] = round(fraction, 2)
        validation = round(size.images * fraction)
        kept -= fraction
    if size.holds_out_test:
        if size.images < MIN_IMAGES_FOR_TEST:
            values["test_split"] = None
        else:
            kept -= 0.1
    images = max(1, round(size.images * kept))
    if from_scratch:
        values |= _new_model(size.side)
    else:
        large = has_gpu and images >= MANY_IMAGES
        values["model_name_or_path"] = LARGE_MODEL if large else SMALL_MODEL
        values["image_size"] = 224 if has_gpu and size.side >= 128 else 112
    values |= _schedule(images, has_gpu, from_scratch)
    if size.largest_class >= IMBALANCE * max(1, size.smallest_class) and not size.is_multi_label:
        values["class_balance"] = "sample"
    if has_bf16:
        values["bf16"] = True
    values["metric_for_best_model"] = (
        "loss" if validation < MIN_IMAGES_TO_SELECT or size.is_multi_label else "accuracy"
    )
    values["output_dir"] = f"outputs/{_folder_name(dataset_name)}"
    return values


def _new_model(side: int) -> dict[str, Any]:
    """Configure a ViT with 64 patches and 0.8 or 2.7 million parameters."""
    size = 32 if side < 48 else 64
    width = 128 if size == 32 else 192
    network = {"patch_size": size // 8, "embed_dim": width, "depth": 4 if size == 32 else 6, "num_heads": width // 32}
    return {
        "architecture": "vit_tiny_patch16_224",
        "model_args": network,
        "image_size": size,
        "crop_scale": [0.7, 1.0],
        "crop_pct": 1.0,
    }


def _schedule(images: int, has_gpu: bool, from_scratch: bool) -> dict[str, Any]:
    """Choose batch size, epochs, learning rate and the steps between evaluations.

    Args:
        images: number of training images, without held-out images.
        has_gpu: choose larger batches, and at least three epochs.
        from_scratch: choose more epochs, and the same learning rate for all layers.
    """
    largest = 128 if has_gpu and images >= MANY_IMAGES else 64
    batch = min(largest, max(4, 2 ** int(math.log2(max(1, images / 8)))), 2 ** int(math.log2(images)))
    if from_scratch:
        min_epochs, max_epochs, images_seen = 10, 200, IMAGES_SEEN_FROM_SCRATCH
    else:
        min_epochs, max_epochs, images_seen = 3 if has_gpu else 1, 30, IMAGES_SEEN
    epochs = min(max_epochs, max(min_epochs, round(images_seen / images)))
    steps = max(1, images // batch)
    peak = (1e-3 if from_scratch else 2e-4) * math.sqrt(batch / 64)
    layer_decay = {} if from_scratch else {"layer_decay": 0.75}
    return {
        "global_batch_size": batch,
        "num_train_epochs": epochs,
        "learning_rate": float(f"{peak:.1g}"),
        **layer_decay,
        "weight_decay": 0.05,
        "warmup_steps": 0.1,
        "max_grad_norm": 1.0,
        "eval_strategy": "steps",
        # About ten evaluations, at most two per epoch.
        "eval_steps": max(1, steps * epochs // 10, steps // 2),
        "logging_steps": max(1, min(50, steps * epochs // 20)),
    }


def _folder_name(dataset_name: str) -> str:
    stem = re.split(r"[\\/]", dataset_name.rstrip("/\\"))[-1]
    return re.sub(r"[^\w.-]+", "_", stem.split(".")[0] or stem).strip("._") or "run"


def recipe_text(values: dict[str, Any], size: DataSize) -> str:
    """Format the recipe as YAML with a comment for each section.

    Args:
        values: keys and values from `starting_recipe`.
        size: properties of the data set.
    """
    name = printable(str(values["dataset_name"]))
    lines = [f"# Starting recipe for {name}: {size.images:,} training images, {size.classes} classes.", "#"]
    lines.append("#   hfvit train RECIPE.yaml")
    known = " ".join(SECTIONS.values()).split()
    others = " ".join(key for key in values if key not in known)  # which images and labels are used
    for title, keys in SECTIONS.items():
        names = f"{keys} {others}" if title == "Data" else keys
        some = {key: values[key] for key in names.split() if key in values}
        if some:
            lines += ["", f"# {title}", *(yaml_line(key, value) for key, value in some.items())]
    return "\n".join(lines) + "\n"


def yaml_line(key: str, value: Any) -> str:
    """Format a key of a recipe as one line of YAML, in ASCII, safe for a terminal."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return f"{key}: {text.removesuffix('...' + chr(10)).strip()}"
