"""Build the trainer for the recipe's fine-tuning method."""

from functools import partial

import numpy as np

from hfvit.finetuning.distillation import build_objective
from hfvit.finetuning.linear_probe import prepare_linear_probe
from hfvit.recipe.arguments import FinetuningArguments
from hfvit.training.trainer import HFViTTrainer


def class_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """Weights `(classes,)` inversely proportional to a class's images, 1 on average over the images.

    A class without images has weight 0.
    """
    counts = np.bincount(labels, minlength=classes)
    present = counts > 0
    return np.where(present, len(labels) / (present.sum() * np.maximum(counts, 1)), 0.0)


def trainer_for(finetuning: FinetuningArguments, model, labels: list[str], train_dataset) -> partial[HFViTTrainer]:
    """`HFViTTrainer` or `LinearProbeTrainer` with the arguments that `finetuning` gives it.

    `labels` are the class names, `train_dataset` an `images.ImageDataset` or a stream.
    """
    if finetuning.finetuning == "linear_probe":
        prepare_linear_probe(model)
        return partial(HFViTTrainer)
    weighted = finetuning.class_balance == "weight"
    weights = class_weights(train_dataset.labels, len(labels)) if weighted else None
    objective = build_objective(model, weights, **finetuning.distilling)
    return partial(HFViTTrainer, objective=objective, balanced=finetuning.class_balance == "sample")
