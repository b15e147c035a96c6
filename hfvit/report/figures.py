"""Matplotlib figures of a report."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter
from scipy.stats import binomtest

from hfvit.artifacts.json_record import is_number
from hfvit.artifacts.run_sections import ExampleImage, MultiLabelMetrics, Probe, SplitMetrics, Temperature
from hfvit.errors import printable
from hfvit.utils.files import temporary_file

matplotlib.use("Agg")

MAX_AXIS_NAMES = 120  # class names along an axis; more would not be readable
MAX_CELLS = 1000  # along a side of the confusion matrix; the cells of more would be smaller than pixels
MAX_NAME_LENGTH = 24  # characters of a class name
_MATRIX_TICKS = (0, 0.01, 0.05, 0.2, 0.5, 1)


@dataclass(frozen=True)
class Theme:
    """Colors of the light or the dark version of a plot.

    Contrast to the background is at least 4.5 : 1 for text and 3 : 1 for marks (WCAG 2.2). The three line colors are
    Okabe and Ito's, or lighter ones of the same hues, which color-blind readers can tell apart. The background is
    opaque, since a transparent plot would be unreadable on a page whose theme differs from that of the system.
    """

    suffix: str
    paper: str
    ink: str
    muted: str
    grid: str
    first: str
    second: str
    third: str
    ramp: tuple[str, ...]

    @property
    def settings(self) -> dict:
        """Return matplotlib's rcParams."""
        return {
            "figure.facecolor": self.paper, "axes.facecolor": self.paper, "savefig.facecolor": self.paper,
            "text.color": self.ink, "axes.labelcolor": self.ink, "axes.titlecolor": self.ink,
            "xtick.color": self.muted, "ytick.color": self.muted, "axes.edgecolor": self.muted,
            "xtick.labelcolor": self.ink, "ytick.labelcolor": self.ink,
            "grid.color": self.grid, "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.titlesize": 11,
            "axes.titlepad": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
            "legend.fontsize": 9, "font.size": 9.5, "lines.linewidth": 1.8, "text.parse_math": False,
            "figure.dpi": 130,
        }  # fmt: skip

    @property
    def colormap(self) -> LinearSegmentedColormap:
        """Create a sequential colormap that starts with the background color."""
        return LinearSegmentedColormap.from_list(f"hfvit{self.suffix}", self.ramp)


LIGHT = Theme(
    "", "#ffffff", "#1f2328", "#59636e", "#d8dee4", "#0072b2", "#d55e00", "#007d5a",
    ("#ffffff", "#c6dcf0", "#6aaed6", "#2a7ab8", "#08306b"),
)  # fmt: skip
DARK = Theme(
    "_dark", "#0d1117", "#f0f6fc", "#9198a1", "#30363d", "#56b4e9", "#e69f00", "#2fbf9a",
    ("#0d1117", "#1d4f7e", "#2f86c9", "#7cc6f6", "#e8f6ff"),
)  # fmt: skip
THEMES = (LIGHT, DARK)


def draw(name: str, figure: Callable[[Theme], plt.Figure], output_dir: str | Path) -> list[Path]:
    """Draw a figure in both themes to `output_dir/plots`.

    Args:
        name: file name without suffix: NAME.png (light) and NAME_dark.png.
        figure: function that draws the figure in a theme.
        output_dir: output folder of the run.

    Returns:
        The paths of the two files.
    """
    paths = []
    extent = None
    for theme in THEMES:
        path = Path(output_dir) / "plots" / f"{name}{theme.suffix}.png"
        with temporary_file(path) as temporary, plt.rc_context(theme.settings):
            drawn = figure(theme)
            if extent is None:  # the same in both themes, which differ only in color
                extent = drawn.get_tightbbox().padded(0.15)
            drawn.savefig(temporary, bbox_inches=extent, format="png")
            plt.close(drawn)
        paths.append(path)
    return paths


