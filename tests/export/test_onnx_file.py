"""ONNX files that are written one weight at a time."""

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest

from hfvit.errors import ModelError
from hfvit.export import onnx_file
from hfvit.export.onnx_file import mapped_file, read_header, varint, write_onnx

RNG = np.random.default_rng(0)
WEIGHTS = {
    "large": RNG.normal(size=(64, 48)).astype(np.float32),
    "half": RNG.normal(size=(48, 32)).astype(np.float16),
    "small": np.array([32, -1], dtype=np.int64),
}


@pytest.fixture
def model() -> onnx.ModelProto:
    """Create a graph with large and small weights of several types."""
    helper = onnx.helper
    nodes = [
        helper.make_node("MatMul", ["x", "large"], ["y"]),
        helper.make_node("Cast", ["y"], ["z"], to=onnx.TensorProto.FLOAT16),
        helper.make_node("MatMul", ["z", "half"], ["w"]),
        helper.make_node("Reshape", ["w", "small"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT16, [32, "rest"])],
        [onnx.numpy_helper.from_array(value, name) for name, value in WEIGHTS.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def run(path):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.ones((4, 64), np.float32)})[0]


def test_write_onnx_equals_the_protobuf_library(model, tmp_path):
    onnx.save(model, tmp_path / "expected.onnx")
    path = tmp_path / "model.onnx"
    write_onnx(onnx_ir.from_proto(model), path, with_shapes=True)
    written = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(written, full_check=True)
    assert [node.op_type for node in written.graph.node] == [node.op_type for node in model.graph.node]
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in written.graph.initializer}
    assert found.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == value.dtype
    np.testing.assert_array_equal(run(path), run(tmp_path / "expected.onnx"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["expected.onnx", "model.onnx"]


@pytest.mark.parametrize("raw", [True, False])
def test_mapped_file_has_the_graph_without_its_large_weights(model, tmp_path, raw):
    if not raw:  # as values of the message, which cannot be mapped
        large = onnx.helper.make_tensor("large", onnx.TensorProto.FLOAT, [64, 48], WEIGHTS["large"].ravel())
        model.graph.initializer[0].CopyFrom(large)
    model.metadata_props.add(key="author", value="x")
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    with mapped_file(path) as beside:
        inside = beside.stat().st_size
        mapped = onnx.load(beside)  # reads the external data
        np.testing.assert_array_equal(run(beside), run(path))
    external = WEIGHTS["half"].nbytes + raw * WEIGHTS["large"].nbytes
    assert inside < path.stat().st_size - external + 200  # names and offsets
    assert mapped.metadata_props == model.metadata_props
    assert mapped.graph.node == model.graph.node
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in mapped.graph.initializer}
    assert found.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        np.testing.assert_array_equal(found[name], value)
    assert list(tmp_path.iterdir()) == [path]


def test_mapped_file_of_a_truncated_file_raises(model, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    path.write_bytes(path.read_bytes()[:1])
    with pytest.raises(EOFError), mapped_file(path):
        pass
    assert list(tmp_path.iterdir()) == [path]


def test_read_header_equals_the_model_without_its_graph(model, tmp_path):
    model.metadata_props.add(key="author", value="x" * 300)
    model.domain = "domain"
    onnx.save(model, tmp_path / "model.onnx")
    model.ClearField("graph")
    assert read_header(tmp_path / "model.onnx") == model


def test_write_onnx_beyond_the_limit_raises(model, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "PROTOBUF_LIMIT", 1000)
    with pytest.raises(ModelError, match="fp16"):
        write_onnx(onnx_ir.from_proto(model), tmp_path / "model.onnx", with_shapes=True)


@pytest.mark.parametrize(("value", "encoded"), [(0, b"\x00"), (127, b"\x7f"), (300, b"\xac\x02")])
def test_varint_equals_the_examples_of_protobuf(value, encoded):
    assert varint(value) == encoded
