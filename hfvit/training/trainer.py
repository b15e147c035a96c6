"""`HFViTTrainer`: transformers' Trainer with on-device augmentation and timm parameter groups."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback

from hfvit.data.dataset import check_labels, check_pixels, check_stream_labels, collate
from hfvit.data.samplers import BalancedSampler, EpochSampler
from hfvit.data.stream import ImageStream, StreamEpochs, stream_loader
from hfvit.data.text import TEXT_INPUTS
from hfvit.errors import DataError, RecipeError
from hfvit.training.checkpointing import start_worker
from hfvit.training.ema import AveragingTrainer
from hfvit.training.losses import cross_entropy
from hfvit.training.param_groups import build_param_groups, groups_beside
from hfvit.training.throughput import SpeedMeter, matmul_rate, training_flops
from hfvit.transforms.mixup import BatchMixing
from hfvit.transforms.preprocessing import Preprocessing

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class HFViTTrainer(AveragingTrainer):
    """Trains on the batches of images.py; everything not overridden here is the Trainer's own work.

    A batch comes as uint8 and becomes pixel values on the device: by the training set's `Augmentation` and `mixing`,
    or by `preprocessing` in evaluation. The training set is drawn by `EpochSampler`, or when `balanced` by
    `BalancedSampler`; an `objective` takes the place of cross-entropy in training, and `progressive` resizes its
    images. With `ema_decay`, evaluation and the final model use the averaged weights; checkpoints hold both.
    """

    # compute_loss returns a mean over its own images; the Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *args,
        preprocessing: Preprocessing,
        mixing: BatchMixing | None = None,
        objective: nn.Module | None = None,
        balanced: bool = False,
        progressive: TrainerCallback | None = None,
        **kwargs,
    ):
        super().__init__(*args, data_collator=collate, **kwargs)
        if self.args.activation_checkpointing and not self.model.supports_gradient_checkpointing:
            kind = type(getattr(self.model, "timm_model", self.model)).__name__
            reads = " beside a text encoder" if hasattr(self.model, "text_model") else ""
            raise RecipeError(f"activation_checkpointing: not available for {kind}{reads}; set it to false.")
        # Labels are not counted over accumulation steps and processes: compute_loss takes a plain mean.
        self.model_accepts_loss_kwargs = False
        self.preprocessing = preprocessing.to(self.args.device)
        self.mixing, self.balanced, self.progressive = mixing, balanced, progressive
        if progressive:
            self.add_callback(progressive)
        self.objective = objective and objective.to(self.args.device)
        self.micro.even = bool(mixing and mixing.mixup)
        self._is_checked = False
        self._is_stream = isinstance(self.train_dataset, ImageStream)
        if self._is_stream:
            self.add_callback(StreamEpochs(self.train_dataset.images))
        if self.train_dataset is not None:
            self._check_training_set()
            # A copy: the loader's workers, which only draw, should not be sent what lies on a GPU.
            self.augmentation = copy.copy(self.train_dataset.augmentation).to(self.args.device)
        self.speed = SpeedMeter(self.args.device)
        self.findings: dict[str, Any] = {}  # what run.json says of the training beside its steps
        if self.args.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))

    def _check_training_set(self) -> None:
        if self._is_stream:
            if self.mixing and self.mixing.off_epochs and self.train_dataset.images is None:
                raise RecipeError(
                    "mix_off_epochs: nobody has counted the images of this stream, so its epochs have no length;"
                    " leave it at 0, or give the split's num_examples in the data set's card (dataset_info: splits)."
                )
            return
        if (rows := len(self.train_dataset)) < (batch := self.args.global_batch_size):
            raise DataError(f"{rows} training images do not fill one batch: lower global_batch_size ({batch}).")
        check_labels(self.train_dataset.labels, self._label_names)

    @property
    def _label_names(self) -> list[str]:
        config = self.accelerator.unwrap_model(self.model).config
        return [config.id2label[index] for index in range(config.num_labels)]

    # Input

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device and make its pixel values there."""
        # Not the Trainer's own: under DeepSpeed it rounds every floating-point tensor, and with them what was drawn.
        inputs = send_to_device(inputs, self.args.device, non_blocking=self.accelerator.non_blocking)
        plan = inputs.get("plan")
        texts = {key: inputs[key] for key in TEXT_INPUTS if key in inputs}
        with torch.no_grad():
            if plan is None:
                return {"pixel_values": self.preprocessing(inputs), "labels": inputs["labels"], **texts}
            # Under autocast the model's first product rounds the pixels as coarsely as the crop does here.
            pixel_values, labels = self.augmentation(inputs, self._compute_dtype), inputs["labels"]
            if self._has_begun and not self._is_checked:
                self._check_first_batch(pixel_values, labels)
            if self.mixing and not self._mixing_is_over():
                pixel_values, labels = self.mixing(pixel_values, labels, plan["seeds"])
            if self.progressive and self._is_fitted:  # several processes try first whether the largest fits
                pixel_values = self.progressive(pixel_values, self.state)
        return {"pixel_values": pixel_values, "labels": labels, **texts}

    def _check_first_batch(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> None:
        self._is_checked = True
        check_pixels(pixel_values)
        if self._is_stream:
            check_stream_labels(labels, self._label_names, self.train_dataset.repeats)

    def training_images(self, count: int = 32) -> tuple[np.ndarray, np.ndarray]:
        """Some images as the model will see them, uint8 `(images, height, width, 3)`, and their targets.

        Targets are class indices `(images,)`, or probabilities `(images, classes)` of mixtures.
        """
        batch = self._prepare_inputs(self.train_dataset.preview(count))
        levels = batch["pixel_values"].float() * self.augmentation.std + self.augmentation.mean
        images = levels.clamp(0, 255).round().byte().permute(0, 2, 3, 1)
        return images.cpu().numpy(), batch["labels"].cpu().numpy()

    @property
    def _has_begun(self) -> bool:
        return self.state.max_steps > 0

    def _mixing_is_over(self) -> bool:
        steps_an_epoch = (self.train_dataset.images or 0) // self.args.global_batch_size
        return (
            self._has_begun
            and self.state.global_step >= self.state.max_steps - self.mixing.off_epochs * steps_an_epoch
        )

    def get_train_dataloader(self):
        if not self._is_stream:
            return super().get_train_dataloader()
        args = self.args
        options = {"pin_memory": args.dataloader_pin_memory, "prefetch_factor": args.dataloader_prefetch_factor}
        options["multiprocessing_context"] = args.dataloader_multiprocessing_context
        options["worker_init_fn"] = partial(start_worker, None)
        return stream_loader(
            self.train_dataset,
            args.dataloader_num_workers,
            args.device,
            non_blocking=self.accelerator.non_blocking,
            **options,
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return int(self.speed.flops_per_image or 0) * len(inputs["labels"])

    def get_batch_samples(self, *args, **kwargs):
        with self.speed.waiting():
            return super().get_batch_samples(*args, **kwargs)

    # Optimisation

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer over timm's groups: no-decay names, layer-wise learning rate, frozen parts out."""
        if self.optimizer is None:
            model = self.model if model is None else model
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            whole = self.accelerator.unwrap_model(model)
            rates = kwargs["lr"], self.args.weight_decay
            groups = groups_beside(whole, whole.timm_model, *rates)
            groups += build_param_groups(whole.timm_model, *rates, layer_decay=self.args.layer_decay)
            self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    def _get_train_sampler(self, train_dataset=None) -> EpochSampler:
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        sampler, rows = EpochSampler, len(train_dataset)
        if self.balanced:
            sampler, rows = BalancedSampler, train_dataset.labels
        self._epoch_sampler = sampler(
            rows, self.args.global_batch_size, self.args.order_seed, repeats=train_dataset.repeats
        )
        return self._epoch_sampler

    def _run_epoch(self, *args, epoch: int, **kwargs):
        if self._is_stream:
            self.train_dataset.skip(kwargs["steps_trained_in_current_epoch"])
        else:
            # The Trainer tells the epoch to two layers of samplers; a run resumed on several processes has three.
            self._epoch_sampler.set_epoch(epoch)
        super()._run_epoch(*args, epoch=epoch, **kwargs)
        self.speed.stop()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy outside the model: stock models turn soft labels into a multi-label problem, and save that."""
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        if self.objective and model.training:
            loss = self.objective(outputs.logits, labels, inputs["pixel_values"], smoothing)
        else:
            loss = cross_entropy(outputs.logits, labels, smoothing)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        if self.speed.images == 0:
            self.speed.start()  # here, so that preparations and what a resumed run skips are not in its figures
        loss = super().training_step(*args, **kwargs)
        self.speed.images += self.args.per_device_train_batch_size * self.args.world_size
        return loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """The Trainer's log; entries with a training loss tell the speed of the steps since the last one, too."""
        if "loss" in logs:
            logs |= self.speed.since_last()
        super().log(logs, *args, **kwargs)

    def _evaluate(self, *args, **kwargs):
        with self.speed.paused():
            return super()._evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        with self.speed.paused():
            super()._save_checkpoint(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._is_stream and self.args.should_save:
            self.train_dataset.save_sharing(output_dir, self.args.dataloader_num_workers)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._is_stream and checkpoint:
            self.train_dataset.check_sharing(checkpoint, self.args.dataloader_num_workers)
        super()._load_optimizer_and_scheduler(checkpoint)

    def train(self, *args, **kwargs):
        """Train; the model then holds the weights to ship (the best checkpoint's, averaged with `ema_decay`)."""
        self._record_trained()
        self._measure_device()
        return super().train(*args, **kwargs)

    def _record_trained(self) -> None:
        """Count before anything is merged or put back."""
        self.trained_parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def _measure_device(self) -> None:
        """What the model needs an image and what the device can give, which `mfu` relates."""
        # Images of several sizes have no one count.
        self.speed.flops_per_image = None if self.progressive else training_flops(self.model)
        self.speed.peak_flops = matmul_rate(self.args.device, self._compute_dtype) * self.args.world_size

    @property
    def _compute_dtype(self) -> torch.dtype:
        """What matrix products are computed in."""
        return AUTOCAST_DTYPES.get(self.args.mixed_precision, torch.float32)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle of the arguments, which nothing reads and which no one should have to trust.
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)
