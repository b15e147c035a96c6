"""Decoding to RGB as transformers' `load_image`, and errors with split and row."""

import io
import struct

import datasets
import numpy as np
import pytest
from helpers.images import colored_image, colored_split
from helpers.messages import assert_names
from helpers.splits import load_splits
from PIL import Image
from torchvision.transforms.v2 import functional as tv
from transformers.image_utils import load_image

from hfvit.data.decode import decode, decode_crop, image_size, jpeg_pixels, resize_8_bit, to_rgb
from hfvit.errors import DataError


def encoded(image: Image.Image, format="PNG", **options) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def smooth_image(height, width, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def test_corrupt_image_error_names_split_and_row_of_the_data_set(tmp_path):
    """Also for rows that were held out of the training split."""
    for bad in (5, 17, 38):
        split = colored_split(40, 0).cast_column("img", datasets.Image(decode=False))
        rows = split.to_list()
        rows[bad]["img"]["bytes"] = rows[bad]["img"]["bytes"][:60]
        folder = tmp_path / str(bad)
        broken = datasets.Dataset.from_list(rows, features=split.features)
        for name, part in (("train", broken), ("test", split)):
            part.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
        splits = load_splits(str(folder), max_train_samples=33)
        found = []
        for role in ("train", "validation"):
            for example in splits[role]:
                try:
                    decode(example["image"], splits.sources[role], example["row"])
                except DataError as error:
                    found.append(str(error))
        for message in found:
            assert_names(message, "'train'", bad)
        assert len(found) == 1 or bad not in [*splits.train["row"], *splits.validation["row"]]


@pytest.mark.parametrize("nothing", [None, {"bytes": None, "path": "/no/such/file.png"}, {"bytes": b"", "path": None}])
def test_decode_of_other_content_raises_data_error(nothing):
    for read in (decode, image_size):
        with pytest.raises(DataError) as caught:
            read(nothing, "train", 7)
        assert_names(caught.value, "'train'", 7)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_raises_data_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(DataError) as caught:
        decode(encoded(colored_image(0, np.random.default_rng(0))), "train", 0)
    assert_names(caught.value, "'train'", 0, 256, "limit of 200")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_to_rgb_equals_load_image(mode):
    image = colored_image(1, np.random.default_rng(0)).convert("P" if mode == "PA" else "RGB").convert(mode)
    converted = to_rgb(image)
    assert converted.mode == "RGB"
    assert np.array_equal(np.asarray(converted), np.asarray(load_image(image)))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_to_rgb_of_16_bit_gray_keeps_the_gradation(mode):
    ramp = np.linspace(0, 65535, 256).astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]).reshape(16, 16)
    image = Image.frombytes(mode, (16, 16), ramp.tobytes())
    pixels = np.asarray(to_rgb(image))[..., 0].ravel()
    assert np.abs(pixels.astype(int) - np.arange(256)).max() <= 1


def test_to_rgb_scales_deep_grays_by_mode():
    dark = Image.frombytes("I;16", (2, 1), np.array([0, 252], "<u2").tobytes())
    assert np.asarray(to_rgb(dark)).max() <= 1
    unit = Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16))
    assert np.abs(np.asarray(to_rgb(unit))[..., 0].ravel().astype(int) - np.arange(256)).max() <= 1
    with_gaps = Image.fromarray(np.array([[np.nan, 1, 2, 3, -np.inf, np.inf]], np.float32))
    assert np.asarray(to_rgb(with_gaps))[0, :, 0].tolist() == [0, 0, 127, 255, 0, 255]
    assert np.asarray(to_rgb(Image.fromarray(np.full((4, 4), np.nan, np.float32)))).max() == 0
    negative = Image.fromarray(np.array([[-5, 0, 65535, 70000]], np.int32))
    assert np.asarray(to_rgb(negative))[0, :, 0].tolist() == [0, 0, 255, 255]
    flat = Image.fromarray(np.full((4, 4), 0.5, np.float32))
    assert np.unique(np.asarray(to_rgb(flat))).size == 1


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    picture = encoded(smooth_image(40, 80), "JPEG", exif=exif)
    assert decode(picture, "train", 0).size == (40, 80)
    assert image_size(picture, "train", 0) == (80, 40)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_image_size_equals_the_decoded_size(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = encoded(smooth_image(40, 80), kind, exif=exif)
    width, height = decode(picture, "train", 0).size
    assert image_size(picture, "train", 0) == (height, width)
    whole = decode_crop(picture, "train", 0, (0, 0, height, width), (height, width), "lanczos")
    assert np.abs(whole.astype(int) - np.asarray(decode(picture, "train", 0))).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [3, 5, 6])
