"""Build the trainer for the recipe's fine-tuning method."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from timm.data import resolve_data_config
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import TrainOutput

from hfvit.data.labels import class_counts
from hfvit.finetuning.distillation import build_objective
from hfvit.finetuning.linear_probe import check_no_checkpoint, prepare_linear_probe, probe_images, train_linear_probe
from hfvit.finetuning.lora import add_lora
from hfvit.finetuning.progressive_resizing import ProgressiveResizing
from hfvit.finetuning.zero_shot_head import initialize_head_from_text
from hfvit.metrics.task import task_of
from hfvit.models.patch_size import patch_size_callbacks
from hfvit.recipe.arguments import MULTI_LABEL, AugmentationArguments, FinetuningArguments
from hfvit.recipe.loader import Recipe
from hfvit.training.losses import LOSSES, asymmetric_loss
from hfvit.training.trainer import HFViTTrainer
from hfvit.transforms.mixup import BatchMixing
from hfvit.transforms.preprocessing import Preprocessing


class FineTuning:
    """Fine-tune all weights that are not frozen; base class of the other methods.

    A run calls the methods in the order of their definition, and `build_trainer` between `initialize` and `train`.

    Args:
        arguments: the recipe's fine-tuning section.
        model: model of `models.factory.build_model`, changed in place.
    """

    def __init__(self, arguments: FinetuningArguments, model: PreTrainedModel):
        self.arguments = arguments
        self.model = model
        self.progressive: ProgressiveResizing | None = None

    @property
    def labels(self) -> list[str]:
        """Return class names in the order of the logits."""
        return self.model.config.label_names

    @property
    def preprocessing(self) -> Preprocessing:
        """Return the model's preprocessing of evaluation."""
        return Preprocessing(resolve_data_config(self.model.config.pretrained_cfg))

    def prepare(self) -> None:
        """Prepare the model before any image is read.

        Raises:
            ModelError: the method does not support the model.
            RecipeError: the method does not support the launcher or an option.
        """
        sizes, last = self.arguments.progressive_image_size, self.arguments.train_image_size
        if sizes or last:
            self.progressive = ProgressiveResizing(self.model, sizes or [], last)

    def initialize(self, images: Dataset) -> None:
        """Initialize weights from class names and some `images`; skipped when resuming."""
        if self.arguments.head_from_text:
            initialize_head_from_text(
                self.model,
                self.labels,
                images,
                self.preprocessing,
                source=self.arguments.head_from_text,
                templates=self.arguments.head_templates,
            )

    def make_trainer(self, train_dataset: Dataset, **options: Any) -> HFViTTrainer:
        """Build the trainer with the method's loss, sampler and image size.

        Args:
            train_dataset: training set, whose labels determine the class weights.
            **options: further arguments of `HFViTTrainer`.
        """
        return HFViTTrainer(
            model=self.model,
            train_dataset=train_dataset,
            objective=self._objective(train_dataset),
            balanced=self.arguments.class_balance == "sample",
            progressive=self.progressive,
            **options,
        )

    def _objective(self, train_dataset: Dataset) -> nn.Module | None:
        weights = None
        if self.arguments.class_balance == "weight":
            weights = class_weights(train_dataset.labels, len(self.labels))
        losses = None
        if self.arguments.multi_label_loss == "asymmetric" and task_of(self.model.config).problem_type == MULTI_LABEL:
            losses = replace(LOSSES[MULTI_LABEL], labels=asymmetric_loss)
        return build_objective(
            self.model,
            weights,
            teacher=self.arguments.teacher,
            distillation=self.arguments.distillation,
            alpha=self.arguments.distillation_alpha,
            temperature=self.arguments.distillation_temperature,
            losses=losses,
        )

    def training_images(self, trainer: HFViTTrainer) -> tuple[np.ndarray, np.ndarray]:
        """Return augmented images and their targets, as `HFViTTrainer.training_images`."""
        return trainer.training_images()

    def train(self, trainer: HFViTTrainer, checkpoint: str | None = None) -> TrainOutput:
        """Train, resuming from `checkpoint` if given."""
        return trainer.train(resume_from_checkpoint=checkpoint)

    def finish(self, trainer: HFViTTrainer) -> None:
        """Convert the trained model for evaluation and saving."""
        if self.arguments.teacher:
            trainer.trained_parameters -= self.model.remove_feature_projection()


