"""Estimate the memory and disk that a recipe needs, without allocating the model."""

import os
import shutil
import weakref
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import timm
import torch
from timm.optim import Lookahead
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hfvit.data.splits import DIGITS
from hfvit.errors import ModelError, RecipeError
from hfvit.finetuning.factory import prepare_finetuning
from hfvit.models.attention import unfuse_slow_attention
from hfvit.models.configuration import check_checkpoint_name, load_config
from hfvit.models.factory import build_image_model
from hfvit.models.modeling import HFViTForImageClassification
from hfvit.recipe.arguments import ModelArguments
from hfvit.recipe.loader import Recipe
from hfvit.recipe.optimizers import has_fallback, optimizer_factory
from hfvit.training.losses import cross_entropy
from hfvit.training.param_groups import build_param_groups
from hfvit.utils.environment import peak_memory
from hfvit.utils.files import expand_user
from hfvit.utils.formatting import aligned, size
from hfvit.utils.hub_ids import folder_or_hub_id


class LiveBytes(TorchDispatchMode):
    """Count the bytes of storages that operations create, `now` and at the `peak`.

    Works with fake tensors and the meta device, without allocating memory. Existing storages do not count.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._held: dict[int, int] = {}

    def ignore(self, tensors) -> None:
        """Exclude the storages of these tensors."""
        for tensor in tensors:
            self._held[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._add, result)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        self._held[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._held.pop(key, 0)


CLASSES = 1000  # assumed, as the data set is not loaded
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
SETTINGS = {  # heading -> (precision, activation checkpointing)
    "fp32": ("no", False),
    "bf16": ("bf16", False),
    "checkpointing": ("no", True),
    "bf16 + checkpointing": ("bf16", True),
}


@dataclass
class StepMemory:
    """Hold the memory of a training step of one process in bytes.

    Args:
        weights: parameters and buffers.
        gradients: gradients.
        optimizer: optimizer state.
        average: averaged weights (EMA).
        activations: activations that the forward pass keeps for the backward pass.
        peak: maximum of activations and gradients at the same time.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    peak: int

    @property
    def total(self) -> int:
        """Return the peak memory; less than the sum, as activations are freed."""
        return self.weights + self.optimizer + self.average + self.peak


def skeleton(recipe: Recipe) -> HFViTForImageClassification:
    """Build the recipe's model on the meta device, at the image size of training."""
    classes = 10 if recipe.data.dataset_name == DIGITS else CLASSES
    arguments, finetuning = untrained(recipe.model), recipe.finetuning
    with torch.device("meta"):
        model = build_image_model(arguments, [str(index) for index in range(classes)])
        prepare_finetuning(finetuning, model)
    size = finetuning.train_image_size
    if size is None:
        return model
    finetuning = replace(finetuning, progressive_image_size=None, train_image_size=None)
    return skeleton(replace(recipe, model=replace(arguments, image_size=size), finetuning=finetuning))


def untrained(arguments: ModelArguments) -> ModelArguments:
    """Replace the checkpoint by its architecture (from its name or configuration)."""
    if arguments.architecture:
        return arguments
    source = folder_or_hub_id(arguments.model_name_or_path, ModelError, "model_name_or_path")
    check_checkpoint_name(source)
    architecture = source.rpartition("/")[2].split(".")[0]
    own: dict[str, Any] = {}
    size = arguments.image_size
    if Path(source).is_dir() or not timm.is_model(architecture):
        config = load_config(source, revision=arguments.model_revision or "main")
        architecture = config.architecture
        own = dict(config.model_args or {})
        own_size = own.pop("img_size", config.image_size[0])
        size = size or own_size
    model_args = {**own, **(arguments.model_args or {})}
    return replace(
        arguments, model_name_or_path=None, architecture=architecture, model_args=model_args, image_size=size
    )


def step_memory(
    model: HFViTForImageClassification, batch: int, precision: str = "no", checkpointing: bool = False, args=None
) -> StepMemory:
    """Compute the memory of a training step with the operations of the CPU.

    Args:
        model: model on the meta device, changed in place.
        batch: number of images.
        precision: "no", "bf16" or "fp16".
        checkpointing: recompute activations.
        args: `TrainingArguments` with the optimizer; None for AdamW.
    """
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    dtype = PRECISIONS.get(precision)
    if args is not None:
        unfuse_slow_attention(model, args.device, dtype)
    # Fake tensors cannot be compiled (timm's kron compiles its steps).
    with torch.compiler.set_stance("force_eager"), FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        live = LiveBytes()
        live.ignore([*model.parameters(), *model.buffers()])
        with live:
            pixel_values = torch.empty(batch, 3, *model.config.image_size)
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                logits = model(pixel_values).logits
            loss = cross_entropy(logits.float(), torch.empty(batch, dtype=torch.long), 0.0)
            activations = live.now
            loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        optimizer = _optimizer(model, args)
        _create_state(optimizer)
        states = tree_leaves(optimizer.state_dict()["state"])  # kron has lists of tensors
    weights = _bytes([*model.parameters(), *model.buffers()])
    return StepMemory(
        weights=weights,
        gradients=_bytes(gradients),
        optimizer=_bytes(value for value in states if isinstance(value, torch.Tensor)),
        average=weights if args is not None and (args.ema_decay or args.swa_start is not None) else 0,
        activations=activations,
        peak=live.peak,
    )


