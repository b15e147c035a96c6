"""Batch prediction over files and URLs, with text, JSON and grid output."""

import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from hfvit.data.decode import read_image
from hfvit.errors import DataError, printable
from hfvit.inference.classifier import Classifier, batched
from hfvit.utils.files import temporary_file
from hfvit.utils.terminal import encoding_of, printable_json

MOST_DRAWN = 64  # pictures of a grid; more could not be told apart
DRAWN_PIXELS = 224


@dataclass
class Prediction:
    """One picture's best classes with their probabilities, or what was wrong with it."""

    name: str
    probabilities: dict[str, float] | None
    error: str | None = None

    def to_json(self) -> str:
        """One line: `image` and either `predictions`, most probable first, or `error`."""
        if self.probabilities is None:
            return json.dumps({"image": self.name, "error": self.error}, ensure_ascii=False)
        best = [{"label": label, "probability": share} for label, share in self.probabilities.items()]
        return json.dumps({"image": self.name, "predictions": best}, ensure_ascii=False, allow_nan=False)

    def to_text(self) -> str:
        """The picture's name and, below it, a line for each class; see `printable`."""
        lines = [f"  {share:7.2%}  {printable(label)}" for label, share in self.probabilities.items()]
        return "\n".join([printable(self.name), *lines])


def predictions(
    classifier: Classifier,
    names: Iterable[str],
    batch_size: int = 32,
    top_k: int | None = 5,
    thumbnails: list[Image.Image] | None = None,
    texts: dict[str, str] | None = None,
) -> Iterator[Prediction]:
    """One `Prediction` for each file or URL, in order; a picture that cannot be read, or for which the model gives NaN
    or infinite logits, has an `error` and stops nothing.

    Small copies of the first `MOST_DRAWN` readable pictures are appended to `thumbnails`. `texts` are by name.
    """
    for batch in batched(names, batch_size):
        errors: dict[str, str] = {}
        logits = classifier.run(classifier.prepare(_readable(batch, errors, thumbnails, texts)))
        answers = iter(zip(classifier.best(logits, top_k), np.isfinite(logits).all(axis=1), strict=True))
        for name in batch:
            best, is_finite = (None, True) if name in errors else next(answers)
            if not is_finite:
                best, errors[name] = None, f"{name}: the model's logits are NaN or infinite."
            yield Prediction(name, best, errors.get(name))


def texts_of(names: list[str], texts: list[str] | None, classifier: Classifier) -> dict[str, str] | None:
    """The text of each name, from one text or as many as there are names; `DataError` where they do not fit."""
    if classifier.text_reader is None:
        if texts:
            raise DataError(f"--text: {classifier.name} classifies pictures alone.")
        return None
    if not texts or len(texts) not in (1, len(names)):
        given = f"{len(texts)} texts are" if texts else "no --text is"
        raise DataError(
            f"--text: {classifier.name} reads a text with each picture; {given} given for {len(names)} pictures. Give"
            " one for all, or one for each."
        )
    return dict(zip(names, texts if len(texts) > 1 else texts * len(names), strict=True))


def _readable(
    names: list[str],
    errors: dict[str, str],
    thumbnails: list[Image.Image] | None,
    texts: dict[str, str] | None,
) -> Iterator[Image.Image | tuple[Image.Image, str]]:
    """The pictures that can be read, with their `texts` if there are any, one in memory at a time.

    What is wrong with the others goes to `errors`.
    """
    for name in names:
        try:
            image = read_image(name)
        except DataError as error:
            errors[name] = str(error)
            continue
        if thumbnails is not None and len(thumbnails) < MOST_DRAWN:
            copy = image.copy()
            copy.thumbnail((DRAWN_PIXELS, DRAWN_PIXELS))
            thumbnails.append(copy)
        yield image if texts is None else (image, texts[name])


def print_predictions(
    classifier: Classifier,
    names: list[str],
    batch_size: int = 32,
    top_k: int = 5,
    as_json: bool = False,
    grid: str | Path | None = None,
    texts: dict[str, str] | None = None,
) -> int:
    """Print the predictions as they come; the number of pictures that could not be read, each named on stderr."""
    thumbnails, shown, bad = ([] if grid else None), [], 0
    # On a terminal the results themselves show how far it is; the bar is for results that go to a file or a pipe.
    hidden = True if sys.stdout.isatty() or len(names) <= batch_size else None
    found = predictions(classifier, names, batch_size, top_k, thumbnails, texts)
    for prediction in tqdm(found, total=len(names), unit="image", desc="predict", disable=hidden):
        if prediction.error:
            bad += 1
            print(f"hfvit: {printable(prediction.error)}", file=sys.stderr)
        elif grid and len(shown) < MOST_DRAWN:
            shown.append(prediction)
        if as_json:
            print(printable_json(prediction.to_json(), encoding_of(sys.stdout)))
        elif not prediction.error:
            print(prediction.to_text(), flush=True)
    sys.stdout.flush()
    if grid and shown:
        write_grid(thumbnails, shown, grid)
        left_out = len(names) - bad - len(shown)
        more = f", {left_out} more are not drawn" if left_out else ""
        print(f"hfvit: {printable(str(grid))}: {len(shown)} pictures{more}", file=sys.stderr)
    return bad


def write_grid(images: list[Image.Image], found: list[Prediction], path: str | Path) -> None:
    """Draw the pictures under their names, with the most probable classes below each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    lines = max(min(3, len(prediction.probabilities)) for prediction in found)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.4 * columns, (2.1 + 0.2 * lines) * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, prediction in zip(axes.flat, images, found, strict=False):
        axis.imshow(image, interpolation="nearest")
        best = list(prediction.probabilities.items())[:lines]
        axis.set_title(_short(Path(prediction.name).name), fontsize=7, color="#777777", parse_math=False)
        text = "\n".join(f"{_short(label)} {share:.1%}" for label, share in best)
        axis.text(0.5, -0.03, text, transform=axis.transAxes, ha="center", va="top", fontsize=8, parse_math=False)
    with temporary_file(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def _short(text: str, most: int = 28) -> str:
    text = printable(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"
