"""Latency of TensorRT engines, eager PyTorch and torch.compile on one GPU.

  python benchmarks/engines.py                            # ViT-B/16 at 224 px; some minutes, most of them builds
  python benchmarks/engines.py --quick                    # two blocks at 64 px, only to test the script
  python benchmarks/engines.py --model outputs/vit_base --json rows.json

  eager fp32, eager fp16   PyTorch; fp32 without TF32 (PyTorch's default), fp16 with all weights in half precision
  torch.compile fp16       the same, compiled for each batch size
  engine fp32, fp16, int8  engines of `optimum-cli export tensorrt`, run by hfvit with CUDA graphs on its own stream

Without --model, the weights are random, which does not affect the speed. int8 is calibrated with random pixel values,
so its accuracy is meaningless (`hfvit validate` measures accuracy). Without TensorRT, PyTorch is measured alone.

Each measurement runs in a new process, at batch size 1, 8 and 64. Pixel values (float32) and logits stay on the GPU:
preprocessing and transfers are not included. Each call is synchronized.
"""

import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
from common import answer, in_own_process, interleaved, medians, parse_options, report, spread, workspace

BATCHES = (1, 8, 64)
TORCH = ("eager fp32", "eager fp16", "torch.compile fp16")
ENGINES = {"engine fp32": "fp32", "engine fp16": "fp16", "engine int8": "int8"}
CONTENDERS = (*TORCH, *ENGINES)
COLUMNS = {
    "contender": "",
    "batch": ".0f",
    "p50 ms": ",.3f",
    "p95 ms": ",.3f",
    "images/s": ",.0f",
    "spread": ".0%",
    "x eager fp32": ".2f",
    "x eager fp16": ".2f",
    "MB": ",.1f",
    "logit difference": ".1e",
}
OPTIONS = {
    "--model": {"help": "checkpoint of an image classifier [ViT-B/16 at 224 px, random weights]"},
    "--backend": {"default": "auto", "choices": ("auto", "tensorrt", "tensorrt_rtx"), "help": "[%(default)s]"},
}


def prepare(folder: str, model: str | None, backend: str | None, quick: bool, **_) -> dict:
    """Save the checkpoint, pixel values and engines, and return their sizes in bytes.

    Args:
        folder: folder to write to.
        model: checkpoint, None for random weights.
        backend: TensorRT backend. None: no engines.
        quick: use a small model.
    """
    from transformers import AutoModelForImageClassification

    from hfvit import load_classifier
    from hfvit.export.onnx import export_onnx
    from hfvit.export.quantization import quantize_onnx
    from hfvit.trt.builder import build_engine

    work = Path(folder)
    checkpoint = model or _random_checkpoint(work / "checkpoint", quick)
    classifier = load_classifier(checkpoint, device="cpu")
    shape = classifier.pixel_values([np.zeros((64, 64, 3), np.uint8)]).shape[1:]
    pixels = np.random.default_rng(0).standard_normal((max(BATCHES), *shape), dtype=np.float32)
    np.save(work / "pixels.npy", pixels)
    prepared = {"checkpoint": str(checkpoint), "classes": len(classifier.labels), "shape": shape}
    if backend is None:
        return {**prepared, "sizes": {}, "backend": "no TensorRT"}
    network = AutoModelForImageClassification.from_pretrained(checkpoint).eval()
    for dtype in ("fp32", "fp16"):
        export_onnx(network, work / f"{dtype}.onnx", dtype=dtype)
    calibration = [pixels[start : start + 8] for start in range(0, 32, 8)]
    quantize_onnx(work / "fp32.onnx", work / "int8.onnx", runtime="tensorrt", calibration=calibration)
    found, options = engine_backend(backend)
    sizes = {
        name: build_engine(work / f"{dtype}.onnx", work / f"{dtype}.engine", found, options).bytes
        for name, dtype in ENGINES.items()
    }
    return {**prepared, "sizes": sizes, "backend": found.title}


def _random_checkpoint(folder: Path, quick: bool) -> Path:
    from hfvit.models.factory import build_image_model
    from hfvit.recipe.arguments import ModelArguments

    labels = [f"class {number}" for number in range(1000)]
    small = {"image_size": 64, "model_args": {"depth": 2}} if quick else {}
    arguments = ModelArguments(architecture="vit_base_patch16_224", **small)
    build_image_model(arguments, labels).save_pretrained(folder)
    return folder


def engine_backend(name: str):
    """Return the TensorRT backend and build options for the first GPU.

    Raises:
        ModelError: no backend is available.
    """
    from hfvit.trt.api import EngineOptions, check_options, find_backend, local_gpus

    gpus = local_gpus()
    backend = find_backend(name)
    own = (gpus[0][1],) if backend.builds_without_gpu else ()
    options = EngineOptions(min(BATCHES), sorted(BATCHES)[1], max(BATCHES), compute_capability=own)
    check_options(backend, options, gpus)
    return backend, options


