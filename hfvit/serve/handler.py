"""Handler of Hugging Face Inference Endpoints for an image classifier.

This file imports no other part of hfvit.

It classifies with the ONNX file, OpenVINO file or checkpoint in its repository or in the folder `model` of it.
"""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers import AutoImageProcessor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow would start programs for some others
TOP_K = 5


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
        # Pillow, as during training.
        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        self.takes_pixels = False  # whether the graph includes the preprocessing
        if graphs := sorted(folder.glob("*.onnx")):
            self.logits = self._onnx_logits(graphs[0])
        elif graphs := sorted(folder.glob("*.xml")):
            self.logits = self._openvino_logits(graphs[0])
        else:
            self.logits = self._torch_logits(folder)

    def __call__(self, data: dict[str, Any]) -> list:
        """Classify the image or the images of a request.

        Args:
            data: `inputs`, a PIL image, the bytes of an image file, base64 of it, or a list of these; and `parameters`
                with `top_k`.

        Returns:
            `{"label", "score"}` by decreasing score; for a list of images a list of such lists.
        """
        inputs = data["inputs"]
        top_k = (data.get("parameters") or {}).get("top_k")
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
        self.takes_pixels = graph_input.type == "tensor(uint8)"
        return lambda values: session.run(["logits"], {graph_input.name: values})[0]

    def _openvino_logits(self, file: Path):
        import openvino

        model = openvino.Core().read_model(file)
        hint = ["runtime_options", "INFERENCE_PRECISION_HINT"]
        precision = model.get_rt_info(hint).astype(str) if model.has_rt_info(hint) else "f32"
        compiled = openvino.Core().compile_model(model, "CPU", {hint[1]: precision})
        return lambda values: compiled(values)[0]

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
        names = self.config.get("id2label") or dict(enumerate(self.config["label_names"]))
        names = {int(index): name for index, name in names.items()}
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
        return [{"label": names[int(index)], "score": float(scores[index])} for index in order]


def _rgb(image: Any) -> Image.Image:
    if isinstance(image, str):
        image = base64.b64decode(image, validate=True)
    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image), formats=FORMATS)
    return ImageOps.exif_transpose(image).convert("RGB")
