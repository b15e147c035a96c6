"""Map-style data sets that return batches, and checks of the first batch."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image as PILImage
from timm.data import create_transform

from hfvit.data.decode import decode, decode_crop, image_size
from hfvit.data.labels import is_constant, read_column, targets_of
from hfvit.data.pixel_cache import NotCacheableError, PixelArray, cached_pixels, common_size
from hfvit.data.text import TokenTable
from hfvit.data.transform_reader import TransformReader
from hfvit.errors import DataError
from hfvit.transforms.augmentation import Augmentation
from hfvit.transforms.preprocessing import Preprocessing
from hfvit.utils.counter_rng import sample_seeds

logger = logging.getLogger(__name__)


@dataclass
class ArrayReader:
    """Reader of images that are decoded in advance.

    Args:
        pixels: decoded images.
        rows: row of `pixels` for each row of the split.
    """

    pixels: PixelArray
    rows: np.ndarray

    def for_training(self, rows: np.ndarray, seeds: np.ndarray, augmentation: Augmentation) -> dict[str, Any]:
        """Read images, and sample their augmentation.

        Args:
            rows: rows of the split `(batch,)`.
            seeds: seed of each image `(batch,)`.
            augmentation: augmentation of training images.

        Returns:
            `images` `(batch, height, width, channels)` in uint8, and `plan` for the augmentation of the batch.
        """
        images = self.pixels.read(self.rows[rows])
        return {"images": torch.from_numpy(images), "plan": augmentation.sample(seeds, *images.shape[1:3])}

    def for_evaluation(self, rows: np.ndarray) -> dict[str, Any]:
        return {"images": torch.from_numpy(self.pixels.read(self.rows[rows]))}


class DecodingReader:
    """Reader that decodes, crops and resizes images when they are read, in 8 bits.

    Args:
        split: columns `image` (undecoded) and `row` (index in the original split).
        name: name of the original split, for error messages.
        data_config: preprocessing of the model, from `timm.data.resolve_data_config`.
    """

    def __init__(self, split: Dataset, name: str, data_config: dict[str, Any]):
        self.split = split
        self.name = name
        self.eval_transform = evaluation_transform(data_config)

    def for_training(self, rows: np.ndarray, seeds: np.ndarray, augmentation: Augmentation) -> dict[str, Any]:
        """Decode random crops, and sample the other augmentations.

        Args:
            rows: rows of the split `(batch,)`.
            seeds: seed of each image `(batch,)`.
            augmentation: augmentation of training images.

        Returns:
            The batch of `decoded_crops`.
        """
        return decoded_crops(self._examples(rows), self.name, seeds, augmentation)

    def for_evaluation(self, rows: np.ndarray) -> dict[str, Any]:
        return evaluation_crops(self._examples(rows), self.name, self.eval_transform)

    def _examples(self, rows: np.ndarray) -> list[dict]:
        columns = self.split[rows.tolist()]  # twice as fast as single rows
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def evaluation_transform(data_config: dict[str, Any]) -> Callable[[PILImage.Image], torch.Tensor]:
    """Create timm's evaluation transform without the normalization.

    It is equal to the saved image processor, bit for bit. `data_config` is from `timm.data.resolve_data_config`.
    """
    return create_transform(**data_config, is_training=False, use_prefetcher=True)


def evaluation_crops(examples: list[dict], name: str, transform: Callable) -> dict[str, torch.Tensor]:
    """Decode evaluation images, and resize and crop them.

    Args:
        examples: rows with `image` (undecoded) and `row`.
        name: name of the split, for error messages.
        transform: transform of `evaluation_transform`.

    Returns:
        `crops` `(batch, height, width, channels)` in uint8.
    """
    images = (decode(example["image"], name, example["row"]) for example in examples)
    return {"crops": torch.stack([transform(image) for image in images]).permute(0, 2, 3, 1)}


def decoded_crops(examples: list[dict], name: str, seeds: np.ndarray, augmentation: Augmentation) -> dict[str, Any]:
    """Decode random crops of training images, and sample the other augmentations.

    Args:
        examples: rows with `image` (undecoded) and `row`.
        name: name of the split, for error messages.
        seeds: seed of each image.
        augmentation: augmentation of training images.

    Returns:
        `crops` `(batch, height, width, channels)` in uint8, and `plan` for the augmentation of the batch.
    """
    sizes = np.array([image_size(example["image"], name, example["row"]) for example in examples])
    boxes, flips = augmentation.sample_crops(seeds, sizes[:, 0], sizes[:, 1])
    size, interpolation = augmentation.image_size, augmentation.interpolation
    crops = []
    for example, box, flip in zip(examples, boxes, flips, strict=True):
        crop = decode_crop(example["image"], name, example["row"], box, size, interpolation)
        horizontal, vertical = flip
        crops.append(crop[:: -1 if vertical else 1, :: -1 if horizontal else 1])
    return {"crops": torch.from_numpy(np.stack(crops)), "plan": augmentation.sample_changes(seeds, *size)}


def image_datasets(
    splits,
    data_config: dict[str, Any],
    augmentation: Augmentation,
    seed: int = 0,
    repeats: int = 1,
    show_progress: bool = True,
    texts: dict[str, TokenTable] | None = None,
    train_transforms: Callable | None = None,
) -> dict[str, "ImageDataset"]:
    """Build the data sets of all splits that are not streamed.

    Images of the same size are decoded in advance, others when they are read. The choice is logged and recorded.

    Args:
        splits: splits of the data set.
        data_config: preprocessing of the model, from `timm.data.resolve_data_config`.
        augmentation: augmentation of training images.
        seed: seed of the augmentation.
        repeats: number of augmented copies of a training image in a batch (repeated augmentation).
        show_progress: show a progress bar while images are decoded.
        texts: tokens by role, for a model with a text encoder.
        train_transforms: transform to use instead of the augmentation, see `TransformReader`.

    Returns:
        The data sets by role: train, validation, test.
    """
    used = Counter()
    for role, source in splits.sources.items():
        used[source] += len(splits[role])
    found = {}
    for role, source in splits.sources.items():
        split, whole = splits[role], splits.whole[role]
        # If only a few rows of a large split are used, only they are decoded.
        kept = split if 4 * used[source] < len(whole) else whole
        if train_transforms and role == "train":
            reader, how = (
                TransformReader(split, source, train_transforms),
                "decoded as they are read: train_transforms",
            )
        else:
            reader, how = open_reader(split, kept, source, data_config, show_progress)
        splits.metadata["splits"][role]["input"] = how
        training = {"augmentation": augmentation, "seed": seed, "repeats": repeats} if role == "train" else {}
        found[role] = ImageDataset(targets_of(split), reader, texts=(texts or {}).get(role), **training)
    inputs = {
        role: splits.metadata["splits"][role]["input"] for role in ("train", "validation", "test") if role in found
    }
    for how in dict.fromkeys(inputs.values()):
        logger.info("%s: images %s", ", ".join(role for role, of_role in inputs.items() if of_role == how), how)
    return found


def open_reader(split: Dataset, kept: Dataset, name: str, data_config: dict[str, Any], show_progress: bool):
    """Choose between decoding all images in advance and when they are read.

    Args:
        split: columns `image` (undecoded), `row` and `label`.
        kept: images to decode in advance: `split`, or the complete split that it is a part of.
        name: name of the split, for messages.
        data_config: preprocessing of the model, from `timm.data.resolve_data_config`.
        show_progress: show a progress bar while images are decoded.

    Returns:
        (reader, description of the choice).
    """
    try:
        height, width = common_size(kept, name)
        if Preprocessing(data_config).geometry(height, width) is None:
            raise NotCacheableError(f"the evaluation resizes {width}x{height} pixels with Pillow")
        pixels = cached_pixels(kept, name, (height, width), show_progress)
    except NotCacheableError as reason:
        return DecodingReader(split, name, data_config), f"decoded as they are read: {reason}"
    rows = (
        np.arange(len(split))
        if kept is split
        else np.searchsorted(*(read_column(part, "row").to_numpy() for part in (kept, split)))
    )
    return ArrayReader(pixels, rows), f"of {width}x{height} pixels, decoded once"


class ImageDataset(torch.utils.data.Dataset):
    """Map-style data set of one split that loads complete batches (`__getitems__`).

    A batch has `labels`, class indices `(batch,)` or float32 targets `(batch, classes)`; uint8 `images` or `crops`
    (see `Augmentation`), for training the drawn `plan`, and with `texts` their tokens.

    The index is a row, or `(draw, row)` from `EpochSampler` in training. The augmentation of an image depends only on
    (seed, draw, row), so that it is the same for any number of processes and workers, and in a resumed run.
    """

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray,
        reader: ArrayReader | DecodingReader,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        repeats: int = 1,
        texts: TokenTable | None = None,
    ):
        self.texts = texts
        labels = np.asarray(labels)
        self.labels = labels.astype(np.int64 if labels.ndim == 1 else np.float32)
        self.reader = reader
        self.augmentation = augmentation
        self.seed = seed
        self.repeats = repeats

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def decodes(self) -> bool:
        """Return whether reading decodes images, which benefits from data workers."""
        return not isinstance(self.reader, ArrayReader)

    @property
    def images(self) -> int:
        """Return the number of images, as `ImageStream` does."""
        return len(self)

    def preview(self, count: int) -> dict[str, Any]:
        """Load a training batch of at most `count` evenly spaced images.

        Their number is even, as MixUp needs it.
        """
        count = min(count, len(self))
        rows = np.linspace(0, len(self) - 1, count - count % 2 or count).astype(int)
        return self.__getitems__([(0, row) for row in rows])

    def __getitem__(self, index) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list) -> dict[str, Any]:
        if self.augmentation is None:
            rows = np.asarray(indices)
            return {**self._labels_and_texts(rows), **self.reader.for_evaluation(rows)}
        draws, rows = np.asarray(indices).T
        seeds = sample_seeds(self.seed, draws, rows)
        batch = self._labels_and_texts(rows)
        batch |= self.reader.for_training(rows, seeds, self.augmentation)
        batch["plan"]["seeds"] = seeds
        return batch

    def _labels_and_texts(self, rows: np.ndarray) -> dict[str, Any]:
        tokens = self.texts.batch(rows) if self.texts else {}
        return {"labels": torch.from_numpy(self.labels[rows]), **tokens}


def collate(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch unchanged, since the data sets load complete batches."""
    return batch


