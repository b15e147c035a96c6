"""Optimizers by name: those of transformers, and timm's as `timm/NAME`."""

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from hfvit.errors import RecipeError, nearest

PREFIX = "timm/"
LOOKAHEAD = "lookahead_"  # prefix of timm's factory, before the name of any optimizer
SET_ELSEWHERE = {"lr": "learning_rate", "weight_decay": "weight_decay"}  # argument of an optimizer -> recipe key
ADAM_OPTIONS = {"beta1": "adam_beta1", "beta2": "adam_beta2", "eps": "adam_epsilon"}
# Optimizers of transformers that ignore `ADAM_OPTIONS`, by the start of their names.
WITHOUT_ADAM_OPTIONS = ("sgd", "adafactor", "adagrad", "rmsprop", "grokadamw", "schedule_free_sgd")
# Arguments that optimizers of transformers read from `optim_args`; others read none (transformers 5.24).
TRANSFORMERS_ARGUMENTS = {
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
    "grokadamw": ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"),
    "stable_adamw": ("max_lr", "kahan_sum", "decouple_lr"),
    "adamw_anyprecision": (
        "use_kahan_summation", "momentum_dtype", "variance_dtype", "compensation_buffer_dtype"
    ),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), ("block_size", "bf16_stochastic_round")),
    **dict.fromkeys(
        ("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
        ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3"),
    ),
    **dict.fromkeys(
        ("schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"), ("weight_lr_power", "r")
    ),
}  # fmt: skip
PASSED_ON = ("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit")  # all of `optim_args` go to bitsandbytes
WORDS = {"true": True, "false": False, "none": None}
FLAGS = ("nesterov", "centered")  # of transformers, which takes any other word for false (5.24)
FLAG_WORDS = ("true", "false", "1", "0", "yes", "no")


def is_timm_optimizer(optim: str) -> bool:
    """Return whether `optim` names an optimizer of timm."""
    return str(optim).startswith(PREFIX)


def has_adam_options(optim: str) -> bool:
    """Return whether an optimizer uses `adam_beta1`, `adam_beta2` and `adam_epsilon`."""
    return not _name(optim).startswith((PREFIX, *WITHOUT_ADAM_OPTIONS))


def optimizer_factory(args, model=None) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]:
    """Return a function `(parameter groups, **options) -> optimizer`, and its options.

    Args:
        args: `HFViTTrainingArguments` with the optimizer.
        model: the model, for optimizers of transformers that need it.

    Raises:
        RecipeError: timm has no such optimizer, it cannot train here, or it has no argument of `optim_args`.
    """
    if not is_timm_optimizer(args.optim):
        from transformers import Trainer

        name = _name(args.optim)
        if name not in PASSED_ON:
            given = _split(name, args.optim_args, TRANSFORMERS_ARGUMENTS.get(name, ()))
            for key in set(FLAGS) & set(given):
                if given[key].lower() not in FLAG_WORDS:
                    raise RecipeError(f"optim_args: {key} must be true or false, got '{given[key]}'.")
        return Trainer.get_optimizer_cls_and_kwargs(args, model)
    from timm.optim import create_optimizer_v2

    name = args.optim.removeprefix(PREFIX)
    _check_name(name)
    options = _timm_options(name, args.optim_args)
    return partial(create_optimizer_v2, opt=name), {"lr": args.learning_rate, **options}


def has_fallback(optim: str) -> bool:
    """Return whether an optimizer has a fallback for some weights.

    Muon has one for weights that are not matrices of hidden layers.
    """
    if not is_timm_optimizer(optim):
        return False
    from timm.optim import Muon, get_optimizer_class

    name = optim.removeprefix(PREFIX).removeprefix(LOOKAHEAD)
    return get_optimizer_class(name, bind_defaults=False) is Muon


def unknown_optimizer(name: str, known: list[str]) -> str:
    """Return what to do about an unknown `optim`.

    Args:
        name: the unknown name.
        known: names of transformers' optimizers.
    """
    from timm.optim import list_optimizers

    own = [f"{PREFIX}{other}" for other in list_optimizers()]
    name = name.lower()
    if name in known:
        return f" Did you mean '{name}'?"
    if f"{PREFIX}{name}" in own:
        return f" Did you mean '{PREFIX}{name}'?"
    return nearest(name, known) or nearest(name, own) or f" Choose one of {', '.join(known)}, or timm/NAME."


