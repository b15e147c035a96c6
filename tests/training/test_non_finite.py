"""`nan_policy: rewind`, loss spikes, and checks of the first batch."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from helpers.images import LABELS
from helpers.losses import set_training_loss, training_loss
from helpers.messages import assert_logged, assert_names
from helpers.micro_trainer import Stop, losses, make_trainer, weights
from scipy.stats import median_abs_deviation
from transformers import TrainerCallback

from hfvit.data.dataset import check_labels, check_pixels, check_stream_labels
from hfvit.errors import DataError, NonFiniteLossError, RecipeError
from hfvit.training.loss_monitor import BASELINE, HISTORY, MIN_BASELINE, LossMonitor, find_spikes


@pytest.fixture
def breaks(monkeypatch):
    """Make the training loss NaN in these calls, counted from 1."""

    def install(*calls):
        original, count = training_loss(), 0

        def broken(logits, labels, smoothing):
            nonlocal count
            loss = original(logits, labels, smoothing)
            if not torch.is_grad_enabled():
                return loss
            count += 1
            return loss * float("nan") if count in calls else loss

        set_training_loss(monkeypatch, broken)

    return install


REWIND = {"nan_policy": "rewind", "nan_lr_factor": 0.5, "num_train_epochs": 3}


def test_rewind_resumes_with_lower_rate_and_skips_the_batch(tmp_path, breaks, caplog):
    plain = make_trainer(tmp_path / "plain", num_train_epochs=3)
    plain.train()
    breaks(8)
    trainer = make_trainer(tmp_path / "out", ema_decay=0.9, **REWIND)
    trainer.train()
    expected = {"event": "rewind", "step": 8, "to_step": 5, "learning_rate_factor": 0.5}
    assert trainer.events == [expected]
    assert_logged(caplog, "WARNING", 8, 5, 0.5)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    before = [entry for entry in plain.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in history] == list(range(1, 16))
    assert losses(trainer)[:6] == losses(plain)[:6]  # step 6 starts from the weights of step 5
    assert losses(trainer)[6] != losses(plain)[6]
    assert losses(trainer)[7] == losses(trainer)[6]  # logged for the skipped step
    factors = [new["learning_rate"] / old["learning_rate"] for new, old in zip(history[1:], before[1:], strict=True)]
    assert factors == pytest.approx([1] * 4 + [0.5] * 10)
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())
    progress = json.loads((tmp_path / "out" / "checkpoint-15" / "progress.json").read_text())
    assert progress["events"] == [expected]


@pytest.mark.parametrize("batch", [8, 4])
def test_skipped_step_changes_no_weight(tmp_path, breaks, batch):
    breaks(8 * 8 // batch)  # in step 8, of one or two micro-batches
    seen = {}

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = model.timm_model.head.weight.detach().clone()

    trainer = make_trainer(tmp_path, [Record()], **REWIND, per_device_train_batch_size=batch)
    trainer.train()
    assert torch.equal(seen[8], seen[7])
    assert not torch.equal(seen[9], seen[8])
    assert losses(trainer)[7] == losses(trainer)[6]
    assert trainer.non_finite.losses.losses[8] == trainer.non_finite.losses.losses[7]


def test_skipped_step_after_a_resume_logs_the_last_loss_of_the_checkpoint(tmp_path, breaks):
    breaks()
    plain = make_trainer(tmp_path / "plain", num_train_epochs=3)
    plain.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "out", [Stop()], **REWIND).train()
    breaks(1)  # step 6
    resumed = make_trainer(tmp_path / "out", **REWIND)
    resumed.train(str(tmp_path / "out" / "checkpoint-5"))
    assert losses(resumed)[5] == losses(plain)[4]


def test_rewind_without_checkpoint_starts_from_the_beginning(tmp_path, breaks):
    breaks(2)
    trainer = make_trainer(tmp_path, **REWIND)
    trainer.train()
    assert trainer.events == [{"event": "rewind", "step": 2, "to_step": 0, "learning_rate_factor": 0.5}]
    assert len(losses(trainer)) == 15


def test_rewinds_are_counted_across_a_resume(tmp_path, breaks):
    # Called 8 times, then again from step 6 without step 8: call 10 is step 7, call 12 is step 10.
    breaks(8, 12, 17)
    trainer = make_trainer(tmp_path, **REWIND, nan_max_rewinds=2)
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train()
    assert_names(caught.value, 2, "nan_max_rewinds")
    assert [event["learning_rate_factor"] for event in trainer.events] == [0.5, 0.25]
    breaks()
    last = max(tmp_path.glob("checkpoint-*"), key=lambda folder: int(folder.name.removeprefix("checkpoint-")))
    saved = json.loads((last / "progress.json").read_text())["events"]
    assert saved
    resumed = make_trainer(tmp_path, **REWIND)
    resumed.train(str(last))
    assert resumed.events == saved
    plain = make_trainer(tmp_path / "plain", num_train_epochs=3)
    plain.train()
    rate, usual = (
        next(entry["learning_rate"] for entry in each.state.log_history if entry["step"] == 14 and "loss" in entry)
        for each in (resumed, plain)
    )
    assert rate == pytest.approx(saved[-1]["learning_rate_factor"] * usual)
    assert usual > 0


def test_nan_loss_of_several_processes_is_that_of_the_first_step(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(trainer.accelerator, "gather", lambda steps: torch.tensor([9, -1, 7]))
    with pytest.raises(NonFiniteLossError, match=r"\bstep 7\b"):
        trainer.non_finite.check()


def test_rewind_with_save_only_model_raises(tmp_path):
    with pytest.raises(RecipeError, match=r"^nan_policy: .*\bsave_only_model\b"):
        make_trainer(tmp_path, nan_policy="rewind", save_only_model=True)
    with pytest.raises(RecipeError, match=r"^nan_policy: .*\bstop, rewind\b.*'ignore'"):
        make_trainer(tmp_path, nan_policy="ignore")


def test_find_spikes_returns_a_spike_once_and_ignores_noise():
    rng = np.random.default_rng(0)
    losses = 2.0 - np.linspace(0, 1, 200) + rng.normal(0, 0.05, 200)
    assert find_spikes(losses) == []
    losses[[120, 121]] += 3
    ((place, usual),) = find_spikes(losses)
    assert place == 120
    assert usual == pytest.approx(1.5, abs=0.15)
    assert find_spikes(np.full(100, 0.5)) == []


def test_find_spikes_equals_scipys_median_absolute_deviation():
    rng = np.random.default_rng(0)
    losses = np.exp(-np.arange(300) / 1000) * (1 + rng.normal(0, np.repeat([0.005, 0.08], 150)))
    losses[rng.choice(np.arange(20, 300), 24, replace=False)] *= rng.uniform(1.2, 3, 24)
    losses[60:63] *= 3
    expected, was_high = [], False
    for index in range(MIN_BASELINE, 300):
        before = losses[max(0, index - BASELINE) : index]
        median, deviation = np.median(before), median_abs_deviation(before, scale="normal")
        is_high = losses[index] > median + max(8 * deviation, 0.5 * median)
        if is_high and not was_high:
            expected.append((index, pytest.approx(median)))
        was_high = is_high
    assert find_spikes(losses) == expected
    assert len(expected) > 9


@pytest.mark.parametrize("is_read", [False, True])
def test_monitor_keeps_the_first_bad_step_and_the_values_before(is_read):
    monitor = LossMonitor(torch.device("cpu"))
    steps = [([1.0, 2.0], None), ([1.5, 2.5], torch.tensor(0.7)), ([math.nan], 0.1), ([3.0], 0.9), ([math.inf], 0.2)]
    for step, (parts, norm) in enumerate(steps, start=5):
        for part in parts:
            monitor.add(torch.tensor(part))
        monitor.end_step(step, norm, step / 10)
        if is_read:
            assert monitor.bad_step == (7 if step >= 7 else -1)
    assert monitor.bad_step == 7
    assert monitor.last_good == pytest.approx((4.0, 0.7, 0.6))


def test_monitor_judges_a_step_before_it_is_overwritten():
    monitor = LossMonitor(torch.device("cpu"))
    for step in range(1, HISTORY + 9):
        monitor.add(torch.tensor(math.nan if step == 3 else 1.0))
        monitor.end_step(step, 1.0, 0.1)
    assert monitor.bad_step == 3


def test_monitor_restores_the_loss_of_a_run_without_steps_only():
    monitor = LossMonitor(torch.device("cpu"))
    monitor.restore(2.5)
    assert monitor.last_good == pytest.approx((2.5, math.nan, math.nan), nan_ok=True)
    monitor.add(torch.tensor(1.0))
    monitor.end_step(1, 0.5, 0.1)
    assert monitor.last_good == pytest.approx((1.0, 0.5, 0.1))
    monitor.restore(2.5)
    assert monitor.last_good == pytest.approx((1.0, 0.5, 0.1))


def test_spikes_do_not_depend_on_the_interval_of_calls():
    rng = np.random.default_rng(1)
    values = 1 + rng.normal(0, 0.02, 60)
    values[50] = 4
    for pause in (1, 7, 60):
        watch, found = LossMonitor(torch.device("cpu")), []
        for step, value in enumerate(values, start=101):
            watch.add(torch.tensor(value))
            watch.end_step(step, 1.0, 0.1)
            if step % pause == 0 or step == 160:
                found += watch.spikes(torch.stack([torch.zeros(HISTORY), 2 * watch.losses]))  # of two processes
        assert [spike["step"] for spike in found] == [151]
        assert found[0]["loss"] == pytest.approx(4)


def test_loss_spike_is_logged_and_recorded(tmp_path, monkeypatch, caplog):
    original, count = training_loss(), 0

    def spiking(logits, labels, smoothing):
        nonlocal count
        count += torch.is_grad_enabled()
        return original(logits, labels, smoothing) * (20 if count == 30 and torch.is_grad_enabled() else 1)

    set_training_loss(monkeypatch, spiking)
    trainer = make_trainer(tmp_path, num_train_epochs=7, logging_steps=4)
    trainer.train()
    assert [(event["event"], event["step"]) for event in trainer.events] == [("loss_spike", 30)]
    assert_logged(caplog, "WARNING", 30)


def test_check_pixels_warns_of_unusual_values(caplog):
    images = torch.randn(8, 3, 4, 4)
    check_pixels(images)
    images[:5] = 0.5
    with caplog.at_level(logging.WARNING):
        check_pixels(images)
    assert_logged(caplog, "WARNING", 5, 8)
    images[:] = torch.arange(8.0).view(8, 1, 1, 1)
    with pytest.raises(DataError, match=r"\b8\b.*\bimage_column\b"):
        check_pixels(images)
    images[3, 0, 0, 0] = float("inf")
    with pytest.raises(DataError, match=r"\bimage_mean\b.*\bimage_std\b"):
        check_pixels(images)


@pytest.mark.parametrize(("levels", "warns"), [(15, True), (200, False)])
def test_check_pixels_of_dark_images_warns(caplog, levels, warns):
    images = torch.randint(0, levels, (8, 3, 16, 16)) / 255  # 15: 12 bits of a 16-bit image
    with caplog.at_level(logging.WARNING):
        check_pixels((images - 0.5) / 0.25)
    assert bool(caplog.records) == warns


def test_train_checks_its_first_batch(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.augmentation.scale = trainer.augmentation.scale * float("inf")
    with pytest.raises(DataError, match=r"\bimage_mean\b.*\bimage_std\b"):
        trainer.train()


def test_check_labels_of_one_class_raises(caplog):
    check_labels(np.array([0, 0, 1]), LABELS)
    check_labels(np.array([0, 0]), ["only"])
    with pytest.raises(DataError, match=r"\b2\b.*'green'.*\b3\b.*\btrain_split\b"):
        check_labels(np.array([1, 1]), LABELS)
    with caplog.at_level(logging.WARNING):
        check_stream_labels(torch.ones(8, dtype=torch.long), LABELS, repeats=1)
        check_stream_labels(torch.ones(32, dtype=torch.long), LABELS, repeats=4)  # 8 images
        assert not caplog.records
        check_stream_labels(torch.ones(32, dtype=torch.long), LABELS, repeats=1)
    assert_logged(caplog, "WARNING", 32, "'green'")
