"""Image preprocessing as ONNX nodes, with Pillow's arithmetic.

The arithmetic is that of src/libImaging/Resample.c.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL.Image import Resampling

from hfvit.errors import ModelError
from hfvit.export.processor_steps import ImageSteps, image_steps

FILTERS = (Resampling.BILINEAR, Resampling.BICUBIC, Resampling.LANCZOS)
PRECISION = 2.0**22  # Pillow's fixed-point weights; float64 represents the sums of weighted levels exactly
PREFIX = "preprocess/"


def add_preprocessing(source: Path, target: Path, processor) -> None:
    """Add the steps of an image processor at the beginning of a graph.

    Args:
        source: ONNX file that takes pixel values.
        target: ONNX file to write, which takes `pixels` (batch_size, height, width, 3) uint8.
        processor: image processor.

    Raises:
        ModelError: the resampling filter is not supported.
    """
    model = onnx.load(source)
    (entry,) = model.graph.input
    batch = entry.type.tensor_type.shape.dim[0]
    nodes, constants = _nodes(image_steps(processor), entry.name)
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])
    model.graph.initializer.extend(constants)
    shape = [batch.dim_param or batch.dim_value, "height", "width", 3]
    entry.CopyFrom(helper.make_tensor_value_info("pixels", TensorProto.UINT8, shape))
    onnx.save(model, target)


def preprocessing_graph(processor, opset: int) -> onnx.ModelProto:
    """Return a graph of the steps, from `pixels` uint8 to `pixel_values` float32."""
    nodes, constants = _nodes(image_steps(processor), "pixel_values")
    graph = helper.make_graph(
        nodes,
        "preprocessing",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch_size", "height", "width", 3])],
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch_size", 3, None, None])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def check_steps(steps: ImageSteps) -> None:
    """Raise `ModelError` for a resampling filter that a graph cannot compute."""
    if steps.resize and steps.resample not in FILTERS:
        names = ", ".join(name.name.lower() for name in FILTERS)
        raise ModelError(
            f"--with_preprocessing: the resize filter of the image processor must be one of {names}, got"
            f" {steps.resample.name.lower()}. Omit the option."
        )


def _nodes(steps: ImageSteps, output: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Return the nodes from `pixels` to `output`, and their constants."""
    check_steps(steps)
    build = _Builder()
    value = build.node("Transpose", "pixels", perm=[0, 3, 1, 2])
    size = build.node("Shape", value, start=2, end=4)
    if steps.resize:
        columns = build.node("Transpose", _weights(build, size, 1, steps), perm=[1, 0])
        value = _rounded(build, build.node("MatMul", build.to_double(value), columns))
        value = _rounded(build, build.node("MatMul", _weights(build, size, 0, steps), value))
    value = build.node("Cast", value, to=TensorProto.FLOAT)
    if steps.crop and not steps.resize:
        crop = build.constant(list(steps.crop))
        start = _crop_start(build, size, crop, steps.rounds_crop_down)
        value = build.node("Slice", value, start, build.node("Add", start, crop), build.constant([2, 3]))
    if steps.scale is not None:
        value = build.node("Mul", value, build.constant(steps.scale))
    if steps.mean is not None:
        value = build.node("Sub", value, build.constant(np.float32(steps.mean).reshape(1, 3, 1, 1)))
        value = build.node("Div", value, build.constant(np.float32(steps.std).reshape(1, 3, 1, 1)))
    build.nodes.append(helper.make_node("Identity", [value], [output], name=f"{PREFIX}{output}"))
    return build.nodes, build.constants


