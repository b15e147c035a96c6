"""Throughput and memory of training with hfvit, a plain loop of timm's parts, and transformers' Trainer.

  python benchmarks/train_step.py                     # about forty minutes on two idle cores
  python benchmarks/train_step.py --quick             # minutes, only to test the script
  python benchmarks/train_step.py --only fp32         # cases whose name contains this
  python benchmarks/train_step.py --json rows.json

The same timm model from scratch, with the same images, batch size, precision, AdamW, learning rate, weight decay and
gradient clipping, on all cores (or one GPU) of the machine:

  hfvit     HFViTTrainer, built as by hfvit/train.py
  timm      create_dataset, create_loader and create_optimizer_v2, with forward, backward, clip and step
  Trainer   transformers' example script: TimmWrapper, set_transform, stacked batches, the Trainer's defaults

Each measurement runs in a new process. Steps are measured after warm-up steps, without logging, evaluation and saving.
hfvit chooses its number of workers; the peers get as many as hfvit uses to decode images. On a GPU, the rows are
ViT-B/16 at 224 px. On a CPU, hfvit lets glibc keep freed memory, and its peers do not: two cases have the same setting
for all. Another one has torch.compile. `mfu` is relative to the FLOP/s of a large matrix product.
"""

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

from common import answer, in_own_process, interleaved, medians, parse_options, report, spread, workspace
from contenders import CONTENDERS, Case
from images import KINDS, LARGE, SMALL, generate
from step_clock import StepClock

COLUMNS = {
    "case": "",
    "contender": "",
    "workers": ".0f",
    "images/s": ",.1f",
    "spread": ".0%",
    "of best peer": ".2f",
    "waiting": ".1%",
    "mfu": ".1%",
    "peak MiB": ",.0f",
    "of it steps": ",.0f",
}


def cases(quick: bool, cuda: bool) -> list[Case]:
    """Return the cases for this machine."""
    own = ("hfvit",)
    if cuda:
        base = {"architecture": "vit_base_patch16_224", "batch_size": 128, "warm_up": 5, "steps": 3 if quick else 25}
        return [
            Case("ViT-B/16 from 32x32 PNG, bf16", SMALL.name, **base),
            Case("ViT-B/16 from 500x375 JPEG, bf16", LARGE.name, **base),
            Case("ViT-B/16 from 32x32 PNG, bf16, compiled", SMALL.name, compiled=True, **base),
            Case("ViT-B/16 from 32x32 PNG, fp32", SMALL.name, precision="fp32", contenders=own, **base),
            Case("ViT-B/16, bf16, checkpointing", SMALL.name, checkpointing=True, contenders=own, **base),
        ]
    bf16 = "ViT-Ti/4 at 32 px, bf16"
    small = {"model_args": {"patch_size": 4}, "image_size": 32, "batch_size": 128}
    if quick:
        few = {**small, "batch_size": 16, "warm_up": 1, "steps": 3}
        shallow = {**few, "model_args": {"patch_size": 4, "depth": 2}}
        return [
            Case(bf16, SMALL.name, **few),
            Case(f"{bf16}, freed memory kept", SMALL.name, keep_freed_memory=True, contenders=("timm",), **few),
            Case(f"{bf16}, glibc's defaults", SMALL.name, keep_freed_memory=False, contenders=own, **few),
            Case(f"{bf16}, 2 blocks, compiled", SMALL.name, compiled=True, contenders=("hfvit", "timm"), **shallow),
            Case(f"{bf16}, checkpointing", SMALL.name, checkpointing=True, contenders=own, **few),
        ]
    return [
        Case("ViT-Ti/4 at 32 px, fp32", SMALL.name, precision="fp32", **small),
        Case(bf16, SMALL.name, **small),
        Case(f"{bf16}, freed memory kept", SMALL.name, keep_freed_memory=True, **small),
        Case(f"{bf16}, glibc's defaults", SMALL.name, keep_freed_memory=False, **small),
        Case(f"{bf16}, compiled", SMALL.name, compiled=True, **small),
        Case(f"{bf16}, checkpointing", SMALL.name, checkpointing=True, contenders=own, **small),
        Case("ViT-Ti/16 at 224 px from 32x32 PNG, bf16", SMALL.name),
        Case("ViT-Ti/16 at 224 px from 500x375 JPEG, bf16", LARGE.name),
    ]


def measure(contender: str, case: dict[str, Any], folder: str, **_) -> dict[str, Any]:
    """Measure one contender on one case.

    Args:
        contender: name of the contender.
        case: fields of `Case`.
        folder: data set.
    """
    subject = Case(**case)
    clock = StepClock(subject.warm_up, subject.steps, subject.batch_size)
    CONTENDERS[contender](subject, folder, clock)
    return clock.figures()


def compared(case: Case, results: dict[str, list[dict]]) -> list[dict]:
    """Return the rows of a case, relative to the best peer.

    Args:
        case: the case.
        results: contender -> results of all rounds.
    """
    rows = [
        {
            "case": case.name,
            "contender": contender,
            **medians(rounds),
            "spread": spread([figures["images/s"] for figures in rounds]),
        }
        for contender, rounds in results.items()
    ]
    peers = [row["images/s"] for row in rows if row["contender"] != "hfvit"]
    flops, peak = rows[0].pop("flops"), rows[0].pop("peak flops")  # measured by hfvit, the same for all
    for row in rows:
        row["of best peer"] = row["images/s"] / max(peers) if peers else None
        row["mfu"] = row["images/s"] * flops / peak if flops and peak else None
    return rows


def main(argv: list[str] | None = None) -> None:
    only = {"--only": {"metavar": "TEXT", "default": "", "help": "measure the cases whose name contains TEXT"}}
    options = parse_options(__doc__, argv, rounds=3, own_options=only)
    if options.worker:
        return answer(measure(**options.worker))
    import torch

    rows, known = [], cases(options.quick, torch.cuda.is_available())
    measured = [case for case in known if options.only in case.name]
    if not measured:
        sys.exit(f"--only: no case with '{options.only}' (found: {'; '.join(case.name for case in known)})")
    with workspace() as work:
        folders = {}
        for kind in sorted({case.images for case in measured}):
            count = max((c.warm_up + c.steps + 1) * c.batch_size for c in measured if c.images == kind)
            folders[kind] = str(work / kind.replace(" ", "_"))
            generate(KINDS[kind], count, Path(folders[kind]))  # enough for one epoch, so that none starts while timed
        run = partial(in_own_process, __file__, cache=work / "cache")
        for case in measured:
            jobs = {
                name: {"contender": name, "case": dataclasses.asdict(case), "folder": folders[case.images]}
                for name in case.contenders
            }
            print(case.name, file=sys.stderr)
            rows += compared(case, interleaved(jobs, options.rounds, run))
    notes = [f"{case.name}: batch {case.batch_size}, {case.steps} steps after {case.warm_up}" for case in measured]
    report("Training step", options, rows, COLUMNS, notes)


if __name__ == "__main__":
    main()
