"""Memory-mapped uint8 array of small images, decoded once."""

import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from hfvit.data.decode import decode, image_size
from hfvit.utils.environment import cores
from hfvit.utils.files import remove_abandoned, temporary_file

MAX_PIXELS = 128 * 128  # of an image; beyond that the array outgrows the files that it is made of
PROBED = 64
CHUNK = 512
DECODING = 1  # part of the file's name: raise it when decode.to_rgb gives other pixels than before


class NotAnArray(Exception):
    """Why a split is not kept as one array."""


class PixelArray:
    """uint8 images `(rows, height, width, 3)` in a file, opened where they are read: a worker is sent its name.

    What is open stays readable when the file is deleted, so it is opened before a run begins.
    """

    def __init__(self, path: Path):
        self.path = path
        self._array: np.ndarray | None = np.load(path, mmap_mode="r", allow_pickle=False)

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
    first = split[0]
    height, width = image_size(first["image"], name, first["row"])
    for row in rows:
        example = split[int(row)]
        _require_size(image_size(example["image"], name, example["row"]), example["row"], (height, width))
    if height * width > MAX_PIXELS:
        raise NotAnArray(f"images of {width}x{height} pixels are not small")
    return height, width


def _require_size(size: tuple[int, int], row: int, expected: tuple[int, int]) -> None:
    if size != expected:
        raise NotAnArray(f"images differ in size ({expected[1]}x{expected[0]}, but {size[1]}x{size[0]} in row {row})")


def cached_pixels(split: Dataset, name: str, size: tuple[int, int], show_progress: bool = True) -> PixelArray:
    """The images of `split` (columns `image`, undecoded, and `row`), all of `size`, as one array; made at first call.

    The file is keyed by the split's fingerprint and written under a temporary name. Raises `NotAnArray` with the
    reason when an image has another size or there is no room; `DataError` for a picture that cannot be read.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hfvit_pixels"
    path, shape = folder / f"{split._fingerprint}-v{DECODING}.npy", (len(split), *size, 3)
    if _holds(path, shape):
        return PixelArray(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder, ".*.npy")
        if math.prod(shape) > shutil.disk_usage(folder).free:
            raise NotAnArray(f"{math.prod(shape) / 2**20:,.0f} MiB of pixels do not fit on the disk of {folder}")
        _write(split, name, path, shape, show_progress)
    except OSError as error:
        raise NotAnArray(f"{folder} cannot be written ({error.strerror or error})") from None
    return PixelArray(path)


def _holds(path: Path, shape: tuple[int, ...]) -> bool:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):  # no file, or no array, or not all of it
        return False
    return array.shape == shape and array.dtype == np.uint8


def _write(split: Dataset, name: str, path: Path, shape: tuple[int, ...], show_progress: bool) -> None:
    # Written as a file, not through a memory map: on a full disk that is an error, where a map would kill the process.
    with temporary_file(path) as temporary, temporary.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        bar = tqdm(total=len(split), desc=f"Decoding {name} once", unit="image", disable=not show_progress)
        with bar, ThreadPoolExecutor(cores()) as pool:  # Pillow decodes outside the interpreter's lock
            for start in range(0, len(split), CHUNK):
                chunk = split[start : start + CHUNK]
                images = pool.map(lambda e, row: np.asarray(decode(e, name, row)), chunk["image"], chunk["row"])
                for row, image in zip(chunk["row"], images, strict=True):
                    _require_size(image.shape[:2], row, shape[1:3])
                    file.write(image.tobytes())
                bar.update(len(chunk["row"]))
