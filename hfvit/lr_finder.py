"""Find the learning rate of a recipe by a range test."""

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import hfvit
from hfvit.artifacts.lr_finder_record import MIN_STEPS, LearningRateCurve, smoothed_losses, suggest
from hfvit.artifacts.output_dir import lock_folder
from hfvit.artifacts.run_record import command_line
from hfvit.data.starting_recipe import find_and_load, load_given
from hfvit.errors import InterruptedRunError, RecipeError, printable
from hfvit.pipeline import prepare_run
from hfvit.recipe.loader import Recipe, as_options
from hfvit.report.figures import draw_file, learning_rate_figure
from hfvit.training.display import Display
from hfvit.training.lr_range_test import LearningRateRangeTest
from hfvit.utils.checks import check_integer
from hfvit.utils.environment import use_all_cores
from hfvit.utils.global_state import kept_state
from hfvit.utils.quiet import log_level, quiet_run

FOLDER = "lr_finder"  # in the output_dir of the recipe
# as in fastai
LOW = 1e-7
HIGH = 10.0
STEPS = 100
# Everything but the steps themselves is off: neither evaluation nor files.
OVERRIDDEN = {
    "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "logging_strategy": "steps",
    "logging_steps": 1, "early_stopping_patience": None, "ema_decay": None, "swa_start": None, "soup": None,
    "nan_policy": "stop", "lr_scheduler_type": "constant", "lr_scheduler_kwargs": None, "warmup_steps": 0,
    "mix_off_epochs": 0, "progressive_image_size": None, "report_to": "none", "push_to_hub": False,
    "resume_from_checkpoint": None, "seeds": None, "folds": None, "fold": None,
}  # fmt: skip


def main(argv: list[str]) -> None:
    """Run `hfvit train RECIPE --find_lr`, and print the suggestions.

    Args:
        argv: `RECIPE [--key value ...]`, or a local data set in place of the recipe.
    """
    recipe = find_and_load([*argv, *as_options({**OVERRIDDEN, "max_steps": STEPS})])
    folder = Path(recipe.training.output_dir) / FOLDER
    curve = _find(recipe, LOW, HIGH)
    print(f"\n{curve.describe()}\nfiles          {printable(str(folder))}", flush=True)


def find_lr(
    recipe: str | Path | Mapping[str, Any],
    *,
    low: float = LOW,
    high: float = HIGH,
    steps: int = STEPS,
    from_scratch: bool = False,
    **fields: Any,
) -> LearningRateCurve:
    """Train a recipe for some steps with a growing learning rate, and suggest one.

    Model, data, augmentation, optimizer and batch are those of the recipe. The files `lr_finder.json` and
    `lr_finder.png` are written to `output_dir/lr_finder`, no weights.

    Args:
        recipe: as in `hfvit.train`.
        low: learning rate of the first step.
        high: learning rate of the last step.
        steps: number of steps, at least 20; fewer if the loss diverges.
        from_scratch: as in `hfvit.train`.
        **fields: keys of the recipe to override.

    Returns:
        Losses and suggestions.

    Raises:
        RecipeError: the recipe has no learning rate, such as that of a linear probe, or there are several processes.
        ModelError: the loss diverges at once, or never falls.
    """
    if not 0 < low < high:
        raise ValueError(f"low, high: must be positive and ascending, got {low:g} and {high:g}.")
    check_integer("steps", steps, optional=False)
    if steps < MIN_STEPS:
        raise ValueError(f"steps: must be at least {MIN_STEPS}, got {steps}.")
    with kept_state():
        return _find(load_given(recipe, {**fields, **OVERRIDDEN, "max_steps": steps}, from_scratch), low, high)


def _find(recipe: Recipe, low: float, high: float) -> LearningRateCurve:
    """Run the range test of a recipe, and write its files.

    Args:
        recipe: recipe with `OVERRIDDEN`.
        low: learning rate of the first step.
        high: learning rate of the last step.
    """
    args = recipe.training
    if recipe.finetuning.finetuning == "linear_probe":
        raise RecipeError(
            "--find_lr: not available with finetuning=linear_probe, which has no learning rate. Omit it."
        )
    if args.world_size > 1:
        raise RecipeError(
            f"--find_lr: needs one process, got {args.world_size}. Run it without a launcher; the global batch is the"
            " same."
        )
    if not args.learning_rate:
        raise RecipeError("learning_rate: must be above 0 with --find_lr, got 0.")
    folder = Path(args.output_dir) / FOLDER
    with lock_folder(folder, "learning rate finder"), tempfile.TemporaryDirectory() as temporary:
        args.output_dir = temporary  # for what a signal makes the Trainer save
        with (
            Display(args) as display,
            quiet_run(args.verbose, display.with_bars),
            log_level("hfvit", display.log_level),
        ):
            test = _range_test(recipe, display, low, high)
        steepest, minimum_tenth = suggest(test.learning_rates, test.losses)
        curve = LearningRateCurve(
            hfvit_version=hfvit.__version__,
            command=command_line(),
            learning_rates=test.learning_rates,
            losses=test.losses,
            smoothed=smoothed_losses(test.losses).tolist(),
            diverged=test.diverged,
            steepest=steepest,
            minimum_tenth=minimum_tenth,
            recipe=args.learning_rate,
        )
        curve.save(folder)
        draw_file(folder / f"{FOLDER}.png", partial(learning_rate_figure, curve))
    return curve


def _range_test(recipe: Recipe, display: Display, low: float, high: float) -> LearningRateRangeTest:
    """Build the trainer of a recipe, and run the range test.

    Args:
        recipe: recipe with `OVERRIDDEN`.
        display: display of the steps.
        low: learning rate of the first step.
        high: learning rate of the last step.
    """
    args = recipe.training
    if args.device.type == "cpu":
        use_all_cores(args.world_size)
    trainer = prepare_run(recipe).trainer
    display.attach(trainer)
    test = LearningRateRangeTest(trainer, low, high)
    try:
        test.run()
    except InterruptedRunError as error:
        raise InterruptedRunError(f"{error.cause.partition('.')[0]}.", "Nothing was saved.") from None
    return test
