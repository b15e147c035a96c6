"""Random erasing, mixup and CutMix with reproducible seeds."""

import random
from contextlib import contextmanager

import numpy as np
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor


class BatchMixing:
    """Apply random erasing, then mixup or CutMix, in place.

    Erased rectangles depend on the image's seed only. Mixing pairs images of one micro-batch, so it depends on how a
    batch is split.

    Args:
        num_classes: number of classes of the soft targets.
        mixup_alpha: alpha of mixup (Zhang et al., https://arxiv.org/abs/1710.09412); 0 is off.
        cutmix_alpha: alpha of CutMix (Yun et al., https://arxiv.org/abs/1905.04899); 0 is off. With both, each batch
            uses one of them.
        random_erasing: probability of random erasing with noise (Zhong et al., https://arxiv.org/abs/1708.04896).
        off_epochs: number of final epochs without mixing and erasing.
    """

    def __init__(
        self,
        num_classes: int,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        random_erasing: float = 0.0,
        off_epochs: float = 0,
    ):
        self.off_epochs = off_epochs
        self.erasing = random_erasing
        self.mixup = None
        if mixup_alpha or cutmix_alpha:
            self.mixup = Mixup(mixup_alpha, cutmix_alpha, label_smoothing=0.0, num_classes=num_classes)

    def __bool__(self) -> bool:
        return bool(self.mixup or self.erasing)

    def __call__(self, pixel_values: Tensor, labels: Tensor, seeds: np.ndarray) -> tuple[Tensor, Tensor]:
        """Erase and mix a batch.

        Args:
            pixel_values: (batch, 3, height, width).
            labels: class ids (batch,), or several labels per image, 0 and 1 (batch, classes).
            seeds: seed of each image (batch,), uint64.

        Returns:
            Pixel values, and class probabilities or mixed labels (batch, classes) with mixing or else the labels.
        """
        if self.erasing:
            erase = RandomErasing(self.erasing, mode="pixel", device=pixel_values.device)
            with _preserved_rng_state(pixel_values.device) as generator:
                for image, seed in zip(pixel_values, seeds.tolist(), strict=True):
                    random.seed(seed)
                    generator.manual_seed(seed >> 1)
                    erase(image)
        if self.mixup is None:
            return pixel_values, labels
        with _preserved_rng_state(pixel_values.device):
            np.random.seed(int(seeds[0] >> np.uint64(32)))
            if labels.ndim == 1:
                return self.mixup(pixel_values, labels)
            # Mixing one class per image yields the weights of each mixture.
            self.mixup.num_classes = len(labels)
            pixel_values, weights = self.mixup(pixel_values, torch.arange(len(labels), device=labels.device))
            own = weights.diagonal()[:, None]
            return pixel_values, own * labels + (1 - own) * labels.flip(0)


@contextmanager
def _preserved_rng_state(device: torch.device):
    """Yield the generator of `device`; restore all generators at the end."""
    generator = torch.default_generator
    if device.type == "cuda":
        generator = torch.cuda.default_generators[
            torch.cuda.current_device() if device.index is None else device.index
        ]
    states = random.getstate(), np.random.get_state(), generator.get_state()
    try:
        yield generator
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        generator.set_state(states[2])
