"""Training with timm's optimizers against timm's own factory, and resume with optimizers and schedules."""

import copy
from functools import partial

import pytest
import torch
from helpers.micro_trainer import LAYER_DECAY, LR, WEIGHT_DECAY, assert_resumes_exactly, make_trainer
from timm.optim import create_optimizer_v2, muon
from transformers import get_cosine_schedule_with_warmup

from hfvit.errors import RecipeError
from hfvit.utils import matmul

# Muon's fallback is for the first and the last layer, positions and tokens.
FALLBACK = {"fallback_list": ("head.*", "patch_embed.*"), "fallback_no_weight_decay": True}


@pytest.fixture
def emulated_bfloat16(monkeypatch):
    """Set whether bfloat16 counts as emulated by the CPU."""

    def set_emulated(is_emulated):
        monkeypatch.setattr(matmul, "times_slower", lambda device, dtype: 30.0 if is_emulated else 0.5)

    return set_emulated


@pytest.mark.parametrize("name", ["nadamuon", "muon", "lion", "adopt", "mars", "laprop", "nadamw", "adafactorbv"])
def test_trainer_takes_the_steps_of_timms_factory(tmp_path, name, emulated_bfloat16):
    emulated_bfloat16(False)
    trainer = make_trainer(tmp_path, optim=f"timm/{name}")
    ours = trainer.model.timm_model
    theirs = copy.deepcopy(ours)
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(10, optimizer)
    options = FALLBACK if "muon" in name else {}
    reference = create_optimizer_v2(theirs, name, lr=LR, weight_decay=WEIGHT_DECAY, layer_decay=LAYER_DECAY, **options)
    for group in reference.param_groups:
        group["lr"] = LR * group["lr_scale"]
    reference_scheduler = get_cosine_schedule_with_warmup(reference, 2, 10)
    for _ in range(4):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for part in (optimizer, scheduler, reference, reference_scheduler):
            part.step()
    for (key, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("name", ["muon", "adamuon", "lookahead_muon"])
def test_muon_avoids_emulated_bfloat16(tmp_path, name, emulated_bfloat16, monkeypatch):
    iterate = muon.zeropower_via_newtonschulz
    gradient, weights = torch.randn(32, 32), {}
    for is_emulated, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        emulated_bfloat16(is_emulated)
        trainer = make_trainer(tmp_path, optim=f"timm/{name}", layer_decay=1.0)
        ours = trainer.model.timm_model.blocks[0].attn.proj.weight
        theirs = ours.detach().clone().requires_grad_()
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        reference = create_optimizer_v2([theirs], name, lr=LR, weight_decay=WEIGHT_DECAY)
        trainer.create_optimizer().step()
        with monkeypatch.context() as patch:
            patch.setattr(muon, "zeropower_via_newtonschulz", partial(iterate, dtype=dtype))
            reference.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert muon.zeropower_via_newtonschulz is iterate
        weights[dtype] = ours
    assert not torch.equal(*weights.values())


@pytest.mark.parametrize("optim", ["timm/muon", "timm/nadamuon", "timm/lookahead_adafactorbv", "adafactor"])
def test_resumed_run_equals_uninterrupted(tmp_path, optim):
    assert_resumes_exactly(lambda *args: make_trainer(*args, optim=optim, ema_decay=0.9), tmp_path)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("warmup_stable_decay", {"num_decay_steps": 0.4}),
        pytest.param("reduce_lr_on_plateau", {"factor": 0.5, "patience": 0}, marks=pytest.mark.slow),
        pytest.param("greedy", {"factor": 0.5, "patience": 0, "min_lr": 1e-5}, marks=pytest.mark.slow),
    ],
)
def test_resumed_run_with_a_schedule_equals_uninterrupted(tmp_path, kind, options):
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    given = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": options, **(evaluation if kind[0] in "rg" else {})}
    assert_resumes_exactly(lambda *args: make_trainer(*args, **given), tmp_path)


def test_trainer_creates_the_schedule_with_steps(tmp_path):
    trainer = make_trainer(
        tmp_path,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": 0.3},
        layer_decay=1.0,
    )
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates[:8] == [0.0, LR / 2, *[LR] * 6]  # two steps of warmup, three of decay, of ten
    assert LR > rates[8] > rates[9] > 0
    assert trainer.args.lr_scheduler_kwargs == {"num_decay_steps": 0.3}


@pytest.mark.parametrize(
    ("kind", "options"), [("polynomial", {"power": "x"}), ("cosine", {"num_cycles": float("inf")})]
)
def test_schedule_that_would_fail_in_the_middle_of_the_run_raises(tmp_path, kind, options):
    trainer = make_trainer(tmp_path, lr_scheduler_type=kind, lr_scheduler_kwargs=options)
    with pytest.raises(RecipeError, match=r"^lr_scheduler_kwargs: "):
        trainer.train()
