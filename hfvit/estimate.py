"""Estimate the memory and disk that a recipe needs, without allocating the model."""

import os
import resource
import shutil
import sys
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import Trainer

from hfvit.data.splits import DIGITS
from hfvit.errors import ModelError, RecipeError
from hfvit.finetuning.factory import prepare_finetuning
from hfvit.models.configuration import load_config
from hfvit.models.factory import build_image_model
from hfvit.models.modeling import HFViTForImageClassification
from hfvit.recipe.arguments import ModelArguments
from hfvit.recipe.loader import Recipe
from hfvit.training.losses import cross_entropy
from hfvit.training.param_groups import build_param_groups
from hfvit.utils.files import expand_user
from hfvit.utils.formatting import aligned, size
from hfvit.utils.hub_ids import folder_or_hub_id


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make: `now` held, and `peak` the most that were held at once.

    What was there before does not count. With tensors without storage (the `meta` device, FakeTensor) nothing is
    allocated, and the figure is what a real run would hold, without an allocator's rounding.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._held: dict[int, int] = {}

    def ignore(self, tensors) -> None:
        """Leave these out, as what was there before."""
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


CLASSES = 1000  # the data set, which knows better, is not loaded
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
WAYS = {  # heading -> precision, activation checkpointing
    "fp32": ("no", False),
    "bf16": ("bf16", False),
    "checkpointing": ("no", True),
    "bf16 + checkpointing": ("bf16", True),
}


@dataclass
class StepMemory:
    """Bytes of one training step of one process.

    `held` is what the forward pass leaves for the backward one, `most` the most at once beside weights, optimizer and
    average.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    held: int
    most: int

    @property
    def total(self) -> int:
        """The most at once; gradients come as activations go, so it is less than the sum of all."""
        return self.weights + self.optimizer + self.average + self.most


def skeleton(recipe: Recipe) -> HFViTForImageClassification:
    """The recipe's model without storage (on `meta`)."""
    classes = 10 if recipe.data.dataset_name == DIGITS else CLASSES
    finetuning = replace(recipe.finetuning, progressive_image_size=None)  # the last size needs the most memory
    with torch.device("meta"):
        model = build_image_model(untrained(recipe.model), [str(index) for index in range(classes)])
        prepare_finetuning(finetuning, model)
    return model


def untrained(arguments: ModelArguments) -> ModelArguments:
    """Replace the checkpoint to start from by its architecture, found by its name where that is one of timm's."""
    if arguments.architecture:
        return arguments
    source = folder_or_hub_id(arguments.model_name_or_path, ModelError, "model_name_or_path")
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
    """Memory of one step of `batch` images, of operations as the processor runs them.

    `model` is on `meta` and is changed. `args` (TrainingArguments) choose the optimizer; AdamW without them.
    """
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    dtype = PRECISIONS.get(precision)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        live = LiveBytes()
        live.ignore([*model.parameters(), *model.buffers()])
        with live:
            pixel_values = torch.empty(batch, 3, *model.config.image_size)
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                logits = model(pixel_values).logits
            loss = cross_entropy(logits.float(), torch.empty(batch, dtype=torch.long), 0.0)
            held = live.now
            loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        optimizer = _optimizer(model, args)
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
    weights = _bytes([*model.parameters(), *model.buffers()])
    return StepMemory(
        weights=weights,
        gradients=_bytes(gradients),
        optimizer=_bytes(value for value in states if isinstance(value, torch.Tensor)),
        average=weights if args is not None and args.ema_decay else 0,
        held=held,
        most=live.peak,
    )


def _optimizer(model, args) -> torch.optim.Optimizer:
    cls, kwargs = torch.optim.AdamW, {}
    if args is not None:
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    groups = build_param_groups(model.timm_model, kwargs.pop("lr", 1e-3), 0.0)
    return cls(groups, **{**kwargs, "fused": False} if "fused" in kwargs else kwargs)


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def estimate(recipe: Recipe) -> str:
    """The report that `hfvit train RECIPE --estimate` prints; `RecipeError` for a model that reads texts."""
    args = recipe.training
    if recipe.model.text_encoder:
        raise RecipeError("--estimate: not available for a model of images with texts (text_encoder).")
    batch, precision = args.per_device_train_batch_size, args.mixed_precision
    checkpointing = bool(args.activation_checkpointing)
    own = step_memory(skeleton(recipe), batch, precision, checkpointing, args)
    model = skeleton(recipe)
    available, where, process = _room(args.device)
    need = own.total + process
    config, trained = model.config, sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [
        f"model      {config.architecture}, {config.image_size[0]} px,"
        f" {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M weights ({trained / 1e6:.1f} M trained),"
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
                ("activations", size(own.held)),
                ("most at once", size(own.total)),
                *([("libraries", size(process))] if process else []),
                ("there is", f"{size(available)} {where}"),
            ]
        ),
        "",
        *_disk(own, args),
        "",
        *_table(recipe, batch, available - process),
        "",
    ]
    if recipe.finetuning.teacher:
        lines.append("The teacher's weights and its forward pass come on top of these figures.")
    if recipe.model.patch_sizes:
        lines.append("These figures are for the model's own patch size; smaller patches need more.")
    if need <= available:
        return "\n".join([*lines, f"It fits: {size(need)} of {size(available)}."])
    return "\n".join(
        [
            *lines,
            f"It does not fit: {size(need)} of {size(available)}. What helps, from the cheapest: a smaller"
            " per_device_train_batch_size (the global batch stays, by accumulation), --bf16 true,"
            " --activation_checkpointing true, a smaller image_size, freeze.",
        ]
    )


def _room(device: torch.device) -> tuple[int, str, int]:
    """Memory for a process, in words where, and what of it the libraries take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], f"free on {torch.cuda.get_device_name(device)}", 0
    unit = 1 if sys.platform == "darwin" else 1024
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + process, "of memory free here", process


def _disk(own: StepMemory, args) -> list[str]:
    one = own.weights + own.optimizer + own.average
    kept = "all of them are kept" if args.save_total_limit is None else f"at most {args.save_total_limit + 1} at once"
    folder = expand_user(args.output_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return [f"disk       {size(one)} a checkpoint, {kept}; {size(shutil.disk_usage(there).free)} free in {there}"]


def _table(recipe: Recipe, batch: int, room: int) -> list[str]:
    rows = [("images at once", *WAYS)]
    for images in sorted({max(1, batch // 4), max(1, batch // 2), batch, 2 * batch}):
        cells = []
        for precision, checkpointing in WAYS.values():
            try:
                need = step_memory(skeleton(recipe), images, precision, checkpointing, recipe.training).total
                cells.append(size(need) + (" *" if need > room else ""))
            except ValueError:  # a model that cannot
                cells.append("-")
        rows.append((f"{images}{' (recipe)' if images == batch else ''}", *cells))
    return [*aligned(rows), *(["* more than there is"] if any("*" in cell for row in rows for cell in row) else [])]
