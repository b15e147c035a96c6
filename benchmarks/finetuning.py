"""Accuracy, time and memory of fine-tuning methods, with the same images and pretrained weights.

  python benchmarks/finetuning.py --model_name_or_path DINOV2_FOLDER --dataset_name CIFAR10_JPEG_FOLDER
  python benchmarks/finetuning.py --quick               # a micro network on scikit-learn's digits, to test the script
  python benchmarks/finetuning.py --only lora full ...  # some rows only

Images, image size, augmentation, batch size, epochs and precision are the same for all rows. Learning rates
differ and were not tuned; only the probe's C is selected on the validation split. Each row is the mean of several
seeds, which set the held-out images, the order, the augmentation and the initialization of the head.

  linear_probe       logistic regression on features of images without augmentation
  lora               rank 8 on qkv and proj of every attention, and the head; learning rate 1e-3
  partial            the last half of the blocks and the head; learning rate 2e-4, layer decay 0.75
  full               all weights; learning rate 2e-4, layer decay 0.75
  progressive        as full, with equal parts of the steps at --progressive_image_size and at the image size

Changes of full by one option:

  nadamuon, wsd      another optimizer; another schedule
  ema, swa, soup     averages of weights; swa with a constant learning rate
  tta                mean of each image and its mirror image in all evaluations
  fixres             trained at the last --progressive_image_size, evaluated at the image size
  patch_drop         a quarter of the patches left out in training
  half               the first half of the blocks, all their weights
  half_distilled     the same with the logits of the finished run of full (same seed) as teacher
  half_features      the same with the features of that run

As full, on cuts of the training images. The frequencies of the classes fall exponentially to a tenth, in another order
for each seed; their validation images are held out of the cut, the test images are the same:

  balanced_cut       as many images in all, equally many of each class
  imbalanced         the imbalanced cut
  imbalanced_sample  the same with class_balance: sample
  imbalanced_weight  the same with class_balance: weight

Each run is a complete `hfvit train` in a new process. Minutes include training and its evaluations (or feature
extraction and fit), not the test split. Peak memory is the peak resident memory of the process. With --runs, finished
runs are read from that file, so that an interrupted table can be continued.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from common import answer, in_own_process, parse_options, report, workspace

COLUMNS = {
    "method": "",
    "test accuracy": ".2%",
    "deviation": ".2%",
    "validation": ".2%",
    "trained parameters": ",.0f",
    "minutes": ".1f",
    "images/s": ".1f",
    "peak MiB": ",.0f",
}
SUMMED_UP = ("validation", "minutes", "images/s", "wall minutes")
BLOCKS, HALF = 12, 6
FULL: dict[str, Any] = {"learning_rate": 2e-4, "layer_decay": 0.75}
SHORT: dict[str, Any] = {**FULL, "model_args": {"depth": HALF}}
TEACHER = "full"
DISTILLED = {"half_distilled": "soft", "half_features": "feature"}
METHODS: dict[str, dict[str, Any]] = {
    "linear_probe": {"finetuning": "linear_probe"},
    "lora": {"finetuning": "lora", "learning_rate": 1e-3},
    "partial": {"freeze": BLOCKS - HALF, **FULL},
    TEACHER: FULL,
    "progressive": FULL,
    "fixres": FULL,
    "nadamuon": {**FULL, "optim": "timm/nadamuon"},
    "wsd": {
        **FULL,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 0.3},
    },
    "ema": {**FULL, "ema_decay": 0.99},
    "swa": {
        **FULL,
        "swa_start": 0.5,
        "lr_scheduler_type": "constant_with_warmup",
        "load_best_model_at_end": False,
    },
    "soup": {
        **FULL,
        "soup": "greedy",
        "save_total_limit": None,
        "eval_strategy": "steps",
        "eval_steps": 1 / 8,
    },
    "tta": {**FULL, "eval_tta": "flip"},
    "patch_drop": {**FULL, "patch_drop_rate": 0.25},
    "half": SHORT,
    **{name: {**SHORT, "distillation": kind} for name, kind in DISTILLED.items()},
    "balanced_cut": FULL,
    "imbalanced": FULL,
    "imbalanced_sample": {**FULL, "class_balance": "sample"},
    "imbalanced_weight": {**FULL, "class_balance": "weight"},
}
QUICK_DATA = {"dataset_name": "digits", "train_split": "train", "test_split": "test"}
OPTIONS: dict[str, dict] = {
    "--model_name_or_path": {"help": "a pretrained ViT of 12 blocks: a folder or a Hub id"},
    "--dataset_name": {"default": "uoft-cs/cifar10", "help": "[%(default)s]"},
    "--train_split": {"default": "train[:3000]", "help": "10 %% of it are held out for validation [%(default)s]"},
    "--test_split": {"default": "test[:5000]", "help": "[%(default)s]"},
    "--image_size": {"type": int, "default": 70, "help": "in pixels [%(default)s]"},
    "--epochs": {"type": int, "default": 3, "help": "[%(default)s]"},
    "--progressive_image_size": {"type": int, "nargs": "+", "default": [42, 56], "help": "in pixels [%(default)s]"},
    "--mixed_precision": {"choices": ("bf16", "no"), "default": "bf16", "help": "no: float32 [%(default)s]"},
    "--seeds": {"type": int, "default": 3, "help": "runs of each row, with the seeds 0, 1, ... [%(default)s]"},
    "--runs": {"type": Path, "metavar": "FILE", "help": "JSON lines: read finished runs, and append new ones"},
    "--only": {"nargs": "+", "choices": list(METHODS), "help": "these rows only; distilled ones train full as well"},
}


def quick_start(folder: Path) -> dict[str, Any]:
    """Save an untrained micro network instead of a pretrained one, and return recipe keys for it."""
    from hfvit.models.factory import build_image_model
    from hfvit.recipe.arguments import ModelArguments

    micro = {"patch_size": 8, "embed_dim": 48, "depth": BLOCKS, "num_heads": 2}
    arguments = ModelArguments(architecture="vit_tiny_patch16_224", image_size=16, model_args=micro)
    build_image_model(arguments, ["any", "thing"]).save_pretrained(folder)
    return {**QUICK_DATA, "model_name_or_path": str(folder), "image_size": 16, "max_train_samples": 300,
            "num_train_epochs": 1, "bf16": True}  # fmt: skip


def write_cut(recipe: dict[str, Any], seed: int, is_balanced: bool, folder: Path) -> dict[str, Any]:
    """Write the test split and a cut of the training split.

    Args:
        recipe: recipe keys with `dataset_name`, `train_split` and `test_split`.
        seed: seed of the order of the classes by frequency.
        is_balanced: keep equally many images of each class.
        folder: new folder for the splits.

    Returns:
        The keys that select them.
    """
    import datasets
    import numpy as np

    from hfvit.data.splits import digits

    splits = {}
    for name in ("train", "test"):
        if recipe["dataset_name"] == "digits":
            splits[name] = digits()[name]
        else:
            splits[name] = datasets.load_dataset(recipe["dataset_name"], split=recipe[f"{name}_split"])
    labels = np.asarray(splits["train"]["label"][:])
    present = np.bincount(labels)
    kept = np.round(present.min() * 0.1 ** np.linspace(0, 1, len(present))).astype(int)
    kept = np.random.default_rng(seed).permutation(kept)
    if is_balanced:
        kept = np.full(len(kept), round(kept.mean()))
    rows = np.concatenate([np.flatnonzero(labels == label)[:count] for label, count in enumerate(kept)])
    splits["train"] = splits["train"].select(np.sort(rows))
    datasets.DatasetDict(splits).save_to_disk(folder)
    return {"dataset_name": str(folder), "train_split": "train", "test_split": "test"}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train with one method and seed, and return its results.

    Args:
        job: `method`, `seed`, `folder` of the run, recipe keys `recipe` (None: the quick ones), `sizes` of progressive
            resizing, folder of the `teacher`, and recipe keys `cut` of a part of the images.
    """
    from hfvit.pipeline import main as train

    method, folder = job["method"], Path(job["folder"])
    values = job["recipe"] or quick_start(folder / "start")
    values |= {"validation_fraction": 0.1, "crop_pct": 1.0, "crop_scale": [0.8, 1.0], "global_batch_size": 32}
    values |= {"warmup_steps": 0.05, "weight_decay": 0.05, "max_grad_norm": 1.0, "seed": job["seed"]}
    values |= {"output_dir": str(folder / "out"), "disable_tqdm": True, "logging_steps": 20, "plots": False}
    values |= METHODS[method]
    if method == "progressive":
        values["progressive_image_size"] = job["sizes"]
    if method == "fixres":
        values["train_image_size"] = job["sizes"][-1]
    if method in DISTILLED:
        values["teacher"] = job["teacher"]
    values |= job["cut"]
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(values))  # JSON is YAML
    train([str(recipe)])
    record = json.loads((folder / "out" / "run.json").read_text())
    training = record["training"]
    return {
        "test accuracy": record["metrics"]["test"]["accuracy"],
        "validation": record["metrics"]["validation"]["accuracy"],
        "trained parameters": record["model"]["trained_parameters"],
        "minutes": training["seconds"] / 60,
        "images/s": training["images_per_second"],
        "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "wall minutes": (time.monotonic() - job["started"]) / 60,
        "c": training.get("probe", {}).get("best_c"),
    }


