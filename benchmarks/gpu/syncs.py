"""Measure synchronizations, kernels, augmentation on the device, and the data loader.

python syncs.py SECONDS
"""

import sys
import time
import traceback
import warnings
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import torch
from contenders import Case, train_with_hfvit
from kit import CUDA, DATA, DEVICE, TINY, TimeBudget, attempt, exit_now, record, synchronize
from step_clock import StepClock
from torch.profiler import ProfilerActivity

SMALL = str(DATA / "small")
BATCH = 8 if TINY else 128
SMALL_VIT = {"architecture": "vit_tiny_patch16_224", "model_args": {"patch_size": 4, "depth": 4}, "image_size": 32}
TINY_VIT = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"depth": 2, "embed_dim": 64, "num_heads": 2},
    "image_size": 64,
}
VIT_S = TINY_VIT if TINY else {"architecture": "vit_small_patch16_224"}
EVERYTHING = {
    "policy": "rand_augment",
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
    "random_erasing": 0.25,
    "ema_decay": 0.99,
    "drop_path_rate": 0.1,
}
WATCHED_STEPS = (4, 10)
PROFILED_STEPS = (6, 9)
LIBRARIES = ("hfvit", "transformers/", "accelerate/", "timm/")
POLICIES = ("basic", "trivial_augment", "three_augment", "rand_augment")
FILTERS = ("bicubic", "bilinear", "lanczos")
DATA_CONFIG = {
    "input_size": (3, 224, 224),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}
WORKERS = {"small": (0, 1), "large": (0, 1)} if TINY else {"small": (0, 1, 2), "large": (8, 15)}
LOADER_SECONDS = 2.5


class SyncClock(StepClock):
    """Enable PyTorch's synchronization warnings between two steps."""

    def step(self) -> None:
        super().step()
        if CUDA and self.done in WATCHED_STEPS:
            torch.cuda.set_sync_debug_mode("warn" if self.done == WATCHED_STEPS[0] else "default")


class SyncCounter:
    """Count synchronization warnings by the nearest lines of hfvit and its libraries."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def showwarning(self, message: Warning | str, *_, **__) -> None:
        """Replace `warnings.showwarning`."""
        if "synchroniz" not in str(message).lower():
            return
        frames = [f for f in traceback.extract_stack() if any(name in f.filename for name in LIBRARIES)]
        lines = [f"{frame.filename.split('site-packages/')[-1]}:{frame.lineno}" for frame in reversed(frames[-4:])]
        self.counts[" < ".join(lines)] += 1


def count_waits(name: str, recipe: dict[str, Any]) -> None:
    """Record all waits for the GPU in six training steps, with the lines that cause them.

    Args:
        name: name of the result.
        recipe: recipe keys of the run.
    """
    first, last = WATCHED_STEPS
    subject = Case(
        "", "", batch_size=BATCH, warm_up=2, steps=last - 2, recipe={"max_steps": last + 2, **recipe}, **SMALL_VIT
    )
    counter = SyncCounter()
    error = None
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = counter.showwarning
        try:
            train_with_hfvit(subject, SMALL, SyncClock(subject.warm_up, subject.steps, subject.batch_size))
        except Exception as raised:  # e.g. NonFiniteLossError; waits until then are recorded
            error = f"{type(raised).__name__}: {str(raised)[:300]}"
        finally:
            if CUDA:
                torch.cuda.set_sync_debug_mode("default")
    most = counter.counts.most_common(12)
    record("syncs", name=name, steps=last - first, waits=counter.counts.total(), where=dict(most), error=error)
    for where, count in most:
        print(f"   {count:4d}  {where}", flush=True)


class ProfilerClock(StepClock):
    """Profile the steps between two steps."""

    def __init__(self, warm_up: int, steps: int, batch_size: int):
        super().__init__(warm_up, steps, batch_size)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
        self.profiler = torch.profiler.profile(activities=activities)
        self.profiled_seconds = 0.0

    def step(self) -> None:
        super().step()
        if self.done == PROFILED_STEPS[0]:
            synchronize()
            self.profiler.start()
            self.profiled_seconds -= time.perf_counter()
        elif self.done == PROFILED_STEPS[1]:
            synchronize()
            self.profiled_seconds += time.perf_counter()
            self.profiler.stop()

    def kernels(self) -> list[tuple[float, float, str]]:
        """Return (milliseconds per step, calls per step, name) of kernels (on a CPU: operators), longest first."""
        steps = PROFILED_STEPS[1] - PROFILED_STEPS[0]
        found = []
        for event in self.profiler.key_averages():
            on_device = event.device_type == torch.autograd.DeviceType.CUDA
            microseconds = event.self_device_time_total if CUDA else event.self_cpu_time_total
            if on_device == CUDA and microseconds:
                found.append((microseconds / 1000 / steps, event.count / steps, event.key[:90]))
        return sorted(found, reverse=True)


def profile_step() -> None:
    """Record the time of each kernel in a training step of a ViT-S."""
    steps = PROFILED_STEPS[1] - PROFILED_STEPS[0]
    subject = Case("", "", batch_size=BATCH, warm_up=4, steps=6, recipe={"bf16": True}, **VIT_S)
    clock = ProfilerClock(subject.warm_up, subject.steps, subject.batch_size)
    train_with_hfvit(subject, SMALL, clock)
    step_ms = 1000 * clock.profiled_seconds / steps
    kernels = clock.kernels()
    device_ms = sum(milliseconds for milliseconds, _, _ in kernels)
    record(
        "profile",
        name=f"S bf16 {BATCH}",
        step_ms=step_ms,
        device_ms=device_ms,
        busy=device_ms / step_ms,
        kernels_a_step=sum(calls for _, calls, _ in kernels),
        top=[[round(milliseconds, 3), round(calls, 1), name] for milliseconds, calls, name in kernels[:30]],
    )
    for milliseconds, calls, name in kernels[:18]:
        print(f"   {milliseconds:8.3f} ms  {calls:6.1f}x  {name}", flush=True)


def compare_augmentation() -> None:
    """Record each policy's time on the device, and its largest pixel difference from the CPU."""
    from accelerate.utils import send_to_device

    from hfvit.transforms.augmentation import Augmentation

    images = random_images()
    repeats = 2 if TINY else 20
    seeds = np.random.default_rng(1).integers(2**63, size=len(images), dtype=np.uint64)
    for policy in POLICIES:
        on_cpu, on_device = (Augmentation((224, 224), (0.5,) * 3, (0.25,) * 3, policy=policy) for _ in range(2))
        on_device.to(DEVICE)
        batch = {"images": images, "plan": on_cpu.sample(seeds, *images.shape[1:3])}
        device_batch = send_to_device(batch, DEVICE)
        expected = on_cpu(batch)
        differences = {}
        for mode in ("ieee", "tf32"):
            torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
            torch.backends.cudnn.allow_tf32 = mode == "tf32"
            difference = (on_device(device_batch).cpu() - expected).abs().max().item()
            differences[f"max difference {mode}"] = difference
        for _ in range(3):
            on_device(device_batch, torch.bfloat16)
        synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            on_device(device_batch, torch.bfloat16)
        enqueued = time.perf_counter() - start
        synchronize()
        seconds = time.perf_counter() - start
        record("pixels", name=policy, ms=1000 * seconds / repeats, host_ms=1000 * enqueued / repeats, **differences)


