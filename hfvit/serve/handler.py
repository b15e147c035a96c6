"""Handler of Hugging Face Inference Endpoints for an image classifier.

This file needs no other part of hfvit than `image_metadata.py`, beside it.

It classifies with the ONNX file, OpenVINO file or checkpoint in its repository or in the folder `model` of it.
"""

import base64
import importlib.util
import io
import json
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers import AutoImageProcessor

# Pillow would start programs for some others.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")
INPUT_TYPES = {"tensor(float16)": np.float16, "tensor(uint8)": np.uint8}  # of ONNX files, beside float32
TOP_K = 5
# Limits of an image, as of the server.
MAX_BYTES = 20 * 2**20
MAX_PIXELS = 32_000_000
MAX_ASPECT_RATIO = 50
MAX_SCANS = 64  # of a progressive JPEG, each of which takes a pass over all pixels
START_OF_SCAN = b"\xff\xda"
TIFF_PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # tag of TIFF files, and one of its values


class EndpointHandler:
    """Classify images.

    Args:
        path: folder of the repository.
    """

    def __init__(self, path: str = ""):
        folder = Path(path or ".")
        if not (folder / "config.json").is_file():
            folder /= "model"
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.takes_pixels = False  # whether the graph includes the preprocessing
        if graphs := sorted(folder.glob("*.onnx")):
            self.logits = self._onnx_logits(graphs[0])
        elif graphs := sorted(folder.glob("*.xml")):
            self.logits = self._openvino_logits(graphs[0])
        else:
            self.logits = self._torch_logits(folder)
        self.processor = _image_processor(folder, is_checkpoint=not graphs)

    def __call__(self, data: dict[str, Any]) -> list:
        """Classify the image or the images of a request.

        Args:
            data: `inputs`, a PIL image, the bytes of an image file, base64 of it, or a list of these; and `parameters`
                with `top_k`.

        Returns:
            `{"label", "score"}` by decreasing score; for a list of images a list of such lists.

        Raises:
            ValueError: `top_k` is not a positive integer, or an image cannot be read or exceeds a limit.
        """
        inputs = data["inputs"]
        top_k = (data.get("parameters") or {}).get("top_k")
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            raise ValueError(f"top_k: must be a positive integer, got {top_k!r}")
        is_many = isinstance(inputs, list)
        images = [_rgb(image) for image in (inputs if is_many else [inputs])]
        classes = [self._best(self.logits(self._prepare(image))[0], top_k) for image in images]
        return classes if is_many else classes[0]

    def _prepare(self, image: Image.Image) -> np.ndarray:
        if self.takes_pixels:
            return np.asarray(image)[None]
        return self.processor([image], return_tensors="pt")["pixel_values"].numpy()

    def _onnx_logits(self, file: Path):
        import onnxruntime

        session = onnxruntime.InferenceSession(file)
        graph_input = session.get_inputs()[0]
        outputs = [output.name for output in session.get_outputs()]
        output = "logits" if "logits" in outputs else outputs[0]
        self.takes_pixels = graph_input.type == "tensor(uint8)"
        dtype = INPUT_TYPES.get(graph_input.type, np.float32)
        images = graph_input.shape[0] if isinstance(graph_input.shape[0], int) else 1

        def logits(values: np.ndarray) -> np.ndarray:
            batch = np.repeat(values.astype(dtype), images, axis=0)  # a fixed batch size gets copies of the image
            return session.run([output], {graph_input.name: batch})[0].astype(np.float32)

        return logits

    def _openvino_logits(self, file: Path):
        import openvino

        model = openvino.Core().read_model(file)
        shape = model.inputs[0].partial_shape
        shape[0] = 1
        model.reshape({0: shape})
        names = [output.get_names() for output in model.outputs]
        output = next((index for index, known in enumerate(names) if "logits" in known), 0)
        hint = ["runtime_options", "INFERENCE_PRECISION_HINT"]
        precision = model.get_rt_info(hint).astype(str) if model.has_rt_info(hint) else "f32"
        compiled = openvino.Core().compile_model(model, "CPU", {hint[1]: precision})
        return lambda values: compiled(values)[output]

    def _torch_logits(self, folder: Path):
        import torch
        from transformers import AutoModelForImageClassification

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=False).to(device).eval()

        @torch.inference_mode()
        def logits(pixel_values: np.ndarray) -> np.ndarray:
            return model(torch.from_numpy(pixel_values).to(device, model.dtype)).logits.float().cpu().numpy()

        return logits

    def _best(self, logits: np.ndarray, top_k: int | None) -> list[dict[str, Any]]:
        if not np.isfinite(logits).all():
            raise ValueError("the model's logits are NaN or infinite")
        names = self._class_names(len(logits))
        is_multi_label = self.config.get("problem_type") == "multi_label_classification" or len(names) == 1
        if is_multi_label:
            scores = 1.0 / (1.0 + np.exp(-logits))
        else:
            exponentials = np.exp(logits - logits.max())
            scores = exponentials / exponentials.sum()
        thresholds = self.config.get("thresholds") if is_multi_label else None
        limit = top_k or (TOP_K if thresholds is None else None)
        order = np.argsort(-scores, kind="stable")[:limit]
        if top_k is None and thresholds is not None:
            order = [index for index in order if scores[index] >= thresholds[index]]
        return [{"label": names[index], "score": float(scores[index])} for index in order]

    def _class_names(self, classes: int) -> list[str]:
        """Return the class names, with the index where several classes have the same."""
        names = self.config.get("id2label") or dict(enumerate(self.config.get("label_names") or ()))
        names = {int(index): name for index, name in names.items()}
        names = [names.get(index, f"LABEL_{index}") for index in range(classes)]
        counts = Counter(names)
        return [f"{name} ({index})" if counts[name] > 1 else name for index, name in enumerate(names)]


