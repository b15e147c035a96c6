"""Matplotlib figures of a report: PNG in two themes, SVG in a page's colors."""

import html
import io
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from hfvit.artifacts.json_record import is_number
from hfvit.artifacts.lr_finder_record import LearningRateCurve
from hfvit.artifacts.run_sections import (
    CalibrationBin,
    ExampleImage,
    MultiLabelMetrics,
    Probe,
    SplitMetrics,
    Temperature,
)
from hfvit.errors import printable
from hfvit.metrics.classification import accuracy_interval
from hfvit.utils.files import temporary_file
from hfvit.utils.fonts import drawable, families
from hfvit.utils.markup import SafeText
from hfvit.utils.overlay import enlarged, highlight

MAX_AXIS_NAMES = 120  # class names along an axis; more would not be readable
MAX_CELLS = 1000  # along a side of the confusion matrix; the cells of more would be smaller than pixels
MAX_RECTANGLES = 60  # classes whose cells are rectangles; those of more are the pixels of an image
MAX_WRITTEN = 20  # classes whose counts are written into the cells, and which keep their order
MAX_RECALLS = 60  # classes in the figure of the recall
MAX_NAME_LENGTH = 24  # characters of a class name
MIN_SMOOTHED = 20  # points of a loss curve that is smoothed
RISE = 1.1  # of the last validation loss to the lowest, from which on it is said to rise
_CELL_POWER = 0.4  # a linear scale would hide rare mistakes
_CELL_FLIP = 0.64  # opacity of a cell from which on its text is of the other color
_MATRIX_TICKS = (0.01, 0.05, 0.2, 0.5, 1)


@dataclass(frozen=True)
class Theme:
    """Colors of the light or the dark version of a plot, or of a page.

    Contrast to the background is at least 4.5 : 1 for text and 3 : 1 for marks (WCAG 2.2). The three line colors are
    Okabe and Ito's, or lighter ones of the same hues, which color-blind readers can tell apart. The background is
    opaque, since a transparent plot would be unreadable on a page whose theme differs from that of the system.

    Attributes:
        suffix: suffix of file names.
        paper: background.
        ink: text.
        muted: axes and minor text.
        grid: grid lines.
        first: color of the first line, then `second` and `third`.
        cell: color of a cell of the confusion matrix with all images of its class; others are more transparent.
        on_paper: text on light cells (dark cells in the dark theme), and `on_cell` on the others.
        raster: as `cell`, for images of cells, whose colors a page cannot change.
        is_web: whether a browser draws the text.
    """

    suffix: str
    paper: str
    ink: str
    muted: str
    grid: str
    first: str
    second: str
    third: str
    cell: str
    on_paper: str
    on_cell: str
    raster: str
    is_web: bool = False

    def settings(self, names: Iterable[str] = ()) -> dict:
        """Return matplotlib's rcParams, with fonts for class names."""
        return {
            "figure.facecolor": self.paper, "axes.facecolor": self.paper, "savefig.facecolor": self.paper,
            "text.color": self.ink, "axes.labelcolor": self.ink, "axes.titlecolor": self.ink,
            "xtick.color": self.muted, "ytick.color": self.muted, "axes.edgecolor": self.muted,
            "xtick.labelcolor": self.ink, "ytick.labelcolor": self.ink,
            "grid.color": self.grid, "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.titlesize": 11,
            "axes.titlepad": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
            "legend.fontsize": 9, "font.size": 9.5, "lines.linewidth": 1.8, "text.parse_math": False,
            "figure.dpi": 130, "svg.fonttype": "none", "svg.hashsalt": "hfvit",
            **({} if self.is_web else {"font.family": families(names)}),
        }  # fmt: skip

    def name(self, label: str) -> str:
        """Return a class name as a figure shows it."""
        return short(label) if self.is_web else short(drawable(label))


