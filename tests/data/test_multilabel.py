"""Several labels for each image: where they are found, and the targets that they become."""

import csv
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers.layouts import image_bytes, write_shard
from helpers.messages import assert_logged, assert_names
from helpers.splits import load_splits, stream_splits
from sklearn.preprocessing import MultiLabelBinarizer

from hfvit.data.factory import image_dataset
from hfvit.data.labels import joined_labels, targets_of
from hfvit.data.multilabel import as_flag, stratified_rows
from hfvit.errors import DataError, RecipeError
from hfvit.recipe.arguments import MULTI_LABEL, DataArguments

CLASSES = ["bird", "cat", "dog"]
DATA_CONFIG = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic",
               "crop_pct": 1.0, "crop_mode": "center"}  # fmt: skip


def label_lists(rows: int = 60, seed: int = 0) -> list[list[str]]:
    """Any number of classes a row; each class and each number of them occurs."""
    rng = np.random.default_rng(seed)
    return [sorted(rng.choice(CLASSES, size=row % 4, replace=False).tolist()) for row in range(rows)]


def write_table(path, columns: dict[str, list], rows: int = 60):
    """A table with paths of images and further columns."""
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{row}.png" for row in range(rows)]
    for row, name in enumerate(names):
        (path.parent / name).write_bytes(image_bytes(row))
    columns = {"image": names, **columns}
    table = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(columns))
            writer.writeheader()
            writer.writerows(table)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(table), path)
    return path


def all_targets(splits) -> dict[str, list[int]]:
    """The 0/1 labels of each image of all splits, by its path."""
    found = {}
    for role in splits.metadata["splits"]:
        for image, row in zip(splits[role]["image"][:], targets_of(splits[role]), strict=True):
            found[image["path"].rpartition("/")[2]] = row.tolist()
    return found


def expected(lists: list[list[str]], classes=CLASSES) -> dict[str, list[int]]:
    matrix = MultiLabelBinarizer(classes=list(classes)).fit_transform(lists)
    return {f"{row}.png": values.tolist() for row, values in enumerate(matrix)}


