"""Convert an ONNX graph to fp16 or bf16."""

from collections.abc import Collection, Iterable

import numpy as np
import onnx
import onnx_ir
from onnx_ir import DataType

from hfvit.export.graph import cpu_session

HALF_TYPES = {"fp16": DataType.FLOAT16, "bf16": DataType.BFLOAT16}
LARGEST = {DataType.FLOAT16: 65504.0, DataType.BFLOAT16: 3.3e38}
SMALLEST = {DataType.FLOAT16: 2.0**-14, DataType.BFLOAT16: 2.0**-126}  # with all bits of the mantissa

HEADROOM = 4  # of the largest values on the measured images, for other images

COMPUTE = {"MatMul", "Gemm", "Conv"}
QUANTIZERS = {"QuantizeLinear", "DequantizeLinear"}
FOLLOW = {
    "Abs", "Add", "Clip", "Concat", "Div", "Erf", "Expand", "Flatten", "Gather", "Gelu", "HardSigmoid", "HardSwish",
    "Identity", "LeakyRelu", "MaxPool", "Mul", "Neg", "Pad", "Relu", "Reshape", "Sigmoid", "Slice", "Split", "Squeeze",
    "Sub", "Tanh", "Tile", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


def wide_values(model: onnx_ir.Model, feeds: Iterable[dict[str, np.ndarray]]) -> dict[str, float]:
    """Return computed values that may exceed the range of fp16.

    ONNX Runtime computes fp16 graphs in float32 on CPUs, so that comparing logits there does not show an overflow.

    Args:
        model: graph in float32.
        feeds: inputs by name, of one or more batches.

    Returns:
        Largest magnitude by name of the value.
    """
    proto = onnx_ir.to_proto(model)
    names = [value.name for node in model.graph for value in node.outputs if value.dtype == DataType.FLOAT]
    del proto.graph.output[:]
    for name in names:
        proto.graph.node.append(onnx.helper.make_node("Abs", [name], [f"{name}/abs"]))
        proto.graph.node.append(onnx.helper.make_node("ReduceMax", [f"{name}/abs"], [f"{name}/max"], keepdims=0))
        proto.graph.output.append(onnx.ValueInfoProto(name=f"{name}/max"))
    session = cpu_session(proto)
    largest = np.zeros(len(names))
    for feed in feeds:
        largest = np.fmax(largest, [float(value) for value in session.run(None, feed)])
    limit = LARGEST[DataType.FLOAT16] / HEADROOM
    return {name: float(value) for name, value in zip(names, largest, strict=True) if value > limit}


def to_half(model: onnx_ir.Model, dtype: str, wide: Collection[str]) -> None:
    """Convert a graph in place, with float32 inputs and outputs.

    Args:
        model: graph in float32, with or without Q/DQ pairs.
        dtype: "fp16" or "bf16".
        wide: names of values that stay in float32, with the operators that read or compute them.
    """
    half = HALF_TYPES[dtype]
    opset = model.graph.opset_imports[""]
    caster = _Caster(model.graph)
    for node in list(model.graph):
        if node.op_type == "Cast":
            continue
        touches_wide = any(value is not None and value.name in wide for value in (*node.inputs, *node.outputs))
        floats = [(i, v) for i, v in enumerate(node.inputs) if v is not None and v.dtype in (DataType.FLOAT, half)]
        fits = not touches_wide and _computes_in_half(node, [value for _, value in floats], half, opset)
        target = half if fits else DataType.FLOAT
        for index, value in floats:
            if value.dtype != target:
                node.replace_input_with(index, caster.cast(value, target, before=node))
        for output in node.outputs:
            if output.dtype == DataType.FLOAT:
                output.dtype = target
    for index, output in enumerate(model.graph.outputs):
        if output.dtype == half:
            name = output.name
            output.name = f"{name}_{dtype}"
            model.graph.outputs[index] = caster.cast(output, DataType.FLOAT)
            model.graph.outputs[index].name = name
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


def runnable_on_cpu(model: onnx_ir.Model) -> onnx_ir.Model:
    """Return a copy of a bf16 graph that computes in float32, rounding to bf16.

    ONNX Runtime 1.32 has no bf16 arithmetic on CPUs, only casts.
    """
    copy = model.clone()
    for node in list(copy.graph):
        if node.op_type == "Cast":
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == DataType.BFLOAT16:
                cast = onnx_ir.node("Cast", [value], attributes={"to": int(DataType.FLOAT)})
                cast.outputs[0].dtype = DataType.FLOAT
                copy.graph.insert_before(node, cast)
                node.replace_input_with(index, cast.outputs[0])
        for output in node.outputs:
            if output.dtype == DataType.BFLOAT16:
                cast = onnx_ir.node("Cast", [output], attributes={"to": int(DataType.BFLOAT16)})
                output.dtype = DataType.FLOAT
                copy.graph.insert_after(node, cast)
                cast.outputs[0].dtype = DataType.BFLOAT16
                output.replace_all_uses_with(cast.outputs[0])
                cast.replace_input_with(0, output)
    return copy


def _computes_in_half(node: onnx_ir.Node, values: list[onnx_ir.Value], half: DataType, opset: int) -> bool:
    if not _supports(node, half, opset):
        return False
    if node.op_type in COMPUTE:
        return True
    if node.op_type in QUANTIZERS:
        scale = node.inputs[1].const_value.numpy()
        is_exact = scale.ndim == 1 or float(scale) >= SMALLEST[half]  # a vector is of weights; tiny ones do not matter
        return is_exact and (node.op_type == "DequantizeLinear" or node.inputs[0].dtype == half)
    computed = [value for value in values if value.const_value is None]
    constants = [value.const_value.numpy() for value in values if value.const_value is not None]
    fits = all(np.abs(constant, dtype=np.float32).max(initial=0) <= LARGEST[half] for constant in constants)
    return node.op_type in FOLLOW and bool(computed) and fits and all(value.dtype == half for value in computed)


def _supports(node: onnx_ir.Node, half: DataType, opset: int) -> bool:
    """Return whether ONNX defines the operator for this type (bf16 Conv: opset 22)."""
    types = onnx.defs.get_schema(node.op_type, opset, node.domain).type_constraints
    return f"tensor({half.name.lower()})" in {name for kind in types for name in kind.allowed_type_strs}


class _Caster:
    """Convert constants and insert Cast nodes, once per value and type."""

    def __init__(self, graph: onnx_ir.Graph):
        self.graph = graph
        self.done: dict[tuple[int, DataType], onnx_ir.Value] = {}

    def cast(self, value: onnx_ir.Value, dtype: DataType, before: onnx_ir.Node | None = None) -> onnx_ir.Value:
        """Return `value` in another type.

        Args:
            value: a constant or computed value.
            dtype: target type.
            before: node before which a Cast is inserted; None appends it.
        """
        key = (id(value), dtype)
        if key not in self.done:
            self.done[key] = (
                self._cast_constant(value, dtype)
                if value.const_value is not None
                else self._cast_computed(value, dtype, before)
            )
        return self.done[key]

    def _cast_constant(self, value: onnx_ir.Value, dtype: DataType) -> onnx_ir.Value:
        array = value.const_value.numpy().astype(dtype.numpy())
        name = f"{value.name}_{dtype.name.lower()}"
        constant = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(array, dtype=dtype, name=name))
        constant.dtype = dtype
        constant.shape = value.shape
        self.graph.register_initializer(constant)
        return constant

    def _cast_computed(self, value: onnx_ir.Value, dtype: DataType, before: onnx_ir.Node | None) -> onnx_ir.Value:
        node = onnx_ir.node(
            "Cast", [value], attributes={"to": int(dtype)}, name=f"{value.name}_to_{dtype.name.lower()}"
        )
        output = node.outputs[0]
        output.name = f"{value.name}_{dtype.name.lower()}"
        output.dtype = dtype
        output.shape = value.shape
        if before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(before, node)
        return output
