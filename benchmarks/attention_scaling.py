"""Time and memory of windowed and full attention over the image size.

  python benchmarks/attention_scaling.py                       # two to four minutes
  python benchmarks/attention_scaling.py --quick               # half a minute, only to test the script
  python benchmarks/attention_scaling.py --json rows.json --plot attention_scaling.png

Untrained timm models in float32, batch size 1, without gradients: Swin-T (28 M parameters, patches of 4 px, windows of
7x7 patches, so its first stage has 16 times as many patches as ViT-S/16), ViT-S/16 and ViT-S/8 (22 M parameters). This
compares two kinds of attention, not libraries.

Exponents are slopes of a line fitted to log(cost) over log(pixels): 1 is linear in the number of pixels, 2 is
quadratic. Memory is the peak resident memory of the process, minus that before the first image.
"""

import math
import resource
import time
from functools import partial
from pathlib import Path

from common import answer, in_own_process, interleaved, medians, parse_options, report, spread, workspace

MODELS = {
    "Swin-T, windows": "swin_tiny_patch4_window7_224",
    "ViT-S/16, full": "vit_small_patch16_224",
    "ViT-S/8, full": "vit_small_patch8_224",
}
SIZES, QUICK_SIZES = (112, 224, 336, 448, 560, 672), (112, 224)
CALLS, SECONDS = 5, 2.0
COLUMNS = {"model": "", "pixels": ",d", "patches": ",d", "ms": ",.0f", "MB": ",.0f", "spread": ".0%"}


def costs(architecture: str, sizes: list[int], **_) -> None:
    """Measure milliseconds and peak memory at each size, in ascending order of sizes."""
    import timm
    import torch

    figures, before, model = {}, None, None
    for size in sizes:
        del model  # so that only one model is in memory
        model = timm.create_model(architecture, img_size=size, **window_of(architecture)).eval()
        before = before or peak_megabytes()
        image = torch.randn(1, 3, size, size)
        with torch.inference_mode():
            first = timed(model, image)
            calls = CALLS if first * CALLS < SECONDS else 1
            seconds = sorted(timed(model, image) for _ in range(calls))[calls // 2]
        figures[f"{size} ms"] = 1000 * seconds
        figures[f"{size} MB"] = peak_megabytes() - before
        figures[f"{size} patches"] = math.prod(model.patch_embed.grid_size)
    answer(figures)


def window_of(architecture: str) -> dict:
    return {"window_size": 7} if architecture.startswith("swin") else {}


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(model, image) -> float:
    start = time.perf_counter()
    model(image)
    return time.perf_counter() - start


def exponent(sizes: list[int], values: list[float]) -> float:
    """Fit the slope of log(value) over log(pixels) by least squares."""
    x = [2 * math.log(size) for size in sizes]
    y = [math.log(max(value, 1e-9)) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def rows_of(results: dict[str, list[dict]], sizes: list[int]) -> list[dict]:
    rows = []
    for name, rounds in results.items():
        middle = medians(rounds)
        for size in sizes:
            row = {"model": name, "pixels": size, "patches": int(middle[f"{size} patches"])}
            row |= {"ms": middle[f"{size} ms"], "MB": middle[f"{size} MB"]}
            rows.append({**row, "spread": spread([values[f"{size} ms"] for values in rounds])})
    return rows


def exponents(rows: list[dict]) -> list[str]:
    """Describe the exponents of each model from 224 px on, where constant costs are negligible."""
    sentences = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        grown = [row for row in own if row["pixels"] >= 224]
        own = grown if len(grown) > 1 else own
        sizes = [row["pixels"] for row in own]
        time_, memory = (exponent(sizes, [row[key] for row in own]) for key in ("ms", "MB"))
        sentences.append(f"{name}: time grows with pixels^{time_:.2f}, memory with pixels^{memory:.2f}")
    return sentences


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key, label in zip(axes, ("ms", "MB"), ("milliseconds an image", "peak memory, MB"), strict=True):
        for name in dict.fromkeys(row["model"] for row in rows):
            own = [row for row in rows if row["model"] == name]
            axis.loglog([row["pixels"] for row in own], [row[key] for row in own], marker="o", label=name)
        sides = sorted({row["pixels"] for row in rows})
        axis.set_xticks(sides, [str(side) for side in sides], minor=False)
        axis.minorticks_off()
        axis.set(xlabel="image side, px", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=90)


def main(argv: list[str] | None = None) -> None:
    own = {"--plot": {"type": Path, "metavar": "FILE", "help": "also plot time and memory over the image size"}}
    options = parse_options(__doc__, argv, rounds=1, own_options=own)
    if options.worker:
        return costs(**options.worker)
    sizes = list(QUICK_SIZES if options.quick else SIZES)
    jobs = {name: {"architecture": architecture, "sizes": sizes} for name, architecture in MODELS.items()}
    with workspace() as work:
        results = interleaved(jobs, options.rounds, partial(in_own_process, __file__, cache=work / "cache"))
    rows = rows_of(results, sizes)
    if options.plot:
        plot(rows, options.plot)
    report("Attention", options, rows, COLUMNS, exponents(rows))


if __name__ == "__main__":
    main()