LIGHT = Theme(
    "", "#ffffff", "#1f2328", "#59636e", "#d8dee4", "#0072b2", "#d55e00", "#007d5a",
    "#082a5e", "#000000", "#ffffff", "#082a5e",
)  # fmt: skip
DARK = Theme(
    "_dark", "#0d1117", "#f0f6fc", "#9198a1", "#30363d", "#56b4e9", "#e69f00", "#2fbf9a",
    "#72b6e2", "#ffffff", "#000000", "#72b6e2",
)  # fmt: skip
THEMES = (LIGHT, DARK)
_ROLES = ("paper", "ink", "muted", "grid", "first", "second", "third", "cell", "on_paper", "on_cell")
_PLACEHOLDERS = {role: f"#0a0b{index:02x}" for index, role in enumerate(_ROLES)}
WEB = Theme(suffix="", raster="#2f86c9", is_web=True, **_PLACEHOLDERS)


def css_variables(theme: Theme) -> str:
    """Return the colors of a theme as CSS variables `--plot-...` of `draw_svg`."""
    return " ".join(f"--plot-{role.replace('_', '-')}: {getattr(theme, role)};" for role in _ROLES)


def draw(name: str, figure: Callable[[Theme], Figure], folder: str | Path, names: Iterable[str] = ()) -> list[Path]:
    """Draw a figure in both themes to a folder.

    Args:
        name: file name without suffix: NAME.png (light) and NAME_dark.png.
        figure: function that draws the figure in a theme.
        folder: folder of the files.
        names: class names in the figure.

    Returns:
        The paths of the two files.
    """
    paths = []
    extent = None
    for theme in THEMES:
        path = Path(folder) / f"{name}{theme.suffix}.png"
        with temporary_file(path) as temporary, style.context(theme.settings(names), after_reset=True):
            drawn = figure(theme)
            if extent is None:  # the same in both themes, which differ only in color
                extent = drawn.get_tightbbox().padded(0.15)
            drawn.savefig(temporary, bbox_inches=extent, format="png")
        paths.append(path)
    return paths


def draw_file(path: Path, figure: Callable[[Theme], Figure]) -> None:
    """Draw a figure in the light theme to a PNG file."""
    with temporary_file(path) as temporary, style.context(LIGHT.settings(), after_reset=True):
        drawn = figure(LIGHT)
        drawn.savefig(temporary, bbox_inches="tight", format="png")


def draw_svg(figure: Callable[[Theme], Figure], description: str) -> SafeText:
    """Draw a figure as SVG for a page that defines the variables of `css_variables`.

    Its text stays text, which the browser draws with the fonts that it has.

    Args:
        figure: function that draws the figure in a theme.
        description: text for screen readers.
    """
    buffer = io.StringIO()
    with style.context(WEB.settings(), after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+")  # matplotlib only measures the text
        drawn = figure(WEB)
        unused = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        drawn.savefig(buffer, format="svg", bbox_inches="tight", metadata=unused)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace(" xlink:href=", " href=")  # as in HTML
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)  # of groups: figure_1, axes_1, ...
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    for role, color in _PLACEHOLDERS.items():
        svg = svg.replace(color, f"var(--plot-{role.replace('_', '-')})")
    return SafeText(svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1))


def place_axes(*places: tuple[float, float, float, float], share_x: bool = False):
    """Create a figure with axes at fixed places.

    This is faster than matplotlib's layouts.

    Args:
        places: (left, bottom, width, height) of each axes, in inches; `draw` crops the figure to its content.
        share_x: share the x axis.

    Returns:
        (figure, list of axes).
    """
    figure = Figure(figsize=(1, 1))  # pyplot would replace the backend of a notebook
    FigureCanvasAgg(figure)
    axes = []
    for place in places:
        axes.append(figure.add_axes(place, sharex=axes[0] if share_x and axes else None))
    return figure, axes


