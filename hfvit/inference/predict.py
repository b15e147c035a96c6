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
from hfvit.errors import DataError, mask_credentials, printable
from hfvit.inference.classifier import Classifier, batched
from hfvit.utils.files import temporary_file
from hfvit.utils.terminal import encoding_of, printable_json

MAX_GRID_IMAGES = 64  # more would be too small to recognize
THUMBNAIL_SIZE = 224  # pixels


@dataclass
class Prediction:
    """Hold the most probable classes of an image, or the reason why it failed."""

    name: str
    probabilities: dict[str, float] | None
    error: str | None = None

    def to_json(self) -> str:
        """Return a JSON line with `image`, and `predictions` (sorted) or `error`."""
        if self.probabilities is None:
            return json.dumps({"image": self.name, "error": self.error}, ensure_ascii=False)
        best = [{"label": label, "probability": value} for label, value in self.probabilities.items()]
        return json.dumps({"image": self.name, "predictions": best}, ensure_ascii=False, allow_nan=False)

    def to_text(self) -> str:
        """Return the image's name and a line for each class, escaped for a terminal."""
        lines = [f"  {value:7.2%}  {printable(label)}" for label, value in self.probabilities.items()]
        lines = lines or ["  no class reaches its threshold"]
        return "\n".join([printable(mask_credentials(self.name)), *lines])


def predictions(
    classifier: Classifier,
    names: Iterable[str],
    batch_size: int = 32,
    top_k: int | None = 5,
    thumbnails: list[Image.Image] | None = None,
    texts: dict[str, str] | None = None,
) -> Iterator[Prediction]:
    """Predict files and URLs in order; failures become predictions with an `error`.

    Args:
        classifier: the classifier.
        names: file names or URLs.
        batch_size: number of images per forward pass.
        top_k: number of classes; None is all.
        thumbnails: list to append small copies of the first `MAX_GRID_IMAGES` readable images to.
        texts: texts by name, for image-text models.
    """
    for batch in batched(names, batch_size):
        errors: dict[str, str] = {}
        logits = classifier.run(classifier.prepare(_readable(batch, errors, thumbnails, texts)))
        answers = iter(zip(classifier.best(logits, top_k), np.isfinite(logits).all(axis=1), strict=True))
        for name in batch:
            best, is_finite = (None, True) if name in errors else next(answers)
            if not is_finite:
                best = None
                errors[name] = f"{name}: the model's logits are NaN or infinite."
            yield Prediction(name, best, errors.get(name))


def texts_by_name(names: list[str], texts: list[str] | None, classifier: Classifier) -> dict[str, str] | None:
    """Assign texts to images.

    Args:
        names: file names or URLs.
        texts: one text for all images, or one for each.
        classifier: the classifier.

    Returns:
        Texts by name, None for an image classifier.

    Raises:
        DataError: the number of texts does not match.
    """
    if classifier.text_reader is None:
        if texts:
            raise DataError(f"--text: not supported by {classifier.name}, which is not an image-text model.")
        return None
    if not texts or len(texts) not in (1, len(names)):
        raise DataError(
            f"--text: {classifier.name} requires one text for all images or one for each of {len(names)} images, got"
            f" {len(texts or [])}."
        )
    return dict(zip(names, texts if len(texts) > 1 else texts * len(names), strict=True))


def _readable(
    names: list[str],
    errors: dict[str, str],
    thumbnails: list[Image.Image] | None,
    texts: dict[str, str] | None,
) -> Iterator[Image.Image | tuple[Image.Image, str]]:
    """Yield readable images with their texts; collect `errors` of the others."""
    for name in names:
        try:
            image = read_image(name)
        except DataError as error:
            errors[name] = mask_credentials(str(error))
            continue
        if thumbnails is not None and len(thumbnails) < MAX_GRID_IMAGES:
            copy = image.copy()
            copy.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
            thumbnails.append(copy)
        yield image if texts is None else (image, texts[name])


def print_predictions(
    classifier: Classifier,
    names: list[str],
    batch_size: int = 32,
    top_k: int | None = 5,
    as_json: bool = False,
    grid: str | Path | None = None,
    texts: dict[str, str] | None = None,
) -> int:
    """Print predictions one by one; failures go to stderr.

    Args:
        classifier: the classifier.
        names: file names or URLs.
        batch_size: number of images per forward pass.
        top_k: number of classes, as in `Classifier.predict`.
        as_json: print a line of JSON for each image instead of text.
        grid: image file to write with the first `MAX_GRID_IMAGES` predictions, or None.
        texts: texts by name, for image-text models.

    Returns:
        The number of failed images.
    """
    thumbnails = [] if grid else None
    shown: list[Prediction] = []
    failed = 0
    # Progress bar only if the results go to a file or pipe.
    hidden = True if sys.stdout.isatty() or len(names) <= batch_size else None
    results = predictions(classifier, names, batch_size, top_k, thumbnails, texts)
    for prediction in tqdm(results, total=len(names), unit="image", desc="predict", disable=hidden):
        if prediction.error:
            failed += 1
            print(f"hfvit: {printable(prediction.error)}", file=sys.stderr)
        elif grid and len(shown) < MAX_GRID_IMAGES:
            shown.append(prediction)
        if as_json:
            print(printable_json(prediction.to_json(), encoding_of(sys.stdout)))
        elif not prediction.error:
            print(prediction.to_text(), flush=True)
    sys.stdout.flush()
    if grid and shown:
        write_grid(thumbnails, shown, grid)
        omitted = len(names) - failed - len(shown)
        more = f" ({omitted} more omitted)" if omitted else ""
        print(f"hfvit: wrote {printable(str(grid))} with {len(shown)} images{more}", file=sys.stderr)
    return failed


def write_grid(images: list[Image.Image], results: list[Prediction], path: str | Path) -> None:
    """Draw images with their names and most probable classes.

    Args:
        images: thumbnails.
        results: their predictions.
        path: image file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    lines = max(min(3, len(prediction.probabilities)) for prediction in results)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.4 * columns, (2.1 + 0.2 * lines) * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, prediction in zip(axes.flat, images, results, strict=False):
        axis.imshow(image, interpolation="nearest")
        best = list(prediction.probabilities.items())[:lines]
        axis.set_title(_short(Path(prediction.name).name), fontsize=7, color="#777777", parse_math=False)
        text = "\n".join(f"{_short(label)} {value:.1%}" for label, value in best)
        axis.text(0.5, -0.03, text, transform=axis.transAxes, ha="center", va="top", fontsize=8, parse_math=False)
    with temporary_file(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def _short(text: str, limit: int = 28) -> str:
    text = printable(text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
