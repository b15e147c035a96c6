"""`HFViTTrainingArguments`: TrainingArguments with hfvit's fields and defaults."""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import is_torch_tf32_available

from hfvit.errors import RecipeError, nearest, one_line
from hfvit.recipe.arguments import MULTI_LABEL_METRICS, RANKING_METRICS, SCALAR_METRICS, RunArguments, TrainerArguments
from hfvit.recipe.optimizers import has_fallback, is_timm_optimizer, optimizer_factory, unknown_optimizer
from hfvit.utils.credentials import mask_values
from hfvit.utils.environment import cores_per_process, set_tf32

logger = logging.getLogger(__name__)

# Fields of TrainingArguments that hfvit cannot honor: field -> (the only value, the reason or what to do instead).
NOT_AVAILABLE: dict[str, tuple[Any, str]] = {
    "remove_unused_columns": (False, "It would drop the images."),
    "logging_nan_inf_filter": (False, "It would hide a NaN loss."),
    "dataloader_drop_last": (False, "It would skip images in evaluation; training drops its incomplete batch anyway."),
    "auto_find_batch_size": (False, "A batch that does not fit is split anyway, and the global batch stays."),
    "enable_jit_checkpoint": (False, "A run saves on SIGTERM and SIGINT anyway, and then ends."),
    "batch_eval_metrics": (False, "Metrics are computed over the complete split."),
    "prediction_loss_only": (False, "Metrics need the predictions."),
    "eval_do_concat_batches": (True, "Metrics are computed over the complete split."),
    "include_for_metrics": ([], "Metrics are computed from logits and labels."),
    "train_sampling_strategy": ("random", "Images have no length. For class imbalance use class_balance."),
    "label_names": (None, "Set label_column to choose the column of the labels."),
    "include_num_input_tokens_seen": ("no", "Images have no tokens to count; the log has the images per second."),
    "neftune_noise_alpha": (None, "It adds noise to token embeddings, which an image model does not have."),
    "use_liger_kernel": (False, "Liger has no kernels for timm models."),
    "liger_kernel_config": (None, "Liger has no kernels for timm models."),
    "debug": ("", "A NaN or infinite loss is reported with its step; see nan_policy."),
    "deepspeed": (None, "Launch with accelerate_configs/deepspeed_zero2.yaml."),
    "parallelism_config": (None, "Set it in the configuration of accelerate launch."),
    "gradient_accumulation_steps": (
        1, "It is derived from global_batch_size. Set per_device_train_batch_size to the images that fit."
    ),
}  # fmt: skip

# Fields of TrainingArguments without effect in hfvit: where they have one -> fields.
WITHOUT_EFFECT = {
    "with language models": ("average_tokens_across_devices", "length_column_name", "use_cache"),
    "with optim=galore or apollo": ("optim_target_modules",),
    "with hub_strategy=every_save": ("hub_always_push",),
    "in the example scripts of transformers": ("do_train", "do_eval", "do_predict"),
}

CHOICES = {
    "eval_strategy": [item.value for item in IntervalStrategy],
    "logging_strategy": [item.value for item in IntervalStrategy],
    "save_strategy": [item.value for item in SaveStrategy],
    "lr_scheduler_type": [item.value for item in SchedulerType],
    "optim": [item.value for item in OptimizerNames],
}
# These optimizers build other parameter groups, without layer-wise learning rates.
OPTIMIZERS_NOT_AVAILABLE = ("galore", "apollo", "lomo", "adalomo")
# Schedules that ignore warmup_steps, those that ignore lr_scheduler_kwargs, and those that follow the evaluations.
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
WITHOUT_OPTIONS = ("constant", "constant_with_warmup")
BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")
TRACKER_EXTRAS = ("tensorboard", "trackio", "wandb", "mlflow")  # extras of hfvit with the name of a tracker
# Options with a mapping or the path of a JSON file.
MAPPINGS_IN_FILES = ("accelerator_config", "fsdp_config")
# Data loader workers that are chosen for a GPU at most: they decode more images than a GPU trains on.
MAX_WORKERS = 24


