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

from hfvit.artifacts.run_sections import ExampleImage, Probe, SplitMetrics, Temperature
from hfvit.utils.files import temporary_file

matplotlib.use("Agg")

MOST_NAMES = 120  # class names along an axis; more could not be read
MOST_LETTERS = 24  # of a class name
_MATRIX_TICKS = (0, 0.01, 0.05, 0.2, 0.5, 1)


@dataclass(frozen=True)
class Theme:
    """Colors of one background.

    Text has 4.5 : 1 to the paper and marks 3 : 1 (WCAG 2.2), and first, second and third stay apart for color-blind
    readers: they are Okabe and Ito's, or lighter ones of the same hues. The paper is opaque: a page may be in another
    theme than its reader's system, and transparent pictures would then be unreadable.
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
        """matplotlib's rcParams."""
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
    def shades(self) -> LinearSegmentedColormap:
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
    """`output_dir/plots/NAME.png` and `NAME_dark.png` of what `figure(theme)` makes; whole or not at all."""
    paths, extent = [], None
    for theme in THEMES:
        path = Path(output_dir) / "plots" / f"{name}{theme.suffix}.png"
        with temporary_file(path) as temporary, plt.rc_context(theme.settings):
            drawn = figure(theme)
            if extent is None:  # the other theme has the same words in the same places
                extent = drawn.get_tightbbox().padded(0.15)
            drawn.savefig(temporary, bbox_inches=extent, format="png")
            plt.close(drawn)
        paths.append(path)
    return paths


def place_axes(*places: tuple[float, float, float, float], share_x: bool = False):
    """A figure and its axes at `places`: left, bottom, width and height in inches; `draw` cuts it around them all.

    matplotlib's own layouts would draw everything several times over to find such places.
    """
    figure, axes = plt.figure(figsize=(1, 1)), []
    for place in places:
        axes.append(figure.add_axes(place, sharex=axes[0] if share_x and axes else None))
    return figure, axes


def learning_curves(history: list[dict], best_step: int | None, theme: Theme):
    """Loss, validation accuracy and learning rate over the steps; a line where the checkpoint was selected."""
    figure, axes = place_axes(*((left, 0, 3.75, 2.8) for left in (0, 4.45, 8.9)), share_x=True)
    panels = (
        ("Loss", (("loss", "training", theme.first), ("eval_loss", "validation", theme.second))),
        ("Validation accuracy", (("eval_accuracy", "", theme.second),)),
        ("Learning rate", (("learning_rate", "", theme.third),)),
    )
    for axis, (title, curves) in zip(axes, panels, strict=True):
        for key, label, color in curves:
            points = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]
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


