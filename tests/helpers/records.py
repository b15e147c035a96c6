"""Records of runs, exports and engines, for tests."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from hfvit.artifacts.export_record import ExportedFile, Parity
from hfvit.artifacts.gate import ArtifactResult, EvaluationData, Gate, GateLimits, Hardware
from hfvit.artifacts.run_record import RunRecord
from hfvit.metrics.classification import classification_metrics

VERSION_0_1 = Path(__file__).parent / "version_0_1"  # written by hfvit 0.1 at commit 3598f97


def make_record(
    classes=10, dataset_name="uoft-cs/cifar10", base_model="timm/vit_base_patch16_224.augreg_in21k", images=2000
) -> RunRecord:
    rng = np.random.default_rng(0)
    names = [f"class number {index}" for index in range(classes)]
    labels = rng.integers(0, classes, images)
    logits = rng.normal(size=(images, classes)) + 3 * np.eye(classes)[labels]
    metrics = classification_metrics(logits, labels, names)
    split = {"source": "test", "rows": images, "fingerprint": "0"}
    content = {
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
    return RunRecord.from_json(content)


def artifact_result(artifact="out", **values) -> ArtifactResult:
    row = ArtifactResult(
        artifact=artifact, accuracy=0.948, accuracy_interval=(0.93, 0.96), change_points=0.0, agreement=1.0,
        max_logit_difference=0.0, not_finite=0, megabytes=1.0, latency_ms_p50=1.0, latency_ms_p95=2.0,
        images_per_second=1000.0, includes_preprocessing=False, device="cpu", threads=1, failure=None,
    )  # fmt: skip
    return replace(row, **values)


def make_gate(*rows: ArtifactResult) -> Gate:
    return Gate(
        hfvit_version="0.1.0",
        finished="2026-01-02T03:04:05+00:00",
        data=EvaluationData(
            dataset="colors", dataset_config_name=None, split="split 'test'", images=31, fingerprint=""
        ),
        limits=GateLimits(max_accuracy_drop=0.5, min_agreement=None),
        batch_size=16,
        hardware=Hardware(processor="a processor", cores=2, gpus=[]),
        passed=not any(row.failure for row in rows),
        artifacts=list(rows),
    )


def exported_file(**values) -> ExportedFile:
    content = {
        "sha256": "0" * 64, "bytes": 1, "dtype": "fp32", "opset": 20, "versions": {}, "optimized": False,
        "with_preprocessing": False, "input": {"name": "pixel_values", "type": "float32", "shape": ["batch_size", 3]},
    }  # fmt: skip
    return replace(ExportedFile.from_json(content), **values)


def parity(difference: float) -> Parity:
    return Parity(batch_sizes=[1], max_abs_difference=difference, max_abs_logit=1.0, relative_error=0.0, atol=1e-3)
