"""`load_classifier` and `Classifier`: images to class probabilities."""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.special import expit, softmax
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hfvit.artifacts.artifact import Artifact, find_artifact, read_head
from hfvit.artifacts.constants import PREPROCESSOR_FILE, RUN_FILE
from hfvit.data.decode import from_array, read_image, to_rgb
from hfvit.data.text import TEXT_INPUTS, TextReader, load_tokenizer
from hfvit.errors import ModelError, wrap_library_errors
from hfvit.inference.backends import OnnxBackend, TorchBackend
from hfvit.inference.execution_providers import Providers
from hfvit.models.image_text import HFViTFusionConfig
from hfvit.trt.runtime import open_engine
from hfvit.utils.files import read_object

_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


def run_temperature(artifact: Artifact, **kwargs) -> float:
    """The number in the run.json beside the artifact, or above it as for an export below its checkpoint, or in its
    repository on the Hub; `kwargs` are `from_pretrained`'s. Raises `ModelError` where there is none."""
    name = artifact.file or artifact.source
    path = artifact.beside(RUN_FILE) if artifact.folder else _from_hub(artifact.source, kwargs)
    if path is None:
        raise ModelError(
            f"calibrated: there is no {RUN_FILE} beside or above {name}. Copy the {RUN_FILE} of its run there, or"
            " leave calibration out."
        )
    told = read_object(path).get("temperature")
    if not isinstance(told, dict):
        raise ModelError(
            f"calibrated: {path} has no temperature, which runs of an older hfvit did not fit. Train again, or leave"
            " calibration out."
        )
    value = told.get("value")
    if value is None:
        raise ModelError(f"calibrated: {name} has no temperature: {told.get('reason')}. Leave calibration out.")
    if not isinstance(value, (int, float)) or not value > 0:
        raise ModelError(
            f"calibrated: the temperature {value!r} in {path} is no number above 0; mend it or leave calibration out."
        )
    return float(value)


