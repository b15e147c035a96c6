"""Decode images from data sets, files and URLs to RGB."""

import glob
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from hfvit.data.open_image import (
    DEFAULT_LIMITS,
    UPLOAD_LIMITS,
    ImageLimits,
    extensions,
    image_error_reason,
    open_image,
    orientation,
)
from hfvit.errors import DataError
from hfvit.utils.download import DEFAULT_URL_LIMITS, UrlLimits, read_url
from hfvit.utils.environment import cores
from hfvit.utils.files import expand_user

logger = logging.getLogger(__name__)

# `ImageOps.exif_transpose` would read and write all metadata.
TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
ORIENTED = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # keys of `info` with an orientation
TIFF_WIDTH, TIFF_HEIGHT, TIFF_PHOTOMETRIC = 256, 257, 262  # tags of TIFF
WHITE_IS_ZERO = 0  # value of TIFF_PHOTOMETRIC
PNG_METADATA = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # what Pillow reads an orientation from
REDUCING_GAP = 2.0  # a JPEG is decoded at this many times the final size at least, as in Pillow's `reducing_gap`
TORCH_FILTERS = ("bilinear", "bicubic")  # filters with a vectorized 8-bit implementation in torch


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a PIL image to RGB and apply its EXIF orientation.

    transformers' `load_image` does the same. Unlike Pillow, which clips deeper gray images at 255, this scales them:
    16-bit and 32-bit integers (if they exceed 8 bits) by 65535, floating-point images by their own range. Such TIFF
    files whose zero is white are inverted, as Pillow does for 8 bits only (12.3).
    """
    inverted = image.format == "TIFF" and image.tag_v2.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO
    image.load()
    turn = TRANSPOSED.get(orientation(image))
    if turn is not None:
        image = image.transpose(turn)
        for key in ORIENTED:  # or the result would be turned again
            image.info.pop(key, None)
    is_deep = image.mode == "F" or image.mode.startswith("I")
    if image.mode == "F":
        image = _scaled(np.asarray(image))
    elif is_deep:
        high = 255 if image.mode == "I" and image.getextrema()[1] <= 255 else 65535
        image = image.convert("I").point(_gray_levels(high), "L")
    if is_deep and inverted:
        image = ImageOps.invert(image)
    return image if image.mode == "RGB" else image.convert("RGB")


@cache
def _gray_levels(high: int) -> list[int]:
    """Return the 8-bit level of each 16-bit one; levels from `high` on are white."""
    return [min(value, high) * 255 // high for value in range(65536)]


def _scaled(values: np.ndarray) -> Image.Image:
    """Scale a floating-point image from its range to 8 bits.

    NaN and negative infinity, which mark missing values in maps, become the minimum, infinity the maximum.
    """
    finite = np.isfinite(values)
    if not finite.any():
        return Image.new("L", values.shape[::-1])
    low = float(values.min(where=finite, initial=np.inf))
    high = float(values.max(where=finite, initial=-np.inf))
    scale = 255 / max(high - low, 1e-9)
    pixels = np.empty(values.shape, np.uint8)
    for line, scaled in zip(values, pixels, strict=True):  # by line, as float64 takes eight times the memory
        scaled[:] = (np.nan_to_num(line.astype(np.float64), nan=low, posinf=high, neginf=low) - low) * scale
    return Image.fromarray(pixels)


def decode(encoded: dict[str, Any] | None, split: str, row: int) -> Image.Image:
    """Decode an image to RGB.

    Args:
        encoded: `bytes` or `path` of the image.
        split: name of the split, for messages.
        row: row in the split, for messages.

    Raises:
        DataError: the file cannot be read as an image.
    """
    with _opened(encoded, split, row) as image:
        return to_rgb(image)


def image_size(encoded: dict[str, Any] | None, split: str, row: int | str) -> tuple[int, int]:
    """Read the (height, width) of a decoded image from the file's header.

    Args:
        encoded: `bytes` or `path` of the image.
        split: name of the split, for messages.
        row: row in the split, for messages.

    Raises:
        DataError: the file cannot be read as an image.
    """
    with _opened(encoded, split, row) as image:
        return upright_size(image)


def decode_crop(
    encoded: dict[str, Any] | None,
    split: str,
    row: int | str,
    box: Sequence[float],
    size: tuple[int, int],
    interpolation: str,
) -> np.ndarray:
    """Decode an image, crop a box and resize it.

    A JPEG that is much larger than needed is decoded at 1/2, 1/4 or 1/8 of its size (`draft`), which is faster; others
    are decoded by torchvision, see `jpeg_pixels`.

    Args:
        encoded: `bytes` or `path` of the image.
        split: name of the split, for messages.
        row: row in the split, for messages.
        box: top, left, height, width, in pixels of `image_size`.
        size: (height, width) of the result.
        interpolation: Pillow's name of the filter, in lower case.

    Returns:
        uint8 `(height, width, 3)`.

    Raises:
        DataError: the file cannot be read as an image.
    """
    with _opened(encoded, split, row) as image:
        height, width = upright_size(image)
        top, left, box_height, box_width = box
        spare = min(box_height / size[0], box_width / size[1]) / REDUCING_GAP
        full_size = image.size
        if spare > 1.0:
            image.draft("RGB", (math.ceil(image.width / spare), math.ceil(image.height / spare)))
        is_full = image.size == full_size
        pixels = jpeg_pixels(image) if is_full and interpolation in TORCH_FILTERS else None
        if pixels is None:
            image = to_rgb(image)
        x_scale = image.width / width
        y_scale = image.height / height
        left, right = round(left * x_scale), round((left + box_width) * x_scale)
        top, bottom = round(top * y_scale), round((top + box_height) * y_scale)
        right, bottom = max(right, left + 1), max(bottom, top + 1)
        if pixels is not None:
            return _interpolate(pixels[:, top:bottom, left:right], size, interpolation)
        return resize_8_bit(image.crop((left, top, right, bottom)), size, interpolation)


def jpeg_pixels(image: Image.Image) -> torch.Tensor | None:
    """Decode an open JPEG with torchvision, to Pillow's pixels in less time.

    Args:
        image: image whose pixels are not loaded.

    Returns:
        uint8 `(3, height, width)`; None for what only Pillow decodes: other formats, color spaces and orientations,
        damaged files, and progressive JPEGs, which older torchvision decodes differently if they are damaged.
    """
    is_plain = image.format == "JPEG" and image.mode == "RGB" and "progressive" not in image.info
    if not is_plain or orientation(image) != 1:
        return None
    try:
        # Deprecated since torchvision 0.29, in favor of TorchCodec.
        from torchvision.io import decode_jpeg

        image.fp.seek(0)
        pixels = decode_jpeg(torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8))
    except (ImportError, RuntimeError):
        return None
    return pixels if pixels.shape == (3, image.height, image.width) else None


def resize_8_bit(image: Image.Image, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize an RGB image with one of Pillow's antialiased filters.

    torch implements two of them for 8 bits: within one level of Pillow's result, in a third of the time.

    Args:
        image: RGB image.
        size: (height, width).
        interpolation: Pillow's name of the filter, in lower case.

    Returns:
        uint8 `(height, width, 3)`.
    """
    if interpolation not in TORCH_FILTERS:
        return np.asarray(image.resize((size[1], size[0]), Image.Resampling[interpolation.upper()]))
    return _interpolate(torch.from_numpy(np.array(image)).permute(2, 0, 1), size, interpolation)


