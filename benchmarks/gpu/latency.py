"""Measure the latency of a classifier in PyTorch, torch.compile, CUDA graphs and ONNX Runtime.

python latency.py SECONDS
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kit import CUDA, DEVICE, TINY, WORK, TimeBudget, attempt, exit_now, record, synchronize
from transformers import AutoModelForImageClassification, PreTrainedModel

from hfvit import HFViTConfig, HFViTForImageClassification, load_classifier

BATCHES = (1, 2) if TINY else (1, 8, 64)
IMAGE_SIZE = 64 if TINY else 224
CLASSES = 1000
TINY_ARGS = {"depth": 2, "embed_dim": 64, "num_heads": 2}
HALF = torch.float16 if CUDA else torch.bfloat16
CHECKPOINT = WORK / "latency" / "checkpoint"
Run = Callable[[], Any]


@dataclass(frozen=True)
class Job:
    """Measurement, with the seconds that it needs."""

    name: str
    work: Callable[[], None]
    seconds: float = 0.0


class Comparison:
    """Measure latency, and compare logits with those of the first row of the same batch size."""

    def __init__(self) -> None:
        self.references: dict[int, torch.Tensor] = {}

    def measure(self, name: str, prepare: Callable[[torch.Tensor], Run], batches: Sequence[int] = BATCHES) -> None:
        """Record latency and logit difference at each batch size.

        Args:
            name: name of the row.
            prepare: function of pixel values (batch, 3, height, width), float32 on the device, that returns a
                function without arguments that computes logits (batch, classes).
            batches: batch sizes.
        """
        for batch in batches:
            shape = (batch, 3, IMAGE_SIZE, IMAGE_SIZE)
            pixels = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
            run = prepare(torch.from_numpy(pixels).to(DEVICE))
            p50, p95 = percentiles(run, repeats(batch))
            logits = torch.as_tensor(run()).float().cpu()
            reference = self.references.setdefault(batch, logits)
            record(
                "latency",
                name=name,
                batch=batch,
                p50_ms=p50,
                p95_ms=p95,
                ips=1000 * batch / p50,
                difference=(logits - reference).abs().max().item(),
            )


def repeats(batch: int) -> int:
    if TINY:
        return 5
    return 200 if batch < 64 else 60


def percentiles(run: Run, count: int) -> tuple[float, float]:
    """Return median and 95th percentile of `count` calls in milliseconds, after a warm-up."""
    for _ in range(5):
        run()
    synchronize()
    milliseconds = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        synchronize()
        milliseconds.append(1000 * (time.perf_counter() - start))
    return float(np.percentile(milliseconds, 50)), float(np.percentile(milliseconds, 95))


def save_checkpoint() -> None:
    """Write a ViT-B/16 with random weights, which do not affect the speed."""
    torch.manual_seed(0)
    labels = [str(number) for number in range(CLASSES)]
    config = HFViTConfig.from_architecture("vit_base_patch16_224", labels, **(TINY_ARGS if TINY else {}))
    config.set_image_size(IMAGE_SIZE, is_argument=True)
    HFViTForImageClassification(config).save_pretrained(CHECKPOINT)


def load_model(dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForImageClassification.from_pretrained(CHECKPOINT, dtype=dtype).eval().to(DEVICE)


def eager(
    comparison: Comparison,
    name: str,
    dtype: torch.dtype,
    tf32: bool = False,
    autocast: torch.dtype | None = None,
) -> None:
    """Measure eager PyTorch.

    Args:
        comparison: comparison to add the row to.
        name: name of the row.
        dtype: type of the weights and pixel values.
        tf32: allow TF32 matrix products.
        autocast: type of autocast, or None.
    """
    model = load_model(dtype)

    def prepare(pixels: torch.Tensor) -> Run:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        pixel_values = pixels.to(dtype)

        @torch.inference_mode()
        def run() -> torch.Tensor:
            with torch.autocast(DEVICE.type, autocast, enabled=autocast is not None):
                return model(pixel_values=pixel_values).logits

        return run

    comparison.measure(name, prepare)


def compiled(comparison: Comparison, mode: str, batches: Sequence[int]) -> None:
    """Measure `torch.compile` in half precision.

    Args:
        comparison: comparison to add the row to.
        mode: mode of `torch.compile`.
        batches: batch sizes, compiled separately.
    """
    torch.compiler.reset()
    model = torch.compile(load_model(HALF), dynamic=False, mode=mode)

    def prepare(pixels: torch.Tensor) -> Run:
        pixel_values = pixels.to(HALF)

        @torch.inference_mode()
        def run() -> torch.Tensor:
            logits = model(pixel_values=pixel_values).logits
            return logits.clone() if mode == "reduce-overhead" else logits  # the next replay overwrites them

        return run

    comparison.measure(f"torch.compile {mode} fp16", prepare, batches)


def cuda_graph(comparison: Comparison) -> None:
    """Measure eager fp16 in a CUDA graph."""
    model = load_model(HALF)

    def prepare(pixels: torch.Tensor) -> Run:
        pixel_values = pixels.to(HALF)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode():
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(3):
                    model(pixel_values=pixel_values)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                logits = model(pixel_values=pixel_values).logits

        def run() -> torch.Tensor:
            graph.replay()
            return logits

        return run

    comparison.measure("eager fp16 in a CUDA graph", prepare)


def hfvit_backend(comparison: Comparison, name: str, source: Path, in_host_memory: bool = True) -> None:
    """Measure a backend of `load_classifier`.

    Args:
        comparison: comparison to add the row to.
        name: name of the row.
        source: checkpoint folder or ONNX file.
        in_host_memory: pass and return arrays in host memory, else tensors on the device of an ONNX file's session.
    """
    device = DEVICE.type if source.is_dir() or "CUDAExecutionProvider" in available_providers() else "cpu"
    backend = load_classifier(source, device=device).backend

    def prepare(pixels: torch.Tensor) -> Run:
        return partial(backend, pixels.cpu().numpy() if in_host_memory else pixels.to(backend.memory))

    comparison.measure(name, prepare)


def available_providers() -> list[str]:
    import onnxruntime

    return onnxruntime.get_available_providers()


def onnx_runtime(comparison: Comparison) -> None:
    """Measure the exported graph in ONNX Runtime, with inputs on the GPU if it supports CUDA."""
    import onnxruntime

    from hfvit import export_onnx

    if CUDA and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    has_cuda = "CUDAExecutionProvider" in available_providers()
    model = AutoModelForImageClassification.from_pretrained(CHECKPOINT).eval()
    for dtype in ("fp32", "fp16") if has_cuda else ("fp32",):
        file = CHECKPOINT / f"{dtype}.onnx"
        export_onnx(model, file, dtype=dtype)
        if not has_cuda:
            name = f"ONNX Runtime CPU {dtype}"
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            comparison.measure(name, partial(session_on_cpu, session), BATCHES[:2])
            continue
        for tf32 in ("1", "0") if dtype == "fp32" else ("0",):
            providers = [("CUDAExecutionProvider", {"use_tf32": tf32}), "CPUExecutionProvider"]
            session = onnxruntime.InferenceSession(file, providers=providers)
            provider = session.get_providers()[0].removesuffix("ExecutionProvider")
            comparison.measure(f"ONNX Runtime {provider} {dtype} tf32={tf32}", partial(session_on_gpu, session))
    provider = "CUDA" if has_cuda else "CPU"
    for kind, in_host_memory in (("arrays in and out", True), ("tensors on the device", False)):
        hfvit_backend(
            comparison, f"hfvit OnnxBackend {provider} fp32, {kind}", CHECKPOINT / "fp32.onnx", in_host_memory
        )


def session_on_cpu(session, pixels: torch.Tensor) -> Run:
    inputs = {session.get_inputs()[0].name: pixels.cpu().numpy()}
    return lambda: session.run(None, inputs)[0]


def session_on_gpu(session, pixels: torch.Tensor) -> Run:
    """Return a function that runs a session with its input on the GPU, and copies the logits to the CPU."""
    import onnxruntime

    graph_input = session.get_inputs()[0]
    dtype = np.float16 if graph_input.type == "tensor(float16)" else np.float32
    value = onnxruntime.OrtValue.ortvalue_from_numpy(pixels.cpu().numpy().astype(dtype), "cuda", 0)
    binding = session.io_binding()
    binding.bind_ortvalue_input(graph_input.name, value)
    binding.bind_output(session.get_outputs()[0].name, "cuda", 0)

    def run() -> np.ndarray:
        session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0]

    return run


def tensorrt_rtx() -> None:
    """Record the target compute capabilities of TensorRT for RTX, and that of the GPU."""
    from hfvit.trt.api import find_backend, local_gpus

    backend = find_backend("tensorrt_rtx")
    record(
        "latency",
        name="tensorrt_rtx",
        version=backend.version,
        targets=sorted(backend.targets),
        here=local_gpus(),
    )


def jobs(comparison: Comparison) -> list[Job]:
    """Return all measurements; the first one computes the reference logits."""
    torch_backend = "hfvit TorchBackend fp32, arrays in and out"
    found = [
        Job("eager fp32", partial(eager, comparison, "eager fp32", torch.float32)),
        Job("eager tf32", partial(eager, comparison, "eager tf32", torch.float32, tf32=True)),
        Job("eager fp16", partial(eager, comparison, "eager fp16", HALF)),
        Job("eager bf16", partial(eager, comparison, "eager bf16 autocast", torch.float32, autocast=torch.bfloat16)),
    ]
    if CUDA:
        found.append(Job("CUDA graph", partial(cuda_graph, comparison)))
    found += [
        Job("hfvit backend", partial(hfvit_backend, comparison, torch_backend, CHECKPOINT)),
        Job("ONNX Runtime", partial(onnx_runtime, comparison), 20),
        Job("torch.compile", partial(compiled, comparison, "default", BATCHES), 0 if TINY else 45),
    ]
    if CUDA:
        found.append(Job("reduce-overhead", partial(compiled, comparison, "reduce-overhead", BATCHES[:1]), 45))
    found.append(Job("tensorrt_rtx", tensorrt_rtx))
    return found


def main(seconds: float) -> None:
    budget = TimeBudget(seconds)
    save_checkpoint()
    for job in jobs(Comparison()):
        if budget.left() < job.seconds:
            record("latency", name=job.name, skipped="no time")
            continue
        attempt("latency", job.name, job.work)


if __name__ == "__main__":
    main(float(sys.argv[1]))
    exit_now()
