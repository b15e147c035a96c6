"""Speed and host cost of training input: hfvit, timm's loader, transformers' example script.

  python benchmarks/input_pipeline.py                     # minutes, on an idle machine
  python benchmarks/input_pipeline.py --quick             # under a minute, to check that it works
  python benchmarks/input_pipeline.py --json rows.json

All make the same: batches of 224x224 pixels from the same Parquet files, by a random crop of 80 to 100 % of the area,
bicubic resize, horizontal flip and normalization. Two kinds of images: 32x32 PNG, which hfvit decodes once into an
array, and 500x375 JPEG, which all decode every time.

Two measurements of each, one after the other in the same process, after warm-up batches:

  end to end   images per second until a float tensor (batch, 3, 224, 224) is ready, all on the CPU
  host         CPU seconds (all processes, system time included) per 1,000 images up to the transfer to a GPU: hfvit's
               uint8 batch with sampled crops, timm's uint8 batch, the example script's float batch; and the bytes of
               that batch

hfvit resizes small images on the device, so its host figure excludes that work; the end-to-end figure includes it.
hfvit's bf16 rows are the input of a bf16 training; timm and the example script always make float32. The machine must
be idle, as threads that wait for a busy core spin, which counts as CPU time.
"""

import os
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
from common import answer, in_own_process, interleaved, medians, parse_options, report, spread, workspace
from peers import MEAN, SCALE, STD, stack, timm_dataset, timm_loader, transformed_dataset
from pictures import KINDS, LARGE, SMALL, generate

IMAGE_SIZE = 224
DATA_CONFIG = {
    "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
    "mean": MEAN,
    "std": STD,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}
