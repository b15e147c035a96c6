"""Measure streams of millions of rows: start, memory of a process, and resume.

python stream_scale.py [--rows 2000000] [--used 0.9] [--index_rows 14000000]

Rows are Parquet files of one tiny PNG, so that reading and not decoding is measured, and a generated index without
pixels in 1,400 shards, as ImageNet-21k would have.
"""

import argparse
import io
import itertools
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet
from datasets import ClassLabel, Features, Image, IterableDataset, Value
from PIL import Image as PillowImage

from hfvit.data.stream import ImageStream
from hfvit.data.stream_splits import stream_splits
from hfvit.recipe.arguments import DataArguments
from hfvit.transforms.augmentation import Augmentation

CLASSES = 21_841
FILES = 8
INDEX_SHARDS = 1_400
BATCH = 256
BUFFER = 10_000
ROW_GROUP = 10_000


def png() -> bytes:
    """Return a tiny PNG."""
    file = io.BytesIO()
    PillowImage.fromarray(np.zeros((2, 2, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_rows(folder: Path, rows: int) -> None:
    """Write Parquet files with integer labels, and a validation split of a file."""
    features = Features({"image": Image(), "label": Value("int64")})
    for name, count in [*((f"train-{number:02d}", rows // FILES) for number in range(FILES)), ("validation-00", 10)]:
        labels = pa.array(np.arange(count) % CLASSES)
        images = pa.StructArray.from_arrays(
            [pa.array([png()] * count), pa.nulls(count, pa.string())], ["bytes", "path"]
        )
        table = pa.table({"image": images, "label": labels}).cast(features.arrow_schema)
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=ROW_GROUP)


def make_stream(split: IterableDataset, images: int, process: int = 0, processes: int = 1) -> ImageStream:
    """Create the stream of a process without data workers.

    Args:
        split: the split.
        images: number of rows.
        process: index of the process.
        processes: number of processes.
    """
    augmentation = Augmentation((8, 8), [0.5] * 3, [0.5] * 3)
    options = {"batch_size": BATCH, "buffer_size": BUFFER, "process": process, "processes": processes}
    return ImageStream(split, "train", images, CLASSES, augmentation, **options)


def seconds_to_first_batch(stream: ImageStream) -> float:
    started = time.perf_counter()
    next(iter(stream))
    return time.perf_counter() - started


def memory_mib() -> float:
    return psutil.Process().memory_info().rss / 2**20


def measure_resume(rows: int, used: float) -> None:
    """Use a part of an epoch, and compare its time with that of a resume after it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, rows)
        data = DataArguments(name, class_names=[str(CLASSES)], validation_split="validation", streaming=True)
        split = stream_splits(data).train
        stream = make_stream(split, rows)
        print(f"{rows:,} rows in {split.num_shards} files: {seconds_to_first_batch(stream):.1f} s to the first batch")
        started = time.perf_counter()
        count = int(rows * used) // BATCH * BATCH
        (sample,) = deque(itertools.islice(stream.samples(), count), maxlen=1)
        reading = time.perf_counter() - started
        stream.positions[0] = sample.position[1:]
        stream.save_state(folder, 0, [stream.state()])
        for processes in (1, 3):
            resumed = make_stream(split, rows, 0, processes)
            started = time.perf_counter()
            resumed.load_state(folder, 0)
            next(iter(resumed))
            seconds = time.perf_counter() - started
            print(
                f"after {count:,} rows, read in {reading:.1f} s: {seconds:.1f} s to the next batch on {processes}"
                f" process{'es' if processes > 1 else ''}; stream.json has {(folder / 'stream.json').stat().st_size:,}"
                " bytes"
            )


def index_rows(shards: list[range], image: bytes) -> Iterator[dict]:
    """Yield generated rows."""
    for rows in shards:
        for row in rows:
            yield {"image": {"bytes": image, "path": None}, "label": row % CLASSES}


def measure_index(rows: int) -> None:
    """Open a generated index as the first of several processes."""
    shards = [range(start, min(start + rows // INDEX_SHARDS, rows)) for start in range(0, rows, rows // INDEX_SHARDS)]
    names = [str(index) for index in range(CLASSES)]
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=names)})
    for processes in (1, 8, 64):
        before = memory_mib()
        started = time.perf_counter()
        generator = {"shards": shards, "image": png()}
        split = IterableDataset.from_generator(index_rows, features=features, gen_kwargs=generator)
        split = split.cast_column("label", Value("int64"))
        stream = make_stream(split, rows, 0, processes)
        seconds = time.perf_counter() - started + seconds_to_first_batch(stream)
        print(
            f"{rows:,} rows in {split.num_shards:,} shards, process 1 of {processes}: {seconds:.1f} s to the first"
            f" batch, {memory_mib():,.0f} MiB resident ({memory_mib() - before:+,.0f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--used", type=float, default=0.9)
    parser.add_argument("--index_rows", type=int, default=14_000_000)
    options = parser.parse_args()
    measure_index(options.index_rows)
    measure_resume(options.rows, options.used)


if __name__ == "__main__":
    main()
