"""Learning rate range test against a plain loop, its smoothing and its suggestions."""

import numpy as np
import pandas
import pytest
import torch
from helpers.micro_trainer import CLIP, LAYER_DECAY, SEED, SMOOTHING, WEIGHT_DECAY, make_trainer, parts
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from hfvit.artifacts.lr_finder_record import smoothed_losses, suggest
from hfvit.data.dataset import collate
from hfvit.data.samplers import EpochSampler
from hfvit.errors import ModelError
from hfvit.training.lr_range_test import LearningRateRangeTest

LOW, HIGH, STEPS = 1e-4, 1e-1, 12


def plain_loop(batch_size=8):
    """Return the loss of each step of a plain PyTorch loop with the same learning rates."""
    model, train, _, _ = parts()
    sampler = EpochSampler(len(train), batch_size, SEED)
    loader = DataLoader(train, batch_size=batch_size, sampler=sampler, collate_fn=collate)
    optimizer = create_optimizer_v2(
        model.timm_model, opt="adamw", lr=LOW, weight_decay=WEIGHT_DECAY, layer_decay=LAYER_DECAY, betas=(0.9, 0.999)
    )
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    rates = np.geomspace(LOW, HIGH, STEPS)
    losses = []
    model.train()
    while len(losses) < STEPS:
        sampler.set_epoch(len(losses) // len(loader))
        for batch in loader:
            if len(losses) == STEPS:
                break
            for group in optimizer.param_groups:
                group["lr"] = rates[len(losses)] * group["lr_scale"]
            loss = criterion(model(train.augmentation(batch)).logits, batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            losses.append(loss.item())
    return rates, losses


class GroupRates(TrainerCallback):
    """Record the learning rates of all parameter groups in each step."""

    def __init__(self):
        self.rates = []

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def run(tmp_path, high=HIGH, steps=STEPS, callbacks=(), **options):
    options = {"max_steps": steps, "eval_strategy": "no", "save_strategy": "no", **options}
    test = LearningRateRangeTest(make_trainer(tmp_path, [*callbacks], **options), LOW, high)
    test.run()
    return test


@pytest.mark.parametrize("per_device", [None, 4])
def test_losses_equal_those_of_a_plain_loop(tmp_path, per_device):
    rates, losses = plain_loop()
    recorded = GroupRates()
    test = run(tmp_path, callbacks=[recorded], per_device_train_batch_size=per_device)
    assert test.learning_rates == pytest.approx(rates, rel=1e-9)
    assert test.losses == pytest.approx(losses, rel=1e-4)
    assert not test.diverged
    groups = np.array(recorded.rates)
    assert groups[:, 0] == pytest.approx(rates, rel=1e-9)  # the first group has the recipe's rate
    assert groups.min() < rates[0] * LAYER_DECAY * 1.01
    assert groups / groups[:, :1] == pytest.approx(np.tile(groups[:1] / groups[0, 0], (STEPS, 1)))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_test_ends_when_the_loss_diverges(tmp_path):
    test = run(tmp_path, high=1e4, steps=60, optim="sgd", max_grad_norm=0)
    assert test.diverged
    assert len(test.losses) < 60
    assert np.isfinite(test.losses).all()


def test_test_in_bf16_is_close_to_fp32(tmp_path):
    exact, rounded = (run(tmp_path / str(bf16), high=1e-2, bf16=bf16) for bf16 in (False, True))
    assert rounded.losses == pytest.approx(exact.losses, rel=0.05)


def test_steps_that_a_loss_scaler_skips_are_not_recorded(tmp_path):
    trainer = make_trainer(
        tmp_path, max_steps=STEPS, eval_strategy="no", save_strategy="no", max_grad_norm=0, optim="adamw_torch"
    )
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-100)
    test = LearningRateRangeTest(trainer, LOW, HIGH)
    test.run()
    assert len(test.losses) == STEPS - 1  # the first step overflows
    assert test.learning_rates == pytest.approx(np.geomspace(LOW, HIGH, STEPS)[:-1])


def test_smoothing_equals_pandas():
    losses = np.random.default_rng(0).normal(2.0, 0.3, 50).tolist()
    expected = pandas.Series(losses).ewm(alpha=0.1, adjust=True).mean()
    assert smoothed_losses(losses, 0.9) == pytest.approx(expected.to_numpy())


def test_suggestions_of_a_known_curve():
    rates = np.geomspace(1e-7, 10, 400)
    place = np.log10(rates)
    # falls around 1e-4, is lowest at 1e-2, and rises
    losses = 2.3 - 1.5 / (1 + np.exp(-6 * (place + 4))) + 0.5 * np.maximum(0, place + 2) ** 2
    steepest, minimum_tenth = suggest(rates.tolist(), losses.tolist())
    assert 1e-4 / 2 < steepest < 1e-4 * 3  # smoothing moves it to the right
    assert 1e-3 / 2 < minimum_tenth < 1e-3 * 3


@pytest.mark.parametrize("losses", [[2.0] * 5, np.linspace(1, 3, 100).tolist()])
def test_curve_without_a_fall_has_no_suggestion(losses):
    with pytest.raises(ModelError, match=r"^--find_lr: "):
        suggest(np.geomspace(1e-7, 10, len(losses)).tolist(), losses)