WORKERS = (2, 0)  # in this order: what hfvit asks of the memory without workers stays with its process
COLUMNS = {
    "pictures": "",
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

    def __init__(self, folder: str):
        import datasets

        from hfvit.data.dataset import image_datasets
        from hfvit.data.factory import load_splits
        from hfvit.recipe.arguments import DataArguments
        from hfvit.transforms.augmentation import Augmentation

        splits = load_splits(DataArguments(folder, validation_split="validation", test_split=None))
        self.augmentation = Augmentation.from_config(DATA_CONFIG, crop_scale=SCALE)
        # An empty cache for the pixels alone: decoding them is timed, turning parquet into Arrow is not.
        self.cache = tempfile.TemporaryDirectory()
        datasets.config.HF_DATASETS_CACHE = self.cache.name
        start = time.perf_counter()
        self.dataset = image_datasets(splits, DATA_CONFIG, self.augmentation, show_progress=False)["train"]
        seconds = time.perf_counter() - start
        images = len(splits.train) + len(splits.validation)
        self.decode_once = None if self.dataset.decodes else seconds / images * 1000

    def host_loader(self, batch_size: int, workers: int):
        """Batches as they are sent to the device."""
        from torch.utils.data import DataLoader

        from hfvit.data.dataset import collate
        from hfvit.data.samplers import EpochSampler

        sampler = EpochSampler(len(self.dataset), batch_size, seed=0)
        return DataLoader(self.dataset, batch_size, sampler=sampler, num_workers=workers, collate_fn=collate)

    def float_batches(self, batch_size: int, workers: int, precision: str):
        """Pixel values, ready for the model."""
        import torch

        from hfvit.utils.environment import keep_freed_memory

        if workers == 0:
            keep_freed_memory()  # as train.py does; the peers run in processes of their own
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        return (self.augmentation(batch, dtype) for batch in self.host_loader(batch_size, workers))


class Timm:
    """Create timm's dataset and loader, which normalizes on the device."""

    precisions = ("fp32",)
    decode_once = None

    def __init__(self, folder: str):
        self.dataset = timm_dataset(folder)

    def host_loader(self, batch_size: int, workers: int):
        return timm_loader(self.dataset, IMAGE_SIZE, batch_size, workers, "cpu").loader

    def float_batches(self, batch_size: int, workers: int, precision: str):
        return (pixels for pixels, _ in timm_loader(self.dataset, IMAGE_SIZE, batch_size, workers, "cpu"))


class ExampleScript:
    """transformers' run_image_classification.py: torchvision transforms in the data set, a collate that stacks."""

    precisions = ("fp32",)
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


CONTENDERS = {"hfvit": HFViT, "timm": Timm, "example script": ExampleScript}


def measure(
    contender: str, folders: dict[str, str], batch_size: int, seconds: float, warm_up: int, **_
) -> dict[str, dict]:
    """Every cell of one contender, `"kind, workers, precision"` -> figures; `folders`: data set of each kind."""
    import torch

    from hfvit.utils.environment import cores

    torch.set_num_threads(cores())
    cells = {}
    for kind, folder in folders.items():
        subject = CONTENDERS[contender](folder)
        for workers in WORKERS:
            # A loader of its own for each figure: none begins with what another's workers had prefetched.
            loader = subject.host_loader(batch_size, workers)
            images, _, cpu = timed(loader, warm_up, seconds, batch_size)
            host = {
                "host CPU s/1000": cpu / images * 1000,
                "bytes/image": tensor_bytes(next(iter(loader))) / batch_size,
                "decode once s/1000": subject.decode_once,
            }
            del loader
            for precision in subject.precisions:
                images, elapsed, _ = timed(subject.float_batches(batch_size, workers, precision), warm_up, seconds)
                cells[f"{kind}, {workers}, {precision}"] = {"images/s": images / elapsed, **host}
    return cells


def timed(batches, warm_up: int, seconds: float, batch_size: int | None = None) -> tuple[int, float, float]:
    """(images, seconds, processor seconds) of `seconds` of iteration, or the rest of the epoch, after the warm-up.

    The warm-up starts the workers and fills what they prefetch, so that neither is in the figures.
    """
    iterator = iter(batches)
    for _ in range(warm_up):
        next(iterator)
    children = psutil.Process().children()  # looked up once: that takes longer than a batch of hfvit's
    before, start, images = processor_seconds(children), time.perf_counter(), 0
    for batch in iterator:
        images += batch_size or len(batch)
        elapsed, after = time.perf_counter() - start, processor_seconds(children)  # workers leave at the epoch's end
        if elapsed >= seconds:
            break
    return images, elapsed, sum(used - before.get(process, 0.0) for process, used in after.items())


def processor_seconds(children: list) -> dict[int, float]:
    """User and system seconds of this process and of each of its `children`, so far."""
    used = {os.getpid(): time.process_time()}
    for child in children:
        with suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            used[child.pid] = times.user + times.system
    return used


def tensor_bytes(batch) -> int:
    """Bytes of all tensors of a nested batch: what is sent to the device."""
    if hasattr(batch, "untyped_storage"):
        return batch.numel() * batch.element_size()
    if isinstance(batch, dict):
        return sum(map(tensor_bytes, batch.values()))
    return sum(map(tensor_bytes, batch)) if isinstance(batch, list | tuple) else 0


def ratio_note(pictures: str, rows: list[dict]) -> str:
    """hfvit against the better peer, each at the number of workers that suits it best."""
    rows = [row for row in rows if row["pictures"] == pictures]
    peers = [row for row in rows if not row["contender"].startswith("hfvit")]
    fastest = max(peers, key=lambda row: row["images/s"])
    cheapest = min(peers, key=lambda row: row["host CPU s/1000"])
    parts = []
    for contender in ("hfvit fp32", "hfvit bf16"):
        own = max((row for row in rows if row["contender"] == contender), key=lambda row: row["images/s"])
        parts.append(f"{contender} {own['images/s'] / fastest['images/s']:.2f}x")
    own = min((row for row in rows if row["contender"] == "hfvit fp32"), key=lambda row: row["host CPU s/1000"])
    return (
        f"{pictures}: images/s of the fastest peer ({fastest['contender']}, {fastest['workers']} workers):"
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
        folders = {kind: str(work / f"pictures{number}") for number, kind in enumerate(counts)}
        for kind, count in counts.items():
            generate(KINDS[kind], count, Path(folders[kind]))
        # One process a contender and kind, for finer interleaving; --quick saves the imports.
        groups = [folders] if options.quick else [{kind: folder} for kind, folder in folders.items()]
        jobs = {
            f"{contender}, {' and '.join(group)}": {"contender": contender, "folders": group, **shape}
            for group in groups
            for contender in CONTENDERS
        }
        results = interleaved(jobs, options.rounds, partial(in_own_process, __file__, cache=work / "cache"))

    rows = []
    for name, rounds in results.items():
        for cell in rounds[0]:
            kind, workers, precision = cell.split(", ")
            contender = name.split(", ")[0]
            contender = f"hfvit {precision}" if contender == "hfvit" else contender
            figures = [cells[cell] for cells in rounds]
            rows.append({"pictures": kind, "contender": contender, "workers": int(workers), **medians(figures)})
            rows[-1]["spread"] = spread([figure["images/s"] for figure in figures])
    rows.sort(key=lambda row: list(counts).index(row["pictures"]))
    notes = [f"batch {shape['batch_size']}, {IMAGE_SIZE} px"]
    notes += [f"{kind}: {count:,} generated pictures" for kind, count in counts.items()]
    report("Input pipeline", options, rows, COLUMNS, notes + [ratio_note(kind, rows) for kind in counts])


if __name__ == "__main__":
    main()
