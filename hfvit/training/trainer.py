"""`HFViTTrainer`: Trainer with on-device augmentation and exact resume."""

import copy
import importlib.util
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from timm.data import resolve_data_config
from timm.utils import distribute_bn
from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import TrainOutput

from hfvit.artifacts.checkpoint import newest_checkpoint, step_of
from hfvit.artifacts.constants import STAGING, STATE_FILE
from hfvit.artifacts.run_sections import Soup
from hfvit.data.dataset import ImageDataset, check_labels, check_pixels, check_stream_labels, collate
from hfvit.data.evaluation_stream import EvaluationStream
from hfvit.data.factory import image_dataset
from hfvit.data.samplers import BalancedSampler, EpochSampler
from hfvit.data.stream import ImageStream, StreamEpochs, stream_loader
from hfvit.data.text import TEXT_INPUTS
from hfvit.errors import DataError, HFViTError, ModelError, RecipeError, one_line
from hfvit.metrics.task import task_of, trainer_metrics
from hfvit.models.attention import unfuse_slow_attention
from hfvit.models.patch_size import patch_size_callbacks
from hfvit.recipe.arguments import MULTI_LABEL
from hfvit.recipe.optimizers import has_fallback, is_timm_optimizer, optimizer_factory
from hfvit.recipe.training_args import HFViTTrainingArguments, wrap_errors
from hfvit.training.checkpointing import CheckpointWriter
from hfvit.training.ema import EmaCallback, SwaCallback, WeightAverage
from hfvit.training.losses import LOSSES
from hfvit.training.memory_format import StateLayout, use_channels_last
from hfvit.training.newton_schulz import avoid_slow_bfloat16
from hfvit.training.non_finite import NonFiniteLossMonitor, RewindRequest
from hfvit.training.out_of_memory import OutOfMemoryHandler, is_out_of_memory, out_of_memory_error
from hfvit.training.param_groups import build_param_groups, groups_beside
from hfvit.training.resume import ResumeState, describe_changes, is_over
from hfvit.training.soup import average_checkpoints
from hfvit.training.stream_evaluation import evaluate_stream
from hfvit.training.throughput import SpeedMeter, datasheet_rate, training_flops
from hfvit.training.workers import draw_base_seed, is_lost_worker, keep_workers_on_signals, start_worker
from hfvit.transforms.augmentation import Augmentation
from hfvit.transforms.mixup import BatchMixing
from hfvit.transforms.preprocessing import Preprocessing
from hfvit.utils.counter_rng import sample_seeds
from hfvit.utils.environment import check_shared_memory, return_freed_memory
from hfvit.utils.files import commit_file, temporary_file
from hfvit.utils.matmul import peak_rate, warn_if_slow

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SHOWN_IMAGES = 32  # in plots/training_images.png

# Private methods of `transformers.Trainer` that are overridden, as no callback, sampler or collator can do the work:
# name -> parameters in transformers 5.24.0. A test compares them with the installed version.
OVERRIDDEN_PRIVATE_METHODS = {
    "_prepare_inputs": ("inputs",),  # pixel values are computed on the device
    "_get_train_sampler": ("train_dataset",),  # EpochSampler, BalancedSampler
    "_save_checkpoint": ("model", "trial"),  # atomic checkpoints
    "_clip_grad_norm": ("model",),  # a skipped step has no gradient
    "_get_grad_norm": ("model", "grad_norm"),  # the norm of every step, not only of the logged ones
}
# Private attributes of `transformers.Trainer` that are read or set below, in the same version.
PRIVATE_ATTRIBUTES = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step")

# Arguments of `transformers.Trainer` that are not available -> what to do instead.
UNAVAILABLE = {
    "data_collator": "Data sets return batches: use train_transforms.",
    "preprocess_logits_for_metrics": "Metrics are computed from the logits: process them in compute_metrics.",
}