def _interpolate(pixels: torch.Tensor, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize uint8 (3, height, width) to (height, width, 3) by a torch filter."""
    resized = torch.nn.functional.interpolate(pixels[None], size, mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the upright (height, width) of an open image.

    Its pixels must not be loaded.
    """
    width, height = image.size
    if image.format == "TIFF":  # Pillow may have swapped the sides of `size`
        width, height = image.tag_v2[TIFF_WIDTH], image.tag_v2[TIFF_HEIGHT]
    turned = _may_be_turned(image) and orientation(image) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def _may_be_turned(image: Image.Image) -> bool:
    """Return whether an open image may have an EXIF orientation.

    For a PNG file without metadata, `getexif` would decode the pixels.
    """
    if image.format != "PNG":
        return True
    position = image.fp.tell()
    image.fp.seek(0)
    content = image.fp.read()
    image.fp.seek(position)
    return any(marker in content for marker in PNG_METADATA)


@contextmanager
def _opened(encoded: dict[str, Any] | None, split: str, row: int | str):
    """Open an encoded image; errors become `DataError` with split and row."""
    try:
        # As in `datasets`, a path is only read where there are no bytes: beside empty ones it was never checked.
        content = encoded.get("bytes")
        with open_image(encoded["path"] if content is None else content) as image:
            yield image
    except MemoryError:
        raise
    except Exception as error:
        file = f" ({encoded['path']})" if encoded and encoded.get("path") else ""
        raise DataError(
            f"Split '{split}', row {row}{file}: {image_error_reason(error)}. Repair or remove it."
        ) from None


def unreadable_rows(split, name: str) -> dict[int, str]:
    """Decode all images and return the positions of those that cannot be decoded.

    Args:
        split: data set with the columns `image` (undecoded) and `row`.
        name: name of the split, for messages.

    Returns:
        Position -> error message.
    """
    bad: dict[int, str] = {}

    def check(position: int) -> tuple[int, str | None]:
        example = split[position]
        try:
            decode(example["image"], name, example["row"])
        except DataError as error:
            return position, str(error)
        return position, None

    with ThreadPoolExecutor(cores()) as pool:  # Pillow releases the GIL while it decodes
        results = pool.map(check, range(len(split)))
        for position, problem in tqdm(results, f"Checking {name}", len(split), unit="image", disable=None):
            if problem:
                bad[position] = problem
    return bad


# Files and folders that operating systems create.
SYSTEM_NAMES = {
    "thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information",
}  # fmt: skip


def is_hidden(name: str) -> bool:
    """Return whether a name is that of a hidden or system file or folder."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def is_url(name: str | Path) -> bool:
    """Return whether a name is an http or https URL."""
    return str(name).lower().startswith(("http://", "https://"))


def find_images(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Find the image files of files, folders and patterns.

    A folder means all image files in it and its subfolders, by the extensions of `open_image.formats`; links are
    followed. A pattern with `*`, `?` or `[...]` means all files and folders that match (`**` for any depth).

    Args:
        names: files, folders, patterns and URLs.

    Returns:
        (files and URLs without duplicates, one error message for each name without images).
    """
    found = []
    wrong = []
    for name in names:
        path = expand_user(name)
        if not name:  # would be the current folder
            wrong.append("'': no such file or folder")
        elif is_url(name) or os.path.isfile(path):  # False where `Path.is_file` raises: a name too long, no permission
            found.append(name if is_url(name) else str(path))
        elif os.path.isdir(path):
            inside = _in_folder(path)
            found += inside
            wrong += [] if inside else [f"{name}: no image in this folder"]
        else:
            matches = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(name) else []
            files = [file for match in matches for file in (_in_folder(match) if os.path.isdir(match) else [match])]
            found += files
            problem = "no image matches this pattern" if glob.has_magic(name) else "no such file or folder"
            wrong += [] if files else [f"{name}: {problem}"]
    return list(dict.fromkeys(found)), wrong


def _in_folder(folder: str | Path) -> list[str]:
    readable = extensions()
    found = [path for path in _files_below(Path(folder)) if path.suffix.lower() in readable and os.path.isfile(path)]
    visible = [path for path in found if not any(map(is_hidden, path.relative_to(folder).parts))]
    if len(visible) < len(found):
        logger.warning("%s: skipped %d hidden files", folder, len(found) - len(visible))
    return sorted(map(str, visible))


def _files_below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders.

    Links are followed, unless they lead to a folder above.

    Args:
        folder: folder to search.
        above: real paths of the folders above.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        names = os.listdir(folder)
    except OSError as error:
        logger.warning("%s: skipped, as the folder cannot be read (%s)", folder, error.strerror)
        return
    for name in names:
        path = folder / name
        if os.path.isdir(path):
            yield from _files_below(path, (*above, real))
        else:
            yield path


def read_image(
    name: str | Path, limits: ImageLimits = DEFAULT_LIMITS, url_limits: UrlLimits = DEFAULT_URL_LIMITS
) -> Image.Image:
    """Read an image file or URL as RGB, with the EXIF orientation applied.

    Args:
        name: path, or http or https URL. Do not pass names from untrusted users: they could read any image of this
            machine and send requests to its network. A server should accept bytes (`read_bytes`) or check the names
            and forbid private addresses in `url_limits`.
        limits: limits of the file.
        url_limits: limits of a download.

    Raises:
        DataError: the image cannot be read, or exceeds a limit.
    """
    if is_url(name):
        return read_bytes(read_url(str(name), url_limits), str(name), limits)
    return _read(expand_user(name), name, limits)


def read_bytes(content: bytes, name: str, limits: ImageLimits = UPLOAD_LIMITS) -> Image.Image:
    """Read the content of an image file as RGB, with the EXIF orientation applied.

    Args:
        content: content of the file.
        name: name of the image in messages.
        limits: limits of the file. Default: those for untrusted uploads.

    Raises:
        DataError: the image cannot be read, or exceeds a limit.
    """
    return _read(content, name, limits)


def _read(source: bytes | Path, name: str | Path, limits: ImageLimits) -> Image.Image:
    try:
        with open_image(source, limits) as image:
            return to_rgb(image)
    except MemoryError:
        raise
    except FileNotFoundError:
        raise DataError(f"{name}: no such file.") from None
    except Exception as error:
        raise DataError(f"{name}: {image_error_reason(error)}.") from error


def from_array(pixels: np.ndarray) -> Image.Image:
    """Convert an array to an RGB image.

    Args:
        pixels: uint8 `(height, width, 3)`, `(height, width, 4)` whose alpha channel is dropped, or gray `(height,
            width, 1)` or `(height, width)`.

    Raises:
        DataError: the array has another dtype or shape.
    """
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or channels not in (1, 3, 4) or not pixels.size:
        raise DataError(
            "An image array must be uint8 (0 to 255) of shape (height, width, 3), or (height, width) for gray, got"
            f" {pixels.dtype} of shape {pixels.shape}."
        )
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and channels == 1 else pixels).convert("RGB")
