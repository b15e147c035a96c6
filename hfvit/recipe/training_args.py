"""`HFViTTrainingArguments`: transformers' TrainingArguments with hfvit's fields and defaults."""

import logging
import math
from dataclasses import dataclass, field

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_torch_tf32_available

from hfvit.errors import RecipeError
from hfvit.recipe.arguments import RunArguments
from hfvit.utils.environment import share_of_cores

logger = logging.getLogger(__name__)

# Fields of TrainingArguments that would break what hfvit promises, and what to do instead.
NOT_AVAILABLE = {
    "remove_unused_columns": "it would drop the images; leave it off",
    "logging_nan_inf_filter": "it hides a NaN loss; leave it off",
    "dataloader_drop_last": "it would leave images out of evaluation; training drops its incomplete batch anyway",
    "auto_find_batch_size": "a batch that does not fit is cut in pieces anyway, and the global batch stays",
    "enable_jit_checkpoint": "SIGTERM and SIGINT save anyway, and then end the run",
    "batch_eval_metrics": "metrics are computed over the whole split; leave it off",
    "prediction_loss_only": "metrics need the predictions; leave it off",
    "deepspeed": "launch with accelerate_configs/deepspeed_zero2.yaml",
}


@dataclass
class HFViTTrainingArguments(RunArguments, TrainingArguments):
    """Every field of `TrainingArguments`, those of `RunArguments`, and these defaults of hfvit's own.

    After construction `per_device_train_batch_size` and `gradient_accumulation_steps` hold what `global_batch_size`
    means on this many processes. Batch 8 is 8, 2 x 4 accumulated or 4 on each of 2 processes, with equal results but
    for the draws of dropout and stochastic depth, the partners of mixup and CutMix, and the order of a stream.
    """

    output_dir: str | None = field(default=None, metadata={"help": "Folder of the run; created, never shared."})
    per_device_train_batch_size: int | None = field(
        default=None,
        metadata={"help": "Images a device holds at once; the whole share of global_batch_size when not given."},
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images per device in evaluation."})
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "Learning rate schedule (transformers' names)."}
    )
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warmup, or below 1 the share of the run."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str | None = field(
        default=None,
        metadata={"help": "When to save: no, steps, epoch or best; with every evaluation when not given."},
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept, the best one included."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint's weights."})
    metric_for_best_model: str | None = field(
        default="accuracy", metadata={"help": "Validation metric that selects: accuracy, macro_f1, loss, ..."}
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={"help": "Processes that read images; chosen by what there is to do and the cores when not given."},
    )
    # Every weight that trains is used in every step; looking for others costs a pass over the graph.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for weights without a gradient in DistributedDataParallel."}
    )
    # The image column would be dropped: no forward() argument has its name (transformers#24506).
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: images would be dropped."})
    # The filter hides a NaN loss and waits for the device at every step.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Must stay off: it hides a NaN loss."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "A resumed run keeps its early-stopping count."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "'auto' for the newest whole checkpoint of output_dir, or a checkpoint folder."},
    )
    push_to_hub: bool = field(
        default=False, metadata={"help": "Push the finished run to hub_model_id, as `hfvit push` does."}
    )
    hub_strategy: str = field(default="end", metadata={"help": "end: one push, of the finished run; no other."})
    report_to: str | None = field(default="none", metadata={"help": "Tracker: tensorboard, wandb, trackio, ..."})

    def __post_init__(self):
        self.check()
        self._refuse_what_breaks()
        if self.save_strategy is None:
            self.save_strategy = "epoch" if self.eval_strategy == "no" else self.eval_strategy
            if self.eval_strategy == "steps":
                self.save_steps = self.eval_steps = self.eval_steps or self.logging_steps
        if self.eval_strategy == "no":
            self.load_best_model_at_end = False
        if self.metric_for_best_model and self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.endswith(("loss", "ece"))
        self.chooses_workers = self.dataloader_num_workers is None
        if self.chooses_workers and self.dataloader_prefetch_factor is not None:
            raise RecipeError("dataloader_prefetch_factor: give dataloader_num_workers, too.")
        self.dataloader_num_workers = self.dataloader_num_workers or 0

        # The Trainer does not read the launcher's `use_cpu`: without this, each process of a CPU launch would train
        # alone, as if it were the only one (transformers 5.23).
        self.use_cpu |= parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()

        if not self.use_cpu:
            if self.tf32 is None:
                self.tf32 = is_torch_tf32_available()
            # From pinned memory a batch is copied while the device computes.
            self.accelerator_config = self.accelerator_config or {"non_blocking": self.dataloader_pin_memory}

        # The Trainer pushes its own selection of files while it trains; hfvit pushes the finished run, once.
        self.push_at_end, self.push_to_hub = self.push_to_hub, False

        super().__post_init__()

        if self.accelerator_config.dispatch_batches or self.accelerator_config.split_batches:
            raise RecipeError(
                "accelerator_config: dispatch_batches and split_batches cut batches apart, which are made whole here;"
                " leave them out."
            )
        if self.n_gpu > 1:
            # The Trainer would fall back to DataParallel, whose replicas this model cannot run in.
            logger.warning("Using one of %d GPUs; `accelerate launch` uses them all.", self.n_gpu)
            self._n_gpu = 1
        self.dataloader_pin_memory &= self.device.type == "cuda"  # elsewhere it does nothing but warn
        if self.mixed_precision == "fp16" and self.device.type == "cpu":
            raise RecipeError("fp16: needs a GPU; on the processor use bf16 (--bf16 true) or full precision.")
        available = get_available_reporting_integrations()
        for tracker in set(self.report_to) - set(available):
            has = f"installed here are {', '.join(available)}" if available else "none is installed here"
            raise RecipeError(f"report_to: '{tracker}' is not an installed tracker ({has}).")
        self.requested_batch = self.per_device_train_batch_size or math.inf
        self.per_device_train_batch_size, self.gradient_accumulation_steps = split_batch(
            self.global_batch_size, self.world_size, self.per_device_train_batch_size
        )

    def choose_workers(self, decoding: bool) -> None:
        """Set `dataloader_num_workers` where the recipe left it open.

        Decoding gets the cores that this process can have, up to 8; reading an array is a copy, for which one worker
        is enough beside a GPU. On a processor the training itself uses all cores: decoding goes on beside it, and an
        array is read in between.
        """
        if not self.chooses_workers:
            return
        on_gpu = self.device.type == "cuda"
        share = share_of_cores(self.world_size)
        if decoding:
            self.dataloader_num_workers = min(8, share) if on_gpu else max(1, share // 2)
        else:
            self.dataloader_num_workers = int(on_gpu)

    def fit(self, images: int) -> dict[str, int]:
        """Fit the batch and the steps between evaluations and log lines to a small training split.

        A batch that the images do not fill becomes the largest power of two that they do. Steps that are more than
        the run has become one epoch. Nothing changes where the recipe's values can be used; the log tells what did.

        Args:
            images: of the training split.

        Returns:
            The options that changed, with their values.
        """
        changed: dict[str, int] = {}
        batch = self.world_size * 2 ** int(math.log2(max(1, images // self.world_size)))
        if images < self.global_batch_size and batch <= images:
            changed["global_batch_size"] = batch
            self.global_batch_size = batch
            share = batch // self.world_size
            fits = min(share, self.requested_batch)
            self.per_device_train_batch_size = max(
                size for size in range(1, share + 1) if size <= fits and share % size == 0
            )
            self.gradient_accumulation_steps = share // self.per_device_train_batch_size
        epoch = max(1, images // self.global_batch_size)
        steps = math.ceil(epoch * self.num_train_epochs)
        if self.max_steps <= 0:
            for what in ("eval", "save", "logging"):
                key = f"{what}_steps"
                if getattr(self, f"{what}_strategy") == "steps" and getattr(self, key) > steps:
                    changed[key] = min(epoch, steps)
                    setattr(self, key, changed[key])
        if changed:
            told = ", ".join(f"{key}={value}" for key, value in changed.items())
            logger.warning(
                "%d training images are fewer than the recipe expects, %d steps an epoch; using %s",
                images,
                epoch,
                told,
            )
        return changed

    @property
    def order_seed(self) -> int:
        """Seed of the order of the training images."""
        return self.seed if self.data_seed is None else self.data_seed

    def check_stream(self, images: int | None) -> None:
        """Raise `RecipeError` for what needs to know where a stream ends; it has `images`, or None knows how many."""
        steps = images and max(1, images // self.global_batch_size)
        if self.max_steps <= 0:
            number = f"{math.ceil(steps * self.num_train_epochs)}" if steps else "the number of optimizer steps"
            why = f": num_train_epochs {self.num_train_epochs:g} of its {images:,} images" if steps else ""
            raise RecipeError(f"max_steps: a stream has no end; set max_steps to {number}{why}.")
        epoch = f"; {steps} steps see as many images as there are" if steps else ""
        for key in ("eval_strategy", "save_strategy", "logging_strategy"):
            if getattr(self, key) == "epoch":
                also = {"eval_strategy": "eval_steps"}.get(key, key.replace("strategy", "steps"))
                raise RecipeError(
                    f"{key}: epoch never comes in a stream, which has no end; set {key} to steps, and {also}{epoch}."
                )

    def _refuse_what_breaks(self) -> None:
        """Raise `RecipeError` for settings of TrainingArguments that hfvit's promises rule out."""
        if not self.output_dir:
            raise RecipeError("output_dir: missing; name the folder that the run writes to.")
        for key, instead in NOT_AVAILABLE.items():
            if getattr(self, key):
                raise RecipeError(f"{key}: not available in hfvit; {instead}.")
        if self.gradient_accumulation_steps != 1:
            raise RecipeError(
                "gradient_accumulation_steps: derived from global_batch_size; set per_device_train_batch_size to the"
                " images that fit."
            )
        if self.push_to_hub and not self.hub_model_id:
            raise RecipeError("push_to_hub: name the repository with hub_model_id: user/name.")
        if self.push_to_hub and self.hub_strategy != "end":
            raise RecipeError(
                f"hub_strategy: '{self.hub_strategy}' is not available; hfvit pushes once, when the run is finished."
            )
        if self.early_stopping_patience and self.eval_strategy == "no":
            raise RecipeError("early_stopping_patience: it needs evaluations; set eval_strategy to epoch or steps.")
        unsaved = self.save_strategy == self.eval_strategy == "steps" and self.save_steps != self.eval_steps
        if self.load_best_model_at_end and unsaved:
            raise RecipeError(
                f"save_steps: {self.save_steps:g} is not eval_steps ({self.eval_steps or self.logging_steps:g}); the"
                " best evaluation might not be saved. Leave save_strategy and save_steps out."
            )
        if self.nan_policy == "rewind" and self.save_only_model:
            raise RecipeError("nan_policy: rewind needs whole checkpoints to go back to; leave save_only_model out.")
        if self.ema_decay and self.save_only_model:
            raise RecipeError("save_only_model: a checkpoint without its averaged weights (ema_decay) is not whole.")


def split_batch(global_batch_size: int, devices: int, per_device: int | None = None) -> tuple[int, int]:
    """(images per device and forward pass, accumulation steps) whose product over `devices` is the global batch.

    `per_device` is an upper bound that must divide each device's share; `RecipeError` names the nearest that works.
    """
    if global_batch_size % devices:
        down = global_batch_size - global_batch_size % devices
        works = f"{down} or {down + devices}" if down else devices
        raise RecipeError(
            f"global_batch_size: {global_batch_size} images cannot be shared by {devices} devices; use {works}."
        )
    share = global_batch_size // devices
    per_device = min(per_device or share, share)
    if share % per_device:
        fits = max(size for size in range(1, per_device + 1) if share % size == 0)
        raise RecipeError(
            f"per_device_train_batch_size: {per_device} does not divide a device's share of {share} images"
            f" (global_batch_size {global_batch_size} on {devices} devices); {fits} does."
        )
    return per_device, share // per_device
