"""Measure training throughput: images/s, step time, memory, data wait and MFU.

python amp.py SECONDS [TEXT ...]

Contenders: `hfvit`, HFViTTrainer with a recipe; `loop`, a plain loop over one batch on the GPU (the upper bound of
eager PyTorch); `timm`, a loop of timm's parts with timm's loader. The most important rows come first, as many as fit
into SECONDS. Each TEXT selects the rows whose names contain it.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from contenders import CONTENDERS, LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, Case
from images import CLASSES
from kit import CUDA, DATA, DEVICE, TINY, TimeBudget, attempt, exit_now, record
from step_clock import StepClock

from hfvit.training.throughput import datasheet_rate

PRECISION_OPTIONS = {
    "bf16": {"bf16": True},
    "fp16": {"bf16": False, "fp16": True},
    "tf32": {"bf16": False, "tf32": True},
    "ieee": {"bf16": False, "tf32": False},
}
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

SMALL = str(DATA / "small")
LARGE = str(DATA / "large")
STEPS = {"warm_up": 1, "steps": 2} if TINY else {"warm_up": 6, "steps": 20}
FEW_STEPS = {"warm_up": 1, "steps": 2} if TINY else {"warm_up": 6, "steps": 8}
LOW_BATCH, BATCH, HIGH_BATCH = (4, 4, 8) if TINY else (64, 128, 256)
TINY_ARGS = {"depth": 2, "embed_dim": 64, "num_heads": 2}
TINY_MODEL = {"architecture": "vit_tiny_patch16_224", "model_args": TINY_ARGS, "image_size": 64}
VIT_B = TINY_MODEL if TINY else {"architecture": "vit_base_patch16_224"}
VIT_S = TINY_MODEL if TINY else {"architecture": "vit_small_patch16_224"}
VIT_TI = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"patch_size": 4, **(TINY_ARGS if TINY else {})},
    "image_size": 32,
}
RECIPE = {
    "policy": "trivial_augment",
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
    "ema_decay": 0.9998,
    "drop_path_rate": 0.1,
    "label_smoothing_factor": 0.1,
}
HEAVY = {"policy": "rand_augment", "mixup_alpha": 0.8, "random_erasing": 0.25, "ema_decay": 0.9998}
EAGER_ROW_SECONDS = 12
COMPILED_ROW_SECONDS = 12 if TINY else 70


@dataclass(frozen=True)
class Row:
    """Measurement of a contender on a case."""

    name: str
    contender: str
    case: Case
    folder: str = SMALL
    compiled: bool = False


@dataclass
class Reference:
    """FLOPs and rates from hfvit's rows, for the MFU of the other contenders."""

    flops_per_image: dict[tuple[str, int], float] = field(default_factory=dict)
    matmul_flops: dict[str, float] = field(default_factory=dict)


def case(model: dict[str, Any], batch_size: int, precision: str = "bf16", **settings: Any) -> Case:
    """Create the case of a model in a precision.

    Args:
        model: fields of `Case` for the network.
        batch_size: images per step.
        precision: `bf16`, `fp16`, `tf32` or `ieee`.
        settings: further fields of `Case`.
    """
    options = PRECISION_OPTIONS[precision] if CUDA else {"bf16": precision == "bf16"}
    recipe = {"seed": 0, **options, **settings.pop("recipe", {})}
    fields = {**STEPS, **model, **settings}
    return Case("", "", batch_size=batch_size, precision=precision, recipe=recipe, **fields)


def rows() -> Iterator[Row]:
    """Yield all rows, the most important first."""
    for letter, model in (("B", VIT_B), ("S", VIT_S)):
        for contender in ("hfvit", "loop", "timm"):
            yield Row(f"{letter} bf16 128", contender, case(model, BATCH))
    yield Row("Ti/4 32px recipe 128", "hfvit", case(VIT_TI, BATCH, recipe=RECIPE))
    yield from with_loop("Ti/4 32px plain 128", case(VIT_TI, BATCH))
    for precision in ("fp16", "tf32"):
        yield from with_loop(f"B {precision} 128", case(VIT_B, BATCH, precision))
    yield from compiled("B bf16+compile 128", VIT_B)
    for contender in ("hfvit", "timm"):
        yield Row("S from 500x375 JPEG", contender, case(VIT_S, BATCH), LARGE)
    yield Row("S rand_augment+erasing", "hfvit", case(VIT_S, BATCH, recipe=HEAVY))
    for letter, model in (("B", VIT_B), ("S", VIT_S)):
        yield from with_loop(f"{letter} bf16 256", case(model, HIGH_BATCH))
        yield from with_loop(f"{letter} bf16 64", case(model, LOW_BATCH))
    yield from compiled("S bf16+compile 128", VIT_S)
    yield Row("B bf16 checkpointing 256", "hfvit", case(VIT_B, HIGH_BATCH, checkpointing=True))
    yield Row("Ti/4 32px recipe 512", "hfvit", case(VIT_TI, 4 * BATCH, recipe=RECIPE))
    yield from with_loop("B ieee 64", case(VIT_B, LOW_BATCH, "ieee", **FEW_STEPS))
    for precision in ("fp16", "tf32", "ieee"):
        yield from with_loop(f"S {precision} 128", case(VIT_S, BATCH, precision))


