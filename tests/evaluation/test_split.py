"""Evaluation split: held-out images, classes matched by name, subsets."""

import numpy as np
import pytest
import yaml
from helpers.images import LABELS, colored_split
from helpers.layouts import write_images
from helpers.messages import assert_names
from helpers.onnx_graphs import write_configs, write_graph
from helpers.splits import load_splits

from hfvit.data.decode import decode
from hfvit.errors import DataError
from hfvit.evaluation.split import evaluation_split


@pytest.fixture
def model(tmp_path):
    write_graph(tmp_path / "model.onnx")
    return write_configs(tmp_path)


def write_recipe(folder, **values) -> None:
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"bf16": True, "learning_rate": 1e-3, **values}))


def test_default_split_is_the_held_out_split(model, colors):
    write_recipe(model, dataset_name=str(colors), validation_fraction=0.2, seed=3)
    expected = load_splits(str(colors), validation_fraction=0.2, seed=3).validation
    split = evaluation_split(model)
    assert len(split) == 13
    assert split.labels.tolist() == expected["label"]
    assert_names(split.name, colors.name, "train", 0.2, 13)
    for row, image in enumerate(split.images()):
        assert image == decode(expected[row]["image"], "train", row)
    assert [image.size for image in split.images([4, 2])] == [(16, 16)] * 2


def test_recipe_in_the_parent_folder_of_an_export_is_used(model, colors):
    write_recipe(model, dataset_name=str(colors), seed=1)
    (model / "onnx").mkdir()
    (model / "model.onnx").rename(model / "onnx" / "model.onnx")
    split = evaluation_split(model / "onnx" / "model.onnx", split="test")
    assert_names(split.name, colors.name, "'test'", 31)


def test_classes_are_matched_by_name(model, colors):
    write_configs(model, [LABELS[2], "violet", LABELS[0], LABELS[1]])
    split = evaluation_split(model, dataset_name=str(colors), split="test")
    own = np.array(colored_split(31, 2)["label"])
    assert split.labels.tolist() == np.array([2, 3, 0])[own].tolist()


def test_folder_without_splits_names_the_split_of_all_its_images(model, tmp_path):
    folder = str(write_images(tmp_path / "photos", {"red": 2, "blue": 3}))
    with pytest.raises(DataError, match=r"^split:.* Pass split train "):
        evaluation_split(model, dataset_name=folder)
    assert evaluation_split(model, dataset_name=folder, split="train").labels.tolist() == [2, 2, 2, 0, 0]


@pytest.mark.parametrize("options", [{}, {"folds": 3, "fold": 1}], ids=["fraction", "fold"])
def test_splits_of_a_folder_without_splits_are_those_that_training_held_out(model, tmp_path, options):
    folder = str(write_images(tmp_path / "photos", dict.fromkeys(LABELS, 20)))
    trained = load_splits(folder, seed=3, **options)
    write_recipe(model, dataset_name=folder, seed=3, **options)
    source = trained.metadata["splits"]["test"]["source"]
    for split, role in ((None, "validation"), ("test", "test"), (source, "test")):
        assert evaluation_split(model, split=split).dataset["row"][:] == trained[role]["row"][:]


def test_text_labels_are_matched_by_name(model, tmp_path):
    write_configs(model, ["7", "9", "8"])
    split = colored_split(9, 0)
    numbers = [7 + label for label in split["label"]]
    split = split.remove_columns("label").add_column("label", numbers)
    split.to_parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet")
    found = evaluation_split(model, dataset_name=str(tmp_path / "set"), split="test")
    assert [["7", "9", "8"][label] for label in found.labels] == [str(number) for number in numbers]


def test_error_names_classes_that_the_model_lacks(model, colors):
    write_configs(model, ["red", "Green", "violet"])
    with pytest.raises(DataError) as caught:
        evaluation_split(model, dataset_name=str(colors), split="test")
    assert_names(caught.value, colors, "'test'", 2, 3, "green, blue", "red, Green, violet", "'Green'")


def test_max_samples_uses_the_seed_and_is_described(model, colors):
    def drawn(seed):
        return evaluation_split(model, dataset_name=str(colors), split="train", max_samples=20, seed=seed)

    assert len(drawn(0)) == 20
    assert drawn(0).dataset["row"] == drawn(0).dataset["row"]
    assert drawn(0).dataset["row"] != drawn(1).dataset["row"]
    assert_names(drawn(0).name, 20, 65, 0)
    own = np.array(colored_split(65, 1)["label"])
    assert drawn(0).labels.tolist() == own[drawn(0).dataset["row"]].tolist()


def test_invalid_arguments_raise_data_errors(model, colors):
    with pytest.raises(DataError, match=r"^dataset_name: .*recipe\.yaml") as caught:
        evaluation_split(model)
    assert_names(caught.value, model)
    with pytest.raises(DataError) as caught:
        evaluation_split(model, dataset_name=str(colors))
    assert_names(caught.value, colors, "'validation'", "train, test")
    write_recipe(model, dataset_name="../gone")
    with pytest.raises(DataError, match=r"^dataset_name: .*\.\./gone") as caught:
        evaluation_split(model)
    assert_names(caught.value, model / "recipe.yaml")
    (model / "recipe.yaml").write_text("dataset_name: [")
    with pytest.raises(DataError) as caught:
        evaluation_split(model)
    assert_names(caught.value, model / "recipe.yaml", "line 1, column 16")


@pytest.mark.parametrize("limit", [None, 5])
def test_recipe_with_streaming_evaluates_the_images_of_the_run(model, sharded, limit):
    values = {"dataset_name": str(sharded), "validation_split": "validation", "streaming": True}
    write_recipe(model, **values, max_eval_samples=limit)
    split = evaluation_split(model)
    expected = colored_split(13, 3)
    assert split.labels.tolist() == expected["label"][:limit]
    assert split.source == "validation"
    for image, original in zip(split.images(), expected["img"], strict=False):
        assert np.array_equal(np.asarray(image), np.asarray(original))
