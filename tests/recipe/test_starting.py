"""Recipes to start from load, and fit the number of images."""

import pytest
import yaml

from hfvit.recipe.loader import load_recipe
from hfvit.recipe.starting import DataSize, recipe_text, starting_recipe


def size(images: int, **fields) -> DataSize:
    each = images // 4
    return DataSize(images=images, smallest_class=each, largest_class=each, classes=4, **{"side": 300, **fields})


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize("from_scratch", [False, True])
@pytest.mark.parametrize("images", [8, 40, 398, 4_000, 40_000, 1_000_000])
def test_starting_recipe_fits_the_images(tmp_path, images, has_gpu, from_scratch):
    data = size(images, holds_out_test=True)
    values = starting_recipe(data, "photos", has_gpu=has_gpu, from_scratch=from_scratch)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(values, data), encoding="utf-8")
    recipe = load_recipe([str(path)])
    assert recipe.ignored is None
    test = 0.1 if recipe.data.test_split else 0.0
    train = images * (1 - recipe.data.validation_fraction - test)
    assert recipe.training.global_batch_size <= max(4, train / 4)
    steps = train // recipe.training.global_batch_size * recipe.training.num_train_epochs
    assert recipe.training.eval_steps <= max(1, steps)
    assert recipe.training.logging_steps <= max(1, steps / 10)
    if images >= 40:
        assert images * recipe.data.validation_fraction >= min(30, 0.3 * images) - 1
    assert (recipe.data.test_split is None) == (images < 300)


def test_starting_recipe_keeps_the_data_sets_own_splits():
    values = starting_recipe(size(500, validation=80), "photos", has_gpu=False)
    assert not {"validation_fraction", "test_split"} & values.keys()


def test_starting_recipe_balances_unequal_classes():
    data = DataSize(images=1000, smallest_class=20, largest_class=900, classes=3, side=300)
    assert starting_recipe(data, "photos", has_gpu=False)["class_balance"] == "sample"
    assert "class_balance" not in starting_recipe(size(1000), "photos", has_gpu=False)


@pytest.mark.parametrize(
    "name", ["a\nlearning_rate: 9", "x # y", "../up/", "é: [", "- -", "C:\\photos\\cats", "\x1b[2J"]
)
def test_recipe_text_of_a_hostile_name_holds_the_name_alone(name):
    data = size(400)
    values = starting_recipe(data, name, has_gpu=False)
    assert yaml.safe_load(recipe_text(values, data)) == values
