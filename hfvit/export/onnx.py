"""Export a model to one ONNX file and check it against PyTorch."""

import copy
import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib.metadata import version
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants
from torch.export import Dim
from transformers.exporters import OnnxExporter
from transformers.exporters.exporter_onnx import OnnxConfig

import hfvit
from hfvit.artifacts.export_folder import PACKAGES, file_digest
from hfvit.artifacts.export_record import ExportedFile, Parity, TensorInfo
from hfvit.errors import ModelError, one_line, wrap_library_errors
from hfvit.export.fusion import fuse
from hfvit.export.graph import remove_unused_nodes
from hfvit.export.half_precision import HALF_TYPES, runnable_on_cpu, to_half, wide_values
from hfvit.export.onnx_file import mapped_file, read_header, write_onnx
from hfvit.export.options import check_opset
from hfvit.export.parity import check_onnx, check_parity, check_pixels, tolerance
from hfvit.export.preprocessing import add_preprocessing
from hfvit.export.processor_steps import image_steps
from hfvit.export.text_inputs import TOKEN_AXIS, check_reads_texts, compared_texts, text_inputs, traced_texts
from hfvit.models.attention import unfused_window_attention
from hfvit.models.factory import meta_copy
from hfvit.utils.checks import check_integer, checked_file
from hfvit.utils.environment import installed_versions
from hfvit.utils.eval_mode import eval_mode
from hfvit.utils.files import temporary_file
from hfvit.utils.quiet import silenced

DTYPES = ("fp32", *HALF_TYPES)
BATCH_AXIS = "batch_size"
RANGE_BATCH = 4  # images per batch to find the ranges of values
TRACED_BATCH = 2  # torch.export would specialize a batch of 1
CHECKED_BATCHES = [1, 3]  # batch sizes whose logits are compared, unlike the traced one


@contextmanager
def exporting(model: torch.nn.Module, target: str, verbose: bool) -> Iterator[None]:
    """Run an exporter of transformers within the context.

    Args:
        model: model to export.
        target: name of the format, for messages.
        verbose: show the exporter's output and warnings.

    Raises:
        ModelError: the exporter fails.
    """
    try:
        with silenced(verbose), unfused_window_attention(model):
            yield
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be exported to {target} by transformers {version('transformers')}:"
            f" {type(error).__name__}: {one_line(error)[:300]}"
        ) from error


