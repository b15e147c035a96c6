"""Evaluation loop for streamed splits, which are divided unequally.

Processes may have different numbers of images.
"""

from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, denumpify_detensorize


def evaluate_stream(trainer, loader: DataLoader, ignore_keys: list[str] | None, prefix: str) -> EvalLoopOutput:
    """Predict each image of a stream once, and compute exact metrics.

    `Trainer.evaluation_loop` gathers every batch, which needs equal numbers of equal batches on all processes. Here
    each process predicts its share, and the shares are gathered once and put in the order of the split.

    Args:
        trainer: `HFViTTrainer` without sharded weights.
        loader: data loader of the stream.
        ignore_keys: outputs of the model to ignore.
        prefix: prefix of the metrics.

    Returns:
        Logits and labels in the order of the split, and metrics, on every process.
    """
    model = trainer.model
    if not trainer.accelerator._models:  # not trained before; as in `Trainer.evaluation_loop` (transformers 5.24)
        model = trainer.accelerator.prepare_model(model, evaluation_mode=True)
    model.eval()
    if hasattr(trainer.optimizer, "eval"):  # schedule-free optimizers
        trainer.optimizer.eval()
    trainer.callback_handler.eval_dataloader = loader
    share = _predict(trainer, model, loader, ignore_keys)
    shares = [values for values in gather_object([share]) if len(values["places"])]
    if not shares:
        loader.dataset.count(np.empty(0, np.int64))  # raises
    order = np.argsort(np.concatenate([values["places"] for values in shares]))
    logits, labels = (np.concatenate([values[key] for values in shares])[order] for key in ("logits", "labels"))
    loader.dataset.count(labels)
    metrics: dict[str, Any] = {}
    if trainer.compute_metrics:
        metrics = trainer.compute_metrics(EvalPrediction(predictions=logits, label_ids=labels))
    metrics = denumpify_detensorize(metrics) | {"loss": sum(values["loss"] for values in shares) / len(labels)}
    metrics = {key if key.startswith(f"{prefix}_") else f"{prefix}_{key}": value for key, value in metrics.items()}
    return EvalLoopOutput(predictions=logits, label_ids=labels, metrics=metrics, num_samples=len(labels))


def _predict(trainer, model, loader: DataLoader, ignore_keys: list[str] | None) -> dict[str, Any]:
    """Predict the images of this process.

    Args:
        trainer: trainer.
        model: model in eval mode.
        loader: data loader of the stream.
        ignore_keys: outputs of the model to ignore.

    Returns:
        `places`, `logits` and `labels` as arrays, and the sum of the losses of all images as `loss`.
    """
    args = trainer.args
    places = []
    found: dict[str, list[torch.Tensor]] = {"logits": [], "labels": [], "loss": []}
    for step, batch in enumerate(loader, start=1):
        places.append(batch.pop("places"))
        loss, logits, labels = trainer.prediction_step(model, batch, False, ignore_keys=ignore_keys)
        for key, value in (("logits", logits.float()), ("labels", labels), ("loss", loss.float() * len(labels))):
            found[key].append(value)
        if args.eval_accumulation_steps and step % args.eval_accumulation_steps == 0:
            found = {key: [value.cpu() for value in values] for key, values in found.items()}
        trainer.control = trainer.callback_handler.on_prediction_step(args, trainer.state, trainer.control)
    if not places:
        return {"places": np.empty(0, np.int64)}
    arrays = {key: torch.cat([value.cpu() for value in found[key]]).numpy() for key in ("logits", "labels")}
    loss = torch.stack([value.cpu() for value in found["loss"]]).double().sum().item()
    return {"places": np.concatenate(places), "loss": loss, **arrays}
