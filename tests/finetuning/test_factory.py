"""Fine-tuning methods of a recipe."""

import hfvit.recipe.arguments
from hfvit.finetuning.factory import METHODS


def test_methods_match_the_recipe_option():
    assert tuple(METHODS) == hfvit.recipe.arguments.METHODS
