"""Small files whose metadata Pillow would copy to gigabytes or for minutes."""

import io
import struct

import pytest
from PIL import Image, PngImagePlugin

from hfvit.data.decode import read_bytes
from hfvit.data.image_metadata import excessive_metadata
from hfvit.data.open_image import ImageLimitError
from hfvit.errors import DataError

ORIENTATION = (0x0112, 3, 1, 6 << 16)
SIZE = 8


def directory(values: int, content: int = 1_000_000, entries=(ORIENTATION,)) -> bytes:
    """Return a TIFF structure with entries, and further ones that are all the same bytes."""
    entries = [*entries, *((1000 + number, 7, content, 8) for number in range(values))]
    packed = b"".join(struct.pack(">HHLL", *entry) for entry in entries)
    return b"MM\0*" + struct.pack(">LH", 8, len(entries)) + packed + bytes(4) + bytes(content)


def file_of(kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (SIZE, 2 * SIZE), "red").save(file, kind, **options)
    return file.getvalue()


def jpeg(exif: bytes, part: int = 60_000, before: bytes = b"") -> bytes:
    parts = [exif[start : start + part] for start in range(0, len(exif), part)]
    segments = [b"\xff\xe1" + struct.pack(">H", 8 + len(each)) + b"Exif\0\0" + each for each in parts]
    content = file_of("JPEG")
    return content[:2] + before + b"".join(segments) + content[2:]


def tiff(values: int) -> bytes:
    fields = {256: SIZE, 257: SIZE, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: SIZE, 279: SIZE * SIZE}
    return directory(values, entries=[(tag, 4, 1, value) for tag, value in fields.items()])


def png_with_profile(exif: bytes) -> bytes:
    info = PngImagePlugin.PngInfo()
    text = f"\nexif\n{len(exif) + 6:8}\n{(b'Exif' + bytes(2) + exif).hex()}\n"
    info.add_text("Raw profile type exif", text, zip=True)
    return file_of("PNG", pnginfo=info)


def gif(*comments: bytes) -> bytes:
    content = file_of("GIF")
    end = 13 + (3 << (content[10] & 7) + 1 if content[10] & 128 else 0)
    return content[:end] + b"".join(b"!\xfe" + comment + b"\0" for comment in comments) + content[end:]


def webp(exif: bytes) -> bytes:
    return file_of("WEBP", exif=exif)


def big_tiff(values: int) -> bytes:
    packed = b"".join(struct.pack("<HHQQ", 1000 + number, 7, 1_000_000, 16) for number in range(values))
    return b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, values) + packed + bytes(1_000_000)


def heif(*headers: bytes) -> bytes:
    return bytes(4) + b"ftypheic" + bytes(8) + b"".join(headers)


@pytest.mark.parametrize(
    "content",
    [
        jpeg(directory(1000)),
        jpeg(directory(1), part=2),
        jpeg(b"Exif\0\0" + directory(1000)),
        jpeg(directory(1000), before=b"\xff\xff\xff"),
        jpeg(directory(1000), before=b"\xff\xd0"),
        file_of("PNG", exif=directory(1000)),
        png_with_profile(directory(1000, 120_000)),
        webp(directory(1000)),
        tiff(1000),
        big_tiff(1000),
        gif(*[b"\1a"] * 5000),
        gif(b"\1a" * 5000),
        gif(*[b""] * 5000),
    ],
    ids=["JPEG", "JPEG parts", "JPEG two heads", "JPEG fill bytes", "JPEG restart", "PNG", "PNG profile", "WebP",
         "TIFF", "BigTIFF", "GIF", "GIF blocks", "GIF empty comments"],
)  # fmt: skip
def test_file_with_metadata_that_grows_is_refused(content):
    with pytest.raises(DataError, match=r"^x: ") as caught:
        read_bytes(content, "x")
    assert isinstance(caught.value.__cause__, ImageLimitError)


@pytest.mark.parametrize(
    "content",
    [
        jpeg(directory(1)),
        jpeg(directory(1, 500_000)),
        file_of("PNG", exif=directory(1)),
        png_with_profile(directory(1, 10_000)),
        webp(directory(1)),
    ],
)
def test_file_with_large_metadata_is_turned(content):
    assert read_bytes(content, "x").size == (2 * SIZE, SIZE)


@pytest.mark.parametrize("content", [tiff(1), gif(b"\4text"), gif(*[b"\xff" + bytes(255)] * 1000)])
def test_file_with_large_metadata_is_read(content):
    assert read_bytes(content, "x").width == SIZE


@pytest.mark.parametrize("content", [jpeg(directory(1)), file_of("PNG", exif=directory(1)), tiff(1), gif(b"\4text")])
def test_excessive_metadata_of_a_truncated_file_is_none(content):
    for size in (*range(0, 60), 200, 1000):
        assert excessive_metadata(io.BytesIO(content[:size])) is None


def test_excessive_metadata_takes_more_than_two_files():
    assert excessive_metadata(io.BytesIO(directory(3))) is None
    assert excessive_metadata(io.BytesIO(directory(4)))
    beyond_the_end = directory(0, entries=[(1000, 7, 2**31, 8)])
    assert excessive_metadata(io.BytesIO(beyond_the_end)) is None


def test_excessive_metadata_of_heif_reads_each_directory():
    assert excessive_metadata(io.BytesIO(heif(directory(1), directory(1)))) is None
    assert excessive_metadata(io.BytesIO(heif(directory(1), directory(1000))))


def test_excessive_metadata_of_heif_limits_its_directories():
    """All headers can lead to the same large directory, which would be read for each."""
    assert excessive_metadata(io.BytesIO(heif(*[b"MM\0*"] * 16))) is None
    assert excessive_metadata(io.BytesIO(heif(*[b"MM\0*"] * 17)))
