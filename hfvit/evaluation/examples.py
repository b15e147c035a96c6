"""Select example images and attention maps for the report."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.special import softmax

from hfvit.artifacts.run_record import write_examples
from hfvit.artifacts.run_sections import ExampleImage, ExampleImages
from hfvit.data.dataset import ImageDataset
from hfvit.data.text import TEXT_INPUTS
from hfvit.models.attention import attention_rollout

logger = logging.getLogger(__name__)

MOST_MISTAKES, MOST_MAPS = 16, 8
MOST_PIXELS = 224  # of a kept picture's side


def most_confident_mistakes(logits: np.ndarray, labels: np.ndarray, most: int = MOST_MISTAKES) -> np.ndarray:
    """Places of the wrong predictions among logits `(images, classes)`, the most confident first."""
    probabilities = softmax(logits.astype(np.float64), axis=1)
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    return wrong[np.argsort(-probabilities[wrong].max(axis=1), kind="stable")][:most]


def one_of_each_class(labels: np.ndarray, most: int = MOST_MAPS) -> np.ndarray:
    """Places of the first images of classes spread over all; with few classes of each a second, and so on."""
    order = np.argsort(labels, kind="stable")
    classes, starts = np.unique(labels[order], return_index=True)
    turn = np.arange(len(labels)) - np.repeat(starts, np.diff([*starts, len(labels)]))  # 0 for the first of its class
    if len(classes) > most:
        chosen = classes[np.linspace(0, len(classes) - 1, most).astype(int)]
        return order[(turn == 0) & np.isin(labels[order], chosen)]
    return order[np.argsort(turn, kind="stable")][:most]


class Examples:
    """The chosen pictures of one split.

    Args:
        role: `test` or `validation`.
        dataset: that split as evaluation reads it (images.py).
        rows: `(images,)`, where each image is in the data set's own split.
        logits: `(images, classes)` that evaluation gave; `labels` `(images,)` class indices.
        names: of the classes.
    """

    def __init__(
        self,
        role: str,
        dataset: ImageDataset,
        rows: Sequence[int],
        logits: np.ndarray,
        labels: np.ndarray,
        names: list[str],
    ):
        self.dataset, self.rows, self.names, self.labels = dataset, rows, names, labels
        self.probabilities = softmax(logits.astype(np.float64), axis=1)
        mistakes, looked_at = most_confident_mistakes(logits, labels), one_of_each_class(labels)
        self.looked_at = looked_at
        self.record = ExampleImages(split=role, mistakes=self._described(mistakes))
        self.arrays = {"mistakes": self._pictures(mistakes)}

    def add_attention(self, model, preprocessing, device: torch.device, is_sharded: bool = False) -> None:
        """Rollout maps by `model`, which is on `device`; where there can be none the record says why."""
        batch, maps, reason = self.dataset.__getitems__(list(self.looked_at)), None, None
        if is_sharded:
            reason = "the weights are divided among processes"
        elif any(name in batch for name in TEXT_INPUTS):
            reason = "the model reads texts, too"
        else:
            try:
                maps = _rollout_maps(model, preprocessing, batch, device)
            except Exception as error:  # of whatever timm offers; pictures must not cost a training its result
                reason = str(error).removeprefix("output_attentions: ").rstrip(".")
        if maps is None:
            logger.info("No attention maps: %s", reason)
            self.record.attention_left_out = reason
            return
        self.record.attention = self._described(self.looked_at)
        self.arrays |= {"attention": self._pictures(self.looked_at), "attention_maps": maps}

    def write(self, output_dir: str | Path) -> None:
        write_examples(output_dir, self.arrays)

    def _described(self, places: np.ndarray) -> list[ExampleImage]:
        return [
            ExampleImage(
                row=int(self.rows[place]),
                true=self.names[self.labels[place]],
                predicted=self.names[self.probabilities[place].argmax()],
                confidence=float(self.probabilities[place].max()),
            )
            for place in places
        ]

    def _pictures(self, places: np.ndarray) -> np.ndarray:
        """uint8 `(images, height, width, 3)`, as evaluation read them."""
        if not len(places):
            return np.empty((0, 1, 1, 3), np.uint8)
        read = self.dataset.reader.for_evaluation(np.asarray(places))
        pictures = next(iter(read.values())).numpy()
        height, width = pictures.shape[1:3]
        if max(height, width) > MOST_PIXELS:
            size = [max(1, round(side * MOST_PIXELS / max(height, width))) for side in (width, height)]
            pictures = np.stack([np.asarray(Image.fromarray(picture).resize(size)) for picture in pictures])
        return pictures


@torch.inference_mode()
def _rollout_maps(model, preprocessing, batch: dict, device: torch.device) -> np.ndarray:
    """float32 `(images, rows, columns)`."""
    grid = getattr(getattr(model.timm_model, "patch_embed", None), "grid_size", None)
    if grid is None:
        raise ValueError(f"{type(model.timm_model).__name__} has no grid of patches")
    pixel_values = preprocessing({name: value.to(device) for name, value in batch.items()})
    was_training = model.training
    try:
        attentions = model.eval()(pixel_values, output_attentions=True).attentions
    finally:
        model.train(was_training)
    return attention_rollout(attentions, tuple(grid)).float().cpu().numpy()