def _weights(build: "_Builder", size: str, axis: int, steps: ImageSteps) -> str:
    """Compute resampling weights (output size, input size) of one axis (0 is height).

    As in Pillow, the filter is stretched when an image shrinks, cut at the borders, normalized to sum to 1, and
    rounded to multiples of 1 / `PRECISION`, halves away from zero.
    """
    length = build.node("Slice", size, build.constant([axis]), build.constant([axis + 1]))
    if isinstance(steps.resize, tuple):
        resized = build.constant([steps.resize[axis]])
    else:  # rounds the longer side down, as `int(size * long / short)` does
        shorter = build.node("ReduceMin", size, keepdims=1)
        resized = build.node("Div", build.node("Mul", length, build.constant([steps.resize])), shorter)
    count = build.constant([steps.crop[axis]]) if steps.crop else resized
    start = _crop_start(build, resized, count, steps.rounds_crop_down) if steps.crop else build.constant([0])

    scale = build.node("Div", build.to_double(length), build.to_double(resized))
    stretch = build.node("Max", scale, build.double(1.0))
    position = build.node("Add", build.range(count), build.to_double(start))
    center = build.node("Mul", build.node("Add", position, build.double(0.5)), scale)
    center = build.node("Unsqueeze", center, build.constant([1]))
    pixel = build.node("Add", build.range(length), build.double(0.5))
    distance = build.node("Abs", build.node("Sub", pixel, center))
    weights = _filter(build, build.node("Div", distance, stretch), steps.resample)
    weights = build.node("Div", weights, build.node("ReduceSum", weights, build.constant([1]), keepdims=1))
    half = build.node("Mul", build.node("Sign", weights), build.double(0.5))
    fixed = build.node("Add", build.node("Mul", weights, build.double(PRECISION)), half)
    fixed = build.to_double(build.node("Cast", fixed, to=TensorProto.INT64))  # truncates
    return build.node("Div", fixed, build.double(PRECISION))


def _filter(build: "_Builder", distance: str, resample: Resampling) -> str:
    """Compute Pillow's bilinear, bicubic or Lanczos filter.

    Bicubic is that of Keys (1981) with a = -0.5.
    """
    if resample == Resampling.LANCZOS:
        inside = build.node("Cast", build.node("Less", distance, build.double(3.0)), to=TensorProto.DOUBLE)
        distance = build.node("Max", distance, build.double(1e-12))  # sinc(1e-12) is 1
        wide = build.node("Div", distance, build.double(3.0))
        return build.node("Mul", inside, build.node("Mul", _sinc(build, distance), _sinc(build, wide)))
    near = build.node("Relu", build.node("Sub", build.double(1.0), distance))
    if resample == Resampling.BILINEAR:
        return near
    far = build.node("Relu", build.node("Sub", build.double(2.0), distance))
    # f(x) = 0.5 far^2 (far - 1) + near^2 (1 - 2 near)
    outer = build.node("Mul", build.node("Mul", far, far), build.node("Sub", far, build.double(1.0)))
    inner = build.node("Sub", build.double(1.0), build.node("Add", near, near))
    inner = build.node("Mul", build.node("Mul", near, near), inner)
    return build.node("Add", build.node("Mul", outer, build.double(0.5)), inner)


def _sinc(build: "_Builder", value: str) -> str:
    angle = build.node("Mul", value, build.double(np.pi))
    return build.node("Div", build.node("Sin", angle), angle)


def _rounded(build: "_Builder", value: str) -> str:
    """Round to integers from 0 to 255, halves upwards."""
    value = build.node("Floor", build.node("Add", value, build.double(0.5)))
    return build.node("Clip", value, build.double(0.0), build.double(255.0))


def _crop_start(build: "_Builder", size: str, crop: str, rounds_down: bool) -> str:
    margin = build.node("Sub", size, crop)
    if rounds_down:
        return build.node("Div", margin, build.constant([2]))
    half = build.node("Mul", build.to_double(margin), build.double(0.5))
    return build.node("Cast", build.node("Round", half), to=TensorProto.INT64)  # halves to even, as Python's round


class _Builder:
    """Collect nodes, each with one output and a unique name, and constants."""

    def __init__(self):
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def node(self, op_type: str, *inputs: str, **attributes) -> str:
        name = f"{PREFIX}{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value) -> str:
        """Add a constant: float32, or int64 if `value` has integers."""
        array = np.asarray(value)
        return self._add(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))

    def _add(self, array: np.ndarray) -> str:
        name = f"{PREFIX}constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def double(self, value: float) -> str:
        """Add a float64 constant."""
        return self._add(np.float64(value))

    def to_double(self, value: str) -> str:
        return self.node("Cast", value, to=TensorProto.DOUBLE)

    def range(self, count: str) -> str:
        """Add float64 [0, 1, ..., count - 1]; `count` is an int64 array with one element."""
        stop = self.node("Squeeze", count)
        return self.to_double(self.node("Range", self.constant(np.int64(0)), stop, self.constant(np.int64(1))))