UNIFORM_RANGE = 1e-3  # smallest range of normalized pixel values in an image that is not of one color
LOW_RANGE = 0.5  # range of normalized pixel values of very dark or flat images; photographs have 2 or more
MIN_STREAM_LABELS = 16  # so many equal labels are very unlikely in shuffled data


def check_pixels(pixel_values: torch.Tensor) -> None:
    """Raise `DataError` if pixels are not finite, or all images are of one color.

    `pixel_values` is `(batch, channels, height, width)`; images of one color, or of little contrast, are a warning if
    they are a majority.
    """
    if not torch.isfinite(pixel_values).all():
        raise DataError(
            "the first training batch has pixel values that are not finite. Check image_mean and image_std (a standard"
            " deviation close to 0), or the preprocessing of the model."
        )
    ranges = (pixel_values.amax((2, 3)) - pixel_values.amin((2, 3))).amax(1)
    flat = ranges < UNIFORM_RANGE
    count, images = int(flat.sum()), len(flat)
    if count == images > 1:
        raise DataError(
            f"all {images} images of the first training batch are of one color each. Check the images of the data set"
            " and image_column."
        )
    if count > images // 2:
        logger.warning("%d of the %d images of the first training batch are of one color each.", count, images)
    elif (low := int((ranges < LOW_RANGE).sum())) > images // 2:
        logger.warning(
            "%d of the %d images of the first training batch have very little contrast. 16-bit images are divided by"
            " 257: rescale values that use fewer bits, such as 12-bit scans, before the training.",
            low, images,
        )  # fmt: skip


def check_labels(labels: np.ndarray, names: list[str]) -> None:
    """Raise `DataError` if all training images have the same labels.

    `labels` are class indices `(images,)`, or 0 and 1 `(images, classes)`.
    """
    if len(names) > 1 and is_constant(labels):
        what = "have the same labels" if labels.ndim > 1 else f"are of class '{names[labels[0]]}', one of {len(names)}"
        raise DataError(
            f"all {len(labels)} training images {what}: look at train_split (a slice of a sorted split has its first"
            " class only) and label_column."
        )


def check_stream_labels(labels: torch.Tensor, names: list[str], repeats: int) -> None:
    """Warn if the first images of a stream are all of one class.

    Args:
        labels: class indices `(batch,)`.
        names: class names.
        repeats: number of consecutive copies of each image.
    """
    drawn = labels[::repeats]
    if len(names) > 1 and len(drawn) >= MIN_STREAM_LABELS and (drawn == drawn[0]).all():
        logger.warning(
            "The first %d images of the stream are all of class '%s'. If the files are sorted by class, shuffle them,"
            " or increase shuffle_buffer_size to more than the images of a class.",
            len(drawn),
            names[int(drawn[0])],
        )