def learning_curves(
    history: list[dict], best_step: int | None, theme: Theme, key: str = "accuracy", name: str = "accuracy"
) -> Figure:
    """Draw loss, validation metric and learning rate over the epochs.

    Marks show the warm-up of the learning rate, the selected checkpoint, and the lowest validation loss if it rises
    afterwards. Records without epochs are drawn over steps.

    Args:
        history: `log_history` of the Trainer.
        best_step: step of the selected checkpoint; None if none was selected.
        theme: colors.
        key: key of the metric in the history.
        name: name of the metric in the title.
    """
    figure, axes = place_axes(*((left, 0, 3.75, 2.8) for left in (0, 4.45, 8.9)), share_x=True)
    entries = [entry for entry in history if isinstance(entry, dict) and is_number(entry.get("step"))]
    unit = "epoch" if entries and all(is_number(entry.get("epoch")) for entry in entries) else "step"

    def points(of: str) -> tuple[np.ndarray, np.ndarray]:
        found = [(entry[unit], entry[of]) for entry in entries if is_number(entry.get(of))]
        return tuple(np.array(found, dtype=float).reshape(-1, 2).T)

    loss, score, rate = axes
    _draw_training_loss(loss, *points("loss"), theme)
    x, values = points("eval_loss")
    if len(x):
        marker = "o" if len(x) < 40 else None
        loss.plot(x, values, color=theme.second, label="validation", marker=marker, markersize=3.5)
        lowest = int(values.argmin())
        if values[-1] > RISE * values[lowest] > 0:
            loss.plot(
                x[lowest], values[lowest], "o", markersize=11, markerfacecolor="none", markeredgecolor=theme.ink,
                markeredgewidth=1.4, linestyle="none", label="lowest, then rises",
            )  # fmt: skip
    x, values = points(f"eval_{key}")
    if len(x):
        score.plot(x, values, color=theme.second, marker="o" if len(x) < 40 else None, markersize=3.5)
    x, values = points("learning_rate")
    if len(x):
        rate.plot(x, values, color=theme.third)
        peak = int(values.argmax())
        if peak and values[0] < values[peak]:
            for axis in axes:
                axis.axvspan(0, x[peak], color=theme.muted, alpha=0.16, linewidth=0, label="warm-up")
    best = next((entry[unit] for entry in entries if best_step and entry["step"] == best_step), None)
    for axis, title in zip(axes, ("Loss", f"Validation {name}", "Learning rate"), strict=True):
        axis.set(title=title, xlabel=unit)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axis.grid()
        if best is not None and axis is not rate:
            axis.axvline(best, color=theme.muted, linestyle=":", linewidth=1.4, zorder=0, label="selected")
    score.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    return figure


def _draw_training_loss(axis: Axes, x: np.ndarray, losses: np.ndarray, theme: Theme) -> None:
    """Draw the logged losses, smoothed if they are many.

    Args:
        axis: axes to draw on.
        x: epoch or step of each loss.
        losses: logged losses.
        theme: colors.
    """
    from scipy.ndimage import gaussian_filter1d

    if len(x) >= MIN_SMOOTHED:
        smoothed = gaussian_filter1d(losses, max(1.0, len(losses) / 40), mode="nearest")
        axis.plot(x, losses, color=theme.first, alpha=0.3, linewidth=1)
        axis.plot(x, smoothed, color=theme.first, label="training, smoothed")
    elif len(x):
        axis.plot(x, losses, color=theme.first, label="training", marker="o", markersize=3.5)


def learning_rate_figure(curve: LearningRateCurve, theme: Theme) -> Figure:
    """Draw the loss of a learning rate range test, with the suggestions.

    Args:
        curve: result of the test.
        theme: colors.
    """
    figure, (axis,) = place_axes((0, 0, 6.4, 3.6))
    axis.plot(curve.learning_rates, curve.losses, color=theme.first, alpha=0.3, linewidth=1, label="loss")
    axis.plot(curve.learning_rates, curve.smoothed, color=theme.first, label="smoothed")
    marks = (
        ("steepest", curve.steepest, theme.second, "-"),
        ("minimum / 10", curve.minimum_tenth, theme.third, "--"),
        ("recipe", curve.recipe, theme.muted, ":"),
    )
    for name, rate, color, line_style in marks:
        axis.axvline(rate, color=color, linestyle=line_style, linewidth=1.4, label=f"{name} {rate:.1e}")
    low, high = min(curve.losses), curve.smoothed[0]
    axis.set(
        title="Learning rate range test", xlabel="learning rate", ylabel="training loss", xscale="log",
        ylim=(low - 0.1 * abs(high - low), high + 0.5 * abs(high - low)),
    )  # fmt: skip
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
    axis.grid()
    axis.legend(loc="lower left")
    return figure


def probe_curves(probe: Probe, theme: Theme, key: str = "accuracy", name: str = "accuracy") -> Figure:
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


