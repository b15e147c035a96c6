"""Memory-mapped uint8 array of small images, which are decoded only once."""

import logging
import math
import os
import shutil
from itertools import repeat
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from hfvit.data.decode import decode, image_size
from hfvit.data.labels import read_column
from hfvit.data.tables import paths_to_read
from hfvit.utils.environment import cores
from hfvit.utils.files import remove_abandoned, temporary_file
from hfvit.utils.threads import map_in_threads

MAX_PIXELS = 128 * 128  # per image; larger images take much more space than their files
SAMPLE = 64  # images whose size is checked
CHUNK = 64  # images that a thread reads and decodes at a time
ANNOUNCED_IMAGES = 10_000  # more take seconds, in which a log file would have no line
DECODING_VERSION = 2  # part of the file name; increase it when decode.to_rgb changes its results

logger = logging.getLogger(__name__)


class NotCacheableError(Exception):
    """Reason why the images of a split are not cached in an array."""


class PixelArray:
    """uint8 images `(rows, height, width, 3)` in a memory-mapped file.

    Pickling passes the path only, so that each worker maps the file. It is opened at once, since an open file stays
    readable if it is deleted.
    """

    def __init__(self, path: Path):
        self.path = path
        self.array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)

    def __reduce__(self) -> tuple:
        return PixelArray, (self.path,)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return a copy of the images at `rows`."""
        return np.take(self.array, rows, axis=0)


def cache_key(split: Dataset) -> str:
    """Identify the images of a split by its fingerprint and their files.

    The fingerprint of local files has the paths as given, so that a run can be resumed from a moved folder. That of a
    data set created from paths, as by `Dataset.from_dict`, does not change with the files.

    Args:
        split: data set with the column `image` (undecoded).
    """
    image = split[0]["image"] or {}
    path = os.path.abspath(image["path"]) if image.get("path") and image["bytes"] is None else None
    places = [file["filename"] for file in split.cache_files]
    return f"{split._fingerprint}-{datasets.fingerprint.Hasher.hash(repr([path, places, _file_states(split)]))}"


def _file_states(split: Dataset) -> list[tuple[int, int] | None]:
    """Return size and modification time of each image file, else None."""
    # Of all rows before a selection, so that bytes are not copied.
    if not any(chunk.field("bytes").null_count for chunk in split.data.column("image").chunks):
        return []
    paths = paths_to_read(read_column(split, "image"))
    return [None if path is None else _file_state(path) for path in paths]


def _file_state(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def common_size(split: Dataset, name: str) -> tuple[int, int]:
    """Return the (height, width) of the images, from a sample of them.

    Args:
        split: data set with the columns `image` (undecoded) and `row`.
        name: name of the split, for messages.

    Raises:
        NotCacheableError: the images are large or have different sizes.
    """
    rows = np.unique(np.linspace(0, len(split) - 1, SAMPLE).astype(int))
    first = split[0]
    height, width = image_size(first["image"], name, first["row"])
    if height * width > MAX_PIXELS:  # checked first: more large files would be read in vain
        raise NotCacheableError(f"images of {width}x{height} pixels are not small")
    for row in rows:
        example = split[int(row)]
        _require_size(image_size(example["image"], name, example["row"]), example["row"], (height, width))
    return height, width


def _require_size(size: tuple[int, int], row: int, expected: tuple[int, int]) -> None:
    if size != expected:
        raise NotCacheableError(
            f"images differ in size ({expected[1]}x{expected[0]}, but {size[1]}x{size[0]} in row {row})"
        )


def cached_pixels(split: Dataset, name: str, size: tuple[int, int], show_progress: bool = True) -> PixelArray:
    """Decode the images of a split into one array, or open the cached array.

    The file is named after the `cache_key` of the split.

    Args:
        split: data set with the columns `image` (undecoded) and `row`.
        name: name of the split, for messages.
        size: (height, width) of all images.
        show_progress: show a progress bar.

    Raises:
        NotCacheableError: an image has another size, or the disk is full or not writable.
        DataError: an image cannot be read.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hfvit_pixels"
    path = folder / f"{cache_key(split)}-v{DECODING_VERSION}.npy"
    shape = (len(split), *size, 3)
    if _is_array(path, shape):
        return PixelArray(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder, ".*.npy")
        if math.prod(shape) > shutil.disk_usage(folder).free:
            raise NotCacheableError(
                f"{math.prod(shape) / 2**20:,.0f} MiB of pixels do not fit on the disk of {folder}"
            )
        _write(split, name, path, shape, show_progress)
    except OSError as error:
        raise NotCacheableError(f"{folder} cannot be written ({error.strerror or error})") from None
    return PixelArray(path)


def _is_array(path: Path, shape: tuple[int, ...]) -> bool:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):  # missing, damaged or truncated
        return False
    return array.shape == shape and array.dtype == np.uint8


def _write(split: Dataset, name: str, path: Path, shape: tuple[int, ...], show_progress: bool) -> None:
    # Not through a memory map, which ends the process with SIGBUS if the disk is full.
    with temporary_file(path) as temporary, temporary.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        if not show_progress and len(split) >= ANNOUNCED_IMAGES:
            logger.info("Decoding %s: %s images", name, f"{len(split):,}")
        bar = tqdm(total=len(split), desc=f"Decoding {name}", unit="image", leave=False, disable=not show_progress)

        def decoded(start: int) -> np.ndarray:
            chunk = split[start : start + CHUNK]
            images = [np.asarray(decode(*encoded)) for encoded in zip(chunk["image"], repeat(name), chunk["row"])]
            for row, image in zip(chunk["row"], images, strict=True):
                _require_size(image.shape[:2], row, shape[1:3])
            return np.stack(images)

        with bar:  # Pillow releases the GIL while it decodes
            for images in map_in_threads(decoded, range(0, len(split), CHUNK), 2 * cores()):
                file.write(images.data)
                bar.update(len(images))
