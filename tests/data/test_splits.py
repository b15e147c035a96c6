"""Splits: columns, labels, held-out images, and errors."""

import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Value
from helpers.images import LABELS, colored_image, colored_split
from helpers.layouts import write_images
from helpers.messages import assert_logged, assert_names
from helpers.splits import load_splits, stream_splits

from hfvit.data.decode import decode
from hfvit.data.labels import SingleLabel, as_in_training, encode_labels, match_classes, read_class_names
from hfvit.data.samplers import BalancedSampler
from hfvit.data.splits import find_image_column, find_label_column
from hfvit.data.starting_recipe import is_data_set
from hfvit.errors import DataError, RecipeError
from hfvit.recipe.arguments import DataArguments


def save(folder, **splits):
    for name, split in splits.items():
        split.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return str(folder)


def make_split(labels, features=None, **columns):
    rng = np.random.default_rng(0)
    values = {"image": [colored_image(0, rng) for _ in labels], "label": labels, **columns}
    default = {"image": datasets.Image(), "label": datasets.ClassLabel(names=LABELS)}
    return datasets.Dataset.from_dict(values, features=datasets.Features({**default, **(features or {})}))


def test_load_splits_finds_columns_and_labels_of_a_hub_data_set(colors):
    splits = load_splits(str(colors), validation_fraction=0.2, seed=5)
    assert (splits.image_column, splits.label_column, splits.labels) == ("img", "label", LABELS)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (52, 13, 31)
    assert_names(splits.metadata["splits"]["validation"]["source"], "train", 0.2)
    assert splits.sources == {"train": "train", "validation": "train", "test": "test"}
    assert_names(splits.describe(), colors, "'img'", "'label'", 3, 52, 13, 31)


def test_held_out_rows_are_stratified_seeded_and_disjoint(colors):
    def rows(seed):
        splits = load_splits(str(colors), validation_fraction=0.2, seed=seed)
        return [{row["image"]["bytes"] for row in part} for part in (splits.train, splits.validation)]

    (train, validation), (_, again), (_, other) = rows(5), rows(5), rows(6)
    assert not train & validation
    assert len(train | validation) == 65
    assert validation == again
    assert validation != other
    counts = np.bincount(load_splits(str(colors), validation_fraction=0.2).validation["label"])
    assert counts.max() - counts.min() <= 1


def test_validation_split_is_used_unchanged(tmp_path):
    name = save(tmp_path, train=colored_split(30, 0), validation=colored_split(9, 1), test=colored_split(12, 2))
    splits = load_splits(name, validation_split="validation")
    assert (len(splits.train), len(splits.validation)) == (30, 9)


ANIMALS = {
    "in another order": (ClassLabel(names=["dog", "cat"]), [1, 0, 0]),
    "as names": (Value("string"), ["cat", "dog", "dog"]),
    "of fewer classes": (ClassLabel(names=["cat", "dog"]), [0, 1, 1]),
}


@pytest.mark.parametrize("train", [ClassLabel(names=["bird", "cat", "dog"]), Value("string")])
@pytest.mark.parametrize("other", ANIMALS)
def test_load_splits_of_splits_with_other_class_indices_matches_names(tmp_path, train, other):
    kind, labels = ANIMALS[other]
    animals = ["bird", "cat", "dog"] * 5
    values = animals if train.dtype == "string" else [train.str2int(name) for name in animals]
    test = make_split(labels, {"label": kind})
    name = save(tmp_path, train=make_split(values, {"label": train}), validation=test, test=test)
    splits = load_splits(name)
    assert splits.labels == ["bird", "cat", "dog"]
    assert splits.test["label"][:] == splits.validation["label"][:] == [1, 2, 2]
    if train.dtype != "string":
        assert stream_splits(name, stream_evaluation=False).test["label"][:] == [1, 2, 2]


