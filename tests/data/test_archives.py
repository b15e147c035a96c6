"""Zip and tar archives of class folders, and WebDataset shards."""

import bz2
import gzip
import io
import json
import lzma
import os
import stat
import struct
import tarfile
import tracemalloc
import zipfile

import pytest
from helpers.layouts import archive_folder, class_counts, image_bytes, paths, write_images, write_shard
from helpers.messages import assert_names
from helpers.splits import load_splits, stream_splits

from hfvit.data.archives import list_archive, read_members
from hfvit.data.decode import decode
from hfvit.data.folders import LeftOut, find_files
from hfvit.errors import DataError


@pytest.mark.parametrize("extension", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("wrapper", ["", "photos/"])
def test_load_splits_of_one_archive_with_split_folders(tmp_path, extension, wrapper):
    folders = {f"{s}/{c}": n for s, n in (("train", 10), ("val", 3), ("test", 4)) for c in ("cat", "dog")}
    source = write_images(tmp_path / "source", {wrapper + name: count for name, count in folders.items()})
    archive = archive_folder(source, tmp_path / f"photos.{extension}")
    splits = load_splits(str(archive))
    expected = {role: {"cat": n, "dog": n} for role, n in (("train", 10), ("validation", 3), ("test", 4))}
    assert class_counts(splits) == expected
    for role in expected:
        for image in splits[role]["image"]:
            name = image["path"].removeprefix(f"{archive}/")
            assert image["bytes"] == (source / name).read_bytes()


@pytest.mark.parametrize("extension", ["zip", "tar"])
def test_load_splits_of_one_archive_per_split(tmp_path, extension):
    write_images(tmp_path / "source", {"train/cat": 10, "train/dog": 10, "test/cat": 4, "test/dog": 4})
    for split in ("train", "test"):
        archive_folder(tmp_path / "source" / split, tmp_path / "set" / f"{split}.{extension}")
    splits = load_splits(str(tmp_path / "set"), validation_fraction=0.2)
    counts = {"train": {"cat": 8, "dog": 8}, "validation": {"cat": 2, "dog": 2}, "test": {"cat": 4, "dog": 4}}
    assert class_counts(splits) == counts


def test_load_splits_of_an_archive_without_splits_holds_out(tmp_path):
    archive = archive_folder(write_images(tmp_path / "s", {"cat": 20, "dog": 20}), tmp_path / "set.zip")
    splits = load_splits(str(archive))
    assert {role: sum(c.values()) for role, c in class_counts(splits).items()} == {
        "train": 32, "validation": 4, "test": 4,
    }  # fmt: skip
    parts = [set(paths(splits, role)) for role in ("train", "validation", "test")]
    assert len(set.union(*parts)) == 40


def test_load_splits_of_an_archive_counts_hidden_members(tmp_path, caplog):
    source = write_images(tmp_path / "s", {"cat": 20, "dog": 20, "__MACOSX/cat": 5})
    with caplog.at_level("INFO", logger="hfvit"):
        load_splits(str(archive_folder(source, tmp_path / "set.zip")))
    assert any("Left out 5 files" in message for message in caplog.messages)


def write_odd_archive(path):
    """Write an archive with an image, two with names outside it, and links."""
    images = ("cat/1.png", "../cat/2.png", "/cat/3.png")
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for number, name in enumerate(images):
                archive.writestr(name, image_bytes(number))
            link = zipfile.ZipInfo("cat/link.png")
            link.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(link, "1.png")
        return
    with tarfile.open(path, "w") as archive:
        for number, name in enumerate(images):
            info = tarfile.TarInfo(name)
            info.size = len(image_bytes(number))
            archive.addfile(info, io.BytesIO(image_bytes(number)))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            link = tarfile.TarInfo(f"cat/link{kind.decode()}.png")
            link.type, link.linkname = kind, "cat/1.png"
            archive.addfile(link)


@pytest.mark.parametrize("extension", ["zip", "tar"])
def test_list_archive_has_no_links_and_no_names_outside(tmp_path, extension):
    path = tmp_path / f"set.{extension}"
    write_odd_archive(path)
    assert [member.name for member in read_members(str(path)) if member.name.startswith("cat/")] == ["cat/1.png"]
    [archive] = find_files(tmp_path, LeftOut())[0]
    left_out = LeftOut()
    assert [file.path for file in list_archive(archive, left_out)] == ["cat/1.png"]
    assert sum(left_out.counts().values()) == 2


@pytest.mark.parametrize("extension", ["zip", "tar", "tar.gz"])
def test_load_splits_of_a_damaged_archive_names_it(tmp_path, extension):
    archive = archive_folder(write_images(tmp_path / "s", {"cat": 9, "dog": 9}), tmp_path / f"set.{extension}")
    archive.write_bytes(archive.read_bytes()[:700])
    with pytest.raises(DataError, match=r"^dataset_name: .*set\."):
        load_splits(str(archive))


def test_load_splits_of_a_zip_member_that_is_larger_than_announced_takes_little_memory(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
            archive.writestr(name, bytes(30 * 2**20))
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\1\2")
    while entry >= 0:
        content[entry + 24 : entry + 28] = struct.pack("<I", 100)  # size of the member
        entry = content.find(b"PK\1\2", entry + 4)
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"^dataset_name: .*set\.zip"):
        load_splits(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_load_splits_of_a_zip_whose_members_have_no_limit_names_one(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "set.zip", "w", method) as archive:
        for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
            archive.writestr(name, image_bytes())
    with pytest.raises(DataError, match=r"^dataset_name: .*set\.zip.*a/1\.png"):
        load_splits(str(tmp_path / "set.zip"))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_load_splits_of_a_tar_with_a_large_header_refuses_it_unread(tmp_path, kind):
    header = tarfile.TarInfo("x")
    header.type = kind
    header.size = 2**30
    (tmp_path / "set.tar").write_bytes(header.tobuf(tarfile.USTAR_FORMAT))
    with pytest.raises(DataError, match=r"^dataset_name: .*set\.tar.*1,073,741,824"):
        load_splits(str(tmp_path / "set.tar"))


@pytest.mark.parametrize("damage", ["header", "end"])
def test_load_splits_of_a_tar_with_a_damaged_header_is_an_error(tmp_path, damage):
    """`tarfile` would leave out the rest of the archive."""
    names = [f"{label}/{number}.png" for label in "ab" for number in range(4)]
    starts = []
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(image_bytes())
            starts.append(archive.offset)
            archive.addfile(info, io.BytesIO(image_bytes()))
    content = bytearray((tmp_path / "set.tar").read_bytes())
    if damage == "header":
        content[starts[6]] ^= 1
    else:
        del content[starts[6] + 100 :]
    (tmp_path / "set.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"^dataset_name: .*set\.tar"):
        load_splits(str(tmp_path / "set.tar"))


@pytest.mark.parametrize("extension", ["tar", "tar.gz"])
@pytest.mark.parametrize("damage", ["cut", "joined"])
def test_load_splits_of_a_tar_that_is_cut_between_members_or_joined_is_reported(tmp_path, caplog, extension, damage):
    """`tarfile` and GNU tar take it for complete."""
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for name in (f"{label}/{number}.png" for label in "ab" for number in range(9)):
            info = tarfile.TarInfo(name)
            info.size = len(image_bytes())
            archive.addfile(info, io.BytesIO(image_bytes()))
            end = archive.offset
    load_splits(str(tmp_path / "set.tar"))
    assert not [record for record in caplog.records if record.name == "hfvit.data.archives"]
    content = (tmp_path / "set.tar").read_bytes()
    content = content[:end] if damage == "cut" else content * 2
    file = tmp_path / f"damaged.{extension}"
    file.write_bytes(gzip.compress(content) if extension == "tar.gz" else content)
    load_splits(str(file))
    messages = [record.getMessage() for record in caplog.records if record.name == "hfvit.data.archives"]
    assert len([message for message in messages if file.name in message]) == len(messages) == 1


@pytest.mark.parametrize("rest", [b"", b"\0" * 512, b"other"])
@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress, gzip.compress])
def test_load_splits_of_a_compressed_tar_with_more_behind_it_reads_it(tmp_path, compress, rest):
    archive = archive_folder(write_images(tmp_path / "source", {"a": 9, "b": 9}), tmp_path / "set.tar")
    content = archive.read_bytes()
    archive.write_bytes(compress(content) + (rest or compress(content)))
    splits = load_splits(str(archive))
    assert len(splits.whole["train"]) == 18


LABELS = {
    "cls": lambda n: {"cls": str(n % 3).encode()},
    "names": lambda n: {"cls": ("cow", "ant", "bee")[n % 3].encode()},
    "json": lambda n: {"json": json.dumps({"label": n % 3, "other": 1}).encode()},
    "json name": lambda n: {"json": json.dumps({"species": ("cow", "ant", "bee")[n % 3]}).encode()},
}


def write_shards(folder, label, shards=3, rows=10):
    for split, first in (("train", 0), ("val", 500)):
        for shard in range(shards):
            numbers = range(first + shard * rows, first + (shard + 1) * rows)
            samples = [{"png": image_bytes(n), **LABELS[label](n)} for n in numbers]
            write_shard(folder / f"{split}-{shard:04d}.tar", samples)
    return str(folder)


@pytest.mark.parametrize("label", ["cls", "names", "json"])
def test_load_splits_of_webdataset_shards(tmp_path, label):
    splits = load_splits(write_shards(tmp_path, label))
    names = ["ant", "bee", "cow"] if label == "names" else ["0", "1", "2"]
    assert splits.labels == names
    assert {role: sum(c.values()) for role, c in class_counts(splits).items()} == {"train": 30, "validation": 30}
    for row, (image, index) in enumerate(zip(splits.train["image"], splits.train["label"], strict=True)):
        assert image["bytes"] == image_bytes(row)
        assert names[index] == (("cow", "ant", "bee")[row % 3] if label == "names" else str(row % 3))
    decode(splits.train[0]["image"], "train", 0)


def test_load_splits_of_webdataset_shards_takes_class_names(tmp_path):
    splits = load_splits(write_shards(tmp_path, "cls"), class_names=["zebra", "ant", "cow"])
    assert splits.labels == ["zebra", "ant", "cow"]
    assert splits.train["label"][:6] == [0, 1, 2, 0, 1, 2]


def test_load_splits_of_webdataset_shards_with_label_key(tmp_path):
    with pytest.raises(DataError, match=r"^label_column: .*species"):
        load_splits(write_shards(tmp_path, "json name"))
    splits = load_splits(write_shards(tmp_path, "json name"), label_column="species")
    assert splits.labels == ["ant", "bee", "cow"]


@pytest.mark.parametrize(("label_column", "names"), [(None, ["0", "1", "2"]), ("species", ["ant", "bee", "cow"])])
def test_load_splits_of_webdataset_with_cls_and_json_takes_the_named_key_or_cls(tmp_path, label_column, names):
    """The ImageNet shards of timm have both."""
    species = ["bee", "ant", "cow"]
    samples = [
        {"png": image_bytes(n), "cls": b"%d" % (n % 3), "json": json.dumps({"species": species[n % 3]}).encode()}
        for n in range(30)
    ]
    write_shard(tmp_path / "train-0.tar", samples)
    splits = load_splits(str(tmp_path), label_column=label_column)
    assert splits.labels == names
    expected = [names.index(species[row % 3]) if label_column else row % 3 for row in range(30)]
    assert splits.whole["train"]["label"][:] == expected


def test_stream_splits_of_webdataset_shards_has_as_many_shards(tmp_path):
    splits = stream_splits(write_shards(tmp_path, "cls"), "val", class_names=["zebra", "ant", "cow"], test_split=None)
    assert splits.train.num_shards == 3
    assert [row["image"]["bytes"] for row in splits.train] == [image_bytes(n) for n in range(30)]
    assert [row["label"] for row in splits.train] == [n % 3 for n in range(30)]


def test_load_splits_of_webdataset_with_a_sample_without_label_names_it(tmp_path):
    write_shard(tmp_path / "train.tar", [{"png": image_bytes(n), "cls": b"1"} for n in range(5)] + [{"png": b"x"}])
    with pytest.raises(DataError, match=r"^dataset_name:") as caught:
        load_splits(str(tmp_path))
    assert_names(caught.value, "00005", "label")


@pytest.mark.parametrize("content", [b"{", b"[" * 200_000], ids=["syntax", "depth"])
def test_load_splits_of_webdataset_with_bad_json_names_the_member(tmp_path, content):
    samples = [{"png": image_bytes(n), "json": b'{"label": 1}'} for n in range(3)]
    write_shard(tmp_path / "train-0.tar", [*samples, {"png": image_bytes(), "json": content}])
    with pytest.raises(DataError, match=r"^dataset_name: .*00003\.json"):
        load_splits(str(tmp_path), class_names=["a", "b"])


@pytest.mark.parametrize("name", ["a/caf\udce9.png", "caf\udce9/1.png"])
def test_load_splits_of_a_tar_with_a_name_that_is_not_utf8_names_it(tmp_path, name):
    write_images(tmp_path / "photos", {"a": 5, "b": 5})
    (tmp_path / "photos" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "photos" / name).write_bytes(image_bytes())
    archive = archive_folder(tmp_path / "photos", tmp_path / "photos.tar")
    with pytest.raises(DataError, match=r"^dataset_name: .*caf\\xe9"):
        load_splits(str(archive))


def test_load_splits_of_a_shard_with_a_name_that_is_not_utf8_names_it(tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as shard:
        for name, content in (("1.png", image_bytes()), ("1.cls", b"0"), ("caf\udce9.png", image_bytes())):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    with pytest.raises(DataError, match=r"^dataset_name: .*caf\\xe9"):
        load_splits(str(tmp_path), class_names=["a", "b"])


@pytest.mark.parametrize("layout", ["classes", "shards"])
def test_load_splits_of_archives_in_two_folders_with_the_same_relative_name(tmp_path, monkeypatch, layout):
    fingerprints = set()
    for project in (1, 2):
        folder = tmp_path / str(project)
        images = [image_bytes(n * project, "BMP") for n in range(20)]
        if layout == "shards":
            write_shard(
                folder / "data/train.tar", [{"bmp": data, "cls": b"%d" % (n % 2)} for n, data in enumerate(images)]
            )
        else:
            for number, data in enumerate(images):
                (folder / "photos" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
                (folder / "photos" / "ab"[number % 2] / f"{number}.bmp").write_bytes(data)
            archive_folder(folder / "photos", folder / "data/train.zip")
        for file in (folder / "data").iterdir():
            os.utime(file, (10**9, 10**9))
        monkeypatch.chdir(folder)
        splits = load_splits("data", class_names=["a", "b"] if layout == "shards" else None)
        found = {image["bytes"] for role in splits.metadata["splits"] for image in splits[role]["image"]}
        assert found == set(images)
        fingerprints.add(splits.train._fingerprint)
    assert len(fingerprints) == 1  # as of a project that was moved
