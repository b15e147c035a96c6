"""`hfvit doctor` and `hfvit recipes`."""

import argparse
import textwrap

from hfvit.cli.options import exit_codes
from hfvit.recipe.files import find_recipe, read_head, read_yaml, shipped_recipes

RECIPES_EPILOG = f"""\
examples:
  hfvit recipes
  hfvit recipes vit_base > my_recipe.yaml

{exit_codes(0, 2)}"""


def add(commands) -> None:
    """Add the parsers of `hfvit doctor` and `hfvit recipes`."""
    parser = commands.add_parser(
        "doctor",
        help="show the hardware, runtimes and precisions of this machine",
        description="Show GPU, driver, installed runtimes, precisions, and how to install what is missing.",
        epilog=exit_codes(0, 2),
    )
    parser.set_defaults(command=doctor)

    parser = commands.add_parser(
        "recipes",
        help="list the shipped recipes, or print one",
        description="List the shipped recipes with model, data, measured time and accuracy, or print one.",
        epilog=RECIPES_EPILOG,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this recipe, to copy and change it")
    parser.set_defaults(command=recipes)


def doctor(options: argparse.Namespace) -> None:
    """Run `hfvit doctor`."""
    from hfvit.doctor import report

    print(report())


def recipes(options: argparse.Namespace) -> None:
    """Run `hfvit recipes [NAME]`."""
    if options.name:
        print(find_recipe(options.name).read_text(encoding="utf-8"), end="")
        return
    print("\n\n".join(describe_recipe(name) for name in shipped_recipes()))


def describe_recipe(name: str) -> str:
    """Describe a shipped recipe by its keys and the comment at its head.

    Args:
        name: name of a shipped recipe, without `.yaml`.
    """
    path = shipped_recipes()[name]
    values = read_yaml(path)
    head = read_head(path)
    time = measured(head["Time"])
    accuracy = measured(head["Accuracy"])
    start = values.get("model_name_or_path") or f"{values['architecture']}, from scratch"
    lines = [
        f"{name}: {head['']}",
        f"  model     {start}",
        f"  size      {head['Parameters'].rstrip('.')} parameters",
        f"  image     {values['image_size']} px",
        f"  data      {values['dataset_name']}",
        f"  time      {time or 'not measured'}",
        f"  accuracy  {accuracy or 'not measured'}",
    ]
    if time or accuracy:
        lines += textwrap.wrap(head["Hardware"], 110, initial_indent="  on        ", subsequent_indent=" " * 12)
    return "\n".join([*lines, f"  run       hfvit train {name}"])


def measured(text: str) -> str | None:
    """Return the first sentence of a measured value, None for an estimate."""
    if text.startswith(("estimated", "not measured")):
        return None
    return text.partition(". ")[0].rstrip(".")