@pytest.mark.parametrize("kind", [Value("int64"), Value("string"), ClassLabel(names=["cat", "bird", "dog"])])
def test_load_splits_with_class_names_matches_those_of_another_split(tmp_path, kind):
    names = ["bird", "cat", "dog"]
    values = names if kind.dtype == "string" else [0, 1, 2]
    test = make_split([0, 1, 2], {"label": ClassLabel(names=["dog", "cat", "bird"])})
    train = make_split(values * 5, {"label": kind})
    name = save(tmp_path, train=train, validation=test, test=test)
    assert load_splits(name, class_names=names).test["label"][:] == [2, 1, 0]
    streamed = stream_splits(name, class_names=names, stream_evaluation=False)
    assert streamed.test["label"][:] == [2, 1, 0]
    expected = load_splits(name, class_names=names).train["label"][:]
    assert [row["label"] for row in streamed.train] == expected


STREAMED_CLASSES = {
    "indices of numbers": (["1", "0", "2"], Value("int64"), ["zero", "one", "two"], [1, 0, 2]),
    "numbers": (["1", "0", "2"], ClassLabel(names=["2", "1", "0"]), ["zero", "one", "two"], [2, 1, 0]),
    "NFD": (["cafe\u0301", "bar", "tea"], ClassLabel(names=["bar", "tea", "cafe\u0301"]), None, [1, 2, 0]),
    "NFC": (["cafe\u0301", "bar", "tea"], ClassLabel(names=["bar", "tea", "caf\u00e9"]), None, [1, 2, 0]),
}


@pytest.mark.parametrize("kind", STREAMED_CLASSES)
def test_stream_splits_encodes_classes_as_load_splits(tmp_path, kind):
    trained, evaluated, class_names, expected = STREAMED_CLASSES[kind]
    test = make_split([0, 1, 2], {"label": evaluated})
    train = make_split([0, 1, 2] * 5, {"label": ClassLabel(names=trained)})
    name = save(tmp_path, train=train, validation=test, test=test)
    whole = load_splits(name, class_names=class_names)
    assert whole.test["label"][:] == expected
    for stream_evaluation in (False, True):
        streamed = stream_splits(name, class_names=class_names, stream_evaluation=stream_evaluation)
        assert streamed.labels == whole.labels
        assert [row["label"] for row in streamed.train] == whole.train["label"][:]
        assert [row["label"] for row in streamed.validation] == expected


@pytest.mark.parametrize("stream_evaluation", [False, True])
def test_stream_splits_of_numbered_folders_takes_the_name_of_each_number(tmp_path, stream_evaluation):
    """Folders are sorted as text: 0, 1, 10, 11, 2, ..."""
    write_images(tmp_path, {f"{split}/{number}": 1 for split in ("train", "val", "test") for number in range(12)})
    names = [f"species {number}" for number in range(12)]
    splits = stream_splits(str(tmp_path), "val", class_names=names, stream_evaluation=stream_evaluation)
    assert splits.labels == names
    for role in ("train", "validation", "test"):
        found = [(int(Path(row["image"]["path"]).parent.name), row["label"]) for row in splits[role]]
        assert sorted(found) == [(number, number) for number in range(12)]


@pytest.mark.parametrize("missing", [None, "", " "])
def test_load_splits_of_names_with_a_missing_one_counts_it(tmp_path, missing):
    test = make_split([LABELS[0], missing, LABELS[1]], {"label": Value("string")})
    name = save(tmp_path, train=make_split([0, 1, 2] * 5), test=test)
    with pytest.raises(DataError, match=r"'test', row 1\b.*\b1 such row\b"):
        load_splits(name)


def test_load_splits_of_lists_with_other_class_indices_matches_names(tmp_path):
    def split(names, labels):
        return make_split(labels, {"label": datasets.List(ClassLabel(names=names))})

    train = split(["bird", "cat", "dog"], [[0, 1], [2], [1, 2], [0], [1], []])
    name = save(tmp_path, train=train, validation=train, test=split(["dog", "bird"], [[0], [1, 0], []]))
    assert load_splits(name).test["label"][:] == [[0, 0, 1], [1, 0, 1], [0, 0, 0]]


def test_load_splits_of_nan_labels_counts_them_as_missing(tmp_path):
    labels = [0.0, 1.0, np.nan, 2.0, np.nan]
    name = save(tmp_path, train=make_split(labels, {"label": Value("float64")}))
    with pytest.raises(DataError, match=r"row 2\b.*\b2 such rows"):
        load_splits(name)
    unlabeled = make_split([np.nan] * 3, {"label": Value("float64")})
    name = save(tmp_path, train=make_split([0.0, 1.0] * 9, {"label": Value("float64")}), test=unlabeled)
    assert load_splits(name).test is None


