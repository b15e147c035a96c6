"""Inspection of data sets that were built with known faults."""

import shutil
import struct

import numpy as np
import pytest
from datasets import Dataset
from helpers.layouts import write_images, write_shard
from PIL import Image

from hfvit.data.inspect import inspect_data, open_data
from hfvit.data.inspection import Inspection
from hfvit.recipe.arguments import DataArguments


def inspected(path, **fields) -> Inspection:
    return inspect_data(open_data(DataArguments(dataset_name=str(path), **fields)), show_progress=False)


@pytest.fixture
def faulty(tmp_path):
    """Class folders with two leaked images, one image in two classes, a damaged, a uniform and a tiny image."""
    root = write_images(tmp_path / "set", {"train/cat": 40, "train/dog": 40, "val/cat": 5, "val/dog": 5, "test/cat": 5,
                                           "test/dog": 5})  # fmt: skip
    shutil.copy(root / "train/cat/0.png", root / "test/cat/same.png")
    with Image.open(root / "train/dog/1.png") as image:
        image.resize((40, 40), Image.Resampling.BICUBIC).save(root / "test/dog/larger.png")
    shutil.copy(root / "train/cat/2.png", root / "train/dog/also.png")
    (root / "train/cat/3.png").write_bytes((root / "train/cat/3.png").read_bytes()[:100])
    Image.new("L", (16, 16), 7).save(root / "train/dog/5.png")
    with Image.open(root / "train/dog/6.png") as image:
        image.crop((0, 0, 3, 16)).save(root / "train/dog/6.png")
    (root / "train/cat/notes.xyz").write_text("x")
    (root / "train/cat/.DS_Store").write_text("x")
    return root


def test_inspect_data_finds_problems(faulty):
    found = inspected(faulty)
    assert {role: split.images for role, split in found.splits.items()} == {"train": 81, "validation": 10, "test": 12}
    assert found.splits["train"].classes == {"cat": 40, "dog": 41}
    assert found.layout == "class folders in split folders"
    assert [image.file for image in found.unreadable] == ["train/cat/3.png"]
    assert [image.file for image in found.uniform] == ["train/dog/5.png"]
    assert [image.file for image in found.tiny] == ["train/dog/6.png"]
    assert found.left_out == {
        "hidden or system file": ["train/cat/.DS_Store"],
        "unknown type": ["train/cat/notes.xyz"],
    }
    groups = {tuple(image.file for image in group.images): group.kind for group in found.duplicates}
    assert groups == {
        ("train/cat/0.png", "test/cat/same.png"): "exact",
        ("train/dog/1.png", "test/dog/larger.png"): "near",
        ("train/cat/2.png", "train/dog/also.png"): "exact",
    }
    assert len(found.leaks) == 2
    assert [group.labels for group in found.conflicts] == [["cat", "dog"]]
    assert found.images.width == [3, 16, 40]
    assert found.images.modes == {"RGB": 101, "L": 1}
    assert any(line.startswith("Leakage: 2 of 12 test images") for line in found.warnings)


def test_inspect_data_of_empty_bytes_beside_a_path_reads_no_file(tmp_path):
    root = write_images(tmp_path / "outside", {"cat": 30, "dog": 30})
    files = sorted(root.rglob("*.png"))
    rows = [{"bytes": file.read_bytes(), "path": None} for file in files]
    rows[0] = {"bytes": b"", "path": str(files[0])}
    labels = [file.parent.name for file in files]
    (tmp_path / "set").mkdir()
    Dataset.from_dict({"image": rows, "label": labels}).to_parquet(tmp_path / "set" / "train.parquet")
    found = inspected(tmp_path / "set", on_bad_image="skip")
    assert found.images.modes == {"RGB": 59}


def test_inspection_round_trips_through_json(faulty):
    found = inspected(faulty)
    assert Inspection.from_json(found.to_json()) == found


def test_inspect_data_without_faults_has_no_warnings(tmp_path):
    found = inspected(write_images(tmp_path, {"cat": 400, "dog": 400}))
    assert found.warnings == []
    assert found.duplicates == []
    assert {role: split.held_out for role, split in found.splits.items()} == {
        "train": None, "validation": 0.1, "test": 0.1,
    }  # fmt: skip


def test_inspect_data_of_images_in_tables_names_rows(tmp_path):
    content = (write_images(tmp_path / "images", {"a": 1}) / "a/0.png").read_bytes()
    samples = [{"png": content, "cls": str(row % 2).encode()} for row in range(8)]
    write_shard(tmp_path / "shards/train-0.tar", samples)
    found = inspected(tmp_path / "shards")
    assert found.layout == "WebDataset, 1 shard"
    assert [group.kind for group in found.duplicates] == ["exact"]
    assert len(found.duplicates[0].images) == 8
    assert found.conflicts


@pytest.mark.parametrize(("bits", "warns"), [(12, True), (16, False)])
def test_inspect_data_of_16_bit_images_that_use_12_bits_warns(tmp_path, bits, warns):
    generator = np.random.default_rng(0)
    for number in range(40):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        pixels = generator.integers(0, 2**bits, (16, 16)).astype(np.uint16)
        Image.fromarray(pixels).save(tmp_path / "ab"[number % 2] / f"{number}.{['png', 'tif'][number // 2 % 2]}")
    assert any("12-bit" in line for line in inspected(tmp_path).warnings) == warns


def test_inspect_data_of_tiff_with_pages_counts_them(tmp_path):
    write_images(tmp_path, {"a": 20, "b": 20})
    pages = [Image.fromarray(np.random.default_rng(page).integers(0, 255, (16, 16), np.uint8)) for page in range(3)]
    pages[0].save(tmp_path / "a/many.tif", save_all=True, append_images=pages[1:])
    pages[1].save(tmp_path / "a/one.tif")
    found = inspected(tmp_path)
    assert not found.unreadable
    assert next(line for line in found.warnings if "pages" in line).startswith("1 TIFF file ")


def test_inspect_data_of_tiff_does_not_read_further_pages(tmp_path):
    write_images(tmp_path, {"a": 20, "b": 20})
    file = tmp_path / "a/broken.tif"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16), np.uint8)).save(file)
    content = bytearray(file.read_bytes())
    (start,) = struct.unpack_from("<L", content, 4)
    (entries,) = struct.unpack_from("<H", content, start)
    struct.pack_into("<L", content, start + 2 + 12 * entries, len(content) + 50)  # beyond the end
    file.write_bytes(content)
    found = inspected(tmp_path)
    assert not found.unreadable
    assert any("pages" in line for line in found.warnings)


def test_inspect_data_names_likely_typos(tmp_path):
    counts = {"Acer rubrum": 20, "Acer rubum": 2, "Acer rubrun": 6, "zone 11": 20, "zone 12": 2, "cat": 20, "cap": 2}
    counts |= {f"zone {letter}": 20 if letter < "c" else 2 for letter in "abcdefghijkl"}  # a series
    found = inspected(write_images(tmp_path, counts), validation_fraction=0.1, test_fraction=0.0)
    lines = [line for line in found.warnings if "typo" in line]
    assert [line.startswith("1 class name ") and "'Acer rubum'" in line for line in lines] == [True]


def test_inspect_data_counts_classes_without_images_and_imbalance(tmp_path):
    found = inspected(write_images(tmp_path, {"train/a": 40, "train/b": 2, "val/a": 3, "val/c": 1}))
    assert found.imbalance == 20
    for words in (("train: 1 of 3", "c"), ("validation: 1 of 3", "b"), ("fewer than 10", "b"), ("20 times",)):
        assert any(all(word in line for word in words) for line in found.warnings), words
