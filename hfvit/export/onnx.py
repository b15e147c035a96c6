"""Export a model to one ONNX file and check it against PyTorch."""

import hashlib
import re
import tempfile
from importlib.metadata import version
from pathlib import Path

import onnx
import onnx_ir
import torch
from torch.export import Dim
from transformers.exporters import OnnxExporter
from transformers.exporters.exporter_onnx import OnnxConfig

import hfvit
from hfvit.artifacts.export_folder import PACKAGES, file_digest
from hfvit.artifacts.export_record import ExportedFile, Parity, TensorInfo
from hfvit.errors import ModelError, one_line
from hfvit.export.fusion import fuse
from hfvit.export.graph import clean
from hfvit.export.half_precision import HALF_TYPES, runnable_on_cpu, to_half
from hfvit.export.parity import check_onnx, check_parity, check_pixels, tolerance
from hfvit.export.preprocessing import add_preprocessing
from hfvit.export.text_inputs import TOKEN_AXIS, check_reads_texts, text_inputs, traced_texts
from hfvit.models.attention import unfused_windows
from hfvit.utils.environment import installed_versions
from hfvit.utils.files import temporary_file
from hfvit.utils.quiet import silenced

DTYPES = ("fp32", *HALF_TYPES)
BATCH_AXIS = "batch_size"
TRACED_BATCH = 2  # torch.export would fix a batch of 1
OPSETS = (18, 19, 20, 21, 22, 23)
PROTOBUF_LIMIT = 2**31 - 1


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
) -> ExportedFile:
    """Write a loaded image classifier as one checked ONNX file, and return what export.json holds of it.

    The graph takes `pixel_values` `(batch_size, channels, height, width)` and gives `logits` `(batch_size, classes)`,
    both float32 whatever its `dtype`. Of a model that reads texts it takes `input_ids` and `attention_mask`
    `(batch_size, tokens)` int64, too.

    Args:
        opset: 18 to 23; the exporter's own when None.
        dtype: `fp32`, `fp16` or `bf16`: what the matrix products compute in. LayerNorm and Softmax stay in fp32.
        optimize: fuse operators for ONNX Runtime on CPUs; no other runtime reads such a file.
        batch_size: the only one of a graph without `dynamic_axes`; without consequence for others.
        atol: largest difference of a logit from PyTorch's; by default it follows `dtype` and the logits' magnitude.
        preprocessing: an image processor whose steps the graph shall do itself. It then takes `pixels`
            `(batch_size, height, width, 3)` uint8, of any height and width.
        image_size: (height, width) in pixels of what the model takes; the configuration's when None.
        verbose: let the exporter print and warn.

    Raises `ModelError`, and leaves no file, when the model cannot be exported or ONNX Runtime's logits are not
    PyTorch's.
    """
    _check_arguments(model, opset, dtype, optimize, batch_size)
    check_reads_texts(model, optimize=optimize, with_preprocessing=preprocessing is not None)
    path = Path(path)
    shape = (input_channels(model), *(image_size or configured_image_size(model)))
    model = model.eval()
    graph = _trace(model, shape, opset, batch_size if not dynamic_axes else None, verbose)
    _keep_logits(graph)
    if optimize:
        fuse(graph)
    if dtype != "fp32":
        to_half(graph, dtype)
    _tidy(graph)
    batches = [1, 3, TRACED_BATCH + 3] if dynamic_axes else [batch_size]
    with temporary_file(path) as temporary:
        _save(graph, temporary, with_shapes=not optimize)
        parity = check_graph(temporary, model, shape, batches, dtype, tolerance(dtype, atol), preprocessing, path.name)
    fixed = None if dynamic_axes else batch_size
    record = describe(path, shape, parity, dtype=dtype, optimized=optimize, batch_size=fixed)
    record.text_inputs = text_inputs(model, fixed or BATCH_AXIS)
    return record


def check_graph(
    path: Path,
    model,
    shape: tuple[int, int, int],
    batch_sizes: list[int],
    dtype: str,
    limit: dict,
    preprocessing,
    what: str,
) -> Parity:
    """Check the file at `path` against `model`, then put the preprocessing before it and check that, too.

    Raises `ModelError` for a file that is not valid or whose logits differ too much.
    """
    check_onnx(path)
    with tempfile.TemporaryDirectory() as folder:
        core = path
        if dtype == "bf16":
            core = Path(folder) / "core.onnx"
            onnx_ir.save(runnable_on_cpu(onnx_ir.load(path)), core)
        parity = check_parity(core, model, shape, batch_sizes, limit, what)
        if preprocessing is not None:
            whole = Path(folder) / "whole.onnx"
            add_preprocessing(core, whole, preprocessing)
            parity.preprocessing = check_pixels(whole, core, preprocessing, batch_sizes, what)
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
    """What export.json holds of one file; quantization, calibration and gate are entered later."""
    opsets = {entry.domain: entry.version for entry in onnx.load(path, load_external_data=False).opset_import}
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