def compare_preprocessing() -> None:
    """Record whether evaluation computes equal pixels on CPU and device, for each filter."""
    from timm.data import resolve_data_config

    from hfvit.transforms.preprocessing import Preprocessing

    images = random_images()
    for name in FILTERS:
        config = resolve_data_config({"input_size": (3, 224, 224), "crop_pct": 1.0, "interpolation": name})
        expected = Preprocessing(config)({"images": images})
        found = Preprocessing(config).to(DEVICE)({"images": images.to(DEVICE)}).cpu()
        record(
            "pixels",
            name=f"evaluation {name}",
            equal=torch.equal(found, expected),
            difference=(found - expected).abs().max().item(),
        )


def random_images() -> torch.Tensor:
    """Create uint8 noise (images, height, width, 3)."""
    count = 16 if TINY else 256
    return torch.from_numpy(np.random.default_rng(0).integers(0, 255, (count, 32, 32, 3), dtype=np.uint8))


def measure_loader() -> None:
    """Record images/s of the loader by number of workers, with cached small and decoded large images."""
    from torch.utils.data import DataLoader

    from hfvit.data.dataset import collate, image_datasets
    from hfvit.data.factory import load_splits
    from hfvit.data.samplers import EpochSampler
    from hfvit.recipe.arguments import DataArguments
    from hfvit.transforms.augmentation import Augmentation

    for kind, worker_counts in WORKERS.items():
        splits = load_splits(DataArguments(str(DATA / kind), validation_split="validation", test_split=None))
        augmentation = Augmentation.from_config(DATA_CONFIG, policy="trivial_augment")
        dataset = image_datasets(splits, DATA_CONFIG, augmentation, show_progress=False)["train"]
        for workers in worker_counts:
            loader = DataLoader(
                dataset,
                BATCH,
                sampler=EpochSampler(len(dataset), BATCH, seed=0),
                num_workers=workers,
                collate_fn=collate,
                pin_memory=CUDA,
            )
            record("loader", name=kind, workers=workers, ips=images_per_second(iter(loader)))


def images_per_second(batches) -> float:
    """Measure images/s of an iterator over batches of `BATCH` images, after three batches."""
    for _ in range(3):
        next(batches)
    images = 0
    start = time.perf_counter()
    for _ in batches:
        images += BATCH
        if time.perf_counter() - start > LOADER_SECONDS:
            break
    return images / (time.perf_counter() - start)


def main(seconds: float) -> None:
    budget = TimeBudget(seconds)
    cases = {"plain bf16": {"bf16": True}, "everything bf16": {"bf16": True, **EVERYTHING}}
    if CUDA:
        cases["plain fp16"] = {"bf16": False, "fp16": True}
        cases["max_grad_norm 0"] = {"bf16": True, "max_grad_norm": 0.0}
    for name, recipe in cases.items():
        attempt("syncs", name, partial(count_waits, name, recipe))
    attempt("pixels", "augmentation", compare_augmentation)
    attempt("pixels", "preprocessing", compare_preprocessing)
    for step, work in (("profile", profile_step), ("loader", measure_loader)):
        if budget.left() > 15:
            attempt(step, step, work)
        else:
            record(step, name=step, skipped="no time")


if __name__ == "__main__":
    main(float(sys.argv[1]))
    exit_now()