def in_eval_mode(function: Callable) -> Callable:
    """Wrap a function of a model, which is in eval mode while it runs.

    Args:
        function: function whose first argument is the model. The mode of each module is restored afterwards.
    """

    @wraps(function)
    def run(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
            raise TypeError(
                f"model: must be an image classifier of hfvit or transformers, got {type(model).__name__}. Load a"
                " checkpoint with HFViTForImageClassification.from_pretrained."
            )
        with eval_mode(model):
            return function(model, *args, **kwargs)

    return run


@in_eval_mode
def export_onnx(
    model: torch.nn.Module,
    path: str | Path,
    *,
    opset: int | None = None,
    dtype: str = "fp32",
    optimize: bool = False,
    batch_size: int = 1,
    dynamic_axes: bool = True,
    atol: float | None = None,
    preprocessing=None,
    image_size: tuple[int, int] | None = None,
    verbose: bool = False,
    traced: onnx_ir.Model | None = None,
    images: np.ndarray | None = None,
) -> ExportedFile:
    """Export an image classifier to one ONNX file and compare it with PyTorch.

    The graph maps `pixel_values` (batch_size, channels, height, width) to `logits` (batch_size, classes), both float32
    for any `dtype`. Image-text models also take `input_ids` and `attention_mask` (batch_size, tokens), int64.

    Args:
        model: image classifier in float32.
        path: file to write.
        opset: 18 to 23; None is the exporter's default.
        dtype: precision of matrix products, "fp32", "fp16" or "bf16". LayerNorm and Softmax stay in fp32.
        optimize: fuse operators for ONNX Runtime on CPUs; no other runtime can load such a file.
        batch_size: batch size of a graph without `dynamic_axes`; ignored otherwise.
        dynamic_axes: let the batch size vary.
        atol: largest difference of a logit from PyTorch's; the default depends on `dtype` and the largest logit.
        preprocessing: image processor to include in the graph, which then takes `pixels` (batch_size, height, width,
            3) uint8 of any height and width.
        image_size: (height, width) in pixels; None reads it from the model's configuration.
        verbose: show the exporter's output and warnings.
        traced: result of `trace_onnx` with the same arguments, which stays unchanged; None traces the model.
        images: pixel values (images, channels, height, width) of real images, to find the values that fp16 cannot hold
            and that stay in float32; None is random ones.

    Returns:
        The record of the file for export.json.

    Raises:
        ModelError: an argument has a wrong value, the model cannot be exported, or the logits differ from PyTorch's;
            no file is written.
        TypeError: the model or the path is of another type.
    """
    path = checked_file("path", path)
    _check_arguments(model, opset, dtype, optimize, batch_size, atol, image_size)
    check_reads_texts(model, optimize=optimize, with_preprocessing=preprocessing is not None)
    if preprocessing is not None:
        image_steps(preprocessing)  # an error for others, before the long work
    shape = (input_channels(model), *(image_size or configured_image_size(model)))
    if images is not None and (np.shape(images)[1:] != shape or not len(images)):
        raise ModelError(
            f"images: must be pixel values (images, {', '.join(map(str, shape))}), got {np.shape(images)}."
        )
    images = None if images is None else np.asarray(images, np.float32)
    if traced is None:
        fixed_size = None if dynamic_axes else batch_size
        graph = trace_onnx(model, opset=opset, batch_size=fixed_size, image_size=shape[1:], verbose=verbose)
    else:
        graph = _copy(traced)
    if optimize:
        fuse(graph)
    wide = {}
    if dtype == "fp16":
        wide = wide_values(graph, _feeds(model, shape, images, None if dynamic_axes else batch_size))
    if dtype != "fp32":
        to_half(graph, dtype, wide)
    _tidy(graph)
    batches = CHECKED_BATCHES if dynamic_axes else [batch_size]
    with temporary_file(path) as temporary:
        write_onnx(graph, temporary, with_shapes=not optimize)
        parity = check_graph(temporary, model, shape, batches, dtype, tolerance(dtype, atol), preprocessing, path.name)
    fixed = None if dynamic_axes else batch_size
    record = describe(path, shape, parity, dtype=dtype, optimized=optimize, batch_size=fixed)
    record.text_inputs = text_inputs(model, fixed or BATCH_AXIS)
    record.float32_values = len(wide) or None
    return record


def check_graph(
    path: Path,
    model,
    shape: tuple[int, int, int],
    batch_sizes: list[int],
    dtype: str,
    limit: dict,
    preprocessing,
    name: str,
) -> Parity:
    """Compare an ONNX file with PyTorch, then add and check the preprocessing.

    Args:
        path: ONNX file; preprocessing is added in place.
        model: PyTorch model in float32.
        shape: (channels, height, width) of the pixel values.
        batch_sizes: batch sizes to compare.
        dtype: precision of the graph.
        limit: allowed differences, of `tolerance`.
        preprocessing: image processor to add, or None.
        name: file name for messages.

    Raises:
        ModelError: the file is not valid, or the results differ by more than `limit`.
    """
    if dtype != "bf16" and preprocessing is None:
        with mapped_file(path) as core:
            check_onnx(core)
            return check_parity(core, model, shape, batch_sizes, limit, name)
    check_onnx(path)
    with tempfile.TemporaryDirectory() as folder:
        core = path
        if dtype == "bf16":
            core = Path(folder) / "core.onnx"
            onnx_ir.save(runnable_on_cpu(onnx_ir.load(path)), core)
        parity = check_parity(core, model, shape, batch_sizes, limit, name)
        if preprocessing is not None:
            full = Path(folder) / "full.onnx"
            add_preprocessing(core, full, preprocessing)
            parity.preprocessing = check_pixels(full, core, preprocessing, batch_sizes, name)
            add_preprocessing(path, path, preprocessing)
            check_onnx(path)
    return parity


def describe(
    path: Path,
    shape: tuple[int, int, int],
    parity: Parity,
    *,
    dtype: str,
    optimized: bool = False,
    batch_size: int | None,
) -> ExportedFile:
    """Create the record of an ONNX file for export.json.

    Args:
        path: ONNX file.
        shape: (channels, height, width) of the pixel values.
        parity: result of `check_graph`.
        dtype: precision of the graph.
        optimized: whether operators are fused for ONNX Runtime.
        batch_size: fixed batch size, None for a dynamic one.
    """
    opsets = {entry.domain: entry.version for entry in read_header(path).opset_import}
    with_preprocessing = parity.preprocessing is not None
    return ExportedFile(
        **file_digest(path),
        dtype=dtype,
        opset=opsets[""],
        versions=installed_versions(PACKAGES),
        input=input_tensor(shape, batch_size, with_preprocessing),
        optimized=optimized,
        with_preprocessing=with_preprocessing,
        parity=parity,
    )


def check_takes_images(model: torch.nn.Module) -> None:
    """Raise `ModelError` for a model that takes no pixel values, such as ImageGPT."""
    name = getattr(model, "main_input_name", "pixel_values")
    if name != "pixel_values":
        raise ModelError(f"{type(model).__name__} takes {name} instead of images, and cannot be exported.")


def input_channels(model: torch.nn.Module) -> int:
    """Return the number of image channels of a model's configuration."""
    own = (getattr(model.config, "pretrained_cfg", None) or {}).get("input_size")
    return own[0] if own else getattr(model.config, "num_channels", 3)


def configured_image_size(model: torch.nn.Module) -> tuple[int, int]:
    """Return (height, width) in pixels of a model's configuration, 224 by default."""
    config = model.config
    own = (getattr(config, "pretrained_cfg", None) or {}).get("input_size")
    size = own[-2:] if own else getattr(config, "image_size", None) or 224
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


def weights_sha256(model: torch.nn.Module) -> str:
    """Return a digest of a model's float32 weights, to identify its training."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def input_tensor(shape: tuple[int, int, int], batch_size: int | None, with_preprocessing: bool) -> TensorInfo:
    """Return name, type and shape of the graph's input.

    Args:
        shape: (channels, height, width) of the pixel values.
        batch_size: fixed batch size, None for a dynamic one.
        with_preprocessing: whether the graph takes uint8 images of any size.
    """
    batch = batch_size or BATCH_AXIS
    if with_preprocessing:
        return TensorInfo(name="pixels", type="uint8", shape=[batch, "height", "width", 3])
    return TensorInfo(name="pixel_values", type="float32", shape=[batch, *shape])


def _check_arguments(
    model: torch.nn.Module,
    opset: int | None,
    dtype: str,
    optimize: bool,
    batch_size: int,
    atol: float | None,
    image_size: tuple[int, int] | None,
) -> None:
    """Raise `ModelError` for an argument of `export_onnx` that has a wrong value.

    Args:
        model: image classifier.
        opset: ONNX opset, or None.
        dtype: precision of matrix products.
        optimize: whether to fuse operators.
        batch_size: fixed batch size.
        atol: largest difference of a logit, or None.
        image_size: (height, width) in pixels, or None.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype: must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    check_opset(opset)
    if optimize and dtype != "fp32":
        raise ModelError(f"optimize: only available for dtype fp32, got {dtype}. Omit optimize or dtype.")
    check_integer("batch_size", batch_size, optional=False)
    if atol is not None and not (isinstance(atol, Real) and atol >= 0):
        raise ModelError(f"atol: must be a non-negative number or None, got {atol!r}.")
    if image_size is not None:
        is_pair = isinstance(image_size, Sequence) and len(image_size) == 2
        if not is_pair or not all(isinstance(side, Integral) and side > 0 for side in image_size):
            raise ModelError(f"image_size: must be (height, width) in pixels or None, got {image_size!r}.")
    if (loaded := next(model.parameters()).dtype) != torch.float32:
        raise ModelError(f'The model must be in float32, got {loaded}. Load it with dtype="float32".')


@in_eval_mode
def trace_onnx(
    model: torch.nn.Module,
    *,
    opset: int | None = None,
    batch_size: int | None = None,
    image_size: tuple[int, int] | None = None,
    verbose: bool = False,
) -> onnx_ir.Model:
    """Trace a model with transformers' exporter; the only output is the logits.

    Args:
        model: image classifier in float32.
        opset: 18 to 23; None is the exporter's default.
        batch_size: fixed batch size; None lets it vary.
        image_size: (height, width) in pixels; None reads it from the model's configuration.
        verbose: show the exporter's output and warnings.

    Raises:
        ModelError: the model cannot be exported.
    """
    shape = (input_channels(model), *(image_size or configured_image_size(model)))
    check_opset(opset)
    check_takes_images(model)
    device = next(model.parameters()).device
    pixel_values = torch.zeros((batch_size or TRACED_BATCH, *shape), device=device)
    batch_axis = None if batch_size else Dim(BATCH_AXIS, min=1)
    texts, text_axes = traced_texts(model, len(pixel_values), batch_axis)
    axes = {} if batch_axis is None else {"pixel_values": {0: batch_axis}}
    size = f"{shape[1]}x{shape[2]} pixels"
    with wrap_library_errors(ModelError, f"{type(model).__name__} fails on images of {size}"):
        for count in {batch_size or 1, len(pixel_values)}:  # BiT fails on one small image, not on two
            _check_runs(model, {"pixel_values": pixel_values[:count]} | {key: texts[key][:count] for key in texts})
    config = OnnxConfig(opset_version=opset, dynamic_shapes=(axes | text_axes) or None)
    with exporting(model, "ONNX", verbose):
        graph = OnnxExporter().export(model, {"pixel_values": pixel_values, **texts}, config=config).program
    if opset is not None and graph.opset_imports[""] != opset:
        raise ModelError(
            f"opset: the exporter wrote {graph.opset_imports['']} instead of {opset}. Omit opset to use that."
        )
    _keep_logits(graph)
    # The position embeddings of NaFlex: TensorRT has no antialiased Resize.
    if any(node.op_type == "Resize" and node.inputs[0].const_value is not None for node in graph.graph):
        fold_constants(graph, should_fold=lambda node: node.op_type == "Resize", onnx_shape_inference=False)
    if any(value.dtype is None for node in graph.graph for value in node.outputs):
        # Operators that the exporter rewrote, such as in Swin V2: to_half reads the types.
        passes.ShapeInferencePass()(graph)
    passes.RemoveUnusedNodesPass()(graph)  # and weights, of which ONNX Runtime warns
    return graph


@torch.no_grad()
def _check_runs(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Run a model on the meta device, or, if it fails there, on its own."""
    try:
        with torch.device("meta"):
            meta_copy(model)(**{name: values.to("meta") for name, values in inputs.items()})
    except Exception:  # of the model, or as the values of a tensor decide what it computes
        model(**inputs)


def _copy(traced: onnx_ir.Model) -> onnx_ir.Model:
    """Copy a graph, but for its weights."""
    graph = traced.clone()
    values = [*graph.graph.inputs, *graph.graph.initializers.values()]
    for value in [*values, *(value for node in graph.graph.all_nodes() for value in node.outputs)]:
        value.type = copy.copy(value.type)  # clone() shares the types, which to_half changes
    return graph


def _feeds(
    model: torch.nn.Module, shape: tuple[int, int, int], images: np.ndarray | None, batch_size: int | None
) -> Iterator[dict[str, np.ndarray]]:
    """Yield inputs of the graph.

    Args:
        model: the exported model.
        shape: (channels, height, width) of the pixel values.
        images: pixel values; None is random ones.
        batch_size: fixed batch size, None for a dynamic one.
    """
    generator = torch.Generator().manual_seed(0)
    if images is None:
        images = torch.randn((RANGE_BATCH, *shape), generator=generator).numpy()
    size = batch_size or RANGE_BATCH
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        if batch_size:
            batch = np.resize(batch, (batch_size, *shape))  # repeats images
        texts = compared_texts(model, len(batch), generator)
        yield {"pixel_values": batch, **{name: values.numpy() for name, values in texts.items()}}


def _keep_logits(graph: onnx_ir.Model) -> None:
    """Remove outputs other than the logits, such as hidden states or DeiT's heads."""
    logits = [output for output in graph.graph.outputs if output.name == "logits"]
    if not logits:
        names = ", ".join(output.name for output in graph.graph.outputs)
        raise ModelError(f"The model must be an image classifier with the output logits, got {names}.")
    if len(graph.graph.outputs) > 1:
        graph.graph.outputs.clear()
        graph.graph.outputs.extend(logits)
        remove_unused_nodes(graph)


def _tidy(graph: onnx_ir.Model) -> None:
    """Name the batch and token axes, and remove metadata with local paths."""
    names = {}
    for value in graph.graph.inputs:
        axes = (BATCH_AXIS, TOKEN_AXIS) if len(value.shape) == 2 else (BATCH_AXIS,)
        names |= {str(dim): axis for dim, axis in zip(value.shape, axes, strict=False) if not isinstance(dim, int)}
    for part in (graph, graph.graph, *graph.graph.all_nodes()):
        part.metadata_props.clear()
        part.doc_string = None
    values = [*graph.graph.inputs, *graph.graph.initializers.values()]
    values += [value for node in graph.graph.all_nodes() for value in node.outputs]
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None
        if names and value.shape is not None:
            dims = (d if isinstance(d, int) else _renamed(d.value, names) for d in value.shape)
            value.shape = onnx_ir.Shape(dims)
    graph.graph.name = "image_classifier"
    graph.producer_name = "hfvit"
    graph.producer_version = hfvit.__version__


def _renamed(dim: str | None, names: dict[str, str]) -> str | None:
    """Rename the symbols in a dimension's expression, such as `s99 * 3`.

    ONNX Runtime treats dimensions of the same name as equal, and may share memory between such tensors.
    """
    return dim and re.sub(r"\b\w+\b", lambda word: names.get(word[0], word[0]), dim)
