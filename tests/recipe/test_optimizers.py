"""Optimizers of timm by name: every name of the installed timm, their arguments, and errors."""

import copy
import inspect
import re

import pytest
import timm
import torch
from helpers.messages import option_of
from helpers.recipes import ARCHITECTURE, MICRO
from timm.optim import Muon, list_optimizers
from transformers import trainer_optimizer
from transformers.training_args import OptimizerNames

from hfvit.errors import RecipeError
from hfvit.recipe.loader import ignored_options
from hfvit.recipe.optimizers import (
    PASSED_ON,
    TRANSFORMERS_ARGUMENTS,
    has_adam_options,
    has_fallback,
    optimizer_factory,
)
from hfvit.recipe.training_args import OPTIMIZERS_NOT_AVAILABLE, HFViTTrainingArguments
from hfvit.training.param_groups import build_param_groups


def arguments(optim, optim_args=None, **options):
    return HFViTTrainingArguments(output_dir="unused", use_cpu=True, optim=optim, optim_args=optim_args, **options)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model(ARCHITECTURE, img_size=16, num_classes=3, **MICRO)


def train(name, vit):
    """Take two steps with random gradients; every weight must change."""
    args = arguments(f"timm/{name}", learning_rate=1e-3)
    model = copy.deepcopy(vit)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    create, options = optimizer_factory(args)
    optimizer = create(build_param_groups(model, 1e-3, 0.05, with_fallback=has_fallback(args.optim)), **options)
    optimizer.step()
    optimizer.step()  # the first step of Adopt changes nothing
    for (key, after), before in zip(model.named_parameters(), vit.parameters(), strict=True):
        assert after.isfinite().all(), (name, key)
        assert not torch.equal(after, before), (name, key)


def test_every_optimizer_of_timm_trains_or_is_refused(vit):
    refused = set()
    for name in [*list_optimizers(exclude_filters=["kron*"]), "lookahead_nadamuon"]:
        try:
            train(name, vit)
        except RecipeError:
            refused.add(name)
    needs_gpu = {name for name in list_optimizers() if name.startswith(("bnb", "fused"))}
    assert refused - needs_gpu == {"adahessian"}
    assert torch.cuda.is_available() or needs_gpu <= refused


@pytest.mark.slow
def test_kron_trains(vit):
    train("kron", vit)  # compiles its steps


@pytest.mark.parametrize(
    ("optim", "optim_args", "option"),
    [
        ("timm/muom", None, "optim"),
        ("timm/lookahead_muom", None, "optim"),
        ("timm/x_adamw", None, "optim"),  # timm's factory would take the part after the underscore
        ("timm/", None, "optim"),
        ("timm/adahessian", None, "optim"),
        ("timm/fusedadam", None, "optim"),
        ("muon", None, "optim"),
        ("timm/muon", "momentun=0.9", "optim_args"),
        ("timm/muon", "lr=0.1", "optim_args"),
        ("timm/muon", "conv_mode=x", "optim_args"),
        ("timm/muon", "adjust_lr_fn=x", "optim_args"),
        ("timm/lion", "eps=1e-8", "optim_args"),  # timm's factory would drop it
        ("timm/lion", "beta3=0.9", "optim_args"),
        ("timm/adamw", "beta1=2", "optim_args"),
        ("adamw_torch_fused", "beta1=0.1", "optim_args"),  # transformers would ignore these
        ("adamw_torch", "nonsense=3,amsgrad=True", "optim_args"),
        ("adafactor", "scale_parameter=True", "optim_args"),
        ("sgd", "momentum=0.9,momentun=0.9", "optim_args"),
        ("sgd", "weight_decay=0.1", "optim_args"),  # the parameter groups have their own
        ("sgd", "=1", "optim_args"),
        ("sgd", "momentum=0.9,nesterov=maybe", "optim_args"),  # transformers would take it for false
        ("rmsprop", "centered=2", "optim_args"),
        ("timm/sgd", "momentum=0.9,nesterov=maybe", "optim_args"),
        ("timm/adamw", "amsgrad=2", "optim_args"),
        ("timm/muon", "momentum=true", "optim_args"),
        ("adagrad", "beta1=0.9", "optim_args"),
    ],
)
def test_unusable_optimizer_raises(optim, optim_args, option):
    with pytest.raises(RecipeError) as error:
        arguments(optim, optim_args)
    assert option_of(error.value) == option