def _image_processor(folder: Path, is_checkpoint: bool):
    """Load the image processor with Pillow's arithmetic, as during training."""
    file = folder / "preprocessor_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() and not is_checkpoint else {}
    if "pretrained_cfg" in config:  # its crop may start one pixel later than that of the stock processor
        from transformers import TimmWrapperImageProcessor

        return TimmWrapperImageProcessor(config["pretrained_cfg"])
    return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)


@cache
def _image_metadata() -> ModuleType:
    spec = importlib.util.spec_from_file_location("image_metadata", Path(__file__).with_name("image_metadata.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _rgb(image: Any) -> Image.Image:
    """Read an image as RGB; gray images of more than 8 bits are scaled, not clipped."""
    if isinstance(image, str):
        image = base64.b64decode(image, validate=True)
    if isinstance(image, bytes):
        if len(image) > MAX_BYTES:
            raise ValueError(f"an image must have at most {MAX_BYTES:,} bytes, got {len(image):,}")
        if problem := _image_metadata().excessive_metadata(io.BytesIO(image)):
            raise ValueError(f"an image cannot be read: {problem}")
        scans = image.count(START_OF_SCAN)
        Image.init()
        image = Image.open(io.BytesIO(image), formats=[name for name in FORMATS if name in Image.OPEN])
        if image.format in ("JPEG", "MPO") and scans > MAX_SCANS:
            raise ValueError(f"a JPEG file must have at most {MAX_SCANS} scans, got {scans:,}")
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"an image must have at most {MAX_PIXELS:,} pixels, got {image.width} x {image.height}")
    if max(image.size) > MAX_ASPECT_RATIO * max(1, min(image.size)):
        raise ValueError(f"the aspect ratio must be at most {MAX_ASPECT_RATIO}, got {image.width} x {image.height}")
    is_inverted = image.format == "TIFF" and image.tag_v2.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO
    image.load()  # the metadata of a PNG may follow the pixels
    profile = image.info.get("Raw profile type exif") or ""
    if len(profile) > _image_metadata().MAX_PROFILE:
        raise ValueError(f"an image cannot be read: its EXIF profile has {len(profile):,} characters")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        low, high = 0.0, 65535.0
        if image.mode == "F":
            finite = values[np.isfinite(values)]
            low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
            values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
        elif image.mode == "I" and values.max() <= 255:
            high = 255.0
        image = Image.fromarray(((values - low) * (255.0 / max(high - low, 1e-9))).clip(0, 255).astype(np.uint8))
        if is_inverted:  # as Pillow does for 8 bits
            image = ImageOps.invert(image)
    return image.convert("RGB")