def confusion_figure(metrics: SplitMetrics, role: str, theme: Theme) -> Figure:
    """Draw the confusion matrix, normalized by row (true class).

    Up to 20 classes, counts are written into the cells. More classes are sorted so that classes that are confused
    stand together. The color scale is a power of 0.4, since a linear scale would hide rare mistakes.

    Args:
        metrics: metrics of the split.
        role: name of the split: test or validation.
        theme: colors.
    """
    names = [theme.name(entry.label) for entry in metrics.per_class]
    matrix = metrics.confusion_matrix.dense(most=MAX_CELLS).astype(float)
    count = len(matrix)
    title = f"Confusion on the {role} split"
    if count < len(names):
        title += f", {-(-len(names) // MAX_CELLS)} classes to a cell"
    elif count > MAX_WRITTEN:
        order = confusion_order(matrix)
        matrix = matrix[np.ix_(order, order)]
        names = [names[index] for index in order]
        title += ", sorted by similarity"
    opacity = (matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)) ** _CELL_POWER
    side = float(np.clip(count * (0.34 if count <= 30 else 0.15), 2.4, 18))
    figure, (axis, scale) = place_axes((0, 0, side, side), (side + 0.2, side / 2 - 0.85, 0.3, 1.7))
    if count <= MAX_RECTANGLES:
        for i, j in np.argwhere(matrix > 0):
            axis.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=theme.cell, alpha=opacity[i, j], linewidth=0))
    else:
        cells = np.empty((count, count, 4))
        cells[..., :3] = to_rgb(theme.raster)
        cells[..., 3] = opacity
        axis.imshow(cells, interpolation="nearest")
    axis.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5))
    font = 9.5 if count <= 30 else 7
    ticks, tick_names = (range(count), names) if count <= MAX_AXIS_NAMES else ([], [])
    axis.set_xticks(ticks, tick_names, rotation=0 if max(map(len, names)) < 3 else 90, fontsize=font)
    axis.set_yticks(ticks, tick_names, fontsize=font)
    axis.tick_params(length=0)
    # grid lines between the classes
    if count <= MAX_AXIS_NAMES:
        for lines in (axis.hlines, axis.vlines):
            edges = np.arange(-0.5, count)
            lines(edges, edges[0], edges[-1], color=theme.grid, linewidth=0.8 if count <= 30 else 0.4)
    axis.set(title=title, xlabel="predicted", ylabel="true")
    if count <= MAX_WRITTEN:
        digits = len(f"{matrix.max():.0f}")
        for i, j in np.argwhere(matrix > 0):
            axis.text(
                j, i, f"{matrix[i, j]:.0f}", ha="center", va="center", fontsize=9.5 if digits < 4 or count <= 6 else 8,
                color=theme.on_cell if opacity[i, j] >= _CELL_FLIP else theme.on_paper,
            )  # fmt: skip
    _draw_matrix_scale(scale, theme)
    return figure


