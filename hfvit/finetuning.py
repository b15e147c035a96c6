"""A recipe's way to fine-tune -> the Trainer that goes it."""

from functools import partial

from hfvit.balance import class_weights
from hfvit.finetuning_args import FinetuningArguments
from hfvit.linear_probe import LinearProbeTrainer
from hfvit.objective import build_objective
from hfvit.trainer import HFViTTrainer


def trainer_for(finetuning: FinetuningArguments, model, labels: list[str], train_dataset) -> partial[HFViTTrainer]:
    """`HFViTTrainer` or `LinearProbeTrainer` with the arguments that `finetuning` gives it.

    `labels` are the class names, `train_dataset` an `images.ImageDataset` or a stream.
    """
    if finetuning.finetuning == "linear_probe":
        return partial(LinearProbeTrainer, labels=labels, **finetuning.probe)
    weighted = finetuning.class_balance == "weight"
    weights = class_weights(train_dataset.labels, len(labels)) if weighted else None
    objective = build_objective(model, weights, **finetuning.distilling)
    return partial(HFViTTrainer, objective=objective, balanced=finetuning.class_balance == "sample")
