"""`hfvit sweep`."""

import argparse

from hfvit.cli.options import exit_codes, non_negative_int, positive_int
from hfvit.recipe.files import find_recipe

EPILOG = f"""\
SPACE is a YAML file that maps recipe keys to a list of choices or to bounds:
  learning_rate: {{log: [1.0e-5, 1.0e-3]}}
  layer_decay: [0.65, 0.75, 0.85]
  drop_path_rate: {{range: [0.0, 0.3]}}

Each trial is a run in its own subfolder of output_dir. Trials are compared by metric_for_best_model on the validation
split; the test split is not used. The same command resumes a stopped sweep, and a larger --trials adds trials. Install
optuna with: pip install "hfvit[sweep]"

examples:
  hfvit sweep vit_small space.yaml --trials 20 --output_dir outputs/sweep
  hfvit sweep my_recipe.yaml space.yaml --trials 20 --prune --num_train_epochs 3

{exit_codes(0, 2, 7, 75)}"""


def add(commands) -> None:
    """Add the parser of `hfvit sweep`."""
    parser = commands.add_parser(
        "sweep",
        help="search hyperparameters with optuna",
        description="Search hyperparameters of a recipe with optuna, and write the recipe of the best trial.",
        epilog=EPILOG,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="recipe name or YAML file, and options of `hfvit train`")
    parser.add_argument("space", metavar="SPACE", help="YAML file with the search space")
    parser.add_argument(
        "--trials", type=positive_int, default=20, help="total number of trials, earlier ones included [%(default)s]"
    )
    parser.add_argument(
        "--sweep_seed", type=non_negative_int, default=0, help="seed of the sampler (TPE) [%(default)s]"
    )
    parser.add_argument("--prune", action="store_true", help="stop trials that are worse than the median (optuna)")
    parser.set_defaults(command=sweep, accepts_recipe_options=True)


def sweep(options: argparse.Namespace) -> None:
    """Run `hfvit sweep RECIPE SPACE [--key value ...]`."""
    find_recipe(options.recipe)
    from hfvit.sweep import Sweep, read_space

    space = read_space(options.space)
    study = Sweep([options.recipe, *options.rest], space, options.sweep_seed, options.prune)
    print("\n" + study.run(options.trials))
