"""Throughput and CPU time of the input pipelines of hfvit and its peers.

The peers are timm, transformers' example script, torchvision's v2 transforms and DALI.

  python benchmarks/input_pipeline.py                     # minutes, on an idle machine
  python benchmarks/input_pipeline.py --quick             # under a minute, only to test the script
  python benchmarks/input_pipeline.py --json rows.json

All contenders produce the same batches of 224x224 pixels from the same parquet files: random crop of 80 to 100 % of
the area, bicubic resize, horizontal flip, normalization. There are two kinds of images: 32x32 PNG, which hfvit decodes
only once into an array, and 500x375 JPEG, which all decode in every epoch.

Two measurements of each, in the same process, after warm-up batches:

  end to end   images per second until a float tensor (batch, 3, 224, 224) is ready, all on the CPU
  host         CPU seconds (all processes, user and system) per 1,000 images until the transfer to a GPU: hfvit's uint8
               batch and crop parameters, the example script's float batch, the others' uint8 batch; and the bytes of
               that batch

hfvit resizes small images on the device, which `host` does not include but `end to end` does. hfvit's bf16 rows are
the input of a bf16 training; its peers produce float32 for any precision. The machine must be idle, since threads that
wait for a busy core spin and count as CPU time.

DALI runs on the CPU, with as many threads as the others have workers, if `nvidia-dali-cuda120` or
`nvidia-dali-cuda130` is installed; neither needs a GPU.
"""

import os
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
from common import answer, in_own_process, interleaved, medians, parse_options, report, spread, workspace
from images import KINDS, LARGE, SMALL, generate
from peers import (
    MEAN,
    SCALE,
    STD,
    dali_loader,
    has_dali,
    normalized,
    stack,
    timm_dataset,
    timm_loader,
    transformed_dataset,
    v2_dataset,
)

IMAGE_SIZE = 224
DATA_CONFIG = {
    "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
    "mean": MEAN,
    "std": STD,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}
WORKERS = (2, 0)  # in this order, since the memory settings of hfvit without workers stay in effect
COLUMNS = {
    "images": "",
    "contender": "",
    "workers": "d",
    "images/s": ",.0f",
    "spread": ".0%",
    "host CPU s/1000": ".3f",
    "bytes/image": ",.0f",
    "decode once s/1000": ".3f",
}


class HFViT:
    """hfvit's data set, sampler and augmentation, in the loader that the Trainer builds."""

    precisions = ("fp32", "bf16")
    workers = WORKERS

    def __init__(self, folder: str):
        import datasets

        from hfvit.data.dataset import image_datasets
        from hfvit.data.factory import load_splits
        from hfvit.recipe.arguments import DataArguments
        from hfvit.transforms.augmentation import Augmentation

        splits = load_splits(DataArguments(folder, validation_split="validation", test_split=None))
        self.augmentation = Augmentation.from_config(DATA_CONFIG, crop_scale=SCALE)
        # An empty cache for the pixels only: decoding is measured, converting parquet to Arrow is not.
        self.cache = tempfile.TemporaryDirectory()
        datasets.config.HF_DATASETS_CACHE = self.cache.name
        start = time.perf_counter()
        self.dataset = image_datasets(splits, DATA_CONFIG, self.augmentation, show_progress=False)["train"]
        seconds = time.perf_counter() - start
        images = len(splits.train) + len(splits.validation)
        self.decode_once = None if self.dataset.decodes else seconds / images * 1000

    def host_loader(self, batch_size: int, workers: int):
        """Return batches as they are sent to the device."""
        from torch.utils.data import DataLoader

        from hfvit.data.dataset import collate
        from hfvit.data.samplers import EpochSampler

        sampler = EpochSampler(len(self.dataset), batch_size, seed=0)
        return DataLoader(self.dataset, batch_size, sampler=sampler, num_workers=workers, collate_fn=collate)

    def float_batches(self, batch_size: int, workers: int, precision: str):
        """Return batches of pixel values."""
        import torch

        from hfvit.utils.environment import keep_freed_memory

        if workers == 0:
            keep_freed_memory()  # as train.py does; the peers run in other processes
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        return (self.augmentation(batch, dtype) for batch in self.host_loader(batch_size, workers))


