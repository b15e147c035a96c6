"""A data set in place of a recipe."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers.layouts import archive_folder, write_images
from transformers.trainer_utils import SchedulerType

import hfvit
from hfvit.data.starting_recipe import find_and_load, is_data_set, load_given
from hfvit.errors import DataError, ModelError, RecipeError

FEW = {"cat": 20, "dog": 20}


def test_is_data_set_is_a_folder_table_or_archive_and_no_recipe(tmp_path):
    write_images(tmp_path / "photos", FEW)
    archive_folder(tmp_path / "photos", tmp_path / "photos.zip")
    (tmp_path / "labels.csv").write_text("image,label\n")
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text("seed: 1\n")
    expected = {"photos": True, "photos.zip": True, "labels.csv": True, "mine.yaml": False, "run": False, "no": False}
    assert {name: is_data_set(str(tmp_path / name)) for name in expected} == expected
    assert is_data_set("digits")
    assert is_data_set("uoft-cs/cifar10")
    assert not is_data_set("quickstart")
    assert not is_data_set("recipes/typo.yaml")


def test_find_and_load_of_a_folder_lets_options_win(tmp_path):
    write_images(tmp_path, FEW)
    recipe = find_and_load([str(tmp_path), "--from-scratch", "--num_train_epochs", "7", "--seed", "5"])
    assert recipe.data.dataset_name == str(tmp_path)
    assert recipe.training.num_train_epochs == 7
    assert recipe.training.seed == 5
    assert recipe.model.architecture
    assert recipe.data.validation_fraction == 0.3
    assert recipe.ignored is None


def test_find_and_load_of_a_table_with_splits_shows_no_bars_of_datasets(tmp_path, capfd):
    write_images(tmp_path, {"images": 12})
    rows = "".join(f"images/{n}.png,{'ab'[n % 2]},{'train' if n < 8 else 'val'}\n" for n in range(12))
    (tmp_path / "labels.csv").write_text(f"image,label,split\n{rows}")
    were_disabled = datasets.are_progress_bars_disabled()
    datasets.enable_progress_bars()
    try:
        find_and_load([str(tmp_path / "labels.csv"), "--from_scratch", "--output_dir", str(tmp_path / "out")])
    finally:
        if were_disabled:
            datasets.disable_progress_bars()
    assert "examples" not in capfd.readouterr().err


def test_find_and_load_without_weights_and_network_names_the_options(tmp_path):
    write_images(tmp_path, FEW)
    with pytest.raises(ModelError, match=r"^model_name_or_path: .*--from_scratch"):
        find_and_load([str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "error", "head"),
    [
        (["quickstart", "--from_scratch"], RecipeError, "--from_scratch:"),
        (["{}", "--from_scratch", "--lerning_rate", "1"], RecipeError, "--lerning_rate:"),
        (["{}", "--from_scratch", "--label_column", "x"], DataError, "label_column:"),
        (["{}/none.yaml", "--from_scratch"], RecipeError, "--from_scratch:"),
    ],
)
def test_find_and_load_with_unusable_data_names_the_option(tmp_path, words, error, head):
    write_images(tmp_path, FEW)
    with pytest.raises(error) as caught:
        find_and_load([word.format(tmp_path) for word in words])
    assert str(caught.value).startswith(head)


def test_load_given_of_a_dict_converts_paths_enums_and_numpy_values(tmp_path):
    values = {
        "architecture": np.str_("vit_tiny_patch16_224"), "model_args": {"depth": np.int64(2)},
        "dataset_name": tmp_path, "output_dir": tmp_path / "out", "learning_rate": np.float32(0.25),
        "num_train_epochs": np.int64(3), "plots": np.False_, "crop_scale": np.array([0.5, 1.0]), "crop_ratio": (1, 2),
        "lr_scheduler_type": SchedulerType.LINEAR, "validation_split": None, "use_cpu": True,
    }  # fmt: skip
    recipe = load_given(values, {"seed": np.int64(5)})
    assert recipe.data.dataset_name == str(tmp_path)
    assert Path(recipe.training.output_dir) == tmp_path / "out"
    assert (recipe.training.learning_rate, recipe.training.num_train_epochs) == (0.25, 3)
    assert (recipe.training.seed, recipe.training.plots) == (5, False)
    assert (recipe.augmentation.crop_scale, recipe.augmentation.crop_ratio) == ([0.5, 1.0], [1.0, 2.0])
    assert recipe.training.lr_scheduler_type == "linear"
    assert recipe.model.model_args == {"depth": 2}


@pytest.mark.parametrize("value", [object(), {1, 2}, [object()], {"a": b"b"}, 1j])
def test_load_given_of_a_dict_with_another_value_names_the_key(value):
    with pytest.raises(RecipeError, match=r"^model_args: "):
        load_given({"model_args": value}, {})


def test_train_of_a_folder_leaves_a_run_with_its_counts(tmp_path):
    write_images(tmp_path / "photos", {**FEW, "single": 1})
    hfvit.train(
        tmp_path / "photos", from_scratch=True, num_train_epochs=2, output_dir=tmp_path / "out", disable_tqdm=True
    )
    splits = json.loads((tmp_path / "out/run.json").read_text())["data"]["splits"]
    assert splits["train"]["rows"] + splits["validation"]["rows"] == 41
    assert splits["validation"]["rows"] >= 12
    assert "test" not in splits


@pytest.mark.parametrize(
    ("values", "option"), [({"dataset_name": "digits"}, "model_name_or_path"), ({"batch_size": 8}, "batch_size")]
)
def test_load_given_of_a_wrong_dict_names_the_key_and_no_file(tmp_path, values, option):
    with pytest.raises(RecipeError, match=rf"^{option}\b"):
        load_given(values, {"output_dir": str(tmp_path / "out")})
