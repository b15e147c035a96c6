"""Class folders: splits, classes, links, and files that are left out."""

import itertools
import os
import shutil

import numpy as np
import pytest
from helpers.images import LABELS
from helpers.layouts import class_counts, image_bytes, paths, write_images
from helpers.messages import assert_logged, assert_names
from helpers.splits import load_splits

from hfvit.data.decode import find_images
from hfvit.data.folders import BROKEN_LINK, NOT_UTF8
from hfvit.data.splits import warn_about_sizes
from hfvit.errors import DataError, RecipeError

CLASSES = {"cat": 10, "dog": 20}


def split_counts(name, train, rest):
    """Folders of two classes in `train` and in the folder `name`."""
    return {f"train/{c}": n for c, n in train.items()} | {f"{name}/{c}": n for c, n in rest.items()}


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "Val"])
def test_load_splits_with_validation_folder_uses_it(tmp_path, name):
    write_images(tmp_path, split_counts(name, CLASSES, {"cat": 3, "dog": 4}))
    splits = load_splits(str(tmp_path))
    assert class_counts(splits) == {"train": CLASSES, "validation": {"cat": 3, "dog": 4}}
    assert splits.sources == {"train": "train", "validation": "validation"}
    assert len(load_splits(str(tmp_path), validation_split=name).validation) == 7


@pytest.mark.parametrize("folders", [("train", "val", "test"), ("train", "test"), ("train", "val"), ("train",)])
def test_load_splits_with_any_split_folders_uses_them(tmp_path, folders):
    for start, folder in enumerate(folders):
        write_images(tmp_path, {f"{folder}/{label}": n for label, n in CLASSES.items()}, start=100 * start)
    splits = load_splits(str(tmp_path), validation_fraction=0.2)
    counts = class_counts(splits)
    held_out = {"cat": 2, "dog": 4}
    assert counts["validation"] == (CLASSES if "val" in folders else held_out)
    assert counts["train"] == (CLASSES if "val" in folders else {"cat": 8, "dog": 16})
    assert counts.get("test") == (CLASSES if "test" in folders else None)


def test_load_splits_without_split_folders_holds_out_validation_and_test(tmp_path):
    write_images(tmp_path, {"cat": 20, "dog": 40})
    splits = load_splits(str(tmp_path), seed=3)
    assert class_counts(splits) == {
        "train": {"cat": 16, "dog": 32},
        "validation": {"cat": 2, "dog": 4},
        "test": {"cat": 2, "dog": 4},
    }
    parts = [set(paths(splits, role)) for role in ("train", "validation", "test")]
    assert len(set.union(*parts)) == 60
    assert splits.metadata["splits"]["test"] | {"fingerprint": ""} == {
        "source": "train, 0.1 held out", "rows": 6, "fingerprint": "", "held_out": 0.1,
    }  # fmt: skip
    again = load_splits(str(tmp_path), seed=3)
    assert [set(paths(again, role)) for role in ("train", "validation", "test")] == parts
    assert set(paths(load_splits(str(tmp_path), seed=4), "test")) != parts[2]


def test_load_splits_with_class_folders_holds_out_the_same_rows_without_evaluating_them(tmp_path):
    write_images(tmp_path, {"cat": 20, "dog": 40})
    splits = load_splits(str(tmp_path))
    kept = load_splits(str(tmp_path), test_split=None, test_fraction=0.1)
    assert kept.test is None
    assert paths(kept, "train") == paths(splits, "train")
    assert paths(kept, "validation") == paths(splits, "validation")
    everything = load_splits(str(tmp_path), test_split=None)
    assert (len(everything.train), len(everything.validation)) == (54, 6)
    assert paths(everything, "validation") == paths(splits, "validation")


