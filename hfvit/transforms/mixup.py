"""Random erasing, mixup and CutMix with reproducible seeds."""

from contextlib import contextmanager

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor

from hfvit.utils.counter_rng import uniform

# Random erasing as in timm: limits of area and aspect ratio, and attempts to fit a rectangle into the image.
ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 1 / 0.3)
ATTEMPTS = 10
ERASING_UNIFORMS = 2 * ATTEMPTS + 4  # random numbers per image
FIRST_UNIFORM = 1000  # in the random stream of an image, after those of its augmentation
NOISE_VALUES = 2**20  # normal random numbers; each erased image starts at another one


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
        self._noise = torch.zeros(0)
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
            self._erase(pixel_values, seeds)
        if self.mixup is None:
            return pixel_values, labels
        with _preserved_rng_state():
            np.random.seed(int(seeds[0] >> np.uint64(32)))
            if labels.ndim == 1:
                return self.mixup(pixel_values, labels)
            # Mixing one class per image yields the weights of each mixture.
            self.mixup.num_classes = len(labels)
            pixel_values, weights = self.mixup(pixel_values, torch.arange(len(labels), device=labels.device))
            own = weights.diagonal()[:, None]
            return pixel_values, own * labels + (1 - own) * labels.flip(0)

    def _erase(self, pixel_values: Tensor, seeds: np.ndarray) -> None:
        """Replace a rectangle of some images by noise, in place."""
        channels, height, width = pixel_values.shape[1:]
        device = pixel_values.device
        u = uniform(seeds, ERASING_UNIFORMS, start=FIRST_UNIFORM)
        first = (u[:, -1] * NOISE_VALUES).astype(np.int64)
        drawn = np.column_stack([random_rectangles(u[:, :-1], self.erasing, height, width), first])
        drawn = torch.from_numpy(drawn).to(device, non_blocking=True)
        if self._noise.device != device or self._noise.dtype != pixel_values.dtype or not len(self._noise):
            noise = torch.randn(NOISE_VALUES, generator=torch.Generator().manual_seed(0))
            self._noise = noise.to(device, pixel_values.dtype)
        top, left, bottom, right, first = drawn[:, :, None, None, None].unbind(1)
        rows = torch.arange(height, device=device)[:, None]
        columns = torch.arange(width, device=device)
        inside = ((rows >= top) & (rows < bottom)) & ((columns >= left) & (columns < right))
        pixels = torch.arange(channels * height * width, device=device).view(channels, height, width)
        noise = self._noise.take((first + pixels) % NOISE_VALUES)
        torch.where(inside, noise, pixel_values, out=pixel_values)


def random_rectangles(u: np.ndarray, probability: float, height: int, width: int) -> np.ndarray:
    """Sample rectangles to erase, like timm's `RandomErasing`.

    Args:
        u: uniform random numbers (images, ERASING_UNIFORMS - 1).
        probability: probability of a rectangle.
        height: height of the images in pixels.
        width: width of the images in pixels.

    Returns:
        Rectangles (images, 4) of top, left, bottom, right in pixels; all zeros for none.
    """
    area = height * width * (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * u[:, 1 : ATTEMPTS + 1])
    low, high = np.log(ERASED_RATIO)
    ratio = np.exp(low + (high - low) * u[:, ATTEMPTS + 1 : 2 * ATTEMPTS + 1])
    heights, widths = np.round(np.sqrt(area * ratio)), np.round(np.sqrt(area / ratio))
    fits = (heights < height) & (widths < width)
    image, first = np.arange(len(u)), fits.argmax(axis=1)
    heights, widths = heights[image, first], widths[image, first]
    top = np.floor(u[:, -2] * (height - heights + 1))
    left = np.floor(u[:, -1] * (width - widths + 1))
    erased = (u[:, 0] <= probability) & fits.any(axis=1)
    found = np.stack([top, left, top + heights, left + widths], axis=1)
    return np.where(erased[:, None], found, 0).astype(np.int64)


@contextmanager
def _preserved_rng_state():
    """Restore the generator of numpy, the only one that timm's Mixup uses, at the end."""
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)