@dataclass
class HFViTTrainingArguments(RunArguments, TrainerArguments, TrainingArguments):
    """All fields of `TrainingArguments` and `RunArguments`, with hfvit's defaults.

    The constructor sets `per_device_train_batch_size` and `gradient_accumulation_steps` so that their product over all
    processes is `global_batch_size`. Results do not depend on the split, except for the random numbers of dropout and
    stochastic depth, the pairs of mixup and CutMix, and the order of a stream.

    Raises:
        RecipeError: a value is out of range, options exclude each other, or optimizer or schedule cannot be created;
            the message begins with the option.
    """

    # Every trainable weight is used in every step, and the search costs a pass over the graph.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for weights without a gradient in DistributedDataParallel."}
    )
    # The image column would be dropped: no forward() argument has its name (transformers#24506).
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be false: images would be dropped."})
    # The filter hides a NaN loss and synchronizes with the device in every step.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Must be false: it hides a NaN loss."})
    # Starting workers takes seconds, in each epoch and each evaluation.
    dataloader_persistent_workers: bool | None = field(
        default=None, metadata={"help": "Keep data loader workers between epochs. Default: true."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Resume with the early-stopping count of the checkpoint."}
    )
    hub_strategy: str = field(default="end", metadata={"help": "Must be end: hfvit pushes the finished run, once."})

    def __post_init__(self):
        self.eval_steps = self.eval_steps or None
        self.include_num_input_tokens_seen = self.include_num_input_tokens_seen or "no"  # false in older recipes
        self.check()
        self._check_available()
        self._check_values()
        self._check_combinations()
        self._set_strategies()
        self.steps_per_epoch: int | None = None  # until `fit` or `fit_stream`
        self.chooses_workers = self.dataloader_num_workers is None
        self.dataloader_num_workers = self.dataloader_num_workers or 0
        self.chooses_persistence = self.dataloader_persistent_workers is None
        if self.chooses_persistence:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        self._set_device_options()

        # hfvit pushes the finished run instead of the Trainer's selection of files during training.
        self.push_at_end = self.push_to_hub
        self.push_to_hub = False

        optim = self.optim
        if is_timm_optimizer(optim):
            self.optim = OptimizerNames.ADAMW_TORCH_FUSED  # the base class accepts only its own names
        super().__post_init__()
        if is_timm_optimizer(optim):
            self.optim = optim
        self._log_a_loss()
        if self.tf32 is not None:
            set_tf32(self.tf32)

        self._check_accelerator_config()
        if self.n_gpu > 1:
            # The Trainer would use DataParallel, which the model does not support.
            logger.warning("Using one of %d GPUs. Use `accelerate launch` for all of them.", self.n_gpu)
            self._n_gpu = 1
        self.dataloader_pin_memory &= self.device.type == "cuda"  # otherwise PyTorch warns
        if self.mixed_precision == "fp16" and self.device.type == "cpu":
            raise RecipeError("fp16: requires a GPU. On the CPU use bf16 (--bf16 true) or full precision.")
        self._check_trackers()
        self._check_optimizer()
        self.requested_batch = self.per_device_train_batch_size or math.inf
        self.per_device_train_batch_size, self.gradient_accumulation_steps = split_batch(
            self.global_batch_size, self.world_size, self.per_device_train_batch_size
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values, without credentials; trackers log them."""
        return mask_values(super().to_dict())

    def choose_workers(self, decoding: bool) -> None:
        """Set `dataloader_num_workers` if the recipe has none.

        Decoding uses the cores of this process: on a GPU all but one, at most `MAX_WORKERS`; on a CPU half of them, as
        training uses all. Reading decoded images from an array needs one worker on a GPU, none on a CPU.

        Args:
            decoding: whether images are decoded rather than read from an array.
        """
        if not self.chooses_workers:
            return
        on_gpu = self.device.type == "cuda"
        cores = cores_per_process(self.world_size)
        if decoding:
            self.dataloader_num_workers = max(1, min(MAX_WORKERS, cores - 1) if on_gpu else cores // 2)
        else:
            self.dataloader_num_workers = int(on_gpu)
        if self.chooses_persistence:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0

    def fit(self, images: int) -> dict[str, int]:
        """Reduce batch size and intervals of evaluation for a small training split.

        A batch larger than the split becomes the largest power of two that fits, and intervals longer than the run
        become one epoch. Changes are logged.

        Args:
            images: number of training images.

        Returns:
            The changed options with their values.
        """
        changed: dict[str, int] = {}
        batch = self.world_size * 2 ** int(math.log2(max(1, images // self.world_size)))
        if images < self.global_batch_size and batch <= images:
            changed["global_batch_size"] = batch
            self.global_batch_size = batch
            per_device = batch // self.world_size
            limit = min(per_device, self.requested_batch)
            self.per_device_train_batch_size = max(
                size for size in range(1, per_device + 1) if size <= limit and per_device % size == 0
            )
            self.gradient_accumulation_steps = per_device // self.per_device_train_batch_size
        epoch = max(1, images // self.global_batch_size)
        self.steps_per_epoch = epoch
        steps = math.ceil(epoch * self.num_train_epochs)
        if self.max_steps <= 0:
            for event in ("eval", "save", "logging"):
                key = f"{event}_steps"
                if getattr(self, f"{event}_strategy") == "steps" and getattr(self, key) > steps:
                    changed[key] = min(epoch, steps)
                    setattr(self, key, changed[key])
        if changed:
            values = ", ".join(f"{key}={value}" for key, value in changed.items())
            logger.warning("Only %d training images (%d steps per epoch). Using %s.", images, epoch, values)
        return changed

    def fit_metric(self, metrics: Sequence[str], default: str) -> dict[str, str]:
        """Replace accuracy by `default` in metric_for_best_model if it is not computed.

        Args:
            metrics: names of the computed metrics.
            default: metric to use instead of accuracy.

        Returns:
            The changed option with its value, or nothing.

        Raises:
            RecipeError: metric_for_best_model is not computed.
        """
        metric = (self.metric_for_best_model or default).removeprefix("eval_")
        if metric in metrics:
            if self.greater_is_better is None:  # metric_for_best_model: none, or no evaluation
                self.greater_is_better = is_better_when_greater(metric)
            return {}
        if metric != "accuracy":
            raise RecipeError(f"metric_for_best_model: must be one of {', '.join(metrics)}, got '{metric}'.")
        self.metric_for_best_model = default
        self.greater_is_better = is_better_when_greater(default)
        return {"metric_for_best_model": default}

    def scheduler_options(self, steps: int) -> dict[str, Any]:
        """Return the options of the schedule for a run of `steps` optimizer steps.

        They are `lr_scheduler_kwargs`, but a `num_decay_steps` below 1 is a fraction of the run, as `warmup_steps`.
        A schedule that follows the evaluations expects the greater metric to be better if it is.

        Raises:
            RecipeError: `num_decay_steps` is not a number of steps or a fraction.
        """
        # YAML reads 1e-5 as text.
        options = {key: _as_number(value) for key, value in (self.lr_scheduler_kwargs or {}).items()}
        if self.lr_scheduler_type in BY_EVALUATION:
            options.setdefault("mode", "max" if self.greater_is_better else "min")
        if "num_decay_steps" in options:
            decay = options["num_decay_steps"]
            if not isinstance(decay, int | float) or not (0 < decay < 1 or (decay >= 1 and decay % 1 == 0)):
                raise RecipeError(
                    "lr_scheduler_kwargs: num_decay_steps must be a positive integer, or a fraction of the run below"
                    f" 1, got {decay!r}."
                )
            # Rounded down, as warmup is rounded up.
            options["num_decay_steps"] = int(decay) if decay >= 1 else max(1, int(decay * steps + 1e-6))
        return options

    @property
    def epochs(self) -> float | None:
        """Return the length of the run in epochs, None if it is not known yet."""
        if self.max_steps <= 0:
            return self.num_train_epochs
        return self.max_steps / self.steps_per_epoch if self.steps_per_epoch else None

    @property
    def order_seed(self) -> int:
        """Return the seed of the order of training images."""
        return self.seed if self.data_seed is None else self.data_seed

    def fit_stream(self, images: int | None) -> None:
        """Convert epochs to optimizer steps, for streaming.

        Args:
            images: number of images in the stream, None if unknown.

        Raises:
            RecipeError: an option requires epochs, and the number of images is unknown.
        """
        steps = images and max(1, images // self.global_batch_size)
        self.steps_per_epoch = steps
        if self.max_steps <= 0:
            if not steps:
                raise RecipeError(
                    "max_steps: required for a stream of unknown length. Set it to the number of optimizer steps, or"
                    " add num_examples of the split to the data set's card (dataset_info: splits)."
                )
            self.max_steps = math.ceil(steps * self.num_train_epochs)
            self._log_a_loss()
        for key in ("eval_strategy", "save_strategy", "logging_strategy"):
            if getattr(self, key) == "epoch":
                interval = key.replace("strategy", "steps")
                if not steps:
                    raise RecipeError(
                        f"{key}: must not be epoch for a stream of unknown length. Set {key} to steps, and {interval}."
                    )
                setattr(self, key, type(getattr(self, key))("steps"))
                setattr(self, interval, steps)

    def _log_a_loss(self) -> None:
        """Reduce logging_steps beyond max_steps, with which no loss would be logged."""
        if self.logging_strategy == "steps" and 0 < self.max_steps < self.logging_steps:
            self.logging_steps = self.max_steps

    def _check_available(self) -> None:
        """Raise `RecipeError` for settings of TrainingArguments that hfvit cannot honor."""
        if not self.output_dir:
            raise RecipeError("output_dir: missing. Pass a folder for the run.")
        for key, (only, reason) in NOT_AVAILABLE.items():
            value = getattr(self, key)
            if value != only and (value or only):
                raise RecipeError(f"{key}: not available in hfvit, got {_shown(value)}. {reason}")
        if _shown(self.optim).strip("'").startswith(OPTIMIZERS_NOT_AVAILABLE):
            raise RecipeError(
                f"optim: not available in hfvit, got {_shown(self.optim)}. It requires other parameter groups; use"
                " adamw_torch_fused."
            )

    def _check_values(self) -> None:
        """Raise `RecipeError` for a value of TrainingArguments out of range."""
        for key, choices in CHOICES.items():
            value = getattr(self, key)
            value = getattr(value, "value", value)
            if key == "optim" and is_timm_optimizer(value):
                continue  # checked by `optimizer_factory`
            if value not in choices and not (value is None and key == "save_strategy"):
                if key == "optim":
                    allowed = unknown_optimizer(str(value), choices)
                else:
                    allowed = nearest(str(value), choices) or f" Choose one of {', '.join(choices)}."
                raise RecipeError(f"{key}: unknown, got '{value}'.{allowed}")
        self._check_numbers()
        metric = self.metric_for_best_model
        known = tuple(dict.fromkeys((*SCALAR_METRICS, *RANKING_METRICS, *MULTI_LABEL_METRICS)))
        # `SPLIT_METRIC` of an `eval_dataset` with several splits, which only the trainer knows.
        suffixes = tuple(f"_{name}" for name in known)
        if metric is not None and metric not in known and not metric.endswith(suffixes):
            raise RecipeError(f"metric_for_best_model: must be one of {', '.join(known)}, got '{metric}'.")
        mappings = {key: _read_mapping(key, getattr(self, key)) for key in self._VALID_DICT_FIELDS}
        with wrap_errors("accelerator_config", self.accelerator_config):
            AcceleratorConfig(**(mappings["accelerator_config"] or {}))
        if self.optim_args and not all(part.count("=") == 1 for part in self.optim_args.split(",")):
            raise RecipeError(f"optim_args: must be NAME=VALUE, with commas between several, got '{self.optim_args}'.")

    def _check_numbers(self) -> None:
        counts = (
            "per_device_train_batch_size", "per_device_eval_batch_size", "save_total_limit", "torch_empty_cache_steps",
            "eval_accumulation_steps", "dataloader_prefetch_factor", "ddp_bucket_cap_mb", "ddp_timeout",
        )  # fmt: skip
        self._require(counts, lambda value: value >= 1, "at least 1")
        not_negative = (
            "learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon", "eval_delay",
            "dataloader_num_workers",
        )  # fmt: skip
        self._require(not_negative, lambda value: 0 <= value < math.inf, "a finite number, at least 0")
        self._require(("num_train_epochs",), lambda value: 0 < value < math.inf, "a finite number above 0")
        self._require(("max_steps",), lambda value: value > 0 or value == -1, "at least 1, or -1 for num_train_epochs")
        fractions = ("adam_beta1", "adam_beta2", "label_smoothing_factor")
        self._require(fractions, lambda value: 0 <= value < 1, "at least 0 and below 1")
        self._require(
            ("logging_steps", "eval_steps", "save_steps"),
            lambda value: 0 < value < math.inf and (value < 1 or value % 1 == 0),
            "a positive integer, or a fraction of the run below 1",
        )
        self._require(("seed", "data_seed"), lambda value: 0 <= value < 2**32, "an integer from 0 to 4,294,967,295")

    def _require(self, keys: Sequence[str], is_allowed: Callable[[float], bool], words: str) -> None:
        for key in keys:
            value = getattr(self, key)
            if value is not None and not is_allowed(value):
                raise RecipeError(f"{key}: must be {words}, got {value!r}.")

    def _check_combinations(self) -> None:
        """Raise `RecipeError` for options that exclude each other or need another one."""
        if self.push_to_hub and not self.hub_model_id:
            raise RecipeError("push_to_hub: requires hub_model_id. Set it to user/name.")
        if self.push_to_hub and self.hub_strategy != "end":
            raise RecipeError(f"hub_strategy: must be end, got '{self.hub_strategy}'. hfvit pushes the finished run.")
        averages = [key for key in ("ema_decay", "swa_start") if getattr(self, key) is not None]
        is_schedule_free = _shown(self.optim).strip("'").startswith("schedule_free")
        if averages and is_schedule_free:  # both swap the weights in evaluations
            raise RecipeError(f"{averages[0]}: not available with schedule-free optimizers. Set it to null.")
        if self.fp16 and self.bf16:
            raise RecipeError("fp16, bf16: must not both be true. Omit one of them.")
        if self.eval_strategy == "no":
            if self.early_stopping_patience:
                raise RecipeError(
                    "early_stopping_patience: requires evaluations. Set eval_strategy to epoch or steps."
                )
            if self.lr_scheduler_type in BY_EVALUATION:
                raise RecipeError(
                    f"lr_scheduler_type: {self.lr_scheduler_type} requires evaluations. Set eval_strategy to epoch or"
                    " steps."
                )
        for key, config in (("fsdp", "fsdp"), ("ddp_backend", "multi_gpu")):
            if getattr(self, key) and "LOCAL_RANK" not in os.environ:
                raise RecipeError(
                    f"{key}: requires several processes, got one. Use accelerate launch --config_file"
                    f" accelerate_configs/{config}.yaml."
                )
        for key in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
            if getattr(self, key) and not self.dataloader_num_workers:
                raise RecipeError(f"{key}: requires worker processes. Set dataloader_num_workers to 1 or more.")
        if self.load_best_model_at_end and self.eval_strategy != "no":
            self._check_saves_the_best()
        if self.nan_policy == "rewind" and self.save_only_model:
            raise RecipeError("nan_policy: rewind requires complete checkpoints. Omit save_only_model.")
        if averages and self.save_only_model:
            raise RecipeError(f"save_only_model: not available with {averages[0]}, as checkpoints have both weights.")
        if len(averages) == 2:
            raise RecipeError("ema_decay, swa_start: must not both be set. Omit one of them.")
        if self.soup and (self.save_strategy == "no" or self.save_total_limit == 1):
            raise RecipeError(
                "soup: requires several checkpoints. Set save_strategy to epoch or steps, and save_total_limit to the"
                " number of checkpoints to average."
            )

    def _set_strategies(self) -> None:
        """Set the strategies of saving and selection that the recipe leaves open."""
        if self.save_strategy is None:
            self.save_strategy = "epoch" if self.eval_strategy == "no" else self.eval_strategy
            if self.eval_strategy == "steps":
                self.save_steps = self.eval_steps = self.eval_steps or self.logging_steps
        if self.eval_strategy == "no":
            self.load_best_model_at_end = False
        if self.metric_for_best_model and self.greater_is_better is None:
            self.greater_is_better = is_better_when_greater(self.metric_for_best_model)

    def _set_device_options(self) -> None:
        """Set `use_cpu`, `tf32` and `accelerator_config` for the devices of this process."""
        # The Trainer ignores the launcher's `use_cpu`, so that each process of a CPU launch would train separately
        # (transformers 5.23).
        self.use_cpu |= parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()

        if self.tf32 and not is_torch_tf32_available():
            raise RecipeError("tf32: requires an NVIDIA GPU from Ampere on. Omit it.")
        if not self.use_cpu:
            if self.tf32 is None:
                self.tf32 = is_torch_tf32_available()
            # Copies from pinned memory overlap with computation.
            self.accelerator_config = self.accelerator_config or {"non_blocking": self.dataloader_pin_memory}

    def _check_accelerator_config(self) -> None:
        """Raise `RecipeError` for options of accelerate that hfvit cannot honor."""
        accumulation = self.accelerator_config.gradient_accumulation_kwargs
        if accumulation is not None:
            with wrap_errors("accelerator_config", accumulation):
                GradientAccumulationPlugin(**{"num_steps": 1, **accumulation})
            if "num_steps" in accumulation:
                raise RecipeError(
                    "accelerator_config: gradient_accumulation_kwargs must not have num_steps, got"
                    f" {accumulation['num_steps']}. Set global_batch_size and per_device_train_batch_size."
                )
            # The Trainer adds num_steps to it.
            self.accelerator_config.gradient_accumulation_kwargs = dict(accumulation)
        if self.accelerator_config.dispatch_batches or self.accelerator_config.split_batches:
            raise RecipeError(
                "accelerator_config: dispatch_batches and split_batches are not available, as each process reads its"
                " own batches. Omit them."
            )
        if not self.accelerator_config.even_batches:
            raise RecipeError(
                "accelerator_config: even_batches must be true, as evaluation gathers the batches of all processes."
                " Omit it."
            )

    def _check_trackers(self) -> None:
        """Raise `RecipeError` for a tracker in `report_to` that is not installed."""
        available = get_available_reporting_integrations()
        for tracker in sorted(set(self.report_to) - set(available)):
            if tracker in TRACKER_EXTRAS:
                raise RecipeError(
                    f"report_to: not installed, got '{tracker}'. Install it with `pip install \"hfvit[{tracker}]\"`."
                )
            installed = ", ".join(available) or "none"
            raise RecipeError(f"report_to: must be an installed tracker (found: {installed}), got '{tracker}'.")

    def _check_saves_the_best(self) -> None:
        """Raise `RecipeError` if the checkpoint of the best evaluation might not be saved."""
        if self.save_strategy not in (None, "best", self.eval_strategy):
            raise RecipeError(
                f"save_strategy: must be eval_strategy ({self.eval_strategy}) or best with load_best_model_at_end, got"
                f" '{self.save_strategy}'. Omit save_strategy."
            )
        eval_steps = self.eval_steps or self.logging_steps
        if self.save_strategy == self.eval_strategy == "steps" and self.save_steps != eval_steps:
            raise RecipeError(
                f"save_steps: must be eval_steps ({eval_steps:g}) with load_best_model_at_end, got"
                f" {self.save_steps:g}. Omit save_strategy and save_steps."
            )

    def _check_optimizer(self) -> None:
        """Raise `RecipeError` if the optimizer or schedule cannot be created."""
        weight = torch.nn.Parameter(torch.zeros(4, 4))
        key = "optim_args" if self.optim_args else "optim"
        with wrap_errors(key, getattr(self, key)):
            create, options = optimizer_factory(self)
            optimizer = create([weight], **options)
            if has_fallback(self.optim):  # Muon checks its arguments in a step
                weight.grad = torch.zeros_like(weight)
                optimizer.step()
        self._check_schedule()
        key = "lr_scheduler_kwargs" if self.lr_scheduler_kwargs else "lr_scheduler_type"
        steps = self.max_steps if self.max_steps > 0 else 1000
        with wrap_errors(key, getattr(self, key)):
            get_scheduler(
                self.lr_scheduler_type,
                torch.optim.SGD([weight], lr=self.learning_rate),
                num_warmup_steps=self.get_warmup_steps(steps),
                num_training_steps=steps,
                scheduler_specific_kwargs=self.scheduler_options(steps),
            )

    def _check_schedule(self) -> None:
        """Raise `RecipeError` for schedule options that transformers would ignore."""
        options = self.scheduler_options(1000)
        if self.lr_scheduler_type == "warmup_stable_decay":
            if "num_decay_steps" not in options:
                raise RecipeError(
                    "lr_scheduler_type: warmup_stable_decay requires num_decay_steps. Set lr_scheduler_kwargs to"
                    " '{\"num_decay_steps\": 0.2}', a fraction of the run."
                )
            if "num_stable_steps" in options:
                raise RecipeError(
                    "lr_scheduler_kwargs: num_stable_steps is what warmup_steps and num_decay_steps leave of the run,"
                    f" got {options['num_stable_steps']}. Omit it."
                )
            stages = (self.warmup_steps, _as_number(self.lr_scheduler_kwargs["num_decay_steps"]))
            if self.max_steps > 0:
                self.check_stages(self.max_steps)
            elif max(stages) < 1:  # otherwise the number of steps is not known yet
                self.check_stages(1000)
        lowest = options.get("min_lr", 1e-3 if self.lr_scheduler_type == "greedy" else 0.0)
        if isinstance(lowest, int | float) and lowest >= self.learning_rate > 0:
            default = "" if "min_lr" in options else " (the schedule's default)"
            raise RecipeError(
                f"lr_scheduler_kwargs: min_lr must be below learning_rate ({self.learning_rate:g}), got"
                f" {lowest:g}{default}."
            )

    def check_stages(self, steps: int) -> None:
        """Raise `RecipeError` if warmup and decay are longer than `steps` steps."""
        if self.lr_scheduler_type != "warmup_stable_decay":
            return
        decay = self.scheduler_options(steps)["num_decay_steps"]
        left = steps - self.get_warmup_steps(steps)
        if decay > left:
            raise RecipeError(
                f"lr_scheduler_kwargs: num_decay_steps must be at most {left}, the {steps} steps of the run without"
                f" warmup, got {decay}."
            )


def is_better_when_greater(metric: str) -> bool:
    """Return whether a larger value of a metric is better."""
    return not metric.endswith(("loss", "ece"))


LIBRARY_ERRORS = (
    ValueError, TypeError, LookupError, ArithmeticError, NotImplementedError, ImportError, AssertionError
)  # fmt: skip


@contextmanager
def wrap_errors(key: str, value: Any) -> Iterator[None]:
    """Convert a library's error about a value to a `RecipeError` about option `key`."""
    try:
        yield
    except LIBRARY_ERRORS as error:
        raise RecipeError(f"{key}: cannot be used, got {_shown(value)}. {one_line(error)}") from None


def _read_mapping(key: str, value: Any) -> dict | None:
    """Read an option that is a mapping, JSON or, for some, the path of a JSON file.

    Raises:
        RecipeError: the value is none of them.
    """
    if not isinstance(value, str):
        return value if isinstance(value, dict) else None
    text = value
    if not value.startswith("{"):
        if key not in MAPPINGS_IN_FILES:
            raise RecipeError(f"{key}: must be a mapping, on the command line as JSON, got '{value}'.")
        if not os.path.isfile(value):
            raise RecipeError(f"{key}: must be a mapping (as JSON) or a JSON file, got '{value}'.")
        text = Path(value).read_text(encoding="utf-8", errors="replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{key}: not valid JSON ({one_line(error)}), got '{value}'.") from None
    if not isinstance(found, dict):
        raise RecipeError(f"{key}: must be a mapping, got '{value}'.")
    return found


def _as_number(value: Any) -> Any:
    """Convert the text of a number to a float."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _shown(value: Any) -> str:
    """Format a value as in a recipe."""
    value = getattr(value, "value", value)
    return f"'{value}'" if isinstance(value, str) else json.dumps(value, default=str)


def split_batch(global_batch_size: int, devices: int, per_device: int | None = None) -> tuple[int, int]:
    """Split a global batch over devices and accumulation steps.

    Args:
        global_batch_size: images per optimizer step.
        devices: number of processes.
        per_device: maximum number of images per forward pass; None for no limit.

    Returns:
        Images per device and forward pass, and accumulation steps.

    Raises:
        RecipeError: the batch is not divisible; the message has the nearest divisible value.
    """
    if global_batch_size % devices:
        down = global_batch_size - global_batch_size % devices
        works = f"{down} or {down + devices}" if down else devices
        raise RecipeError(
            f"global_batch_size: must be divisible by the number of devices ({devices}), got {global_batch_size}. Use"
            f" {works}."
        )
    device_batch = global_batch_size // devices
    per_device = min(per_device or device_batch, device_batch)
    if device_batch % per_device:
        nearest_size = max(size for size in range(1, per_device + 1) if device_batch % size == 0)
        raise RecipeError(
            f"per_device_train_batch_size: must divide the {device_batch} images per device (global_batch_size"
            f" {global_batch_size} on {devices} devices), got {per_device}. Use {nearest_size}."
        )
    return per_device, device_batch // per_device