@pytest.mark.parametrize("label", ["train", "test tube", "val"])
def test_load_splits_with_split_words_in_names_ignores_them(tmp_path, label):
    folders = {"train/cat": 6, f"train/{label}": 8, "test/cat": 3, f"test/{label}": 4}
    write_images(tmp_path, folders)
    (tmp_path / "train/cat/0.png").rename(tmp_path / "train/cat/test 0.png")
    splits = load_splits(str(tmp_path), validation_fraction=0.5)
    counts = class_counts(splits)
    assert {c: counts["train"][c] + counts["validation"][c] for c in splits.labels} == {"cat": 6, label: 8}
    assert counts["test"] == {"cat": 3, label: 4}


def test_load_splits_with_class_named_like_a_split_among_class_folders(tmp_path):
    write_images(tmp_path, {"bus": 10, "train": 20, "car": 10})
    splits = load_splits(str(tmp_path), test_split=None)
    assert splits.labels == ["bus", "car", "train"]
    assert len(splits.train) + len(splits.validation) == 40


@pytest.mark.parametrize(
    ("folders", "labels"),
    [
        ({"animals/cat": 10, "animals/dog": 10}, ["cat", "dog"]),  # one folder around all
        ({"train/animals/cat": 10, "train/animals/dog": 10}, ["cat", "dog"]),
        ({"train/pets/cat": 10, "train/birds/emu": 10}, ["cat", "emu"]),
        ({"train/cat": 10, "train/dog": 10, "train/dog/puppies": 5}, ["cat", "dog"]),
        ({"photos/train/cat": 10, "photos/train/dog": 10}, ["cat", "dog"]),
        ({"archive/photos/train/cat": 10, "archive/photos/train/dog": 10}, ["cat", "dog"]),
        ({"archive/photos/cat": 10, "archive/photos/dog": 10}, ["cat", "dog"]),
    ],
)
def test_load_splits_with_nested_folders_logs_the_classes(tmp_path, caplog, folders, labels):
    write_images(tmp_path, folders)
    with caplog.at_level("INFO", logger="hfvit"):
        splits = load_splits(str(tmp_path), test_split=None)
    assert splits.labels == labels
    assert len(splits.train) + len(splits.validation) == sum(folders.values())
    assert any("Classes and splits are" in m or "to class" in m or "is class" in m for m in caplog.messages)


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        ({"train": 10, "test": 10}, ["test, train", "train/CLASS/image.jpg"]),
        ({"": 10}, ["no class folders"]),
        ({"cat": 10, "dog": 10, "out/plots": 1}, ["cat/0.png", "out/plots/0.png"]),
        ({"train/cat/a": 5, "train/dog/a": 5}, ["cat/a", "dog/a"]),
        ({"train/cat": 5, "train/dog": 5, "extra/cat": 9}, ["9 not in a split folder", "extra/cat/0.png"]),
        ({"train/cat": 5, "train/dog": 5, "val/cat": 2, "dev/cat": 2}, ["dev and val"]),
    ],
)
def test_load_splits_with_ambiguous_folders_names_them(tmp_path, folders, names):
    write_images(tmp_path, folders)
    with pytest.raises(DataError, match=r"^dataset_name:") as caught:
        load_splits(str(tmp_path))
    assert_names(caught.value, *names)


def test_load_splits_uses_split_folders_named_in_the_recipe(tmp_path):
    write_images(tmp_path, {"train/cat": 10, "train/dog": 10, "night/cat": 4, "night/dog": 4})
    splits = load_splits(str(tmp_path), test_split="night")
    assert class_counts(splits)["test"] == {"cat": 4, "dog": 4}


def test_load_splits_follows_links_and_ends_at_loops(tmp_path):
    write_images(tmp_path / "nas", {"cats": 10, "dogs": 20})
    root = tmp_path / "set"
    (root / "train").mkdir(parents=True)
    (root / "train/cat").symlink_to(tmp_path / "nas/cats")
    (root / "train/dog").symlink_to(tmp_path / "nas/dogs")
    (tmp_path / "nas/dogs/back").symlink_to(root)
    splits = load_splits(str(root), validation_fraction=0.2)
    assert class_counts(splits) == {"train": {"cat": 8, "dog": 16}, "validation": {"cat": 2, "dog": 4}}


