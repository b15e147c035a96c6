"""Latency, throughput and accuracy of one classifier in PyTorch, ONNX Runtime, OpenVINO and INT8.

  python benchmarks/inference.py --model outputs/dinov2_small --dataset_name cifar10   # about twenty minutes
  python benchmarks/inference.py --quick                                               # a minute, to test the script
  python benchmarks/inference.py --json rows.json

  eager fp32, eager bf16, torch.compile   PyTorch; bf16 by autocast
  ONNX Runtime                            the exported graph
  ONNX Runtime, hfvit fused               the same, with operators fused by hfvit/export/fusion.py
  int8 dynamic, int8 static               onnxruntime's quantizer on the exported graph; static as QDQ
  hfvit int8-dynamic, hfvit int8          hfvit/export/quantization.py
  torchao int8                            int8 weights and dynamic int8 activations, compiled (where it is installed)
  OpenVINO fp32, OpenVINO bf16            `convert_model` of the exported graph (where OpenVINO is installed)
  OpenVINO int8                           the same, with NNCF's preset for transformers
  hfvit OpenVINO int8, ... int8 and bf16  hfvit/export/openvino.py, the remaining operators in fp32 or bf16
  ..., throughput                         `--objective throughput`: batches divided between the cores

Without --model, it is timm's ViT-S/16 at 224 px with random weights (--quick: two blocks at 64 px), whose accuracy is
not measured. With --model and --dataset_name, the accuracy of contenders in another precision than float32 is measured
on --samples images of --split. Static INT8 is calibrated on 32 images of --calibration_split.

Each measurement runs in a new process, at batch size 1, then 16. Preprocessing is not included.
"""

import os
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from common import answer, in_own_process, interleaved, medians, parse_options, report, spread, workspace

BATCHES = (1, 16)
CALIBRATION_IMAGES = 32
CHECKED_IMAGES = 64
TORCH = ("eager fp32", "eager bf16", "torch.compile")
GRAPHS = {
    "ONNX Runtime": "model.onnx",
    "ONNX Runtime, hfvit fused": "model_optimized.onnx",
    "int8 dynamic": "dynamic.onnx",
    "int8 static": "static.onnx",
    "hfvit int8-dynamic": "model_int8_dynamic.onnx",
    "hfvit int8": "model_quantized.onnx",
}
# File and precision hint, None for OpenVINO's default: bf16 on CPUs that support it.
OPENVINO = {
    "OpenVINO fp32": ("openvino.xml", "f32"),
    "OpenVINO bf16": ("openvino.xml", "bf16"),
    "OpenVINO int8": ("openvino_nncf.xml", None),
    "hfvit OpenVINO int8": ("openvino_model_int8.xml", "f32"),
    "hfvit OpenVINO int8 and bf16": ("openvino_model_int8_bf16.xml", "bf16"),
}
# Contender -> the one that it runs for throughput.
THROUGHPUT = {f"{name}, throughput": name for name in ("hfvit int8", "hfvit OpenVINO int8 and bf16")}
TORCHAO = "torchao int8"
CONTENDERS = (
    *TORCH, *GRAPHS, *((TORCHAO,) if find_spec("torchao") else ()),
    *(OPENVINO if find_spec("openvino") and find_spec("nncf") else ()),
)  # fmt: skip
CONTENDERS += tuple(name for name, base in THROUGHPUT.items() if base in CONTENDERS)
FLOAT32 = ("torch.compile", "ONNX Runtime", "ONNX Runtime, hfvit fused", "OpenVINO fp32")
COLUMNS = {
    "contender": "",
    "batch": ".0f",
    "p50 ms": ",.1f",
    "p95 ms": ",.1f",
    "images/s": ",.1f",
    "spread": ".0%",
    "x eager": ".2f",
    "MB": ",.1f",
    "size": ".3f",
    "accuracy": ".2%",
    "agreement": ".2%",
    "logit difference": ".1e",
}
OPTIONS = {
    "--model": {"help": "checkpoint of an image classifier [ViT-S/16 at 224 px, random weights]"},
    "--dataset_name": {"help": "data set to measure the accuracy on, with the model's classes: Hub id or folder"},
    "--split": {"default": "test", "help": "split to measure the accuracy on [test]"},
    "--calibration_split": {"default": "train", "help": "split for calibration [train]"},
    "--only": {
        "nargs": "+",
        "choices": CONTENDERS,
        "metavar": "CONTENDER",
        "help": "measure these and eager fp32 [all]",
    },
    "--samples": {"type": int, "help": "number of images to measure the accuracy on [2,000, quick 64]"},
}