class Timm:
    """timm's data set and loader, which normalizes on the device."""

    precisions = ("fp32",)
    workers = WORKERS
    decode_once = None

    def __init__(self, folder: str):
        self.dataset = timm_dataset(folder)

    def host_loader(self, batch_size: int, workers: int):
        return timm_loader(self.dataset, IMAGE_SIZE, batch_size, workers, "cpu").loader

    def float_batches(self, batch_size: int, workers: int, precision: str):
        return (pixels for pixels, _ in timm_loader(self.dataset, IMAGE_SIZE, batch_size, workers, "cpu"))


class ExampleScript:
    """Input of transformers' run_image_classification.py: torchvision transforms, stacked."""

    precisions = ("fp32",)
    workers = WORKERS
    decode_once = None

    def __init__(self, folder: str):
        self.dataset = transformed_dataset(folder, IMAGE_SIZE)

    def host_loader(self, batch_size: int, workers: int):
        from torch.utils.data import DataLoader

        return DataLoader(
            self.dataset, batch_size, shuffle=True, num_workers=workers, drop_last=True, collate_fn=stack
        )

    def float_batches(self, batch_size: int, workers: int, precision: str):
        return (batch["pixel_values"] for batch in self.host_loader(batch_size, workers))


class TorchvisionV2:
    """torchvision's v2 transforms, to a uint8 batch that is normalized on the device."""

    precisions = ("fp32",)
    workers = WORKERS
    decode_once = None

    def __init__(self, folder: str, source: str):
        self.dataset = v2_dataset(folder, IMAGE_SIZE, source)

    def host_loader(self, batch_size: int, workers: int):
        from torch.utils.data import DataLoader

        return DataLoader(
            self.dataset, batch_size, shuffle=True, num_workers=workers, drop_last=True, collate_fn=stack
        )

    def float_batches(self, batch_size: int, workers: int, precision: str):
        return (normalized(batch["pixel_values"]) for batch in self.host_loader(batch_size, workers))


class Dali:
    """NVIDIA DALI on the CPU, which normalizes a batch where it is asked to."""

    precisions = ("fp32",)
    workers = WORKERS[:1]  # it decodes in threads, at least one
    decode_once = None

    def __init__(self, folder: str):
        self.folder = folder

    def host_loader(self, batch_size: int, workers: int):
        return dali_loader(self.folder, IMAGE_SIZE, batch_size, workers, normalize=False)

    def float_batches(self, batch_size: int, workers: int, precision: str):
        batches = dali_loader(self.folder, IMAGE_SIZE, batch_size, workers, normalize=True)
        return (batch["pixel_values"] for batch in batches)


CONTENDERS = {
    "hfvit": HFViT,
    "timm": Timm,
    "example script": ExampleScript,
    "v2 PIL": partial(TorchvisionV2, source="PIL"),
    "v2 decode_jpeg": partial(TorchvisionV2, source="decode_jpeg"),
    "v2 with_format": partial(TorchvisionV2, source="torch"),
    "DALI": Dali,
}


def measure(
    contender: str, folders: dict[str, str], batch_size: int, seconds: float, warm_up: int, **_
) -> dict[str, dict]:
    """Measure one contender.

    Args:
        contender: name of the contender.
        folders: kind of images -> data set.
        batch_size: images per batch.
        seconds: duration of each measurement.
        warm_up: batches before a measurement.

    Returns:
        "kind, workers, precision" -> measurements.
    """
    import torch

    from hfvit.utils.environment import cores

    torch.set_num_threads(cores())
    cells = {}
    for kind, folder in folders.items():
        subject = CONTENDERS[contender](folder)
        for workers in subject.workers:
            # A new loader for each measurement, so that none starts with prefetched batches.
            images, _, cpu = timed(subject.host_loader(batch_size, workers), warm_up, seconds, batch_size)
            host = {
                "host CPU s/1000": cpu / images * 1000,
                "bytes/image": tensor_bytes(next(iter(subject.host_loader(batch_size, workers)))) / batch_size,
                "decode once s/1000": subject.decode_once,
            }
            for precision in subject.precisions:
                images, elapsed, _ = timed(subject.float_batches(batch_size, workers, precision), warm_up, seconds)
                cells[f"{kind}, {workers}, {precision}"] = {"images/s": images / elapsed, **host}
    return cells


