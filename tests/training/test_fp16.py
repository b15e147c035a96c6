"""Training with fp16 and loss scaling, on the CPU with the scaler and the autocast of a GPU run."""

import math

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.losses import set_training_loss, training_loss
from helpers.micro_trainer import assert_resumes_exactly, losses, make_trainer, weights
from transformers import TrainerCallback

from hfvit.errors import NonFiniteLossError
from hfvit.training.loss_monitor import MAX_SKIPPED_STEPS, LossMonitor
from hfvit.training.trainer import HFViTTrainer

OVERFLOWING = 2.0**24  # gradients are infinite until the scaler has halved it a few times


class CpuFp16Trainer(HFViTTrainer):
    """Trainer in fp16 on the CPU, which accelerate allows on a GPU only."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.state._mixed_precision = "fp16"
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=OVERFLOWING)


class WeightsOfSteps(TrainerCallback):
    """Record the head's weights and the scale after each step."""

    def __init__(self):
        self.weights, self.scales = {}, {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.weights[state.global_step] = model.timm_model.head.weight.detach().clone()
        self.scales[state.global_step] = optimizer.scaler.get_scale()


@pytest.fixture(autouse=True)
def _own_accelerator_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trainer(folder, callbacks=None, **options):
    return make_trainer(folder, callbacks, trainer_class=CpuFp16Trainer, **options)


def test_overflow_skips_steps_and_trains_on(tmp_path):
    seen = WeightsOfSteps()
    subject = trainer(tmp_path, [seen], num_train_epochs=3)
    subject.train()
    norms = {entry["step"]: entry["grad_norm"] for entry in subject.state.log_history if "grad_norm" in entry}
    skipped = [step for step, norm in norms.items() if not math.isfinite(norm)]
    assert 1 in skipped
    assert len(skipped) < 15
    assert seen.scales[15] == OVERFLOWING / 2 ** len(skipped)
    for step in range(2, 16):
        assert torch.equal(seen.weights[step], seen.weights[step - 1]) == (step in skipped)
    assert all(math.isfinite(loss) for loss in losses(subject))
    assert all(torch.isfinite(value).all() for value in weights(subject).values())
    assert subject.events == []


def test_resume_continues_the_scale(tmp_path):
    assert_resumes_exactly(trainer, tmp_path)


@pytest.mark.parametrize("policy", ["stop", "rewind"])
def test_nan_loss_is_found_with_a_scaler(tmp_path, monkeypatch, policy):
    original, count = training_loss(), 0

    def broken(logits, labels, smoothing):
        nonlocal count
        loss = original(logits, labels, smoothing)
        count += torch.is_grad_enabled()
        return loss * float("nan") if count == 7 and torch.is_grad_enabled() else loss

    set_training_loss(monkeypatch, broken)
    subject = trainer(tmp_path, nan_policy=policy)
    if policy == "stop":
        with pytest.raises(NonFiniteLossError, match=r"\bstep 7\b"):
            subject.train()
    else:
        subject.train()
        assert [(event["event"], event["step"]) for event in subject.events] == [("rewind", 7)]


def test_monitor_reports_gradients_that_stay_infinite():
    for scaling, first_bad in ((False, 3), (True, 3 + MAX_SKIPPED_STEPS)):
        monitor = LossMonitor(torch.device("cpu"), loss_scaling=scaling)
        for step in range(1, 60):
            monitor.add(torch.tensor(1.0))
            monitor.end_step(step, 1.0 if step < 3 else math.inf, 0.1)
        assert int(monitor.bad_step) == first_bad


def test_monitor_allows_infinite_gradients_between_finite_ones():
    monitor = LossMonitor(torch.device("cpu"), loss_scaling=True)
    for step in range(1, 200):
        monitor.add(torch.tensor(1.0))
        monitor.end_step(step, math.inf if step % 20 else 1.0, 0.1)
    assert int(monitor.bad_step) == -1