def place_axes(*places: tuple[float, float, float, float], share_x: bool = False):
    """Create a figure with axes at fixed places.

    This is faster than matplotlib's layouts.

    Args:
        places: (left, bottom, width, height) of each axes, in inches; `draw` crops the figure to its content.
        share_x: share the x axis.

    Returns:
        (figure, list of axes).
    """
    figure = plt.figure(figsize=(1, 1))
    axes = []
    for place in places:
        axes.append(figure.add_axes(place, sharex=axes[0] if share_x and axes else None))
    return figure, axes


def learning_curves(
    history: list[dict], best_step: int | None, theme: Theme, key: str = "accuracy", name: str = "accuracy"
):
    """Draw loss, validation metric and learning rate over the training steps.

    Args:
        history: `log_history` of the Trainer.
        best_step: step of the selected checkpoint, which is marked; None if none was selected.
        theme: colors.
        key: key of the metric in the history.
        name: name of the metric in the title.
    """
    figure, axes = place_axes(*((left, 0, 3.75, 2.8) for left in (0, 4.45, 8.9)), share_x=True)
    panels = (
        ("Loss", (("loss", "training", theme.first), ("eval_loss", "validation", theme.second))),
        (f"Validation {name}", ((f"eval_{key}", "", theme.second),)),
        ("Learning rate", (("learning_rate", "", theme.third),)),
    )
    for axis, (title, curves) in zip(axes, panels, strict=True):
        for key, label, color in curves:
            points = [(entry.get("step"), entry.get(key)) for entry in history]
            points = [point for point in points if all(map(is_number, point))]
            if points:
                marker = "o" if len(points) < 40 and key != "learning_rate" else None
                axis.plot(*zip(*points, strict=True), color=color, label=label, marker=marker, markersize=3.5)
        axis.set(title=title, xlabel="step")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        axis.grid()
        if best_step and title != "Learning rate":
            axis.axvline(best_step, color=theme.muted, linestyle=":", linewidth=1.2, zorder=0, label="selected")
    axes[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend()
    return figure


def probe_curves(probe: Probe, theme: Theme, key: str = "accuracy", name: str = "accuracy"):
    """Draw a validation metric and the loss of a linear probe over C.

    Args:
        probe: metrics of each C.
        theme: colors.
        key: key of the metric.
        name: name of the metric in the title.
    """
    figure, axes = place_axes(*((left, 0, 3.75, 2.8) for left in (0, 4.45)))
    panels = ((axes[0], key, name, theme.second), (axes[1], "loss", "loss", theme.first))
    for axis, metric, title, color in panels:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda c, _: f"{c:g}"))  # the default uses mathtext, which is off
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.plot(probe.c, [scores[metric] for scores in probe.validation], "o-", color=color, markersize=3.5)
        axis.axvline(probe.best_c, color=theme.muted, linestyle=":", linewidth=1.2, zorder=0, label="selected")
        if len(probe.c) == 1:  # a single point does not determine the limits of a logarithmic axis
            axis.set_xlim(probe.best_c / 10, probe.best_c * 10)
        axis.set(title=f"Validation {title}", xlabel="C (inverse L2 penalty)")
        axis.grid()
    axes[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes[0].legend()
    return figure


def confusion_figure(metrics: SplitMetrics, role: str, theme: Theme):
    """Draw the confusion matrix, normalized by row (true class).

    Counts are written into the cells up to 20 classes. The color scale is a power of 0.4, since a linear scale would
    hide rare mistakes.

    Args:
        metrics: metrics of the split.
        role: name of the split: test or validation.
        theme: colors.
    """
    names = [short(entry.label) for entry in metrics.per_class]
    matrix = metrics.confusion_matrix.dense(most=MAX_CELLS).astype(float)
    fractions = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    count = len(matrix)
    side = float(np.clip(count * (0.34 if count <= 30 else 0.15), 2.4, 18))
    height = min(side, 6)
    figure, (axis, scale) = place_axes((0, 0, side, side), (side + 0.12, (side - height) / 2, height / 24, height))
    norm = PowerNorm(0.4, vmin=0, vmax=1)
    colormap = theme.colormap
    image = axis.imshow(fractions, cmap=colormap, norm=norm)
    font = 9.5 if count <= 30 else 7
    ticks, tick_names = (range(count), names) if count <= MAX_AXIS_NAMES else ([], [])
    axis.set_xticks(ticks, tick_names, rotation=0 if max(map(len, names)) < 3 else 90, fontsize=font)
    axis.set_yticks(ticks, tick_names, fontsize=font)
    axis.tick_params(length=0)
    # grid lines between the classes
    for lines in (axis.hlines, axis.vlines):
        edges = np.arange(-0.5, count)
        lines(edges, edges[0], edges[-1], color=theme.grid, linewidth=0.8 if count <= 30 else 0.4)
    together = f", {-(-len(names) // MAX_CELLS)} classes to a cell" if count < len(names) else ""
    axis.set(title=f"Confusion on the {role} split{together}", xlabel="predicted", ylabel="true")
    if count <= 20:
        digits = len(f"{matrix.max():.0f}")
        for i, j in np.argwhere(matrix > 0):
            axis.text(
                j, i, f"{matrix[i, j]:.0f}", ha="center", va="center", fontsize=9.5 if digits < 4 or count <= 6 else 8,
                color=readable_on(colormap(norm(fractions[i, j]))),
            )  # fmt: skip
    bar = figure.colorbar(image, cax=scale, label="fraction of the true class")
    bar.set_ticks(_MATRIX_TICKS, labels=[f"{tick:.0%}" for tick in _MATRIX_TICKS])
    bar.outline.set_visible(False)
    return figure


def per_class_figure(metrics: SplitMetrics, role: str, theme: Theme):
    """Draw the accuracy of each class with its 95 % interval (Wilson), sorted.

    Points instead of bars, since bars have to start at zero, where differences are too small to see. Classes without
    images are left out.

    Args:
        metrics: metrics of the split.
        role: name of the split: test or validation.
        theme: colors.
    """
    classes = sorted((e for e in metrics.per_class if e.images), key=lambda e: (e.recall, e.label))
    count = len(classes)
    places = range(count)
    height = float(np.clip(count * (0.3 if count <= 30 else 0.19), 1.5, 23))
    figure, (axis,) = place_axes((0, 0, 5.6, height))
    recalls = [entry.recall for entry in classes]
    tests = [binomtest(round(entry.recall * entry.images), entry.images) for entry in classes]
    intervals = [test.proportion_ci(0.95, method="wilson") for test in tests]
    lows = [i.low for i in intervals]
    highs = [i.high for i in intervals]
    axis.hlines(places, lows, highs, color=theme.first, linewidth=2.4, alpha=0.45, label="95 % interval")
    axis.plot(recalls, places, "o", color=theme.first, markersize=5, label="accuracy of a class")
    label = f"all classes, {metrics.accuracy:.2%}"
    axis.axvline(metrics.accuracy, color=theme.second, linewidth=1.5, label=label)
    if count <= MAX_AXIS_NAMES:
        axis.set_yticks(places, [short(e.label) for e in classes], fontsize=9.5 if count <= 30 else 8)
    else:
        axis.set_yticks([])
    axis.set(title=f"Accuracy by class on the {role} split", ylim=(-0.6, count - 0.4))
    lowest = max(0.0, min(lows))
    axis.set_xlim(max(0.0, lowest - 0.03 * (1 - lowest)), 1 + 0.02 * (1 - lowest) + 0.001)
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axis.grid(axis="x")
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    figure.legend(loc="upper center", bbox_to_anchor=(2.8, -0.32), borderaxespad=0, ncols=3)
    return figure


def reliability_figure(metrics: SplitMetrics, role: str, temperature: Temperature | None, theme: Theme):
    """Draw a reliability diagram, before and after temperature scaling.

    Above: accuracy over confidence. Below: fraction of the images in each bin.

    Args:
        metrics: metrics of the split.
        role: name of the split: test or validation.
        temperature: temperature scaling of the run, if it has one.
        theme: colors.
    """
    curves = [("model", metrics.ece, metrics.calibration, theme.first, "o", -1)]
    after = temperature.splits.get(role) if temperature else None
    if after:
        label = f"temperature {temperature.value:.2f}"
        curves.append((label, after.ece, after.calibration, theme.second, "s", 1))
    figure, (top, bottom) = place_axes((0, 1.4, 4.6, 3.8), (0, 0, 4.6, 1.25), share_x=True)
    top.tick_params(axis="x", labelbottom=False)
    top.plot([0, 1], [0, 1], color=theme.muted, linestyle="--", linewidth=1.2, label="perfect")
    for label, ece, bins, color, marker, side in curves:
        confidence = [entry.confidence for entry in bins]
        total = max(1, sum(entry.images for entry in bins))
        fractions = [entry.images / total for entry in bins]
        # The size of a point shows the number of images in its bin.
        top.plot(confidence, [entry.accuracy for entry in bins], color=color, linewidth=1.2, alpha=0.7)
        sizes = 14 + 110 * np.sqrt(fractions)
        top.scatter(
            confidence, [e.accuracy for e in bins], s=sizes, color=color, marker=marker, linewidths=0, zorder=3,
            label=f"{label}, ECE {ece:.4f}", clip_on=False,
        )  # fmt: skip
        shift = side * 0.009 if after else 0
        bottom.bar(np.array(confidence) + shift, fractions, width=0.018 if after else 0.036, color=color)
    top.set(title=f"Reliability on the {role} split", ylabel="accuracy", ylim=(0, 1.03))
    # the same size for all points of the legend
    for handle in top.legend(loc="upper left").legend_handles[1:]:
        handle.set_sizes([36])
    bottom.set(xlabel="confidence", ylabel="fraction of images", xlim=(0, 1.03))
    for axis in (top, bottom):
        axis.grid()
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bottom.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def precision_recall_figure(metrics: MultiLabelMetrics, role: str, theme: Theme):
    """Plot the precision-recall curve of each class and of all labels together.

    Points are the precision and recall at the thresholds.

    Args:
        metrics: multi-label metrics of the split.
        role: split, for the title.
        theme: colors.

    Returns:
        The `matplotlib.figure.Figure`.
    """
    figure, (axis,) = place_axes((0, 0, 5.2, 4.4))
    classes = [entry for entry in metrics.per_class if entry.curve]
    for place, entry in enumerate(classes):
        label = "one class" if place == 0 else None
        axis.plot(*zip(*entry.curve, strict=True), color=theme.first, linewidth=1, alpha=0.45, label=label)
    found = [entry for entry in classes if entry.precision or entry.recall]
    points = [entry.recall for entry in found], [entry.precision for entry in found]
    axis.plot(*points, "o", color=theme.first, markersize=4, label="at its threshold", clip_on=False, zorder=3)
    if metrics.curve:
        axis.plot(*zip(*metrics.curve, strict=True), color=theme.second, linewidth=2.2, label="all labels together")
    axis.set(title=f"Precision and recall on the {role} split", xlabel="recall", ylabel="precision")
    axis.set(xlim=(0, 1.02), ylim=(0, 1.03))
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.grid()
    axis.legend(loc="lower left")
    return figure


def average_precision_figure(metrics: MultiLabelMetrics, role: str, theme: Theme):
    """Plot average precision and F1 of each class, with their means as lines.

    The class with the largest average precision is on top. Classes without images are left out.

    Args:
        metrics: multi-label metrics of the split.
        role: split, for the title.
        theme: colors.

    Returns:
        The `matplotlib.figure.Figure`.
    """
    classes = sorted((e for e in metrics.per_class if e.images), key=lambda e: (e.average_precision, e.label))
    count, places = len(classes), range(len(classes))
    height = float(np.clip(count * (0.3 if count <= 30 else 0.19), 1.5, 23))
    figure, (axis,) = place_axes((0, 0, 5.6, height))
    curves = (
        ("average precision", [e.average_precision for e in classes], metrics.map, "mAP", "o", theme.first),
        ("F1", [e.f1 for e in classes], metrics.macro_f1, "macro F1", "s", theme.second),
    )
    for label, values, mean, name, marker, color in curves:
        axis.plot(values, places, marker, color=color, markersize=5, label=label, clip_on=False)
        axis.axvline(mean, color=color, linewidth=1.3, label=f"{name} {mean:.4f}")
    if count <= MAX_AXIS_NAMES:
        axis.set_yticks(places, [short(e.label) for e in classes], fontsize=9.5 if count <= 30 else 8)
    else:
        axis.set_yticks([])
    lowest = min(value for _, values, mean, *_ in curves for value in (*values, mean))
    axis.set(title=f"Average precision and F1 by class on the {role} split", ylim=(-0.6, count - 0.4))
    axis.set_xlim(max(0.0, lowest - 0.05 * (1 - lowest)), 1 + 0.02 * (1 - lowest) + 0.001)
    axis.grid(axis="x")
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    figure.legend(loc="upper center", bbox_to_anchor=(2.8, -0.32), borderaxespad=0, ncols=4)
    return figure


def short(name: str) -> str:
    """Shorten a class name to one line of a figure."""
    name = printable(" ".join(name.split()))
    return name if len(name) <= MAX_NAME_LENGTH else f"{name[: MAX_NAME_LENGTH - 1]}…"


def luminance(color) -> float:
    """Return the relative luminance of a color, 0 to 1 (WCAG 2.2)."""
    rgb = np.asarray(matplotlib.colors.to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def contrast(one, other) -> float:
    """Return the contrast ratio of two colors, 1 to 21 (WCAG 2.2)."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def readable_on(color) -> str:
    """Return black or white, whichever has more contrast to `color`."""
    return max("#000000", "#ffffff", key=lambda ink: contrast(ink, color))


_ATTENTION_COLORMAP = "viridis"  # perceptually uniform, readable in gray
_IMAGE_WIDTH = 1.55  # inches
_GAP = 0.08  # between images, inches
_FONT = 10  # font size of captions, points


def training_figure(images: np.ndarray, targets: np.ndarray, names: list[str], theme: Theme):
    """Draw augmented training images with their classes.

    Args:
        images: uint8 `(images, height, width, 3)`.
        targets: class indices `(images,)`, or probabilities `(images, classes)` after mixup or CutMix, or of several
            labels.
        names: class names.
        theme: colors.
    """
    if targets.ndim > 1:
        mixtures = ([(names[index], target[index]) for index in np.flatnonzero(target)] for target in targets)
        captions = ["\n".join(_with_weight(name, weight) for name, weight in mixture) for mixture in mixtures]
    else:
        captions = [short(names[target]) for target in targets]
    figure, axis, places = _image_grid(captions, min(8, len(images)), images.shape[1:3], fontsize=8)
    for place, image, caption in zip(places, images, captions, strict=True):
        axis.imshow(image, extent=place, aspect="auto")
        _write_caption(axis, place, caption, fontsize=8)
    return figure


def _with_weight(name: str, weight: float) -> str:
    return short(name) if weight == 1 else f"{short(name)} {weight:.0%}"


def mistakes_figure(images: np.ndarray, examples: list[ExampleImage], split: str, theme: Theme):
    """Draw the most confident mistakes: predicted class, confidence, true class.

    Args:
        images: uint8 `(images, height, width, 3)`.
        examples: predictions for these images.
        split: name of the split.
        theme: colors.
    """
    columns = min(4, len(images)) if len(images) <= 8 else min(8, -(-len(images) // 2))
    captions = [f"{short(e.predicted)} ({e.confidence:.1%})\ntrue: {short(e.true)}" for e in examples]
    figure, axis, places = _image_grid(captions, columns, images.shape[1:3])
    for place, image, caption in zip(places, images, captions, strict=True):
        predicted, true = caption.split("\n")
        axis.imshow(image, extent=place, aspect="auto")
        _write_caption(axis, place, f"{predicted}\n")
        _write_caption(axis, place, true, color=theme.second)
    axis.set_title(f"The most confident mistakes on the {split} split")
    return figure


def attention_figure(images: np.ndarray, maps: np.ndarray, examples: list[ExampleImage], split: str, theme: Theme):
    """Draw images above their attention rollout (Abnar and Zuidema 2020).

    Args:
        images: uint8 `(images, height, width, 3)`.
        maps: attention rollout `(images, rows, columns)`.
        examples: predictions for these images.
        split: name of the split.
        theme: colors.
    """
    predicted = [f"{short(entry.predicted)} ({entry.confidence:.0%})" for entry in examples]
    true = ["" if e.predicted == e.true else f"\ntrue: {short(e.true)}" for e in examples]
    captions = ["".join(lines) for lines in zip(predicted, true, strict=True)]
    figure, axis, places = _image_grid(captions, len(images), images.shape[1:3])
    for place, image, rollout, caption in zip(places, images, maps, captions, strict=True):
        left, right, bottom, top = place
        below = (left, right, bottom + (bottom - top) + _GAP, bottom + _GAP)
        axis.imshow(image, extent=place, aspect="auto")
        _write_caption(axis, place, caption)
        gray = image @ np.array([0.299, 0.587, 0.114])
        axis.imshow(gray, extent=below, aspect="auto", cmap="gray", vmin=0, vmax=255, clip_on=False)
        low, high = np.percentile(rollout, [2, 98])  # a single outlier patch would leave the others dark
        axis.imshow(
            rollout, extent=below, aspect="auto", cmap=_ATTENTION_COLORMAP, alpha=0.65, interpolation="bicubic",
            vmin=low, vmax=max(high, low + 1e-9), clip_on=False,
        )  # fmt: skip
    axis.set_title(f"Attention rollout on the {split} split (bright: high attention)")
    return figure


def _image_grid(captions: list[str], columns: int, size: tuple[int, int], fontsize: float = _FONT):
    """Lay out images with captions in one axes.

    This is faster than one axes per image.

    Args:
        captions: text above each image.
        columns: number of columns, each as wide as the widest caption.
        size: (height, width) of the images, in pixels.
        fontsize: font size of the captions, in points.

    Returns:
        (figure, axes, `extent` of each image in inches).
    """
    figure, (axis,) = place_axes((0, 0, 1, 1))
    lines = [caption.split("\n") for caption in captions]
    widest = max(_inches(figure, line, fontsize) for each in lines for line in each)
    step = max(_IMAGE_WIDTH + _GAP, widest + 2 * _GAP)
    height = _IMAGE_WIDTH * size[0] / size[1]
    caption_height = 0.1 + 1.3 * fontsize / 72 * max(map(len, lines))
    row_height = height + caption_height
    right = columns * step
    bottom = -(-len(captions) // columns) * row_height
    axis.set_position((0, 0, right, bottom))
    axis.set(xlim=(0, right), ylim=(bottom, 0))
    axis.set_axis_off()
    corners = (
        (n % columns * step + (step - _IMAGE_WIDTH) / 2, n // columns * row_height + caption_height)
        for n in range(len(captions))
    )
    return figure, axis, [(left, left + _IMAGE_WIDTH, top + height, top) for left, top in corners]


def _inches(figure, line: str, fontsize: float) -> float:
    """Return the width of a line of text."""
    properties = FontProperties(size=fontsize)
    return figure.canvas.get_renderer().get_text_width_height_descent(line, properties, ismath=False)[0] / figure.dpi


def _write_caption(axis, place: tuple[float, float, float, float], text: str, fontsize: float = _FONT, **settings):
    left, right, _, top = place
    axis.text((left + right) / 2, top - 0.04, text, ha="center", va="bottom", fontsize=fontsize, **settings)