def probe_curves(probe: Probe, theme: Theme):
    """Validation accuracy and loss of a linear probe over the strength of its penalty; a line at the one taken."""
    figure, axes = place_axes(*((left, 0, 3.75, 2.8) for left in (0, 4.45)))
    panels = ((axes[0], "accuracy", theme.second), (axes[1], "loss", theme.first))
    for axis, key, color in panels:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda c, _: f"{c:g}"))  # its own is mathtext, which is off
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.plot(probe.c, [scores[key] for scores in probe.validation], "o-", color=color, markersize=3.5)
        axis.axvline(probe.best_c, color=theme.muted, linestyle=":", linewidth=1.2, zorder=0, label="selected")
        if len(probe.c) == 1:  # one point gives a logarithmic axis no width
            axis.set_xlim(probe.best_c / 10, probe.best_c * 10)
        axis.set(title=f"Validation {key}", xlabel="C (inverse strength of the penalty)")
        axis.grid()
    axes[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes[0].legend()
    return figure


def confusion_figure(metrics: SplitMetrics, role: str, theme: Theme):
    """Rows are the true classes, as shares of the row; counts are written in while they fit.

    Shades follow the root of the share: mistakes are rare, and a linear scale hides them beside the diagonal.
    """
    matrix = np.asarray(metrics.confusion_matrix, dtype=float)
    names = [short(entry.label) for entry in metrics.per_class]
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    count = len(names)
    side = float(np.clip(count * (0.34 if count <= 30 else 0.15), 2.4, 18))
    height = min(side, 6)
    figure, (axis, scale) = place_axes((0, 0, side, side), (side + 0.12, (side - height) / 2, height / 24, height))
    norm, shades = PowerNorm(0.4, vmin=0, vmax=1), theme.shades
    image = axis.imshow(shares, cmap=shades, norm=norm)
    font = 9.5 if count <= 30 else 7
    ticks, shown = (range(count), names) if count <= MOST_NAMES else ([], [])
    axis.set_xticks(ticks, shown, rotation=0 if max(map(len, names)) < 3 else 90, fontsize=font)
    axis.set_yticks(ticks, shown, fontsize=font)
    axis.tick_params(length=0)
    # Fine lines between the classes lead the eye to the names.
    for lines in (axis.hlines, axis.vlines):
        edges = np.arange(-0.5, count)
        lines(edges, edges[0], edges[-1], color=theme.grid, linewidth=0.8 if count <= 30 else 0.4)
    axis.set(title=f"Confusion on the {role} split", xlabel="predicted", ylabel="true")
    if count <= 20:
        digits = len(f"{matrix.max():.0f}")
        for i, j in np.argwhere(matrix > 0):
            axis.text(
                j, i, f"{matrix[i, j]:.0f}", ha="center", va="center", fontsize=9.5 if digits < 4 or count <= 6 else 8,
                color=readable_on(shades(norm(shares[i, j]))),
            )  # fmt: skip
    bar = figure.colorbar(image, cax=scale, label="share of the true class")
    bar.set_ticks(_MATRIX_TICKS, labels=[f"{tick:.0%}" for tick in _MATRIX_TICKS])
    bar.outline.set_visible(False)
    return figure


def per_class_figure(metrics: SplitMetrics, role: str, theme: Theme):
    """Accuracy within each class with its 95 % interval (Wilson's), best on top, and the accuracy over all as a line.

    Points, not bars: bars would have to start at zero, where no difference shows. Classes without images are left out.
    """
    classes = sorted((e for e in metrics.per_class if e.images), key=lambda e: (e.recall, e.label))
    count, places = len(classes), range(len(classes))
    height = float(np.clip(count * (0.3 if count <= 30 else 0.19), 1.5, 23))
    figure, (axis,) = place_axes((0, 0, 5.6, height))
    recalls = [entry.recall for entry in classes]
    tests = [binomtest(round(entry.recall * entry.images), entry.images) for entry in classes]
    intervals = [test.proportion_ci(0.95, method="wilson") for test in tests]
    lows, highs = [i.low for i in intervals], [i.high for i in intervals]
    axis.hlines(places, lows, highs, color=theme.first, linewidth=2.4, alpha=0.45, label="95 % interval")
    axis.plot(recalls, places, "o", color=theme.first, markersize=5, label="accuracy of a class")
    label = f"all classes, {metrics.accuracy:.2%}"
    axis.axvline(metrics.accuracy, color=theme.second, linewidth=1.5, label=label)
    if count <= MOST_NAMES:
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
    """Accuracy against confidence, before and after temperature scaling, over the share of images in each bin."""
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
        total = sum(entry.images for entry in bins)
        shares = [entry.images / total for entry in bins]
        # Points as large as their bins: a bin of three images says little.
        top.plot(confidence, [entry.accuracy for entry in bins], color=color, linewidth=1.2, alpha=0.7)
        sizes = 14 + 110 * np.sqrt(shares)
        top.scatter(
            confidence, [e.accuracy for e in bins], s=sizes, color=color, marker=marker, linewidths=0, zorder=3,
            label=f"{label}, ECE {ece:.4f}", clip_on=False,
        )  # fmt: skip
        shift = side * 0.009 if after else 0
        bottom.bar(np.array(confidence) + shift, shares, width=0.018 if after else 0.036, color=color)
    top.set(title=f"Reliability on the {role} split", ylabel="accuracy", ylim=(0, 1.03))
    # Legends have points of one size.
    for handle in top.legend(loc="upper left").legend_handles[1:]:
        handle.set_sizes([36])
    bottom.set(xlabel="confidence", ylabel="share of images", xlim=(0, 1.03))
    for axis in (top, bottom):
        axis.grid()
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bottom.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def short(name: str) -> str:
    """A class's name on one line of a figure."""
    name = " ".join(name.split())
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 1]}…"


