"""`hfvit doctor` and `hfvit recipes`: what is here."""

import argparse

from hfvit.recipe.files import find_recipe, shipped_recipes, summary


def add(commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="tell what this machine can run, and what to install for the rest",
        description="GPU, driver, runtimes with their versions, and the precisions worth using here.",
    )
    parser.set_defaults(command=doctor)

    parser = commands.add_parser(
        "recipes", help="list the recipes that come with hfvit", description="List the shipped recipes, or print one."
    )
    parser.add_argument("name", nargs="?", help="print this recipe, to copy and change")
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
