"""Class-dependent explanation maps: gradient-weighted attention and Grad-CAM."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from hfvit.errors import ModelError
from hfvit.models.attention import recorded_attention
from hfvit.utils.eval_mode import eval_mode

GRADIENT_ATTENTION = "Gradient-weighted attention"
GRAD_CAM = "Grad-CAM"

MIN_SIDE = 4  # rows and columns of a Grad-CAM; of a smaller feature map, that of an earlier stage is used
OUTLIER_NORM = 4.0  # times the median norm of the patch tokens
MOST_OUTLIERS = 0.05  # fraction of the tokens of an image


@dataclass
class Explanation:
    """Logits of a batch, and the relevance of its pixels for one class per image.

    Attributes:
        logits: `(images, classes)`, float32.
        maps: relevance `(images, rows, columns)`, 0 to 1, float32.
        method: `GRADIENT_ATTENTION` or `GRAD_CAM`.
    """

    logits: np.ndarray
    maps: np.ndarray
    method: str


def explain(model: PreTrainedModel, pixel_values: torch.Tensor, classes: torch.Tensor | None = None) -> Explanation:
    """Compute which parts of the images speak for a class.

    Models with plain attention blocks and a class token get gradient-weighted attention (Chefer et al. 2021,
    https://arxiv.org/abs/2103.15679), others Grad-CAM (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391).
    Patch tokens that a model uses as registers are left out.

    Hooks and the attention of the model are changed meanwhile: no other thread may use it.

    Args:
        model: image classifier of hfvit or transformers; its mode and gradients do not change.
        pixel_values: `(images, channels, height, width)` on the device of the model.
        classes: class of each image `(images,)`. Default: the predicted one.

    Raises:
        ModelError: the model has neither attention weights nor a feature map.
    """
    with eval_mode(model), torch.inference_mode(False), torch.enable_grad():
        pixels = pixel_values.detach().clone().to(model.dtype).requires_grad_()
        try:
            return _gradient_attention(model, pixels, classes)
        except ModelError:
            return _grad_cam(model, pixels, classes)


# Gradient-weighted attention


def _gradient_attention(model: PreTrainedModel, pixels: torch.Tensor, classes: torch.Tensor | None) -> Explanation:
    """Propagate relevance through the attention blocks.

    Chefer et al. (2021), equations 5 and 6.
    """
    network = getattr(model, "timm_model", None)
    with ExitStack() as stack:
        if network is not None:
            norms = stack.enter_context(_token_norms(network.blocks if hasattr(network, "blocks") else ()))
            recorded = stack.enter_context(recorded_attention(network))
            logits = model(pixels).logits
            attentions = list(recorded)  # gradient checkpointing runs the blocks again
        else:
            stack.enter_context(_eager_attention(model))
            outputs = model(pixels, output_attentions=True, output_hidden_states=True)
            logits = outputs.logits
            attentions = list(getattr(outputs, "attentions", None) or ())
            norms = [hidden.detach().float().norm(dim=-1) for hidden in outputs.hidden_states or ()]
    rows, columns = _patch_grid(model, pixels)
    tokens = attentions[0].shape[-1] if attentions else 0
    prefix = tokens - rows * columns
    if prefix < 0 or any(weights.ndim != 4 or weights.shape[2:] != (tokens, tokens) for weights in attentions):
        raise ModelError("explanation maps: the attention must be between the same tokens in all blocks")
    if not attentions or not prefix or getattr(network, "global_pool", "token") != "token":
        raise ModelError("explanation maps: the logits must be those of a class token")
    gradients = torch.autograd.grad(_scores(logits, classes), attentions)
    identity = torch.eye(tokens, device=pixels.device)
    relevance = identity.expand(len(pixels), tokens, tokens)
    for weights, gradient in zip(attentions, gradients, strict=True):
        weighted = (weights.detach().float() * gradient.float()).clamp(min=0).mean(dim=1)
        relevance = relevance + weighted @ relevance
    maps = relevance[:, 0, prefix:]  # without the class token and registers
    outliers = _outliers([norm[:, prefix:] for norm in norms if norm.shape[1:] == (tokens,)], maps)
    maps = _fill(maps.reshape(-1, rows, columns), outliers.reshape(-1, rows, columns))
    return Explanation(logits.detach().float().cpu().numpy(), _scaled(maps), GRADIENT_ATTENTION)


@contextmanager
def _token_norms(blocks) -> Iterator[list[torch.Tensor]]:
    """Collect the norms of the tokens after each block."""
    norms: list[torch.Tensor] = []

    def collect(module: nn.Module, inputs: tuple, output) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 3:
            norms.append(output.detach().float().norm(dim=-1))

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(collect).remove)
        yield norms


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use the attention of transformers that returns its weights."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        yield
    except (ValueError, TypeError) as error:  # a model without attention weights
        raise ModelError(f"explanation maps: {error}") from None
    finally:
        model.set_attn_implementation(before)


def _patch_grid(model: PreTrainedModel, pixels: torch.Tensor) -> tuple[int, int]:
    """Return the number of patches (rows, columns), (0, 0) if the model has none."""
    network = getattr(model, "timm_model", None)
    embedding = getattr(network, "patch_embed", None)
    size = getattr(embedding, "patch_size", None) if network is not None else getattr(model.config, "patch_size", None)
    if size is None:
        raise ModelError("explanation maps: the model has no patches")
    height, width = (size, size) if isinstance(size, int) else size
    return pixels.shape[2] // height, pixels.shape[3] // width


def _outliers(norms: list[torch.Tensor], maps: torch.Tensor) -> torch.Tensor:
    """Find patch tokens that a model uses as registers, by their large norm.

    Such tokens hold no local information, and attract attention in uniform regions (Darcet et al. 2024,
    https://arxiv.org/abs/2309.16588). They are few; more tokens with a large norm are an object.

    Args:
        norms: norm of each token after each block `(images, tokens)`.
        maps: relevance of each token `(images, tokens)`.
    """
    found = torch.zeros_like(maps, dtype=torch.bool)
    for norm in norms:
        found |= norm > OUTLIER_NORM * norm.median(dim=1, keepdim=True).values
    return found & (found.float().mean(dim=1, keepdim=True) <= MOST_OUTLIERS)


def _fill(maps: torch.Tensor, outliers: torch.Tensor) -> torch.Tensor:
    """Replace the relevance of outliers by the mean of their neighbors."""
    if not outliers.any():
        return maps
    kernel = maps.new_ones(1, 1, 3, 3)
    inside = (~outliers).to(maps.dtype)[:, None]
    total = functional.conv2d(maps[:, None] * inside, kernel, padding=1)
    count = functional.conv2d(inside, kernel, padding=1)
    return torch.where(outliers, (total / count.clamp(min=1))[:, 0], maps)


# Grad-CAM


def _grad_cam(model: PreTrainedModel, pixels: torch.Tensor, classes: torch.Tensor | None) -> Explanation:
    """Weight the channels of a feature map by their mean gradient."""
    network = getattr(model, "timm_model", None)
    with _feature_maps(model if network is None else network, len(pixels)) as features:
        logits = model(pixels).logits
    candidates = [(feature, to_grid) for feature, to_grid in features if feature.requires_grad]
    if not candidates:
        raise ModelError("explanation maps: the model has no feature map")
    tensors = [feature for feature, _ in candidates]
    gradients = torch.autograd.grad(_scores(logits, classes), tensors, allow_unused=True)
    found = None
    for (feature, to_grid), gradient in zip(reversed(candidates), reversed(gradients), strict=True):
        if gradient is None or not gradient.any():
            continue
        values = to_grid(feature.detach().float())
        weights = to_grid(gradient.float())
        maps = (values * weights.mean(dim=(1, 2), keepdim=True)).sum(dim=3).clamp(min=0)
        if feature.ndim == 3:  # tokens
            norms = values.norm(dim=3)
            maps = _fill(maps, _outliers([norms.flatten(1)], maps.flatten(1)).view_as(maps))
        if found is None or maps[0].numel() > found[0].numel():
            found = maps
        if min(found.shape[1:]) >= MIN_SIDE:
            break
    if found is None or found[0].numel() == 1:
        raise ModelError("explanation maps: the feature map has a single position")
    return Explanation(logits.detach().float().cpu().numpy(), _scaled(found), GRAD_CAM)


@contextmanager
def _feature_maps(network: nn.Module, batch: int) -> Iterator[list]:
    """Collect the outputs of stages, each with its function from `_grid_layout`."""
    features: list = []

    def collect(module: nn.Module, inputs: tuple, output, index: int) -> None:
        output = output[0] if isinstance(output, tuple) and output else output
        output = getattr(output, "last_hidden_state", output)
        if isinstance(output, torch.Tensor) and len(output) == batch:
            to_grid = _grid_layout(network, output, index)
            if to_grid:
                features.append((output, to_grid))

    with ExitStack() as stack:
        for module, index in _stages(network):
            stack.callback(module.register_forward_hook(partial(collect, index=index)).remove)
        yield features


def _grid_layout(
    network: nn.Module, output: torch.Tensor, index: int
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return a function that lays out an output as (images, rows, columns, channels).

    Args:
        network: network of the stage.
        output: output of the stage.
        index: index of the stage from `_stages`.

    Returns:
        The function, None if the output has no grid.
    """
    if output.ndim == 4:
        channels_last = getattr(network, "output_fmt", None) == "NHWC"
        return (lambda x: x) if channels_last else (lambda x: x.permute(0, 2, 3, 1))
    if output.ndim != 3:
        return None
    if hasattr(network, "reroll"):  # Hiera's tokens are sorted by window
        return (lambda x: network.reroll(x, index)) if index >= 0 else None
    prefix = getattr(network, "num_prefix_tokens", 0)
    side = math.isqrt(max(0, output.shape[1] - prefix))
    if side == 0 or side * side != output.shape[1] - prefix:
        return None
    return lambda x: x[:, prefix:].unflatten(1, (side, side))


def _stages(network: nn.Module, depth: int = 0) -> Iterator[tuple[nn.Module, int]]:
    """Yield the parts of a network in which a stage may end.

    Each part comes with its index in a list of blocks, or -1 outside of one.
    """
    for child in network.children():
        is_list = isinstance(child, nn.ModuleList | nn.Sequential)
        if is_list:
            yield from ((part, index) for index, part in enumerate(child))
        yield child, -1
        is_encoder = isinstance(child, PreTrainedModel) or type(child).__name__.endswith("Encoder")
        if is_encoder and not is_list and depth < 2:  # transformers: model.encoder.layers
            yield from _stages(child, depth + 1)


def _scores(logits: torch.Tensor, classes: torch.Tensor | None) -> torch.Tensor:
    """Return the sum of the explained logits; images do not depend on each other."""
    classes = logits.detach().argmax(dim=1) if classes is None else classes.to(logits.device)
    return logits.gather(1, classes[:, None]).sum()


def _scaled(maps: torch.Tensor) -> np.ndarray:
    """Scale each map to a maximum of 1."""
    highest = maps.amax(dim=(1, 2), keepdim=True)
    return (maps / highest.clamp(min=1e-12)).clamp(0, 1).float().cpu().numpy()
