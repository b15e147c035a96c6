"""Helpers to read and rewrite an `onnx_ir` graph."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import common as passes

from hfvit.artifacts.artifact import EXECUTORCH_SUFFIX, OPENVINO_SUFFIX
from hfvit.inference.backends import session_options
from hfvit.inference.executorch_backend import ExecuTorchBackend
from hfvit.inference.openvino_backend import OpenVINOBackend

MICROSOFT = "com.microsoft"
RESHAPES = ("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Split", "Identity", "Gather", "Flatten")


class BackendSession:
    """Adapter of other formats to `onnxruntime.InferenceSession.run`."""

    def __init__(self, backend: Callable[[np.ndarray], np.ndarray]):
        self.backend = backend

    def run(self, names: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return the logits for the pixel values of `feed`."""
        return [self.backend(feed["pixel_values"])]


def cpu_session(model: Path | onnx.ModelProto, prepack: bool = True) -> onnxruntime.InferenceSession | BackendSession:
    """Create a CPU session of an exported file, without warnings about shapes.

    Args:
        model: file or model.
        prepack: copy weights to a faster layout.
    """
    if isinstance(model, Path) and model.suffix == OPENVINO_SUFFIX:
        return BackendSession(OpenVINOBackend(model))
    if isinstance(model, Path) and model.suffix == EXECUTORCH_SUFFIX:
        return BackendSession(ExecuTorchBackend(model))
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    options = session_options(prepack=prepack)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def remove_unused_nodes(model: ir.Model) -> None:
    """Remove unused nodes and give the others unique names."""
    passes.RemoveUnusedNodesPass()(model)
    passes.NameFixPass()(model)


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return the array of a constant value, None for a computed one."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def weight(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """Add an initializer.

    Args:
        model: graph to change.
        name: name of the initializer; gets a numeric suffix if it exists.
        array: its values.
    """
    initializers = model.graph.initializers
    unique = name if name not in initializers else f"{name}_{len(initializers)}"
    array = np.array(array, order="C")  # ascontiguousarray would turn a scalar into a vector
    value = ir.Value(name=unique, const_value=ir.tensor(array, name=unique), shape=ir.Shape(array.shape))
    value.dtype = ir.DataType.from_numpy(array.dtype)
    model.graph.register_initializer(value)
    return value


def add_node(before: ir.Node, op_type: str, inputs, *, domain: str = "", like: ir.Value | None = None, **attributes):
    """Insert a node with one output before another.

    Args:
        before: existing node.
        op_type: operator.
        inputs: input values, None for an omitted optional one.
        domain: operator domain, empty for ONNX's own.
        like: value with the type and shape of the output; float32 of unknown shape by default.
        **attributes: attributes of the operator.

    Returns:
        The output of the new node.
    """
    node = ir.node(op_type, inputs, attributes=attributes, domain=domain)
    node.outputs[0].dtype = ir.DataType.FLOAT if like is None else like.dtype
    node.outputs[0].shape = None if like is None else like.shape
    before.graph.insert_before(before, node)
    return node.outputs[0]


def replace(old: ir.Value, new: ir.Value) -> None:
    """Replace all uses of `old` by `new`, which takes its name (and output type)."""
    name = old.name
    old.name = f"{name}.replaced"
    new.name = name
    if old.is_graph_output():
        new.shape = old.shape
        new.dtype = old.dtype
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def single_consumer(value: ir.Value, op_type: str) -> ir.Node | None:
    """Return the only consumer of `value` if it is an `op_type`, else None."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != op_type:
        return None
    return uses[0].node


