"""`hfvit doctor` and `hfvit recipes`"""

import argparse

from hfvit.cli.options import exit_codes
from hfvit.recipe.files import find_recipe, shipped_recipes, summary

RECIPES_EPILOG = f"""\
examples:
  hfvit recipes
  hfvit recipes vit_base > my_recipe.yaml

{exit_codes(0, 2)}"""


def add(commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="show the hardware, runtimes and precisions of this machine",
        description="Show GPU, driver, runtimes with their versions, precisions, and what to install for the rest.",
        epilog=exit_codes(0, 2),
    )
    parser.set_defaults(command=doctor)

    parser = commands.add_parser(
        "recipes",
        help="list the shipped recipes, or print one",
        description="List the shipped recipes, or print one.",
        epilog=RECIPES_EPILOG,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this recipe, to copy and change it")
    parser.set_defaults(command=recipes)


def doctor(options: argparse.Namespace) -> None:
    """`hfvit doctor`"""
    from hfvit.doctor import report

    print(report())


def recipes(options: argparse.Namespace) -> None:
    """`hfvit recipes [NAME]`"""
    if options.name:
        print(find_recipe(options.name).read_text(encoding="utf-8"), end="")
        return
    shipped = shipped_recipes()
    width = max(map(len, shipped))
    for name, path in shipped.items():
        print(f"{name:<{width}}  {summary(path)}")