def test_load_splits_with_one_file_in_two_splits_names_it(tmp_path):
    write_images(tmp_path, {"train/cat": 5, "train/dog": 5, "test/cat": 2})
    os.link(tmp_path / "train/dog/3.png", tmp_path / "test/cat/copy.png")
    with pytest.raises(DataError, match=r"^dataset_name: 1 files") as caught:
        load_splits(str(tmp_path))
    assert_names(caught.value, "train/dog/3.png", "test/cat/copy.png")


def test_load_splits_with_links_to_one_file_holds_them_out_together(tmp_path, caplog):
    write_images(tmp_path, {"cat": 20, "dog": 20})
    for number in range(20):
        os.link(tmp_path / f"cat/{number}.png", tmp_path / f"cat/again-{number}.png")
    splits = load_splits(str(tmp_path), validation_fraction=0.2, test_fraction=0.2)
    files = {role: {os.stat(path).st_ino for path in paths(splits, role)} for role in splits.sources}
    assert {role: len(splits[role]) for role in files} == {"train": 36, "validation": 12, "test": 12}
    assert len(set.union(*files.values())) == sum(map(len, files.values())) == 40
    assert_logged(caplog, "WARNING", "train", 20, 60, tmp_path / "cat/again-0.png")


def test_load_splits_where_all_files_have_inode_0_reads_them(tmp_path, monkeypatch):
    class Entry:
        def __init__(self, entry):
            self.entry = entry

        def __getattr__(self, name):
            return getattr(self.entry, name)

        def stat(self):
            status = self.entry.stat()
            return os.stat_result((status.st_mode, 0, 0, 0, 0, 0, status.st_size, 0, status.st_mtime, 0))

    class Windows:
        def __getattr__(self, name):
            return getattr(os, name)

        def scandir(self, folder):
            return map(Entry, os.scandir(folder))

    monkeypatch.setattr("hfvit.data.folders.os", Windows())
    write_images(tmp_path, {"train/cat": 5, "train/dog": 5, "val/cat": 2, "val/dog": 2})
    assert class_counts(load_splits(str(tmp_path)))["train"] == {"cat": 5, "dog": 5}


def test_load_splits_with_a_link_to_itself_leaves_it_out(tmp_path):
    write_images(tmp_path, {"cat": 20, "dog": 20})
    (tmp_path / "cat/loop").symlink_to("loop")
    assert load_splits(str(tmp_path)).metadata["left_out"] == {BROKEN_LINK: 1}


def test_load_splits_counts_and_names_omitted_files(tmp_path, caplog):
    write_images(tmp_path, {"train/cat": 40, "train/dog": 40, "val/cat": 40, "val/dog": 40})
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "train/cat/.DS_Store").write_bytes(b"x")
    (tmp_path / "train/cat/._0.png").write_bytes(b"x")
    (tmp_path / "train/dog/Thumbs.db").write_bytes(b"x")
    (tmp_path / "train/dog/empty.png").touch()
    (tmp_path / "val/dog/notes.txt").write_text("x")
    (tmp_path / "val/dog/gone.png").symlink_to(tmp_path / "nowhere")
    with caplog.at_level("INFO", logger="hfvit"):
        splits = load_splits(str(tmp_path))
    line = next(message for message in caplog.messages if "Left out" in message)
    assert_names(line, "Left out 7 files", "3 hidden", "train/dog/empty.png", "notes.txt", "gone.png", "README.md")
    assert splits.metadata["left_out"] == {
        "hidden or system file": 3, "empty file": 1, "unknown type": 1, "broken link": 1,
    }  # fmt: skip
    assert sum(map(len, (splits.train, splits.validation))) == 160


