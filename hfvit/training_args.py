"""`HFViTTrainingArguments`: transformers' TrainingArguments with hfvit's fields and the defaults that differ."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from hfvit.config import RunArguments
from hfvit.errors import RecipeError


@dataclass
class HFViTTrainingArguments(RunArguments, TrainingArguments):
    """Every field of `TrainingArguments`, those of `RunArguments`, and these defaults of hfvit's own.

    After construction `per_device_train_batch_size` and `gradient_accumulation_steps` hold what `global_batch_size`
    means on this many processes: batch 8 is 8, 2 x 4 accumulated or 4 on each of 2 processes, with equal results.
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
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: no, steps, epoch or best."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept besides the best one."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint's weights."})
    metric_for_best_model: str | None = field(
        default="accuracy", metadata={"help": "Validation metric that selects: accuracy, macro_f1, loss, ..."}
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
    report_to: str | None = field(default="none", metadata={"help": "Tracker: tensorboard, wandb, trackio, ..."})

    def __post_init__(self):
        self.check()
        if not self.output_dir:
            raise RecipeError("output_dir is missing: name the folder that the run writes to.")
        for key in ("remove_unused_columns", "logging_nan_inf_filter", "dataloader_drop_last"):
            if getattr(self, key):
                raise RecipeError(f"{key}: must stay off in hfvit ({self.__dataclass_fields__[key].metadata['help']})")
        if self.push_to_hub:
            raise RecipeError("push_to_hub: not available yet; upload the finished folder with `hf upload NAME DIR`.")
        super().__post_init__()
        self.dataloader_pin_memory &= self.device.type == "cuda"  # elsewhere it does nothing but warn
        if self.early_stopping_patience and self.eval_strategy == "no":
            raise RecipeError("early_stopping_patience needs evaluations: set eval_strategy to epoch or steps.")
        self.per_device_train_batch_size, self.gradient_accumulation_steps = split_batch(
            self.global_batch_size, self.world_size * max(1, self.n_gpu), self.per_device_train_batch_size
        )


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
