"""`load_classifier(path)`: pictures in, class names and probabilities out, whatever the artefact."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers.image_utils import load_image

from hfvit.decode import to_rgb
from hfvit.errors import ModelError


class Classifier:
    """A model, its preprocessing and its class names.

    An image is a PIL image, an array `(height, width, 3)` of uint8, a file name or a URL.
    """

    def __init__(self, model: torch.nn.Module, processor, labels: list[str], device: str | torch.device):
        self.model = model.to(device).eval()
        self.processor, self.labels, self.device = processor, labels, torch.device(device)

    @torch.inference_mode()
    def logits(self, images: Iterable[Any], batch_size: int = 32) -> np.ndarray:
        """Logits `(images, classes)` float32 of a list or a generator, `batch_size` images at a time."""
        batches = [
            self.model(self.processor(batch, return_tensors="pt")["pixel_values"].to(self.device)).logits.float().cpu()
            for batch in _batches(images, batch_size)
        ]
        return torch.cat(batches).numpy() if batches else np.empty((0, len(self.labels)), np.float32)

    def predict(self, images: Iterable[Any], batch_size: int = 32, top_k: int | None = None) -> list[dict[str, float]]:
        """One `{label: probability}` an image, most probable first; the `top_k` best, or all."""
        probabilities = torch.from_numpy(self.logits(images, batch_size)).softmax(dim=1).numpy()
        order = np.argsort(-probabilities, axis=1)[:, :top_k]
        return [
            {self.labels[index]: float(row[index]) for index in best}
            for row, best in zip(probabilities, order, strict=True)
        ]


def load_classifier(path: str | Path, device: str | None = None, **kwargs) -> Classifier:
    """The classifier at `path`: a checkpoint folder or a Hub id that transformers' Auto classes can load.

    `device` is CUDA where there is one unless given; `kwargs` go to `from_pretrained` (revision, token, ...).
    """
    path = Path(path).expanduser() if str(path).startswith((".", "/", "~")) else path
    if isinstance(path, Path) and not path.is_dir():
        raise ModelError(f"There is no folder {path}.")
    try:
        config = AutoConfig.from_pretrained(path, **kwargs)
        model = AutoModelForImageClassification.from_pretrained(path, config=config, **kwargs)
        processor = AutoImageProcessor.from_pretrained(path, **kwargs)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not an image classifier that transformers can load: {error}") from error
    labels = [config.id2label[index] for index in range(config.num_labels)]
    return Classifier(model, processor, labels, device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _batches(images: Iterable[Any], size: int) -> Iterator[list]:
    iterator = iter(images)
    while batch := [_load(image) for image in islice(iterator, size)]:
        yield batch


def _load(image: Any):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    elif not isinstance(image, Image.Image):
        # A file is opened here: load_image clips 16-bit greys, which training scales.
        image = Image.open(image) if Path(image).is_file() else load_image(str(image))
    return to_rgb(image)