def test_load_splits_with_many_files_left_out_names_their_type(tmp_path):
    write_images(tmp_path, {"train/cat": 20, "train/dog": 20})
    for number in range(5):
        (tmp_path / f"train/emu{number}.xyz").write_text("x")
        (tmp_path / "train/emu").mkdir(exist_ok=True)
        (tmp_path / f"train/emu/{number}.raw2").write_text("x")
    with pytest.raises(DataError, match=r"^dataset_name: 5 of 45 files") as caught:
        load_splits(str(tmp_path))
    assert_names(caught.value, "train/emu/0.raw2", "unknown type")


def test_load_splits_with_a_pipe_raises_data_error(tmp_path):
    write_images(tmp_path, {"cat": 10, "dog": 10})
    os.mkfifo(tmp_path / "cat/pipe.png")
    with pytest.raises(DataError, match=r"^dataset_name: .*cat/pipe.png"):
        load_splits(str(tmp_path))


@pytest.mark.parametrize("extension", ["JPG", "jpeg", "jfif", "Png", "webp", "avif", "bmp", "gif", "TIFF"])
def test_load_splits_reads_extensions_in_any_case(tmp_path, extension):
    kind = {"jpg": "JPEG", "jfif": "JPEG"}.get(extension.lower(), extension.upper())
    for label, number in itertools.product(("a", "b"), range(10)):
        (tmp_path / label).mkdir(exist_ok=True)
        (tmp_path / label / f"{number}.{extension}").write_bytes(image_bytes(number, kind))
    assert len(load_splits(str(tmp_path), test_split=None).train) == 18


def test_load_splits_normalizes_unicode_class_names(tmp_path):
    write_images(tmp_path, {"train/caf\u00e9": 5, "train/bar": 5, "test/cafe\u0301": 3, "test/bar": 3})
    splits = load_splits(str(tmp_path), validation_fraction=0.2)
    assert class_counts(splits)["test"] == {"bar": 3, "caf\u00e9": 3}


LATIN_1 = os.fsdecode(b"caf\xe9")  # as unpacked from an old zip file


def test_load_splits_leaves_out_files_whose_name_is_not_utf8(tmp_path):
    write_images(tmp_path, {"a": 20, "b": 20})
    (tmp_path / "a/3.png").rename(tmp_path / f"a/{LATIN_1}.png")
    splits = load_splits(str(tmp_path))
    assert splits.metadata["left_out"] == {NOT_UTF8: 1}
    assert sum(len(splits[role]) for role in splits.metadata["splits"]) == 39
    for number in range(4, 8):
        (tmp_path / f"a/{number}.png").rename(tmp_path / f"a/{LATIN_1}-{number}.png")
    with pytest.raises(DataError, match=r"^dataset_name: .*a/caf\\xe9"):
        load_splits(str(tmp_path))


@pytest.mark.parametrize("parent", [".", "train", LATIN_1])
def test_load_splits_with_a_folder_whose_name_is_not_utf8_names_it(tmp_path, parent):
    write_images(tmp_path, {f"{parent}/{LATIN_1}": 10, f"{parent}/b": 10})
    for name in (tmp_path, tmp_path / parent):
        with pytest.raises(DataError, match=r"^dataset_name: .*caf\\xe9"):
            load_splits(str(name))


def test_load_splits_of_a_table_whose_name_is_not_utf8_names_it(tmp_path):
    (tmp_path / f"{LATIN_1}.csv").write_text("image,label\na.png,1\n")
    with pytest.raises(DataError, match=r"^dataset_name: .*caf\\xe9"):
        load_splits(str(tmp_path / f"{LATIN_1}.csv"))


def test_load_splits_of_a_copy_with_another_file_has_another_fingerprint(tmp_path):
    write_images(tmp_path / "a", {"cat": 10, "dog": 10})

    def fingerprint():
        return load_splits(str(tmp_path / "a")).train._fingerprint

    before = fingerprint()
    assert fingerprint() == before
    (tmp_path / "a/cat/0.png").write_bytes(image_bytes(77))
    assert fingerprint() != before


