"""Accuracy, time and memory of fine-tuning methods, with the same images and pretrained weights.

  python benchmarks/finetuning.py --model_name_or_path DINOV2_FOLDER --dataset_name CIFAR10_JPEG_FOLDER
  python benchmarks/finetuning.py --quick             # a micro network on scikit-learn's digits, to test the script
  python benchmarks/finetuning.py --only lora ...     # one method only

Images, image size, augmentation, batch size, epochs, precision (bf16) and seed are the same for all methods. Learning
rates differ and were not tuned; only the probe's C is selected on the validation split.

  linear_probe   logistic regression on features of images without augmentation
  lora           rank 8 on qkv and proj of every attention, and the head; learning rate 1e-3
  partial        the last half of the blocks and the head; learning rate 2e-4, layer decay 0.75
  full           all weights; learning rate 2e-4, layer decay 0.75
  progressive    as full, with equal parts of the steps at --progressive_image_size and at the image size

Each method is a complete `hfvit train` in a new process. Minutes include training and its evaluations (or feature
extraction and fit), not the test split. Peak memory is the peak resident memory of the process.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from common import answer, in_own_process, parse_options, report, workspace

COLUMNS = {
    "method": "",
    "test accuracy": ".2%",
    "95 % interval": "",
    "validation": ".2%",
    "trained parameters": ",.0f",
    "minutes": ".1f",
    "images/s": ".1f",
    "peak MiB": ",.0f",
}
PARTLY = {"learning_rate": 2e-4, "layer_decay": 0.75}
# The number of frozen blocks is half of a ViT's twelve.
METHODS: dict[str, dict[str, Any]] = {
    "linear_probe": {"finetuning": "linear_probe"},
    "lora": {"finetuning": "lora", "learning_rate": 1e-3},
    "partial": {"freeze": 6, **PARTLY},
    "full": PARTLY,
    "progressive": PARTLY,
}
OPTIONS: dict[str, dict] = {
    "--model_name_or_path": {"help": "a pretrained ViT: a folder or a Hub id"},
    "--dataset_name": {"default": "uoft-cs/cifar10", "help": "[%(default)s]"},
    "--train_split": {"default": "train[:3000]", "help": "10 %% of it are held out for validation [%(default)s]"},
    "--test_split": {"default": "test[:5000]", "help": "[%(default)s]"},
    "--image_size": {"type": int, "default": 98, "help": "in pixels [%(default)s]"},
    "--epochs": {"type": int, "default": 3, "help": "[%(default)s]"},
    "--progressive_image_size": {"type": int, "nargs": "+", "default": [56, 70], "help": "in pixels [%(default)s]"},
    "--only": {"choices": list(METHODS), "help": "one method only"},
}


def quick_start(folder: Path) -> dict[str, Any]:
    """Save an untrained micro network instead of a pretrained one, and return recipe keys for it."""
    from hfvit.models.factory import build_image_model
    from hfvit.recipe.arguments import ModelArguments

    micro = {"patch_size": 8, "embed_dim": 48, "depth": 8, "num_heads": 2}
    arguments = ModelArguments(architecture="vit_tiny_patch16_224", image_size=16, model_args=micro)
    build_image_model(arguments, ["any", "thing"]).save_pretrained(folder)
    return {"model_name_or_path": str(folder), "image_size": 16, "dataset_name": "digits", "max_train_samples": 300,
            "num_train_epochs": 1}  # fmt: skip


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train with one method and return its row of the table."""
    from hfvit.pipeline import main as train

    folder = Path(job["folder"])
    values = job["recipe"] or quick_start(folder / "start")
    values |= {"validation_fraction": 0.1, "crop_pct": 1.0, "crop_scale": [0.8, 1.0], "global_batch_size": 32}
    values |= {"warmup_steps": 0.05, "weight_decay": 0.05, "max_grad_norm": 1.0, "seed": 0, "bf16": True}
    values |= {"output_dir": str(folder / "out"), "disable_tqdm": True, "logging_steps": 20, **METHODS[job["method"]]}
    if job["method"] == "progressive":
        values["progressive_image_size"] = job["sizes"]
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(values))  # JSON is YAML
    train([str(recipe)])
    record = json.loads((folder / "out" / "run.json").read_text())
    test, training = record["metrics"]["test"], record["training"]
    return {
        "method": job["method"],
        "test accuracy": test["accuracy"],
        "95 % interval": "{:.2%} to {:.2%}".format(*test["accuracy_interval"]),
        "validation": record["metrics"]["validation"]["accuracy"],
        "trained parameters": record["model"]["trained_parameters"],
        "minutes": training["seconds"] / 60,
        "images/s": training["images_per_second"],
        "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "wall minutes": (time.monotonic() - job["started"]) / 60,
        "c": training.get("probe", {}).get("best_c"),
    }


def main(argv: list[str] | None = None) -> None:
    options = parse_options(__doc__, argv, rounds=1, own_options=OPTIONS)
    if options.worker:
        answer(measure(options.worker))
        return
    recipe = None
    if not options.quick:
        if not options.model_name_or_path:
            sys.exit("--model_name_or_path: required without --quick.")
        keys = ("model_name_or_path", "image_size", "dataset_name", "train_split", "test_split")
        recipe = {**{key: getattr(options, key) for key in keys}, "num_train_epochs": options.epochs}
    rows = []
    for method in [options.only] if options.only else METHODS:
        with workspace() as folder:
            print(f"training: {method}", file=sys.stderr, flush=True)
            sizes = [8] if options.quick else options.progressive_image_size
            job = {"method": method, "recipe": recipe, "sizes": sizes, "folder": str(folder)}
            rows.append(in_own_process(__file__, job, folder / "cache"))
    notes = (
        [] if options.quick else [f"{options.train_split} of {options.dataset_name}, tested on {options.test_split}"]
    )
    report("finetuning", options, rows, COLUMNS, notes)


if __name__ == "__main__":
    main()
