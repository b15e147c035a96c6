"""`load_classifier` and `Classifier`: images to class probabilities."""

import copy
import glob
import inspect
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.special import expit, softmax
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hfvit.artifacts.artifact import Artifact, find_artifact, read_head
from hfvit.artifacts.constants import PREPROCESSOR_FILE, PRETRAINED_CFG, RUN_FILE
from hfvit.data.decode import find_images, from_array, is_url, read_image, to_rgb
from hfvit.data.text import TEXT_INPUTS, TextReader, load_tokenizer
from hfvit.errors import DataError, ModelError, nearest, wrap_library_errors
from hfvit.inference.backends import OBJECTIVES, OnnxBackend, TorchBackend
from hfvit.inference.execution_providers import Providers
from hfvit.inference.executorch_backend import ExecuTorchBackend
from hfvit.inference.openvino_backend import OpenVINOBackend
from hfvit.inference.predictions import Predictions, keep_thumbnails
from hfvit.models.image_text import HFViTFusionConfig
from hfvit.recipe.arguments import TTA
from hfvit.trt.runtime import open_engine
from hfvit.utils.checks import check_integer
from hfvit.utils.files import expand_user, read_object
from hfvit.utils.matmul import warn_if_slow
from hfvit.utils.quiet import hidden_loading_bars
from hfvit.utils.threads import map_in_threads

MAX_WORKERS = 8  # threads with a forward pass of their own; Python's lock limits more
MIN_WORKER_BATCH = 4
# Images per forward pass: caches limit a CPU, launches of kernels a GPU.
CPU_BATCH = 16
DEVICE_BATCH = 128
CALL_PIXELS = 32_000_000  # of all images in a call of a graph with preprocessing, with about 35 bytes of memory each
_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")
_EXPORT_OPTIONS = (*_HUB_OPTIONS, "proxies", "trust_remote_code")  # of `from_pretrained`, for exports
# Pillow reads a file when its pixels are used, which threads with the same image must not do at once.
_LOCKS = [Lock() for _ in range(64)]
_IMAGE_KINDS = "PIL images, uint8 arrays, file names or URLs"


def run_temperature(artifact: Artifact, tta: str | None = None, **kwargs) -> float:
    """Read the temperature of a run from the run.json of an artifact.

    Args:
        artifact: checkpoint or export; run.json is in its folder, in the parent folder, or in its Hub repository.
        tta: test-time augmentation of the logits; the temperature must be of such logits.
        **kwargs: Hub arguments of `from_pretrained`.

    Raises:
        ModelError: there is no run.json, or it has no valid temperature, or of other logits.
    """
    name = artifact.file or artifact.source
    path = run_file(artifact, **kwargs)
    if path is None:
        raise ModelError(
            f"calibrated: no {RUN_FILE} beside or above {name}. Copy the {RUN_FILE} of its run there, or omit"
            " calibration."
        )
    content = read_object(path)
    temperature = content.get("temperature")
    if not isinstance(temperature, dict):
        raise ModelError(
            f"calibrated: {path} has no temperature, as it was written by an older hfvit. Train again, or omit"
            " calibration."
        )
    value = temperature.get("value")
    if value is None:
        raise ModelError(f"calibrated: {name} has no temperature: {temperature.get('reason')}. Omit calibration.")
    if not isinstance(value, (int, float)) or not value > 0:
        raise ModelError(f"calibrated: the temperature in {path} must be a positive number, got {value!r}.")
    recipe = content.get("recipe")
    fitted = recipe.get("eval_tta") if isinstance(recipe, dict) else None
    if fitted != tta:
        raise ModelError(
            f"calibrated: the temperature in {path} was fitted with tta={fitted or 'none'}, got tta={tta or 'none'}."
            " Use the same, or omit calibration."
        )
    return float(value)


