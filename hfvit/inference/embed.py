"""Pooled features of images: the inputs of a classifier's head."""

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from hfvit.errors import ModelError, mask_credentials, printable
from hfvit.inference.backends import TorchBackend
from hfvit.inference.classifier import Classifier, as_classifier, as_images, is_one_image
from hfvit.inference.predict import ImageReader, shown_name
from hfvit.inference.prediction_file import complete_file

ROWS_PER_GROUP = 4096  # of a Parquet file


def embed(
    model: str | Path | Classifier,
    images: Any,
    *,
    normalize: bool = False,
    batch_size: int | None = None,
    **options: Any,
) -> np.ndarray:
    """Compute the pooled features of images.

    Args:
        model: checkpoint folder or Hub id for `load_classifier`, or a `Classifier` of a checkpoint.
        images: one image, or a list, generator or array of images, a folder or pattern; see `Classifier`.
        normalize: scale features to length 1, so that their products are cosine similarities.
        batch_size: number of images in memory, see `Classifier.run_batches`.
        **options: arguments of `load_classifier`.

    Returns:
        Features (images, dimensions) float32; (dimensions,) for one image. Those of a folder or pattern are in
        the order of its sorted files; pass a list of files to have their names.

    Raises:
        DataError: an image cannot be read, or there is none in a folder.
        ModelError: the model is an export, or an image-text model.
        TypeError: options are given together with a `Classifier`.
    """
    classifier = as_classifier(model, options)
    check_embeds(classifier)
    is_single = is_one_image(images)
    images = as_images(images)
    found = [np.empty((0, feature_size(classifier)), np.float32)]
    with with_features(classifier) as run:
        for _, (_, features) in classifier.run_batches(images, classifier.prepare_image, batch_size, compute=run):
            found.append(normalized(features) if normalize else features)
    return np.concatenate(found)[0] if is_single else np.concatenate(found)


def embed_files(
    classifier: Classifier, names: Sequence[str], output: Path, normalize: bool, batch_size: int | None
) -> dict[str, str]:
    """Write the pooled features of files and URLs to a Parquet file.

    Args:
        classifier: classifier of a checkpoint.
        names: file names or URLs.
        output: Parquet file with the columns `image` (name) and `features` (list of float32).
        normalize: scale features to length 1.
        batch_size: number of images in memory, see `Classifier.run_batches`.

    Returns:
        The error of each image that is missing in the file.

    Raises:
        ModelError: the model is an export, or an image-text model.
        HFViTError: the file cannot be written.
    """
    import pyarrow as pa
    from pyarrow import parquet

    check_embeds(classifier)
    dimensions = feature_size(classifier)
    schema = pa.schema({"image": pa.string(), "features": pa.list_(pa.float32(), dimensions)})
    errors: dict[str, str] = {}
    pending: list[tuple[list[str], np.ndarray]] = []

    def write(writer: parquet.ParquetWriter) -> None:
        rows = np.concatenate([features for _, features in pending])
        values = pa.array((normalized(rows) if normalize else rows).ravel())
        images = pa.array([name for names, _ in pending for name in names], pa.string())
        columns = [images, pa.FixedSizeListArray.from_arrays(values, dimensions)]
        writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        pending.clear()

    with (
        tqdm(total=len(names), unit="image", desc="embed", disable=None) as bar,
        complete_file(output) as temporary,
        parquet.ParquetWriter(temporary, schema) as writer,
        with_features(classifier) as run,
    ):
        batches = classifier.run_batches(
            names, ImageReader(classifier), batch_size, lambda item: item.image, compute=run
        )
        for batch, (_, features) in batches:
            errors |= {item.name: mask_credentials(item.error) for item in batch if item.error}
            readable = [item.name for item in batch if item.image]
            if readable:
                is_finite = np.isfinite(features).all(axis=1)
                for name in compress(readable, ~is_finite):
                    errors[name] = mask_credentials(f"{name}: the features are NaN or infinite.")
                kept = [printable(shown_name(name)) for name in compress(readable, is_finite)]
                pending.append((kept, features[is_finite]))
            if sum(len(found) for _, found in pending) >= ROWS_PER_GROUP:
                write(writer)
            bar.update(len(batch))
        if pending:
            write(writer)
    return errors


