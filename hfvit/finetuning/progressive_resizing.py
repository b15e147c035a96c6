"""Progressive image size during training (https://arxiv.org/abs/2104.00298)."""

import logging
from bisect import bisect_right
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerState

from hfvit.errors import ModelError, RecipeError, one_line
from hfvit.models.factory import meta_copy
from hfvit.models.image_size import can_be_dynamic, set_dynamic

KEY = "progressive_image_size"
TRAIN_KEY = "train_image_size"

logger = logging.getLogger(__name__)


class ProgressiveResizing(TrainerCallback):
    """Resize training images to ascending sizes, for equal parts of the training.

    Args:
        model: a `TimmWrapperForImageClassification`.
        sizes: image sizes in pixels of all parts but the last one, ascending; may be empty.
        last: image size in pixels of the last part; None for the model's image size. Objects look larger in random
            crops than in evaluation, so a smaller size suits training better (FixRes, https://arxiv.org/abs/1906.06423).

    Raises:
        RecipeError: a size is not below the model's image size, or not divisible by the patch size.
        ModelError: the network does not support other image sizes.
    """

    def __init__(self, model: nn.Module, sizes: list[int], last: int | None = None):
        self.network = model.timm_model
        self.own = min(model.config.image_size)
        self.parts = [*sizes, last]
        self.key = KEY if sizes else TRAIN_KEY
        smaller = dict.fromkeys(sizes, KEY) | ({last: TRAIN_KEY} if last else {})
        for size, key in smaller.items():
            if size >= self.own:
                raise RecipeError(f"{key}: must be below the model's image size {self.own}, got {size}.")
        # `model_args: {dynamic_img_size: true}` has already switched it on.
        self._switches = can_be_dynamic(self.network) and not self.network.dynamic_img_size
        if can_be_dynamic(self.network):
            patch = max(self.network.patch_embed.patch_size)
            for size, key in smaller.items():
                if size % patch:
                    raise RecipeError(f"{key}: must be divisible by the patch size {patch}, got {size}.")
        self._check_family(meta_copy(model).train(), smaller)

    def _check_family(self, meta_model: nn.Module, sizes: dict[int, str]) -> None:
        """Run a copy of the model on the meta device at each size."""
        self._set_dynamic(True, meta_model.timm_model)
        for size, key in sizes.items():
            try:
                with torch.device("meta"), torch.no_grad():
                    meta_model(torch.zeros(2, 3, size, size))  # some norms need more than one image
            except Exception as error:  # timm's models raise various types
                raise ModelError(
                    f"{key}: {type(self.network).__name__} does not support images of {size} px ({one_line(error)})."
                    " Use timm's ViT, DeiT, DINOv2, EVA, Swin or ConvNeXt."
                ) from None

    def _set_dynamic(self, on: bool, network: nn.Module | None = None) -> None:
        if self._switches:
            set_dynamic(network or self.network, on)

    def size(self, step: int, max_steps: int) -> int | None:
        """Return the image size in pixels of a step, None for the model's own size.

        It depends on the step only, so that resumed runs and all processes agree.
        """
        return self.parts[bisect_right(self._ends(max_steps), step)]

    def _ends(self, max_steps: int) -> list[int]:
        """Return the end step of each part but the last one, which gets the rest."""
        parts = len(self.parts)
        return [part * max_steps // parts for part in range(1, parts)]

    def pixels_before(self, step: int, max_steps: int) -> int:
        """Return the pixels of one image of each step before `step`, summed up.

        The time of a step is nearly proportional to the pixels of its images.
        """
        starts = [0, *self._ends(max_steps), max_steps]
        steps = [min(max(step - start, 0), end - start) for start, end in pairwise(starts)]
        return sum(count * (size or self.own) ** 2 for count, size in zip(steps, self.parts, strict=True))

    def __call__(self, pixel_values: torch.Tensor, state: TrainerState) -> torch.Tensor:
        """Resize pixel values (batch, 3, height, width) for the current step of a run."""
        return resize(pixel_values, self.size(state.global_step, state.max_steps) if state.max_steps > 0 else None)

    def largest(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Resize pixel values to the size that needs the most memory."""
        return resize(pixel_values, self.parts[-1])

    def on_train_begin(self, args, state, control, **kwargs):
        self._set_dynamic(True)
        ends = zip(self.parts, self._ends(state.max_steps), strict=False)
        steps = "".join(f"{size} px until step {end}, then " for size, end in ends)
        logger.info("Training images: %s%d px; evaluation: %d px", steps, self.parts[-1] or self.own, self.own)

    def on_train_end(self, args, state, control, **kwargs):
        self._set_dynamic(False)


def resize(pixel_values: torch.Tensor, size: int | None) -> torch.Tensor:
    """Resize pixel values (batch, 3, height, width).

    Args:
        pixel_values: images of any size.
        size: height and width in pixels; None returns the images unchanged.
    """
    if size is None:
        return pixel_values
    # Resizing in half precision differs between devices.
    resized = F.interpolate(pixel_values.float(), (size, size), mode="bilinear", antialias=True)
    return resized.to(pixel_values.dtype)
