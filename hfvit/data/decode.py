"""Decode images from data sets, files and URLs to RGB."""

import glob
import logging
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
)
from hfvit.errors import DataError
from hfvit.utils.download import DEFAULT_URL_LIMITS, UrlLimits, read_url
from hfvit.utils.environment import cores
from hfvit.utils.files import expand_user

logger = logging.getLogger(__name__)

EXIF_ORIENTATION = 0x0112
REDUCING_GAP = 2.0  # how much larger than needed a JPEG is decoded before the resize; Pillow's own advice
VECTORISED = ("bilinear", "bicubic")  # the filters that torch resizes 8-bit images with


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB, upright by its EXIF orientation, as transformers' `load_image` does for serving.

    Pillow, and with it `load_image`, clips deeper grays at 255. Here 16-bit ones are divided by their range, 32-bit
    integers too when they exceed 8 bits, and floating-point ones are spread over their own.
    """
    image.load()
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:  # exif_transpose copies upright images, too
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        low, high = 0.0, 65535.0
        if image.mode == "F":
            low, high = values.min(), values.max()
        elif image.mode == "I" and values.max() <= 255:
            high = 255.0
        image = Image.fromarray(((values - low) * (255.0 / max(high - low, 1e-9))).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def decode(encoded: dict[str, Any] | None, split: str, row: int) -> Image.Image:
    """The whole picture as RGB; `DataError` names the row of a file that is no picture."""
    with _opened(encoded, split, row) as image:
        return to_rgb(image)


def image_size(encoded: dict[str, Any] | None, split: str, row: int | str) -> tuple[int, int]:
    """(height, width) that `decode` would give, from the file's head alone."""
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
    """One box of the picture (top, left, height, width, in pixels of `image_size`), resized to uint8 `(*size, 3)`.

    A JPEG much larger than needed is decoded at a half, a quarter or an eighth of its size, which its format allows
    for free.
    """
    with _opened(encoded, split, row) as image:
        height, width = upright_size(image)
        top, left, box_height, box_width = box
        spare = min(box_height / size[0], box_width / size[1]) / REDUCING_GAP
        if spare > 1.0:
            image.draft("RGB", (math.ceil(image.width / spare), math.ceil(image.height / spare)))
        image = to_rgb(image)
        across, down = image.width / width, image.height / height
        left, right = round(left * across), round((left + box_width) * across)
        top, bottom = round(top * down), round((top + box_height) * down)
        return resize_8_bit(image.crop((left, top, max(right, left + 1), max(bottom, top + 1))), size, interpolation)