@pytest.mark.parametrize(
    ("typed", "suggested"),
    [("timm/nadamon", "timm/nadamuon"), ("lamb", "timm/lamb"), ("SGD", "sgd"), ("AdamW", "timm/adamw")],
)
def test_unknown_optimizer_has_a_suggestion(typed, suggested):
    with pytest.raises(RecipeError, match=rf"'{suggested}'"):
        arguments(typed)


def test_optim_args_are_converted():
    text = "beta2=0.99, fallback_lr_scale=0.5,ns_steps=3,nesterov=true,ns_coefficients=polar_express"
    create, options = optimizer_factory(arguments("timm/muon", text, learning_rate=0.25))
    group = create([torch.nn.Parameter(torch.zeros(4, 4))], **options).param_groups[0]
    expected = {
        "lr": 0.25, "betas": (0.9, 0.99), "fallback_lr_scale": 0.5, "ns_steps": 3, "nesterov": True,
        "ns_coefficients": "polar_express",
    }  # fmt: skip
    assert {key: group[key] for key in expected} == expected


def test_optim_args_of_transformers_are_passed_on():
    _, options = optimizer_factory(arguments("sgd", "momentum=0.5, nesterov=true", learning_rate=0.25))
    assert options == {"lr": 0.25, "momentum": 0.5, "nesterov": True}
    assert optimizer_factory(arguments("adagrad", "eps=0.5"))[1]["eps"] == 0.5
    assert optimizer_factory(arguments("rmsprop", "centered=true"))[1]["centered"] is True


def available_handlers():
    """Return transformers' functions that create an optimizer, by its name."""
    handlers = trainer_optimizer._OPTIMIZER_HANDLERS
    return {key.value: code for key, code in handlers.items() if not key.value.startswith(OPTIMIZERS_NOT_AVAILABLE)}


@pytest.mark.parametrize("name", sorted(available_handlers().keys() - set(PASSED_ON)))
def test_arguments_are_those_that_transformers_reads(name):
    source = inspect.getsource(available_handlers()[name])
    read = set(re.findall(r'optim_args\.(?:get|pop)\(\s*"(\w+)"', source))
    read |= set(re.findall(r'"(\w+)" in ctx\.optim_args', source))
    for names in re.findall(r"for key in (\(.*?\)):", source):
        read |= set(re.findall(r"\w+", names.replace('"', " ")))
    if "bitsandbytes" in source and "ademamix" not in name:
        read = set()
    assert set(TRANSFORMERS_ARGUMENTS.get(name, ())) == read - {"weight_decay"}
    if "bitsandbytes" not in source and "schedulefree" not in source:
        assert has_adam_options(name) == ("ctx.adam_kwargs" in source)


@pytest.mark.parametrize("name", list_optimizers("*muon"))
def test_muon_has_a_fallback(name):
    create, options = optimizer_factory(arguments(f"timm/{name}"))
    assert isinstance(create([torch.nn.Parameter(torch.zeros(4, 4))], **options), Muon)
    assert has_fallback(f"timm/{name}")
    assert not has_fallback("timm/nadamw")
    assert not has_fallback("adamw_torch")


def test_adam_options_are_ignored_with_other_optimizers():
    keys = ("adam_beta1", "adam_beta2", "adam_epsilon")
    assert all(key in ignored_options(keys, {"finetuning": "full", "optim": "timm/lion"}) for key in keys)
    for optim in ("sgd", "adafactor", OptimizerNames.RMSPROP_BNB):
        assert all(key in ignored_options(keys, {"finetuning": "full", "optim": optim}) for key in keys)
    assert "adam_epsilon" in ignored_options(keys, {"finetuning": "full", "optim": OptimizerNames.PAGED_LION})
    assert ignored_options(keys[:2], {"finetuning": "full", "optim": "lion_8bit"}) is None
    for optim in ("adamw_torch", OptimizerNames.ADAMW_BNB, OptimizerNames.SCHEDULE_FREE_ADAMW):
        assert ignored_options(keys, {"finetuning": "full", "optim": optim}) is None


def test_optimizer_and_schedule_are_ignored_by_a_linear_probe():
    keys = (
        "optim",
        "optim_args",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
    )
    ignored = ignored_options(keys, {"finetuning": "linear_probe", "optim": "adamw_torch"})
    assert all(key in ignored for key in keys)
