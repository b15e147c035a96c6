"""Map-style dataset that returns whole batches, and checks of the first batch."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from timm.data import create_transform

from hfvit.data.decode import decode, decode_crop, image_size
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
    """Reads images that were decoded once: row i of the split is row `rows[i]` of `pixels`."""

    pixels: PixelArray
    rows: np.ndarray

    def for_training(self, rows: np.ndarray, seeds: np.ndarray, augmentation: Augmentation) -> dict[str, Any]:
        images = self.pixels.read(self.rows[rows])
        return {"images": torch.from_numpy(images), "plan": augmentation.sample(seeds, *images.shape[1:3])}

    def for_evaluation(self, rows: np.ndarray) -> dict[str, Any]:
        return {"images": torch.from_numpy(self.pixels.read(self.rows[rows]))}


class DecodingReader:
    """Decodes images as they are asked for, and crops and resizes them in 8 bits to the model's size.

    `split` has the columns `image` (undecoded) and `row`; `name` is the data set's own split, so that an error names
    both as the user would look them up. `data_config` is timm's (timm.data.resolve_data_config).
    """

    def __init__(self, split: Dataset, name: str, data_config: dict[str, Any]):
        self.split, self.name = split, name
        # timm's evaluation transform without its last step: the saved image processor's, bit for bit.
        self.eval_transform = create_transform(**data_config, is_training=False, use_prefetcher=True)

    def for_training(self, rows: np.ndarray, seeds: np.ndarray, augmentation: Augmentation) -> dict[str, Any]:
        return decoded_crops(self._examples(rows), self.name, seeds, augmentation)

    def for_evaluation(self, rows: np.ndarray) -> dict[str, Any]:
        pictures = (decode(example["image"], self.name, example["row"]) for example in self._examples(rows))
        return {"crops": torch.stack([self.eval_transform(picture) for picture in pictures]).permute(0, 2, 3, 1)}

    def _examples(self, rows: np.ndarray) -> list[dict]:
        columns = self.split[rows.tolist()]  # at once, which is half the work of one by one
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def decoded_crops(examples: list[dict], name: str, seeds: np.ndarray, augmentation: Augmentation) -> dict[str, Any]:
    """The `crops` and the drawn `plan` of examples of split `name`, each with its `image` (undecoded) and `row`."""
    sizes = np.array([image_size(example["image"], name, example["row"]) for example in examples])
    boxes, flips = augmentation.sample_crops(seeds, sizes[:, 0], sizes[:, 1])
    size, interpolation = augmentation.image_size, augmentation.interpolation
    crops = []
    for example, box, flip in zip(examples, boxes, flips, strict=True):
        crop = decode_crop(example["image"], name, example["row"], box, size, interpolation)
        crops.append(crop[:, ::-1] if flip else crop)
    operations = augmentation.sample_operations(seeds, min(size))
    return {"crops": torch.from_numpy(np.stack(crops)), "plan": {"operations": operations}}


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
    """Build a data set for each split that is not streamed: read from an array where the images allow it.

    The log and the splits' facts tell how each split is read, and why.

    Args:
        splits: `data.splits.ImageSplits`.
        data_config: preprocessing of the model (`timm.data.resolve_data_config`).
        augmentation: of the training images.
        seed: of what is random about a training image.
        repeats: how often in a row a training image is drawn.
        show_progress: show a progress bar while images are decoded.
        texts: tokens by role, of a model that reads texts.
        train_transforms: replaces the augmentation of training images; see `TransformReader`.
    """
    used = Counter()
    for role, source in splits.sources.items():
        used[source] += len(splits[role])
    found = {}
    for role, source in splits.sources.items():
        split, whole = splits[role], splits.whole[role]
        # A few rows of a large split get an array of their own.
        kept = split if 4 * used[source] < len(whole) else whole
        if train_transforms and role == "train":
            reader, how = (
                TransformReader(split, source, train_transforms),
                "decoded as they are read: train_transforms",
            )
        else:
            reader, how = open_reader(split, kept, source, data_config, show_progress)
        logger.info("%s: %s images %s", role, f"{len(split):,}", how)
        splits.facts["splits"][role]["input"] = how
        training = {"augmentation": augmentation, "seed": seed, "repeats": repeats} if role == "train" else {}
        found[role] = ImageDataset(split["label"], reader, texts=(texts or {}).get(role), **training)
    return found


def open_reader(split: Dataset, kept: Dataset, name: str, data_config: dict[str, Any], show_progress: bool):
    """How to read `split`, as a reader and in words.

    Args:
        split: columns `image` (undecoded), `row` and `label`.
        kept: what an array of decoded images would hold: `split`, or the whole split that it is a part of.
        name: of the split, for messages.
        data_config: timm's.
        show_progress: show a progress bar while an array is filled.
    """
    try:
        height, width = common_size(kept, name)
        if Preprocessing(data_config).geometry(height, width) is None:
            raise NotCacheableError(f"evaluation of {width}x{height} pixels needs Pillow itself")
        pixels = cached_pixels(kept, name, (height, width), show_progress)
    except NotCacheableError as reason:
        return DecodingReader(split, name, data_config), f"decoded as they are read: {reason}"
    rows = np.arange(len(split)) if kept is split else np.searchsorted(kept["row"], split["row"])
    return ArrayReader(pixels, rows), f"of {width}x{height} pixels, decoded once"


class ImageDataset(torch.utils.data.Dataset):
    """Batches of one split, which the loader asks for as a whole (`__getitems__`) and passes on (`collate`).

    A batch holds `labels` `(batch,)`, uint8 `images` or `crops` (see augment.py), for training the drawn `plan`,
    and with `texts` their tokens.

    Indexed by rows, or for training by `(draw, row)` as `EpochSampler` yields them. What is random about an image
    depends on (seed, draw, row) alone: it is augmented alike on one process or four, with or without workers, in an
    unbroken run or a resumed one.
    """

    def __init__(
        self,
        labels: list[int],
        reader: ArrayReader | DecodingReader,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        repeats: int = 1,
        texts: TokenTable | None = None,
    ):
        self.texts = texts
        self.labels, self.reader = np.asarray(labels, dtype=np.int64), reader
        self.augmentation, self.seed, self.repeats = augmentation, seed, repeats

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def decodes(self) -> bool:
        """Whether reading means to decode pictures, which is work for several processes."""
        return not isinstance(self.reader, ArrayReader)

    @property
    def images(self) -> int:
        """How many there are, as `ImageStream` says it too."""
        return len(self)

    def preview(self, count: int) -> dict[str, Any]:
        """A training batch of at most `count` images from all over the split; an even number, for mixing."""
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
    """The batch as `ImageDataset` or a stream (stream.py) made it."""
    return batch


logger = logging.getLogger(__name__)

FLAT = 1e-3  # pixel values (about one deviation of the data wide) that differ by less are one color
ENOUGH = 16  # labels that are all the same by chance less often than anyone trains


def check_pixels(pixel_values: torch.Tensor) -> None:
    """Raise `DataError` when images `(batch, 3, height, width)` are not finite, or each is of one color."""
    if not torch.isfinite(pixel_values).all():
        raise DataError(
            "the first training batch has pixel values that are not finite; look at image_mean and image_std (a"
            " deviation close to 0), or at the model's own preprocessing."
        )
    flat = (pixel_values.amax((2, 3)) - pixel_values.amin((2, 3))).amax(1) < FLAT
    count, images = int(flat.sum()), len(flat)
    if count == images > 1:
        raise DataError(
            f"all {images} images of the first training batch are of one color each; look at the pictures of the"
            " data set, and at image_column."
        )
    if count > images // 2:
        logger.warning("%d of the %d images of the first training batch are of one color each.", count, images)


def check_labels(labels: np.ndarray, names: list[str]) -> None:
    """Raise `DataError` when all training images `(images,)` are of one class of several."""
    if len(names) > 1 and (labels == labels[0]).all():
        raise DataError(
            f"all {len(labels)} training images are of class '{names[labels[0]]}', one of {len(names)}: look at"
            " train_split (a slice of a sorted split has its first class only) and label_column."
        )


def check_stream_labels(labels: torch.Tensor, names: list[str], repeats: int) -> None:
    """Warn when the first images `(batch,)` of a stream are of one class: nobody knows whether the others are.

    Each image comes `repeats` times in a row.
    """
    drawn = labels[::repeats]
    if len(names) > 1 and len(drawn) >= ENOUGH and (drawn == drawn[0]).all():
        logger.warning(
            "The first %d images of the stream are all of class '%s'. Files that are sorted by class need a"
            " shuffle_buffer_size larger than a class, or must be shuffled before they are written.",
            len(drawn),
            names[int(drawn[0])],
        )