def test_to_rgb_of_its_own_result_changes_nothing(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    once = decode(encoded(smooth_image(40, 80), kind, exif=exif), "train", 0)
    np.testing.assert_array_equal(np.asarray(to_rgb(once)), np.asarray(once))


def test_image_size_of_a_png_with_its_orientation_behind_the_pixels():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(smooth_image(40, 80), "PNG", exif=exif)["bytes"]
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    moved = {"bytes": content[:start] + content[end:-12] + content[start:end] + content[-12:], "path": None}
    assert decode(moved, "train", 0).size == (40, 80)
    assert image_size(moved, "train", 0) == (80, 40)


def test_image_size_of_a_png_does_not_decode_its_pixels():
    content = encoded(smooth_image(40, 80), "PNG")["bytes"]
    assert image_size({"bytes": content[:-40], "path": None}, "train", 0) == (40, 80)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_decode_of_tiff_whose_zero_is_white_is_inverted(dtype):
    ramp = np.linspace(0, 1, 256).reshape(16, 16) * {"uint8": 255, "float32": 1}.get(dtype, 65535)
    content = encoded(Image.fromarray(ramp.round(3).astype(dtype)), "TIFF")["bytes"]
    black_is_zero = struct.pack("<HHIH", 262, 3, 1, 1)  # photometric interpretation
    assert black_is_zero in content
    inverted = content.replace(black_is_zero, struct.pack("<HHIH", 262, 3, 1, 0))
    expected, found = (
        np.asarray(decode({"bytes": one, "path": None}, "train", 0)).astype(int) for one in (content, inverted)
    )
    assert np.ptp(expected) == 255
    np.testing.assert_array_equal(found, 255 - expected)


@pytest.mark.parametrize("size", [(64, 48), (300, 320), (160, 40)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "box"])
def test_decode_crop_equals_pillow_within_one_level(interpolation, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 280, 3), dtype=np.uint8))
    crop = decode_crop(encoded(image), "train", 0, (13, 27, 160, 190), size, interpolation)
    expected = image.crop((27, 13, 217, 173)).resize(size[::-1], Image.Resampling[interpolation.upper()])
    difference = np.abs(crop.astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= (1 if interpolation in ("bilinear", "bicubic") else 0)
    assert (difference > 0).mean() < 0.05


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_decode_crop_equals_torchvision(interpolation):
    image = smooth_image(200, 280)
    crop = decode_crop(encoded(image), "train", 0, (13, 27, 160, 190), (64, 48), interpolation)
    mode = tv.InterpolationMode(interpolation)
    expected = tv.resized_crop(tv.pil_to_tensor(image), 13, 27, 160, 190, [64, 48], mode, antialias=True)
    assert np.array_equal(crop, expected.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpeg_is_decoded_at_a_smaller_scale(orientation, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = encoded(smooth_image(800, 1200), "JPEG", quality=95, exif=exif)
    sizes = []
    monkeypatch.setattr("hfvit.data.decode.to_rgb", lambda image: sizes.append(image.size) or to_rgb(image))
    crop = decode_crop(picture, "train", 0, (100, 80, 640, 640), (64, 64), "bicubic")
    assert sizes == [(300, 200)]
    whole = decode(picture, "train", 0)
    expected = whole.crop((80, 100, 720, 740)).resize((64, 64), 3)
    difference = np.abs(crop.astype(int) - np.asarray(expected).astype(int))
    assert difference.mean() < 2.0


JPEG_OPTIONS = {
    "4:4:4": {"subsampling": "4:4:4", "quality": 95},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:2:0": {"subsampling": "4:2:0", "quality": 30},
    "RGB": {"keep_rgb": True},
    "restart markers": {"restart_marker_rows": 1},
}


def pixels_of(content: bytes) -> np.ndarray | None:
    """Decode a file with `jpeg_pixels` to (height, width, 3)."""
    with Image.open(io.BytesIO(content)) as image:
        pixels = jpeg_pixels(image)
    return None if pixels is None else pixels.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("options", JPEG_OPTIONS.values(), ids=JPEG_OPTIONS)
def test_jpeg_pixels_equal_pillows(options, tmp_path):
    image = smooth_image(163, 281)
    noise = np.random.default_rng(0).normal(0, 12, (163, 281, 3))
    image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    picture = encoded(image, "JPEG", **options)
    expected = decode(picture, "train", 0)
    assert np.array_equal(pixels_of(picture["bytes"]), np.asarray(expected))
    (tmp_path / "image.jpg").write_bytes(picture["bytes"])
    for source in (picture, {"bytes": None, "path": str(tmp_path / "image.jpg")}):
        crop = decode_crop(source, "train", 0, (13, 27, 120, 190), (96, 112), "bicubic")
        assert np.array_equal(crop, resize_8_bit(expected.crop((27, 13, 217, 133)), (96, 112), "bicubic"))


def test_jpeg_pixels_of_what_torchvision_decodes_differently_are_none():
    image = smooth_image(80, 120)
    exif = Image.Exif()
    exif[0x0112] = 6
    jpegs = [encoded(image.convert(mode), "JPEG")["bytes"] for mode in ("L", "CMYK")]
    others = [encoded(image, "JPEG", **options)["bytes"] for options in ({"exif": exif}, {"progressive": True})]
    others.append(encoded(image)["bytes"])
    truncated = [encoded(image, "JPEG", progressive=kind)["bytes"][:-200] for kind in (False, True)]
    assert [pixels_of(content) for content in (*jpegs, *others, *truncated)] == [None] * 7
    for content in truncated:
        with pytest.raises(DataError):
            decode_crop({"bytes": content, "path": None}, "train", 0, (0, 0, 80, 120), (80, 120), "bicubic")


def test_jpeg_pixels_of_a_damaged_file_are_pillows_or_none():
    content = encoded(smooth_image(80, 120), "JPEG")["bytes"]
    start = content.index(b"\xff\xda")
    rng = np.random.default_rng(0)
    for position in rng.integers(start + 14, len(content) - 2, 40):
        damaged = bytearray(content)
        damaged[position] ^= int(rng.integers(1, 256))
        found = pixels_of(bytes(damaged))
        try:
            expected = np.asarray(decode({"bytes": bytes(damaged), "path": None}, "train", 0))
        except DataError:
            assert found is None
            continue
        assert found is None or np.array_equal(found, expected)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "AVIF", "PNG"])
def test_decode_of_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (12, 8), color) for color in ("red", "blue")]
    buffer = io.BytesIO()
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}.get(kind, {})
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=100, **options)
    image = decode({"bytes": buffer.getvalue(), "path": None}, "train", 0)
    with Image.open(buffer) as reference:
        assert np.array_equal(np.asarray(image), np.asarray(reference.convert("RGB")))
    red, _, blue = np.asarray(image).mean(axis=(0, 1))
    assert red > 200
    assert blue < 50


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("LAB", "TIFF"), ("LA", "PNG")])
def test_decode_of_color_spaces_gives_pillows_pixels(mode, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, len(Image.new(mode, (1, 1)).getbands())), np.uint8)
    buffer = io.BytesIO()
    Image.frombytes(mode, (12, 8), pixels.tobytes()).save(buffer, kind)
    with Image.open(buffer) as reference:
        expected = np.asarray(reference.convert("RGB"))
    assert np.array_equal(np.asarray(decode({"bytes": buffer.getvalue(), "path": None}, "train", 0)), expected)
