"""Groups of images that are held out together."""

import logging
import math
from pathlib import Path

import numpy as np
import pytest
from helpers.layouts import paths, write_images
from helpers.splits import load_splits

from hfvit.data.groups import joined_with_files, targets_of_groups
from hfvit.errors import DataError, RecipeError

PATIENTS = 30


def write_scans(folder, groups=None, extra="", column="patient_id"):
    """Write 120 images of 30 patients, of which each third has images of a rare class, and their table."""
    write_images(folder, {"images": 120})
    rows = []
    for number in range(120):
        patient = number // 4
        label = "nodule" if patient % 3 == 0 and number % 4 == 0 else "normal"
        group = f"P{patient}" if groups is None else groups[number]
        rows.append(f"images/{number}.png,{group},{label}{extra and f',{extra}'}")
    (folder / "labels.csv").write_text(f"image,{column},label{extra and ',split'}\n" + "\n".join(rows))
    return str(folder / "labels.csv")


def patients(splits):
    return {role: {row // 4 for row in splits[role]["row"]} for role in splits.sources}


def test_load_splits_with_group_column_holds_out_whole_groups(tmp_path):
    table = write_scans(tmp_path)
    splits = load_splits(table, group_column="patient_id", validation_fraction=0.2, test_fraction=0.2)
    found = patients(splits)
    assert {role: len(numbers) for role, numbers in found.items()} == {"train": 18, "validation": 6, "test": 6}
    assert set.union(*found.values()) == set(range(PATIENTS))
    for role in found:
        assert sum(patient % 3 == 0 for patient in found[role]) == len(found[role]) // 3  # stratified
        assert len(splits[role]) == 4 * len(found[role])


@pytest.mark.parametrize(
    "other", ["P\u00e9{} ", " P\u00e9{}", "Pe\u0301{}"], ids=["space behind", "space before", "NFD"]
)
def test_load_splits_with_groups_that_differ_in_spaces_or_unicode_form_holds_out_whole_groups(tmp_path, other):
    groups = [(other if row % 2 else "P\u00e9{}").format(row // 4) for row in range(120)]
    found = patients(load_splits(write_scans(tmp_path, groups), group_column="patient_id", validation_fraction=0.2))
    assert sum(map(len, found.values())) == PATIENTS == len(set.union(*found.values()))


def test_load_splits_with_group_column_and_folds_divides_groups(tmp_path):
    table = write_scans(tmp_path, groups=[f"P{row % PATIENTS}" for row in range(120)])
    options = {"group_column": "patient_id", "test_fraction": 0.2, "folds": 4}
    folds = [load_splits(table, **options, fold=fold) for fold in range(4)]
    for splits in folds:
        found = [{row % PATIENTS for row in splits[role]["row"]} for role in splits.sources]
        assert sum(map(len, found)) == PATIENTS == len(set.union(*found))
    held_out = [row for splits in folds for row in splits.validation["row"]]
    assert sorted([*held_out, *folds[0].test["row"]]) == list(range(120))


def test_load_splits_with_group_column_of_several_labels_holds_out_whole_groups(tmp_path):
    write_images(tmp_path, {"images": 120})
    rows = "".join(f"images/{n}.png,{n // 4},{n % 2},{int(n % 12 == 0)}\n" for n in range(120))
    (tmp_path / "labels.csv").write_text(f"image,patient_id,effusion,nodule\n{rows}")
    splits = load_splits(str(tmp_path / "labels.csv"), group_column="patient_id", validation_fraction=0.2)
    assert splits.labels == ["effusion", "nodule"]
    found = patients(splits)
    assert sum(map(len, found.values())) == PATIENTS == len(set.union(*found.values()))
    assert np.sum(splits.validation["label"], 0).min() > 0


def test_load_splits_of_class_folders_takes_groups_of_metadata(tmp_path):
    write_images(tmp_path, {"a": 60, "b": 60})
    rows = "".join(f"{label}/{n}.png,P{n // 4}\n" for label in "ab" for n in range(60))
    (tmp_path / "metadata.csv").write_text(f"file_name,patient\n{rows}")
    splits = load_splits(str(tmp_path), group_column="patient", validation_fraction=0.2, test_split=None)
    found = {role: {int(Path(path).stem) // 4 for path in paths(splits, role)} for role in splits.sources}
    assert len(found["train"]) == 12
    assert len(found["validation"]) == 3
    assert not found["train"] & found["validation"]


def test_load_splits_with_bad_images_keeps_the_groups_of_the_others(tmp_path):
    table = write_scans(tmp_path)
    for number in (0, 1, 2, 50):
        (tmp_path / f"images/{number}.png").write_bytes(b"damaged")
    found = patients(load_splits(table, group_column="patient_id", on_bad_image="skip"))
    assert sum(map(len, found.values())) == PATIENTS == len(set.union(*found.values()))


def test_load_splits_of_given_splits_warns_of_shared_groups(tmp_path, caplog):
    table = write_scans(tmp_path, extra="train")
    text = (tmp_path / "labels.csv").read_text().splitlines()
    text[1] = text[1].replace("train", "test")  # one of four images of P0
    text[117:] = [line.replace("train", "test") for line in text[117:]]  # all of P29
    (tmp_path / "labels.csv").write_text("\n".join(text))
    with caplog.at_level(logging.WARNING):
        splits = load_splits(table, group_column="patient_id")
    assert len(splits.test) == 5
    assert [record.args[:3] for record in caplog.records if "patient_id" in (record.args or ())] == [("test", 1, 5)]


@pytest.mark.parametrize(("given", "warns"), [(None, True), ("patient_id", False)])
def test_load_splits_warns_of_a_usual_group_column(tmp_path, caplog, given, warns):
    table = write_scans(tmp_path)
    with caplog.at_level(logging.WARNING):
        load_splits(table, group_column=given)
    assert ("--group_column" in caplog.text) == warns


def test_load_splits_with_one_image_of_each_patient_does_not_warn(tmp_path, caplog):
    table = write_scans(tmp_path, groups=[f"P{n}" for n in range(120)])
    with caplog.at_level(logging.WARNING):
        load_splits(table)
    assert "--group_column" not in caplog.text


@pytest.mark.parametrize("fields", [{"validation_fraction": 0.2}, {"folds": 5, "fold": 2}], ids=str)
def test_load_splits_with_group_column_logs_the_groups_of_each_split(tmp_path, caplog, fields):
    groups = [f"P{math.isqrt(row)}" for row in range(120)]  # of 1, 3, 5, ... images
    with caplog.at_level(logging.INFO):
        table = write_scans(tmp_path, groups)
        splits = load_splits(table, group_column="patient_id", test_fraction=0.2, **fields)
    logged = [record.args for record in caplog.records if "groups" in record.msg]
    found = {role: {groups[row] for row in splits[role]["row"]} for role in splits.sources}
    assert logged == [(role, len(splits[role]), 120, len(found[role]), 11) for role in ("validation", "test")]


def test_load_splits_with_classes_that_are_usual_groups_does_not_warn(tmp_path, caplog):
    write_images(tmp_path, {"images": 60})
    rows = "".join(f"images/{n}.png,whale {n % 3}\n" for n in range(60))
    (tmp_path / "labels.csv").write_text(f"image,individual_id\n{rows}")
    with caplog.at_level(logging.WARNING):
        splits = load_splits(str(tmp_path / "labels.csv"), label_column="individual_id")
    assert splits.labels == ["whale 0", "whale 1", "whale 2"]
    assert "--group_column" not in caplog.text


@pytest.mark.parametrize(
    ("fields", "groups", "error"),
    [
        ({"group_column": "patient"}, None, DataError),
        ({"group_column": "patient_id"}, ["P1", " "] * 60, DataError),
        ({"group_column": "patient_id", "streaming": True, "validation_split": "val"}, None, RecipeError),
    ],
)
def test_load_splits_with_wrong_groups_names_the_option(tmp_path, fields, groups, error):
    with pytest.raises(error, match=r"^group_column:"):
        load_splits(write_scans(tmp_path, groups=groups), **fields)


def test_load_splits_with_a_single_group_names_the_fraction(tmp_path):
    with pytest.raises(DataError, match=r"^validation_fraction:"):
        load_splits(write_scans(tmp_path, groups=["P1"] * 120), group_column="patient_id")


def test_joined_with_files_joins_groups_of_a_common_file():
    joined = joined_with_files(np.array([0, 1, 1, 2, 3]), np.array([-5, -4, 7, 7, 8]))
    assert joined[1] == joined[2] == joined[3]
    assert len(set(joined.tolist())) == 3


@pytest.mark.parametrize("targets", [[0, 1, 1, 2], [[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]]])
def test_targets_of_groups_are_the_classes_of_any_row(targets):
    group, found = targets_of_groups(np.array(targets), np.array([5, 5, 3, 3]))
    assert group.tolist() == [1, 1, 0, 0]
    assert found.tolist() == [[0, 1, 1], [1, 1, 0]]