def test_load_splits_of_a_test_file_without_labels_does_not_use_it(tmp_path, caplog):
    train = make_split([0, 1, 2] * 5)
    test = make_split([0, 1]).remove_columns("label")
    name = save(tmp_path, train=train, validation=train.select(range(6)), test=test)
    for load in (load_splits, stream_splits):
        caplog.clear()
        splits = load(name)
        assert (splits.test, list(splits.metadata["splits"])) == (None, ["train", "validation"])
        assert_logged(caplog, "WARNING", "test", "no label column")
    with pytest.raises(DataError, match=r"^label_column: "):
        load_splits(name, test_split="test[:1]")
    save(tmp_path, test=test.add_column("target", [0, 1]))
    with pytest.raises(DataError, match=r"^label_column: "):
        load_splits(name)


def test_load_splits_of_a_split_with_unknown_classes_names_it(tmp_path):
    cats = make_split([0, 1, 0], {"label": ClassLabel(names=["cat", "fish"])})
    name = save(tmp_path, train=make_split([0, 1, 2] * 5), test=cats)
    with pytest.raises(DataError, match=r"^label_column: .*'test'.*cat, fish"):
        load_splits(name)


@pytest.mark.parametrize("streaming", [False, True])
def test_load_splits_of_shards_with_other_class_indices_names_the_file(tmp_path, streaming):
    for number, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        part = make_split([0, 1] * 5, {"label": ClassLabel(names=names)})
        part.to_parquet(tmp_path / f"train-{number}.parquet")
        part.to_parquet(tmp_path / f"validation-{number}.parquet")
    load = stream_splits if streaming else load_splits
    with pytest.raises(DataError, match=r"^dataset_name: .*train-1\.parquet"):
        load(str(tmp_path))


@pytest.mark.parametrize("named", [0, 1])
def test_load_splits_of_shards_of_which_one_has_no_class_names_reads_indices(tmp_path, named):
    for number in range(2):
        part = make_split([0, 1] * 5, {"label": ClassLabel(names=["cat", "dog"])})
        part = part if number == named else part.cast_column("label", Value("int64"))
        part.to_parquet(tmp_path / f"train-{number}-of-2.parquet")
    assert load_splits(str(tmp_path)).whole["train"]["label"][:] == [0, 1] * 10


def test_load_splits_of_shards_with_other_classes_in_another_column_needs_the_label_column(tmp_path):
    for number, names in enumerate((["a", "b"], ["c", "d"])):
        part = make_split([0, 1] * 5, {"camera": ClassLabel(names=names)}, camera=[0, 1] * 5)
        part.to_parquet(tmp_path / f"train-{number}-of-2.parquet")
    with pytest.raises(DataError, match=r"'camera'.*label_column"):
        load_splits(str(tmp_path))
    assert load_splits(str(tmp_path), label_column="label").whole["train"]["label"][:] == [0, 1] * 10


def test_load_splits_of_a_sum_of_splits_with_other_classes_names_the_option(tmp_path):
    name = save(tmp_path, train=make_split([0, 1]), validation=make_split([0], {"label": ClassLabel(names=["cat"])}))
    with pytest.raises(DataError, match=r"^train_split: .*train\+validation"):
        load_splits(name, train_split="train+validation")


def test_split_slices_and_limits(colors):
    splits = load_splits(
        str(colors), train_split="train[:60]", test_split="train[60:]", max_train_samples=20, max_eval_samples=4
    )
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (20, 4, 4)
    rows, others = (list(load_splits(str(colors), max_eval_samples=9, seed=seed).test["row"]) for seed in (1, 2))
    assert rows == sorted({*rows})
    assert len(rows) == 9
    assert rows != others


def test_data_set_without_a_test_split(colors):
    assert load_splits(str(colors), test_split=None).test is None