def _draw_matrix_scale(axis: Axes, theme: Theme) -> None:
    """Draw the color scale of a confusion matrix."""
    for place, tick in enumerate(_MATRIX_TICKS):
        axis.add_patch(Rectangle((0, place), 1, 1, facecolor=theme.cell, alpha=tick**_CELL_POWER, linewidth=0))
    axis.set(xlim=(0, 1), ylim=(0, len(_MATRIX_TICKS)), xticks=[], ylabel="fraction of the true class")
    axis.set_yticks(np.arange(len(_MATRIX_TICKS)) + 0.5, [f"{tick:.0%}" for tick in _MATRIX_TICKS])
    axis.yaxis.tick_right()
    axis.yaxis.set_label_position("right")
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def confusion_order(matrix: np.ndarray) -> np.ndarray:
    """Return an order of the classes in which those that are confused stand together.

    Args:
        matrix: counts `(classes, classes)`.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    fractions = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    similarity = (fractions + fractions.T) / 2
    distance = 1 - similarity / max(similarity[~np.eye(len(matrix), dtype=bool)].max(), 1e-12)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance.clip(min=0), checks=False), "average", optimal_ordering=len(matrix) <= 200)
    return leaves_list(tree)


def per_class_figure(metrics: SplitMetrics, role: str, theme: Theme) -> Figure:
    """Draw the recall of each class with its 95 % interval, worst class first.

    Points instead of bars, since bars have to start at zero, where differences are too small to see. Classes without
    images are left out, and of many classes those with the highest recall.

    Args:
        metrics: metrics of the split.
        role: name of the split: test or validation.
        theme: colors.
    """
    found = sorted((e for e in metrics.per_class if e.images), key=lambda e: (e.recall, e.label))
    classes = found[:MAX_RECALLS]
    count = len(classes)
    places = range(count)
    figure, axis = _class_axes([theme.name(entry.label) for entry in classes])
    recalls = [entry.recall for entry in classes]
    intervals = [accuracy_interval(round(entry.recall * entry.images), entry.images) for entry in classes]
    lows, highs = zip(*intervals, strict=True)
    axis.hlines(places, lows, highs, color=theme.first, linewidth=2.4, alpha=0.45, label="95 % interval")
    axis.plot(recalls, places, "o", color=theme.first, markersize=5, label="recall of a class")
    label = f"accuracy, {metrics.accuracy:.2%}"
    axis.axvline(metrics.accuracy, color=theme.second, linewidth=1.5, label=label)
    title = f"Recall by class on the {role} split"
    if count < len(found):
        title += f", the {count} lowest of {len(found):,}"
    axis.set(title=title, ylim=(count - 0.4, -0.6))
    _limit_scores(axis, max(0.0, min(*lows, metrics.accuracy)), margin=0.03)
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    figure.legend(loc="upper center", bbox_to_anchor=(2.8, -0.32), borderaxespad=0, ncols=3)
    return figure


def _class_axes(names: list[str]):
    """Create a figure with a row for each class.

    Returns:
        (figure, axes).
    """
    count = len(names)
    height = float(np.clip(count * (0.3 if count <= 30 else 0.19), 1.5, 23))
    figure, (axis,) = place_axes((0, 0, 5.6, height))
    ticks, tick_names = (range(count), names) if count <= MAX_AXIS_NAMES else ([], [])
    axis.set_yticks(ticks, tick_names, fontsize=9.5 if count <= 30 else 8)
    axis.grid(axis="x")
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    return figure, axis


def _limit_scores(axis, lowest: float, margin: float) -> None:
    """Limit the x axis to scores from `lowest` to 1, with a margin for `lowest`."""
    axis.set_xlim(max(0.0, lowest - margin * (1 - lowest)), 1 + 0.02 * (1 - lowest) + 0.001)


def reliability_figure(metrics: SplitMetrics, role: str, temperature: Temperature | None, theme: Theme) -> Figure:
    """Draw a reliability diagram, before and after temperature scaling.

    Above: accuracy over confidence with 95 % intervals (Wilson). Below: number of images in each bin.

    Args:
        metrics: metrics of the split.
        role: name of the split: test or validation.
        temperature: temperature scaling of the run, if it has one.
        theme: colors.
    """
    curves = [("model", metrics.ece, metrics.calibration, theme.first, "o", -1)]
    after = temperature.splits.get(role) if temperature else None
    if after:
        how = f"fitted on {theme.name(temperature.fitted_on)}"
        if role == temperature.fitted_on:
            how = f"cross-fitted, {temperature.folds} folds" if temperature.folds else "fitted on the same images"
        label = f"temperature {temperature.value:.2f} ({how})"
        curves.append((label, after.ece, after.calibration, theme.second, "s", 1))
    figure, (top, bottom) = place_axes((0, 1.4, 4.6, 3.8), (0, 0, 4.6, 1.25), share_x=True)
    top.tick_params(axis="x", labelbottom=False)
    top.plot([0, 1], [0, 1], color=theme.muted, linestyle="--", linewidth=1.2, label="perfect")
    for label, ece, bins, color, marker, side in curves:
        shift = side * 0.008 if after else 0
        confidence = np.array([entry.confidence for entry in bins])
        accuracy = [entry.accuracy for entry in bins]
        top.plot(confidence, accuracy, color=color, linewidth=1.2, alpha=0.7)
        top.vlines(confidence + shift, *_bin_intervals(bins), color=color, linewidth=1.6, alpha=0.5)
        top.plot(
            confidence, accuracy, marker, color=color, markersize=6, markeredgewidth=0, zorder=3, clip_on=False,
            label=f"{label}, ECE {ece:.4f}",
        )  # fmt: skip
        counts = [entry.images for entry in bins]
        bottom.bar(confidence + shift, counts, width=0.015 if after else 0.036, color=color)
    top.set(title=f"Reliability on the {role} split", ylabel="accuracy", ylim=(0, 1.03))
    bottom.set(xlabel="confidence", ylabel="images", xlim=(0, 1.03), yscale="log")
    bottom.set_ylim(bottom=0.7)
    bottom.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    bottom.yaxis.set_minor_formatter(NullFormatter())
    for axis in (top, bottom):
        axis.grid()
    top.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bottom.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(*top.get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(2.3, -0.5), borderaxespad=0)
    return figure


def _bin_intervals(bins: Sequence[CalibrationBin]) -> tuple[list[float], list[float]]:
    """Return the lower and upper ends of the intervals of the bins' accuracy."""
    found = [
        accuracy_interval(round(entry.accuracy * entry.images), entry.images) if entry.images else (0.0, 1.0)
        for entry in bins
    ]
    return [low for low, _ in found], [high for _, high in found]


