"""Build the trainer for the recipe's fine-tuning method."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from timm.data import resolve_data_config
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import TrainOutput

from hfvit.finetuning.distillation import build_objective
from hfvit.finetuning.linear_probe import prepare_linear_probe, probe_images, refuse_to_resume, train_linear_probe
from hfvit.finetuning.lora import add_lora
from hfvit.finetuning.progressive_resizing import ProgressiveSize
from hfvit.finetuning.zero_shot_head import start_from_text
from hfvit.models.patch_size import patch_size_callbacks
from hfvit.recipe.arguments import AugmentationArguments, FinetuningArguments
from hfvit.recipe.loader import Recipe
from hfvit.training.trainer import HFViTTrainer
from hfvit.transforms.mixup import BatchMixing
from hfvit.transforms.preprocessing import Preprocessing


class FineTuning:
    """Full fine-tuning: train all weights that `freeze` leaves. The other methods override its steps.

    A run takes the steps in the order in which they stand here; between `initialize` and `train` it builds the
    trainer with `build_trainer`.

    Args:
        arguments: the recipe's fine-tuning section.
        model: of `models.factory.build_model`; it is changed in place.
    """

    def __init__(self, arguments: FinetuningArguments, model: PreTrainedModel):
        self.arguments = arguments
        self.model = model
        self.progressive: ProgressiveSize | None = None

    @property
    def labels(self) -> list[str]:
        """Class names in the order of the logits."""
        return self.model.config.label_names

    @property
    def preprocessing(self) -> Preprocessing:
        """The model's own preprocessing, as in evaluation."""
        return Preprocessing(resolve_data_config(self.model.config.pretrained_cfg))

    def prepare(self) -> None:
        """Make the model ready for the method, before any image is read.

        Raises `ModelError` or `RecipeError` for a model or a launcher that the method does not support.
        """
        if self.arguments.progressive_image_size:
            self.progressive = ProgressiveSize(self.model, self.arguments.progressive_image_size)

    def initialize(self, images: Dataset) -> None:
        """Initialize weights that need the classes' names or some `images`; not for a resumed run."""
        if self.arguments.head_from_text:
            start_from_text(
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
            train_dataset: its labels give the class weights.
            options: the further arguments of `HFViTTrainer`.
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
        return build_objective(
            self.model,
            weights,
            teacher=self.arguments.teacher,
            distillation=self.arguments.distillation,
            alpha=self.arguments.distillation_alpha,
            temperature=self.arguments.distillation_temperature,
        )

    def training_images(self, trainer: HFViTTrainer) -> tuple[np.ndarray, np.ndarray]:
        """Some images as the model will see them, and their targets; see `HFViTTrainer.training_images`."""
        return trainer.training_images()

    def train(self, trainer: HFViTTrainer, checkpoint: str | None = None) -> TrainOutput:
        """Train, from `checkpoint` on where there is one; the model then holds the weights that are evaluated."""
        return trainer.train(resume_from_checkpoint=checkpoint)

    def finish(self, trainer: HFViTTrainer) -> None:
        """Bring the trained model into the form that is evaluated and saved."""


class LoraFineTuning(FineTuning):
    """LoRA: train low-rank adapters and the head; merge the adapters into the weights in the end."""

    def prepare(self) -> None:
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
        if trainer.args.should_save:
            self.lora.save(trainer.args.output_dir)
        self.lora.merge()


class LinearProbe(FineTuning):
    """Linear probe: solve for the classifier on features that the frozen network gives."""

    def prepare(self) -> None:
        super().prepare()
        prepare_linear_probe(self.model)

    def _objective(self, train_dataset: Dataset) -> None:
        return None  # class weights go into the logistic regression

    def training_images(self, trainer: HFViTTrainer) -> tuple[np.ndarray, np.ndarray]:
        return probe_images(trainer, self.arguments.probe_passes)

    def train(self, trainer: HFViTTrainer, checkpoint: str | None = None) -> TrainOutput:
        refuse_to_resume(checkpoint)
        return train_linear_probe(trainer, self.arguments)


METHODS: dict[str, type[FineTuning]] = {"full": FineTuning, "lora": LoraFineTuning, "linear_probe": LinearProbe}


def prepare_finetuning(arguments: FinetuningArguments, model: PreTrainedModel) -> FineTuning:
    """Make `model` ready for the recipe's fine-tuning method, and return the method with its further steps.

    Raises `ModelError` or `RecipeError` for a model or a launcher that the method does not support.
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
        recipe: training arguments and what is mixed in a batch.
        method: of `prepare_finetuning`, with the model.
        datasets: of `data.factory.build_datasets`.
        callbacks: called beside those that the recipe needs.
        options: further arguments of `HFViTTrainer`.
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
    """Build mixup, CutMix and random erasing for batches of so many classes."""
    return BatchMixing(
        classes,
        mixup_alpha=arguments.mixup_alpha,
        cutmix_alpha=arguments.cutmix_alpha,
        random_erasing=arguments.random_erasing,
        off_epochs=arguments.mix_off_epochs,
    )


def class_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """Weights `(classes,)` inversely proportional to a class's images, 1 on average over the images.

    A class without images has weight 0.
    """
    counts = np.bincount(labels, minlength=classes)
    present = counts > 0
    return np.where(present, len(labels) / (present.sum() * np.maximum(counts, 1)), 0.0)
