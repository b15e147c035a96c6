"""Image preprocessing as ONNX nodes."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL.Image import Resampling

from hfvit.errors import ModelError
from hfvit.export.processor_steps import ImageSteps, image_steps

SUPPORT = {Resampling.BILINEAR: 1.0, Resampling.BICUBIC: 2.0}  # pixels on each side that the filter reaches
PREFIX = "preprocess/"


def add_preprocessing(source: Path, target: Path, processor) -> None:
    """Put the steps of `processor` before the graph in `source`.

    It then takes `pixels` `(batch_size, height, width, 3)` uint8. `ModelError` for a filter that is not supported.
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
    """The steps alone: `pixels` uint8 -> `pixel_values` float32, to compare with the processor."""
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
    """Raise `ModelError` when a graph cannot do these steps."""
    if steps.resize and steps.resample not in SUPPORT:
        raise ModelError(
            f"--with_preprocessing: the image processor resizes with the filter {steps.resample.name.lower()}; a graph"
            " can do bilinear and bicubic. Export without it."
        )


def _nodes(steps: ImageSteps, output: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes from `pixels` to `output`, and their constants."""
    check_steps(steps)
    build = _Builder()
    value = build.node("Transpose", "pixels", perm=[0, 3, 1, 2])
    value = build.node("Cast", value, to=TensorProto.FLOAT)
    size = build.node("Shape", value, start=2, end=4)
    if steps.resize:
        columns = build.node("Transpose", _weights(build, size, 1, steps), perm=[1, 0])
        value = _rounded(build, build.node("MatMul", value, columns))
        value = _rounded(build, build.node("MatMul", _weights(build, size, 0, steps), value))
    elif steps.crop:
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
    """What each pixel of one axis (0 is height) contributes to each pixel of the result, `(result, picture)`.

    Pillow's filter: stretched when the picture shrinks, cut at its borders, then scaled to sum to 1.
    """
    length = build.node("Slice", size, build.constant([axis]), build.constant([axis + 1]))
    if isinstance(steps.resize, tuple):
        resized = build.constant([steps.resize[axis]])
    else:  # the longer side is rounded down, as `int(size * long / short)` is
        shorter = build.node("ReduceMin", size, keepdims=1)
        resized = build.node("Div", build.node("Mul", length, build.constant([steps.resize])), shorter)
    count, start = resized, build.constant([0])
    if steps.crop:
        count = build.constant([steps.crop[axis]])
        start = _crop_start(build, resized, count, steps.rounds_crop_down)

    scale = build.node("Div", build.to_float(length), build.to_float(resized))
    stretch = build.node("Max", scale, build.constant(1.0))
    position = build.node("Add", build.range(count), build.to_float(start))
    centre = build.node("Mul", build.node("Add", position, build.constant(0.5)), scale)
    centre = build.node("Unsqueeze", centre, build.constant([1]))
    pixel = build.node("Add", build.range(length), build.constant(0.5))
    distance = build.node("Abs", build.node("Sub", pixel, centre))
    weights = _filter(build, build.node("Div", distance, stretch), steps.resample)
    return build.node("Div", weights, build.node("ReduceSum", weights, build.constant([1]), keepdims=1))


def _filter(build: "_Builder", distance: str, resample: Resampling) -> str:
    """Pillow's bilinear filter, or its bicubic one (a = -0.5) with Keys' two pieces as powers of `max(0, n - x)`."""
    near = build.node("Relu", build.node("Sub", build.constant(1.0), distance))
    if resample == Resampling.BILINEAR:
        return near
    far = build.node("Relu", build.node("Sub", build.constant(2.0), distance))
    # f(x) = 0.5 far^2 (far - 1) + near^2 (1 - 2 near)
    outer = build.node("Mul", build.node("Mul", far, far), build.node("Sub", far, build.constant(1.0)))
    inner = build.node("Sub", build.constant(1.0), build.node("Add", near, near))
    inner = build.node("Mul", build.node("Mul", near, near), inner)
    return build.node("Add", build.node("Mul", outer, build.constant(0.5)), inner)


def _rounded(build: "_Builder", value: str) -> str:
    """To whole levels from 0 to 255, halves upwards."""
    value = build.node("Floor", build.node("Add", value, build.constant(0.5)))
    return build.node("Clip", value, build.constant(0.0), build.constant(255.0))


def _crop_start(build: "_Builder", size: str, crop: str, rounds_down: bool) -> str:
    spare = build.node("Sub", size, crop)
    if rounds_down:
        return build.node("Div", spare, build.constant([2]))
    half = build.node("Mul", build.to_float(spare), build.constant(0.5))
    return build.node("Cast", build.node("Round", half), to=TensorProto.INT64)  # halves to even, as Python's round


class _Builder:
    """Nodes in order, each with one output and a name of its own."""

    def __init__(self):
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def node(self, op_type: str, *inputs: str, **attributes) -> str:
        name = f"{PREFIX}{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value) -> str:
        """A float32 scalar or array, or an int64 array where `value` holds integers."""
        array = np.asarray(value)
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        name = f"{PREFIX}constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def to_float(self, value: str) -> str:
        return self.node("Cast", value, to=TensorProto.FLOAT)

    def range(self, count: str) -> str:
        """0.0, 1.0, ... of an int64 array of one number."""
        stop = self.node("Squeeze", count)
        return self.to_float(self.node("Range", self.constant(np.int64(0)), stop, self.constant(np.int64(1))))
