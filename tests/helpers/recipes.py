"""A micro recipe and its model arguments."""

from pathlib import Path

MICRO = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
ARCHITECTURE = "vit_tiny_patch16_224"


MICRO_RECIPE = """\
# A micro ViT on generated colors, for tests.
architecture: vit_tiny_patch16_224
model_args: {patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}
image_size: 16
validation_fraction: 0.2
crop_pct: 1.0
global_batch_size: 8
num_train_epochs: 2
learning_rate: 3.0e-3
max_grad_norm: 1.0
logging_steps: 1
seed: 3
disable_tqdm: true
plots: false
"""


def write_micro_recipe(folder: Path, data: Path, more: str = "") -> Path:
    """Write a recipe that trains in a second, with output_dir `out` beside it.

    Args:
        folder: folder for the recipe.
        data: data set.
        more: further lines.
    """
    path = folder / "micro.yaml"
    path.write_text(f"{MICRO_RECIPE}dataset_name: {data}\noutput_dir: {folder / 'out'}\n{more}")
    return path
