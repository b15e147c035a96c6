"""Images with several labels, written by examples/multilabel_data.py."""

import runpy
from pathlib import Path

from helpers.commands import ROOT

SHAPES = ["red circle", "green square", "blue triangle"]


def write_data(kind: str, folder: Path, train: int, test: int) -> Path:
    """The table of `shapes` or `digits`; see the script."""
    return runpy.run_path(str(ROOT / "examples" / "multilabel_data.py"))["write"](kind, folder, train, test)


def shapes_recipe(table: Path, output_dir: Path, **values) -> dict:
    """A recipe that learns the shapes in seconds."""
    return {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2},
        "image_size": 32,
        "crop_pct": 1.0,
        "crop_scale": [0.9, 1.0],
        "dataset_name": str(table),
        "global_batch_size": 16,
        "num_train_epochs": 12,
        "learning_rate": 3e-3,
        "seed": 0,
        "disable_tqdm": True,
        "output_dir": str(output_dir),
        **values,
    }