def timed(batches, warm_up: int, seconds: float, batch_size: int | None = None) -> tuple[int, float, float]:
    """Iterate for `seconds`, or to the end of the epoch, after a warm-up.

    The warm-up includes the start of the workers and the prefetching.

    Args:
        batches: iterable of batches.
        warm_up: number of warm-up batches.
        seconds: duration.
        batch_size: images per batch. Default: the length of a batch.

    Returns:
        (images, seconds, CPU seconds).
    """
    iterator = iter(batches)
    for _ in range(warm_up):
        next(iterator)
    children = psutil.Process().children()  # once, since this takes longer than a batch
    before, start, images = processor_seconds(children), time.perf_counter(), 0
    for batch in iterator:
        images += batch_size or len(batch)
        elapsed, after = time.perf_counter() - start, processor_seconds(children)  # before workers end with the epoch
        if elapsed >= seconds:
            break
    return images, elapsed, sum(used - before.get(process, 0.0) for process, used in after.items())


def processor_seconds(children: list) -> dict[int, float]:
    """Return user and system seconds of this process and its children."""
    used = {os.getpid(): time.process_time()}
    for child in children:
        with suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            used[child.pid] = times.user + times.system
    return used


def tensor_bytes(batch) -> int:
    """Return the bytes of all tensors of a nested batch."""
    if hasattr(batch, "untyped_storage"):
        return batch.numel() * batch.element_size()
    if isinstance(batch, dict):
        return sum(map(tensor_bytes, batch.values()))
    return sum(map(tensor_bytes, batch)) if isinstance(batch, list | tuple) else 0


def ratio_note(kind: str, rows: list[dict]) -> str:
    """Compare hfvit with the better peer, each at its best number of workers."""
    rows = [row for row in rows if row["images"] == kind]
    peers = [row for row in rows if not row["contender"].startswith("hfvit")]
    fastest = max(peers, key=lambda row: row["images/s"])
    cheapest = min(peers, key=lambda row: row["host CPU s/1000"])
    parts = []
    for contender in ("hfvit fp32", "hfvit bf16"):
        own = max((row for row in rows if row["contender"] == contender), key=lambda row: row["images/s"])
        parts.append(f"{contender} {own['images/s'] / fastest['images/s']:.2f}x")
    own = min((row for row in rows if row["contender"] == "hfvit fp32"), key=lambda row: row["host CPU s/1000"])
    return (
        f"{kind}: images/s of the fastest peer ({fastest['contender']}, {fastest['workers']} workers):"
        f" {', '.join(parts)}; host CPU of the cheapest ({cheapest['contender']}, {cheapest['workers']} workers):"
        f" {own['host CPU s/1000'] / cheapest['host CPU s/1000']:.2f}x"
    )


def main(argv: list[str] | None = None) -> None:
    options = parse_options(__doc__, argv, rounds=3)
    if options.worker:
        return answer(measure(**options.worker))
    counts = {SMALL.name: 50_000, LARGE.name: 2_048}
    shape = {"batch_size": 128, "seconds": 4.0, "warm_up": 5}
    if options.quick:
        counts = {SMALL.name: 2_000, LARGE.name: 240}
        shape = {"batch_size": 16, "seconds": 0.3, "warm_up": 5}
    with workspace() as work:
        folders = {kind: str(work / f"images{number}") for number, kind in enumerate(counts)}
        for kind, count in counts.items():
            generate(KINDS[kind], count, Path(folders[kind]))
        # One process per contender and kind, for finer interleaving; --quick uses one per contender.
        groups = [folders] if options.quick else [{kind: folder} for kind, folder in folders.items()]
        jobs = {
            f"{contender}, {' and '.join(group)}": {"contender": contender, "folders": group, **shape}
            for group in groups
            for contender in CONTENDERS
            if contender != "DALI" or has_dali()
        }
        results = interleaved(jobs, options.rounds, partial(in_own_process, __file__, cache=work / "cache"))

    rows = []
    for name, rounds in results.items():
        for cell in rounds[0]:
            kind, workers, precision = cell.split(", ")
            contender = name.split(", ")[0]
            contender = f"hfvit {precision}" if contender == "hfvit" else contender
            figures = [cells[cell] for cells in rounds]
            rows.append({"images": kind, "contender": contender, "workers": int(workers), **medians(figures)})
            rows[-1]["spread"] = spread([figure["images/s"] for figure in figures])
    rows.sort(key=lambda row: list(counts).index(row["images"]))
    notes = [f"batch {shape['batch_size']}, {IMAGE_SIZE} px"]
    notes += [f"{kind}: {count:,} generated images" for kind, count in counts.items()]
    notes += [] if has_dali() else ["DALI: not run, since nvidia-dali-cuda120 or nvidia-dali-cuda130 is not installed"]
    report("Input pipeline", options, rows, COLUMNS, notes + [ratio_note(kind, rows) for kind in counts])


if __name__ == "__main__":
    main()