def prepare(
    folder: str, model: str | None, dataset_name: str | None, splits: list[str], samples: int, quick: bool, **_
) -> dict:
    """Save the checkpoint, graphs and pixel values, and return their sizes in bytes.

    Args:
        folder: folder to write to.
        model: checkpoint, None for random weights.
        dataset_name: data set to measure the accuracy on, None for random pixel values.
        splits: calibration split, evaluation split.
        samples: number of images to measure the accuracy on.
        quick: use a small model.
    """
    from hfvit import load_classifier

    work = Path(folder)
    checkpoint = model or random_checkpoint(work / "checkpoint", quick)
    classifier = load_classifier(checkpoint, device="cpu")
    if dataset_name:
        from hfvit.evaluation.split import evaluation_split

        calibration, judged = (
            evaluation_split(checkpoint, dataset_name=dataset_name, split=split, max_samples=count)
            for split, count in zip(splits, (CALIBRATION_IMAGES, samples), strict=True)
        )
        np.save(work / "labels.npy", judged.labels)
        calibration = classifier.pixel_values(calibration.images())
        pixels = classifier.pixel_values(judged.images())
    else:
        size = 64 if quick else 224
        pixels = np.random.default_rng(0).standard_normal((max(BATCHES), 3, size, size), dtype=np.float32)
        calibration = pixels
    np.save(work / "pixels.npy", pixels)
    _export(checkpoint, work, [calibration[start : start + 4] for start in range(0, len(calibration), 4)])
    sizes = {name: (work / file).stat().st_size for name, file in GRAPHS.items()}
    if "OpenVINO fp32" in CONTENDERS:
        _export_openvino(checkpoint, work, calibration)
        files = {name: (work / file).with_suffix(".bin") for name, (file, _) in OPENVINO.items()}
        sizes |= {name: file.stat().st_size for name, file in files.items()}
    sizes |= {name: sizes[base] for name, base in THROUGHPUT.items() if base in sizes}
    return {"checkpoint": str(checkpoint), "sizes": sizes, "shape": list(pixels.shape)}


def random_checkpoint(folder: Path, quick: bool) -> Path:
    from hfvit.models.factory import build_image_model
    from hfvit.recipe.arguments import ModelArguments

    labels = [f"class {number}" for number in range(1000)]
    small = {"image_size": 64, "model_args": {"depth": 2}} if quick else {}
    arguments = ModelArguments(architecture="vit_small_patch16_224", **small)
    build_image_model(arguments, labels).save_pretrained(folder)
    return folder


def _export(checkpoint: str | Path, work: Path, calibration: list[np.ndarray]) -> None:
    import onnx
    import onnx_ir
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import AutoModelForImageClassification

    from hfvit.export.fusion import fuse
    from hfvit.export.onnx import export_onnx
    from hfvit.export.quantization import Batches, load_float_graph, quantize_onnx, quantize_qdq

    source = work / GRAPHS["ONNX Runtime"]
    export_onnx(AutoModelForImageClassification.from_pretrained(checkpoint).eval(), source)
    graph = onnx_ir.load(source)
    fuse(graph)
    onnx_ir.save(graph, work / GRAPHS["ONNX Runtime, hfvit fused"])
    quantize_dynamic(
        source,
        work / GRAPHS["int8 dynamic"],
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        weight_type=QuantType.QInt8,
    )
    static, _ = quantize_qdq(source, work, Batches(load_float_graph(source), calibration), symmetric=False)
    onnx.save(static, work / GRAPHS["int8 static"])
    quantize_onnx(source, work / GRAPHS["hfvit int8-dynamic"], mode="int8-dynamic")
    quantize_onnx(source, work / GRAPHS["hfvit int8"], calibration=calibration)


