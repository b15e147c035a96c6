"""Formats and limits of image files."""

import importlib
import io
import os
import struct
import sys
import time
import types
import zlib

import datasets
import numpy as np
import pytest
from helpers.images import colored_image, colored_split
from helpers.messages import assert_names
from helpers.recipes import MICRO_RECIPE
from helpers.splits import load_splits, stream_splits
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, features

import hfvit.data.open_image
from hfvit.cli import main
from hfvit.data.decode import decode, find_images, image_size, read_bytes, read_image
from hfvit.data.open_image import (
    FORMATS,
    UPLOAD_LIMITS,
    ImageLimitError,
    ImageLimits,
    UnsupportedTiffError,
    formats,
    open_image,
)
from hfvit.errors import DataError

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
# Formats that Pillow opens with another program, with a library of its user's, or from text.
HOSTILE = {
    "EPS": POSTSCRIPT,
    "EPS in a DOS file": struct.pack("<III", 0xC6D3D0C5, 32, len(POSTSCRIPT)) + bytes(20) + POSTSCRIPT,
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<hhhhHIH", 0, 0, 99, 99, 99, 0, 0) + b"\1\0\t\0" + bytes(99),
    "FITS": b"SIMPLE  =                    T".ljust(2880) + bytes(2880),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "GRIB": b"GRIB\0\0\0\1" + bytes(100),
    "BUFR": b"BUFR" + bytes(100),
    "PDF": b"%PDF-1.4\n%%EOF\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/hostname"/></svg>',
    "XPM": b'/* XPM */\nstatic char *x[] = {\n"1 1 1 1",\n"a c #ffffff",\n"a",\n};\n',
    "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(300),
}  # fmt: skip


def content_of(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """Path of a file that a fake program `gs` creates when it is started."""
    started = tmp_path / "started"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return started


def test_pillow_alone_starts_ghostscript(ghostscript):
    with Image.open(io.BytesIO(POSTSCRIPT)) as image, pytest.raises(OSError):  # noqa: PT011 (of any kind)
        image.load()
    assert ghostscript.exists()


@pytest.mark.parametrize("name", HOSTILE)
def test_other_formats_raise_whatever_the_file_name(name, ghostscript, tmp_path):
    file = tmp_path / "photo.png"
    file.write_bytes(HOSTILE[name])
    for encoded in ({"bytes": HOSTILE[name], "path": None}, {"bytes": None, "path": str(file)}):
        for read in (decode, image_size):
            with pytest.raises(DataError) as caught:
                read(encoded, "train", 7)
            assert_names(caught.value, "'train'", 7, "JPEG, PNG")
    for read in (lambda: read_image(file), lambda: read_bytes(HOSTILE[name], "upload")):
        with pytest.raises(DataError, match="JPEG, PNG"):
            read()
    assert not ghostscript.exists()


def postscript_rows(folder, damage) -> str:
    """Save a data set after a change of its rows."""
    split = colored_split(12, 0)
    rows = split.cast_column("img", datasets.Image(decode=False)).to_list()
    types_of = dict(split.features)
    damage(rows, types_of)
    for part in ("train", "validation", "test"):
        table = datasets.Dataset.from_list(rows, features=datasets.Features(types_of))
        table.to_parquet(folder / f"{part}.parquet")
    return str(folder)


def test_unused_image_columns_are_not_decoded(ghostscript, tmp_path):
    def add_views(rows, types_of):
        types_of["views"] = datasets.List(datasets.Image())
        for row in rows:
            row["views"] = [{"bytes": POSTSCRIPT, "path": None}]

    folder = postscript_rows(tmp_path / "data", add_views)
    for load in (load_splits, stream_splits):
        splits = load(folder, image_column="img", validation_split="validation")
        rows = list(splits.validation)
        assert len(rows) == len(list(splits.train)) == 12
        decode(rows[0]["image"], "validation", 0)
    assert not ghostscript.exists()


@pytest.mark.parametrize("is_streamed", [False, True])
def test_training_on_postscript_raises_data_error(is_streamed, ghostscript, tmp_path, capsys):
    def damage(rows, types_of):
        for row in rows[5:8]:
            row["img"] = {"bytes": POSTSCRIPT, "path": None}

    folder = postscript_rows(tmp_path / "data", damage)
    (tmp_path / "recipe.yaml").write_text(MICRO_RECIPE.replace("validation_fraction: 0.2\n", ""))
    more = {"validation_split": "validation", "max_steps": 2, "eval_strategy": "no", "save_strategy": "no"}
    more |= {"use_cpu": True, "dataset_name": folder, "output_dir": tmp_path / "out", "streaming": is_streamed}
    more |= {"dataloader_num_workers": 0}
    words = [word for key, value in more.items() for word in (f"--{key}", str(value))]
    with pytest.raises(SystemExit) as stop:
        main(["train", str(tmp_path / "recipe.yaml"), *words])
    assert stop.value.code == DataError.exit_code
    assert_names(capsys.readouterr().err, "JPEG, PNG")
    assert not ghostscript.exists()


def test_pillow_supports_all_formats_except_heif():
    assert set(FORMATS) - set(formats()) <= {"HEIF", "AVIF"}
    assert features.check("avif") == ("AVIF" in formats())


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in ("HEIF", "DIB")] + ["MPO"])
def test_open_image_of_listed_format_equals_pillow(format, tmp_path):
    content = content_of(colored_image(1, np.random.default_rng(0)), format)
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(np.asarray(read_bytes(content, "upload")), expected)
    file = tmp_path / "photo.txt"
    file.write_bytes(content)
    assert np.array_equal(np.asarray(read_image(file)), expected)