def test_imagefolder(tmp_path):
    rng = np.random.default_rng(0)
    for split, rows in (("train", 12), ("test", 6)):
        for row in range(rows):
            folder = tmp_path / split / LABELS[row % 3]
            folder.mkdir(parents=True, exist_ok=True)
            colored_image(row % 3, rng).save(folder / f"{row}.png")
    splits = load_splits(str(tmp_path), validation_fraction=0.25)
    assert splits.labels == sorted(LABELS)
    example = splits.test[0]
    assert decode(example["image"], "test", example["row"]).size == (16, 16)


def test_digits_are_complete():
    splits = load_splits("digits", validation_fraction=0.1)
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 1797
    assert splits.labels == list("0123456789")
    assert np.bincount(splits.test["label"]).min() >= 34


def test_class_names_of_many_classes_take_little_time(tmp_path):
    names = [f"class {number}" for number in range(60_000)]
    file = tmp_path / "names.txt"
    file.write_text("\n".join(names))
    start = time.process_time()
    found = read_class_names(DataArguments(dataset_name="digits", class_names=[str(file)]))
    targets = np.array([0, 59_999])
    labels, encoded = encode_labels(ClassLabel(names=names[::-1]), {"train": targets}, {"train": "train"}, found)
    assert time.process_time() - start < 5
    assert labels == found == names
    assert encoded["train"].tolist() == [59_999, 0]


def test_rows_of_many_classes_are_held_out_and_balanced_in_little_time():
    targets = np.r_[np.random.default_rng(0).integers(0, 10_000, 300_000), 10_000]
    start = time.process_time()
    held_out = SingleLabel("label").hold_out(targets, 0.2, seed=0)  # the last class has one image
    by_class = BalancedSampler(targets, global_batch_size=8, seed=0).by_class
    assert time.process_time() - start < 5
    assert len(np.unique(held_out)) == len(held_out)
    counts = np.bincount(targets)
    assert np.array_equal(np.bincount(targets[held_out], minlength=len(counts)),
                          [min(max(1, round(0.2 * count)), count - 1) for count in counts])  # fmt: skip
    assert all((targets[rows] == label).all() for label, rows in enumerate(by_class))
    assert list(map(len, by_class)) == counts.tolist()


@pytest.mark.parametrize(
    ("option", "arguments"), [("dataset_name", {}), ("class_names", {"class_names": ["a" * 300]})]
)
def test_names_too_long_for_a_file_name_the_option(option, arguments):
    with pytest.raises(DataError, match=rf"^{option}: "):
        load_splits("digits" if arguments else "a" * 300, **arguments)
    assert not is_data_set("a" * 300)


def test_fractions_that_leave_nothing_for_training_raise(tmp_path):
    folder = write_images(tmp_path / "photos", dict.fromkeys(LABELS, 4))
    with pytest.raises(RecipeError) as caught:
        load_splits(str(folder), validation_fraction=0.5, test_fraction=0.5)
    assert_names(caught.value, "test_fraction", 0.5)


def test_test_fraction_without_effect_is_reported(colors, caplog):
    load_splits(str(colors), test_fraction=0.2)
    assert_logged(caplog, "WARNING", "test_fraction")


def test_string_and_integer_labels_become_classes(tmp_path):
    for kind, values in (("string", ["cat", "dog", "cat", "dog"]), ("int64", [7, 3, 7, 3])):
        split = make_split(values, {"label": datasets.Value(kind)})
        splits = load_splits(save(tmp_path / kind, train=split, test=split), validation_fraction=0.5)
        assert splits.labels == sorted({str(value) for value in values})
        assert splits.test["label"] == [splits.labels.index(str(value)) for value in values]


def test_find_columns_prefers_usual_names_and_raises_if_ambiguous():
    image, fine = datasets.Image(), datasets.ClassLabel(names=["a", "b"])
    assert (
        find_label_column(datasets.Features({"img": image, "fine_label": fine, "coarse_label": fine})) == "fine_label"
    )
    with pytest.raises(DataError, match=r"^label_column: .*\bcolor, shape\b"):
        find_label_column(datasets.Features({"color": fine, "shape": fine}))
    with pytest.raises(DataError, match=r"^label_column: .*\bimg\b"):
        find_label_column(datasets.Features({"img": image}))
    with pytest.raises(DataError, match=r"^image_column: .*\bleft, right\b"):
        find_image_column(datasets.Features({"left": image, "right": image}))
    with pytest.raises(DataError, match=r"^image_column: .*\blabel\b"):
        find_image_column(datasets.Features({"label": fine}))