def _export_openvino(checkpoint: str | Path, work: Path, calibration: np.ndarray) -> None:
    import nncf
    import openvino
    from transformers import AutoModelForImageClassification

    from hfvit.export.openvino import export_openvino

    samples = list(calibration[:, None])
    model = AutoModelForImageClassification.from_pretrained(checkpoint).eval()
    for name, dtype in (("openvino_model_int8.xml", "fp32"), ("openvino_model_int8_bf16.xml", "bf16")):
        export_openvino(model, work / name, calibration=samples, dtype=dtype)
    graph = openvino.convert_model(work / GRAPHS["ONNX Runtime"])
    openvino.save_model(graph, work / "openvino.xml", compress_to_fp16=False)
    quantized = nncf.quantize(graph, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(quantized, work / "openvino_nncf.xml", compress_to_fp16=False)


def runner(contender: str, folder: str, checkpoint: str):
    """Return a function from pixel values to logits (float32 arrays), on all cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if contender in THROUGHPUT:
        from transformers import AutoConfig

        from hfvit.inference.backends import OnnxBackend
        from hfvit.inference.openvino_backend import OpenVINOBackend

        base = THROUGHPUT[contender]
        backend, file = (OnnxBackend, GRAPHS[base]) if base in GRAPHS else (OpenVINOBackend, OPENVINO[base][0])
        classes = AutoConfig.from_pretrained(checkpoint).num_labels
        return backend(Path(folder) / file, classes, "cpu", cores, objective="throughput")
    if contender in OPENVINO:
        import openvino

        file, hint = OPENVINO[contender]
        options = {"INFERENCE_NUM_THREADS": cores, "PERFORMANCE_HINT": "LATENCY"}
        options |= {"INFERENCE_PRECISION_HINT": hint} if hint else {}
        compiled = openvino.Core().compile_model(Path(folder) / file, "CPU", options)
        return lambda pixels: compiled({"pixel_values": pixels})["logits"]
    if contender in GRAPHS:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cores
        path = str(Path(folder) / GRAPHS[contender])
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda pixels: session.run(None, {"pixel_values": pixels})[0]
    import torch
    from transformers import AutoModelForImageClassification

    torch.set_num_threads(cores)
    model = AutoModelForImageClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()
    if contender == TORCHAO:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(model) if contender in ("torch.compile", TORCHAO) else model
    half = torch.autocast("cpu", torch.bfloat16, enabled=contender == "eager bf16")

    def run(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), half:
            return compiled(pixel_values=torch.from_numpy(pixels)).logits.float().numpy()

    return run


def measure(contender: str, folder: str, checkpoint: str, repeats: dict[str, int], **_) -> dict[str, float]:
    """Measure median and 95th percentile of milliseconds per batch, for each batch size."""
    run = runner(contender, folder, checkpoint)
    pixels = np.load(Path(folder) / "pixels.npy", mmap_mode="r")
    figures = {}
    for batch, count in repeats.items():
        given = np.array(pixels[: int(batch)])
        for _ in range(3):
            run(given)
        milliseconds = []
        for _ in range(count):
            start = time.perf_counter()
            run(given)
            milliseconds.append(1000 * (time.perf_counter() - start))
        figures |= {f"{batch} p50": np.median(milliseconds), f"{batch} p95": np.percentile(milliseconds, 95)}
    return {name: float(value) for name, value in figures.items()}


def judge(contender: str, folder: str, checkpoint: str, **_) -> dict[str, float]:
    """Measure agreement and logit difference with eager fp32, and accuracy with labels."""
    run = runner(contender, folder, checkpoint)
    pixels = np.load(Path(folder) / "pixels.npy", mmap_mode="r")
    count = min(CHECKED_IMAGES, len(pixels)) if contender in FLOAT32 else len(pixels)
    batch = max(BATCHES)
    logits = np.concatenate([run(np.array(pixels[n : n + batch])) for n in range(0, count, batch)])
    reference = Path(folder) / "reference.npy"
    if contender == CONTENDERS[0]:
        np.save(reference, logits)
    expected = np.load(reference)[:count]
    labels = Path(folder) / "labels.npy"
    figures = {"logit difference": float(np.abs(logits - expected).max())}
    if labels.exists() and count == len(pixels):
        figures["accuracy"] = float((logits.argmax(1) == np.load(labels)).mean())
        figures["agreement"] = float((logits.argmax(1) == expected.argmax(1)).mean())
    return figures


def rows_of(results: dict[str, list[dict]], judged: dict[str, dict], sizes: dict[str, int]) -> list[dict]:
    """Return one row per contender and batch size, relative to eager fp32 and to model.onnx."""
    rows = []
    for batch in BATCHES:
        eager = medians(results[CONTENDERS[0]])[f"{batch} p50"]
        for name, rounds in results.items():
            figures = medians(rounds)
            size = sizes.get(name)
            rows.append(
                {
                    "contender": name,
                    "batch": batch,
                    "p50 ms": figures[f"{batch} p50"],
                    "p95 ms": figures[f"{batch} p95"],
                    "images/s": 1000 * batch / figures[f"{batch} p50"],
                    "spread": spread([values[f"{batch} p50"] for values in rounds]),
                    "x eager": eager / figures[f"{batch} p50"],
                    "MB": size and size / 1e6,
                    "size": size and size / sizes["ONNX Runtime"],
                    **judged.get(name, {}),
                }
            )
    return rows


def main(argv: list[str] | None = None) -> None:
    options = parse_options(__doc__, argv, rounds=3, own_options=OPTIONS)
    if options.worker:
        work = {"prepare": prepare, "measure": measure, "judge": judge}[options.worker["do"]]
        return answer(work(**options.worker))
    if (options.dataset_name is None) != (options.model is None):
        sys.exit("inference.py: --model and --dataset_name go together: the data set judges that model.")
    samples = options.samples or (64 if options.quick else 2000)
    repeats = {"1": 5, "16": 2} if options.quick else {"1": 40, "16": 8}
    with workspace() as folder:
        run = partial(in_own_process, __file__, cache=folder / "cache")
        given = {"model": _absolute(options.model), "dataset_name": _absolute(options.dataset_name)}
        splits = [options.calibration_split, options.split]
        job = {"do": "prepare", "folder": str(folder), "splits": splits, "samples": samples, "quick": options.quick}
        prepared = run(job | given)
        shared = {"folder": str(folder), "checkpoint": prepared["checkpoint"]}
        wanted = [name for name in CONTENDERS if not options.only or name in (CONTENDERS[0], *options.only)]
        jobs = {name: {"do": "measure", "contender": name, "repeats": repeats, **shared} for name in wanted}
        results = interleaved(jobs, options.rounds, run)
        judged_names = wanted if options.model or not options.quick else ()
        judged = {name: run({"do": "judge", "contender": name, **shared}) for name in judged_names}
    count, _, height, width = prepared["shape"]
    what = options.model or "random weights, so no accuracy"
    notes = [
        f"{what}; {height}x{width} px; {repeats['1']} runs at batch 1 and {repeats['16']} at batch 16 a round",
        f"float32 forms are compared with eager fp32 on {min(CHECKED_IMAGES, count)} images, others on {count:,}",
    ]
    report("Inference", options, rows_of(results, judged, prepared["sizes"]), COLUMNS, notes)


def _absolute(name: str | None) -> str | None:
    return str(Path(name).resolve()) if name and Path(name).expanduser().exists() else name


if __name__ == "__main__":
    main()