def check_embeds(classifier: Classifier) -> None:
    """Raise `ModelError` if a classifier has no features of single images."""
    if classifier.tta is not None:
        raise ModelError(f"tta: not available for features, got {classifier.tta!r}. Omit it.")
    if classifier.text_reader:
        raise ModelError(f"ARTIFACT: {classifier.name} is an image-text model. Use a model for images only.")
    if find_head(classifier) is None and find_network(classifier) is None:
        raise ModelError(
            f"ARTIFACT: requires a checkpoint of timm, or with a linear head, got {classifier.name}. Exports return"
            " logits only."
        )


def find_network(classifier: Classifier) -> nn.Module | None:
    """Return the timm network of a checkpoint, None without one."""
    is_checkpoint = isinstance(classifier.backend, TorchBackend)
    return getattr(classifier.backend.model, "timm_model", None) if is_checkpoint else None


def find_head(classifier: Classifier) -> nn.Module | None:
    """Return the layer from features to logits, None if there is no single one."""
    if not isinstance(classifier.backend, TorchBackend):
        return None
    if (network := find_network(classifier)) is not None:
        head = network.get_classifier()
        return head if hasattr(head, "weight") else None
    layers = [module for module in classifier.backend.model.modules() if isinstance(module, nn.Linear)]
    return next((layer for layer in reversed(layers) if layer.out_features == len(classifier.labels)), None)


def feature_size(classifier: Classifier) -> int:
    """Return the number of dimensions of the pooled features."""
    head = find_head(classifier)
    if head is not None:
        return head.weight.shape[1]
    with with_features(classifier) as run:
        _, features = run(classifier, classifier.prepare([Image.new("RGB", (64, 64))]))
    return features.shape[1]


@contextmanager
def with_features(
    classifier: Classifier,
) -> Iterator[Callable[[Classifier, Any], tuple[np.ndarray, np.ndarray | None]]]:
    """Yield a thread-safe function that also returns pooled features.

    They are the inputs of a linear head, or `forward_head(pre_logits=True)` of a timm network with another head, such
    as the several heads of CrossViT and distilled DeiT.

    Args:
        classifier: classifier whose model is run in the context.

    Yields:
        Function of the classifier, or a copy of it with the same model, and the result of `Classifier.collate`. It
        returns logits and features (images, dimensions) float32, or None instead of features of an export.
    """
    head = find_head(classifier)
    network = find_network(classifier)
    found = threading.local()

    def keep(features: torch.Tensor) -> None:
        found.features = features.float().flatten(1).cpu().numpy()

    def run(runner: Classifier, batch: Any) -> tuple[np.ndarray, np.ndarray | None]:
        has_features = head is not None or network is not None
        if isinstance(batch, list) and has_features:  # images of several sizes, each in its own forward pass
            logits, features = zip(*(run(runner, image[None]) for image in batch), strict=True)
            return np.concatenate(logits), np.concatenate(features)
        found.features = None
        return runner.run(batch), found.features

    if head is not None:
        handle = head.register_forward_pre_hook(lambda _, inputs: keep(inputs[0]))
        try:
            yield run
        finally:
            handle.remove()
    elif network is not None:
        recorder = copy.copy(network)

        def forward_head(maps: Any) -> torch.Tensor:
            keep(network.forward_head(maps, pre_logits=True))
            return network.forward_head(maps)

        recorder.forward_head = forward_head  # a method has no hooks
        model = copy.copy(classifier.backend.model)  # with the same weights, for other calls at the same time
        model._modules = {**model._modules, "timm_model": recorder}

        def run_recorder(runner: Classifier, batch: Any) -> tuple[np.ndarray, np.ndarray]:
            runner = copy.copy(runner)
            runner.backend = copy.copy(runner.backend)
            runner.backend.model = model
            return run(runner, batch)

        yield run_recorder
    else:
        yield run


def normalized(features: np.ndarray) -> np.ndarray:
    """Scale features (images, dimensions) to length 1."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
