"""A picture as the model looked at it: bright where its attention lay."""

import numpy as np
import torch
from PIL import Image

from hfvit.attention import attention_rollout, recorded_attention
from hfvit.errors import ModelError
from hfvit.inference import Classifier

SHOWN_PIXELS = 448  # the shorter side at least; a crop of 32 pixels would be a stamp
DARKEST = 0.2  # of the brightness, where nothing was looked at


class AttentionView:
    """Logits and attention of one picture, in one pass through a timm model with plain attention blocks."""

    def __init__(self, classifier: Classifier):
        self.classifier = classifier
        self.network = classifier.backend.model.timm_model
        self.grid = tuple(self.network.patch_embed.grid_size)

    @classmethod
    def of(cls, classifier: Classifier) -> "AttentionView | None":
        """The view of a classifier; None for graphs, other families, and attention that leads to no patches."""
        try:
            view = cls(classifier)
            view.look(Image.new("RGB", (64, 64)))
        except (AttributeError, ModelError):
            return None
        return view

    def look(self, picture: Image.Image) -> tuple[np.ndarray, Image.Image]:
        """Logits `(1, classes)`, and the model's own crop of the picture, darkened where it did not look."""
        values = self.classifier.prepare([picture])
        with recorded_attention(self.network) as maps:
            logits = self.classifier.run(values)
        with torch.inference_mode():
            seen = attention_rollout(tuple(maps), self.grid)[0].float().cpu().numpy()
        return logits, self._picture(values[0], seen)

    def _picture(self, values: np.ndarray, seen: np.ndarray) -> Image.Image:
        mean, std = (np.reshape(self.classifier.processor.data_config[key], (3, 1, 1)) for key in ("mean", "std"))
        pixels = ((values * std + mean).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
        height, width = pixels.shape[:2]
        scale = max(1, round(SHOWN_PIXELS / min(height, width)))
        size = (width * scale, height * scale)
        low, high = np.percentile(seen, [2, 98])  # a single patch that takes nearly all would leave the rest black
        share = ((seen - low) / max(high - low, 1e-9)).clip(0, 1).astype(np.float32)
        light = np.asarray(Image.fromarray(share).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
        large = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
        return Image.fromarray((large * (DARKEST + (1 - DARKEST) * light[..., None])).astype(np.uint8))