LISTS = label_lists()
FLAGS = {name: [int(name in some) for some in LISTS] for name in CLASSES}
ONE_HOT = [list(row) for row in zip(*FLAGS.values(), strict=True)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_load_splits_of_lists_of_names_gives_their_targets(tmp_path, kind):
    splits = load_splits(write_table(tmp_path / f"labels.{kind}", {"labels": LISTS}))
    assert splits.problem_type == MULTI_LABEL
    assert splits.labels == CLASSES
    assert all_targets(splits) == expected(LISTS)


@pytest.mark.parametrize("name", ["tags", "labels"])
def test_load_splits_finds_the_one_column_of_lists(tmp_path, name):
    splits = load_splits(write_table(tmp_path / "table.jsonl", {name: LISTS, "author": ["someone"] * 60}))
    assert splits.label_column == name
    assert all_targets(splits) == expected(LISTS)


def test_load_splits_of_lists_of_integers_takes_class_names(tmp_path):
    lists = [[CLASSES.index(name) for name in some] for some in LISTS]
    table = write_table(tmp_path / "labels.jsonl", {"labels": lists})
    assert load_splits(table).labels == ["0", "1", "2"]
    splits = load_splits(table, class_names=CLASSES)
    assert splits.labels == CLASSES
    assert all_targets(splits) == expected(LISTS)


@pytest.mark.parametrize("convert", [int, float, bool])
def test_load_splits_of_one_hot_lists_gives_the_same_targets(tmp_path, convert):
    rows = [[convert(value) for value in row] for row in ONE_HOT]
    table = write_table(tmp_path / "labels.parquet", {"label": rows})
    splits = load_splits(table, class_names=CLASSES)
    assert splits.labels == CLASSES
    assert all_targets(splits) == expected(LISTS)
    assert load_splits(table).labels == ["0", "1", "2"]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_load_splits_of_several_columns_takes_their_names(tmp_path, kind, named):
    table = write_table(tmp_path / f"labels.{kind}", FLAGS)
    splits = load_splits(table, label_column=CLASSES if named else None)
    assert splits.label_column == splits.labels == CLASSES
    assert all_targets(splits) == expected(LISTS)


def test_load_splits_of_a_folder_with_metadata_finds_its_flag_columns(tmp_path):
    write_table(tmp_path / "metadata.csv", FLAGS)
    (tmp_path / "metadata.csv").write_text((tmp_path / "metadata.csv").read_text().replace("image,", "file_name,", 1))
    assert all_targets(load_splits(tmp_path)) == expected(LISTS)


@pytest.mark.parametrize("name", ["labels.csv", "metadata.csv"])
def test_load_splits_finds_flag_columns_beside_the_group_column(tmp_path, name):
    table = write_table(tmp_path / name, {"patient": [f"p{row // 3}" for row in range(60)], **FLAGS})
    table.write_text(table.read_text().replace("image,", "file_name,", 1))
    assert all_targets(load_splits(tmp_path, group_column="patient")) == expected(LISTS)


def test_load_splits_does_not_guess_among_other_columns(tmp_path):
    table = write_table(tmp_path / "labels.csv", {**FLAGS, "author": ["someone"] * 60})
    with pytest.raises(DataError, match=r"^label_column: ") as error:
        load_splits(table)
    assert_names(error, *CLASSES)
    assert all_targets(load_splits(table, label_column=CLASSES)) == expected(LISTS)


@pytest.mark.parametrize("separator", ["|", ";", ", "])
def test_load_splits_of_strings_splits_them_when_asked(tmp_path, separator):
    table = write_table(tmp_path / "labels.csv", {"labels": [f"{separator} {separator}".join(some) for some in LISTS]})
    for options in ({"problem_type": MULTI_LABEL}, {"label_separator": separator.strip()}):
        splits = load_splits(table, **options)
        assert splits.labels == CLASSES
        assert all_targets(splits) == expected(LISTS)


@pytest.mark.parametrize("files", [("train", "test"), ("test", "train")])
def test_load_splits_of_strings_in_one_file_and_numbers_in_another_gives_their_targets(tmp_path, files):
    several, single = files
    write_table(tmp_path / f"{several}.csv", {"labels": ["1|2", "2", "3"] * 20})
    write_table(tmp_path / f"{single}.csv", {"labels": ["2", "1", "3"] * 20})
    splits = load_splits(str(tmp_path), label_separator="|")
    assert splits.labels == ["1", "2", "3"]
    targets = {several: [[1, 1, 0], [0, 1, 0], [0, 0, 1]], single: [[0, 1, 0], [1, 0, 0], [0, 0, 1]]}
    assert targets_of(splits.whole["train"]).tolist() == targets["train"] * 20
    assert targets_of(splits.test).tolist() == targets["test"] * 20


@pytest.mark.parametrize("kinds", [("list", "text"), ("text", "list")])
def test_load_splits_of_lists_in_one_split_and_texts_in_another_names_the_column(tmp_path, kinds):
    labels = {"list": [["a"], ["b"], ["a", "b"]] * 20, "text": ["ab", "a", "b"] * 20}
    for split, kind in zip(("train", "test"), kinds, strict=True):
        write_table(tmp_path / f"{split}.parquet", {"labels": labels[kind]})
    with pytest.raises(DataError, match=r"^label_column: .*'labels'.*'test'"):
        load_splits(str(tmp_path), problem_type=MULTI_LABEL)


def test_load_splits_of_a_test_split_of_nan_labels_leaves_it_out(tmp_path):
    write_table(tmp_path / "train.parquet", {"labels": [0.0, 1.0, 2.0] * 20})
    write_table(tmp_path / "test.parquet", {"labels": [np.nan] * 60})
    assert load_splits(str(tmp_path), label_column="labels", problem_type=MULTI_LABEL).test is None


def test_load_splits_of_lists_with_a_separator_names_the_option(tmp_path):
    table = write_table(tmp_path / "labels.jsonl", {"labels": LISTS})
    with pytest.raises(DataError, match=r"^label_separator: "):
        load_splits(table, label_separator="|")


@pytest.mark.parametrize("column", ["labels", "tags"])
def test_load_splits_of_empty_cells_gives_no_class(tmp_path, column):
    table = write_table(tmp_path / "tags.csv", {column: ["", "a", "a|b"] * 20})
    splits = load_splits(table, label_column=column, problem_type="multi_label_classification")
    assert [sum(targets) for targets in all_targets(splits).values()].count(0) == 20


def test_load_splits_of_strings_with_two_separators_asks_for_one(tmp_path):
    texts = ["a|b, c", "b, c", "a|d"] * 20
    table = write_table(tmp_path / "labels.csv", {"labels": texts})
    with pytest.raises(DataError, match=r"^label_separator: "):
        load_splits(table, problem_type=MULTI_LABEL)
    assert load_splits(table, label_separator="|").labels == ["a", "b, c", "d"]


def test_load_splits_of_strings_is_single_label_by_default_and_says_so(tmp_path, caplog):
    table = write_table(tmp_path / "labels.csv", {"label": ["a|b", "b", "a"] * 20})
    splits = load_splits(table)
    assert splits.labels == ["a", "a|b", "b"]
    assert targets_of(splits.train).ndim == 1
    assert "a|b" in caplog.text
    assert joined_labels(["sea, lake", "forest", "salt; pepper"]) is None


@pytest.mark.parametrize(
    ("labels", "options"), [(["a", "NA", "b"], {}), (["a|b", "NA", "b|c"], {"label_separator": "|"})]
)
def test_load_splits_of_texts_for_missing_labels_warns(tmp_path, caplog, labels, options):
    table = write_table(tmp_path / "labels.csv", {"label": labels * 20})
    load_splits(table, **options)
    assert_logged(caplog, "WARNING", "NA", 20)
    caplog.clear()
    load_splits(table, class_names=["NA", "a", "b", "c"], **options)
    assert "NA" not in caplog.text


def test_load_splits_of_lists_as_text_is_an_error_or_single_label_with_a_warning(tmp_path, caplog):
    table = write_table(
        tmp_path / "labels.csv", {"label": [str(labels) for labels in (["a", "b"], ["b"], ["c"])] * 20}
    )
    assert len(load_splits(table).labels) == 3
    assert_logged(caplog, "WARNING", "['a', 'b']", MULTI_LABEL)
    with pytest.raises(DataError, match=r"^label_column: ") as caught:
        load_splits(table, problem_type=MULTI_LABEL)
    assert_names(caught.value, "label", "['a', 'b']")


def test_load_splits_of_class_labels_reads_one_label_an_image_when_asked(tmp_path, colors):
    splits = load_splits(colors, problem_type=MULTI_LABEL)
    single = load_splits(colors)
    targets = targets_of(splits.test)
    assert (targets.sum(axis=1) == 1).all()
    assert np.array_equal(targets.argmax(axis=1), targets_of(single.test))


def test_load_splits_of_sequences_of_class_labels_keeps_their_order(tmp_path):
    names = ["dog", "cat", "bird"]
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "labels": datasets.List(datasets.ClassLabel(names=names))}
    )
    rows = {"image": [{"bytes": image_bytes(row), "path": f"{row}.png"} for row in range(60)], "labels": LISTS}
    rows["labels"] = [[names.index(name) for name in some] for some in LISTS]
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    splits = load_splits(tmp_path / "saved")
    assert splits.labels == names
    assert all_targets(splits) == expected(LISTS, names)


