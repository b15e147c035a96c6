"""`hfvit train`"""

import argparse
import dataclasses
import textwrap

from hfvit.recipe.files import find_recipe

EPILOG = """\
Any field of transformers' TrainingArguments works too, in the file and here:
  --learning_rate 3e-4 --weight_decay 0.05 --num_train_epochs 10 --max_steps 200
  --bf16 true --torch_compile true --eval_strategy steps --eval_steps 500
  --resume_from_checkpoint auto --report_to tensorboard --seed 1
  --push_to_hub true --hub_model_id user/my-vit --hub_private_repo true
`python -m hfvit.train --help` lists them all.

examples:
  hfvit train quickstart
  hfvit train vit_base --estimate
  hfvit train my_recipe.yaml --learning_rate 3e-4 --output_dir outputs/higher_lr
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml hfvit/train.py vit_base
"""


def add(commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train a classifier from a recipe",
        description="Train on one process what `accelerate launch hfvit/train.py RECIPE` trains on many.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a name that `hfvit recipes` lists")
    parser.add_argument(
        "--estimate", action="store_true", help="print what the recipe needs of memory and disk, and run nothing"
    )
    _describe_fields(parser)
    # A recipe's options belong to the recipe, which knows them all; argparse here would have to know them twice.
    parser.set_defaults(command=train, takes_rest=True)


def _describe_fields(parser: argparse.ArgumentParser) -> None:
    """Name hfvit's own recipe fields in the help; their values are parsed by the recipe."""
    from hfvit.recipe.arguments import (
        AugmentationArguments,
        DataArguments,
        FinetuningArguments,
        ModelArguments,
        RunArguments,
    )

    lines = []
    for section in (ModelArguments, FinetuningArguments, DataArguments, AugmentationArguments, RunArguments):
        lines += ["", section.__doc__]
        for field in dataclasses.fields(section):
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            text = field.metadata["help"] + (f" [{default}]" if default is not None else "")
            lines += textwrap.wrap(
                text, width=100, initial_indent=f"  --{field.name:<26} ", subsequent_indent=" " * 31
            )
    parser.epilog = "\n".join(lines[1:]) + "\n\n" + parser.epilog


def train(options: argparse.Namespace) -> None:
    """`hfvit train RECIPE [--key value ...]`"""
    find_recipe(options.recipe)  # a wrong name is told at once, before torch is imported
    if options.estimate:
        from hfvit.estimate import estimate
        from hfvit.recipe.loader import load_recipe

        recipe = load_recipe([options.recipe, *options.rest])
        print(estimate(recipe), *([f"\n{recipe.idle}"] if recipe.idle else []), sep="\n")
        return
    from hfvit.pipeline import main as train_main

    train_main([options.recipe, *options.rest])