def with_loop(name: str, subject: Case) -> Iterator[Row]:
    """Yield the rows of hfvit and the plain loop."""
    for contender in ("hfvit", "loop"):
        yield Row(name, contender, subject)


def compiled(name: str, model: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows of hfvit and the plain loop with `torch.compile`."""
    subject = case(model, BATCH, recipe={"torch_compile": True})
    for contender in ("hfvit", "loop"):
        yield Row(name, contender, subject, compiled=True)


def train_in_loop(row: Row, clock: StepClock) -> None:
    """Train on one batch on the device: forward, backward, clip, fused AdamW."""
    import timm

    subject = row.case
    torch.backends.cuda.matmul.allow_tf32 = subject.precision != "ieee"
    model = timm.create_model(
        subject.architecture, num_classes=CLASSES, img_size=subject.image_size, **subject.model_args
    )
    model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    forward = torch.compile(model) if row.compiled else model
    dtype = AUTOCAST_DTYPES.get(subject.precision)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=CUDA and subject.precision == "fp16")
    pixel_values = torch.randn(subject.batch_size, 3, subject.image_size, subject.image_size, device=DEVICE)
    labels = torch.randint(0, CLASSES, (subject.batch_size,), device=DEVICE)
    clock.begin()
    for _ in range(subject.warm_up + subject.steps):
        with torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
            logits = forward(pixel_values)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        clock.step()


def measure(row: Row, reference: Reference) -> None:
    """Measure and record a row."""
    subject = row.case
    torch.compiler.reset()
    clock = StepClock(subject.warm_up, subject.steps, subject.batch_size)
    error = None
    try:
        if row.contender == "loop":
            train_in_loop(row, clock)
        else:
            CONTENDERS[row.contender](subject, row.folder, clock)
    except Exception as raised:  # e.g. NonFiniteLossError after the last step, when the measurement is complete
        if clock.done < subject.warm_up + subject.steps:
            raise
        error = f"{type(raised).__name__}: {str(raised)[:300]}"
    figures = clock.figures()
    images_per_second = figures["images/s"]
    record(
        "amp",
        name=row.name,
        who=row.contender,
        arch=subject.architecture,
        batch=subject.batch_size,
        precision=subject.precision,
        compiled=row.compiled,
        ips=images_per_second,
        step_ms=1000 * subject.batch_size / images_per_second,
        waiting=figures["waiting"],
        workers=figures["workers"],
        peak_mib=figures["peak MiB"],
        **utilization(row, figures, reference),
        error=error,
    )


def utilization(row: Row, figures: dict[str, Any], reference: Reference) -> dict[str, float | None]:
    """Compute FLOP/s of the model, and MFU relative to a matrix product and to the datasheet.

    Args:
        row: the measurement.
        figures: results of its `StepClock`; those of hfvit include FLOPs per image and the rate of a matrix product.
        reference: stores the values of hfvit for the other contenders.
    """
    network = (row.case.architecture, row.case.image_size)
    precision = "bf16" if row.case.precision in AUTOCAST_DTYPES else row.case.precision
    if figures["flops"]:
        reference.flops_per_image[network] = figures["flops"]
    if figures["peak flops"]:
        reference.matmul_flops[precision] = figures["peak flops"]
    flops = reference.flops_per_image.get(network)
    if not flops:
        return {}
    rate = figures["images/s"] * flops
    matmul = reference.matmul_flops.get(precision)
    datasheet = datasheet_rate(DEVICE, torch.bfloat16)
    return {
        "gflop_image": flops / 1e9,
        "tflops": rate / 1e12,
        "mfu_measured": rate / matmul if matmul else None,
        "mfu_datasheet": rate / datasheet if datasheet else None,
    }


def main(seconds: float, selected: list[str]) -> None:
    budget = TimeBudget(seconds)
    reference = Reference()
    for row in rows():
        if selected and not any(text in row.name for text in selected):
            continue
        if budget.left() < (COMPILED_ROW_SECONDS if row.compiled else EAGER_ROW_SECONDS):
            record("amp", name=row.name, who=row.contender, skipped="no time")
            continue
        attempt("amp", f"{row.name} {row.contender}", partial(measure, row, reference))


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
    exit_now()