def test_load_splits_of_webdataset_shards_reads_lists(tmp_path):
    samples = [
        {"png": image_bytes(row), "json": json.dumps({"labels": some}).encode()} for row, some in enumerate(LISTS)
    ]
    write_shard(tmp_path / "train-0.tar", samples)
    splits = load_splits(tmp_path)
    assert splits.labels == CLASSES
    counts = sum(targets_of(splits[role]).sum(axis=0) for role in splits.metadata["splits"])
    assert counts.tolist() == [sum(name in some for some in LISTS) for name in CLASSES]


@pytest.mark.parametrize(
    ("columns", "options", "row"),
    [
        ({"labels": [["a"], None, *[["b"]] * 58]}, {}, 1),
        ({"labels": [["a"], ["b", None], *[["b"]] * 58]}, {}, 1),
        ({"labels": [["a"], ["b", ""], *[["b"]] * 58]}, {}, 1),
        ({"labels": ["a|b", None, *["b"] * 58]}, {"problem_type": "multi_label_classification"}, 1),
        ({"labels": [[0], [1, 7], *[[1]] * 58]}, {"class_names": ["a", "b"]}, 1),
        ({"labels": [[0.0], [0.0], [1.5], *[[1.0]] * 57]}, {}, 2),
        ({"a": [0, 1, 1, 2, *[0] * 56], "b": [0, 1] * 30}, {"label_column": ["a", "b"]}, 3),
        ({"a": [0, None, 1, *[0] * 57], "b": [0, 1] * 30}, {"label_column": ["a", "b"]}, 1),
    ],
)
def test_load_splits_names_the_row_of_a_bad_label(tmp_path, columns, options, row):
    with pytest.raises(DataError, match=rf"row {row}: "):
        load_splits(write_table(tmp_path / "labels.parquet", columns), **options)


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("problem_type", {"problem_type": "regression"}),
        ("label_column", {"label_column": ["a", "b"], "problem_type": "single_label_classification"}),
        ("label_separator", {"label_separator": "|", "problem_type": "single_label_classification"}),
        ("label_separator", {"label_separator": "|", "label_column": ["a", "b"]}),
        ("label_column", {"label_column": ["a", "a"]}),
        ("streaming", {"label_column": ["a", "b"], "streaming": True, "validation_split": "validation"}),
    ],
)
def test_data_arguments_refuse_what_does_not_fit(option, arguments):
    with pytest.raises(RecipeError, match=rf"^{option}: "):
        DataArguments("photos", **arguments)


