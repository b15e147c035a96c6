"""Tables of images and labels: CSV, TSV, JSON and Parquet files."""

import base64
import csv
import json
import os
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers.layouts import class_counts, image_bytes, paths, write_images
from helpers.messages import assert_logged, assert_names
from helpers.splits import load_splits, stream_splits

from hfvit.data.decode import decode
from hfvit.errors import DataError

KINDS = ("csv", "tsv", "jsonl", "json", "parquet")


def write_table(path, rows, kind=None):
    """A table of dictionaries, by the extension of its file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = kind or path.suffix[1:]
    if kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def path_rows(root, counts, folder="images", start=0):
    """Rows with paths of images, which are written to one folder for all classes."""
    rows = []
    (root / folder).mkdir(parents=True, exist_ok=True)
    for label, count in counts.items():
        for number in range(count):
            name = f"{folder}/{label}-{number}.png"
            (root / name).write_bytes(image_bytes(start + len(rows)))
            rows.append({"image": name, "label": label})
    return rows


COUNTS = {"cat": 20, "dog": 40}


@pytest.mark.parametrize("kind", KINDS)
def test_load_splits_of_one_table_holds_out_validation_and_test(tmp_path, kind):
    table = write_table(tmp_path / f"labels.{kind}", path_rows(tmp_path, COUNTS))
    for name in (table, tmp_path):
        splits = load_splits(str(name))
        assert class_counts(splits) == {
            "train": {"cat": 16, "dog": 32}, "validation": {"cat": 2, "dog": 4}, "test": {"cat": 2, "dog": 4},
        }  # fmt: skip
        assert {Path(path).name[:3] for path in paths(splits, "test")} == {"cat", "dog"}
        decode(splits.train[0]["image"], "train", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_load_splits_finds_columns_in_upper_or_lower_case(tmp_path, kind):
    """Integers of a CSV file are classes in the order of the numbers, as in a column `label`."""
    rows = [
        {"FilePath": row["image"], "Class": "other", "Label": number % 12}
        for number, row in enumerate(path_rows(tmp_path, {"x": 72}))
    ]
    assert load_splits(str(write_table(tmp_path / f"t.{kind}", rows))).labels == [str(n) for n in range(12)]
    both = [{"Label": "other", **row} for row in path_rows(tmp_path, COUNTS)]
    assert load_splits(str(write_table(tmp_path / f"t.{kind}", both))).labels == ["cat", "dog"]


def test_load_splits_of_metadata_finds_a_label_column_in_upper_case(tmp_path):
    write_images(tmp_path, {"": 40})
    rows = [{"file_name": f"{number}.png", "Label": "ab"[number % 2]} for number in range(40)]
    write_table(tmp_path / "metadata.csv", rows)
    assert load_splits(str(tmp_path)).labels == ["a", "b"]


@pytest.mark.parametrize("kind", KINDS)
def test_load_splits_of_a_table_in_the_working_folder(tmp_path, monkeypatch, kind):
    table = write_table(tmp_path / f"labels.{kind}", path_rows(tmp_path, COUNTS))
    monkeypatch.chdir(tmp_path)
    splits = load_splits(table.name)
    assert sum(len(splits[role]) for role in splits.metadata["splits"]) == 60
    decode(splits.train[0]["image"], "train", 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", ["split", "data set"])
def test_load_splits_of_table_with_split_column(tmp_path, kind, column):
    rows = path_rows(tmp_path, {"cat": 6, "dog": 9})
    names = {0: "train", 1: "valid", 2: "test"}
    rows = [{**row, column: names[number % 3]} for number, row in enumerate(rows)]
    splits = load_splits(str(write_table(tmp_path / f"labels.{kind}", rows)))
    assert class_counts(splits) == {role: {"cat": 2, "dog": 3} for role in ("train", "validation", "test")}


@pytest.mark.parametrize("kind", KINDS)
def test_load_splits_of_table_for_each_split(tmp_path, kind):
    for start, (split, count) in enumerate((("train", 8), ("val", 3), ("test", 4))):
        rows = path_rows(tmp_path, {"cat": count, "dog": count}, "images", 100 * start)
        write_table(tmp_path / f"{split}.{kind}", rows)
    splits = load_splits(str(tmp_path))
    assert {role: sum(counts.values()) for role, counts in class_counts(splits).items()} == {
        "train": 16, "validation": 6, "test": 8,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_load_splits_of_metadata_file_takes_its_labels(tmp_path, kind, caplog):
    for split, count in (("train", 10), ("test", 4)):
        write_images(tmp_path / split, {"": count})
        rows = [{"file_name": f"{number}.png", "label": "ab"[number % 2]} for number in range(count - 1)]
        write_table(tmp_path / split / f"metadata.{kind}", rows)
    with caplog.at_level("INFO", logger="hfvit"):
        splits = load_splits(str(tmp_path), validation_fraction=0.3)
    assert len(splits.train) + len(splits.validation) == 9
    assert class_counts(splits)["test"] == {"a": 2, "b": 1}
    assert any("2 images are not in the table" in message for message in caplog.messages)


def test_load_splits_of_metadata_without_labels_takes_folders_and_adds_columns(tmp_path):
    write_images(tmp_path / "train", {"cat": 10, "dog": 10})
    rows = [{"file_name": f"{c}/{n}.png", "caption": f"{c} {n}"} for c in ("cat", "dog") for n in range(10)]
    write_table(tmp_path / "train/metadata.csv", rows)
    splits = load_splits(str(tmp_path), text_column="caption")
    assert splits.labels == ["cat", "dog"]
    for image, text in zip(splits.train["image"], splits.train["text"], strict=True):
        assert image["path"].endswith(f"{text.replace(' ', '/')}.png")


def test_load_splits_of_metadata_without_the_image_column_names_the_option(tmp_path):
    write_captions(tmp_path / "set", CAPTIONS)
    with pytest.raises(DataError, match=r"^image_column: ") as caught:
        load_splits(str(tmp_path / "set"), image_column="filename")
    assert_names(caught.value, "'filename'", "file_name")


def write_captions(root, captions, kind="jsonl"):
    """Class folders `cat` and `dog`, and a table of (path, caption)."""
    if not root.exists():
        write_images(root, {"cat": 10, "dog": 10})
    write_table(root / f"metadata.{kind}", [{"file_name": path, "caption": text} for path, text in captions])
    return str(root)


CAPTIONS = [(f"{label}/{n}.png", f"{label} {n}") for label in ("cat", "dog") for n in range(10)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_load_splits_of_metadata_with_missing_texts_keeps_them_missing(tmp_path, kind):
    captions = [(path, text if "cat" in path else None) for path, text in CAPTIONS]
    splits = load_splits(write_captions(tmp_path / "a", captions, kind), text_column="caption")
    for image, text in zip(splits.train["image"], splits.train["text"], strict=True):
        assert (text is None) == ("dog" in image["path"])


@pytest.mark.parametrize("prefix", ["./", "cat/../", ".//", " ", ".\\"])
def test_load_splits_of_metadata_normalizes_paths(tmp_path, prefix):
    root = write_captions(tmp_path / "a", [(prefix + path, text) for path, text in CAPTIONS])
    splits = load_splits(root, text_column="caption")
    for image, text in zip(splits.train["image"], splits.train["text"], strict=True):
        assert image["path"].endswith(f"{text.replace(' ', '/')}.png")


def test_load_splits_of_metadata_counts_rows_without_image(tmp_path, caplog):
    captions = [*CAPTIONS, ("cat/99.png", "x"), ("dog/99.png", "x")]
    with caplog.at_level("INFO", logger="hfvit"):
        load_splits(write_captions(tmp_path / "a", captions), text_column="caption")
    assert any("2 rows" in message and "cat/99.png" in message for message in caplog.messages)


@pytest.mark.parametrize("path", [None, ""])
def test_load_splits_of_metadata_without_a_path_names_the_row(tmp_path, path):
    with pytest.raises(DataError, match=r"^image_column: row 20 "):
        load_splits(write_captions(tmp_path / "a", [*CAPTIONS, (path, "x")]), text_column="caption")


def test_load_splits_of_metadata_with_other_texts_has_another_fingerprint(tmp_path):
    def fingerprint(captions):
        return load_splits(write_captions(tmp_path / "a", captions), text_column="caption").train._fingerprint

    before = fingerprint(CAPTIONS)
    assert fingerprint(CAPTIONS) == before
    assert fingerprint([(path, text.upper()) for path, text in CAPTIONS]) != before


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("name", ["metadata", "labels"])
@pytest.mark.parametrize("folder", ["", "images/"])
def test_load_splits_of_one_table_with_split_folders_uses_them(tmp_path, monkeypatch, name, folder, kind):
    rows = []
    for start, (split, count) in enumerate((("train", 8), ("val", 3), ("test", 4))):
        rows += path_rows(tmp_path / "set", {"cat": count, "dog": count}, folder + split, 100 * start)
    rows = [{"file_name": row["image"], "label": row["label"]} for row in rows]
    table = write_table(tmp_path / f"set/{name}.{kind}", rows)
    monkeypatch.chdir(tmp_path / "set")
    for given in (tmp_path / "set", table, ".", table.name):
        splits = load_splits(str(given))
        for role, part, count in (("train", "train", 16), ("validation", "val", 6), ("test", "test", 8)):
            assert [Path(path).parent.name for path in paths(splits, role)] == [part] * count


def test_load_splits_of_one_table_uses_split_folders_named_in_the_recipe(tmp_path):
    rows = [*path_rows(tmp_path, COUNTS, "train"), *path_rows(tmp_path, {"cat": 3, "dog": 3}, "night", 100)]
    splits = load_splits(str(write_table(tmp_path / "labels.csv", rows)), test_split="night")
    assert len(splits.test) == 6
    assert len(splits.train) + len(splits.validation) == 60


@pytest.mark.parametrize("folders", [("train", "train"), ("train", "other"), ("test", "images/test")])
def test_load_splits_of_one_table_without_split_folders_holds_out(tmp_path, folders):
    rows = [*path_rows(tmp_path, {"cat": 10}, folders[0]), *path_rows(tmp_path, {"dog": 10}, folders[1], 100)]
    splits = load_splits(str(write_table(tmp_path / "labels.csv", rows)))
    assert {role: sum(counts.values()) for role, counts in class_counts(splits).items()} == {
        "train": 16, "validation": 2, "test": 2,
    }  # fmt: skip


@pytest.mark.parametrize("column", ["split", "subset"])
def test_load_splits_of_csv_ignores_spaces_around_splits(tmp_path, column):
    rows = [{**row, column: (" train", "test ")[n % 2]} for n, row in enumerate(path_rows(tmp_path, COUNTS))]
    splits = load_splits(str(write_table(tmp_path / "labels.csv", rows)))
    assert splits.sources == {"train": "train", "validation": "train", "test": "test"}
    assert len(splits.test) == 30


@pytest.mark.parametrize("fold", [None, 1])
def test_load_splits_of_table_holds_out_all_rows_of_a_file(tmp_path, caplog, fold):
    rows = path_rows(tmp_path, COUNTS)
    again = [{**row, "image": f"./{row['image']}"} for row in rows]
    table = write_table(tmp_path / "labels.csv", [*rows, *again])
    splits = load_splits(str(table), folds=fold and 4, fold=fold)
    files = {role: [os.path.normpath(path) for path in paths(splits, role)] for role in splits.sources}
    assert sum(len(set(found)) for found in files.values()) == 60
    assert all(found.count(file) == 2 for found in files.values() for file in found)
    assert_logged(caplog, "WARNING", "train", 60, 120)


def test_load_splits_of_table_with_a_file_in_two_splits_warns(tmp_path, caplog):
    rows = [{**row, "split": ("train", "test")[n % 2]} for n, row in enumerate(path_rows(tmp_path, COUNTS))]
    table = write_table(tmp_path / "labels.csv", [*rows, {**rows[0], "split": "test"}])
    load_splits(str(table))
    assert_logged(caplog, "WARNING", "test", 1, 31, tmp_path / rows[0]["image"])


@pytest.mark.parametrize("column", ["split", "Split", "SPLIT"])
def test_load_splits_with_unknown_values_in_the_split_column_names_it(tmp_path, column):
    rows = [{**row, column: ("train", "holdout")[n % 2]} for n, row in enumerate(path_rows(tmp_path, COUNTS))]
    with pytest.raises(DataError, match=r"^dataset_name: ") as caught:
        load_splits(str(write_table(tmp_path / "labels.csv", rows)))
    assert_names(caught.value, f"'{column}'", "holdout")


@pytest.mark.parametrize("column", ["partition", "Subset", "set"])
@pytest.mark.parametrize("other", [{}, {"split": "train"}, {"Split": "train"}])
def test_load_splits_with_an_unused_split_column_warns(tmp_path, caplog, column, other):
    rows = [{**row, column: n % 3, **other} for n, row in enumerate(path_rows(tmp_path, COUNTS))]
    load_splits(str(write_table(tmp_path / "labels.csv", rows)))
    assert [r.levelname for r in caplog.records if f"'{column}'" in r.getMessage()] == ["WARNING"]


@pytest.mark.parametrize(("values", "warns"), [(("train", "test"), True), (("train", "train"), False)])
def test_load_splits_of_a_table_for_each_split_warns_of_another_split_column(tmp_path, caplog, values, warns):
    for start, split in enumerate(("train", "val")):
        rows = path_rows(tmp_path, {"cat": 10, "dog": 10}, split, 100 * start)
        rows = [{**row, "split": split if split == "val" else values[n % 2]} for n, row in enumerate(rows)]
        write_table(tmp_path / f"{split}.csv", rows)
    load_splits(str(tmp_path))
    assert any("'split'" in r.getMessage() and r.levelname == "WARNING" for r in caplog.records) == warns


def test_load_splits_of_metadata_without_labels_warns_of_a_split_column(tmp_path, caplog):
    write_images(tmp_path, {"cat": 10, "dog": 10})
    write_table(tmp_path / "metadata.csv", [{"file_name": path, "split": "test"} for path, _ in CAPTIONS])
    load_splits(str(tmp_path))
    assert any("'split'" in r.getMessage() and r.levelname == "WARNING" for r in caplog.records)


def test_load_splits_of_tables_beside_class_folders_uses_the_folders(tmp_path):
    write_images(tmp_path, {"train/cat": 20, "train/dog": 20})
    write_table(tmp_path / "labels.csv", [{"image": "train/cat/0.png", "label": "wolf"}])
    assert load_splits(str(tmp_path)).labels == ["cat", "dog"]


def test_load_splits_of_ambiguous_folders_with_another_table_names_the_folders(tmp_path):
    write_images(tmp_path, {"cat": 5, "out/plots": 5})
    write_table(tmp_path / "history.csv", [{"epoch": 1, "loss": 2.0}])
    with pytest.raises(DataError, match=r"^dataset_name: class folders"):
        load_splits(str(tmp_path))


def test_load_splits_of_tables_with_ambiguous_names_raises(tmp_path):
    write_table(tmp_path / "labels_train.csv", path_rows(tmp_path, COUNTS))
    write_table(tmp_path / "labels_test.csv", path_rows(tmp_path, COUNTS))
    with pytest.raises(DataError, match=r"^dataset_name:") as caught:
        load_splits(str(tmp_path))
    assert_names(caught.value, "labels_train.csv", "labels_test.csv")


CONTENT = {
    "bytes": lambda seed: image_bytes(seed),
    "struct": lambda seed: {"bytes": image_bytes(seed), "path": f"{seed}.png"},
    "base64": lambda seed: base64.b64encode(image_bytes(seed)).decode(),
    "uri": lambda seed: "data:image/png;base64," + base64.b64encode(image_bytes(seed)).decode(),
}


@pytest.mark.parametrize("content", CONTENT)
@pytest.mark.parametrize("named", [None, "image"])
def test_load_splits_of_parquet_with_undecoded_images(tmp_path, content, named):
    for split, count, start in (("train", 20, 0), ("test", 6, 100)):
        rows = [{"image": CONTENT[content](start + n), "label": n % 2} for n in range(count)]
        write_table(tmp_path / f"{split}.parquet", rows)
    splits = load_splits(str(tmp_path), image_column=named, validation_fraction=0.2)
    assert class_counts(splits) == {
        "train": {"0": 8, "1": 8},
        "validation": {"0": 2, "1": 2},
        "test": {"0": 3, "1": 3},
    }
    for row, image in enumerate(splits.test["image"]):
        assert image["bytes"] == image_bytes(100 + row)


def test_load_splits_of_parquet_with_image_feature_equals_datasets(colors):
    splits = load_splits(str(colors), test_split=None, validation_fraction=0.2)
    reference = datasets.load_dataset("parquet", data_files=str(colors / "data/train-*.parquet"), split="train")
    reference = reference.cast_column("img", datasets.Image(decode=False))
    whole = splits.whole["train"]
    assert [image["bytes"] for image in whole["image"]] == [image["bytes"] for image in reference["img"]]
    assert whole["label"] == reference["label"]


def test_load_splits_of_folder_with_brackets_in_its_name(tmp_path):
    folder = tmp_path / "set [1] *"
    for split in ("train", "test"):
        rows = [{"image": image_bytes(n), "label": n % 2} for n in range(20)]
        write_table(folder / f"{split}.parquet", rows)
    assert len(load_splits(str(folder)).test) == 20


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a"], ["a", "b"]),
        ([10, 2], ["2", "10"]),
        ([True, False], ["False", "True"]),
        ([1.0, 0.0], ["0", "1"]),
        (["007", "08"], ["007", "08"]),
        (["NA", "null"], ["NA", "null"]),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_load_splits_with_labels_of_any_type_names_the_classes(tmp_path, labels, names, kind):
    write_images(tmp_path / "images", {"x": 20})
    rows = [{"image": f"images/x/{n}.png", "label": labels[n % 2]} for n in range(20)]
    splits = load_splits(str(write_table(tmp_path / f"t.{kind}", rows)))
    if kind == "csv" and isinstance(labels[0], float):
        names = ["0.0", "1.0"]
    assert splits.labels == names
    first = paths(splits, "train")[0]
    value = labels[int(Path(first).stem) % 2]
    assert names[splits.train[0]["label"]] in (str(value), str(int(value)) if isinstance(value, float) else None)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_load_splits_with_missing_labels_names_their_row(tmp_path, kind):
    rows = path_rows(tmp_path, COUNTS)
    rows[7]["label"] = None
    with pytest.raises(DataError, match=r"'train', row 7: the label is missing \(1 such"):
        load_splits(str(write_table(tmp_path / f"t.{kind}", rows)))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("column", ["label", "species"])
def test_load_splits_with_empty_labels_names_their_row(tmp_path, column, kind):
    rows = [{"image": row["image"], column: row["label"]} for row in path_rows(tmp_path, COUNTS)]
    rows[7][column] = ""
    rows[9][column] = " "
    with pytest.raises(DataError, match=r"'train', row 7: the label is missing \(2 such"):
        load_splits(str(write_table(tmp_path / f"t.{kind}", rows)), label_column=column)


@pytest.mark.parametrize("column", ["label", "species"])
def test_load_splits_of_csv_ignores_spaces_around_labels(tmp_path, column):
    rows = [
        {"image": row["image"], column: f" {row['label']} "[n % 2 :]}
        for n, row in enumerate(path_rows(tmp_path, COUNTS))
    ]
    assert load_splits(str(write_table(tmp_path / "t.csv", rows)), label_column=column).labels == ["cat", "dog"]


@pytest.mark.parametrize("column", ["label", "digit"])
@pytest.mark.parametrize("class_names", [None, [f"class {n}" for n in range(12)]])
def test_load_splits_of_csv_with_integers_sorts_them_as_numbers(tmp_path, column, class_names):
    write_images(tmp_path / "images", {"x": 36})
    rows = [{"image": f"images/x/{n}.png", column: n % 12} for n in range(36)]
    table = write_table(tmp_path / "t.csv", rows)
    splits = load_splits(str(table), label_column=column, class_names=class_names, test_split=None)
    assert splits.labels == (class_names or [str(n) for n in range(12)])
    for image, label in zip(splits.train["image"], splits.train["label"], strict=True):
        assert int(Path(image["path"]).stem) % 12 == label


@pytest.mark.parametrize("column", ["label", "species"])
@pytest.mark.parametrize("names", [("train", "test"), ("test", "train"), ("data-0", "data-1")])
def test_load_splits_of_csv_with_integers_in_one_of_two_files_reads_names(tmp_path, column, names):
    write_images(tmp_path / "images", {"x": 80})
    for name, start, labels in zip(names, (0, 40), (("1", "2", "a"), ("1", "2")), strict=True):
        rows = [{"image": f"images/x/{start + n}.png", column: labels[n % len(labels)]} for n in range(40)]
        write_table(tmp_path / f"{name}.csv", rows)
    if names[0] == "test":
        with pytest.raises(DataError, match=r"label 'a' is outside"):
            load_splits(str(tmp_path), label_column=column)
        return
    splits = load_splits(str(tmp_path), label_column=column)
    assert splits.labels == ["1", "2", "a"]
    assert sum(counts["1"] for counts in class_counts(splits).values()) == 14 + 20


@pytest.mark.parametrize("labels", [(10**20, 10**20 + 1), (2**63, 1), ("1" * 5000, "2")])
def test_load_splits_of_csv_with_huge_integers_keeps_them_as_text(tmp_path, labels):
    write_images(tmp_path / "images", {"x": 20})
    rows = [{"image": f"images/x/{n}.png", "label": labels[n % 2]} for n in range(20)]
    assert load_splits(str(write_table(tmp_path / "t.csv", rows))).labels == sorted(map(str, labels))


@pytest.mark.parametrize("kind", KINDS)
def test_load_splits_of_labels_in_two_unicode_forms_has_one_class(tmp_path, kind):
    rows = path_rows(tmp_path, COUNTS)
    for number, row in enumerate(rows):
        row["label"] = {"cat": "bar", "dog": ("caf\u00e9", "cafe\u0301")[number % 2]}[row["label"]]
    table = str(write_table(tmp_path / f"t.{kind}", rows))
    (tmp_path / "names.txt").write_text("cafe\u0301\nbar\n")
    assert load_splits(table).labels == ["bar", "caf\u00e9"]
    assert load_splits(table, class_names=[str(tmp_path / "names.txt")]).labels == ["caf\u00e9", "bar"]


IMAGE_TYPES = {
    "path": pa.string(),
    "bytes": pa.binary(),
    "struct": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
}


@pytest.mark.parametrize("kind", IMAGE_TYPES)
@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_load_splits_with_missing_images_names_their_row(tmp_path, kind, on_bad_image):
    (tmp_path / "x.png").write_bytes(image_bytes())
    image = {"path": "x.png", "bytes": image_bytes(), "struct": {"bytes": image_bytes(), "path": None}}[kind]
    images = [image] * 20
    images[3] = None
    images[5] = {"bytes": None, "path": None} if kind == "struct" else None
    table = pa.table({"image": pa.array(images, IMAGE_TYPES[kind]), "label": [n % 2 for n in range(20)]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"'train', row 3: image is missing \(2 such"):
        load_splits(str(tmp_path / "t.parquet"), on_bad_image=on_bad_image)


@pytest.mark.parametrize("as_file", [False, True])
def test_load_splits_with_class_names_names_integer_labels(tmp_path, as_file):
    names = ["zebra", "ant", "cow"]
    rows = [{"image": image_bytes(n), "label": n % 2} for n in range(20)]
    table = write_table(tmp_path / "t.parquet", rows)
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    splits = load_splits(str(table), class_names=[str(tmp_path / "names.txt")] if as_file else names)
    assert splits.labels == names
    assert set(splits.train["label"]) == {0, 1}


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("{root}/secret.png", "outside"),
        ("../secret.png", "outside"),
        ("images/../../secret.png", "outside"),
        ("link.png", "is a link"),
        ("linked/secret.png", "is a link"),
        ("http://127.0.0.1:9/a.png", "URL"),
        ("file:///etc/passwd", "URL"),
        ("pipe.png", "regular file"),
        ("images/x", "regular file"),
        ("nowhere.png", "no file"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_load_splits_with_paths_outside_the_folder_raises(tmp_path, path, reason, kind):
    (tmp_path / "secret.png").write_bytes(image_bytes())
    folder = write_images(tmp_path / "set", {"images/x": 10})
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked").symlink_to(tmp_path)
    rows = [{"image": f"images/x/{n}.png", "label": n % 2} for n in range(10)]
    rows[4]["image"] = path.format(root=tmp_path)
    table = write_table(folder / f"t.{kind}", rows)
    if path == "pipe.png":
        os.mkfifo(folder / path)
    with pytest.raises(DataError, match=rf"'train', row 4: .*{reason}"):
        load_splits(str(table))


@pytest.mark.parametrize("path", ["{root}/secret.png", "../secret.png", "link.png"])
def test_load_splits_with_allow_outside_paths_reads_them(tmp_path, path):
    (tmp_path / "secret.png").write_bytes(image_bytes(5))
    folder = write_images(tmp_path / "set", {"images/x": 20})
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    rows = [{"image": f"images/x/{n}.png", "label": n % 2} for n in range(20)]
    rows[4]["image"] = path.format(root=tmp_path)
    table = write_table(folder / "t.csv", rows)
    splits = load_splits(str(table), allow_outside_paths=True, test_split=None)
    assert len(splits.train) + len(splits.validation) == 20


def test_load_splits_of_struct_rows_with_paths_resolves_them_too(tmp_path, caplog):
    write_images(tmp_path, {"images/x": 20})
    rows = [{"image": {"bytes": None, "path": f"images/x/{n}.png"}, "label": n % 2} for n in range(20)]
    for number in (0, 7):
        rows[number]["image"] = {"bytes": image_bytes(number), "path": "/any/name.png"}
    rows[9]["image"]["path"] = "images/x/8.png"
    splits = load_splits(str(write_table(tmp_path / "t.parquet", rows)), test_split=None)
    for image, row in zip(splits.train["image"], splits.train["row"], strict=True):
        assert bool(image["bytes"]) == (row in (0, 7))
        decode(image, "train", row)
    assert_logged(caplog, "WARNING", "train", 1, 20, tmp_path / "images/x/8.png")
    rows[5]["image"]["path"] = "/etc/hostname"
    with pytest.raises(DataError, match="row 5"):
        load_splits(str(write_table(tmp_path / "t.parquet", rows)))


def test_load_splits_with_shards_of_different_columns_names_both(tmp_path):
    rows = [{"image": image_bytes(n), "label": n % 2} for n in range(10)]
    write_table(tmp_path / "train-00000-of-00002.parquet", rows)
    write_table(tmp_path / "train-00001-of-00002.parquet", [{**row, "extra": "x"} for row in rows])
    with pytest.raises(DataError, match=r"^dataset_name:") as caught:
        load_splits(str(tmp_path))
    assert_names(caught.value, "train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "extra")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("image,label\nimages/x/0.png,a,b\n", ["row 0", "3 values"]),
        ("image,label\n", ["1 lines"]),
        ("image,image\nx,y\n", ["image, image"]),
        ("first,second\nimages/x/0.png,a\n", ["image_column", "first, second"]),
        ('image,label\n"images/x/0.png,a\n', ["unexpected end of data"]),
    ],
)
def test_load_splits_of_a_damaged_csv_names_the_problem(tmp_path, text, names):
    write_images(tmp_path, {"images/x": 1})
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError) as caught:
        load_splits(str(tmp_path / "t.csv"))
    assert_names(caught.value, *names)


def test_load_splits_of_csv_without_the_folder_of_its_images_names_it(tmp_path):
    write_images(tmp_path, {"images": 10})
    (tmp_path / "labels.csv").write_text("image,label\n" + "".join(f"{n}.png,{'ab'[n % 2]}\n" for n in range(10)))
    with pytest.raises(DataError) as caught:
        load_splits(str(tmp_path))
    assert_names(caught.value, "'0.png'", 10, "images/0.png")


def test_load_splits_of_csv_with_semicolons_and_byte_order_mark(tmp_path):
    lines = ["image;label", *(f"{row['image']};{row['label']}" for row in path_rows(tmp_path, COUNTS))]
    (tmp_path / "t.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    assert load_splits(str(tmp_path / "t.csv")).labels == ["cat", "dog"]


@pytest.mark.parametrize("mark", ['"', "\r"])
def test_load_splits_of_csv_that_declares_a_wrong_delimiter_is_an_error(tmp_path, mark):
    write_images(tmp_path, {"x": 20})
    rows = "".join(f"x/{n}.png{mark}{n % 2}\n" for n in range(20))
    (tmp_path / "t.csv").write_bytes(f"sep={mark}\r\nimage{mark}label\n{rows}".encode())
    with pytest.raises(DataError):
        load_splits(str(tmp_path / "t.csv"))


# (header, end of each row, end of the file, line end)
SPREADSHEETS = {
    "delimiter": ("image;label;notes, other", "", "", "\n"),
    "declared delimiter": ("sep=;\r\nimage;label;x", "", "", "\r\n"),
    "empty rows": ("image;label;x", "", "\n;;\n ;;\n", "\n"),
    "empty columns": ("image;label;x;;", ";;", "", "\n"),
    "carriage returns": ("image;label;x", "", "", "\r"),
}


@pytest.mark.parametrize("kind", SPREADSHEETS)
def test_load_splits_of_csv_of_a_spreadsheet_equals_a_plain_one(tmp_path, kind):
    header, row_end, end, line_end = SPREADSHEETS[kind]
    rows = [f"{row['image']};{row['label']};1, 2{row_end}" for row in path_rows(tmp_path, COUNTS)]
    (tmp_path / "t.csv").write_bytes((line_end.join([header, *rows]) + end).encode())
    splits = load_splits(str(tmp_path / "t.csv"), test_split=None)
    assert splits.labels == ["cat", "dog"]
    assert splits.whole["train"]["label"][:] == [0] * 20 + [1] * 40


@pytest.mark.parametrize("change", [lambda path: path.replace("/", "\\"), "{} ".format, " {}".format])
@pytest.mark.parametrize("kind", KINDS)
def test_load_splits_of_paths_with_backslashes_or_spaces_finds_the_files(tmp_path, kind, change):
    rows = path_rows(tmp_path, COUNTS)
    expected = paths(load_splits(str(write_table(tmp_path / f"a.{kind}", rows))), "train")
    changed = [{**row, "image": change(row["image"])} for row in rows]
    assert paths(load_splits(str(write_table(tmp_path / f"b.{kind}", changed))), "train") == expected


@pytest.mark.parametrize(("on_disk", "in_table"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_load_splits_of_paths_in_another_unicode_form_finds_the_files(tmp_path, on_disk, in_table):
    rows = path_rows(tmp_path, {unicodedata.normalize(on_disk, "caf\u00e9"): 20, "dog": 40})
    expected = paths(load_splits(str(write_table(tmp_path / "a.csv", rows))), "train")
    changed = [{**row, "image": unicodedata.normalize(in_table, row["image"])} for row in rows]
    assert changed != rows
    assert paths(load_splits(str(write_table(tmp_path / "b.csv", changed))), "train") == expected


def test_load_splits_of_a_path_with_a_backslash_in_its_name_takes_that_file(tmp_path):
    rows = path_rows(tmp_path, COUNTS)
    (tmp_path / "images\\cat-0.png").write_bytes(image_bytes(99))
    rows[0]["image"] = "images\\cat-0.png"
    splits = load_splits(str(write_table(tmp_path / "t.csv", rows)), test_split=None)
    assert splits.whole["train"][0]["image"]["path"].endswith("images\\cat-0.png")


OUTSIDE = ("..\\secret.png", "images\\..\\..\\secret.png", " ../secret.png", " {root}/secret.png")


@pytest.mark.parametrize("path", OUTSIDE)
def test_load_splits_of_paths_with_backslashes_or_spaces_stay_in_the_folder(tmp_path, path):
    (tmp_path / "secret.png").write_bytes(image_bytes())
    rows = path_rows(tmp_path / "set", COUNTS)
    rows[4]["image"] = path.format(root=tmp_path)
    with pytest.raises(DataError, match="row 4"):
        load_splits(str(write_table(tmp_path / "set" / "t.csv", rows)))


@pytest.mark.parametrize("given", ["images/CAT-0.PNG", "images/cat-0", "images/cat-0.jpg"])
def test_load_splits_of_a_path_in_another_case_names_the_file(tmp_path, given):
    rows = path_rows(tmp_path, COUNTS)
    rows[0]["image"] = given
    with pytest.raises(DataError) as caught:
        load_splits(str(write_table(tmp_path / "t.csv", rows)))
    assert_names(caught.value, "row 0", "images/cat-0.png")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_load_splits_of_empty_paths_counts_them(tmp_path, kind):
    rows = path_rows(tmp_path, COUNTS)
    rows[3]["image"], rows[7]["image"] = "", " "
    with pytest.raises(DataError, match=r"'train', row 3: image is missing \(2 such"):
        load_splits(str(write_table(tmp_path / f"t.{kind}", rows)))


def test_load_splits_of_a_saved_dataset(tmp_path):
    write_images(tmp_path / "a", {"train/cat": 10, "train/dog": 10, "test/cat": 4, "test/dog": 4})
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "a"))
    encoded = datasets.DatasetDict(
        {
            name: split.map(
                lambda row: {"image": {"bytes": Path(row["image"]["path"]).read_bytes(), "path": None}},
                features=split.features,
            )
            for name, split in loaded.cast_column("image", datasets.Image(decode=False)).items()
        }
    )
    encoded.save_to_disk(tmp_path / "saved")
    splits = load_splits(str(tmp_path / "saved"), validation_fraction=0.2)
    assert class_counts(splits)["test"] == {"cat": 4, "dog": 4}


def test_load_splits_with_a_card_with_outside_files_raises(tmp_path):
    rows = [{"image": image_bytes(n), "label": n % 2} for n in range(10)]
    write_table(tmp_path / "set/train.parquet", rows)
    write_table(tmp_path / "private/train.parquet", rows)
    card = "---\nconfigs:\n- config_name: default\n  data_files: ../private/**\n---\n"
    (tmp_path / "set/README.md").write_text(card)
    with pytest.raises(DataError, match=r"^dataset_name: .*README.md.*\.\./private"):
        load_splits(str(tmp_path / "set"))


def test_load_splits_without_labels_in_the_default_test_split_leaves_it_out(tmp_path, caplog):
    for split, label in (("train", None), ("test", -1)):
        rows = [{"image": image_bytes(n), "label": n % 2 if label is None else label} for n in range(20)]
        write_table(tmp_path / f"{split}.parquet", rows)
    splits = load_splits(str(tmp_path))
    assert splits.test is None
    assert any("no labels" in message for message in caplog.messages)


# ---- Streams ----


@pytest.mark.parametrize("content", ["bytes", "struct", "base64"])
def test_stream_splits_of_undecoded_images_yields_them(tmp_path, content):
    for split, count in (("train", 20), ("validation", 6)):
        rows = [{"image": CONTENT[content](n), "label": "ab"[n % 2]} for n in range(count)]
        write_table(tmp_path / f"{split}.parquet", rows)
    splits = stream_splits(str(tmp_path), class_names=["b", "a"], test_split=None)
    rows = list(splits.train)
    assert [row["image"]["bytes"] for row in rows] == [image_bytes(n) for n in range(20)]
    assert [row["label"] for row in rows] == [1, 0] * 10
    assert [row["label"] for row in splits.validation] == [1, 0] * 3


def test_stream_splits_with_paths_outside_the_folder_raises(tmp_path):
    write_images(tmp_path / "set", {"x": 10})
    for split in ("train", "validation"):
        rows = [{"image": f"x/{n}.png", "label": n % 2} for n in range(10)]
        if split == "train":
            rows[6]["image"] = "../secret.png"
        write_table(tmp_path / f"set/{split}.jsonl", rows)
    splits = stream_splits(str(tmp_path / "set"), class_names=["a", "b"], test_split=None)
    with pytest.raises(DataError, match=r"\.\./secret\.png"):
        list(splits.train)


def test_stream_splits_of_class_folders_knows_their_number(tmp_path):
    write_images(tmp_path, {f"{s}/{c}": 6 for s in ("train", "val", "test") for c in ("cat", "dog")})
    splits = stream_splits(str(tmp_path), validation_split="val")
    assert splits.metadata["splits"]["train"]["rows"] == 12
    assert np.bincount([row["label"] for row in splits.train]).tolist() == [6, 6]
    assert (len(list(splits.validation)), len(list(splits.test))) == (12, 12)