def test_heif_is_supported_with_pillow_heif(monkeypatch):
    """A fake package registers a format."""
    called = []
    stand_in = types.ModuleType("pillow_heif")
    stand_in.register_heif_opener = lambda: called.append(True)
    monkeypatch.setitem(sys.modules, "pillow_heif", stand_in)
    spec = importlib.util.find_spec("hfvit.data.open_image")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert called == [True]
    monkeypatch.setitem(Image.OPEN, "HEIF", Image.OPEN["PNG"])
    assert "HEIF" in hfvit.data.open_image.formats()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_open_image_of_an_animation_reads_the_first_frame(format):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    content = content_of(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
    assert np.abs(np.asarray(read_bytes(content, "upload")).astype(int) - [255, 0, 0]).max() < 3


def test_other_frames_of_an_animation_are_not_decoded(monkeypatch):
    """A GIF with 300,000 frames of one pixel on a canvas of 5000 x 5000, in 5 MB."""
    single = content_of(Image.new("P", (1, 1)), "GIF")
    start = single.index(b",")
    head = single[:6] + struct.pack("<HH", 5000, 5000) + single[10:start]
    frame = single[start:-1]
    content = head + frame * 300_000 + b";"
    begin = time.monotonic()
    assert read_bytes(content, "upload").size == (5000, 5000)
    assert time.monotonic() - begin < 5


def png_head(width: int, height: int, rows: bytes = b"") -> bytes:
    """Return a gray PNG with this size in its header."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 10_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_more_pixels_than_pillows_limit_raise_image_limit_error(size):
    encoded = {"bytes": png_head(*size), "path": "a/b.png"}
    for read in (decode, image_size):
        with pytest.raises(DataError) as caught:
            read(encoded, "train", 3)
        assert_names(caught.value, "'train'", 3, "a/b.png", "limit of")


@pytest.mark.parametrize(
    ("size", "limit"),
    [((1, 1001), "1000"), ((1001, 1), "1000")],
)
def test_long_strip_raises_image_limit_error(size, limit):
    with pytest.raises(DataError, match=rf"1 pixels, an aspect ratio above the limit of {limit}|limit of {limit}"):
        decode({"bytes": png_head(*size), "path": None}, "train", 0)


def test_long_strip_within_the_limit_is_read():
    content = content_of(Image.new("RGB", (1, 1000)), "PNG")
    assert decode({"bytes": content, "path": None}, "train", 0).size == (1, 1000)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (ImageLimits(max_bytes=100), "limit of 100 bytes"),
        (ImageLimits(max_pixels=255), "256 pixels, more than the limit of 255"),
        (ImageLimits(max_aspect_ratio=0.5), "aspect ratio"),
    ],
)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_limits_are_checked_before_pixels_are_decoded(limits, message, format, tmp_path, monkeypatch):
    content = content_of(colored_image(0, np.random.default_rng(0)), format)
    file = tmp_path / "photo"
    file.write_bytes(content)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    for source in (content, file):
        with pytest.raises(ImageLimitError, match=message), open_image(source, limits):
            pass


@pytest.mark.parametrize("format", ["JPEG", "MPO"])
def test_jpeg_with_many_scans_raises_image_limit_error(format):
    image = colored_image(0, np.random.default_rng(0), size=64)
    frames = {"save_all": True, "append_images": [image]} if format == "MPO" else {}
    content = content_of(image, format, progressive=True, **frames)
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.format == format
    assert read_bytes(content, "upload").size == (64, 64)
    last = content.rindex(b"\xff\xda")
    scans = content[:-2] + content[last:-2] * 10_000 + b"\xff\xd9"
    with pytest.raises(DataError, match="scans, more than the limit of 64"):
        read_bytes(scans, "upload")


def test_uploads_have_limits():
    for content in (bytes(UPLOAD_LIMITS.max_bytes + 1), png_head(6000, 6000), png_head(51, 1)):
        with pytest.raises(DataError, match="limit of"):
            read_bytes(content, "upload")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_devices_and_folders_raise_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "pipe.png", tmp_path / "folder.png", "/dev/zero"):
        with pytest.raises(DataError, match="not a regular file"):
            read_image(path)
        with pytest.raises(DataError, match="not a regular file"):
            decode({"bytes": None, "path": str(path)}, "train", 0)


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-this-name/a.png", "a\0b", "\udcff.png", "a\nb.png"])
def test_find_images_of_odd_names_finds_nothing(name):
    assert find_images([name]) == ([], [f"{name}: no such file or folder"])
    with pytest.raises(DataError):
        read_image(name)


def test_find_images_of_a_folder_leaves_other_formats_out(tmp_path):
    for name in ("a.png", "b.JPG", "c.webp", "d.eps", "e.ps", "f.wmf", "g.pdf", "h.hdf5", "i.fits"):
        (tmp_path / name).touch()
    assert find_images([str(tmp_path)]) == ([str(tmp_path / name) for name in ("a.png", "b.JPG", "c.webp")], [])


SAMPLES = [
    content_of(Image.new("RGB", (9, 7), "red"), format)
    for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(sample=st.sampled_from([*SAMPLES, *HOSTILE.values()]), data=st.data())
def test_damaged_files_are_read_or_raise_data_error(sample, data):
    content = bytearray(sample)
    for _ in range(data.draw(st.integers(0, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        image = read_bytes(content, "upload")
    except DataError:
        return
    assert image.mode == "RGB"
    assert image.width * image.height <= UPLOAD_LIMITS.max_pixels


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    found, wrong = find_images(["", "a.png"])
    assert found == ["a.png"]
    assert len(wrong) == 1


def test_tiff_with_bands_that_pillow_lacks_says_so():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "TIFF")
    rgb = struct.pack("<HHIH", 262, 3, 1, 2)  # photometric interpretation
    assert rgb in buffer.getvalue()
    content = buffer.getvalue().replace(rgb, struct.pack("<HHIH", 262, 3, 1, 1))  # three bands of gray
    with pytest.raises(UnsupportedTiffError), open_image(content):
        pass
    with pytest.raises(DataError, match="TIFF") as caught:
        read_bytes(content, "bands.tif")
    assert "JPEG2000" not in str(caught.value)