class LoraFineTuning(FineTuning):
    """Train LoRA adapters and the head; merge the adapters at the end."""

    def prepare(self) -> None:
        """Add adapters to the model."""
        super().prepare()
        rank = self.arguments.lora_rank
        self.lora = add_lora(
            self.model,
            rank=rank,
            alpha=self.arguments.lora_alpha or 2 * rank,
            dropout=self.arguments.lora_dropout,
            targets=self.arguments.lora_targets,
        )

    def finish(self, trainer: HFViTTrainer) -> None:
        """Save the adapters, then merge them."""
        super().finish(trainer)
        if trainer.args.should_save:
            self.lora.save(trainer.args.output_dir)
        self.lora.merge()


class LinearProbe(FineTuning):
    """Fit the classifier by logistic regression on features of the frozen backbone."""

    def prepare(self) -> None:
        """Freeze the backbone."""
        super().prepare()
        prepare_linear_probe(self.model)

    def _objective(self, train_dataset: Dataset) -> None:
        return None  # the logistic regression has class weights

    def training_images(self, trainer: HFViTTrainer) -> tuple[np.ndarray, np.ndarray]:
        """Return images that the probe is fitted on, and their targets."""
        return probe_images(trainer, self.arguments.probe_passes)

    def train(self, trainer: HFViTTrainer, checkpoint: str | None = None) -> TrainOutput:
        """Fit the probe; raises `RecipeError` for a checkpoint to resume from."""
        check_no_checkpoint(checkpoint)
        return train_linear_probe(trainer, self.arguments)


METHODS: dict[str, type[FineTuning]] = {"full": FineTuning, "lora": LoraFineTuning, "linear_probe": LinearProbe}


def prepare_finetuning(arguments: FinetuningArguments, model: PreTrainedModel) -> FineTuning:
    """Create the recipe's fine-tuning method and prepare the model for it.

    Raises:
        ModelError: the method does not support the model.
        RecipeError: the method does not support the launcher or an option.
    """
    method = METHODS[arguments.finetuning](arguments, model)
    method.prepare()
    return method


def build_trainer(
    recipe: Recipe,
    method: FineTuning,
    datasets: Mapping[str, Dataset],
    callbacks: Sequence[TrainerCallback] = (),
    **options: Any,
) -> HFViTTrainer:
    """Build the trainer of a recipe.

    Args:
        recipe: training and augmentation arguments.
        method: fine-tuning method with the model, of `prepare_finetuning`.
        datasets: datasets by role, of `data.factory.build_datasets`.
        callbacks: callbacks in addition to those of the recipe.
        **options: further arguments of `HFViTTrainer`.
    """
    return method.make_trainer(
        datasets["train"],
        args=recipe.training,
        eval_dataset=datasets["validation"],
        preprocessing=method.preprocessing,
        mixing=build_mixing(len(method.labels), recipe.augmentation),
        callbacks=[*patch_size_callbacks(method.model), *callbacks],
        **options,
    )


def build_mixing(classes: int, arguments: AugmentationArguments) -> BatchMixing:
    """Build mixup, CutMix and random erasing for a number of classes."""
    return BatchMixing(
        classes,
        mixup_alpha=arguments.mixup_alpha,
        cutmix_alpha=arguments.cutmix_alpha,
        random_erasing=arguments.random_erasing,
        off_epochs=arguments.mix_off_epochs,
    )


MAX_POSITIVE_WEIGHT = 100.0  # limit for rare classes, and its inverse for classes of almost all images


def class_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """Compute class weights (classes,) of the loss.

    Single-label: inversely proportional to class frequency. Their mean over the images is 1, as in scikit-learn's
    "balanced"; a class without images has weight 0. Multi-label: negatives over positives, limited by
    `MAX_POSITIVE_WEIGHT` and its inverse, for the positives of a class; a class without images has weight 1.

    Args:
        labels: class ids (images,), or 0 and 1 (images, classes).
        classes: number of classes.
    """
    counts = class_counts(labels, classes)
    present = counts > 0
    if labels.ndim > 1:
        weights = (len(labels) - counts) / np.maximum(counts, 1)
        return np.where(present, weights.clip(1 / MAX_POSITIVE_WEIGHT, MAX_POSITIVE_WEIGHT), 1.0)
    return np.where(present, len(labels) / (present.sum() * np.maximum(counts, 1)), 0.0)