def resize_8_bit(image: Image.Image, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """An RGB image resized to uint8 `(*size, 3)` by one of Pillow's antialiased filters.

    torch has two of them as vectorised 8-bit code: within one level of Pillow's own, in a third of its time.
    """
    if interpolation not in VECTORISED:
        return np.asarray(image.resize((size[1], size[0]), Image.Resampling[interpolation.upper()]))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(pixels, size, mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an image that is open, after its EXIF orientation."""
    turned = image.getexif().get(EXIF_ORIENTATION) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def _opened(encoded: dict[str, Any] | None, split: str, row: int | str):
    """An encoded picture (`bytes` or `path`), open; whatever Pillow says of it is told with its split and row."""
    try:
        # As in `datasets`, a path is only read where there are no bytes: beside empty ones it was never checked.
        content = encoded.get("bytes")
        with open_image(encoded["path"] if content is None else content) as image:
            yield image
    except MemoryError:
        raise
    except Exception as error:
        file = f" ({encoded['path']})" if encoded and encoded.get("path") else ""
        raise DataError(f"Split '{split}', row {row}{file}: {image_error_reason(error)}; mend or remove it.") from None


def unreadable_rows(split, name: str) -> dict[int, str]:
    """Positions of images that cannot be decoded, with what is wrong; all images are decoded for it.

    Args:
        split: columns `image` (undecoded) and `row`.
        name: of the split, for messages.
    """
    bad: dict[int, str] = {}

    def check(position: int) -> tuple[int, str | None]:
        example = split[position]
        try:
            decode(example["image"], name, example["row"])
        except DataError as error:
            return position, str(error)
        return position, None

    with ThreadPoolExecutor(cores()) as pool:  # Pillow decodes outside the interpreter's lock
        results = pool.map(check, range(len(split)))
        for position, problem in tqdm(results, f"Checking {name}", len(split), unit="image", disable=None):
            if problem:
                bad[position] = problem
    return bad


# What operating systems leave in folders.
SYSTEM_NAMES = {
    "thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information",
}  # fmt: skip


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name belongs to the operating system or an editor."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def is_url(name: str | Path) -> bool:
    return str(name).lower().startswith(("http://", "https://"))


def find_images(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Files and URLs that `names` stand for, in order and each once, and what is wrong with the other names.

    A folder stands for the picture files in it and below it, by the extensions of `open_image.formats`; a pattern with
    `*`, `?` or `[...]` for the files and folders that it matches (`**` for any depth).
    """
    found, wrong = [], []
    for name in names:
        path = expand_user(name)
        if is_url(name) or os.path.isfile(path):  # False where `Path.is_file` raises: a name too long, no permission
            found.append(name if is_url(name) else str(path))
        elif os.path.isdir(path):
            inside = _in_folder(path)
            found += inside
            wrong += [] if inside else [f"{name}: no picture in this folder"]
        else:
            matches = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(name) else []
            files = [file for match in matches for file in (_in_folder(match) if Path(match).is_dir() else [match])]
            found += files
            what = "no picture matches this pattern" if glob.has_magic(name) else "there is no such file or folder"
            wrong += [] if files else [f"{name}: {what}"]
    return list(dict.fromkeys(found)), wrong


def _in_folder(folder: str | Path) -> list[str]:
    readable = extensions()
    found = [path for path in Path(folder).rglob("*") if path.suffix.lower() in readable and path.is_file()]
    visible = [path for path in found if not any(map(is_hidden, path.relative_to(folder).parts))]
    if len(visible) < len(found):
        logger.warning("%s: skipped %d hidden files", folder, len(found) - len(visible))
    return sorted(map(str, visible))


def read_image(
    name: str | Path, limits: ImageLimits = DEFAULT_LIMITS, url_limits: UrlLimits = DEFAULT_URL_LIMITS
) -> Image.Image:
    """Read an image file or URL as RGB, upright, as training reads it.

    Args:
        name: path, or URL of http or https. Whoever may choose it can have any image of this machine read and any
            host of its network asked: a server takes bytes from its visitors (`read_bytes`), or checks what they name
            and forbids private addresses in `url_limits`.
        limits: of the file.
        url_limits: of a download.

    Raises:
        DataError: it cannot be read, or exceeds a limit.
    """
    if is_url(name):
        return read_bytes(read_url(str(name), url_limits), str(name), limits)
    return _read(expand_user(name), name, limits)


def read_bytes(content: bytes, name: str, limits: ImageLimits = UPLOAD_LIMITS) -> Image.Image:
    """Read the content of an image file as RGB, upright, as training reads it.

    Args:
        content: of the file.
        name: what messages call it.
        limits: of the file; by default those for what strangers send.

    Raises:
        DataError: it cannot be read, or exceeds a limit.
    """
    return _read(content, name, limits)


def _read(source: bytes | Path, name: str | Path, limits: ImageLimits) -> Image.Image:
    try:
        with open_image(source, limits) as image:
            return to_rgb(image)
    except MemoryError:
        raise
    except FileNotFoundError:
        raise DataError(f"{name}: there is no such file.") from None
    except Exception as error:
        raise DataError(f"{name}: {image_error_reason(error)}.") from error


def from_array(pixels: np.ndarray) -> Image.Image:
    """uint8 as RGB; `DataError` for anything else.

    Shapes are `(height, width, 3)`, `(height, width, 4)` whose alpha is left out, and for gray `(height, width, 1)` or
    `(height, width)`.
    """
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or channels not in (1, 3, 4) or not pixels.size:
        raise DataError(
            f"An array of shape {pixels.shape} and {pixels.dtype} is no picture; give uint8, 0 to 255, of shape"
            " (height, width, 3), or (height, width) for gray."
        )
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and channels == 1 else pixels).convert("RGB")