def _from_hub(repository: str, kwargs: dict) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(
        repository,
        RUN_FILE,
        **{key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs},
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found and Path(found)


class Classifier:
    """A model, its preprocessing and its class names.

    An image is a PIL image, a file name, a URL, or an array of uint8, `(height, width, 3)` or gray `(height, width)`.

    `backend` computes logits from the array that it takes (backends.py); `processor` is a transformers image
    processor, None where the graph takes pictures as they are and none was saved with it. With `multi_label` several
    classes may hold at once, or none: their probabilities do not add up to 1. `temperature` divides the logits before
    they become probabilities. `patch_size` and `merge_tokens` are what `load_classifier` changed the model to.

    Where there is a `text_reader`, whatever takes an image takes a pair of an image and its text.
    """

    def __init__(
        self,
        backend: Callable[[np.ndarray], np.ndarray],
        processor,
        labels: list[str],
        name: str,
        multi_label: bool = False,
        temperature: float = 1.0,
        text_reader: TextReader | None = None,
        patch_size: int | None = None,
        merge_tokens: int | None = None,
    ):
        self.text_reader = text_reader
        self.patch_size = patch_size
        self.merge_tokens = merge_tokens
        self.backend, self.processor, self.labels, self.name = backend, processor, labels, name
        self.multi_label, self.temperature = multi_label, temperature

    def pixel_values(self, images: Iterable[Any]) -> np.ndarray:
        """The preprocessing alone: float32 `(images, 3, height, width)`."""
        if self.processor is None:
            raise ModelError(f"{self.name} has no {PREPROCESSOR_FILE}; the graph does the preprocessing by itself.")
        # One at a time: what is held are the pixel values, never a batch of large pictures.
        values = [self.processor([_as_rgb(image)], return_tensors="pt")["pixel_values"].numpy() for image in images]
        return np.concatenate(values) if values else np.empty((0, 3, 0, 0), np.float32)

    def prepare(self, images: Iterable[Any]) -> np.ndarray | list[np.ndarray] | dict[str, np.ndarray]:
        """A batch as `run` takes it: pixel values, or where preprocessing is in the graph the pictures as arrays.

        With texts, `pixel_values`, `input_ids` and `attention_mask`.
        """
        if self.text_reader:
            texts: list[str | None] = []
            pixel_values = self.pixel_values(self._images_of(images, texts))
            return {"pixel_values": pixel_values, **self.text_reader(texts)}
        if self.backend.takes_pixels:
            return [np.asarray(_as_rgb(image)) for image in images]
        return self.pixel_values(images)

    def _images_of(self, pairs: Iterable[Any], texts: list[str | None]) -> Iterator[Any]:
        """The images of pairs, one at a time; their texts are appended to `texts`."""
        for pair in pairs:
            if not isinstance(pair, tuple):
                raise ModelError(
                    f"{self.name} classifies images with texts, and this image has none: give predict(images,"
                    " texts=[...]), --text of hfvit predict, or --text_column of hfvit validate."
                )
            image, text = pair
            texts.append(text)
            yield image

    def run(self, prepared: np.ndarray | list[np.ndarray] | dict[str, np.ndarray]) -> np.ndarray:
        """Logits `(images, classes)` float32 of what `prepare` gave."""
        if isinstance(prepared, dict):
            pixel_values, texts = prepared["pixel_values"], {key: prepared[key] for key in TEXT_INPUTS}
            return self.backend(pixel_values, texts) if len(pixel_values) else np.empty((0, len(self.labels)), "f4")
        if isinstance(prepared, np.ndarray) and len(prepared):
            return self.backend(prepared)
        logits = np.empty((len(prepared), len(self.labels)), np.float32)
        by_size: dict[tuple, list[int]] = {}
        for index, pixels in enumerate(prepared):
            by_size.setdefault(pixels.shape, []).append(index)
        for indices in by_size.values():
            logits[indices] = self.backend(np.stack([prepared[index] for index in indices]))
        return logits

    @property
    def preprocessing(self) -> str:
        """Classifiers of equal `preprocessing` take each other's `prepare`."""
        if self.backend.takes_pixels:
            return "none"
        texts = self.text_reader.key if self.text_reader else ""
        return (
            texts + type(self.processor).__name__ + json.dumps(self.processor.to_dict(), sort_keys=True, default=str)
        )

    def logits(self, images: Iterable[Any], batch_size: int = 32) -> np.ndarray:
        """Logits `(images, classes)` float32 of a list or a generator, `batch_size` images at a time."""
        batches = [self.run(self.prepare(batch)) for batch in batched(images, batch_size)]
        return np.concatenate(batches) if batches else np.empty((0, len(self.labels)), np.float32)

    def __call__(self, images: Any, top_k: int | None = None, **options: Any) -> Any:
        """Classify one image, or many.

        Args:
            images: one image (see the class), or a list, a generator or an array `(images, height, width, 3)` of them.
            top_k: number of classes to return; all by default.
            options: of `predict`.

        Returns:
            `{label: probability}`, most probable first, for one image; a list of them for many.
        """
        predictions = self.predict(images, top_k=top_k, **options)
        return predictions[0] if is_one_image(images) else predictions

    def predict(
        self,
        images: Iterable[Any],
        batch_size: int = 32,
        top_k: int | None = None,
        texts: Iterable[str | None] | None = None,
    ) -> list[dict[str, float]]:
        """One `{label: probability}` an image, most probable first.

        Args:
            images: a list, a generator or an array `(images, height, width, 3)` of images; a single image is a list of
                one.
            batch_size: images of one forward pass.
            top_k: number of classes to return; all by default.
            texts: one an image, for a model that reads them; one string goes with a single image.

        Raises:
            ModelError: texts for a model that classifies images alone, or another number of them.
        """
        if is_one_image(images):
            images = [images]
            texts = [texts] if isinstance(texts, str) else texts
        if texts is not None:
            if self.text_reader is None:
                raise ModelError(f"{self.name} classifies images alone; leave the texts out.")
            images, texts = list(images), list(texts)
            if len(images) != len(texts):
                raise ModelError(f"There are {len(images)} images and {len(texts)} texts; give one text an image.")
            images = zip(images, texts, strict=True)
        return self.best(self.logits(images, batch_size), top_k)

    def best(self, logits: np.ndarray, top_k: int | None = None) -> list[dict[str, float]]:
        """What `predict` gives, of logits `(images, classes)`."""
        logits = logits / self.temperature
        probabilities = expit(logits) if self.multi_label else softmax(logits, axis=1)
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
        return [
            {self.labels[index]: float(row[index]) for index in best}
            for row, best in zip(probabilities, order, strict=True)
        ]


def load_classifier(
    path: str | Path,
    device: str | None = None,
    threads: int | None = None,
    *,
    providers: Providers | None = None,
    calibrated: bool = False,
    patch_size: int | None = None,
    merge_tokens: int | None = None,
    **kwargs: Any,
) -> Classifier:
    """The classifier at `path`: a checkpoint folder, a Hub id, an `.onnx` file, a TensorRT engine, or a folder that an
    export left.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, ...; CUDA where there is one unless given.
        threads: of a CPU; PyTorch's own number unless given.
        providers: ONNX Runtime's execution providers for an ONNX file, in the place of `device`: names, or (name,
            options), the first that can take a node takes it. TensorRT's keep what they built in a cache.
        calibrated: state probabilities by the temperature that training fitted (see run_temperature.py).
        patch_size: in pixels, of a timm ViT checkpoint that is resampled to it (patch_size.py).
        merge_tokens: patches that each block of a timm ViT checkpoint merges (token_merging.py).
        kwargs: go to `from_pretrained` of the configuration, the model and the processor (revision, token, ...).

    No code that lies in a checkpoint is run, nor an engine's own for the processor, unless `trust_remote_code` is
    given. Raises `ModelError` for what cannot be loaded.
    """
    artifact = find_artifact(path)
    if providers is not None and not artifact.is_graph:
        what = "a TensorRT engine" if artifact.is_engine else "a checkpoint"
        raise ModelError(f"providers: {path} is {what}; ONNX Runtime's providers run ONNX files.")
    kwargs = {"trust_remote_code": False, **kwargs}
    head = read_head(artifact, **kwargs)
    changes = {"patch_size": patch_size, "merge_tokens": merge_tokens}
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes and not artifact.is_checkpoint:
        raise ModelError(
            f"{', '.join(changes)}: {artifact.file} is an export; name it when the checkpoint is exported."
        )
    temperature = run_temperature(artifact, **kwargs) if calibrated else 1.0
    if artifact.is_checkpoint:
        model = _load_model(artifact, kwargs)
        if changes:
            change_model(model, **changes)
        backend = TorchBackend(model, device, threads)
    elif artifact.is_engine:
        backend = open_engine(artifact, len(head.labels), device, allow_code=bool(kwargs["trust_remote_code"]))
    else:
        backend = OnnxBackend(artifact.file, len(head.labels), device, threads, providers)
    processor = _load_processor(artifact, backend.takes_pixels, kwargs)
    reads_texts = isinstance(head.config, HFViTFusionConfig)
    reader = _load_text_reader(artifact, head.config, kwargs) if reads_texts else None
    return Classifier(
        backend, processor, head.labels, str(path), head.multi_label, temperature, reader, patch_size, merge_tokens
    )


def change_model(model, patch_size: int | None = None, merge_tokens: int | None = None) -> None:
    """Make a loaded model cheaper or dearer without training; raises `ModelError` for other families."""
    from hfvit.models.patch_size import set_patch_size  # here, since who runs an export has no use for timm
    from hfvit.models.token_merging import merge_in_blocks

    if patch_size is not None:
        set_patch_size(model, patch_size)
    if merge_tokens is not None:
        merge_in_blocks(model, merge_tokens)


def _load_model(artifact: Artifact, kwargs: dict[str, Any]):
    with wrap_library_errors(ModelError, f"{artifact.source} is no image classifier that transformers can load"):
        model, info = AutoModelForImageClassification.from_pretrained(
            artifact.source, output_loading_info=True, **kwargs
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"{artifact.source} lacks {len(missing)} of the classifier's weights ({', '.join(missing[:3])}); a model"
            " without a trained head has to be fine-tuned first (hfvit train)."
        )
    return model


def _load_processor(artifact: Artifact, is_optional: bool, kwargs: dict[str, Any]):
    saved = artifact.beside(PREPROCESSOR_FILE)
    if saved is None and is_optional:
        return None
    source = artifact.source if artifact.is_checkpoint or saved is None else str(saved.parent)
    what = f"{artifact.file or artifact.source}: no image processor can be loaded from {source}"
    with wrap_library_errors(ModelError, f"{what}; a {PREPROCESSOR_FILE} has to lie there"):
        # With Pillow, as timm's transforms and a training's evaluation resize: torchvision's pixels are up to two
        # levels of 255 away, enough to change one class of a hundred where a checkpoint is held to its export.
        return AutoImageProcessor.from_pretrained(source, backend="pil", **kwargs)


def _load_text_reader(artifact: Artifact, config: HFViTFusionConfig, kwargs: dict[str, Any]) -> TextReader:
    saved = artifact.beside("tokenizer_config.json")
    source = artifact.source if artifact.is_checkpoint or saved is None else str(saved.parent)
    tokenizer = load_tokenizer(source, config.text_encoder_config["vocab_size"], **kwargs)
    return TextReader(tokenizer, config.max_text_length)


def is_one_image(images: Any) -> bool:
    """Whether `images` is a single image: a file name, a URL, a PIL image, or an array of two or three dimensions."""
    if isinstance(images, np.ndarray):
        return images.ndim in (2, 3)
    return isinstance(images, str | Path | Image.Image)


def predict(model: str | Path | Classifier, images: Any, top_k: int | None = None, **options: Any) -> Any:
    """Classify images with a checkpoint, an ONNX file or a TensorRT engine.

    Args:
        model: what `load_classifier` takes, or a `Classifier`, which saves loading it again.
        images: one image, or a list, a generator or an array of them; see `Classifier`.
        top_k: number of classes to return; all by default.
        options: of `load_classifier`.

    Returns:
        `{label: probability}`, most probable first, for one image; a list of them for many.
    """
    classifier = model if isinstance(model, Classifier) else load_classifier(model, **options)
    return classifier(images, top_k=top_k)


def batched(items: Iterable[Any], size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter; nothing is read before it is needed."""
    if size < 1:
        raise ModelError(f"batch_size: {size} is no whole number above 0.")
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _as_rgb(image: Any) -> Image.Image:
    if isinstance(image, tuple):  # with a text, which an image classifier does not read
        image = image[0]
    if isinstance(image, np.ndarray):
        return from_array(image)
    return to_rgb(image) if isinstance(image, Image.Image) else read_image(image)
