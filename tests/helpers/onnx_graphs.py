"""Tiny ONNX graphs whose logits are the mean of each channel times a matrix."""

import json
from pathlib import Path

import numpy as np
import onnx
from helpers.images import LABELS
from onnx import TensorProto, helper, numpy_helper

SIZE = 16
MEAN, STD = 0.5, 0.25
BRIGHTEST = 8.0 * np.eye(3, dtype=np.float32)  # finds the class of every image of `colored_split`


def write_graph(
    path: Path, weights: np.ndarray = BRIGHTEST, batch: int | str = "batch_size", pixels: bool = False, size=SIZE
) -> Path:
    """Write an ONNX file with `weights` `(3, classes)`.

    With `pixels`, it normalizes uint8 images.
    """
    nodes, pooled, spatial = [], "pixel_values", [2, 3]
    constants = {"weights": weights.astype(np.float32)}
    if pixels:
        constants |= {"scale": np.float32(1 / 255), "mean": np.float32(MEAN), "std": np.float32(STD)}
        nodes = [
            helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["floats", "scale"], ["scaled"]),
            helper.make_node("Sub", ["scaled", "mean"], ["centred"]),
            helper.make_node("Div", ["centred", "std"], ["normalised"]),
        ]
        pooled, spatial = "normalised", [1, 2]
        source = helper.make_tensor_value_info("pixels", TensorProto.UINT8, [batch, "height", "width", 3])
    else:
        source = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [batch, 3, size, size])
    constants["spatial"] = np.array(spatial, dtype=np.int64)
    nodes += [
        helper.make_node("ReduceMean", [pooled, "spatial"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "weights"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "brightest",
        [source],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, weights.shape[1]])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def write_configs(folder: Path, labels: list[str] = LABELS, size: int = SIZE, processor: bool = True) -> Path:
    """Write `config.json` and `preprocessor_config.json` of an export."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {str(index): label for index, label in enumerate(labels)}
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", "id2label": names}))
    if processor:
        sides = {"height": size, "width": size}
        steps = {"image_processor_type": "ViTImageProcessor", "size": sides, "resample": 2}
        steps |= {"image_mean": [MEAN] * 3, "image_std": [STD] * 3}
        (folder / "preprocessor_config.json").write_text(json.dumps(steps))
    return folder


def expected_logits(image, weights: np.ndarray = BRIGHTEST) -> np.ndarray:
    """Compute the logits of the graph for a PIL image of its size with NumPy."""
    means = ((np.asarray(image, dtype=np.float64) / 255 - MEAN) / STD).mean(axis=(0, 1))
    return means @ weights