def summarized(method: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of a method: means over its seeds, and the standard deviation of the test accuracy."""
    accuracies = [run["test accuracy"] for run in runs]
    return {
        "method": method,
        "test accuracy": statistics.mean(accuracies),
        "deviation": statistics.stdev(accuracies) if len(runs) > 1 else None,
        "trained parameters": runs[0]["trained parameters"],
        "peak MiB": max(run["peak MiB"] for run in runs),
        **{key: statistics.mean(run[key] for run in runs) for key in SUMMED_UP},
        "runs": runs,
    }


def read_runs(path: Path | None) -> dict[tuple[str, int], dict[str, Any]]:
    """Return finished runs by method and seed, none without a file."""
    if path is None or not path.exists():
        return {}
    runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(run["method"], run["seed"]): run for run in runs}


def run_once(
    method: str, seed: int, recipe: dict[str, Any] | None, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Train in a new process, and append the results to `--runs`.

    Args:
        method: name of the row.
        seed: seed of the run.
        recipe: recipe keys; None for the quick ones.
        folder: folder of all runs of the seed.
        options: options of the script.
    """
    print(f"seed {seed}: {method}", file=sys.stderr, flush=True)
    (folder / method).mkdir()
    data = recipe or QUICK_DATA
    is_balanced = method == "balanced_cut"
    is_cut = is_balanced or method.startswith("imbalanced")
    job = {
        "method": method,
        "seed": seed,
        "recipe": recipe,
        "sizes": [8] if options.quick else options.progressive_image_size,
        "folder": str(folder / method),
        "teacher": str(folder / TEACHER / "out"),
        "cut": write_cut(data, seed, is_balanced, folder / method / "data") if is_cut else {},
    }
    run = {"method": method, "seed": seed, **in_own_process(__file__, job, folder / "cache")}
    if options.runs:
        with options.runs.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
    return run


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
        recipe = {key: getattr(options, key) for key in keys}
        recipe |= {"num_train_epochs": options.epochs, "bf16": options.mixed_precision == "bf16"}
    chosen = options.only or list(METHODS)
    names = [name for name in METHODS if name in chosen or (name == TEACHER and DISTILLED.keys() & set(chosen))]
    results = read_runs(options.runs)
    seeds = range(1 if options.quick else options.seeds)
    for seed in seeds:
        needed = {name for name in names if (name, seed) not in results}
        if needed & DISTILLED.keys():
            needed.add(TEACHER)  # for its folder
        with workspace() as folder:
            for name in names:
                if name in needed:
                    results[name, seed] = run_once(name, seed, recipe, folder, options)
    rows = [summarized(name, [results[name, seed] for seed in seeds]) for name in names]
    notes = (
        [] if options.quick else [f"{options.train_split} of {options.dataset_name}, tested on {options.test_split}"]
    )
    report("finetuning", options, rows, COLUMNS, notes)


if __name__ == "__main__":
    main()