def _name(optim: str) -> str:
    """Return the name of an optimizer, which may be an `OptimizerNames`."""
    return getattr(optim, "value", optim)


def _check_name(name: str) -> None:
    """Raise `RecipeError` for an optimizer that is unknown or cannot train here."""
    from timm.optim import get_optimizer_info, list_optimizers

    base = name.removeprefix(LOOKAHEAD)
    known = list_optimizers()
    if base not in known:
        hint = nearest(f"{PREFIX}{name}", [f"{PREFIX}{other}" for other in known])
        hint = hint or f" timm has {', '.join(known)}."
        raise RecipeError(f"optim: unknown, got '{PREFIX}{name}'.{hint}")
    info = get_optimizer_info(base)
    if info.second_order:
        raise RecipeError(
            f"optim: not available in hfvit, got '{PREFIX}{name}'. It requires second derivatives of the loss; use"
            " adamw_torch_fused."
        )
    if isinstance(info.opt_class, str):  # of apex or bitsandbytes
        package = info.opt_class.partition(".")[0]
        if importlib.util.find_spec(package) is None or not torch.cuda.is_available():
            raise RecipeError(
                f"optim: requires an NVIDIA GPU and the package {package}, got '{PREFIX}{name}'. Use"
                " adamw_torch_fused."
            )


def _timm_options(name: str, optim_args: str | None) -> dict[str, Any]:
    """Convert `optim_args` to arguments of timm's factory.

    `beta1`, `beta2` and `beta3`, as in transformers, replace values of timm's `betas`.

    Args:
        name: optimizer of timm.
        optim_args: NAME=VALUE, with commas between several, or None.

    Raises:
        RecipeError: the optimizer has no such argument.
    """
    if not optim_args:
        return {}
    from timm.optim import get_optimizer_class, get_optimizer_info

    info = get_optimizer_info(name.removeprefix(LOOKAHEAD))
    signature = inspect.signature(get_optimizer_class(info.name, bind_defaults=False)).parameters
    betas = [f"beta{number}" for number in range(1, info.num_betas + 1)] if info.has_betas else []
    allowed = [key for key in signature if key not in ("params", "betas", "adamw_lr", *SET_ELSEWHERE)] + betas
    options = {key: _value(text) for key, text in _split(f"{PREFIX}{name}", optim_args, allowed).items()}
    for key, value in options.items():
        default = (info.defaults or {}).get(key, signature[key].default if key in signature else 0.0)  # betas
        _check_value(key, value, default)
    given = {key: options.pop(key) for key in betas if key in options}
    if given:
        default = (info.defaults or {}).get("betas") or signature["betas"].default or (0.9, 0.999)
        options["betas"] = tuple(given.get(key, value) for key, value in zip(betas, default, strict=False))
    return options


def _split(optim: str, optim_args: str | None, allowed: Sequence[str]) -> dict[str, str]:
    """Split `optim_args` into names and values.

    Args:
        optim: name of the optimizer.
        optim_args: NAME=VALUE, with commas between several, or None.
        allowed: arguments that the optimizer has.

    Raises:
        RecipeError: the optimizer has no such argument, or another key of a recipe sets it.
    """
    elsewhere = {**SET_ELSEWHERE, **(ADAM_OPTIONS if has_adam_options(optim) else {})}
    options = {}
    for part in optim_args.replace(" ", "").split(",") if optim_args else ():
        key, _, text = part.partition("=")
        if key not in allowed:
            if key in elsewhere:
                raise RecipeError(f"optim_args: must not have {key}, got '{part}'. Set {elsewhere[key]}.")
            choices = f" Choose from {', '.join(allowed)}." if allowed else " Omit it."
            hint = nearest(key, allowed) or choices
            raise RecipeError(f"optim_args: unknown argument of {optim}, got '{part}'.{hint}")
        options[key] = text
    return options


def _check_value(key: str, value: Any, default: Any) -> None:
    """Raise `RecipeError` for a value of another type than the default's.

    Args:
        key: argument of `optim_args`.
        value: its value, from `_value`.
        default: default of the optimizer.
    """
    if isinstance(default, bool):
        if not isinstance(value, bool) and value not in (0, 1):
            raise RecipeError(f"optim_args: {key} must be true or false, got '{value}'.")
    elif isinstance(default, int | float) and isinstance(value, bool | str):
        raise RecipeError(f"optim_args: {key} must be a number, got '{value}'.")


def _value(text: str) -> Any:
    """Convert the text of an argument to a bool, None, int or float, if it is one."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text
