"""Plots in both themes: contrast, color-blind safe colors, no cropped or empty figures."""

import re
import warnings
import zipfile
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers.records import make_record
from PIL import Image

from hfvit.artifacts.run_record import RunRecord, read_examples, write_examples
from hfvit.artifacts.run_sections import ExampleImage, ExampleImages, Probe
from hfvit.report.figures import (
    DARK,
    LIGHT,
    THEMES,
    WEB,
    confusion_figure,
    confusion_order,
    css_variables,
    draw_svg,
    learning_curves,
    mistakes_figure,
    per_class_figure,
    probe_curves,
    reliability_figure,
    short,
)
from hfvit.report.plots import write_plots, write_training_images
from hfvit.utils.fonts import drawable, families

# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB.
BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def linear(color: str) -> np.ndarray:
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """Convert linear sRGB to CIELAB (white point D65)."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb.clip(0, 1)
    x, y, z = np.cbrt(xyz / (0.9505, 1.0, 1.089))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colors, 1 to 21 (WCAG 2.2)."""
    high, low = sorted((linear(color) @ (0.2126, 0.7152, 0.0722) for color in (one, other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def mixed(color: str, paper: str, opacity: float) -> str:
    pairs = [(int(color[i : i + 2], 16), int(paper[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(opacity * one + (1 - opacity) * other):02x}" for one, other in pairs)


def test_contrast_equals_wcag():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.suffix or "light")
def test_text_and_marks_have_enough_contrast(theme):
    assert (LIGHT.paper, DARK.paper) == ("#ffffff", "#0d1117")
    assert contrast(theme.ink, theme.paper) > 12
    assert contrast(theme.muted, theme.paper) >= 4.5
    for mark in (theme.first, theme.second, theme.third):
        assert contrast(mark, theme.paper) >= 3.0
    for opacity in np.linspace(0, 1, 101):
        cell = mixed(theme.cell, theme.paper, opacity)
        assert contrast(theme.on_cell if opacity >= 0.64 else theme.on_paper, cell) >= 4.4


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.suffix or "light")
@pytest.mark.parametrize("kind", BLIND)
def test_colors_are_distinct_with_color_blindness(theme, kind):
    seen = {name: lab(np.array(BLIND[kind]) @ linear(getattr(theme, name))) for name in ("first", "second")}
    for one, other in combinations(seen.values(), 2):
        assert np.linalg.norm(one - other) > 35


def with_images(record: RunRecord, folder, classes: int) -> RunRecord:
    rng = np.random.default_rng(0)
    names = record.data.labels
    examples = [
        ExampleImage(row=row, true=names[row % classes], predicted=names[(row + 1) % classes], confidence=0.9)
        for row in range(10)
    ]
    record.examples = ExampleImages(
        split="test", mistakes=examples, label_errors=examples[:2], explanations=examples[:4],
        explanation_method="Grad-CAM",
    )  # fmt: skip
    arrays = {"mistakes": rng.integers(0, 256, (10, 16, 24, 3), dtype=np.uint8)}
    arrays["label_errors"] = arrays["mistakes"][:2]
    arrays["explanations"] = arrays["mistakes"][:4]
    arrays["explanation_maps"] = rng.random((4, 2, 3)).astype(np.float32)
    write_examples(folder, arrays)
    return record


@pytest.mark.parametrize(
    "classes", [10, pytest.param(2, marks=pytest.mark.slow), pytest.param(40, marks=pytest.mark.slow)]
)
def test_every_plot_is_drawn_in_both_themes(classes, tmp_path):
    record = with_images(make_record(classes), tmp_path, classes)
    names = {"confusion_matrix", "learning_curves", "per_class_recall", "reliability", "mistakes", "label_errors"}
    names |= {"explanations"} | ({"two_classes"} if classes == 2 else set())
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / ".reliability.12345.png").write_bytes(b"half")  # of a report that was killed
    paths = write_plots(record, tmp_path)
    assert {path.stem for path in paths} == {f"{name}{theme.suffix}" for name in names for theme in THEMES}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {path.name for path in paths}
    for path in paths:
        theme = DARK if path.stem.endswith("_dark") else LIGHT
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert min(pixels.shape[:2]) > 250
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        paper = [int(theme.paper[i : i + 2], 16) for i in (1, 3, 5)]
        assert (edge == paper).all(), f"{path.name}: something touches the edge"
        assert len(np.unique(pixels @ (65536, 256, 1))) > 20  # colors

    # Another run, with no mistakes and no explanations: what it has nothing for does not stay.
    record.examples = ExampleImages(split="test", mistakes=[], explanations_left_out="none here")
    write_plots(record, tmp_path)
    left = ("mistakes", "label_errors", "explanations")
    assert not [path.name for path in (tmp_path / "plots").iterdir() if path.stem.startswith(left)]


def test_images_of_another_run_or_a_damaged_file_are_not_shown(tmp_path):
    record = with_images(make_record(2), tmp_path, 2)
    arrays = read_examples(tmp_path, record.examples)
    assert set(arrays) == {
        "mistakes", "label_errors", "explanations", "explanation_maps",
    }  # fmt: skip
    other = replace(record.examples, mistakes=record.examples.mistakes[:3])
    assert "mistakes" not in read_examples(tmp_path, other)
    assert read_examples(tmp_path, None) == {}
    (tmp_path / "examples.npz").write_bytes((tmp_path / "examples.npz").read_bytes()[:200])
    assert read_examples(tmp_path, record.examples) == {}
    np.savez(tmp_path / "examples.npz", other=np.array([{"a": 1}], dtype=object), **arrays)  # is not read
    assert set(read_examples(tmp_path, record.examples)) == set(arrays)
    np.savez(tmp_path / "examples.npz", mistakes=np.array([{"a": 1}], dtype=object))  # a pickle is not opened
    assert read_examples(tmp_path, record.examples) == {}


@pytest.mark.parametrize("member", ["mistakes", "other"])
def test_examples_that_would_take_all_memory_are_not_read(tmp_path, member):
    record = with_images(make_record(2), tmp_path, 2)
    arrays = read_examples(tmp_path, record.examples)
    write_examples(tmp_path, {name: array for name, array in arrays.items() if name != member})
    with (
        zipfile.ZipFile(tmp_path / "examples.npz", "a") as archive,
        archive.open(f"{member}.npy", "w") as file,
    ):
        shape = (len(arrays["mistakes"]), 1 << 24, 1 << 24, 3)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    assert set(read_examples(tmp_path, record.examples)) == set(arrays) - {member}


@pytest.mark.parametrize("mixed", [False, True])
def test_training_figure_shows_classes(tmp_path, mixed):
    images = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)
    targets = np.full((10, 2), 0.5) if mixed else np.arange(10) % 2
    write_training_images(images, targets, ["cat", "dog"], tmp_path)
    files = sorted((tmp_path / "plots").iterdir())
    assert [file.name for file in files] == ["training_images.png", "training_images_dark.png"]
    assert Image.open(files[0]).size[0] > 500


@pytest.mark.parametrize("c", [[1e-5, 1e-3, 1.0], [0.1, 0.2, 0.5], [0.01]])
def test_probe_curves_label_penalties_as_numbers(c):
    scores = [{"accuracy": 0.5, "loss": 1.0}] * len(c)
    probe = Probe(features=8, rows=100, c=c, best_c=c[0], selected_by="accuracy", validation=scores)
    with plt.rc_context(LIGHT.settings()):
        for axis in probe_curves(probe, LIGHT).axes:
            axis.figure.draw_without_rendering()
            shown = [text.get_text() for text in axis.get_xticklabels(which="both") if text.get_text()]
            assert shown
            assert all(float(label) > 0 for label in shown)


def test_long_class_names_do_not_overlap():
    examples = [ExampleImage(row=0, predicted="golden retriever\nof the north", true="W" * 24, confidence=0.999)] * 4
    figure = mistakes_figure(np.zeros((4, 8, 8, 3), dtype=np.uint8), examples, "Mistakes", LIGHT)
    texts = figure.axes[0].texts
    for row in (texts[::3], texts[1::3], texts[2::3]):
        extents = [text.get_window_extent() for text in row]
        assert all(one.x1 < other.x0 for one, other in pairwise(extents))


def test_long_class_names_are_shortened():
    assert short("x" * 24) == "x" * 24
    assert short("x" * 25) == "x" * 23 + "…"
    assert short("two\n lines") == "two lines"


def test_svg_has_text_and_the_variables_of_both_themes():
    record = make_record(3)
    record.result.per_class[0].label = "<b>犬</b>"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = draw_svg(partial(confusion_figure, record.result, "test"), 'Confusion "matrix"')
    root = ElementTree.fromstring(svg)  # well-formed
    assert root.attrib["aria-label"] == 'Confusion "matrix"'
    assert "<b>犬</b>" in "".join(root.itertext())
    assert "#0a0b" not in svg
    used = set(re.findall(r"var\((--plot-[a-z-]+)\)", svg))
    assert {"--plot-ink", "--plot-paper", "--plot-cell", "--plot-on-cell"} <= used
    assert all(f"{name}:" in css_variables(theme) for name in used for theme in THEMES)


def test_names_without_a_font_are_spelled_out_without_warnings(tmp_path):
    names = ["a" + chr(0xE000), "b", chr(0xE001)]  # private use: no font has them
    images = np.zeros((3, 16, 16, 3), dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_training_images(images, np.arange(3), names, tmp_path)
    assert drawable("Zürich, Ελλάδα") == "Zürich, Ελλάδα"
    assert families(names) == families([])


def test_emoji_without_a_font_is_named(monkeypatch):
    monkeypatch.setattr("hfvit.utils.fonts._family_of", lambda character: None if ord(character) > 0x3000 else "x")
    assert drawable("🐟 fish") == ":fish: fish"
    assert drawable("犬") == "U+72AC"


def shown(axis) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_xydata() for line in axis.lines}


def test_learning_curves_mark_warm_up_selection_and_the_lowest_loss():
    history = [{"step": 10 * e, "epoch": e, "loss": 2 / e, "learning_rate": min(e, 3) / 3} for e in range(1, 9)]
    losses = [1.0, 0.6, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1]
    history += [{"step": 10 * e, "epoch": e, "eval_loss": v, "eval_accuracy": 0.5} for e, v in enumerate(losses, 1)]
    loss, score, rate = learning_curves(history, 20, LIGHT).axes
    assert (loss.get_xlabel(), score.get_xlabel()) == ("epoch", "epoch")
    lines = shown(loss)
    assert lines["lowest, then rises"].tolist() == [[3, 0.5]]
    assert lines["selected"][:, 0].tolist() == [2, 2]
    assert lines["validation"][:, 1].tolist() == losses
    assert {patch.get_label() for patch in rate.patches} == {"warm-up"}
    assert rate.patches[0].get_width() == 3
    falling = [entry for entry in history if entry.get("eval_loss", 0) <= 0.6]
    assert "lowest, then rises" not in shown(learning_curves(falling, None, LIGHT).axes[0])
    without_epochs = [{key: value for key, value in entry.items() if key != "epoch"} for entry in history]
    assert learning_curves(without_epochs, 20, LIGHT).axes[0].get_xlabel() == "step"
    plt.close("all")


def test_confusion_order_puts_confused_classes_together():
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat(np.arange(6), 5))
    matrix = 50 * np.eye(30) + 4.0 * (group[:, None] == group)
    order = confusion_order(matrix)
    assert sorted(order) == list(range(30))
    assert (np.diff(group[order]) != 0).sum() == 5


def test_recall_has_the_worst_class_on_top_with_wilson_intervals():
    metrics = make_record(4).result
    (axis,) = per_class_figure(metrics, "test", WEB).axes
    names = [text.get_text() for text in axis.get_yticklabels()]
    worst = min(metrics.per_class, key=lambda entry: entry.recall)
    assert names[0] == worst.label
    assert axis.yaxis_inverted()
    (low, high), *_ = (segment[:, 0] for segment in axis.collections[0].get_segments())
    expected = proportion_confint(round(worst.recall * worst.images), worst.images)
    assert (low, high) == pytest.approx(expected, abs=1e-9)
    plt.close("all")


def proportion_confint(hits: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return Wilson's interval by its formula."""
    share, width = hits / count, z**2 / count
    center = (share + width / 2) / (1 + width)
    half = z / (1 + width) * np.sqrt(share * (1 - share) / count + width / (4 * count))
    return center - half, center + half


def test_reliability_shows_counts():
    metrics = make_record(4).result
    top, bottom = reliability_figure(metrics, "test", None, LIGHT).axes
    assert [patch.get_height() for patch in bottom.patches] == [entry.images for entry in metrics.calibration]
    assert len(top.collections[0].get_segments()) == len(metrics.calibration)
    plt.close("all")