def run_file(artifact: Artifact, **kwargs) -> Path | None:
    """Find run.json of an artifact.

    It is in the artifact's folder, in the parent folder, or in its Hub repository.

    Args:
        artifact: checkpoint or export.
        **kwargs: Hub arguments of `from_pretrained`.
    """
    from transformers.utils import cached_file

    if artifact.folder:
        return artifact.beside(RUN_FILE)
    found = cached_file(
        artifact.source,
        RUN_FILE,
        **{key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs},
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found and Path(found)


class PreparedImage(NamedTuple):
    """Hold an image's pixel values or uint8 array, and its text."""

    values: np.ndarray
    text: str | None = None


class Classifier:
    """Classify images with a model, its preprocessing and its class names.

    An image is a PIL image, a file name, a URL, or a uint8 array (height, width, 3) of RGB or (height, width). With a
    `text_reader`, an image is a pair of an image and its text. Methods take one image, a list, generator or array
    (images, height, width, 3) of images, or a folder or pattern, which mean all of its image files by name.

    Args:
        backend: computes logits, see `inference.backends`.
        processor: transformers image processor; None if the graph includes preprocessing and none was saved.
        labels: class names in the order of the logits.
        name: path or Hub id, for messages.
        multi_label: compute sigmoid rather than softmax probabilities.
        temperature: divisor of the logits before the probabilities.
        text_reader: tokenizer of an image-text model.
        patch_size: patch size that `load_classifier` resampled the model to.
        merge_tokens: tokens merged per block, set by `load_classifier`.
        thresholds: minimum probability of each class of a multi-label model, or None.
        bf16: whether `load_classifier` loaded bfloat16 weights.
        tta: test-time augmentation; "flip" for the mean of the logits of an image and its mirror image.
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
        thresholds: Sequence[float] | None = None,
        bf16: bool = False,
        tta: str | None = None,
    ):
        check_tta(tta)
        self.tta = tta
        self.bf16 = bf16
        self.thresholds = None if thresholds is None else np.asarray(thresholds)
        self.text_reader = text_reader
        self.patch_size = patch_size
        self.merge_tokens = merge_tokens
        self.backend = backend
        self.processor = processor
        self.labels = labels
        self.name = name
        self.multi_label = multi_label
        self.temperature = temperature

    def __repr__(self) -> str:
        kind = type(self.backend).__name__.removesuffix("Backend")
        return f"Classifier({self.name}: {len(self.labels)} classes, {kind} on {self.backend.device})"

    def pixel_values(self, images: Any) -> np.ndarray:
        """Preprocess images to pixel values (images, 3, height, width) float32."""
        # One image at a time limits memory to the pixel values.
        values = [self._process(_as_rgb(image)) for image in as_images(images)]
        return np.concatenate(values) if values else np.empty((0, 3, 0, 0), np.float32)

    def _process(self, image: Image.Image) -> np.ndarray:
        if self.processor is None:
            raise ModelError(f"{self.name} has no {PREPROCESSOR_FILE}, as the graph includes the preprocessing.")
        with wrap_library_errors(ModelError, f"{self.name}: the image processor ({PREPROCESSOR_FILE}) failed"):
            return self.processor([image], return_tensors="pt")["pixel_values"].numpy()

    def prepare(self, images: Any) -> np.ndarray | list[np.ndarray] | dict[str, np.ndarray]:
        """Prepare images for `run`.

        Returns:
            Pixel values, a list of arrays if their sizes differ; uint8 arrays for a graph with preprocessing; or, for
            an image-text model, `pixel_values`, `input_ids` and `attention_mask`.
        """
        return self.collate([self.prepare_image(image) for image in as_images(images)])

    def prepare_image(self, image: Any) -> PreparedImage:
        """Decode and preprocess an image, or a pair of image and text; thread-safe."""
        text = None
        if self.text_reader:
            if not isinstance(image, tuple):
                raise ModelError(
                    f"{self.name} requires a text for each image. Pass predict(images, texts=[...]), --text to hfvit"
                    " predict, or --text_column to hfvit validate."
                )
            image, text = image
        if self.backend.takes_pixels and not self.text_reader:
            return PreparedImage(np.asarray(_as_rgb(image)))
        return PreparedImage(self._process(_as_rgb(image)), text)

    def collate(self, images: Sequence[PreparedImage]) -> np.ndarray | list[np.ndarray] | dict[str, np.ndarray]:
        """Join prepared images to the input of `run`, see `prepare`."""
        values = [image.values for image in images]
        if self.backend.takes_pixels and not self.text_reader:
            return values
        if not self.text_reader and len({each.shape for each in values}) > 1:
            return [each[0] for each in values]  # of an image processor that does not crop
        pixel_values = np.concatenate(values) if values else np.empty((0, 3, 0, 0), np.float32)
        if self.text_reader:
            return {"pixel_values": pixel_values, **self.text_reader([image.text for image in images])}
        return pixel_values

    def with_tta(self, tta: str | None) -> "Classifier":
        """Return a classifier with the same backend and this test-time augmentation."""
        check_tta(tta)
        other = copy.copy(self)
        other.tta = tta
        return other

    def run(self, prepared: np.ndarray | list[np.ndarray] | dict[str, np.ndarray]) -> np.ndarray:
        """Compute logits (images, classes) float32 of the result of `prepare`."""
        logits = self._run(prepared)
        if self.tta is None:
            return logits
        width_axis = -2 if self.backend.takes_pixels and not self.text_reader else -1
        return (logits + self._run(_mirrored(prepared, width_axis))) / 2

    def _run(self, prepared: np.ndarray | list[np.ndarray] | dict[str, np.ndarray]) -> np.ndarray:
        if isinstance(prepared, dict):
            pixel_values = prepared["pixel_values"]
            texts = {key: prepared[key] for key in TEXT_INPUTS}
            return self.backend(pixel_values, texts) if len(pixel_values) else np.empty((0, len(self.labels)), "f4")
        if isinstance(prepared, np.ndarray) and len(prepared):
            return self.backend(prepared)
        logits = np.empty((len(prepared), len(self.labels)), np.float32)
        by_size: dict[tuple, list[int]] = {}
        for index, pixels in enumerate(prepared):
            by_size.setdefault(pixels.shape, []).append(index)
        for shape, indices in by_size.items():
            step = max(1, CALL_PIXELS // math.prod(shape[:2])) if self.backend.takes_pixels else len(indices)
            for part in batched(indices, step):
                logits[part] = self.backend(np.stack([prepared[index] for index in part]))
        return logits

    @property
    def preprocessing(self) -> str:
        """Return a key of the preprocessing; classifiers with equal keys share `prepare`."""
        if self.backend.takes_pixels:
            return "none"
        texts = self.text_reader.key if self.text_reader else ""
        return (
            texts + type(self.processor).__name__ + json.dumps(self.processor.to_dict(), sort_keys=True, default=str)
        )

    @property
    def batch_size(self) -> int:
        """Return the default number of images per forward pass on the backend's device."""
        return CPU_BATCH if str(self.backend.device).startswith("cpu") else DEVICE_BATCH

    def logits(self, images: Any, batch_size: int | None = None) -> np.ndarray:
        """Compute logits (images, classes) float32.

        Args:
            images: one or more images; pairs with texts for an image-text model.
            batch_size: number of images in memory, see `run_batches`.
        """
        batches = [logits for _, logits in self.run_batches(as_images(images), self.prepare_image, batch_size)]
        return np.concatenate(batches) if batches else np.empty((0, len(self.labels)), np.float32)

    def run_batches(
        self,
        items: Iterable[Any],
        prepare: Callable[[Any], Any],
        batch_size: int | None = None,
        image_of: Callable[[Any], PreparedImage | None] = lambda prepared: prepared,
        compute: "Callable[[Classifier, Any], Any] | None" = None,
    ) -> Iterator[tuple[list, Any]]:
        """Prepare items and compute their logits, in threads.

        PyTorch on a CPU runs a part of the batch in each thread, from the file to the logits. Other backends run the
        complete batch, while threads prepare the next two.

        Args:
            items: iterable, read lazily.
            prepare: thread-safe function of an item, such as `prepare_image`.
            batch_size: number of images in all forward passes at a time. Default: `batch_size` of the device, and at
                least `MIN_WORKER_BATCH` for each thread with a forward pass of its own.
            image_of: returns the prepared image of a result of `prepare`, None without one.
            compute: thread-safe function of a classifier and the result of `collate`. Default: `run`.

        Yields:
            Results of `prepare`, and the result of `compute` for those with an image.
        """
        check_integer("batch_size", batch_size)
        compute = compute or Classifier.run

        def run(results: list, classifier: Classifier = self) -> tuple[list, Any]:
            images = [image for image in map(image_of, results) if image]
            return results, compute(classifier, classifier.collate(images))

        is_parallel = isinstance(self.backend, TorchBackend) and str(self.backend.device).startswith("cpu")
        is_parallel = is_parallel and not self.text_reader  # tokenizers cannot be shared by threads
        workers = min(self.backend.threads, MAX_WORKERS) if is_parallel else 1
        if batch_size is None:
            batch_size = max(self.batch_size, workers * MIN_WORKER_BATCH)
        workers = max(1, min(workers, batch_size // MIN_WORKER_BATCH))
        if workers == 1:
            prepared = map_in_threads(prepare, items, 2 * batch_size)
            yield from map(run, batched(prepared, batch_size))
            return
        worker = copy.copy(self)
        worker.backend = copy.copy(self.backend)
        worker.backend.threads = self.backend.threads // workers
        parts = batched(items, batch_size // workers)
        yield from map_in_threads(lambda part: run(list(map(prepare, part)), worker), parts, workers, workers)

    def __call__(
        self,
        images: Any,
        top_k: int | None = None,
        *,
        batch_size: int | None = None,
        texts: str | Iterable[str | None] | None = None,
    ) -> Any:
        """Classify one or more images.

        Args:
            images: one image, or a list, generator or array (images, height, width, 3) of images, a folder or pattern.
            top_k: number of classes to return; None is all, or those that reach their `thresholds`.
            batch_size: number of images in memory, see `run_batches`.
            texts: a text for each image, for image-text models; a string for one image.

        Returns:
            `{label: probability}` by decreasing probability for one image, `Predictions` for more: a list of them,
            which a notebook shows with the images, and which has the file `names` of a folder or pattern.

        Raises:
            DataError: an image cannot be read, or there is none in a folder.
            ModelError: an option has a wrong value.
        """
        options = {"batch_size": batch_size, "texts": texts}
        if is_one_image(images):
            return self.predict(images, top_k, **options)[0]
        names = as_images(images) if isinstance(images, str | Path) else None
        thumbnails: list[Image.Image] = []
        with_copies = keep_thumbnails(names or as_images(images), _as_rgb, thumbnails)
        return Predictions(self.predict(with_copies, top_k, **options), thumbnails, names)

    def predict(
        self,
        images: Any,
        top_k: int | None = None,
        *,
        batch_size: int | None = None,
        texts: str | Iterable[str | None] | None = None,
    ) -> list[dict[str, float]]:
        """Classify images in batches.

        Args:
            images: one image, or a list, generator or array (images, height, width, 3) of images, a folder or pattern.
            top_k: number of classes to return; None is all, or those that reach their `thresholds`.
            batch_size: number of images in memory, see `run_batches`.
            texts: a text for each image, for image-text models; a string for one image.

        Returns:
            `{label: probability}` by decreasing probability for each image.

        Raises:
            DataError: an image cannot be read, or there is none in a folder.
            ModelError: an option has a wrong value; the model takes no texts, or their number differs from that of the
                images.
        """
        if is_one_image(images) and isinstance(texts, str):
            texts = [texts]
        images = as_images(images)
        check_integer("top_k", top_k)
        if texts is not None:
            if self.text_reader is None:
                raise ModelError(f"texts: not supported by {self.name}, which is not an image-text model.")
            if isinstance(texts, str):
                raise ModelError(f"texts: must be a list with one for each image, got {texts!r}.")
            images = list(images)
            texts = list(texts)
            if len(images) != len(texts):
                raise ModelError(f"texts: must be one for each of {len(images)} images, got {len(texts)}.")
            images = zip(images, texts, strict=True)
        return self.best(self.logits(images, batch_size), top_k)

    def best(self, logits: np.ndarray, top_k: int | None = None) -> list[dict[str, float]]:
        """Convert logits (images, classes) to the result of `predict`."""
        check_integer("top_k", top_k)
        logits = logits / self.temperature
        probabilities = expit(logits) if self.multi_label else softmax(logits, axis=1)
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
        shown = np.ones_like(probabilities, dtype=bool)
        if top_k is None and self.thresholds is not None:
            shown = probabilities >= self.thresholds
        return [
            {_encodable(self.labels[index]): float(row[index]) for index in best if has[index]}
            for row, best, has in zip(probabilities, order, shown, strict=True)
        ]


def load_classifier(
    path: str | Path,
    device: str | torch.device | None = None,
    threads: int | None = None,
    *,
    providers: Providers | None = None,
    objective: str | None = None,
    calibrated: bool = False,
    patch_size: int | None = None,
    merge_tokens: int | None = None,
    bf16: bool = False,
    tta: str | None = None,
    prepack: bool = True,
    **kwargs: Any,
) -> Classifier:
    """Load a classifier from a checkpoint, an exported file or an engine.

    Args:
        path: checkpoint folder, Hub id, `.onnx` file, OpenVINO `.xml` file, ExecuTorch `.pte` file, engine file, or
            folder of an export.
        device: "cpu", "cuda", "cuda:1", ..., or a `torch.device`; None is CUDA if available, else the CPU.
        threads: CPU threads of a checkpoint, ONNX or OpenVINO file; None is PyTorch's number.
        providers: ONNX Runtime's execution providers for an ONNX file instead of `device`: names or (name, options)
            by priority. Engines that TensorRT's providers build are cached.
        objective: "latency" or "throughput" of an ONNX or OpenVINO file on a CPU: all threads for one batch after the
            other, or batches divided between the threads where that is faster; None is "latency".
        calibrated: divide the logits by the temperature that training fitted.
        patch_size: resample a timm ViT checkpoint to this patch size in pixels, see `models.patch_size`.
        merge_tokens: merge so many tokens in each block of a timm ViT checkpoint, see `models.token_merging`.
        bf16: load the weights of a checkpoint as bfloat16, which is faster on most GPUs and recent CPUs (a warning
            says where it is slower); probabilities then have two to three digits.
        tta: test-time augmentation; "flip" for the mean of the logits of an image and its mirror image, in twice the
            time.
        prepack: let ONNX Runtime copy the weights of an ONNX file to a faster layout; False takes less memory.
        **kwargs: arguments of `from_pretrained` (revision, token, ...). Code in a checkpoint or an engine runs only
            with `trust_remote_code=True`.

    Raises:
        ModelError: the artifact cannot be loaded, or does not support an option.
        TypeError: an unknown argument with an export.
    """
    check_tta(tta)
    if isinstance(device, torch.device):
        device = str(device)
    if device is not None and not isinstance(device, str):
        raise ModelError(f"device: must be a name such as cpu, cuda or cuda:1, got {device!r}.")
    artifact = find_artifact(path)
    if not artifact.is_checkpoint:
        for name in kwargs.keys() - {*_EXPORT_OPTIONS}:
            hint = nearest(name, inspect.signature(load_classifier).parameters)
            raise TypeError(f"{name}: not an argument for {artifact.file}, which is an export.{hint}")
    check_integer("patch_size", patch_size, 0)
    check_integer("merge_tokens", merge_tokens, 0)
    check_options(artifact, providers=providers, objective=objective, threads=threads, bf16=bf16, prepack=prepack)
    kwargs = {"trust_remote_code": False, **kwargs}
    head = read_head(artifact, **kwargs)
    changes = {"patch_size": patch_size, "merge_tokens": merge_tokens}
    changes = {name: value for name, value in changes.items() if value is not None}
    if bf16:
        kwargs["dtype"] = torch.bfloat16
    if changes and not artifact.is_checkpoint:
        raise ModelError(
            f"{', '.join(changes)}: requires a checkpoint, but {artifact.file} is an export. Pass it when exporting."
        )
    temperature = run_temperature(artifact, tta, **kwargs) if calibrated else 1.0
    if artifact.is_checkpoint:
        model = _load_model(artifact, kwargs)
        if changes:
            change_model(model, **changes)
        backend = TorchBackend(model, device, threads)
        if bf16:
            warn_if_slow("bf16", torch.device(backend.device), torch.bfloat16)
    elif artifact.is_engine:
        backend = open_engine(artifact, len(head.labels), device, allow_code=bool(kwargs["trust_remote_code"]))
    elif artifact.is_openvino:
        backend = OpenVINOBackend(artifact.file, len(head.labels), device, threads, objective)
    elif artifact.is_executorch:
        backend = ExecuTorchBackend(artifact.file, len(head.labels), device)
    else:
        backend = OnnxBackend(artifact.file, len(head.labels), device, threads, providers, objective, prepack)
    kwargs.pop("dtype", None)
    processor = load_processor(artifact, backend.takes_pixels, **kwargs)
    reads_texts = isinstance(head.config, HFViTFusionConfig)
    reader = _load_text_reader(artifact, head.config, kwargs) if reads_texts else None
    return Classifier(
        backend,
        processor,
        head.labels,
        str(path),
        multi_label=head.multi_label,
        temperature=temperature,
        text_reader=reader,
        patch_size=patch_size,
        merge_tokens=merge_tokens,
        thresholds=head.thresholds,
        bf16=bf16,
        tta=tta,
    )


def check_options(
    artifact: Artifact,
    *,
    providers: Providers | None = None,
    objective: str | None = None,
    threads: int | None = None,
    bf16: bool = False,
    prepack: bool = True,
) -> None:
    """Check options of `load_classifier` without loading the artifact.

    Args:
        artifact: the artifact to load.
        providers: ONNX Runtime's execution providers.
        objective: "latency", "throughput" or None.
        threads: CPU threads.
        bf16: whether to load bfloat16 weights.
        prepack: whether ONNX Runtime may copy the weights.

    Raises:
        ModelError: an option has a wrong value, or no effect on the artifact.
    """
    for option, is_set, has_effect, kinds in (
        ("providers", providers is not None, artifact.is_onnx, "an ONNX file"),
        ("prepack", not prepack, artifact.is_onnx, "an ONNX file"),
        ("objective", objective == "throughput", artifact.is_onnx or artifact.is_openvino, "an ONNX or OpenVINO file"),
        ("threads", threads is not None, artifact.takes_threads, "a checkpoint, ONNX or OpenVINO file"),
    ):
        if is_set and not has_effect:
            kind = "a checkpoint" if artifact.is_checkpoint else artifact.file.name
            raise ModelError(f"{option}: only for {kinds}, but {artifact.file or artifact.source} is {kind}. Omit it.")
    if bf16 and not artifact.is_checkpoint:
        raise ModelError(f"bf16: requires a checkpoint, but {artifact.file} is an export.")
    if objective not in (None, *OBJECTIVES):
        raise ModelError(f"objective: must be latency or throughput, got {objective!r}.")
    check_integer("threads", threads)


def check_tta(tta: Any) -> None:
    """Raise `ModelError` for an unknown test-time augmentation."""
    if tta not in (None, *TTA):
        raise ModelError(f"tta: must be {' or '.join(TTA)}, got {tta!r}.")


def change_model(model, patch_size: int | None = None, merge_tokens: int | None = None) -> None:
    """Change the cost of a loaded timm ViT without training.

    Args:
        model: image classifier, changed in place.
        patch_size: patch size in pixels to resample to, or None.
        merge_tokens: tokens to merge in each block, or None.

    Raises:
        ModelError: the network does not support the option.
    """
    from hfvit.models.patch_size import set_patch_size  # imported here, as running an export does not need timm
    from hfvit.models.token_merging import apply_token_merging

    if patch_size is not None:
        set_patch_size(model, patch_size)
    if merge_tokens is not None:
        apply_token_merging(model, merge_tokens)


def _load_model(artifact: Artifact, kwargs: dict[str, Any]):
    problem = f"{artifact.source} cannot be loaded as an image classifier"
    with wrap_library_errors(ModelError, problem), hidden_loading_bars():
        model, info = AutoModelForImageClassification.from_pretrained(
            artifact.source, output_loading_info=True, **kwargs
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"{artifact.source} lacks {len(missing)} weights of the classifier ({', '.join(missing[:3])}). Fine-tune a"
            " model without a trained head first (hfvit train)."
        )
    return model


def load_processor(artifact: Artifact, is_optional: bool = False, **kwargs: Any):
    """Load the image processor of an artifact with Pillow's arithmetic.

    Args:
        artifact: checkpoint or export.
        is_optional: return None if none was saved.
        **kwargs: arguments of `from_pretrained`.

    Raises:
        ModelError: it cannot be loaded.
    """
    saved = artifact.beside(PREPROCESSOR_FILE)
    if saved is None and is_optional:
        return None
    source = artifact.source if artifact.is_checkpoint or saved is None else str(saved.parent)
    name = artifact.file or artifact.source
    with wrap_library_errors(ModelError, f"{name}: cannot load the image processor {source}/{PREPROCESSOR_FILE}"):
        config = read_object(saved) if saved is not None and not artifact.is_checkpoint else {}
        if PRETRAINED_CFG in config:  # its crop may start one pixel later than that of the stock processor
            from transformers import TimmWrapperImageProcessor  # imports timm, which other exports do not need

            return TimmWrapperImageProcessor(config[PRETRAINED_CFG])
        # Pillow, as in timm's transforms and the evaluation during training: torchvision's pixels differ by one level
        # of 255 here and there.
        return AutoImageProcessor.from_pretrained(source, backend="pil", **kwargs)


def _load_text_reader(artifact: Artifact, config: HFViTFusionConfig, kwargs: dict[str, Any]) -> TextReader:
    saved = artifact.beside("tokenizer_config.json")
    source = artifact.source if artifact.is_checkpoint or saved is None else str(saved.parent)
    tokenizer = load_tokenizer(source, config.text_encoder_config["vocab_size"], **kwargs)
    return TextReader(tokenizer, config.max_text_length)


def is_one_image(images: Any) -> bool:
    """Return whether `images` is one file name, URL, PIL image, 2-D or 3-D array."""
    if isinstance(images, np.ndarray):
        return images.ndim in (2, 3)
    return isinstance(images, Image.Image) or (isinstance(images, str | Path) and not _is_several_files(images))


def as_images(images: Any) -> Iterable[Any]:
    """Return one or more images as an iterable.

    A folder or pattern becomes the list of its image files.

    Raises:
        DataError: the type is wrong, or there is no image in the folder.
    """
    if is_one_image(images):
        return [images]
    if isinstance(images, str | Path):
        names, problems = find_images([str(images)])
        if not names:
            raise DataError(f"images: {problems[0]}.")
        return names
    is_scalar = isinstance(images, np.ndarray) and not images.ndim
    if is_scalar or isinstance(images, bytes | Mapping) or not isinstance(images, Iterable):
        raise _wrong_type(images)
    return images


def _is_several_files(name: str | Path) -> bool:
    """Return whether a name is that of a folder or a pattern."""
    path = expand_user(name)
    if not str(name) or is_url(name) or os.path.isfile(path):
        return False
    return os.path.isdir(path) or glob.has_magic(str(name))


def predict(
    model: str | Path | Classifier,
    images: Any,
    top_k: int | None = None,
    *,
    batch_size: int | None = None,
    texts: str | Iterable[str | None] | None = None,
    **options: Any,
) -> Any:
    """Classify images with a checkpoint, an ONNX file or a TensorRT engine.

    Args:
        model: path or Hub id for `load_classifier`, or a `Classifier`.
        images: one image, or a list, generator or array of images, a folder or pattern; see `Classifier`.
        top_k: number of classes to return; None is all, or those that reach their `thresholds`.
        batch_size: number of images in memory, see `Classifier.run_batches`.
        texts: a text for each image, for image-text models; a string for one image.
        **options: arguments of `load_classifier`.

    Returns:
        `{label: probability}` by decreasing probability for one image, `Predictions` for more: a list of them, which a
        notebook shows with the images, and which has the file `names` of a folder or pattern.

    Raises:
        DataError: an image cannot be read, or there is none in a folder.
        ModelError: the model cannot be loaded, or an option has a wrong value.
        TypeError: options are given together with a `Classifier`.
    """
    return as_classifier(model, options)(images, top_k, batch_size=batch_size, texts=texts)


def as_classifier(model: str | Path | Classifier, options: dict[str, Any]) -> Classifier:
    """Return a `Classifier`, or load one with `options`.

    Raises:
        TypeError: options are given together with a `Classifier`.
    """
    if not isinstance(model, Classifier):
        return load_classifier(model, **options)
    if options:
        raise TypeError(f"{', '.join(options)}: not for a Classifier, which is loaded. Pass them to load_classifier.")
    return model


def batched(items: Iterable[Any], size: int) -> Iterator[list]:
    """Yield lists of `size` items, the last one shorter, reading lazily."""
    check_integer("batch_size", size, optional=False)
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _mirrored(
    prepared: np.ndarray | list[np.ndarray] | dict[str, np.ndarray], width_axis: int
) -> np.ndarray | list[np.ndarray] | dict[str, np.ndarray]:
    """Mirror the images of a result of `Classifier.prepare` horizontally.

    Args:
        prepared: images of one size, a list of images, or inputs with the key `pixel_values`.
        width_axis: axis of the width.
    """
    if isinstance(prepared, dict):
        return prepared | {"pixel_values": _mirrored(prepared["pixel_values"], width_axis)}
    if isinstance(prepared, list):
        return [np.flip(pixels, width_axis) for pixels in prepared]
    return np.ascontiguousarray(np.flip(prepared, width_axis))  # torch does not take negative strides


def _encodable(label: str) -> str:
    """Escape lone surrogates, which UTF-8 and so most files and protocols cannot hold."""
    return label.encode("utf-8", "backslashreplace").decode()


def _as_rgb(image: Any) -> Image.Image:
    # An image classifier ignores the text.
    if isinstance(image, tuple) and len(image) == 2 and isinstance(image[1], str | None):
        image = image[0]
    if isinstance(image, np.ndarray):
        return from_array(image)
    if isinstance(image, Image.Image):
        lock = _LOCKS[(id(image) >> 4) % len(_LOCKS)]  # the lower bits are zero
        with lock, wrap_library_errors(DataError, "images: a PIL image cannot be read"):
            return to_rgb(image)
    if not isinstance(image, str | Path):
        raise _wrong_type(image)
    if not str(image):
        raise DataError(f"images: must be {_IMAGE_KINDS}, got ''.")
    return read_image(image)


def _wrong_type(image: Any) -> DataError:
    """Return the error for an object that is no image."""
    advice = ""
    if isinstance(image, bytes):
        advice = " Open the bytes of a file with PIL.Image.open(io.BytesIO(content))."
    elif isinstance(image, torch.Tensor):
        advice = " Convert a uint8 tensor (3, height, width): tensor.permute(1, 2, 0).numpy()."
    elif isinstance(image, Mapping):
        advice = ' Pass the images of a data set: dataset["image"].'
    return DataError(f"images: must be {_IMAGE_KINDS}, got {type(image).__name__}.{advice}")
