"""Suspicious labels, on data where the wrong labels are known."""

import json
import shutil

import numpy as np
import pytest
from helpers.images import LABELS, colored_image
from helpers.layouts import write_images
from helpers.recipes import MICRO

import hfvit
from hfvit.data.inspect import open_data
from hfvit.errors import DataError
from hfvit.evaluation.label_errors import cross_validated, find_label_errors, open_as_trained, suspicious_rows
from hfvit.recipe.arguments import DataArguments


def test_cross_validated_predictions_contradict_the_wrong_labels():
    rng = np.random.default_rng(0)
    truth = np.arange(300) % 3
    features = rng.normal(size=(300, 8)) + 4 * np.eye(8)[truth]
    labels = truth.copy()
    wrong = rng.choice(300, 12, replace=False)
    labels[wrong] = (truth[wrong] + 1) % 3
    found = suspicious_rows(cross_validated(features, labels, 3), labels)
    assert set(found) <= set(wrong)
    assert len(found) >= 9


def test_cross_validated_leaves_out_small_classes():
    labels = np.array([0] * 20 + [1] * 20 + [2] * 2)
    features = np.random.default_rng(0).normal(size=(42, 4)) + labels[:, None]
    probabilities = cross_validated(features, labels, 3)
    assert np.isnan(probabilities[40:]).all()
    assert np.allclose(probabilities[:40].sum(1), 1)
    assert not set(suspicious_rows(probabilities, labels)) & {40, 41}


def test_suspicious_rows_needs_the_confidence_of_the_other_class():
    of_second = np.array([0.1, 0.2, 0.875, 0.625, 0.55, 0.95, 0.75])  # the mean of the two images of this class
    labels = np.array([0, 0, 1, 1, 0, 0, 0])
    assert suspicious_rows(np.stack([1 - of_second, of_second], axis=1), labels).tolist() == [5, 6]


def test_suspicious_rows_has_none_for_a_class_without_images():
    probabilities = np.array([[0.1, 0.1, 0.8], [0.9, 0.05, 0.05], [0.1, 0.8, 0.1]])
    assert suspicious_rows(probabilities, np.array([0, 0, 1])).tolist() == []


@pytest.fixture
def mislabeled(tmp_path):
    """Folders of colors, with three red images among the green ones."""
    rng = np.random.default_rng(0)
    for index, label in enumerate(LABELS):
        place = tmp_path / "set" / label
        place.mkdir(parents=True)
        for number in range(30):
            color = 0 if label == "green" and number < 3 else index
            colored_image(color, rng).save(place / f"{number}.png")
    return tmp_path / "set"


def test_find_label_errors_names_the_wrong_labels(mislabeled, tmp_path):
    hfvit.train(
        mislabeled, from_scratch=True, image_size=16, model_args=MICRO, num_train_epochs=8, learning_rate=3e-3,
        global_batch_size=8, seed=3, disable_tqdm=True, plots=False, output_dir=tmp_path / "run",
    )  # fmt: skip
    opened = open_as_trained(tmp_path / "run", mislabeled)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert opened.splits.metadata["splits"]["train"]["fingerprint"] == record["data"]["splits"]["train"]["fingerprint"]
    for example in record["examples"]["explanations"]:
        file = mislabeled / example["file"]
        assert (file.is_file(), file.parent.name) == (True, example["true"])
    check = find_label_errors(tmp_path / "run", opened, show_progress=False)
    assert check.agreement > 0.9
    suspects = check.suspects
    wrong = {f"green/{number}.png" for number in range(3)}
    found = {suspect.image.file for suspect in suspects}
    assert found <= wrong
    assert len(found) >= 2
    assert {suspect.predicted for suspect in suspects} == {"red"}
    assert len(hfvit.inspect(mislabeled, run=tmp_path / "run").label_check.suspects) == len(suspects)

    copy = shutil.copytree(mislabeled, tmp_path / "copy")
    assert open_as_trained(tmp_path / "run", copy) is None
    (copy / "blue/0.png").write_bytes(b"damaged")
    found = hfvit.inspect(copy, run=tmp_path / "run")
    assert {suspect.image.file for suspect in found.label_check.suspects} <= wrong
    assert [image.file for image in found.unreadable] == ["blue/0.png"]

    other = write_images(tmp_path / "other", {"cat": 12, "dog": 12})
    with pytest.raises(DataError, match=r"^--run:"):
        find_label_errors(tmp_path / "run", open_data(DataArguments(dataset_name=str(other))))


def test_find_label_errors_by_folds_uses_predictions_of_images_that_were_left_out(mislabeled, tmp_path):
    hfvit.train(
        mislabeled, from_scratch=True, image_size=16, model_args=MICRO, num_train_epochs=8, learning_rate=3e-3,
        global_batch_size=8, seed=3, disable_tqdm=True, plots=False, folds=2, output_dir=tmp_path / "folds",
    )  # fmt: skip
    check = hfvit.inspect(mislabeled, run=tmp_path / "folds").label_check
    found = [suspect.image.file for suspect in check.suspects]
    assert len(found) >= 1
    assert set(found) <= {f"green/{number}.png" for number in range(3)}
    assert {suspect.predicted for suspect in check.suspects} == {"red"}
    written = [line.split(",")[1] for line in (tmp_path / "folds" / "label_errors.csv").read_text().splitlines()]
    assert written[1:] == found
    for changed in ("blue/0.png", "green/9.png"):
        (mislabeled / changed).unlink()
    with pytest.raises(DataError, match=r"^--run:"):
        hfvit.inspect(mislabeled, run=tmp_path / "folds")
