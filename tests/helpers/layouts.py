"""Folders, tables and archives of images, for the layouts of docs/data.md."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from helpers.images import colored_image


def image_bytes(seed: int = 0, kind: str = "PNG", size: int = 16, **options) -> bytes:
    """Return an encoded image that depends on the seed."""
    buffer = io.BytesIO()
    colored_image(seed % 3, np.random.default_rng(seed), size).save(buffer, kind, **options)
    return buffer.getvalue()


def write_images(root: Path, counts: dict[str, int], extension: str = "png", start: int = 0) -> Path:
    """Write `counts[folder]` different images to each folder below `root`.

    Returns `root`.
    """
    seed = start
    for folder, count in counts.items():
        place = root / folder
        place.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            colored_image(seed % 3, np.random.default_rng(seed)).save(place / f"{number}.{extension}")
            seed += 1
    return root


def archive_folder(folder: Path, archive: Path) -> Path:
    """Write the files in `folder` to a zip or tar file, by the extension of `archive`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    archive.parent.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as target:
            for file in files:
                target.write(file, file.relative_to(folder))
    else:
        with tarfile.open(archive, "w:gz" if archive.name.endswith("gz") else "w") as target:
            for file in files:
                target.add(file, str(file.relative_to(folder)))
    return archive


def write_shard(path: Path, samples: list[dict[str, bytes]]) -> Path:
    """Write a WebDataset shard; each sample has its members by extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as target:
        for number, sample in enumerate(samples):
            for extension, content in sample.items():
                info = tarfile.TarInfo(f"{number:05d}.{extension}")
                info.size = len(content)
                target.addfile(info, io.BytesIO(content))
    return path


def class_counts(splits) -> dict[str, dict[str, int]]:
    """Return the number of images of each class by role."""
    return {
        role: dict(
            zip(splits.labels, np.bincount(splits[role]["label"], minlength=len(splits.labels)).tolist(), strict=True)
        )
        for role in splits.metadata["splits"]
    }


def paths(splits, role: str) -> list[str]:
    """Return the paths of the images of a role."""
    return [image["path"] for image in splits[role]["image"]]
