"""Generated images whose files are as large and as slow to decode as those of photographs.

In a photograph, the amplitude decreases with the frequency, so noise on finer grids is added with smaller weights.
With white noise, a JPEG would be three times larger, and decoding would dominate the measurements.
"""

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 10


@dataclass(frozen=True)
class ImageKind:
    """Kind of images: size in pixels, file format, noise grids as (cells across, weight)."""

    name: str
    height: int
    width: int
    format: str
    grids: tuple[tuple[int, float], ...]


# 2.2 kB per file (CIFAR-10 as PNG: about 2.3) and 51 kB (photographs of that size and quality: 40 to 80).
SMALL = ImageKind("32x32 PNG", 32, 32, "PNG", ((3, 70.0), (8, 25.0), (16, 12.0), (32, 4.0)))
LARGE = ImageKind("500x375 JPEG", 375, 500, "JPEG", ((4, 60.0), (16, 30.0), (64, 20.0), (160, 16.0)))
KINDS = {kind.name: kind for kind in (SMALL, LARGE)}


def generate(kind: ImageKind, rows: int, folder: Path) -> None:
    """Write a data set of parquet files with `image` and `label`, as on the Hub.

    Args:
        kind: kind of images.
        rows: number of training images; there are a few validation images, too.
        folder: folder to write to.
    """
    from datasets import ClassLabel, Dataset, Features, disable_progress_bars
    from datasets import Image as ImageFeature

    disable_progress_bars()
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[str(n) for n in range(CLASSES)])})
    with ThreadPoolExecutor() as pool:
        for first, split, count in ((0, "train", rows), (rows, "validation", 4 * CLASSES)):
            files = list(pool.map(lambda number: encoded(kind, number), range(first, first + count)))
            images = [{"bytes": file, "path": None} for file in files]
            labels = [number % CLASSES for number in range(count)]
            target = folder / "data" / f"{split}-00000-of-00001.parquet"
            Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(target)


def encoded(kind: ImageKind, seed: int) -> bytes:
    """Return the file of one image."""
    rng = np.random.default_rng(seed)
    pixels = np.full((3, kind.height, kind.width), 128.0, dtype=np.float32)
    for cells, weight in kind.grids:
        down, across = max(2, cells * kind.height // kind.width), cells
        grid = rng.standard_normal((1, down, across)) + 0.4 * rng.standard_normal((3, down, across))  # mostly gray
        pixels += weight * (upsampling(down, kind.height) @ grid.astype(np.float32) @ upsampling(across, kind.width).T)
    file = io.BytesIO()
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    image.save(file, kind.format, quality=90)
    return file.getvalue()


@cache
def upsampling(cells: int, size: int) -> np.ndarray:
    """Return the weights `(size, cells)` of linear interpolation."""
    place = np.linspace(0, cells - 1, size)[:, None]
    return np.maximum(0.0, 1.0 - np.abs(place - np.arange(cells))).astype(np.float32)