def _optimizer(model, args) -> torch.optim.Optimizer:
    create = torch.optim.AdamW
    options = {}
    fallback = False
    if args is not None:
        create, options = optimizer_factory(args, model)
        fallback = has_fallback(args.optim)
    groups = build_param_groups(model.timm_model, options.get("lr", 1e-3), 0.0, with_fallback=fallback)
    return create(groups, **{**options, "fused": False} if "fused" in options else options)


def _create_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the state of all weights, with fake tensors."""
    gradients = {p: p.grad for group in optimizer.param_groups for p in group["params"]}
    try:
        optimizer.step()
    except DataDependentOutputException:  # fake tensors have no values
        # Every optimizer creates the state of a weight before it uses values.
        optimizer.zero_grad()
        for weight, gradient in gradients.items():
            weight.grad = gradient
            with suppress(DataDependentOutputException):
                optimizer.step()
            weight.grad = None
    if isinstance(optimizer, Lookahead):
        for weight, gradient in gradients.items():
            weight.grad = gradient
        optimizer.sync_lookahead()  # creates the slow weights, as a later step does


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def estimate(recipe: Recipe) -> str:
    """Return the report of `hfvit train RECIPE --estimate`.

    Raises:
        RecipeError: the recipe has a text encoder.
    """
    args = recipe.training
    if recipe.model.text_encoder:
        raise RecipeError("--estimate: not available with text_encoder.")
    batch = args.per_device_train_batch_size
    precision = args.mixed_precision
    checkpointing = bool(args.activation_checkpointing)
    own = step_memory(skeleton(recipe), batch, precision, checkpointing, args)
    model = skeleton(recipe)
    available, where, process = _available_memory(args.device)
    need = own.total + process
    config = model.config
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [
        f"model      {config.architecture}, {config.image_size[0]} px"
        f"{' in training' if recipe.finetuning.train_image_size else ''},"
        f" {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters ({trained / 1e6:.1f} M trained),"
        f" {config.num_labels:,} classes assumed",
        f"step       {batch} images at once, accumulated {args.gradient_accumulation_steps} times, {args.world_size}"
        f" process(es); precision {precision}, activation checkpointing {'on' if checkpointing else 'off'}",
        "",
        *aligned(
            [
                ("weights", size(own.weights)),
                ("gradients", size(own.gradients)),
                ("optimizer", size(own.optimizer)),
                *([("moving average", size(own.average))] if own.average else []),
                ("activations", size(own.activations)),
                ("peak", size(own.total)),
                *([("libraries", size(process))] if process else []),
                ("available", f"{size(available)} {where}"),
            ]
        ),
        "",
        _disk(own, args),
        "",
        *_table(recipe, batch, available - process),
        "",
    ]
    if recipe.finetuning.teacher:
        lines.append("The teacher's weights and forward pass are not included.")
    if recipe.model.patch_sizes:
        lines.append("These figures are for the model's patch size; smaller patches need more.")
    if need <= available:
        return "\n".join([*lines, f"It fits: {size(need)} of {size(available)}."])
    return "\n".join(
        [
            *lines,
            f"It does not fit: {size(need)} of {size(available)}. To reduce it, cheapest first: a smaller"
            " per_device_train_batch_size (with gradient accumulation), --bf16 true, --activation_checkpointing true,"
            " a smaller image_size, freeze.",
        ]
    )


def _available_memory(device: torch.device) -> tuple[int, str, int]:
    """Return the memory for a process, a description, and the memory of libraries."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], f"free on {torch.cuda.get_device_name(device)}", 0
    process = peak_memory()
    return psutil.virtual_memory().available + process, "of memory", process


def _disk(own: StepMemory, args) -> str:
    checkpoint = own.weights + own.optimizer + own.average
    kept = "all are kept" if args.save_total_limit is None else f"at most {args.save_total_limit + 1} at once"
    folder = expand_user(args.output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    free = size(shutil.disk_usage(existing).free)
    return f"disk       {size(checkpoint)} per checkpoint, {kept}; {free} free in {existing}"


def _table(recipe: Recipe, batch: int, available: int) -> list[str]:
    rows = [("images at once", *SETTINGS)]
    for images in sorted({max(1, batch // 4), max(1, batch // 2), batch, 2 * batch}):
        cells = []
        for precision, checkpointing in SETTINGS.values():
            try:
                need = step_memory(skeleton(recipe), images, precision, checkpointing, recipe.training).total
                cells.append(size(need) + (" *" if need > available else ""))
            except ValueError:  # not supported by the model
                cells.append("-")
        rows.append((f"{images}{' (recipe)' if images == batch else ''}", *cells))
    has_excess = any("*" in cell for row in rows for cell in row)
    return [*aligned(rows), *(["* more than available"] if has_excess else [])]
