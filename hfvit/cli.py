"""The `hfvit` command. Every import that costs time happens inside the command that needs it."""

import argparse
import dataclasses
import sys
import textwrap

import hfvit
from hfvit.errors import run
from hfvit.shipped import find_recipe, shipped_recipes, summary

TRAIN_EPILOG = """\
Any field of transformers' TrainingArguments works too, in the file and here:
  --learning_rate 3e-4 --weight_decay 0.05 --num_train_epochs 10 --max_steps 200
  --bf16 true --torch_compile true --eval_strategy steps --eval_steps 500
  --resume_from_checkpoint auto --report_to tensorboard --seed 1
`python -m hfvit.train --help` lists them all.

examples:
  hfvit train quickstart
  hfvit train my_recipe.yaml --learning_rate 3e-4 --output_dir outputs/higher_lr
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml hfvit/train.py vit_base
"""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console command; exits with the command's code."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    # A recipe's options belong to the recipe, which knows them all; argparse here would have to know them twice.
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command is not train:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    sys.exit(run(lambda: options.command(options, rest)))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hfvit", description=hfvit.__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train_parser = commands.add_parser(
        "train",
        help="train a classifier from a recipe",
        description="Train on one process what `accelerate launch hfvit/train.py RECIPE` trains on many.",
        epilog=TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train_parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a name that `hfvit recipes` lists")
    _describe_fields(train_parser)
    train_parser.set_defaults(command=train)

    recipes_parser = commands.add_parser(
        "recipes", help="list the recipes that come with hfvit", description="List the shipped recipes, or print one."
    )
    recipes_parser.add_argument("name", nargs="?", help="print this recipe, to copy and change")
    recipes_parser.set_defaults(command=recipes)
    return parser


def _describe_fields(parser: argparse.ArgumentParser) -> None:
    """Name hfvit's own recipe fields in the help; their values are parsed by the recipe."""
    from hfvit.config import AugmentationArguments, DataArguments, ModelArguments, RunArguments

    lines = []
    for section in (ModelArguments, DataArguments, AugmentationArguments, RunArguments):
        lines += ["", section.__doc__]
        for field in dataclasses.fields(section):
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            text = field.metadata["help"] + (f" [{default}]" if default is not None else "")
            lines += textwrap.wrap(
                text, width=100, initial_indent=f"  --{field.name:<26} ", subsequent_indent=" " * 31
            )
    parser.epilog = "\n".join(lines[1:]) + "\n\n" + parser.epilog


def train(options: argparse.Namespace, rest: list[str]) -> None:
    """`hfvit train RECIPE [--key value ...]`"""
    find_recipe(options.recipe)  # a wrong name is told at once, before torch is imported
    from hfvit.train import main as train_main

    train_main([options.recipe, *rest])


def recipes(options: argparse.Namespace, rest: list[str]) -> None:
    """`hfvit recipes [NAME]`"""
    if options.name:
        print(find_recipe(options.name).read_text(encoding="utf-8"), end="")
        return
    shipped = shipped_recipes()
    width = max(map(len, shipped))
    for name, path in shipped.items():
        print(f"{name:<{width}}  {summary(path)}")
