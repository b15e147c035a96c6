"""The fine-tuning methods of a recipe."""

import hfvit.recipe.arguments
from hfvit.finetuning.factory import METHODS


def test_methods_are_those_of_the_recipe():
    assert tuple(METHODS) == hfvit.recipe.arguments.METHODS
