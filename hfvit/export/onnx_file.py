"""Write an ONNX file one weight at a time, and map it instead of reading it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import onnx
import onnx_ir

from hfvit.errors import ModelError

PROTOBUF_LIMIT = 2**31 - 1
STREAMED_BYTES = 1024  # smaller initializers are part of the graph, as shape inference reads them
# Tags of length-delimited fields in onnx.proto: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data.
GRAPH, INITIALIZER, RAW_DATA = (bytes([number << 3 | 2]) for number in (7, 5, 9))


def write_onnx(graph: onnx_ir.Model, path: Path, with_shapes: bool) -> None:
    """Write one file; ORTModel and transformers.js do not find `.onnx.data`.

    The weights are removed from `graph` as they are written, so that at most one of them is in memory twice.

    Args:
        graph: graph to write, without weights afterwards.
        path: file to write.
        with_shapes: keep the shapes of intermediate values, some of which are wrong after fusion (transformers 5.23).

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
            tensors.pop(tensor.name).tofile(file)


@contextmanager
def mapped_file(path: Path) -> Iterator[Path]:
    """Write the graph of an ONNX file beside it within the context.

    The weights are external data inside the file itself: runtimes map them instead of copying them.

    Args:
        path: ONNX file with its weights inside.

    Raises:
        EOFError: the file is truncated.
    """
    beside = path.with_name(f"{path.stem}.graph.onnx")
    try:
        beside.write_bytes(_mapped(path).SerializeToString())
        yield beside
    finally:
        beside.unlink(missing_ok=True)


def read_header(path: Path) -> onnx.ModelProto:
    """Read an ONNX file without its graph: versions, opsets and metadata.

    Raises:
        EOFError: the file is truncated.
    """
    with path.open("rb") as file:
        fields = _fields(file, path.stat().st_size)
        return onnx.ModelProto.FromString(b"".join(_read(file, field) for field in fields if field.tag != GRAPH))


class _Field(NamedTuple):
    """A field of a serialized message, with positions in the file."""

    tag: bytes
    start: int
    content: int
    stop: int


def _fields(file: BinaryIO, stop: int) -> Iterator[_Field]:
    """Yield the fields of a message, from the position of the file to `stop`."""
    position = file.tell()
    while position < stop:
        start = file.seek(position)
        tag = _read_varint(file)
        kind = tag & 7
        if kind == 2:
            length = _read_varint(file)
        elif kind == 0:
            _read_varint(file)
            length = 0
        else:
            length = {1: 8, 5: 4}[kind]
        position = file.tell() + length
        yield _Field(varint(tag), start, position - length, position)


def _read(file: BinaryIO, field: _Field) -> bytes:
    file.seek(field.start)
    return file.read(field.stop - field.start)


def _mapped(path: Path) -> onnx.ModelProto:
    """Read an ONNX file with its larger weights as external data."""
    model = bytearray()
    rest = bytearray()  # of the graph
    tensors = []
    with path.open("rb") as file:
        for field in _fields(file, path.stat().st_size):
            if field.tag != GRAPH:
                model += _read(file, field)
                continue
            file.seek(field.content)
            for part in _fields(file, field.stop):
                if part.tag == INITIALIZER and part.stop - part.content >= STREAMED_BYTES:
                    tensors.append(_mapped_tensor(file, part, path.name))
                else:
                    rest += _read(file, part)
    mapped = onnx.ModelProto.FromString(bytes(model))
    mapped.graph.MergeFromString(bytes(rest))
    mapped.graph.initializer.extend(tensors)
    return mapped


def _mapped_tensor(file: BinaryIO, initializer: _Field, location: str) -> onnx.TensorProto:
    """Read a weight with its data, if they are raw, as external data of the file.

    Args:
        file: ONNX file.
        initializer: the weight.
        location: name of the file.
    """
    header = bytearray()
    data = None
    file.seek(initializer.content)
    for field in _fields(file, initializer.stop):
        if field.tag == RAW_DATA:
            data = field
        else:
            header += _read(file, field)
    tensor = onnx.TensorProto.FromString(bytes(header))
    if data is not None:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", data.content), ("length", data.stop - data.content)):
            tensor.external_data.add(key=key, value=str(value))
    return tensor


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
