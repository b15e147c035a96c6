"""`hfvit sweep`"""

import argparse

from hfvit.cli.options import above_0, from_0
from hfvit.recipe.files import find_recipe

EPILOG = """\
SPACE is a YAML file of a recipe's keys, each with a list of choices or with bounds:
  learning_rate: {log: [1.0e-5, 1.0e-3]}
  layer_decay: [0.65, 0.75, 0.85]
  drop_path_rate: {range: [0.0, 0.3]}

Every trial is a run in a folder of its own, judged on the validation split by metric_for_best_model; none of them sees
the test split. The same command goes on after a kill, or with a larger --trials. Needs optuna: pip install
hfvit[sweep].

examples:
  hfvit sweep vit_small space.yaml --trials 20 --output_dir outputs/sweep
  hfvit sweep my_recipe.yaml space.yaml --trials 20 --prune --num_train_epochs 3
"""


def add(commands) -> None:
    parser = commands.add_parser(
        "sweep",
        help="search a recipe's keys for the best run",
        description="Search with optuna, and write the best trial's recipe.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="as `hfvit train` takes it; further options are the recipe's")
    parser.add_argument("space", metavar="SPACE", help="a YAML file")
    parser.add_argument("--trials", type=above_0, default=20, help="in all, earlier ones included [%(default)s]")
    parser.add_argument("--sweep_seed", type=from_0, default=0, help="of the search itself [%(default)s]")
    parser.add_argument("--prune", action="store_true", help="end trials early that are worse than the others' median")
    parser.set_defaults(command=sweep, takes_rest=True)


def sweep(options: argparse.Namespace) -> None:
    """`hfvit sweep RECIPE SPACE [--key value ...]`"""
    find_recipe(options.recipe)
    from hfvit.sweep import read_space, search

    argv, space = [options.recipe, *options.rest], read_space(options.space)
    print("\n" + search(argv, space, options.trials, seed=options.sweep_seed, prune=options.prune))
