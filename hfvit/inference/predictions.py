"""Predictions as a list that a notebook shows with its images."""

import io
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from hfvit.artifacts.run_summary import png_html
from hfvit.errors import printable

MAX_SHOWN = 24  # images that a notebook shows
SIDE = 128  # pixels
SHOWN_CLASSES = 3


class Predictions(list[dict[str, float]]):
    """List of `{label: probability}`, with small copies of the first images.

    Args:
        predictions: predictions of all images.
        thumbnails: small copies of the first images.
        names: file names of the images of a folder or pattern, else None.
    """

    def __init__(
        self,
        predictions: Iterable[dict[str, float]],
        thumbnails: list[Image.Image],
        names: list[str] | None = None,
    ):
        super().__init__(predictions)
        self.thumbnails = thumbnails
        self.names = names

    def _repr_html_(self) -> str:
        names = self.names or [""] * len(self.thumbnails)
        cards = [_card(*each) for each in zip(self.thumbnails, self, names, strict=False)]
        rest = len(self) - len(cards)
        more = f"<p>and {rest:,} more</p>" if rest > 0 else ""
        return f'<div style="display: flex; flex-wrap: wrap; gap: 12px">{"".join(cards)}</div>{more}'


def keep_thumbnails(images: Iterable[Any], decode, thumbnails: list[Image.Image]) -> Iterator[Any]:
    """Yield images, and append small copies of the first ones to `thumbnails`.

    Args:
        images: images in any form that `decode` reads.
        decode: function that returns the PIL image.
        thumbnails: list to append to.
    """
    for image in images:
        if len(thumbnails) >= MAX_SHOWN:
            yield image
            continue
        decoded = decode(image)
        small = decoded.copy()
        small.thumbnail((SIDE, SIDE))
        thumbnails.append(small)
        # Decoded once, with the text of an image and text model.
        yield (decoded, *image[1:]) if isinstance(image, tuple) else decoded


def _card(image: Image.Image, classes: dict[str, float], name: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    best = list(classes.items())[:SHOWN_CLASSES]
    lines = [f"{escape(printable(label))} &middot; {probability:.1%}" for label, probability in best] or ["no class"]
    first, *others = lines
    text = "<br>".join([f"<b>{first}</b>", *others, *([escape(printable(Path(name).name))] if name else [])])
    picture = png_html(buffer.getvalue(), best[0][0] if best else "no class", f"height: {SIDE}px")
    return f'<div style="font-size: 12px; line-height: 1.4">{picture}<br>{text}</div>'
