"""Pooled features of images: the inputs of a classifier's head."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from hfvit.errors import HFViTError, ModelError, printable
from hfvit.inference.backends import TorchBackend
from hfvit.inference.classifier import Classifier, batched, is_one_image, load_classifier
from hfvit.inference.predict import ImageReader
from hfvit.utils.files import temporary_file, wrap_write_errors
from hfvit.utils.threads import map_in_threads

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
        images: one image, or a list, generator or array of images; see `Classifier`.
        normalize: scale features to length 1, so that their products are cosine similarities.
        batch_size: number of images per forward pass. Default: that of the device.
        **options: arguments of `load_classifier`.

    Returns:
        Features (images, dimensions) float32; (dimensions,) for one image.

    Raises:
        ModelError: the model is an export, or an image-text model.
    """
    classifier = model if isinstance(model, Classifier) else load_classifier(model, **options)
    check_embeds(classifier)
    is_single = is_one_image(images)
    batch_size = classifier.batch_size if batch_size is None else batch_size
    prepared = map_in_threads(classifier.prepare_image, [images] if is_single else images, 2 * batch_size)
    with head_inputs(classifier) as features:
        for batch in batched(prepared, batch_size):
            classifier.run(classifier.collate(batch))
    if not features:
        return np.empty((0, find_head(classifier).weight.shape[1]), np.float32)
    found = normalized(np.concatenate(features)) if normalize else np.concatenate(features)
    return found[0] if is_single else found


def embed_files(
    classifier: Classifier,
    names: Sequence[str],
    output: Path,
    normalize: bool = False,
    batch_size: int | None = None,
) -> dict[str, str]:
    """Write the pooled features of files and URLs to a Parquet file.

    Args:
        classifier: classifier of a checkpoint.
        names: file names or URLs.
        output: Parquet file with the columns `image` (name) and `features` (list of float32).
        normalize: scale features to length 1.
        batch_size: number of images per forward pass. Default: that of the device.

    Returns:
        The error of each image that is missing in the file.

    Raises:
        ModelError: the model is an export, or an image-text model.
        HFViTError: the file cannot be written.
    """
    import pyarrow as pa
    from pyarrow import parquet

    check_embeds(classifier)
    batch_size = classifier.batch_size if batch_size is None else batch_size
    dimensions = find_head(classifier).weight.shape[1]
    schema = pa.schema({"image": pa.string(), "features": pa.list_(pa.float32(), dimensions)})
    errors: dict[str, str] = {}
    bar = tqdm(total=len(names), unit="image", desc="embed", disable=None if len(names) > batch_size else True)
    pending: list[str] = []

    def write(writer: parquet.ParquetWriter, features: list[np.ndarray]) -> None:
        rows = np.concatenate(features)
        values = pa.array((normalized(rows) if normalize else rows).ravel())
        columns = [pa.array(pending, pa.string()), pa.FixedSizeListArray.from_arrays(values, dimensions)]
        writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        pending.clear()
        features.clear()

    with (
        bar,
        wrap_write_errors(f"--output: {output}", HFViTError),
        temporary_file(output) as temporary,
        parquet.ParquetWriter(temporary, schema) as writer,
        head_inputs(classifier) as features,
    ):
        read = map_in_threads(ImageReader(classifier), names, 2 * batch_size)
        for batch in batched(read, batch_size):
            readable = [item for item in batch if item.image]
            errors |= {item.name: item.error for item in batch if item.error}
            if readable:
                classifier.run(classifier.collate([item.image for item in readable]))
                pending += [printable(item.name) for item in readable]
            if len(pending) >= ROWS_PER_GROUP:
                write(writer, features)
            bar.update(len(batch))
        if pending:
            write(writer, features)
    return errors


def check_embeds(classifier: Classifier) -> None:
    """Raise `ModelError` if a classifier has no features of images alone."""
    if classifier.text_reader:
        raise ModelError(f"ARTIFACT: {classifier.name} is an image-text model. Use a model for images only.")
    if find_head(classifier) is None:
        raise ModelError(
            f"ARTIFACT: requires a checkpoint with a linear head, got {classifier.name}. Exports return logits only."
        )


def find_head(classifier: Classifier) -> nn.Module | None:
    """Return the last linear layer of a checkpoint's classifier, None of an export."""
    if not isinstance(classifier.backend, TorchBackend):
        return None
    model = classifier.backend.model
    if hasattr(model, "timm_model"):
        heads = model.timm_model.get_classifier()
        head = heads[0] if isinstance(heads, tuple) else heads
        return head if hasattr(head, "weight") else None
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return next((layer for layer in reversed(layers) if layer.out_features == len(classifier.labels)), None)


@contextmanager
def head_inputs(classifier: Classifier) -> Iterator[list[np.ndarray]]:
    """Collect the inputs of the head while the model runs, (batch, dimensions) float32 each."""
    features: list[np.ndarray] = []
    head = find_head(classifier)
    if head is None:
        yield features
        return

    def collect(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        features.append(inputs[0].float().flatten(1).cpu().numpy())

    handle = head.register_forward_pre_hook(collect)
    try:
        yield features
    finally:
        handle.remove()


def normalized(features: np.ndarray) -> np.ndarray:
    """Scale features (images, dimensions) to length 1."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