@pytest.mark.parametrize(
    ("arguments", "head", "data"),
    [
        ({"test_split": "tset"}, "test_split:", ["{colors}", "'tset'", "train, test", "'test'"]),
        ({"image_column": "imgs"}, "image_column:", ["'train'", "'imgs'", "img, label", "'img'"]),
        ({"label_column": "labels"}, "label_column:", ["'train'", "'labels'", "img, label", "'label'"]),
        ({"image_column": "label"}, "image_column:", ["'train'", "'label'"]),
        ({"train_split": "train[:0]"}, "train_split:", ["{colors}", "'train[:0]'"]),
    ],
)
def test_load_splits_with_invalid_arguments_names_option_and_values(colors, arguments, head, data):
    with pytest.raises(DataError) as caught:
        load_splits(str(colors), **arguments)
    assert str(caught.value).startswith(head)
    assert_names(caught.value, *(str(value).format(colors=colors) for value in data))
    assert "Error" not in str(caught.value)  # a library's own


def test_empty_split_error_names_the_split(tmp_path):
    train, empty = colored_split(12, 0), colored_split(0, 1)
    with pytest.raises(DataError, match="'test'") as caught:
        load_splits(save(tmp_path, train=train, test=empty))
    assert_names(caught.value, tmp_path)
    assert "Error" not in str(caught.value)  # a library's own


def test_missing_folders_and_empty_folders(tmp_path):
    with pytest.raises(DataError, match=r"^dataset_name: .*\./no/such/folder"):
        load_splits("./no/such/folder")
    with pytest.raises(DataError, match=r"^dataset_name:") as caught:
        load_splits(str(tmp_path))
    assert_names(caught.value, tmp_path)
    with pytest.raises(DataError) as caught:
        load_splits("digits", validation_split="validation")
    assert_names(caught.value, "'digits'", "'validation'", "train, test")


def test_bad_label_error_names_the_row(tmp_path):
    good = make_split([0, 1, 2] * 4)
    unlabelled = make_split([0, 1, -1, -1])
    with pytest.raises(DataError) as caught:
        load_splits(save(tmp_path / "a", train=good, test=unlabelled))
    assert_names(caught.value, "'test'", 2, -1, 3)
    one_class = make_split([1] * 12)
    with pytest.raises(DataError, match=r"^train_split: .*'train'"):
        load_splits(save(tmp_path / "b", train=one_class, test=good))
    unseen = make_split(["cat", "emu"], {"label": datasets.Value("string")})
    seen = make_split(["cat", "dog"] * 4, {"label": datasets.Value("string")})
    with pytest.raises(DataError) as caught:
        load_splits(save(tmp_path / "c", train=seen, test=unseen))
    assert_names(caught.value, "'test'", 1, "'emu'", 2)


@pytest.mark.parametrize(
    ("label_type", "values", "data"),
    [
        ("string", ["a", None, "b", "a"], ["'train'", 1]),
        ("int64", [0, 1, None, 1], ["'train'", 2]),
        ("float32", [0.1, 0.2, 0.3, 0.4], ["label_column", "'train'", "row 0", "0.1"]),
    ],
)
def test_load_splits_with_invalid_labels_names_split_and_row(tmp_path, label_type, values, data):
    split = make_split(values, {"label": datasets.Value(label_type)})
    with pytest.raises(DataError) as caught:
        load_splits(save(tmp_path, train=split, test=split), label_column="label")
    assert_names(caught.value, *data)


def test_column_without_labels_is_named(colors):
    with pytest.raises(DataError, match=r"^label_column: .*'img'.*'train'.*\bImage\b"):
        load_splits(str(colors), label_column="img")


