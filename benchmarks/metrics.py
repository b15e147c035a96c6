"""Time and memory of the metrics of a large evaluation.

Contenders: hfvit's `ImageClassificationMetric`, scikit-learn's functions for the same metrics, and a metric of
`evaluate`, which encodes the logits as an Arrow table.
"""

import resource
import sys
import time
from pathlib import Path

import numpy as np
from common import answer, in_own_process, interleaved, medians, parse_options, report, spread, workspace

COLUMNS = {
    "contender": "", "images": ",", "classes": ",", "metrics": "d", "seconds": ".2f", "spread": ".0%", "GB": ".2f",
    "accuracy": ".4f", "auc": ".6f",
}  # fmt: skip
SHAPES = ((50_000, 1000), (10_000, 100))
QUICK_SHAPES = ((2_000, 50),)


def generate(images: int, classes: int, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """Create logits (images, classes) float32 and labels, whose logits are higher by `margin`."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, images)
    logits = rng.standard_normal((images, classes), dtype=np.float32)
    logits[np.arange(images), labels] += margin
    return logits, labels


def hfvit_metric(logits: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, float]:
    from hfvit.metrics.evaluate_metric import ImageClassificationMetric

    metric = ImageClassificationMetric(names)
    return metric.compute(predictions=logits, references=labels)


def evaluate_arrow(logits: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, float]:
    """Compute the accuracy of logits that `evaluate` copies to its table."""
    import datasets
    import evaluate

    class Accuracy(evaluate.Metric):
        def _info(self):
            kinds = {
                "predictions": datasets.Sequence(datasets.Value("float32")),
                "references": datasets.Value("int64"),
            }
            return evaluate.MetricInfo(
                description="", citation="", inputs_description="", features=datasets.Features(kinds)
            )

        def _compute(self, predictions, references):
            return {"accuracy": float((np.asarray(predictions).argmax(axis=1) == np.asarray(references)).mean())}

    return Accuracy(keep_in_memory=True).compute(predictions=logits, references=labels)


def scikit_learn(logits: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, float]:
    from scipy.special import softmax
    from sklearn import metrics

    probabilities = softmax(logits.astype(np.float64), axis=1)
    predicted = logits.argmax(axis=1)
    classes = range(len(names))
    metrics.precision_recall_fscore_support(labels, predicted, labels=classes, zero_division=0)
    metrics.confusion_matrix(labels, predicted, labels=classes)
    return {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "top5_accuracy": float(metrics.top_k_accuracy_score(labels, logits, k=5, labels=classes)),
        "balanced_accuracy": float(metrics.balanced_accuracy_score(labels, predicted)),
        "mcc": float(metrics.matthews_corrcoef(labels, predicted)),
        "loss": float(metrics.log_loss(labels, probabilities, labels=classes)),
        "macro_f1": float(metrics.f1_score(labels, predicted, average="macro")),
        "auc": float(metrics.roc_auc_score(labels, probabilities, multi_class="ovr", labels=classes)),
        "average_precision": float(metrics.average_precision_score(labels, probabilities)),
    }


CONTENDERS = {"hfvit": hfvit_metric, "scikit-learn": scikit_learn, "evaluate, Arrow": evaluate_arrow}


def measure(job: dict) -> dict:
    compute = CONTENDERS[job["contender"]]
    compute(*generate(200, 10, job["margin"]), [str(index) for index in range(10)])  # imports
    logits, labels = generate(job["images"], job["classes"], job["margin"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    found = compute(logits, labels, [str(index) for index in range(job["classes"])])
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scalars = {key: value for key, value in found.items() if isinstance(value, float)}
    return {
        "seconds": seconds,
        "GB": (peak - before) * 1024 / 1e9,
        "metrics": len(scalars),
        "accuracy": scalars["accuracy"],
        "auc": scalars.get("auc"),
    }


def main(argv: list[str] | None = None) -> None:
    options = parse_options(__doc__, argv, rounds=3)
    if options.worker:
        answer(measure(options.worker))
        return
    rows = []
    with workspace() as folder:
        for images, classes in QUICK_SHAPES if options.quick else SHAPES:
            shape = {"images": images, "classes": classes}
            jobs = {
                f"{name}, {images} x {classes}": {"contender": name, "margin": 4.0, **shape} for name in CONTENDERS
            }
            # At chance, all scores of a class must be sorted.
            jobs[f"hfvit, chance, {images} x {classes}"] = {"contender": "hfvit", "margin": 0.0, **shape}
            results = interleaved(jobs, options.rounds, lambda job: in_own_process(__file__, job, folder / "cache"))
            for name, found in results.items():
                seconds = [each["seconds"] for each in found]
                label = "hfvit, at chance" if "chance" in name else jobs[name]["contender"]
                rows.append({"contender": label, **shape, **medians(found), "spread": spread(seconds)})
    notes = [
        "GB: growth of the process's peak memory while the metrics are computed, beyond the logits.",
        "evaluate, Arrow: a metric of `evaluate` with logits as a sequence feature; it computes the accuracy alone.",
    ]
    report(Path(__file__).stem, options, rows, COLUMNS, notes)


if __name__ == "__main__":
    sys.exit(main())