def two_class_figure(metrics: SplitMetrics, role: str, theme: Theme) -> Figure:
    """Draw the ROC and the precision-recall curve of the second of two classes.

    Args:
        metrics: metrics of the split, with both curves.
        role: name of the split: test or validation.
        theme: colors.
    """
    figure, axes = place_axes((0, 0, 3.9, 3.9), (4.7, 0, 3.9, 3.9))
    positive = metrics.per_class[1]
    fraction = positive.images / max(1, metrics.images)
    panels = (
        ("ROC", metrics.roc_curve, "false positive rate", "true positive rate", ([0, 1], [0, 1])),
        ("Precision and recall", metrics.precision_recall_curve, "recall", "precision", ([0, 1], [fraction] * 2)),
    )
    for axis, (title, curve, x_name, y_name, chance) in zip(axes, panels, strict=True):
        axis.plot(*chance, color=theme.muted, linestyle="--", linewidth=1.2, label="chance")
        x, y = zip(*curve, strict=True)
        axis.plot(x, y, color=theme.first, label=theme.name(positive.label), clip_on=False)
        axis.set(title=f"{title} on the {role} split", xlabel=x_name, ylabel=y_name)
        _limit_rates(axis)
        axis.legend(loc="lower right" if title == "ROC" else "lower left")
    return figure