def runner(contender: str, folder: str, checkpoint: str, classes: int, backend: str):
    """Return a function from float32 pixel values to logits, both on the GPU.

    Args:
        contender: name of the contender.
        folder: folder with the engines.
        checkpoint: checkpoint for PyTorch.
        classes: number of classes.
        backend: TensorRT backend.
    """
    import torch

    if contender in ENGINES:
        from hfvit.trt.runtime import TensorRTBackend

        file = Path(folder) / f"{ENGINES[contender]}.engine"
        return TensorRTBackend(engine_backend(backend)[0], file, classes).run
    from transformers import AutoModelForImageClassification

    dtype = torch.float32 if contender == "eager fp32" else torch.float16
    model = AutoModelForImageClassification.from_pretrained(checkpoint, dtype=dtype).eval().cuda()
    if contender.startswith("torch.compile"):
        model = torch.compile(model, dynamic=False)
    return torch.inference_mode()(lambda pixels: model(pixel_values=pixels.to(dtype)).logits)


def measure(contender: str, folder: str, repeats: dict[str, int], **how) -> dict[str, float]:
    """Measure median and 95th percentile of the latency, and the logit difference from eager.

    Args:
        contender: name of the contender.
        folder: folder with pixel values and engines.
        repeats: batch size -> number of calls.
        **how: `checkpoint`, `classes` and `backend` of `runner`.
    """
    import torch

    run = runner(contender, folder, how["checkpoint"], how["classes"], how["backend"])
    pixels = torch.from_numpy(np.load(Path(folder) / "pixels.npy")).cuda()
    figures = {}
    for batch, count in repeats.items():
        given = pixels[: int(batch)]
        for _ in range(10):  # compilation, and the CUDA graph of an engine
            logits = run(given)
        torch.cuda.synchronize()
        milliseconds = []
        for _ in range(count):
            start = time.perf_counter()
            run(given)
            torch.cuda.synchronize()
            milliseconds.append(1000 * (time.perf_counter() - start))
        figures |= {f"{batch} p50": np.median(milliseconds), f"{batch} p95": np.percentile(milliseconds, 95)}
    found, reference = logits.float().cpu().numpy(), Path(folder) / "reference.npy"
    if contender == CONTENDERS[0]:
        np.save(reference, found)
    figures["difference"] = np.abs(found - np.load(reference)).max()
    return {name: float(value) for name, value in figures.items()}


def rows_of(results: dict[str, list[dict]], sizes: dict[str, int]) -> list[dict]:
    """Return one row per contender and batch size, with the speedup over eager PyTorch."""
    middle = {name: medians(rounds) for name, rounds in results.items()}
    rows = []
    for batch in BATCHES:
        for name, rounds in results.items():
            p50 = middle[name][f"{batch} p50"]
            rows.append(
                {
                    "contender": name,
                    "batch": batch,
                    "p50 ms": p50,
                    "p95 ms": middle[name][f"{batch} p95"],
                    "images/s": 1000 * batch / p50,
                    "spread": spread([values[f"{batch} p50"] for values in rounds]),
                    "x eager fp32": middle["eager fp32"][f"{batch} p50"] / p50,
                    "x eager fp16": middle["eager fp16"][f"{batch} p50"] / p50,
                    "MB": sizes[name] / 1e6 if name in sizes else None,
                    "logit difference": middle[name]["difference"],
                }
            )
    return rows


def main(argv: list[str] | None = None) -> None:
    options = parse_options(__doc__, argv, rounds=3, own_options=OPTIONS)
    if options.worker:
        return answer({"prepare": prepare, "measure": measure}[options.worker["do"]](**options.worker))
    from hfvit.errors import ModelError
    from hfvit.trt.api import local_gpus

    if not local_gpus():
        sys.exit("engines.py: needs a CUDA GPU that PyTorch can use. See `hfvit doctor`.")
    backend, contenders = options.backend, CONTENDERS
    try:
        engine_backend(backend)
    except ModelError as error:
        print(f"engines.py: without engines: {error}", file=sys.stderr)
        backend, contenders = None, TORCH
    counts = (20, 10, 5) if options.quick else (300, 200, 50)
    repeats = {str(batch): count for batch, count in zip(BATCHES, counts, strict=True)}
    with workspace() as folder:
        run = partial(in_own_process, __file__, cache=folder / "cache")
        model = str(Path(options.model).resolve()) if options.model and Path(options.model).exists() else options.model
        shared = {"folder": str(folder), "backend": backend}
        prepared = run({"do": "prepare", "model": model, "quick": options.quick, **shared})
        shared |= {"checkpoint": prepared["checkpoint"], "classes": prepared["classes"], "repeats": repeats}
        jobs = {name: {"do": "measure", "contender": name, **shared} for name in contenders}
        results = interleaved(jobs, options.rounds, run)
    _, height, width = prepared["shape"]
    notes = [
        f"{options.model or 'random weights'}; {height}x{width} px; {prepared['backend']}",
        f"{', '.join(map(str, counts))} calls per round at batch {', '.join(map(str, BATCHES))}, each synchronized",
    ]
    report("Engines", options, rows_of(results, prepared["sizes"]), COLUMNS, notes)


if __name__ == "__main__":
    main()
