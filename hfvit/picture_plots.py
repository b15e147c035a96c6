"""The figures that show pictures: of training, of mistakes, of where the model looked."""

import numpy as np
from matplotlib.font_manager import FontProperties

from hfvit.plots import Theme, place_axes, short

_MASK = "viridis"  # its brightness rises evenly, so it reads without colour too
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


def mistakes_figure(pictures: np.ndarray, told: list[dict], split: str, theme: Theme):
    """The most confident mistakes: what was said, how surely, and what it is. `told` is run.json's list of them."""
    columns = min(4, len(pictures)) if len(pictures) <= 8 else min(8, -(-len(pictures) // 2))
    captions = [f"{short(e['predicted'])} ({e['confidence']:.1%})\nis {short(e['true'])}" for e in told]
    figure, axis, places = _sheet(captions, columns, pictures.shape[1:3])
    for place, picture, caption in zip(places, pictures, captions, strict=True):
        said, true = caption.split("\n")
        axis.imshow(picture, extent=place, aspect="auto")
        _write_above(axis, place, f"{said}\n")
        _write_above(axis, place, true, color=theme.second)
    axis.set_title(f"The most confident mistakes on the {split} split")
    return figure


def attention_figure(pictures: np.ndarray, maps: np.ndarray, told: list[dict], split: str, theme: Theme):
    """Pictures above where the model looked: attention rollout, bright where much of it lies."""
    said = [f"{short(entry['predicted'])} ({entry['confidence']:.0%})" for entry in told]
    true = ["" if e["predicted"] == e["true"] else f"\nis {short(e['true'])}" for e in told]
    captions = ["".join(words) for words in zip(said, true, strict=True)]
    figure, axis, places = _sheet(captions, len(pictures), pictures.shape[1:3])
    for place, picture, seen, caption in zip(places, pictures, maps, captions, strict=True):
        left, right, bottom, top = place
        below = (left, right, bottom + (bottom - top) + _GAP, bottom + _GAP)
        axis.imshow(picture, extent=place, aspect="auto")
        _write_above(axis, place, caption)
        grey = picture @ np.array([0.299, 0.587, 0.114])
        axis.imshow(grey, extent=below, aspect="auto", cmap="gray", vmin=0, vmax=255, clip_on=False)
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
