"""The figures that show pictures: of training, of mistakes, of where the model looked."""

import matplotlib.pyplot as plt
import numpy as np

from hfvit.plots import Theme, short

_MASK = "viridis"  # its brightness rises evenly, so it reads without colour too


def training_figure(images: np.ndarray, targets: np.ndarray, names: list[str], theme: Theme):
    """Pictures as the model will see them, under their classes.

    Args:
        images: uint8 `(images, height, width, 3)`.
        targets: class indices `(images,)`, or probabilities `(images, classes)` of mixtures.
        names: of the classes.
    """
    columns = min(8, len(images))
    figure, axes = _grid(len(images), columns, images.shape[1:3], 0.36 if targets.ndim > 1 else 0.24)
    for axis, image, target in zip(axes, images, targets, strict=False):
        if target.ndim:
            title = "\n".join(f"{short(names[index])} {target[index]:.0%}" for index in np.flatnonzero(target))
        else:
            title = short(names[target])
        axis.imshow(image)
        axis.set_title(title, fontsize=8, pad=3)
    return figure


def mistakes_figure(pictures: np.ndarray, told: list[dict], split: str, theme: Theme):
    """The most confident mistakes: what was said, how surely, and what it is. `told` is run.json's list of them."""
    columns = min(4, len(pictures)) if len(pictures) <= 8 else min(8, -(-len(pictures) // 2))
    figure, axes = _grid(len(pictures), columns, pictures.shape[1:3], 0.4)
    for axis, picture, entry in zip(axes, pictures, told, strict=False):
        axis.imshow(picture)
        axis.set_title(f"{short(entry['predicted'])} ({entry['confidence']:.1%})", fontsize=10, pad=21)
        axis.text(
            0.5, 1.03, f"is {short(entry['true'])}", transform=axis.transAxes, fontsize=10, ha="center", va="bottom",
            color=theme.second,
        )  # fmt: skip
    figure.suptitle(f"The most confident mistakes on the {split} split", fontsize=11)
    return figure


def attention_figure(pictures: np.ndarray, maps: np.ndarray, told: list[dict], split: str, theme: Theme):
    """Pictures above where the model looked: attention rollout, bright where much of it lies."""
    count = len(pictures)
    height, width = pictures.shape[1:3]
    figure, axes = plt.subplots(
        2, count, figsize=(1.6 * count + 0.3, 1.6 * 2 * height / width + 0.9), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for column, (picture, seen, entry) in enumerate(zip(pictures, maps, told, strict=True)):
        axes[0, column].imshow(picture)
        right = entry["predicted"] == entry["true"]
        title = f"{short(entry['predicted'])} ({entry['confidence']:.0%})"
        axes[0, column].set_title(title if right else f"{title}\nis {short(entry['true'])}", fontsize=10, pad=4)
        grey = picture @ np.array([0.299, 0.587, 0.114])
        axes[1, column].imshow(grey, cmap="gray", vmin=0, vmax=255)
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        low, high = np.percentile(seen, [2, 98])  # a single patch that takes nearly all would leave the rest black
        axes[1, column].imshow(
            seen, cmap=_MASK, alpha=0.65, extent=extent, interpolation="bicubic", vmin=low, vmax=max(high, low + 1e-9)
        )
        axes[1, column].set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    figure.suptitle(f"Attention rollout on the {split} split: bright where the model looked", fontsize=11)
    return figure


def _grid(count: int, columns: int, size: tuple[int, int], text: float):
    """A figure with as many axes without frames, `text` inches above each; those too many are hidden."""
    rows = -(-count // columns)
    width = 1.6
    height = width * size[0] / size[1] + text
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * width, rows * height + 0.35), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes.flat