def input_channels(model: torch.nn.Module) -> int:
    """Channels of a picture as a model's configuration says."""
    own = (getattr(model.config, "pretrained_cfg", None) or {}).get("input_size")
    return own[0] if own else getattr(model.config, "num_channels", 3)


def configured_image_size(model: torch.nn.Module) -> tuple[int, int]:
    """(height, width) in pixels that a model's configuration says it takes; 224 where it says nothing."""
    config = model.config
    own = (getattr(config, "pretrained_cfg", None) or {}).get("input_size")
    size = own[-2:] if own else getattr(config, "image_size", None) or 224
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


def weights_sha256(model: torch.nn.Module) -> str:
    """A digest of a model's float32 weights, by which export.json tells one training from another."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def input_tensor(shape: tuple[int, int, int], batch_size: int | None, with_preprocessing: bool) -> TensorInfo:
    """Name, type and shape of the graph's input."""
    batch = batch_size or BATCH_AXIS
    if with_preprocessing:
        return TensorInfo(name="pixels", type="uint8", shape=[batch, "height", "width", 3])
    return TensorInfo(name="pixel_values", type="float32", shape=[batch, *shape])


def _check_arguments(model, opset: int | None, dtype: str, optimize: bool, batch_size: int) -> None:
    if dtype not in DTYPES:
        raise ModelError(f"dtype: {dtype!r} is none of {', '.join(DTYPES)}.")
    if opset is not None and opset not in OPSETS:
        raise ModelError(f"opset: {opset} is outside {OPSETS[0]} to {OPSETS[-1]}, which the exporter can write.")
    if optimize and dtype != "fp32":
        raise ModelError(f"optimize: the fused operators are for fp32 on CPUs; leave out dtype {dtype} or optimize.")
    if batch_size < 1:
        raise ModelError(f"batch_size: {batch_size} is no number of images.")
    if next(model.parameters()).dtype != torch.float32:
        raise ModelError(
            'The model is not in float32; load it with dtype="float32", dtype= of the export does the rest.'
        )


def _trace(model, shape, opset: int | None, batch_size: int | None, verbose: bool) -> onnx_ir.Model:
    """The exporter's own graph; with `batch_size` None its batch axis is free."""
    device = next(model.parameters()).device
    pixel_values = torch.zeros((batch_size or TRACED_BATCH, *shape), device=device)
    batch_axis = None if batch_size else Dim(BATCH_AXIS, min=1)
    texts, text_axes = traced_texts(model, len(pixel_values), batch_axis)
    axes = {} if batch_axis is None else {"pixel_values": {0: batch_axis}}
    config = OnnxConfig(opset_version=opset, dynamic_shapes=(axes | text_axes) or None)
    try:
        with silenced(verbose), unfused_windows(model):
            graph = OnnxExporter().export(model, {"pixel_values": pixel_values, **texts}, config=config).program
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be exported to ONNX by transformers {version('transformers')}:"
            f" {type(error).__name__}: {one_line(error)[:300]}"
        ) from error
    if opset is not None and graph.opset_imports[""] != opset:
        raise ModelError(
            f"opset: the exporter wrote {graph.opset_imports['']} in place of {opset}; leave opset out to take that."
        )
    return graph


def _keep_logits(graph: onnx_ir.Model) -> None:
    """Drop other outputs: hidden states that a configuration asks for, the two heads of a distilled DeiT."""
    logits = [output for output in graph.graph.outputs if output.name == "logits"]
    if not logits:
        names = ", ".join(output.name for output in graph.graph.outputs)
        raise ModelError(f"The model gives {names} and no logits: it is no image classifier.")
    if len(graph.graph.outputs) > 1:
        graph.graph.outputs.clear()
        graph.graph.outputs.extend(logits)
        clean(graph)


def _tidy(graph: onnx_ir.Model) -> None:
    """One name for the batch axis and for that of tokens; no paths or comments of the exporting machine."""
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
    graph.producer_name, graph.producer_version = "hfvit", hfvit.__version__


def _renamed(dim: str | None, names: dict[str, str]) -> str | None:
    """A dimension's expression, such as `s99 * 3`, under the names of its axes; one that is not known has none.

    (ONNX Runtime takes dimensions of one name for equal, and would lay two tensors into the memory of one.)
    """
    return dim and re.sub(r"\b\w+\b", lambda word: names.get(word[0], word[0]), dim)


def _save(graph: onnx_ir.Model, path: Path, with_shapes: bool) -> None:
    """One file with its weights inside: ORTModel and transformers.js do not find the exporter's `.onnx.data`.

    The shapes of intermediate values may be left out; fusing leaves some behind that are wrong (transformers 5.23).
    """
    size = sum(
        value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None
    )
    if size > PROTOBUF_LIMIT:
        raise ModelError(f"The weights take {size / 1e9:.1f} GB; one ONNX file holds 2 GB. Export with dtype fp16.")
    proto = onnx_ir.to_proto(graph)
    if not with_shapes:
        del proto.graph.value_info[:]
    onnx.save(proto, path)