def test_load_splits_refuses_lists_as_single_labels(tmp_path):
    table = write_table(tmp_path / "labels.jsonl", {"labels": LISTS})
    with pytest.raises(DataError, match=r"^label_column: "):
        load_splits(table, problem_type="single_label_classification")


def test_stream_splits_refuses_lists(tmp_path):
    for name in ("train", "validation"):
        write_table(tmp_path / f"{name}.parquet", {"labels": LISTS})
    with pytest.raises(DataError, match=r"^streaming: "):
        stream_splits(tmp_path)


def test_load_splits_stratifies_and_repeats_the_held_out_rows(tmp_path):
    table = write_table(tmp_path / "labels.jsonl", {"labels": LISTS})
    first, second, other = (load_splits(table, seed) for seed in (1, 1, 2))
    assert all_targets(first) == all_targets(second)
    assert first.validation["row"][:] == second.validation["row"][:] != other.validation["row"][:]
    assert [len(first[role]) for role in ("train", "validation", "test")] == [48, 6, 6]
    for role in ("train", "validation", "test"):
        assert (targets_of(first[role]).sum(axis=0) > 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_stratified_rows_keeps_every_class_in_both_parts(seed):
    rng = np.random.default_rng(seed)
    rates = np.array([0.5, 0.2, 0.1, 0.05, 0.02, 0.004])
    targets = (rng.random((1000, len(rates))) < rates).astype(np.uint8)
    kept, held_out = stratified_rows(targets, 0.2, seed)
    assert sorted([*kept, *held_out]) == list(range(1000))
    assert abs(len(held_out) - 200) <= len(rates)
    counts = targets.sum(axis=0)
    shares = targets[held_out].sum(axis=0)
    assert (np.abs(shares - 0.2 * counts) <= np.maximum(2, 0.05 * counts)).all()
    assert (shares[counts > 1] > 0).all()
    assert (targets[kept].sum(axis=0)[counts > 0] > 0).all()


def test_stratified_rows_of_classes_with_one_image_raises():
    with pytest.raises(ValueError, match="class"):
        stratified_rows(np.eye(3, dtype=np.uint8), 0.1, 0)
    targets = np.eye(10, 3, dtype=np.uint8)
    (held_out,) = stratified_rows(targets, 0.04, 0)[1]  # an image of no class
    assert not targets[held_out].any()


def test_image_dataset_takes_targets_in_the_order_of_the_model():
    images = [{"bytes": image_bytes(row), "path": None} for row in range(60)]
    model_classes = ["dog", "fish", "cat", "bird"]
    features = {"image": datasets.Image(decode=False)}
    names = datasets.Features({**features, "labels": datasets.List(datasets.Value("string"))})
    flags = datasets.Features({**features, **{name: datasets.Value("int64") for name in CLASSES}})
    for some, columns in ((names, {"labels": LISTS}), (flags, FLAGS)):
        split = datasets.Dataset.from_dict({"image": images, **columns}, features=some)
        labels = image_dataset(split, model_classes, DATA_CONFIG).labels
        assert labels.dtype == np.float32
        assert np.array_equal(labels, MultiLabelBinarizer(classes=model_classes).fit_transform(LISTS))


@pytest.mark.parametrize("seed", range(3))
def test_stratified_rows_hold_out_one_of_two_images_of_a_class(seed):
    targets = np.zeros((100, 2), np.uint8)
    targets[:, 0] = targets[[3, 50], 1] = 1
    for rows in stratified_rows(targets, 0.1, seed):
        assert targets[rows, 1].sum() == 1


@pytest.mark.parametrize(
    ("value", "flag"),
    [(1, True), (0.0, False), (True, True), (" TRUE ", True), ("0", False)]
    + [(value, None) for value in (2, -1, 0.5, float("nan"), "yes", "", None)],
)
def test_as_flag_knows_0_and_1_only(value, flag):
    assert as_flag(value) is flag