class HFViTTrainer(Trainer):
    """Train an image classifier with augmentation and preprocessing on the device.

    Checkpoints are atomic and resume exactly, batches that do not fit into memory are split, and `nan_policy` handles
    non-finite losses. With `ema_decay` or `swa_start`, evaluation and the final model use averaged weights;
    checkpoints have both. With `soup`, the final model may be the mean of several checkpoints.

    Args:
        model: a model of `hfvit.models`.
        args: `HFViTTrainingArguments`.
        train_dataset: data set of `datasets` with an image and a label column, or of `data.dataset` or `data.stream`.
        eval_dataset: as `train_dataset`, or a dict of them.
        compute_metrics: `EvalPrediction -> dict` of metrics in addition to hfvit's.
        train_transforms: replaces the augmentation of a `train_dataset` of `datasets`, see
            `data.transform_reader.TransformReader`.
        augmentation: augmentation of a `train_dataset` of `datasets`; random resized crop and flip by default.
        preprocessing: preprocessing of evaluation batches; that of the model's configuration by default.
        mixing: mixup, CutMix and random erasing of training batches.
        objective: training loss `(logits, labels, pixel_values, label_smoothing) -> loss`; cross-entropy by default,
            binary of a multi-label model.
        balanced: sample all classes equally often.
        progressive: callback that resizes training images, see `finetuning.progressive_resizing`.
        **kwargs: arguments of `transformers.Trainer`, but not `data_collator`, `model_init` and
            `preprocess_logits_for_metrics`.
            `compute_loss_func=(outputs, labels, num_items_in_batch) -> loss` replaces the training loss and returns a
            mean over its batch.

    Attributes:
        events: events of the training (`out_of_memory`, `rewind`, `loss_spike`) as JSON values.
        speed: throughput of the training steps.
        trained_parameters: number of trainable parameters.
        soup: members and scores of the soup after `train`, None without.
        origin: recipe and data of the run as JSON values, saved in checkpoints to detect changes on resume.

    Raises:
        RecipeError: the model, its weights or a stream do not support an option.
        TypeError: a data set or another argument is of another type, or not available.
        ValueError: the optimizer is that of another model.
        DataError: a data set has no images or a transform; the training set is smaller than a batch, or has one class
            only.
    """

    # compute_loss returns a mean over its images, and the Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model,
        args,
        *,
        train_dataset=None,
        eval_dataset=None,
        compute_metrics: Callable | None = None,
        train_transforms: Callable | None = None,
        augmentation: Augmentation | None = None,
        preprocessing: Preprocessing | None = None,
        mixing: BatchMixing | None = None,
        objective: nn.Module | None = None,
        balanced: bool = False,
        progressive: TrainerCallback | None = None,
        **kwargs,
    ):
        _check_arguments(model, args, kwargs)
        parts = {
            "augmentation": (augmentation, Augmentation),
            "preprocessing": (preprocessing, Preprocessing),
            "mixing": (mixing, BatchMixing),
            "objective": (objective, nn.Module),
            "progressive": (progressive, TrainerCallback),
        }
        for option, (part, kind) in parts.items():
            if not isinstance(part, kind | None):
                raise TypeError(f"{option}: must be of type {kind.__name__}, got {part!r}.")
        functions = {"compute_metrics": compute_metrics, "train_transforms": train_transforms}
        check_functions(functions | {"compute_loss_func": kwargs.get("compute_loss_func")})
        data_config = resolve_data_config(model.config.pretrained_cfg)
        labels = model.config.label_names
        evaluation_set = partial(image_dataset, labels=labels, data_config=data_config)
        if isinstance(train_dataset, Dataset):
            augmentation = augmentation or Augmentation.from_config(data_config)
            train_dataset = image_dataset(
                train_dataset, labels, data_config, "train", augmentation, args.seed, train_transforms
            )
        _check_dataset("train_dataset", train_dataset, ImageStream)
        if isinstance(eval_dataset, dict) and not eval_dataset:
            raise DataError("eval_dataset: must have at least one data set, got {}. Pass None to evaluate none.")
        splits = eval_dataset if isinstance(eval_dataset, dict) else {"validation": eval_dataset}
        splits = {
            name: evaluation_set(split, name=name) if isinstance(split, Dataset) else split
            for name, split in splits.items()
        }
        for split in splits.values():
            _check_dataset("eval_dataset", split, EvaluationStream, optional=not isinstance(eval_dataset, dict))
        eval_dataset = splits if isinstance(eval_dataset, dict) else splits["validation"]
        super().__init__(
            model,
            args,
            collate,
            train_dataset,
            eval_dataset,
            compute_metrics=trainer_metrics(
                task_of(model.config), labels, compute_metrics, args.metric_for_best_model
            ),
            **kwargs,
        )
        self._evaluation_set = evaluation_set
        self.task = task_of(model.config)
        self.losses = LOSSES[self.task.problem_type]
        self._fit_metric()
        # compute_loss is a plain mean, without counting labels over accumulation steps and processes.
        self.model_accepts_loss_kwargs = False
        self.is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.is_sharded:
            streams = any(isinstance(split, EvaluationStream) for split in splits.values())
            check_sharding(self.args, streams, is_fsdp2=self.accelerator.is_fsdp2)
        self._count_trained_parameters()
        if preprocessing is None:
            preprocessing = Preprocessing(data_config)
        self.preprocessing = preprocessing.to(self.args.device)
        self.mixing = mixing
        self.balanced = balanced
        self.progressive = progressive
        self.objective = objective and objective.to(self.args.device)
        self._check_options()
        for module in filter(None, (self.model, self.objective)):
            if self.args.channels_last:
                use_channels_last(module)
            unfuse_slow_attention(module, self.args.device, self._compute_dtype)
        self.augmentation = None
        self._loaders: list[DataLoader] = []
        self._stream_loaders: dict[int, DataLoader] = {}
        self._is_stream = isinstance(self.train_dataset, ImageStream)
        self._first_batch_checked = False
        if self.train_dataset is not None:
            self._check_training_set()
            # A copy, as data loader workers must not receive tensors on a GPU.
            self.augmentation = copy.copy(self.train_dataset.augmentation).to(self.args.device)
        self.events: list[dict[str, Any]] = []
        self.origin: dict[str, Any] = {}
        self.soup: Soup | None = None
        self.resumed_from: str | None = None
        self.resume_state: ResumeState | None = None
        self._add_parts()

    def _fit_metric(self) -> None:
        """Check metric_for_best_model.

        With several evaluation splits, their names precede those of the metrics, and the first one is the default.
        """
        metrics, default = (*self.task.scalar_metrics, *self.task.ranking_metrics), self.task.default_metric
        if isinstance(self.eval_dataset, dict):
            first = next(iter(self.eval_dataset))
            if self.args.metric_for_best_model in metrics:
                self.args.metric_for_best_model = f"{first}_{self.args.metric_for_best_model}"
            metrics = [f"{name}_{metric}" for name in self.eval_dataset for metric in metrics]
            default = f"{first}_{default}"
        self.args.fit_metric(metrics, default)

    def _check_options(self) -> None:
        """Raise `RecipeError` for options that model, loss or data do not support."""
        if self.args.activation_checkpointing and not self.model.supports_gradient_checkpointing:
            kind = type(getattr(self.model, "timm_model", self.model)).__name__
            with_text = " with a text encoder" if hasattr(self.model, "text_model") else ""
            raise RecipeError(f"activation_checkpointing: not available for {kind}{with_text}. Set it to false.")
        check_determinism(self.args, self.model, self.progressive)
        if self.args.soup and (self.eval_dataset is None or isinstance(self.eval_dataset, dict)):
            raise RecipeError("soup: requires one eval_dataset, which selects the weights. Pass it, or omit soup.")
        replaced = {
            "label_smoothing_factor": self.args.label_smoothing_factor,
            "objective (teacher, class_balance or multi_label_loss)": self.objective,
        }
        for option, value in replaced.items():
            if self.compute_loss_func and value:
                raise RecipeError(f"compute_loss_func: not available with {option}, which it would replace. Omit one.")

    def _add_parts(self) -> None:
        """Create the trainer's callbacks and add them in the order in which they must run."""
        self.speed = SpeedMeter(self.args.device)
        self.out_of_memory = OutOfMemoryHandler(self, self._forward_backward)
        self.out_of_memory.micro.even = bool(self.mixing and self.mixing.mixup)
        self.checkpoints = CheckpointWriter(self)
        self.non_finite = NonFiniteLossMonitor(self)
        self.weight_average = self._new_average()
        epochs = StreamEpochs(self.train_dataset.images) if self._is_stream else SamplerEpochs(self)
        early_stopping = None
        if self.args.early_stopping_patience:
            early_stopping = EarlyStoppingCallback(self.args.early_stopping_patience)
        # `non_finite` must check a step before `checkpoints` saves it.
        parts = [] if self.is_sharded else [FastZeroGrad(self), StateLayout()]
        parts += [self.weight_average, self.progressive, epochs, early_stopping]
        parts += [self.speed, self.non_finite, self.checkpoints]
        for part in parts:
            if part is not None:
                self.add_callback(part)

    def _new_average(self) -> WeightAverage | None:
        """Create the average of the weights, None without EMA and SWA."""
        if self.args.ema_decay:
            return EmaCallback(self.model, self.args.ema_decay)
        if self.args.swa_start is not None:
            return SwaCallback(self.model, self.args.swa_start)
        return None

    def _check_training_set(self) -> None:
        if self._is_stream:
            self.args.ignore_data_skip = True  # a stream continues at its saved position
            if self.mixing and self.mixing.off_epochs and self.train_dataset.images is None:
                raise RecipeError(
                    "mix_off_epochs: requires the length of the stream. Set it to 0, or add num_examples of the split"
                    " to the data set's card (dataset_info: splits)."
                )
            return
        rows = len(self.train_dataset)
        if rows < self.args.global_batch_size:
            raise DataError(
                f"global_batch_size: must be at most {rows}, the number of training images, got"
                f" {self.args.global_batch_size}."
            )
        if (self.train_dataset.labels.ndim > 1) != (self.task.problem_type == MULTI_LABEL):
            raise ModelError(
                f"problem_type: the model has {self.task.problem_type}, but the training labels have another type."
                " Set problem_type in the model's configuration."
            )
        check_labels(self.train_dataset.labels, self.class_names)

    @property
    def class_names(self) -> list[str]:
        """Return class names in the order of the logits."""
        return self.accelerator.unwrap_model(self.model).config.label_names

    # ---- State that the trainer's parts share ----

    def add_event(self, event: str, **values) -> None:
        """Append to `events`; values must be JSON values."""
        self.events.append({"event": event, **values})

    @property
    def last_checkpoint(self) -> str | None:
        """Return the last checkpoint that was written or resumed from."""
        return self.checkpoints.last

    @property
    def resumed_at_step(self) -> int:
        """Return the step that the last call of `train` resumed from, 0 for a new run."""
        return getattr(self, "_initial_global_step", 0)

    @property
    def unlogged_loss(self) -> torch.Tensor:
        """Return the sum of this process's losses since `logged_step`, on the device."""
        return self._tr_loss

    @unlogged_loss.setter
    def unlogged_loss(self, value: torch.Tensor) -> None:
        self._tr_loss = value

    @property
    def logged_step(self) -> int:
        """Return the last step with a logged loss."""
        return self._globalstep_last_logged

    @property
    def logged_loss(self) -> float:
        """Return the sum of the losses of all steps up to `logged_step`."""
        return self._total_loss_scalar

    def restore_loss(self, state: ResumeState) -> None:
        """Restore the loss sums of a checkpoint."""
        unlogged = state.loss_of(self.args.process_index, self.args.world_size)
        self._tr_loss = torch.full_like(self._tr_loss, unlogged)
        self._total_loss_scalar = state.logged_loss
        self._globalstep_last_logged = state.logged_step

    # ---- Input ----

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self.prepare_batch(inputs)

    def prepare_batch(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device and compute its pixel values there.

        Returns:
            `pixel_values` (batch, 3, height, width), `labels` (class ids, or probabilities after mixing), and the
            tokens of a text column.
        """
        # The Trainer's method would, under DeepSpeed, round every float tensor, also the augmentation parameters.
        inputs = send_to_device(inputs, self.args.device, non_blocking=self.accelerator.non_blocking)
        plan = inputs.get("plan")
        texts = {key: inputs[key] for key in TEXT_INPUTS if key in inputs}
        with torch.no_grad():
            if plan is None:
                return {"pixel_values": self.preprocessing(inputs), "labels": inputs["labels"], **texts}
            if "pixel_values" in inputs:  # computed by train_transforms
                pixel_values = inputs["pixel_values"]
            else:
                # Autocast would round the pixels to the same type in the first layer.
                pixel_values = self.augmentation(inputs, self._compute_dtype)
            labels = inputs["labels"]
            if self._has_begun and not self._first_batch_checked:
                self._check_first_batch(pixel_values, labels)
            if self.mixing and not self._mixing_is_over():
                pixel_values, labels = self.mixing(pixel_values, labels, plan["seeds"])
            if self.progressive and self.out_of_memory.is_fitted:
                pixel_values = self.progressive(pixel_values, self.state)
            elif self.progressive:
                pixel_values = self.progressive.largest(pixel_values)
        return {"pixel_values": pixel_values, "labels": labels, **texts}

    def _check_first_batch(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> None:
        self._first_batch_checked = True
        check_pixels(pixel_values)
        if self._is_stream:
            check_stream_labels(labels, self.class_names, self.train_dataset.repeats)

    def training_images(self, count: int = SHOWN_IMAGES) -> tuple[np.ndarray, np.ndarray]:
        """Return augmented training images and their targets.

        Args:
            count: maximum number of images.

        Returns:
            Images (images, height, width, 3) uint8, and class ids (images,), or probabilities (images, classes) after
            mixing.
        """
        batch = self.prepare_batch(self.train_dataset.preview(count))
        levels = batch["pixel_values"].float() * self.augmentation.std + self.augmentation.mean
        images = levels.clamp(0, 255).round().byte().permute(0, 2, 3, 1)
        return images.cpu().numpy(), batch["labels"].cpu().numpy()

    @property
    def _has_begun(self) -> bool:
        return self.state.max_steps > 0

    def _mixing_is_over(self) -> bool:
        steps_per_epoch = (self.train_dataset.images or 0) // self.args.global_batch_size
        first_step = self.state.max_steps - self.mixing.off_epochs * steps_per_epoch
        return self._has_begun and self.state.global_step >= first_step

    @property
    def _compute_dtype(self) -> torch.dtype:
        """Return the type of matrix products."""
        return AUTOCAST_DTYPES.get(self.args.mixed_precision, torch.float32)

    def get_train_dataloader(self) -> DataLoader:
        if not self._is_stream:
            return self._kept(super().get_train_dataloader())
        return self._stream_loader(self.train_dataset)

    def _stream_loader(self, stream: ImageStream | EvaluationStream, **options) -> DataLoader:
        args = self.args
        return stream_loader(
            stream,
            args.dataloader_num_workers,
            args.device,
            non_blocking=self.accelerator.non_blocking,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            worker_init_fn=partial(start_worker, None),
            **options,
        )

    def _evaluation_stream_loader(self, stream: EvaluationStream) -> DataLoader:
        if id(stream) not in self._stream_loaders:
            persistent = self.args.dataloader_persistent_workers and self.args.dataloader_num_workers > 0
            self._stream_loaders[id(stream)] = self._kept(self._stream_loader(stream, persistent_workers=persistent))
        return self._stream_loaders[id(stream)]

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        if isinstance(eval_dataset, Dataset):
            eval_dataset = self._evaluation_set(eval_dataset, name="validation")
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, str):
            chosen = self.eval_dataset[chosen]
        if isinstance(chosen, EvaluationStream):
            return self._evaluation_stream_loader(chosen)
        _check_returns_batches("eval_dataset", chosen)
        if eval_dataset is None or eval_dataset is self.eval_dataset or isinstance(eval_dataset, str):
            return self._kept(super().get_eval_dataloader(eval_dataset))
        # With persistent workers the Trainer would return the loader of its own data set (transformers 5.24).
        return self.get_test_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        if isinstance(test_dataset, Dataset):
            test_dataset = self._evaluation_set(test_dataset, name="test")
        if isinstance(test_dataset, EvaluationStream):
            return self._evaluation_stream_loader(test_dataset)
        _check_returns_batches("test_dataset", test_dataset)
        return self._kept(super().get_test_dataloader(test_dataset))

    def _kept(self, loader: DataLoader) -> DataLoader:
        if self.args.dataloader_persistent_workers and all(loader is not other for other in self._loaders):
            self._loaders.append(loader)
        return keep_workers_on_signals(loader)

    @contextmanager
    def _cleaned_up(self):
        """Stop persistent workers, and restore the model's `zero_grad`, at the end."""
        try:
            yield
        finally:
            self.stop_workers()
            vars(self.model_wrapped).pop("zero_grad", None)  # of `FastZeroGrad`, also after an error

    def stop_workers(self) -> None:
        """Stop persistent data loader workers; the next iteration starts them again."""
        for loader in self._loaders:
            getattr(loader, "base_dataloader", loader)._iterator = None  # accelerate's wrapper

    def _get_train_sampler(self, train_dataset=None) -> EpochSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        options = {"seed": self.args.order_seed, "repeats": dataset.repeats}
        if self.balanced:
            self.sampler = BalancedSampler(dataset.labels, self.args.global_batch_size, **options)
        else:
            self.sampler = EpochSampler(len(dataset), self.args.global_batch_size, **options)
        return self.sampler

    def get_batch_samples(self, *args, **kwargs):
        with self.speed.waiting():
            batches, items = super().get_batch_samples(*args, **kwargs)
        if self._is_stream:
            for batch in batches:
                self.train_dataset.take_position(batch)
            if self.resumed_from and not self.checkpoints.is_restored:  # starting the loader has used random numbers
                self._load_rng_state(self.resumed_from)
        self.out_of_memory.begin_step(batches)
        return batches, items

    # ---- Optimization ----

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
        """Return the optimizer's class, or timm's factory, and its options."""
        return optimizer_factory(args, model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer with timm's weight decay and layer-wise learning rates."""
        if self.optimizer is None:
            model = self.model if model is None else model
            create, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
            plain = self.accelerator.unwrap_model(model)
            rates = options.get("lr", self.args.learning_rate), options.get("weight_decay", self.args.weight_decay)
            fallback = has_fallback(self.args.optim) and not self.optimizer_cls_and_kwargs
            groups = groups_beside(plain, plain.timm_model, *rates, with_fallback=fallback)
            groups += build_param_groups(
                plain.timm_model, *rates, layer_decay=self.args.layer_decay, with_fallback=fallback
            )
            with wrap_errors("optim", self.args.optim):
                self.optimizer = create(groups, **options)
            if fallback:
                avoid_slow_bfloat16(self.optimizer, self.args.device)
            for group in self.optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])  # as most schedules do
            self.own_groups = [{**group, "params": None} for group in self.optimizer.param_groups]
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, *args, **kwargs) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the learning rate schedule.

        Args:
            num_training_steps: optimizer steps of the run.
            *args: arguments of `transformers.Trainer.create_scheduler`.
            **kwargs: arguments of `transformers.Trainer.create_scheduler`.

        Raises:
            RecipeError: the schedule cannot be created, or its stages are longer than the run.
        """
        self.args.check_stages(num_training_steps)
        given = self.args.lr_scheduler_kwargs
        self.args.lr_scheduler_kwargs = self.args.scheduler_options(num_training_steps)
        try:
            with wrap_errors("lr_scheduler_type", self.args.lr_scheduler_type):
                scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        finally:
            self.args.lr_scheduler_kwargs = given
        with wrap_errors("lr_scheduler_kwargs", given):
            check_factors(scheduler, num_training_steps)
        return scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss outside the model, which treats soft labels as multi-label.

        Args:
            model: the model.
            inputs: batch of `prepare_batch`.
            return_outputs: return the model's outputs too.
            num_items_in_batch: passed to `compute_loss_func`.
        """
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        if self.args.eval_tta and not model.training:
            mirrored = model(**inputs | {"pixel_values": inputs["pixel_values"].flip(-1)})
            outputs.logits = (outputs.logits + mirrored.logits) / 2
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        if self.compute_loss_func:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        elif self.objective and model.training:
            loss = self.objective(outputs.logits, labels, inputs["pixel_values"], smoothing)
        else:
            loss = self.losses.labels(outputs.logits, labels, smoothing)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        """Run a training step, unless a rewind skips it.

        Args:
            model: the model.
            inputs: batch of the data loader.
            num_items_in_batch: unused.
        """
        if self.speed.images == 0:
            self.speed.start()  # not earlier, to exclude preparations and skipped batches
        if self.non_finite.skips_step():
            loss = self.non_finite.skipped_loss()
        else:
            loss = self.out_of_memory.training_step(model, inputs)
        self.speed.images += self.args.per_device_train_batch_size * self.args.world_size
        return loss

    def _forward_backward(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        # `Trainer.training_step` visits all modules in each step to set their mode.
        if not (model.training and self.model.training):
            model.train()
        if hasattr(self.optimizer, "train"):  # schedule-free optimizers
            self.optimizer.train()
        inputs = self._prepare_inputs(batch)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        del inputs
        every = self.args.torch_empty_cache_steps
        if every and self.state.global_step % every == 0:
            clear_device_cache()
        loss = loss / self.current_gradient_accumulation_steps
        # DeepSpeed would divide by the accumulation steps again.
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))
        loss = loss.detach()
        self.non_finite.losses.add(loss)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        if self.non_finite.skips_step():
            return torch.zeros((), device=self.args.device)
        return self._clipped(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        if self.non_finite.skips_step():
            norm = torch.zeros((), device=self.args.device)
        else:
            norm = self._clipped(model, math.inf) if grad_norm is None else grad_norm
            norm = super()._get_grad_norm(model, norm)
        self.non_finite.grad_norm = norm
        return norm

    def _clipped(self, model: nn.Module, max_norm: float) -> torch.Tensor:
        """Clip the gradients, and return their norm before."""
        if self.is_sharded:
            return self.accelerator.clip_grad_norm_(model.parameters(), max_norm)
        # accelerate's method lists all parameters three times.
        self.accelerator.unscale_gradients()
        return nn.utils.clip_grad_norm_(self.trained, max_norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return int(self.speed.flops_per_image or 0) * len(inputs["labels"])

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log values, with the throughput since the last log beside a training loss."""
        if "loss" in logs:
            logs |= self.speed.since_last()
        if "train_loss" in logs:  # over all steps, including those before a resume
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, *args, **kwargs)

    # ---- Evaluation ----

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Evaluate, without counting the time as training."""
        with self.speed.paused():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Evaluate with the averaged weights if there are any.

        Args:
            dataloader: data loader of the evaluation split.
            description: title for the log.
            prediction_loss_only: return no predictions; not used for a stream.
            ignore_keys: outputs of the model to ignore.
            metric_key_prefix: prefix of the metrics.
        """
        draw_base_seed(dataloader)
        averaged = self.weight_average.applied_to(self.model) if self.weight_average else nullcontext()
        is_whole = not (self.is_in_train or self.is_sharded)
        converted = _full_evaluation(self.model, self.args) if is_whole else nullcontext()
        try:
            with averaged:
                self._share_batch_norm()
                with converted:
                    if isinstance(getattr(dataloader, "dataset", None), EvaluationStream):
                        return evaluate_stream(self, dataloader, ignore_keys, metric_key_prefix)
                    return super().evaluation_loop(
                        dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                    )
        finally:
            if not self.is_in_train:
                self.stop_workers()

    def _share_batch_norm(self) -> None:
        """Copy the main process's batch norm statistics, which it saves, to all.

        DistributedDataParallel copies them before a training step, in which each process changes its own.
        """
        if self.args.world_size > 1:
            distribute_bn(self.model, self.args.world_size)

    def prediction_step(self, model: nn.Module, inputs, prediction_loss_only: bool, ignore_keys=None):
        """Predict a batch, in micro-batches if it does not fit into memory.

        Args:
            model: the model.
            inputs: batch of the data loader.
            prediction_loss_only: return None for logits and labels.
            ignore_keys: outputs of the model to ignore.
        """

        def predict(batch):
            return super(HFViTTrainer, self).prediction_step(model, batch, prediction_loss_only, ignore_keys)

        return self.out_of_memory.predict(predict, inputs, prediction_loss_only)

    # ---- Training and checkpoints ----

    def hyperparameter_search(self, *args, **kwargs):
        """Raise `RecipeError`, as each trial needs its own model and data sets."""
        raise RecipeError("hyperparameter_search: not available in HFViTTrainer. Use `hfvit sweep`.")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """Train, and load the best checkpoint or the averaged weights at the end.

        Args:
            resume_from_checkpoint: checkpoint folder, or True for the newest complete one in `output_dir`.
            *args: arguments of `transformers.Trainer.train`.
            **kwargs: arguments of `transformers.Trainer.train`.

        Raises:
            RecipeError: there is no checkpoint to resume from.
            NonFiniteLossError: the loss is NaN or infinite.
            ModelError: the model has no parameter to train, or the checkpoint cannot be loaded.
            OutOfMemoryError: a single image does not fit into memory.
            StorageError: a checkpoint cannot be written.
            InterruptedRunError: the run was stopped by a signal and saved.
        """
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        if self.weight_average is None and (average := self._new_average()):  # a second training
            self.weight_average = average
            self.add_callback(average)
        evaluates_first = self.args.eval_on_start
        check_shared_memory(self.args.dataloader_num_workers)
        _remember_missing_lomo()
        self._count_trained_parameters()
        if not self.trained:
            raise ModelError("model: all parameters are frozen. Set requires_grad of those to train.")
        self._measure_device()
        return_freed_memory()
        with self.checkpoints.signals.handled(), self._cleaned_up():
            while True:
                self._begin(checkpoint)
                self.args.eval_on_start = evaluates_first and not (checkpoint and step_of(Path(checkpoint)))
                try:
                    output = super().train(checkpoint, *args, **kwargs)
                    self.non_finite.check()
                    break
                except RewindRequest as request:
                    step = request.step
                except (HFViTError, MemoryError):
                    raise
                except Exception as error:
                    if is_lost_worker(error, self.args.dataloader_num_workers):
                        # Without the traceback the loader is deleted; torch reports its dead worker until then.
                        raise self.checkpoints.lost_worker_error(error.with_traceback(None)) from None
                    if is_out_of_memory(error):
                        self._raise_out_of_memory()
                    if self.checkpoints.is_restored:
                        raise
                    raise self._not_loaded_error(checkpoint, error) from error
                finally:
                    self.args.eval_on_start = evaluates_first
                checkpoint = self.non_finite.rewind(step)
        averaged_file = self.weight_average and self.weight_average.file
        self._use_average()
        if self.args.soup:
            self.soup = average_checkpoints(self, self.args.soup, averaged_file)
        return output

    def _not_loaded_error(self, checkpoint: str, error: Exception) -> ModelError:
        """Create the error for a checkpoint that cannot be resumed from."""
        before = self.resume_state.origin if self.resume_state else {}
        changes = describe_changes(before, self.origin) if before and self.origin else []
        changed = f" ({'; '.join(changes)})" if changes else ""
        return ModelError(
            f"resume_from_checkpoint: {checkpoint} cannot be loaded ({type(error).__name__}: {one_line(error)[:300]})."
            f" It is damaged, or of a run with other options{changed}. Start a new run in another output_dir."
        )

    def _use_average(self) -> None:
        """Copy the averaged weights, or those of the best checkpoint, to the model."""
        if not self.weight_average:
            return
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self.weight_average.load(self.state.best_model_checkpoint)
        self.weight_average.copy_to(self.model)
        self.remove_callback(self.weight_average)
        self.weight_average = None

    def _raise_out_of_memory(self) -> None:
        """Raise `OutOfMemoryError` where a smaller batch does not help."""
        raise out_of_memory_error(
            self.model,
            self.args.device,
            self.out_of_memory.micro.size,
            "It ran out outside forward and backward pass, where a smaller batch does not help: in the optimizer's"
            " state or the averaged weights. Set optim: sgd or finetuning: lora, or omit ema_decay and swa_start.",
            "the optimizer's step",
        ) from None

    def _checkpoint_to_resume(self, resume: str | bool | None) -> str | None:
        if resume is not True:
            return str(resume) if resume else None
        newest = newest_checkpoint(self.args.output_dir)
        if newest is None:
            raise RecipeError(f"resume_from_checkpoint: no complete checkpoint in {self.args.output_dir}.")
        return str(newest)

    def _begin(self, checkpoint: str | None) -> None:
        """Restore events and batch sizes of `checkpoint`; None starts a new run."""
        self.resumed_from = checkpoint
        self.checkpoints.last = checkpoint
        self.checkpoints.is_restored = checkpoint is None
        self.resume_state = ResumeState.load(checkpoint) if checkpoint else None
        self._seed_process(step_of(Path(checkpoint)) if checkpoint else 0)
        if self._is_stream and checkpoint is None:
            self.train_dataset.restart()
        if self.resume_state:
            self.events = self.events or self.resume_state.events  # after a rewind, `events` is newer
            self.out_of_memory.resume(self.resume_state)

    def _seed_process(self, step: int) -> None:
        """Seed dropout and stochastic depth differently in each process, as in timm.

        A resumed run then reads the generators of its processes, unless their number has changed.

        Args:
            step: step that the training begins after.
        """
        if step or self.args.process_index:
            [seed] = sample_seeds(self.args.seed, step, np.array([self.args.process_index]))
            set_seed(int(seed % 2**32))

    def _count_trained_parameters(self) -> None:
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.trained_parameters = sum(parameter.numel() for parameter in self.trained)

    def _measure_device(self) -> None:
        """Measure the FLOPs of the model and the peak of the device, for `mfu`."""
        # Undefined for images of several sizes.
        self.speed.flops_per_image = None if self.progressive else training_flops(self.model)
        rate = peak_rate(self.args.device, self._compute_dtype, self.args.tf32)
        self.speed.peak_flops = rate * self.args.world_size
        if self.is_world_process_zero():
            warn_if_slow(self.args.mixed_precision, self.args.device, self._compute_dtype)
        stated = datasheet_rate(self.args.device, self._compute_dtype)
        self.speed.datasheet_flops = stated and stated * self.args.world_size

    def set_initial_training_values(self, args, dataloader):
        """Set zero epochs if the checkpoint is the end of its run.

        Args:
            args: training arguments.
            dataloader: training data loader.
        """
        epochs, self.steps_per_epoch, *rest, max_steps = super().set_initial_training_values(args, dataloader)
        self.num_train_epochs = epochs
        if self.resumed_from and is_over(self.resumed_from, max_steps, self._patience):
            epochs = 0
        return epochs, self.steps_per_epoch, *rest, max_steps

    @property
    def _patience(self) -> int | None:
        """Return the patience of early stopping, None without it."""
        if self.args.early_stopping_patience:
            return self.args.early_stopping_patience
        callbacks = self.callback_handler.callbacks  # also of a caller
        stopping = [callback for callback in callbacks if isinstance(callback, EarlyStoppingCallback)]
        return stopping[0].early_stopping_patience if stopping else None

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the current step; must be called by every process."""
        self._save_checkpoint(self.model, None)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        with self.speed.paused():
            self.non_finite.check()
            self.checkpoints.write(partial(super()._save_checkpoint, model, trial))

    def gather_stream_states(self) -> list[dict[str, Any]]:
        """Return the position of each process in a stream.

        Must be called by every process.
        """
        return gather_object([self.train_dataset.state()]) if self._is_stream else []

    def save_extra_state(self, checkpoint: Path, stream_states: list[dict[str, Any]]) -> None:
        """Save the averaged weights, and the positions of `gather_stream_states`."""
        if self.weight_average:
            self.weight_average.save(checkpoint)
        if self._is_stream:
            self.train_dataset.save_state(checkpoint, self.args.dataloader_num_workers, stream_states)

    def load_extra_state(self, checkpoint: str) -> None:
        """Load the state of `save_extra_state`."""
        if self._is_stream:
            self.train_dataset.load_state(checkpoint, self.args.dataloader_num_workers)
        if self.weight_average:
            self.weight_average.load(checkpoint)

    def save_model(self, output_dir: str | None = None, *args, **kwargs) -> None:
        """Save the model to a staging directory, then sync and rename each file."""
        folder = Path(output_dir or self.args.output_dir)
        if folder.parent.name == STAGING:  # the checkpoint is renamed as one folder
            self._save_files(folder, *args, **kwargs)
            return
        staging = folder / STAGING
        with self.checkpoints.storage_errors(folder):
            try:
                self._save_files(staging, *args, **kwargs)
                if self.args.should_save and staging.is_dir():
                    for file in sorted(path for path in staging.iterdir() if path.is_file()):
                        commit_file(file, folder / file.name)
            finally:
                if self.args.should_save:
                    shutil.rmtree(staging, ignore_errors=True)

    def _save_files(self, folder: Path, *args, **kwargs) -> None:
        super().save_model(str(folder), *args, **kwargs)
        if self.args.should_save:
            # An unused pickle of the arguments.
            (folder / "training_args.bin").unlink(missing_ok=True)

    def save_state(self) -> None:
        """Save `trainer_state.json` in `output_dir`."""
        if self.args.should_save:
            with temporary_file(Path(self.args.output_dir) / STATE_FILE) as file:
                self.state.save_to_json(str(file))


def _check_arguments(model, args, kwargs: dict[str, Any]) -> None:
    """Check arguments of the stock Trainer, and remove those that are not available.

    Args:
        model: model of the trainer.
        args: training arguments.
        kwargs: further arguments.

    Raises:
        TypeError: an argument is not available, or of another type.
        ValueError: the optimizer is that of another model.
    """
    for option, advice in UNAVAILABLE.items():
        if kwargs.pop(option, None) is not None:
            raise TypeError(f"{option}: not available in HFViTTrainer. {advice}")
    if kwargs.get("model_init") is not None or not hasattr(getattr(model, "config", None), "pretrained_cfg"):
        raise TypeError(
            f"model: must be a model of hfvit.models, got {type(model).__name__}. Pass"
            " HFViTForImageClassification.from_pretrained(..., labels=[...]); model_init is not available."
        )
    if hasattr(model, "_orig_mod"):  # a checkpoint's names of weights are those of the model itself
        raise TypeError("model: must not be compiled. Pass the model itself, and torch_compile=True in args.")
    if not isinstance(args, HFViTTrainingArguments):
        raise TypeError(f"args: must be HFViTTrainingArguments, got {type(args).__name__}.")
    if "callbacks" in kwargs:
        kwargs["callbacks"] = checked_callbacks(kwargs["callbacks"])
    if "optimizers" in kwargs:
        _check_optimizers(model, kwargs["optimizers"])


def _check_optimizers(model: nn.Module, optimizers: Any) -> None:
    """Check the optimizer and the schedule of a user.

    Args:
        model: model of the trainer.
        optimizers: pair of an optimizer and a schedule, either of which may be None.

    Raises:
        TypeError: not such a pair.
        ValueError: the optimizer has no parameter of the model, which it would not train.
    """
    is_pair = isinstance(optimizers, tuple | list) and len(optimizers) == 2
    optimizer, schedule = optimizers if is_pair else (None, None)
    # Schedules have no common class: transformers' GreedyLR is no LRScheduler (5.24).
    is_schedule = schedule is None or hasattr(schedule, "get_last_lr")
    if not is_pair or not isinstance(optimizer, torch.optim.Optimizer | None) or not is_schedule:
        raise TypeError(f"optimizers: must be (optimizer, schedule or None), got {optimizers!r}.")
    if optimizer is None:
        return
    parameters = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in parameters for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError("optimizers: has no parameter of this model. Create the optimizer after the model.")


def check_functions(functions: dict[str, Any]) -> None:
    """Raise `TypeError` for an argument that is neither a function nor None."""
    for option, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{option}: must be a function, got {function!r}.")


def checked_callbacks(callbacks: Iterable[Any] | None) -> list[Any]:
    """Return a list of callbacks.

    Raises `TypeError` unless all are instances or classes of `TrainerCallback`.
    """
    found = [] if callbacks is None else list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
    for callback in found:
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise TypeError(f"callbacks: must be instances of TrainerCallback, got {callback!r}.")
    return found


@contextmanager
def _full_evaluation(model: nn.Module, args: HFViTTrainingArguments) -> Iterator[None]:
    """Convert the weights for `fp16_full_eval` or `bf16_full_eval`, and restore them.

    `Trainer.evaluation_loop` does not restore them, and the run would save the converted ones (transformers 5.24).
    """
    if not (args.fp16_full_eval or args.bf16_full_eval):
        yield
        return
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [(module, *named) for module in model.modules() for named in module.named_buffers(recurse=False)]
    model.to(dtype=torch.float16 if args.fp16_full_eval else torch.bfloat16, device=args.device)
    try:
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data.to(args.device)
        for module, name, buffer in buffers:
            setattr(module, name, buffer.to(args.device))


def _remember_missing_lomo() -> None:
    """Mark `lomo_optim` as missing.

    Otherwise accelerate searches the disk for it twice in each step (accelerate 1.15).
    """
    if importlib.util.find_spec("lomo_optim") is None:
        sys.modules["lomo_optim"] = None


def _check_dataset(key: str, dataset: Any, stream: type, *, optional: bool = True) -> None:
    """Raise `TypeError` unless a data set is one of hfvit.

    Args:
        key: argument with the data set, for messages.
        dataset: data set.
        stream: type of a streamed data set.
        optional: whether it may be None.
    """
    if not isinstance(dataset, ImageDataset | stream) and not (dataset is None and optional):
        raise _wrong_dataset(key, dataset)


def _check_returns_batches(key: str, dataset: Any) -> None:
    """Raise `TypeError` unless a data set returns batches, as a `Subset` also does."""
    if not hasattr(dataset, "__getitems__"):
        raise _wrong_dataset(key, dataset)


def _wrong_dataset(key: str, dataset: Any) -> TypeError:
    return TypeError(
        f"{key}: must be a datasets.Dataset with an image and a label column, got {type(dataset).__name__}. Use"
        " datasets.Dataset.from_list, or one split of a DatasetDict."
    )


def check_sharding(args: HFViTTrainingArguments, streams: bool, *, is_fsdp2: bool) -> None:
    """Raise `RecipeError` for an option that is not available with FSDP or DeepSpeed.

    Args:
        args: training arguments.
        streams: whether an evaluation split is streamed.
        is_fsdp2: whether the weights are those of FSDP 2.
    """
    if is_timm_optimizer(args.optim) and not is_fsdp2:
        raise RecipeError(
            f"optim: not available with DeepSpeed and FSDP 1, which flatten the weights, got '{args.optim}'."
            " Use adamw_torch, or accelerate_configs/fsdp.yaml (FSDP 2)."
        )
    for key, is_set in (("stream_evaluation", streams), ("channels_last", args.channels_last)):
        if is_set:
            raise RecipeError(f"{key}: not available with sharded weights (FSDP, DeepSpeed). Set it to false.")
    for key in ("ema_decay", "swa_start", "soup"):
        if getattr(args, key) is not None:
            raise RecipeError(f"{key}: not available with sharded weights (FSDP, DeepSpeed). Set it to null.")


def check_determinism(args: HFViTTrainingArguments, model: nn.Module, progressive: TrainerCallback | None) -> None:
    """Raise `RecipeError` if `full_determinism` lacks a deterministic kernel.

    Args:
        args: training arguments.
        model: the model.
        progressive: callback that resizes training images, or None.
    """
    if not args.full_determinism or args.device.type != "cuda":
        return
    option = progressive.key if progressive else "patch_sizes" if patch_size_callbacks(model) else None
    if option:
        raise RecipeError(
            f"full_determinism: not available with {option} on a GPU, as PyTorch has no deterministic kernel for the"
            " gradient of resized position embeddings. Omit one of them."
        )


def check_factors(scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> None:
    """Raise an error if a schedule fails later, or its rates are not finite.

    Args:
        scheduler: schedule; one that follows evaluations is not checked.
        steps: optimizer steps of the run.
    """
    for function in getattr(scheduler, "lr_lambdas", ()):
        for step in (0, steps // 2, max(steps - 1, 0)):
            factor = function(step)
            if not math.isfinite(factor):
                raise ValueError(f"The learning rate of step {step} would be {factor} times that of the recipe.")


class FastZeroGrad(TrainerCallback):
    """Clear the gradients of the trained parameters without visiting all modules.

    The Trainer calls `zero_grad` of the wrapped model (DDP, torch.compile) in each step (transformers 5.24).
    """

    def __init__(self, trainer: HFViTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        # Not by assignment, which a compiled model passes on to the module within it.
        vars(self.trainer.model_wrapped)["zero_grad"] = partial(clear_gradients, self.trainer.trained)


def clear_gradients(parameters: Iterable[nn.Parameter], set_to_none: bool = True) -> None:
    """Set gradients to None.

    `set_to_none` is that of `Module.zero_grad`, and always True here.
    """
    for parameter in parameters:
        parameter.grad = None


class SamplerEpochs(TrainerCallback):
    """Set the epoch of the training sampler, before its iteration.

    The Trainer passes it through two layers of samplers, but a run resumed on several processes has three
    (transformers 5.24).
    """

    def __init__(self, trainer: HFViTTrainer):
        self.trainer = trainer
        self.epoch = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.epoch = state.global_step // self.trainer.steps_per_epoch

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        draw_base_seed(train_dataloader)
        self.trainer.sampler.set_epoch(self.epoch)
        self.epoch += 1
