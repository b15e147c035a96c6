"""A reproducible Trainer with a micro model and generated images."""

import numpy as np
import torch
from datasets import Image
from helpers.images import LABELS, colored_split
from helpers.models import build_model
from helpers.recipes import ARCHITECTURE, MICRO
from timm.data import resolve_data_config
from transformers import TrainerCallback, set_seed

from hfvit.artifacts.checkpoint import commit_checkpoint, newest_checkpoint
from hfvit.data.dataset import ArrayReader, ImageDataset
from hfvit.data.pixel_cache import cached_pixels
from hfvit.recipe.training_args import HFViTTrainingArguments
from hfvit.training.trainer import HFViTTrainer
from hfvit.transforms.augmentation import Augmentation
from hfvit.transforms.mixup import BatchMixing
from hfvit.transforms.preprocessing import Preprocessing

SEED, LR, WEIGHT_DECAY, LAYER_DECAY, SMOOTHING, CLIP = 11, 3e-3, 0.05, 0.8, 0.1, 1.0


def parts(rows=40, policy="basic", repeats=1, network=(ARCHITECTURE, MICRO)):
    """Create a Trainer with the same micro model and data sets in each call."""
    architecture, timm_kwargs = network
    set_seed(SEED)
    model = build_model(LABELS, architecture=architecture, image_size=16, timm_kwargs=timm_kwargs)
    data_config = resolve_data_config(model.config.pretrained_cfg)
    splits = [
        colored_split(n, seed)
        .rename_column("img", "image")
        .cast_column("image", Image(decode=False))
        .add_column("row", range(n))
        for n, seed in ((rows, 0), (13, 1))
    ]
    readers = [ArrayReader(cached_pixels(split, "split", (16, 16), False), np.arange(len(split))) for split in splits]
    augmentation = Augmentation.from_config(data_config, crop_scale=(0.5, 1.0), policy=policy)
    train = ImageDataset(splits[0]["label"], readers[0], augmentation, seed=SEED, repeats=repeats)
    return model, train, ImageDataset(splits[1]["label"], readers[1]), Preprocessing(data_config)


def make_trainer(
    output_dir,
    callbacks=None,
    rows=40,
    policy="basic",
    repeats=1,
    mixing=None,
    objective=None,
    trainer_class=HFViTTrainer,
    network=(ARCHITECTURE, MICRO),
    **kwargs,
):
    model, train, validation, preprocessing = parts(rows, policy, repeats, network)
    defaults = {
        "learning_rate": LR, "weight_decay": WEIGHT_DECAY, "layer_decay": LAYER_DECAY, "max_grad_norm": CLIP,
        "label_smoothing_factor": SMOOTHING, "global_batch_size": 8, "num_train_epochs": 2, "warmup_steps": 2,
        "logging_steps": 1, "seed": SEED, "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    args = HFViTTrainingArguments(output_dir=str(output_dir), **{**defaults, **kwargs})
    return trainer_class(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        callbacks=callbacks,
        preprocessing=preprocessing,
        objective=objective,
        mixing=BatchMixing(len(LABELS), **mixing) if mixing else None,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def limit(trainer, most, evaluation=False):
    """Raise out-of-memory errors for more than `most` images."""
    forward = trainer.model.timm_model.forward_features

    def limited(pixel_values, *args, **kwargs):
        if len(pixel_values) > most and torch.is_grad_enabled() != evaluation:
            forward(pixel_values, *args, **kwargs)  # runs first, and advances the random generators
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
        return forward(pixel_values, *args, **kwargs)

    trainer.model.timm_model.forward_features = limited
    trainer.model.timm_model.blocks[0].drop_path1 = torch.nn.Dropout(0.1)
    return trainer


class Stop(TrainerCallback):
    """Callback that interrupts a training after step 8."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 8:
            raise KeyboardInterrupt


def assert_resumes_exactly(prepared, tmp_path):
    """Assert that an interrupted and resumed run equals an uninterrupted one."""
    import pytest  # here, as processes that are killed import this module, too

    unbroken = prepared(tmp_path / "unbroken")
    unbroken.train()
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "killed", [Stop()]).train()
    resumed = prepared(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=str(newest_checkpoint(tmp_path / "killed")))
    assert losses(resumed) == losses(unbroken)
    final = weights(unbroken)
    assert all(torch.equal(value, final[name]) for name, value in weights(resumed).items())


def make_checkpoint(folder, name="checkpoint-1"):
    staged = folder / ".saving"
    staged.mkdir(parents=True)
    for file in ("trainer_state.json", "rng_state.pth"):
        (staged / file).write_text("{}")
    commit_checkpoint(staged, folder / name)
    return folder / name