def other_input(node: ir.Node, value: ir.Value) -> ir.Value:
    """Return the other operand of a binary operator."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


class Linear:
    """Describe a linear layer `x @ kernel + bias` (MatMul or Gemm, constant kernel).

    Args:
        node: the MatMul or Gemm node.
        kernel: weights (in, out).
        bias: bias (out,), or None.
        output: value after the bias is added.
    """

    def __init__(self, node: ir.Node, kernel: np.ndarray, bias: np.ndarray | None, output: ir.Value):
        self.node = node
        self.kernel = kernel
        self.bias = bias
        self.output = output

    @property
    def x(self) -> ir.Value:
        return self.node.inputs[0]

    @classmethod
    def from_node(cls, node: ir.Node) -> "Linear | None":
        """Return the linear layer of a MatMul or Gemm node, None for any other node."""
        kernel = constant(node.inputs[1]) if node.op_type in ("MatMul", "Gemm") and node.domain == "" else None
        if kernel is None or kernel.ndim != 2 or constant(node.inputs[0]) is not None:
            return None
        if node.op_type == "Gemm":
            return cls._gemm(node, kernel)
        addition = single_consumer(node.outputs[0], "Add")
        bias = constant(other_input(addition, node.outputs[0])) if addition is not None else None
        if bias is None or bias.size != kernel.shape[1] or bias.shape[-1:] != (bias.size,):
            return cls(node, kernel, None, node.outputs[0])
        return cls(node, kernel, bias.reshape(-1), addition.outputs[0])

    @classmethod
    def _gemm(cls, node: ir.Node, kernel: np.ndarray) -> "Linear | None":
        plain = node.attributes.get_float("alpha", 1.0) == node.attributes.get_float("beta", 1.0) == 1.0
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        kernel = kernel.T if node.attributes.get_int("transB", 0) else kernel
        unknown_bias = len(node.inputs) > 2 and (bias is None or bias.size != kernel.shape[1])
        if not plain or node.attributes.get_int("transA", 0) or unknown_bias:
            return None
        return cls(node, kernel, None if bias is None else bias.reshape(-1), node.outputs[0])

    @classmethod
    def producing(cls, value: ir.Value | None) -> "Linear | None":
        """Return the linear layer whose output, bias included, is `value`."""
        node = value.producer() if value is not None else None
        if node is not None and node.op_type == "Add":
            products = [v.producer() for v in node.inputs if v is not None and v.producer() is not None]
            node = products[0] if len(products) == 1 else None
        linear = cls.from_node(node) if node is not None else None
        return linear if linear is not None and linear.output is value else None

    def full_bias(self) -> np.ndarray:
        """Return the bias, zeros if there is none."""
        return np.zeros(self.kernel.shape[1], self.kernel.dtype) if self.bias is None else self.bias


def linears(model: ir.Model) -> list[Linear]:
    """Return all linear layers of the graph."""
    return [linear for node in model.graph if (linear := Linear.from_node(node)) is not None]


def add_linear(model: ir.Model, before: ir.Node, x: ir.Value, kernel, bias, name: str) -> ir.Value:
    """Insert a linear layer (MatMul and Add) with new weights.

    Args:
        model: graph to change.
        before: existing node.
        x: input (..., in).
        kernel: weights (in, out).
        bias: bias (out,).
        name: prefix of the initializers' names.

    Returns:
        The output (..., out).
    """
    product = add_node(before, "MatMul", [x, weight(model, f"{name}.weight", kernel)])
    output = add_node(before, "Add", [product, weight(model, f"{name}.bias", bias)])
    product.dtype = output.dtype = x.dtype
    product.shape = output.shape = None if x.shape is None else ir.Shape([*x.shape[:-1], kernel.shape[1]])
    return output


def columns(model: ir.Model, value: ir.Value) -> tuple[ir.Value, np.ndarray] | None:
    """Find `(origin, columns)` such that `value[b, t, :]` is `origin[b, t, columns]`.

    The reshapes in between are evaluated on numbered elements, which recognizes any layout of query, key and value.
    """
    nodes = []
    origin = value
    while (node := origin.producer()) is not None and node.op_type in RESHAPES and node.domain == "":
        if any(constant(extra) is None for extra in node.inputs[1:] if extra is not None):
            return None
        nodes.insert(0, node)
        origin = node.inputs[0]
    shape = None if origin.shape is None else list(origin.shape)
    if shape is None or len(shape) != 3 or not all(isinstance(size, int) for size in shape[1:]):
        return None
    batch = shape[0] if isinstance(shape[0], int) else 2
    numbered = np.arange(batch * shape[1] * shape[2], dtype=np.float64).reshape(batch, *shape[1:])
    moved = _run(model.graph.opset_imports[""], nodes, origin, value, numbered) if nodes else numbered
    if moved.shape[:2] != numbered.shape[:2] or moved.ndim != 3:
        return None
    found = moved[0, 0].astype(int)
    return (origin, found) if found.max() < shape[2] and np.array_equal(moved, numbered[..., found]) else None


def _run(opset: int, nodes: list[ir.Node], origin: ir.Value, value: ir.Value, data: np.ndarray) -> np.ndarray:
    weights = {v.name: v for node in nodes for v in node.inputs[1:] if v is not None}
    graph = onnx.helper.make_graph(
        [ir.to_proto(node) for node in nodes],
        "reshapes",
        [onnx.helper.make_tensor_value_info(origin.name, onnx.TensorProto.DOUBLE, data.shape)],
        [onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.DOUBLE, None)],
        [onnx.numpy_helper.from_array(constant(v), name) for name, v in weights.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    return ReferenceEvaluator(model).run(None, {origin.name: data})[0]
