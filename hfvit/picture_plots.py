"""The figures that show pictures: of training, of mistakes, of where the model looked."""

import numpy as np

from hfvit.plots import Theme, place_axes, short

_MASK = "viridis"  # its brightness rises evenly, so it reads without colour too
_WIDTH, _GAP = 1.55, 0.08  # of a picture and between two, in inches


def training_figure(images: np.ndarray, targets: np.ndarray, names: list[str], theme: Theme):
    """Pictures as the model will see them, under their classes.

    Args:
        images: uint8 `(images, height, width, 3)`.
        targets: class indices `(images,)`, or probabilities `(images, classes)` of mixtures.
        names: of the classes.
    """
    columns = min(8, len(images))
    figure, axis, places = _sheet(len(images), columns, images.shape[1:3], 0.36 if targets.ndim > 1 else 0.24)
    for place, image, target in zip(places, images, targets, strict=True):
        if target.ndim:
            title = "\n".join(f"{short(names[index])} {target[index]:.0%}" for index in np.flatnonzero(target))
        else:
            title = short(names[target])
        axis.imshow(image, extent=place, aspect="auto")
        _write_above(axis, place, title, fontsize=8)
    return figure


def mistakes_figure(pictures: np.ndarray, told: list[dict], split: str, theme: Theme):
    """The most confident mistakes: what was said, how surely, and what it is. `told` is run.json's list of them."""
    columns = min(4, len(pictures)) if len(pictures) <= 8 else min(8, -(-len(pictures) // 2))
    figure, axis, places = _sheet(len(pictures), columns, pictures.shape[1:3], 0.46)
    for place, picture, entry in zip(places, pictures, told, strict=True):
        axis.imshow(picture, extent=place, aspect="auto")
        _write_above(axis, place, f"{short(entry['predicted'])} ({entry['confidence']:.1%})\n")
        _write_above(axis, place, f"is {short(entry['true'])}", color=theme.second)
    axis.set_title(f"The most confident mistakes on the {split} split")
    return figure


def attention_figure(pictures: np.ndarray, maps: np.ndarray, told: list[dict], split: str, theme: Theme):
    """Pictures above where the model looked: attention rollout, bright where much of it lies."""
    mistaken = any(entry["predicted"] != entry["true"] for entry in told)
    figure, axis, places = _sheet(len(pictures), len(pictures), pictures.shape[1:3], 0.42 if mistaken else 0.24)
    for place, picture, seen, entry in zip(places, pictures, maps, told, strict=True):
        left, right, bottom, top = place
        below = (left, right, bottom + (bottom - top) + _GAP, bottom + _GAP)
        axis.imshow(picture, extent=place, aspect="auto")
        title = f"{short(entry['predicted'])} ({entry['confidence']:.0%})"
        is_right = entry["predicted"] == entry["true"]
        _write_above(axis, place, title if is_right else f"{title}\nis {short(entry['true'])}")
        grey = picture @ np.array([0.299, 0.587, 0.114])
        axis.imshow(grey, extent=below, aspect="auto", cmap="gray", vmin=0, vmax=255, clip_on=False)
        low, high = np.percentile(seen, [2, 98])  # a single patch that takes nearly all would leave the rest black
        axis.imshow(
            seen, extent=below, aspect="auto", cmap=_MASK, alpha=0.65, interpolation="bicubic", vmin=low,
            vmax=max(high, low + 1e-9), clip_on=False,
        )  # fmt: skip
    axis.set_title(f"Attention rollout on the {split} split: bright where the model looked")
    return figure


def _sheet(count: int, columns: int, size: tuple[int, int], room: float):
    """A figure, its only axes, and the `extent` of each of `count` pictures there, in inches, `room` above each.

    Axes of its own for each picture would take most of the time: with ticks and labels, which are not even shown.
    """
    height = _WIDTH * size[0] / size[1]
    right, bottom = columns * (_WIDTH + _GAP) - _GAP, -(-count // columns) * (height + room)
    figure, (axis,) = place_axes((0, 0, right, bottom))
    axis.set(xlim=(0, right), ylim=(bottom, 0))
    axis.set_axis_off()
    corners = ((n % columns * (_WIDTH + _GAP), n // columns * (height + room) + room) for n in range(count))
    return figure, axis, [(left, left + _WIDTH, top + height, top) for left, top in corners]


def _write_above(axis, place: tuple[float, float, float, float], words: str, fontsize: float = 10, **settings) -> None:
    left, right, _, top = place
    middle = (left + right) / 2
    axis.text(middle, top - 0.04, words, ha="center", va="bottom", fontsize=fontsize, **settings)