def test_find_images_in_folder_follows_links_and_ends_at_loops(tmp_path):
    write_images(tmp_path / "nas", {"cats": 2})
    root = tmp_path / "set"
    root.mkdir()
    (root / "cats").symlink_to(tmp_path / "nas/cats")
    (tmp_path / "nas/cats/back").symlink_to(root)
    assert find_images([str(root)]) == ([str(root / "cats/0.png"), str(root / "cats/1.png")], [])


def test_find_images_in_folder_leaves_out_hidden_files(tmp_path):
    write_images(tmp_path, {"a": 3, "__MACOSX/a": 1, ".cache": 1})
    (tmp_path / "a/._0.png").write_bytes(b"x")
    found, wrong = find_images([str(tmp_path)])
    assert (found, wrong) == ([str(tmp_path / f"a/{number}.png") for number in range(3)], [])


# ---- Roles ----


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ({"validation_split": "train"}, "validation_split"),
        ({"validation_split": "val", "test_split": "val"}, "test_split"),
        ({"test_split": "train"}, "test_split"),
    ],
)
def test_load_splits_with_one_split_in_two_roles_names_the_option(tmp_path, arguments, option):
    write_images(tmp_path, split_counts("val", CLASSES, CLASSES))
    with pytest.raises(RecipeError, match=rf"^{option}:"):
        load_splits(str(tmp_path), **arguments)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ({"validation_split": "train[:10%]"}, "validation_split"),
        ({"train_split": "train[:90%]", "validation_split": "train[80%:]"}, "validation_split"),
        ({"validation_split": "val", "test_split": "dev[:2]"}, "test_split"),
    ],
)
def test_load_splits_with_slices_that_overlap_counts_the_images(tmp_path, arguments, option):
    write_images(tmp_path, split_counts("val", CLASSES, CLASSES))
    with pytest.raises(DataError, match=rf"^{option}: .*\b[23]\b"):
        load_splits(str(tmp_path), **arguments)


def test_load_splits_with_slices_that_overlap_beside_a_split_with_a_dash_counts_the_images(tmp_path):
    write_images(tmp_path, {f"{split}/{label}": 10 for split in ("train", "night-shots") for label in CLASSES})
    with pytest.raises(DataError, match=r"^validation_split: .*\b2\b"):
        load_splits(str(tmp_path), train_split="train[:90%]", validation_split="train[80%:]", test_split="night-shots")


def test_load_splits_with_test_as_validation_split_has_no_test_split(tmp_path, caplog):
    write_images(tmp_path, split_counts("test", CLASSES, CLASSES))
    splits = load_splits(str(tmp_path), validation_split="test")
    assert splits.test is None
    assert any("test: none" in message for message in caplog.messages)


def test_load_splits_warns_of_small_classes_and_few_validation_images(tmp_path, caplog):
    folders = {"train/cat": 9, "train/dog": 9, "train/emu": 1, "val/cat": 2, "val/yak": 2}
    splits = load_splits(str(write_images(tmp_path, folders)))
    assert splits.labels == ["cat", "dog", "emu", "yak"]
    warn_about_sizes(splits)
    for words in (("train", "no images", "yak"), ("train", "one image", "emu"), ("validation", "4 images"),
                  ("validation", "dog, emu")):  # fmt: skip
        assert any(all(word in message for word in words) for message in caplog.messages), words


def test_load_splits_warns_of_names_that_differ_in_case_or_spaces(tmp_path, caplog):
    splits = load_splits(str(write_images(tmp_path / "a", dict.fromkeys(("a", "A", "blue jay", "owl"), 4))))
    warn_about_sizes(splits)
    assert not [message for message in caplog.messages if "spaces" in message]
    splits = load_splits(str(write_images(tmp_path / "b", dict.fromkeys(("Blue Jay", "blue jay", "owl"), 4))))
    warn_about_sizes(splits)
    assert any("'Blue Jay'" in message and "'blue jay'" in message for message in caplog.messages)


