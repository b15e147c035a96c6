"""Write an `onnx_ir` graph to one ONNX file, one weight at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir

from hfvit.errors import ModelError

PROTOBUF_LIMIT = 2**31 - 1
STREAMED_BYTES = 1024  # smaller initializers are part of the graph, as shape inference reads them
# Tags of length-delimited fields in onnx.proto: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data.
GRAPH, INITIALIZER, RAW_DATA = (bytes([number << 3 | 2]) for number in (7, 5, 9))


def write_onnx(graph: onnx_ir.Model, path: Path, with_shapes: bool) -> onnx.ModelProto:
    """Write one file; ORTModel and transformers.js do not find `.onnx.data`.

    The weights are removed from `graph` as they are written, so that at most one of them is in memory twice.

    Args:
        graph: graph to write, without weights afterwards.
        path: file to write.
        with_shapes: keep the shapes of intermediate values, some of which are wrong after fusion (transformers 5.23).

    Returns:
        The model with the weights as external data inside the file: runtimes map them instead of copying them.

    Raises:
        ModelError: the file would exceed 2 GB.
    """
    initializers = graph.graph.initializers
    tensors = {name: value.const_value for name, value in initializers.items() if value.const_value is not None}
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > PROTOBUF_LIMIT:
        raise ModelError(
            f"The weights take {size / 1e9:.1f} GB, but an ONNX file is limited to 2 GB. Pass dtype fp16."
        )
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.nbytes >= STREAMED_BYTES}
    for name, tensor in tensors.items():
        initializers[name].const_value = onnx_ir.ExternalTensor(
            path.name, 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name, base_dir=path.parent
        )
    model = onnx_ir.to_proto(graph)
    if not with_shapes:
        del model.graph.value_info[:]
    streamed = [tensor for tensor in model.graph.initializer if tensor.name in tensors]
    headers = [
        onnx.TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type).SerializeToString()
        + RAW_DATA
        + varint(tensors[tensor.name].nbytes)
        for tensor in streamed
    ]
    lengths = [len(header) + tensors[tensor.name].nbytes for header, tensor in zip(headers, streamed, strict=True)]
    prefixes = [INITIALIZER + varint(length) for length in lengths]
    outer, inner = _without_weights(model, tensors)
    graph_bytes = len(inner) + sum(map(len, prefixes)) + sum(lengths)
    with path.open("wb") as file:
        file.write(outer + GRAPH + varint(graph_bytes) + inner)
        for tensor, prefix, header in zip(streamed, prefixes, headers, strict=True):
            file.write(prefix + header)
            _set_external(tensor, path.name, file.tell(), tensors[tensor.name].nbytes)
            tensors.pop(tensor.name).tofile(file)
    return model


@contextmanager
def mapped_file(model: onnx.ModelProto, path: Path) -> Iterator[Path]:
    """Save the result of `write_onnx` beside its file within the context.

    Args:
        model: model whose weights are external data in `path`.
        path: file with the weights.
    """
    beside = path.with_name(f"{path.stem}.graph.onnx")
    try:
        beside.write_bytes(model.SerializeToString())
        yield beside
    finally:
        beside.unlink(missing_ok=True)


def read_header(path: Path) -> onnx.ModelProto:
    """Read an ONNX file without its graph: versions, opsets and metadata.

    Raises:
        EOFError: the file is truncated.
    """
    header = bytearray()
    with path.open("rb") as file:
        end = path.stat().st_size
        while file.tell() < end:
            start = file.tell()
            tag = _read_varint(file)
            length = _read_varint(file) if tag & 7 == 2 else 0  # the others are varints, whose value was not read
            if tag & 7 == 0:
                _read_varint(file)
            if tag == GRAPH[0]:
                file.seek(length, os.SEEK_CUR)
                continue
            stop = file.tell() + length
            file.seek(start)
            header += file.read(stop - start)
    return onnx.ModelProto.FromString(bytes(header))


def _read_varint(file: BinaryIO) -> int:
    value = shift = 0
    while True:
        byte = file.read(1)
        if not byte:
            raise EOFError("the ONNX file is truncated")
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
        shift += 7


def varint(value: int) -> bytes:
    """Encode a non-negative integer as protobuf does: 7 bits a byte, the lowest first."""
    output = bytearray()
    while value > 127:
        output.append(value & 127 | 128)
        value >>= 7
    return bytes([*output, value])


def _without_weights(model: onnx.ModelProto, names: dict) -> tuple[bytes, bytes]:
    """Serialize a model without graph, and the graph without some initializers."""
    inner = onnx.GraphProto()
    inner.CopyFrom(model.graph)
    del inner.initializer[:]
    inner.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name not in names)
    outer = onnx.ModelProto()
    outer.CopyFrom(model)
    outer.ClearField("graph")
    return outer.SerializeToString(), inner.SerializeToString()


def _set_external(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Declare the data of a tensor as a part of a file.

    Args:
        tensor: tensor to change.
        location: file name, in the folder of the model.
        offset: start of the data, in bytes.
        length: length of the data, in bytes.
    """
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
