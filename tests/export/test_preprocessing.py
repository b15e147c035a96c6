"""Preprocessing in the graph and as a stock processor equals the checkpoint's processor."""

import copy
import json

import numpy as np
import onnxruntime
import PIL
import pytest
import torch
import torchvision
import transformers
from helpers.images import LABELS
from helpers.messages import assert_names
from helpers.models import build_model
from helpers.onnx_graphs import SIZE, write_configs, write_graph
from helpers.recipes import ARCHITECTURE, MICRO
from packaging.version import Version
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from hfvit.errors import ModelError
from hfvit.export import parity
from hfvit.export.client_config import stock_processor_config
from hfvit.export.onnx import export_onnx
from hfvit.export.parity import check_pixels
from hfvit.export.preprocessing import preprocessing_graph
from hfvit.export.processor_steps import image_steps
from hfvit.inference.classifier import load_classifier

PILLOW = int(PIL.__version__.split(".")[0])
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# Shrunk, enlarged, wide, tall, unchanged, and with odd crop margins.
SIZES = [(97, 131), (301, 224), (24, 19), (31, 400), (400, 33), (48, 48), (51, 64), (375, 500)]


def timm_processor(**values):
    defaults = {"input_size": [3, 48, 48], "interpolation": "bicubic", "mean": MEAN, "std": STD, "crop_pct": 1.0}
    return TimmWrapperImageProcessor(pretrained_cfg={**defaults, "crop_mode": "center", **values})


def square(size):
    return {"height": size, "width": size}


PROCESSORS = {
    "timm": timm_processor(),
    "timm-0.9": timm_processor(crop_pct=0.9),
    "timm-0.95-bilinear": timm_processor(crop_pct=0.95, interpolation="bilinear"),
    "timm-squash": timm_processor(crop_mode="squash"),
    "timm-squash-crop": timm_processor(crop_mode="squash", crop_pct=48 / 54),
    "timm-rectangle": timm_processor(input_size=[3, 32, 48], crop_mode="squash"),
    "timm-rectangle-crop": timm_processor(input_size=[3, 48, 32], crop_mode="squash", crop_pct=48 / 52),
    "timm-lanczos": timm_processor(interpolation="lanczos"),
    "vit": transformers.ViTImageProcessor(size=square(48)),
    "deit": transformers.DeiTImageProcessor(size=square(55), crop_size=square(48)),
    "beit": transformers.BeitImageProcessor(size=square(48)),
    "bit": transformers.BitImageProcessor(size={"shortest_edge": 55}, crop_size=square(48)),
    "convnext": transformers.ConvNextImageProcessor(size={"shortest_edge": 48}),
    "convnext-384": transformers.ConvNextImageProcessor(size={"shortest_edge": 384}),
    "levit": transformers.LevitImageProcessor(size={"shortest_edge": 48}, crop_size=square(48)),
    "poolformer": transformers.PoolFormerImageProcessor(size={"shortest_edge": 48}, crop_size=square(48)),
    "crop-only": transformers.ViTImageProcessor(do_resize=False, do_center_crop=True, crop_size=square(17)),
    "no-norm": transformers.ViTImageProcessor(size=square(48), do_normalize=False),
}


