"""Write the data sets of the other steps: CIFAR-10 for all contenders, and large JPEGs.

python prep.py CIFAR10_FOLDER
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
from images import LARGE, generate
from kit import DATA, TINY, record

LARGE_IMAGES = 48 if TINY else 3072
TIMED_VALIDATION_IMAGES = 64  # validation images; evaluation is not measured


def rename_image_column(source: Path, target: Path, rows: int | None = None) -> None:
    """Copy a Parquet file with its column `img` renamed to `image`, as timm expects.

    Args:
        source: parquet file with the columns `img` and `label` and the features of `datasets` in its metadata.
        target: file to write.
        rows: number of rows to copy; None copies all.
    """
    table = pq.read_table(source)
    metadata = json.loads(table.schema.metadata[b"huggingface"])
    features = metadata["info"]["features"]
    metadata["info"]["features"] = {new_name(name): feature for name, feature in features.items()}
    table = table.rename_columns([new_name(name) for name in table.column_names])
    table = table.replace_schema_metadata({b"huggingface": json.dumps(metadata).encode()})
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.slice(0, rows), target)


def set_times(folder: Path) -> None:
    """Derive the modification times of Parquet files from their contents.

    hfvit identifies a local data set by paths, sizes and modification times, so a run only resumes on another machine
    if the same files have the same times there.

    Args:
        folder: folder whose files are changed, also those in its subfolders.
    """
    for file in folder.rglob("*.parquet"):
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        seconds = int(digest[:7], 16)  # a time before July 1978
        os.utime(file, (seconds, seconds))


def new_name(column: str) -> str:
    return "image" if column == "img" else column


def main(cifar10: Path) -> None:
    started = time.monotonic()
    train, test = (next(cifar10.glob(f"**/{split}-*.parquet")) for split in ("train", "test"))
    timed = DATA / "small" / "data"
    rename_image_column(train, timed / "train-00000-of-00001.parquet", 512 if TINY else None)
    rename_image_column(test, timed / "validation-00000-of-00001.parquet", TIMED_VALIDATION_IMAGES)
    whole = DATA / "cifar10" / "data"
    rename_image_column(train, whole / "train-00000-of-00001.parquet", 512 if TINY else None)
    rename_image_column(test, whole / "test-00000-of-00001.parquet", 128 if TINY else None)
    generate(LARGE, LARGE_IMAGES, DATA / "large")
    for name in ("small", "cifar10", "large"):
        set_times(DATA / name)
    record("prep", seconds=time.monotonic() - started)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
