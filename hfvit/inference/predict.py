"""Batch prediction over files and URLs, with text, JSON and grid output."""

import json
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from hfvit.data.decode import is_url, read_image
from hfvit.errors import DataError, mask_credentials, printable
from hfvit.inference.classifier import Classifier, PreparedImage
from hfvit.inference.prediction_file import prediction_file
from hfvit.utils.files import temporary_file
from hfvit.utils.formatting import counted
from hfvit.utils.terminal import encoding_of, printable_json

MAX_GRID_IMAGES = 64  # more would be too small to recognize
THUMBNAIL_SIZE = 224  # pixels
MAX_TITLE_LENGTH = 28  # characters of a name in a grid


def shown_name(name: str) -> str:
    """Return the name of an image as in outputs: a URL without credentials.

    The name of a file stays, since a folder may have the name that is the value of a variable such as DB_PASSWORD.
    """
    return mask_credentials(name) if is_url(name) else name


@dataclass
class Prediction:
    """Hold the most probable classes of an image, or the reason why it failed.

    Credentials in `error`, and in `name` if it is a URL, are masked.
    """

    name: str
    probabilities: dict[str, float] | None
    error: str | None = None
    thumbnail: Image.Image | None = None

    def __post_init__(self) -> None:
        self.name = shown_name(self.name)
        self.error = self.error and mask_credentials(self.error)

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
        return "\n".join([printable(self.name), *lines])


def predictions(
    classifier: Classifier,
    names: Iterable[str],
    batch_size: int | None = None,
    top_k: int | None = 5,
    thumbnails: int = 0,
    texts: dict[str, str] | None = None,
) -> Iterator[Prediction]:
    """Predict files and URLs in order; failures become predictions with an `error`.

    Args:
        classifier: the classifier.
        names: file names or URLs.
        batch_size: number of images in memory, see `Classifier.run_batches`.
        top_k: number of classes; None is all.
        thumbnails: number of predictions that need a thumbnail of their image; later ones may have one, too.
        texts: texts by name, for image-text models.
    """
    reader = ImageReader(classifier, texts, thumbnails > 0)
    for batch, logits in classifier.run_batches(names, reader, batch_size, lambda item: item.image):
        answers = iter(zip(classifier.best(logits, top_k), np.isfinite(logits).all(axis=1), strict=True))
        for item in batch:
            if item.image is None:
                yield Prediction(item.name, None, item.error)
                continue
            best, is_finite = next(answers)
            if not is_finite:
                yield Prediction(item.name, None, f"{item.name}: the model's logits are NaN or infinite.")
                continue
            thumbnails -= 1
            yield Prediction(item.name, best, thumbnail=item.thumbnail)
        reader.thumbnails = thumbnails > 0


class ReadImage(NamedTuple):
    """Hold the prepared image of a file or URL, or the reason why it failed."""

    name: str
    image: PreparedImage | None
    thumbnail: Image.Image | None = None
    error: str | None = None


class ImageReader:
    """Read and preprocess files and URLs; thread-safe.

    Args:
        classifier: classifier whose preprocessing is applied.
        texts: texts by name, for image-text models.
        thumbnails: whether to make thumbnails; may be switched off later.
    """

    def __init__(self, classifier: Classifier, texts: dict[str, str] | None = None, thumbnails: bool = False):
        self.classifier = classifier
        self.texts = texts
        self.thumbnails = thumbnails

    def __call__(self, name: str) -> ReadImage:
        """Read an image, or return the reason why it failed."""
        try:
            image = read_image(name)
        except DataError as error:
            return ReadImage(name, None, error=str(error))
        thumbnail = None
        if self.thumbnails:
            thumbnail = image.copy()
            thumbnail.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
        with_text = image if self.texts is None else (image, self.texts[name])
        return ReadImage(name, self.classifier.prepare_image(with_text), thumbnail)


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


def print_predictions(
    classifier: Classifier,
    names: list[str],
    batch_size: int | None,
    top_k: int | None,
    as_json: bool,
    grid: str | Path | None,
    texts: dict[str, str] | None,
    output: Path | None,
) -> int:
    """Print predictions one by one; failures go to stderr.

    Args:
        classifier: the classifier.
        names: file names or URLs.
        batch_size: number of images per forward pass, None for that of the classifier's device.
        top_k: number of classes, as in `Classifier.predict`.
        as_json: print a line of JSON for each image instead of text.
        grid: image file to write with the first `MAX_GRID_IMAGES` predictions, or None.
        texts: texts by name, for image-text models, or None.
        output: file to write the predictions to, instead of printing them, or None; see `prediction_file`.

    Returns:
        The number of failed images.
    """
    shown: list[Prediction] = []
    failed = 0
    # Progress bar only if the results go to a file or pipe.
    hidden = True if sys.stdout.isatty() and not output else None
    if len(names) <= (batch_size or classifier.batch_size):
        hidden = True
    results = predictions(classifier, names, batch_size, top_k, MAX_GRID_IMAGES if grid else 0, texts)
    with prediction_file(output) if output else nullcontext() as file:
        for prediction in tqdm(results, total=len(names), unit="image", desc="predict", disable=hidden):
            if prediction.error:
                failed += 1
                print(f"hfvit: {printable(prediction.error)}", file=sys.stderr)
            elif grid and len(shown) < MAX_GRID_IMAGES:
                shown.append(prediction)
            if file:
                file.add(prediction)
            elif as_json:
                print(printable_json(prediction.to_json(), encoding_of(sys.stdout)))
            elif not prediction.error:
                print(prediction.to_text(), flush=True)
    sys.stdout.flush()
    if output:
        print(f"hfvit: wrote {printable(str(output))} with {counted(len(names), 'image')}", file=sys.stderr)
    if grid and shown:
        write_grid(shown, grid)
        omitted = len(names) - failed - len(shown)
        more = f" ({omitted} more omitted)" if omitted else ""
        print(f"hfvit: wrote {printable(str(grid))} with {len(shown)} images{more}", file=sys.stderr)
    return failed


def write_grid(results: list[Prediction], path: str | Path) -> None:
    """Draw images with their names and most probable classes.

    Args:
        results: predictions with thumbnails.
        path: image file to write.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    from hfvit.utils.fonts import drawable, families  # imports matplotlib

    columns = math.ceil(math.sqrt(len(results)))
    rows = math.ceil(len(results) / columns)
    lines = max(min(3, len(prediction.probabilities)) for prediction in results)
    titles = [_short(Path(prediction.name).name) for prediction in results]
    best = [
        [(_short(label), value) for label, value in list(prediction.probabilities.items())[:lines]]
        for prediction in results
    ]
    names = [*titles, *(label for classes in best for label, _ in classes)]
    with style.context({"font.family": families(names)}, after_reset=True):
        figure = Figure(figsize=(2.4 * columns, (2.1 + 0.2 * lines) * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, prediction, title, classes in zip(axes.flat, results, titles, best, strict=False):
            axis.imshow(prediction.thumbnail, interpolation="nearest")
            axis.set_title(drawable(title), fontsize=7, color="#777777", parse_math=False)
            text = "\n".join(f"{drawable(label)} {value:.1%}" for label, value in classes)
            axis.text(0.5, -0.03, text, transform=axis.transAxes, ha="center", va="top", fontsize=8, parse_math=False)
        with temporary_file(Path(path)) as temporary:
            figure.savefig(temporary, dpi=110)


def _short(text: str) -> str:
    text = printable(text)
    return text if len(text) <= MAX_TITLE_LENGTH else f"{text[: MAX_TITLE_LENGTH - 1]}…"