def luminance(color) -> float:
    """Relative luminance of WCAG 2.2, 0 to 1."""
    rgb = np.asarray(matplotlib.colors.to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def contrast(one, other) -> float:
    """Contrast ratio of WCAG 2.2, 1 to 21."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def readable_on(color) -> str:
    """Black or white, whichever is easier to read there."""
    return max("#000000", "#ffffff", key=lambda ink: contrast(ink, color))


_MASK = "viridis"  # its brightness rises evenly, so it reads without color too
_WIDTH, _GAP = 1.55, 0.08  # of a picture and between two, in inches
_FONT = 10  # points of the words above a picture


def training_figure(images: np.ndarray, targets: np.ndarray, names: list[str], theme: Theme):
    """Pictures as the model will see them, under their classes.

    Args:
        images: uint8 `(images, height, width, 3)`.
        targets: class indices `(images,)`, or probabilities `(images, classes)` of mixtures.
        names: of the classes.
    """
    if targets.ndim > 1:
        shares = ([(names[index], share[index]) for index in np.flatnonzero(share)] for share in targets)
        captions = ["\n".join(f"{short(name)} {share:.0%}" for name, share in each) for each in shares]
    else:
        captions = [short(names[target]) for target in targets]
    figure, axis, places = _sheet(captions, min(8, len(images)), images.shape[1:3], fontsize=8)
    for place, image, caption in zip(places, images, captions, strict=True):
        axis.imshow(image, extent=place, aspect="auto")
        _write_above(axis, place, caption, fontsize=8)
    return figure


def mistakes_figure(pictures: np.ndarray, examples: list[ExampleImage], split: str, theme: Theme):
    """The most confident mistakes: the predicted class, its confidence and the true class above each image."""
    columns = min(4, len(pictures)) if len(pictures) <= 8 else min(8, -(-len(pictures) // 2))
    captions = [f"{short(e.predicted)} ({e.confidence:.1%})\nis {short(e.true)}" for e in examples]
    figure, axis, places = _sheet(captions, columns, pictures.shape[1:3])
    for place, picture, caption in zip(places, pictures, captions, strict=True):
        said, true = caption.split("\n")
        axis.imshow(picture, extent=place, aspect="auto")
        _write_above(axis, place, f"{said}\n")
        _write_above(axis, place, true, color=theme.second)
    axis.set_title(f"The most confident mistakes on the {split} split")
    return figure


def attention_figure(pictures: np.ndarray, maps: np.ndarray, examples: list[ExampleImage], split: str, theme: Theme):
    """Pictures above where the model looked: attention rollout, bright where much of it lies."""
    said = [f"{short(entry.predicted)} ({entry.confidence:.0%})" for entry in examples]
    true = ["" if e.predicted == e.true else f"\nis {short(e.true)}" for e in examples]
    captions = ["".join(words) for words in zip(said, true, strict=True)]
    figure, axis, places = _sheet(captions, len(pictures), pictures.shape[1:3])
    for place, picture, seen, caption in zip(places, pictures, maps, captions, strict=True):
        left, right, bottom, top = place
        below = (left, right, bottom + (bottom - top) + _GAP, bottom + _GAP)
        axis.imshow(picture, extent=place, aspect="auto")
        _write_above(axis, place, caption)
        gray = picture @ np.array([0.299, 0.587, 0.114])
        axis.imshow(gray, extent=below, aspect="auto", cmap="gray", vmin=0, vmax=255, clip_on=False)
        low, high = np.percentile(seen, [2, 98])  # a single patch that takes nearly all would leave the rest black
        axis.imshow(
            seen, extent=below, aspect="auto", cmap=_MASK, alpha=0.65, interpolation="bicubic", vmin=low,
            vmax=max(high, low + 1e-9), clip_on=False,
        )  # fmt: skip
    axis.set_title(f"Attention rollout on the {split} split: bright where the model looked")
    return figure


def _sheet(captions: list[str], columns: int, size: tuple[int, int], fontsize: float = _FONT):
    """A figure, its only axes, and the `extent` there, in inches, of a picture of `size` pixels below each caption.

    Columns are as wide as the widest caption. Axes of its own for each picture would take most of the time: with ticks
    and labels, which are not even shown.
    """
    figure, (axis,) = place_axes((0, 0, 1, 1))
    lines = [caption.split("\n") for caption in captions]
    widest = max(_inches(figure, line, fontsize) for each in lines for line in each)
    step = max(_WIDTH + _GAP, widest + 2 * _GAP)
    height = _WIDTH * size[0] / size[1]
    room = 0.1 + 1.3 * fontsize / 72 * max(map(len, lines))
    right, bottom = columns * step, -(-len(captions) // columns) * (height + room)
    axis.set_position((0, 0, right, bottom))
    axis.set(xlim=(0, right), ylim=(bottom, 0))
    axis.set_axis_off()
    corners = (
        (n % columns * step + (step - _WIDTH) / 2, n // columns * (height + room) + room) for n in range(len(captions))
    )
    return figure, axis, [(left, left + _WIDTH, top + height, top) for left, top in corners]


def _inches(figure, line: str, fontsize: float) -> float:
    """The width of a line of text."""
    properties = FontProperties(size=fontsize)
    return figure.canvas.get_renderer().get_text_width_height_descent(line, properties, ismath=False)[0] / figure.dpi


def _write_above(axis, place: tuple[float, float, float, float], words: str, fontsize: float = _FONT, **settings):
    left, right, _, top = place
    axis.text((left + right) / 2, top - 0.04, words, ha="center", va="bottom", fontsize=fontsize, **settings)
