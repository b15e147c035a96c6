"""run.json -> a table for the terminal and pictures in plots/. Reads facts only; never a model."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from hfvit.tables import aligned, duration

# Okabe and Ito's colours, told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
MOST_NAMES = 120  # class names along an axis; more could not be read


def summary_table(facts: dict, output_dir: str | Path) -> str:
    """The end-of-run table: metrics of every evaluated split, speed, time, and where the files are."""
    header = ("split", "images", "accuracy", "95 % interval", "top-5", "macro F1", "loss", "ECE")
    rows = [
        (
            split,
            f"{m['images']:,}",
            f"{m['accuracy']:.2%}",
            "{:.2%} - {:.2%}".format(*m["accuracy_interval"]),
            f"{m['top5_accuracy']:.2%}",
            f"{m['macro_f1']:.4f}",
            f"{m['loss']:.4f}",
            f"{m['ece']:.4f}",
        )
        for split, m in facts["metrics"].items()
    ]
    model, training = facts["model"], facts["training"]
    resumed = f", resumed at step {training['resumed_at_step']:,}" if training["resumed_at_step"] else ""
    epochs = "" if training["epochs"] is None else f", {training['epochs']:.4g} epochs"
    lines = [
        *aligned([header, *rows]),
        "",
        f"model      {model['architecture']}, {model['image_size'][0]} px, {model['parameters'] / 1e6:.1f} M weights"
        f" ({model['trained_parameters'] / 1e6:.1f} M trained)",
        f"training   {training['steps']:,} steps{epochs}{resumed};"
        f" {duration(training['seconds'])},"
        f" {training['images_per_second']:,.0f} images/s, {training['data_wait']:.1%} of the time waiting for data,"
        f" {training['processes']} process(es), precision {training['precision']}",
        f"selected   step {training['best_step']} by validation {training['best_metric_name']}"
        if training["best_step"]
        else f"selected   {_probe_choice(training) or 'the last step'}",
        f"files      {output_dir}",
    ]
    return "\n".join(lines)


def _probe_choice(training: dict) -> str | None:
    probe = training.get("probe")
    return probe and f"C = {probe['best_c']:g} of {len(probe['c'])} by validation {probe['selected_by']}"


def write_training_images(images: np.ndarray, targets: np.ndarray, names: list[str], output_dir: str | Path) -> Path:
    """Draw `plots/training_images.png`: pictures as the model will see them, under their classes.

    Args:
        images: uint8 `(images, height, width, 3)`.
        targets: class indices `(images,)`, or probabilities `(images, classes)` of mixtures.
        names: of the classes.
    """
    columns, (height, width) = 8, images.shape[1:3]
    rows, gap = -(-len(images) // columns), max(1, round(0.06 * width))
    strip = round(0.3 * height)  # above each picture, for its name
    mosaic = np.full((rows * (height + strip), columns * (width + gap), 3), 255, dtype=np.uint8)
    figure, axis = plt.subplots(figsize=(1.5 * columns, 1.5 * rows * mosaic.shape[0] / rows / (width + gap)))
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        top, left = number // columns * (height + strip) + strip, number % columns * (width + gap)
        mosaic[top : top + height, left : left + width] = image
        if target.ndim:
            title = "\n".join(f"{names[index]} {target[index]:.0%}" for index in np.flatnonzero(target))
        else:
            title = names[target]
        axis.text(left + width / 2, top - 0.04 * height, title, ha="center", va="bottom", fontsize=7, parse_math=False)
    axis.imshow(mosaic)
    axis.axis("off")
    return _save(figure, Path(output_dir) / "plots" / "training_images.png")


def write_plots(facts: dict, output_dir: str | Path) -> list[Path]:
    """Draw every plot that the facts allow into `output_dir/plots`; returns their paths."""
    role = "test" if "test" in facts["metrics"] else "validation"
    metrics = facts["metrics"][role]
    probe = facts["training"].get("probe")
    figures = {"learning_curves": probe_curves(probe) if probe else learning_curves(facts["history"])}
    figures["confusion_matrix"] = confusion_figure(metrics, role)
    figures["per_class_accuracy"] = per_class_figure(metrics, role)
    figures["reliability"] = reliability_figure(metrics, role)
    return [_save(figure, Path(output_dir) / "plots" / f"{name}.png") for name, figure in figures.items()]


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, bbox_inches="tight", format="png", facecolor="white")
    temporary.replace(path)
    plt.close(figure)
    return path


def learning_curves(history: list[dict]):
    """Loss, validation accuracy and learning rate over the steps."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    panels = (
        (axes[0], "Loss", (("loss", "training", BLUE), ("eval_loss", "validation", ORANGE))),
        (axes[1], "Validation accuracy", (("eval_accuracy", "validation", ORANGE),)),
        (axes[2], "Learning rate", (("learning_rate", "", GREEN),)),
    )
    for axis, title, curves in panels:
        for key, label, colour in curves:
            points = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]
            if points:
                marker = "o" if key.startswith("eval") or len(points) < 20 else None
                axis.plot(*zip(*points, strict=True), color=colour, label=label, marker=marker, markersize=4)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    return figure


