"""Progressive image size during training (https://arxiv.org/abs/2104.00298)."""

import logging
from bisect import bisect_right

import torch
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerState

from hfvit.errors import ModelError, RecipeError, one_line
from hfvit.models.factory import without_storage
from hfvit.models.image_size import can_be_dynamic, set_dynamic

KEY = "progressive_image_size"

logger = logging.getLogger(__name__)


class ProgressiveSize(TrainerCallback):
    """Resizes the training images of `model` (a `TimmWrapperForImageClassification`) to the size of the step's part.

    `sizes` are in pixels and ascend. Raises `RecipeError` for a size that the model's own image size or patches rule
    out, `ModelError` for a network that is bound to its image size.
    """

    def __init__(self, model: nn.Module, sizes: list[int]):
        self.network, self.sizes, self.own = model.timm_model, sizes, min(model.config.image_size)
        if sizes[-1] >= self.own:
            raise RecipeError(f"{KEY}: {sizes[-1]} px is not below the model's {self.own} px; leave it out.")
        # Where `model_args: {dynamic_img_size: true}` said so already, there is nothing to switch.
        self._switches = can_be_dynamic(self.network) and not self.network.dynamic_img_size
        if can_be_dynamic(self.network):
            patch = max(self.network.patch_embed.patch_size)
            for size in sizes:
                if size % patch:
                    raise RecipeError(f"{KEY}: {size} px is not divisible by the model's patches of {patch} px.")
        self._check_family(without_storage(model).train())

    def _check_family(self, ghost: nn.Module) -> None:
        """Run a copy of the model, which has no storage, at each size: what is bound to one size fails there."""
        self._set_dynamic(True, ghost.timm_model)
        for size in self.sizes:
            try:
                with torch.device("meta"), torch.no_grad():
                    ghost(torch.zeros(2, 3, size, size))  # two: some norms need more than one
            except Exception as error:  # timm's models assert and raise all kinds of things
                raise ModelError(
                    f"{KEY}: not for this family: {type(self.network).__name__} does not take images of {size} px"
                    f" ({one_line(error)}); timm's ViT, DeiT, DINOv2, EVA, Swin and ConvNeXt do."
                ) from None

    def _set_dynamic(self, on: bool, network: nn.Module | None = None) -> None:
        if self._switches:
            set_dynamic(network or self.network, on)

    def size(self, step: int, max_steps: int) -> int | None:
        """The image size in pixels of an optimizer step, counted from 0; None for the model's own.

        A function of these alone, so that a resumed run and all processes agree.
        """
        return [*self.sizes, None][bisect_right(self._ends(max_steps), step)]

    def _ends(self, max_steps: int) -> list[int]:
        """The step where the part of each size ends, rounded down: the shortest run still ends at the model's own."""
        parts = len(self.sizes) + 1
        return [part * max_steps // parts for part in range(1, parts)]

    def __call__(self, pixel_values: torch.Tensor, state: TrainerState) -> torch.Tensor:
        """Resize `(batch, 3, height, width)` for the step that `state` is at; before a run, leave it as it is."""
        size = self.size(state.global_step, state.max_steps) if state.max_steps > 0 else None
        if size is None:
            return pixel_values
        # In float32: half precisions are not resized alike on all devices.
        resized = F.interpolate(pixel_values.float(), (size, size), mode="bilinear", antialias=True)
        return resized.to(pixel_values.dtype)

    def on_train_begin(self, args, state, control, **kwargs):
        self._set_dynamic(True)
        ends = zip(self.sizes, self._ends(state.max_steps), strict=True)
        steps = ", ".join(f"{size} px until step {end}" for size, end in ends)
        logger.info("Small images first: %s, then %d px", steps, self.own)

    def on_train_end(self, args, state, control, **kwargs):
        self._set_dynamic(False)