def images(height, width, count=2, seed=0):
    """Return noise over a gradient, (count, height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 180, width)[None, None, :, None] * np.linspace(0.3, 1, height)[None, :, None, None]
    return (ramp + rng.integers(0, 76, (count, height, width, 3))).astype(np.uint8)


def processed(processor, pixels):
    return processor([Image.fromarray(p) for p in pixels], return_tensors="pt")["pixel_values"].numpy()


def levels(processor, difference):
    """Convert a difference of pixel values to levels of 255."""
    std = np.float32(processor.image_std if hasattr(processor, "image_std") else STD)
    if getattr(processor, "do_normalize", True) is False:
        std = np.ones(3, np.float32)
    return np.abs(difference) * std[:, None, None] * 255


@pytest.mark.parametrize("name", PROCESSORS)
def test_preprocessing_graph_equals_the_processor(name):
    """Allow no difference from Pillow 12, and one level of 255 at few pixels for torchvision.

    Pillow 13 resizes some images down before across, which rounds up to a quarter of the pixels otherwise.
    """
    exact = name.startswith("timm") and PILLOW < 13
    processor = PROCESSORS[name]
    graph = preprocessing_graph(processor, opset=18).SerializeToString()
    runtime = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    for height, width in SIZES:
        pixels = images(height, width)
        (pixel_values,) = runtime.run(None, {"pixels": pixels})
        wanted = processed(processor, pixels)
        assert pixel_values.shape == wanted.shape
        off = levels(processor, pixel_values - wanted)
        assert off.max() < (0.01 if exact else 2.01), (height, width)
        assert (off > 0.5).mean() < (0.05 if PILLOW < 13 else 0.25), (height, width)


@pytest.fixture(scope="module")
def micro():
    torch.manual_seed(0)
    model = build_model(LABELS, architecture=ARCHITECTURE, image_size=48, timm_kwargs=MICRO).eval()
    with torch.no_grad():
        model.timm_model.head.weight.mul_(50)  # separates the classes by more than rounding
    return model


@pytest.mark.parametrize(("dtype", "within"), [("fp32", 0.05), ("fp16", 0.1)])
def test_export_with_preprocessing_of_raw_images_gives_the_logits(dtype, within, micro, tmp_path):
    processor = PROCESSORS["timm-0.9"]
    path = tmp_path / "raw.onnx"
    record = export_onnx(micro, path, dtype=dtype, preprocessing=processor)
    assert record.with_preprocessing
    assert record.input.to_json() == {"name": "pixels", "type": "uint8", "shape": ["batch_size", "height", "width", 3]}
    assert record.parity.preprocessing.max_levels <= 1.01
    runtime = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (source,) = runtime.get_inputs()
    assert (source.name, source.type, source.shape) == (
        "pixels",
        "tensor(uint8)",
        ["batch_size", "height", "width", 3],
    )
    for (height, width), count in zip(SIZES, (1, 3, 2, 1, 1, 2, 4, 1), strict=True):
        pixels = images(height, width, count, seed=count)
        (logits,) = runtime.run(None, {"pixels": pixels})
        with torch.inference_mode():
            wanted = micro(torch.from_numpy(processed(processor, pixels))).logits.numpy()
        np.testing.assert_allclose(logits, wanted, atol=within)
        assert (logits.argmax(1) == wanted.argmax(1)).all()


def test_check_pixels_refuses_other_logits_and_other_pixel_values(micro, tmp_path, monkeypatch):
    core, other, full = (tmp_path / f"{name}.onnx" for name in ("core", "other", "full"))
    changed = copy.deepcopy(micro)
    with torch.no_grad():
        changed.timm_model.head.bias += 1
    export_onnx(micro, core)
    export_onnx(changed, other)
    export_onnx(micro, full, preprocessing=PROCESSORS["timm"])
    assert check_pixels(full, core, PROCESSORS["timm"], [2], "x.onnx").max_levels < 2.01
    with pytest.raises(ModelError, match=r"^x\.onnx: "):
        check_pixels(full, other, PROCESSORS["timm"], [2], "x.onnx")
    graph = preprocessing_graph(PROCESSORS["timm"], opset=18)
    monkeypatch.setattr(parity, "preprocessing_graph", lambda processor, opset: graph)
    with pytest.raises(ModelError, match=r"^x\.onnx: "):
        check_pixels(full, core, PROCESSORS["timm-0.9"], [2], "x.onnx")


def test_check_pixels_refuses_nan_logits(tmp_path):
    weights = np.full((3, 3), np.nan)
    core = write_graph(tmp_path / "core.onnx", weights, size=48)
    full = write_graph(tmp_path / "full.onnx", weights, pixels=True)
    with pytest.raises(ModelError, match=r"^x\.onnx: "):
        check_pixels(full, core, PROCESSORS["vit"], [2], "x.onnx")


@pytest.mark.parametrize(
    ("processor", "data"),
    [
        (timm_processor(interpolation="nearest"), ["--with_preprocessing", "nearest", "lanczos"]),
        (timm_processor(crop_mode="border"), ["ResizeKeepRatio"]),
        (transformers.ViTImageProcessor(do_pad=True, pad_size=square(60)), ["ViTImageProcessor", "do_pad"]),
        (transformers.BitImageProcessor(size={"shortest_edge": 40}, crop_size=square(48)), [(48, 48), 40]),
        (transformers.TextNetImageProcessor(), ["TextNetImageProcessor", "ViTImageProcessor"]),
    ],
)
def test_preprocessing_graph_of_unsupported_steps_names_them(processor, data):
    with pytest.raises(ModelError) as caught:
        preprocessing_graph(processor, opset=18)
    assert_names(caught.value, *data)


@pytest.mark.parametrize("name", [name for name in PROCESSORS if name.startswith("timm")])
def test_stock_processor_config_of_timm_equals_its_processor(name, tmp_path):
    """Allow two levels of 255, and one pixel offset for odd crop margins."""
    if name == "timm-lanczos" and Version(torchvision.__version__) < Version("0.27"):
        pytest.skip("transformers resizes by BICUBIC in place of LANCZOS with torchvision < 0.27")
    processor = PROCESSORS[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stock_processor_config(processor)))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    stock = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(stock).__name__.removesuffix("Fast") in ("ViTImageProcessor", "BitImageProcessor")
    moved = 0
    for height, width in SIZES:
        pixels = images(height, width)
        ours, timms = processed(stock, pixels), processed(processor, pixels)
        assert ours.shape == timms.shape
        *_, rows, columns = timms.shape
        # timm's crop may start one pixel later: then compare the overlap.
        shifts = [(0, 0), (1, 0), (0, 1), (1, 1)]
        off = [
            levels(processor, ours[..., down:, right:] - timms[..., : rows - down, : columns - right]).max()
            for down, right in shifts
        ]
        best = int(np.argmin(off))
        assert off[best] < 2.01, (height, width)
        moved += best > 0
    assert moved <= {"timm": 3, "timm-0.9": 3, "timm-0.95-bilinear": 5, "timm-lanczos": 3}.get(name, 0)


def test_stock_processor_config_of_stock_processor_is_unchanged(tmp_path):
    for name in ("vit", "deit", "convnext", "bit"):
        config = stock_processor_config(PROCESSORS[name])
        assert config["image_processor_type"] == type(PROCESSORS[name]).__name__
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(stock_processor_config(PROCESSORS[name])))
        again = AutoImageProcessor.from_pretrained(tmp_path)
        assert image_steps(again) == image_steps(PROCESSORS[name])


@pytest.mark.parametrize("name", ["beit", "levit", "poolformer"])
def test_stock_processor_config_of_class_that_transformers_js_lacks_has_its_steps(name, tmp_path):
    config = stock_processor_config(PROCESSORS[name])
    assert config["image_processor_type"] in ("ViTImageProcessor", "BitImageProcessor")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    stock = AutoImageProcessor.from_pretrained(tmp_path)
    for height, width in SIZES:
        pixels = images(height, width, count=1)
        np.testing.assert_allclose(processed(stock, pixels), processed(PROCESSORS[name], pixels), atol=1e-6)


def test_stock_processor_config_of_unknown_steps_is_unchanged():
    config = stock_processor_config(transformers.TextNetImageProcessor())
    assert config["image_processor_type"] == "TextNetImageProcessor"
    assert config["size_divisor"] == 32


@pytest.mark.parametrize(
    ("cfg", "kept"),
    [
        ({"crop_mode": "center"}, True),
        ({"crop_mode": "squash"}, False),
        ({"crop_mode": "squash", "crop_pct": 48 / 54}, False),
        ({"crop_mode": "squash", "crop_pct": 48 / 53.5}, True),  # a margin of 5 pixels
    ],
)
def test_stock_processor_config_keeps_timms_where_crops_may_differ(cfg, kept):
    assert ("pretrained_cfg" in stock_processor_config(timm_processor(**cfg))) == kept


def test_load_classifier_of_export_uses_the_checkpoints_pixels(tmp_path):
    processor = timm_processor(input_size=[3, SIZE, SIZE], crop_pct=0.9)
    write_graph(write_configs(tmp_path) / "model.onnx")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stock_processor_config(processor)))
    noise = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    images = [Image.fromarray(noise), Image.fromarray(noise[:9, :9]), Image.fromarray(noise[:90, :61])]
    np.testing.assert_array_equal(load_classifier(tmp_path).pixel_values(images), processor(images)["pixel_values"])