def probe_curves(probe: dict):
    """Validation accuracy and loss of a linear probe over the strength of its penalty."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for axis, key, title, colour in (
        (axes[0], "accuracy", "Validation accuracy", BLUE),
        (axes[1], "loss", "Validation loss", ORANGE),
    ):
        axis.set_xscale("log")
        axis.plot(probe["c"], [scores[key] for scores in probe["validation"]], "o-", color=colour, markersize=4)
        axis.axvline(probe["best_c"], color=GREY, linestyle="--", linewidth=1, label=f"taken: {probe['best_c']:g}")
        axis.set(title=title, xlabel="C (inverse strength of the penalty)")
        if len(probe["c"]) == 1:  # one point gives a logarithmic axis no width
            axis.set_xlim(probe["best_c"] / 10, probe["best_c"] * 10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def confusion_figure(metrics: dict, role: str):
    """Rows are the true classes, as shares of the row; counts are written in while they fit."""
    matrix = np.asarray(metrics["confusion_matrix"], dtype=float)
    names = [entry["label"] for entry in metrics["per_class"]]
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(len(names) * 0.42, 4.5, 20))
    figure, axis = plt.subplots(figsize=(side + 1.2, side))
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    font = 9 if len(names) <= 30 else 6
    ticks, shown = (range(len(names)), names) if len(names) <= MOST_NAMES else ([], [])
    axis.set_xticks(ticks, shown, rotation=90, fontsize=font, parse_math=False)
    axis.set_yticks(ticks, shown, fontsize=font, parse_math=False)
    axis.set(title=f"Confusion on the {role} split", xlabel="predicted", ylabel="true")
    if len(names) <= 20:
        for i, j in np.argwhere(matrix > 0):
            axis.text(
                j, i, f"{matrix[i, j]:.0f}", ha="center", va="center", fontsize=7,
                color="white" if shares[i, j] > 0.5 else "black",
            )  # fmt: skip
    figure.colorbar(image, ax=axis, fraction=0.046, label="share of the true class")
    return figure


def per_class_figure(metrics: dict, role: str):
    """Accuracy within each class, worst first, with the accuracy over all as a line."""
    classes = sorted(metrics["per_class"], key=lambda entry: -entry["recall"])
    font = 9 if len(classes) <= 30 else 6
    figure, axis = plt.subplots(figsize=(7, float(np.clip(len(classes) * 0.3, 2.5, 22))))
    recalls = [entry["recall"] for entry in classes]
    # Points, not bars: bars would have to start at zero, where no difference shows.
    axis.hlines(range(len(classes)), 0, 1, color=GREY, linewidth=0.5, alpha=0.4)
    axis.plot(recalls, range(len(classes)), "o", color=BLUE)
    axis.axvline(metrics["accuracy"], color=ORANGE, linewidth=1.5, label=f"all classes {metrics['accuracy']:.2%}")
    if len(classes) <= MOST_NAMES:
        axis.set_yticks(range(len(classes)), [entry["label"] for entry in classes], fontsize=font, parse_math=False)
    axis.set(title=f"Accuracy by class on the {role} split", xlabel="accuracy", ylim=(-0.6, len(classes) - 0.4))
    lowest = min(recalls)
    axis.set_xlim(max(0.0, lowest - 0.1 * (1 - lowest) - 0.01), 1.0 + 0.02 * (1 - lowest) + 0.002)
    axis.legend(loc="lower left", fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    return figure


def reliability_figure(metrics: dict, role: str):
    """Accuracy against confidence (points) over the share of images in each bin (bars)."""
    bins = metrics["calibration"]
    confidence = [entry["confidence"] for entry in bins]
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(4.8, 5.6), sharex=True, gridspec_kw={"height_ratios": (3, 1), "hspace": 0.08}
    )
    top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfectly calibrated")
    top.plot(confidence, [entry["accuracy"] for entry in bins], color=BLUE, marker="o", label="model")
    top.set(title=f"Reliability on the {role} split (ECE {metrics['ece']:.3f})", ylabel="accuracy", ylim=(0, 1.02))
    top.legend(loc="upper left", fontsize=8)
    top.grid(alpha=0.3)
    total = sum(entry["images"] for entry in bins)
    bottom.bar(confidence, [entry["images"] / total for entry in bins], width=0.04, color=GREY)
    bottom.set(xlabel="confidence", ylabel="share", xlim=(0, 1.02))
    return figure
