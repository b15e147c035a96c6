"""Small images of one size, decoded once: a memory-mapped uint8 array in the cache of `datasets`.

Every process maps the same file, and a batch is one indexed read of it. Whatever stands in the way (images that differ
in size, a full disk) is a reason to decode in the loader's workers instead, and is said, not raised.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from hfvit.decode import decode, image_size
from hfvit.hardware import cores

MAX_PIXELS = 128 * 128  # of an image; beyond that the array outgrows the files that it is made of
PROBED = 64
CHUNK = 512


class NotAnArray(Exception):
    """Why a split is not kept as one array."""


class PixelArray:
    """uint8 images `(rows, height, width, 3)` in a file, opened where they are read: a worker is sent its name."""

    def __init__(self, path: Path):
        self.path = path
        self._array: np.ndarray | None = None

    def __getstate__(self) -> dict:
        return {"path": self.path, "_array": None}

    @property
    def array(self) -> np.ndarray:
        if self._array is None:
            self._array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return self._array

    def read(self, rows: np.ndarray) -> np.ndarray:
        """A copy of the images at `rows`."""
        return np.take(self.array, rows, axis=0)


def common_size(split: Dataset, name: str) -> tuple[int, int]:
    """Height and width of `PROBED` of the images; `NotAnArray` when they differ or are large."""
    rows = np.unique(np.linspace(0, len(split) - 1, PROBED).astype(int))
    examples = [split[int(row)] for row in rows]
    sizes = [image_size(example["image"], name, example["row"]) for example in examples]
    _require_one_size(dict(zip((example["row"] for example in examples), sizes, strict=True)))
    height, width = sizes[0]
    if height * width > MAX_PIXELS:
        raise NotAnArray(f"images of {width}x{height} pixels are not small")
    return height, width


def cached_pixels(split: Dataset, name: str, size: tuple[int, int], show_progress: bool = True) -> PixelArray:
    """The images of `split` (columns `image`, undecoded, and `row`), all of `size`, as one array; made at first call.

    The file is keyed by the split's fingerprint and written under a temporary name. Raises `NotAnArray` with the
    reason when an image has another size or there is no room; `DataError` for a picture that cannot be read.
    """
    path = Path(datasets.config.HF_DATASETS_CACHE) / "hfvit_pixels" / f"{split._fingerprint}.npy"
    if path.exists():
        return PixelArray(path)
    needed = len(split) * size[0] * size[1] * 3
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if needed > 0.9 * free:
            raise NotAnArray(f"{needed / 2**20:,.0f} MiB of pixels do not fit on the disk of {path.parent}")
        _write(split, name, path, size, show_progress)
    except OSError as error:
        raise NotAnArray(f"{path.parent} cannot be written ({error.strerror or error})") from None
    return PixelArray(path)


def _require_one_size(sizes: dict[int, tuple[int, int]]) -> None:
    first = next(iter(sizes))
    for row, (height, width) in sizes.items():
        if (height, width) != sizes[first]:
            raise NotAnArray(
                f"images differ in size ({sizes[first][1]}x{sizes[first][0]} in row {first}, {width}x{height} in row"
                f" {row})"
            )


def _write(split: Dataset, name: str, path: Path, size: tuple[int, int], show_progress: bool) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=(len(split), *size, 3))
        bar = tqdm(total=len(split), desc=f"Decoding {name} once", unit="image", disable=not show_progress)
        with bar, ThreadPoolExecutor(cores()) as pool:  # Pillow decodes outside the interpreter's lock
            for start in range(0, len(split), CHUNK):
                chunk = split[start : start + CHUNK]
                images = list(pool.map(lambda e, row: np.asarray(decode(e, name, row)), chunk["image"], chunk["row"]))
                _require_one_size(
                    {0: size} | {row: image.shape[:2] for row, image in zip(chunk["row"], images, strict=True)}
                )
                array[start : start + len(images)] = images
                bar.update(len(images))
        array.flush()
        del array
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
