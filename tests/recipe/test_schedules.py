"""Learning rate schedules by name: options, fractions of the run, and errors."""

import pytest
import torch
from helpers.messages import option_of
from transformers import get_scheduler, get_wsd_schedule
from transformers.trainer_utils import SchedulerType

from hfvit.errors import RecipeError
from hfvit.recipe.loader import ignored_options
from hfvit.recipe.training_args import HFViTTrainingArguments

# Options that a schedule requires.
REQUIRED = {
    "warmup_stable_decay": {"num_decay_steps": 0.2},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-5},
    "greedy": {"min_lr": 1e-5, "max_lr": 1e-3},
}


def arguments(kind, options=None, **others):
    others = {"learning_rate": 1e-3, **others}
    return HFViTTrainingArguments(
        output_dir="unused", use_cpu=True, lr_scheduler_type=kind, lr_scheduler_kwargs=options, **others
    )


def rates(args, steps):
    """Return the learning rate of each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    schedule = get_scheduler(
        args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, args.scheduler_options(steps)
    )
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("kind", [item.value for item in SchedulerType])
def test_every_schedule_of_transformers_is_usable(kind):
    args = arguments(kind, REQUIRED.get(kind), metric_for_best_model="loss")
    if kind not in ("reduce_lr_on_plateau", "greedy"):
        found = rates(args, 50)
        assert 0 < max(found) <= 1e-3
        assert ("constant" in kind) == (found[-1] == pytest.approx(1e-3))


def test_wsd_with_a_fraction_equals_transformers_with_steps():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = get_wsd_schedule(optimizer, num_warmup_steps=2, num_decay_steps=8, num_training_steps=40)
    expected = []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates(arguments("warmup_stable_decay", {"num_decay_steps": 0.2}, warmup_steps=0.05), 40) == expected
    assert rates(arguments("warmup_stable_decay", {"num_decay_steps": 8}, warmup_steps=2), 40) == expected
    assert expected[2] == expected[31] == 1e-3 > expected[33]


def test_linear_ends_near_zero():
    found = rates(arguments("linear", warmup_steps=0.2), 50)
    assert found[10] == 1e-3 == max(found)
    assert found[-1] == pytest.approx(1e-3 / 40)


@pytest.mark.parametrize("steps", [7, 100, 999])
def test_fractions_of_the_complete_run_fit(steps):
    arguments("warmup_stable_decay", {"num_decay_steps": 0.95}, warmup_steps=0.05).check_stages(steps)


@pytest.mark.parametrize(
    ("kind", "options", "others", "option"),
    [
        ("warmup_stable_decay", None, {}, "lr_scheduler_type"),
        ("warmup_stable_decay", {"num_decay_steps": 0.2, "num_stable_steps": 5}, {}, "lr_scheduler_kwargs"),
        ("warmup_stable_decay", {"num_decay_steps": 0}, {}, "lr_scheduler_kwargs"),
        ("warmup_stable_decay", {"num_decay_steps": 1.5}, {}, "lr_scheduler_kwargs"),
        ("warmup_stable_decay", {"num_decay_steps": "all"}, {}, "lr_scheduler_kwargs"),
        ("warmup_stable_decay", {"num_decay_steps": 0.7}, {"warmup_steps": 0.4}, "lr_scheduler_kwargs"),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 90},
            {"warmup_steps": 20, "max_steps": 100},
            "lr_scheduler_kwargs",
        ),
        ("warmup_stable_decay", {"num_decay_steps": 0.2, "decay_type": "x"}, {}, "lr_scheduler_kwargs"),
        ("cosine_with_min_lr", None, {}, "lr_scheduler_type"),
        ("cosine_with_min_lr", {"min_lr": 0.01}, {}, "lr_scheduler_kwargs"),
        ("greedy", None, {}, "lr_scheduler_kwargs"),  # its default min_lr is 0.001
        ("cosin", None, {}, "lr_scheduler_type"),
    ],
)
def test_unusable_schedule_raises(kind, options, others, option):
    with pytest.raises(RecipeError) as error:
        arguments(kind, options, **others)
    assert option_of(error.value) == option


def test_stages_longer_than_the_run_raise():
    args = arguments("warmup_stable_decay", {"num_decay_steps": 90})  # may fit, until the steps are known
    with pytest.raises(RecipeError, match=r"^lr_scheduler_kwargs: .*\b90\b"):
        args.check_stages(50)


def test_number_that_yaml_reads_as_text_is_converted():
    assert arguments("cosine_with_min_lr", {"min_lr": "1e-5"}).scheduler_options(10)["min_lr"] == 1e-5


@pytest.mark.parametrize(("metric", "mode"), [("accuracy", "max"), ("loss", "min"), ("ece", "min")])
def test_plateau_follows_the_direction_of_the_metric(metric, mode):
    args = arguments("reduce_lr_on_plateau", metric_for_best_model=metric)
    assert args.scheduler_options(10)["mode"] == mode


def test_options_that_a_schedule_ignores_are_reported():
    for key in ("warmup_steps", "lr_scheduler_kwargs"):
        assert key in ignored_options([key], {"finetuning": "full", "lr_scheduler_type": "constant"})
    assert ignored_options(["warmup_steps"], {"finetuning": "full", "lr_scheduler_type": "linear"}) is None