def test_load_splits_with_one_image_per_class_names_the_option(tmp_path):
    write_images(tmp_path, dict.fromkeys("abcdef", 1))
    with pytest.raises(DataError, match=r"^validation_fraction:"):
        load_splits(str(tmp_path))


@pytest.mark.parametrize("count", [2, 3, 8])
def test_load_splits_of_few_images_holds_some_of_each_class_out(tmp_path, count):
    write_images(tmp_path, {**dict.fromkeys("abcde", count), "single": 1})
    splits = load_splits(str(tmp_path), test_split=None)
    counts = class_counts(splits)
    assert counts["validation"] == {**dict.fromkeys("abcde", 1), "single": 0}
    assert counts["train"] == {**dict.fromkeys("abcde", count - 1), "single": 1}
    validation = {tuple(paths(load_splits(str(tmp_path), seed, test_split=None), "validation")) for seed in (1, 1, 2)}
    assert len(validation) == 2


@pytest.mark.parametrize("fraction", [0.1, 0.7])
def test_load_splits_holds_out_and_keeps_an_image_of_each_class(tmp_path, fraction):
    write_images(tmp_path, {**dict.fromkeys("abcde", 2), "large": 80})
    counts = class_counts(load_splits(str(tmp_path), validation_fraction=fraction, test_split=None))
    assert {counts[role][label] for role in counts for label in "abcde"} == {1}
    assert abs(counts["validation"]["large"] - 80 * fraction) <= 2


# ---- Images that cannot be decoded ----


def test_load_splits_skipping_bad_images_counts_and_names_them(tmp_path, caplog):
    write_images(tmp_path, {"train/cat": 20, "train/dog": 20, "val/cat": 20, "val/dog": 20})
    file = tmp_path / "train/cat/3.png"
    file.write_bytes(file.read_bytes()[:200])
    splits = load_splits(str(tmp_path), on_bad_image="skip")
    assert class_counts(splits)["train"] == {"cat": 19, "dog": 20}
    assert splits.metadata["splits"]["train"]["left_out"] == {"damaged image": 1}
    assert any("3.png" in message for message in caplog.messages)


def test_image_datasets_after_skipped_images_pairs_images_and_labels(tmp_path):
    from helpers.layouts import write_images as write
    from timm.data import resolve_data_config

    from hfvit.data.dataset import image_datasets
    from hfvit.transforms.augmentation import Augmentation

    for number, label in enumerate(LABELS):
        write(tmp_path, {f"train/{label}": 1}, start=number)
        for copy in range(1, 12):
            (tmp_path / f"train/{label}/{copy}.png").write_bytes(image_bytes(number + 3 * copy))
    (tmp_path / "train" / LABELS[0] / "5.png").write_bytes(b"no image")
    splits = load_splits(str(tmp_path), on_bad_image="skip", validation_fraction=0.2)
    config = resolve_data_config({"input_size": (3, 16, 16), "crop_pct": 1.0})
    augmentation = Augmentation(image_size=(16, 16), mean=[0.5] * 3, std=[0.5] * 3)
    for role, dataset in image_datasets(splits, config, augmentation, show_progress=False).items():
        if role == "train":
            continue
        batch = dataset.__getitems__(list(range(len(dataset))))
        names = [splits.labels[label] for label in batch["labels"]]
        brightest = batch["images"].float().mean(dim=(1, 2)).argmax(dim=1)
        assert names == [LABELS[channel] for channel in brightest]


def test_load_splits_without_a_folder_of_that_name_suggests_one(tmp_path, monkeypatch):
    write_images(tmp_path / "hym", {"a": 5, "b": 5})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"Did you mean 'hym'"):
        load_splits("hymm")


def test_load_splits_of_a_moved_folder_has_the_same_rows(tmp_path):
    write_images(tmp_path / "a", {"cat": 20, "dog": 20})
    before = load_splits(str(tmp_path / "a"))
    shutil.move(tmp_path / "a", tmp_path / "b")
    after = load_splits(str(tmp_path / "b"))
    assert np.array_equal(before.test["row"], after.test["row"])
