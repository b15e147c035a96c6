"""The same training with hfvit, with a plain loop of timm's parts, and with transformers' Trainer."""

import dataclasses
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from images import CLASSES
from peers import MEAN, SCALE, STD, stack, timm_dataset, timm_loader, transformed_dataset
from step_clock import StepClock, trainer_callback

LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 3e-4, 0.05, 1.0


@dataclass(frozen=True)
class Case:
    """Settings of a training, equal for all contenders.

    `peer_workers` is the number of data loader workers of the peers; by default, as many as hfvit uses to decode
    images. `recipe` has recipe keys for hfvit only, which override those of the case. `keep_freed_memory` is the
    setting of glibc for all contenders; by default, hfvit keeps freed memory if it has no data loader workers, and the
    peers never do.
    """

    name: str
    images: str
    architecture: str = "vit_tiny_patch16_224"
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    image_size: int = 224
    batch_size: int = 16
    precision: str = "bf16"
    checkpointing: bool = False
    compiled: bool = False
    keep_freed_memory: bool | None = None
    contenders: tuple[str, ...] = ("hfvit", "timm", "Trainer")
    peer_workers: int | None = None
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    warm_up: int = 3
    steps: int = 10


def train_with_hfvit(case: Case, folder: str, clock: StepClock) -> None:
    """Train as hfvit/pipeline.py does, without what follows the training."""
    import yaml
    from transformers import set_seed

    from hfvit.data.factory import build_datasets, load_splits
    from hfvit.finetuning.factory import build_trainer, prepare_finetuning
    from hfvit.models.factory import build_model
    from hfvit.recipe.loader import load_recipe

    with tempfile.TemporaryDirectory() as output_dir:
        recipe_file = Path(output_dir) / "recipe.yaml"
        recipe_file.write_text(yaml.safe_dump(recipe_values(case, folder, output_dir)), encoding="utf-8")
        recipe = load_recipe([str(recipe_file)])
        args = recipe.training
        splits = load_splits(recipe.data, args.seed)
        set_seed(args.seed)
        model, tokenizer = build_model(recipe.model, splits.labels, recipe.data)
        method = prepare_finetuning(recipe.finetuning, model)
        as_it_is = patch("hfvit.data.factory.keep_freed_memory")
        with as_it_is if case.keep_freed_memory is False else nullcontext():
            datasets = build_datasets(splits, model.config, recipe, tokenizer)
        trainer = build_trainer(recipe, method, datasets, [trainer_callback(clock)])
        clock.workers, clock.meter = args.dataloader_num_workers, trainer.speed
        method.train(trainer)
        clock.flops_per_image, clock.peak_flops = trainer.speed.flops_per_image, trainer.speed.peak_flops


def recipe_values(case: Case, folder: str, output_dir: str) -> dict[str, Any]:
    """Return a recipe that trains a case without evaluation, saving and logging."""
    return {
        "architecture": case.architecture,
        "model_args": case.model_args,
        "image_size": case.image_size,
        "dataset_name": folder,
        "validation_split": "validation",
        "test_split": None,
        "interpolation": "bicubic",
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "crop_scale": list(SCALE),
        "global_batch_size": case.batch_size,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": MAX_GRAD_NORM,
        "max_steps": case.warm_up + case.steps,
        "bf16": case.precision == "bf16",
        "activation_checkpointing": case.checkpointing,
        "torch_compile": case.compiled,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "output_dir": output_dir,
        **case.recipe,
    }


def train_with_timm(case: Case, folder: str, clock: StepClock) -> None:
    """Train with a plain loop of timm's parts."""
    import timm
    import torch
    from timm.optim import create_optimizer_v2

    from hfvit.utils.environment import keep_freed_memory

    device = clock.device
    torch.backends.cuda.matmul.allow_tf32 = True  # as in timm's train.py
    torch.backends.cudnn.benchmark = True
    clock.workers = peer_workers(case, device)
    model = timm.create_model(case.architecture, num_classes=CLASSES, img_size=case.image_size, **case.model_args)
    model.to(device).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    if case.compiled:
        model.compile()
    dataset = timm_dataset(folder)
    loader = timm_loader(dataset, case.image_size, case.batch_size, clock.workers, device.type)
    if case.keep_freed_memory:
        keep_freed_memory()
    clock.begin()
    batches = iter(loader)
    for _ in range(case.warm_up + case.steps):
        with clock.meter.waiting():
            pixel_values, labels = next(batches)
        with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16"):
            loss = torch.nn.functional.cross_entropy(model(pixel_values), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        clock.step()


def train_with_trainer(case: Case, folder: str, clock: StepClock) -> None:
    """Train as transformers' run_image_classification.py does, with a timm model from scratch."""
    from transformers import AutoModelForImageClassification, TimmWrapperConfig, Trainer, TrainingArguments

    from hfvit.utils.environment import keep_freed_memory

    clock.workers = peer_workers(case, clock.device)
    config = TimmWrapperConfig(
        architecture=case.architecture,
        model_args={"img_size": case.image_size, **case.model_args},
        id2label={number: str(number) for number in range(CLASSES)},
        label2id={str(number): number for number in range(CLASSES)},
    )

    class MeteredTrainer(Trainer):
        def get_batch_samples(self, *args, **kwargs):
            with clock.meter.waiting():
                return super().get_batch_samples(*args, **kwargs)

    if case.keep_freed_memory:
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as output_dir:
        args = TrainingArguments(
            output_dir,
            per_device_train_batch_size=case.batch_size,
            max_steps=case.warm_up + case.steps,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            bf16=case.precision == "bf16",
            torch_compile=case.compiled,
            use_cpu=clock.device.type == "cpu",
            dataloader_num_workers=clock.workers,
            dataloader_pin_memory=clock.device.type == "cuda",
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        MeteredTrainer(
            model=AutoModelForImageClassification.from_config(config),
            args=args,
            train_dataset=transformed_dataset(folder, case.image_size),
            data_collator=stack,
            callbacks=[trainer_callback(clock)],
        ).train()


def peer_workers(case: Case, device) -> int:
    """Return the number of workers of the peers: that of the case, or hfvit's default for decoding."""
    from hfvit.utils.environment import cores

    if case.peer_workers is not None:
        return case.peer_workers
    return min(8, cores()) if device.type == "cuda" else max(1, cores() // 2)


CONTENDERS = {"hfvit": train_with_hfvit, "timm": train_with_timm, "Trainer": train_with_trainer}