def test_folds_cover_the_training_split_once_and_keep_the_test_images(tmp_path):
    folder = write_images(tmp_path / "photos", dict.fromkeys(LABELS, 20))
    plain = load_splits(str(folder))
    parts = [load_splits(str(folder), folds=3, fold=fold) for fold in range(3)]
    rows = [np.array(split["row"]) for split in (plain.test, *(part.validation for part in parts))]
    assert np.sort(np.concatenate(rows)).tolist() == list(range(60))
    for part in parts:
        assert list(part.test["row"]) == list(plain.test["row"])
        assert not set(part.train["row"]) & set(part.validation["row"])
        assert len(part.train) + len(part.validation) + len(part.test) == 60
        counts = np.bincount(part.validation["label"])
        assert counts.max() - counts.min() <= 1


def test_folds_leave_a_validation_split_unused(tmp_path):
    name = save(tmp_path, train=colored_split(30, 0), validation=colored_split(9, 1), test=colored_split(12, 2))
    splits = load_splits(name, folds=3, fold=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (20, 10, 12)
    other = load_splits(name, seed=1, folds=3, fold=0)
    assert list(other.validation["row"]) != list(splits.validation["row"])
    merged = load_splits(name, folds=3, fold=0, train_split="train+validation")
    assert (len(merged.train), len(merged.validation)) == (26, 13)


def test_folds_of_multi_label_data_are_stratified_and_disjoint(tmp_path):
    rng = np.random.default_rng(0)
    labels = [[bool(rng.random() < share) for share in (0.5, 0.3, 0.1)] for _ in range(90)]
    values = {"image": [colored_image(0, rng) for _ in labels]}
    values |= {name: [int(row[index]) for row in labels] for index, name in enumerate(LABELS)}
    name = save(tmp_path, train=datasets.Dataset.from_dict(values).cast_column("image", datasets.Image()))
    parts = [load_splits(name, label_column=LABELS, folds=3, fold=fold).validation for fold in range(3)]
    assert sorted(row for part in parts for row in part["row"]) == list(range(90))
    counts = np.array([np.array(part["label"][:]).sum(axis=0) for part in parts])
    assert (counts.max(axis=0) - counts.min(axis=0)).max() <= 2


def test_folds_of_too_few_images_are_an_error(tmp_path):
    name = save(tmp_path, train=make_split([0, 0, 1, 1, 2, 2]))
    with pytest.raises(DataError, match=r"^folds: "):
        load_splits(name, folds=3, fold=0)


@pytest.mark.parametrize("feature", [Value("string"), ClassLabel(names=["bar", "cafe\u0301"])])
def test_encode_labels_returns_names_in_nfc(feature):
    raw = {"train": [0, 1] if isinstance(feature, ClassLabel) else ["bar", "cafe\u0301"]}
    for class_names in (None, ["bar", "cafe\u0301"], ["bar", "caf\u00e9"]):
        labels, indices = encode_labels(feature, raw, {"train": "train"}, class_names)
        assert labels == ["bar", "caf\u00e9"]
        assert indices["train"].tolist() == [0, 1]


def test_as_in_training_keeps_the_mark_of_a_missing_label():
    own, train = ClassLabel(names=["b", "a"]), ClassLabel(names=["a", "b"])
    assert as_in_training([0, -1, 1], own, train, "test") == [1, -1, 0]


def test_encode_labels_of_numbers_in_another_order_takes_the_name_of_each():
    names = ["zero", "one", "two"]
    found = encode_labels(ClassLabel(names=["1", "0", "2"]), {"train": [0, 1, 2]}, {"train": "train"}, names)
    assert (found[0], found[1]["train"].tolist()) == (names, [1, 0, 2])


@pytest.mark.parametrize("label", [-1, 2])
def test_encode_labels_with_names_in_another_order_names_a_label_outside(label):
    with pytest.raises(DataError) as caught:
        encode_labels(ClassLabel(names=["a", "b"]), {"train": [0, 1, label]}, {"train": "train"}, ["b", "a"])
    assert_names(caught.value, "'train'", "row 2", label)


@pytest.mark.parametrize("forms", [("caf\u00e9", "cafe\u0301"), ("cafe\u0301", "caf\u00e9")])
def test_match_classes_ignores_the_unicode_form(forms):
    known, label = forms
    assert match_classes(np.array([0, 1]), ["bar", label], [known, "bar"], "test").tolist() == [1, 0]
