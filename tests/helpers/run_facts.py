"""The contents of a run.json."""

import numpy as np

from hfvit.metrics.classification import classification_metrics


def make_facts(classes=10, dataset_name="uoft-cs/cifar10", base_model="timm/vit_base_patch16_224.augreg_in21k"):
    rng = np.random.default_rng(0)
    names = [f"class number {index}" for index in range(classes)]
    labels = rng.integers(0, classes, 2000)
    logits = rng.normal(size=(2000, classes)) + 3 * np.eye(classes)[labels]
    metrics = classification_metrics(logits, labels, names)
    split = {"source": "test", "rows": 2000, "fingerprint": "0"}
    return {
        "model": {
            "architecture": "vit_base_patch16_224",
            "base_model": base_model,
            "image_size": [224, 224],
            "parameters": 86_000_000,
            "trained_parameters": 86_000_000,
        },
        "data": {
            "dataset_name": dataset_name,
            "dataset_config_name": None,
            "dataset_revision": None,
            "labels": names,
            "selected_by": "validation",
            "splits": {"train": split, "validation": split, "test": split},
        },
        "recipe": {"global_batch_size": 256},
        "metrics": {"validation": metrics, "test": metrics},
        "training": {
            "steps": 1000, "epochs": 10.0, "best_step": 900, "best_metric_name": "accuracy", "seconds": 4000,
            "images_per_second": 640.0, "data_wait": 0.013, "resumed_at_step": 0, "processes": 1, "precision": "bf16",
        },
        "versions": {"python": "3.11.7", "torch": "2.14.1", "cuda": None},
        "hardware": {"processor": "a processor", "cores": 2, "threads": 2, "gpus": []},
        "history": [
            *({"step": s, "loss": 2 / s, "learning_rate": 1e-3 / s} for s in range(1, 50)),
            *({"step": s, "eval_loss": 2.5 / s, "eval_accuracy": 1 - 1 / s} for s in range(5, 50, 5)),
        ],
    }  # fmt: skip