def precision_recall_figure(metrics: MultiLabelMetrics, role: str, theme: Theme) -> Figure:
    """Plot the precision-recall curve of each class and of all labels together.

    Points are the precision and recall at the thresholds.

    Args:
        metrics: multi-label metrics of the split.
        role: split, for the title.
        theme: colors.
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
    _limit_rates(axis)
    axis.legend(loc="lower left")
    return figure


def _limit_rates(axis) -> None:
    """Format both axes as rates from 0 to 100 %."""
    axis.set(xlim=(0, 1.02), ylim=(0, 1.03))
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.grid()


def average_precision_figure(metrics: MultiLabelMetrics, role: str, theme: Theme) -> Figure:
    """Plot average precision and F1 of each class, with their means as lines.

    The class with the largest average precision is on top. Classes without images are left out.

    Args:
        metrics: multi-label metrics of the split.
        role: split, for the title.
        theme: colors.
    """
    classes = sorted((e for e in metrics.per_class if e.images), key=lambda e: (e.average_precision, e.label))
    count, places = len(classes), range(len(classes))
    figure, axis = _class_axes([theme.name(entry.label) for entry in classes])
    curves = (
        ("average precision", [e.average_precision for e in classes], metrics.map, "mAP", "o", theme.first),
        ("F1", [e.f1 for e in classes], metrics.macro_f1, "macro F1", "s", theme.second),
    )
    for label, values, mean, name, marker, color in curves:
        axis.plot(values, places, marker, color=color, markersize=5, label=label, clip_on=False)
        axis.axvline(mean, color=color, linewidth=1.3, label=f"{name} {mean:.4f}")
    lowest = min(value for _, values, mean, *_ in curves for value in (*values, mean))
    axis.set(title=f"Average precision and F1 by class on the {role} split", ylim=(-0.6, count - 0.4))
    _limit_scores(axis, lowest, margin=0.05)
    figure.legend(loc="upper center", bbox_to_anchor=(2.8, -0.32), borderaxespad=0, ncols=4)
    return figure


def short(name: str) -> str:
    """Shorten a class name to one line of a figure."""
    name = printable(" ".join(name.split()))
    return name if len(name) <= MAX_NAME_LENGTH else f"{name[: MAX_NAME_LENGTH - 1]}…"


_IMAGE_WIDTH = 1.55  # inches
_GAP = 0.08  # between images, inches
_FONT = 10  # font size of captions, points


def training_figure(images: np.ndarray, targets: np.ndarray, names: list[str], theme: Theme) -> Figure:
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
        captions = ["\n".join(_with_weight(theme.name(name), weight) for name, weight in each) for each in mixtures]
    else:
        captions = [theme.name(names[target]) for target in targets]
    figure, axis, places = _image_grid(captions, min(8, len(images)), images.shape[1:3], fontsize=8)
    for place, image, caption in zip(places, images, captions, strict=True):
        axis.imshow(image, extent=place, aspect="auto")
        _write_caption(axis, place, caption, fontsize=8)
    return figure


def _with_weight(name: str, weight: float) -> str:
    return name if weight == 1 else f"{name} {weight:.0%}"


def mistakes_figure(images: np.ndarray, examples: list[ExampleImage], title: str, theme: Theme) -> Figure:
    """Draw images with their predicted class, its confidence, and the label.

    Args:
        images: uint8 `(images, height, width, 3)`.
        examples: predictions for these images.
        title: title of the figure.
        theme: colors.
    """
    columns = min(4, len(images)) if len(images) <= 8 else min(8, -(-len(images) // 2))
    captions = [
        f"{theme.name(e.predicted)} ({e.confidence:.1%})\nlabel: {theme.name(e.true)}\n{theme.name(source_of(e))}"
        for e in examples
    ]
    figure, axis, places = _image_grid(captions, columns, images.shape[1:3])
    for place, image, caption in zip(places, images, captions, strict=True):
        predicted, true, source = caption.split("\n")
        axis.imshow(image, extent=place, aspect="auto")
        _write_caption(axis, place, f"{predicted}\n\n")
        _write_caption(axis, place, f"{true}\n", color=theme.second)
        _write_caption(axis, place, source, color=theme.muted)
    axis.set_title(title)
    return figure


def source_of(example: ExampleImage) -> str:
    """Return the file name of an image, or its row; empty if both are unknown."""
    if example.file:
        return Path(example.file).name
    return "" if example.row is None else f"row {example.row:,}"


def explanation_figure(
    images: np.ndarray, maps: np.ndarray, examples: list[ExampleImage], title: str, theme: Theme
) -> Figure:
    """Draw images above the parts that speak for their predicted class.

    Args:
        images: uint8 `(images, height, width, 3)`.
        maps: relevance `(images, rows, columns)`.
        examples: predictions for these images.
        title: title, with the name of the method.
        theme: colors.
    """
    predicted = [f"{theme.name(entry.predicted)} ({entry.confidence:.0%})" for entry in examples]
    true = ["" if e.predicted == e.true else f"\nlabel: {theme.name(e.true)}" for e in examples]
    captions = ["".join(lines) for lines in zip(predicted, true, strict=True)]
    figure, axis, places = _image_grid(captions, len(images), images.shape[1:3])
    for place, image, relevance, caption in zip(places, images, maps, captions, strict=True):
        left, right, bottom, top = place
        below = (left, right, bottom + (bottom - top) + _GAP, bottom + _GAP)
        axis.imshow(image, extent=place, aspect="auto")
        _write_caption(axis, place, caption)
        axis.imshow(highlight(enlarged(image, 112), scaled(relevance)), extent=below, aspect="auto", clip_on=False)
    axis.set_title(title)
    return figure


def scaled(relevance: np.ndarray) -> np.ndarray:
    """Scale a map to a maximum of 1."""
    return relevance / max(float(relevance.max()), 1e-12)


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
