"""Random erasing, mixup and CutMix with reproducible seeds."""

import random
from contextlib import contextmanager

import numpy as np
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor


class BatchMixing:
    """Erases parts of images, then mixes each with its mirror place in the batch, in place.

    Args:
        num_classes: of the soft targets.
        mixup_alpha: of Zhang et al., https://arxiv.org/abs/1710.09412; 0 is off.
        cutmix_alpha: of Yun et al., https://arxiv.org/abs/1905.04899; 0 is off. With both on, each batch takes one.
        random_erasing: probability of Zhong et al., https://arxiv.org/abs/1708.04896, with noise as the filling.
        off_epochs: the last epochs of a run that go without.

    An erased rectangle depends on the image's seed alone. Partners of a mixture come from the images that a device
    holds at once, so a batch that is split otherwise is mixed otherwise.
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
        """Pixel values `(batch, 3, height, width)` and class indices `(batch,)` -> pixel values and targets.

        Targets are class probabilities `(batch, classes)` when mixing, else the indices. `seeds`: `(batch,)` uint64.
        """
        if self.erasing:
            erase = RandomErasing(self.erasing, mode="pixel", device=pixel_values.device)
            with _restored(pixel_values.device) as generator:
                for image, seed in zip(pixel_values, seeds.tolist(), strict=True):
                    random.seed(seed)
                    generator.manual_seed(seed >> 1)
                    erase(image)
        if self.mixup is None:
            return pixel_values, labels
        with _restored(pixel_values.device):
            np.random.seed(int(seeds[0] >> np.uint64(32)))
            return self.mixup(pixel_values, labels)


@contextmanager
def _restored(device: torch.device):
    """The global generator of `device`; its state, and Python's and numpy's, are put back at the end."""
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
