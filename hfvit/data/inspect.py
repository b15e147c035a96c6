"""Inspect splits, classes, sizes, damaged images and duplicates of a data set."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from hfvit.data.decode import to_rgb, upright_size
from hfvit.data.duplicates import groups_of, near_pairs, perceptual_hashes, reduce_image, thumbnails
from hfvit.data.inspection import (
    ROLES,
    Duplicates,
    ImageName,
    ImageSizes,
    InspectedSplit,
    Inspection,
    LabelCheck,
)
from hfvit.data.labels import class_counts, likely_typos, similar_names, targets_of
from hfvit.data.local import LocalData, data_root, image_file
from hfvit.data.open_image import image_error_reason, open_image
from hfvit.data.splits import DIGITS, FEW_VALIDATION_IMAGES, ImageSplits, load_whole_splits, open_source, split_names
from hfvit.metrics.label_errors import WEAK_MODEL
from hfvit.recipe.arguments import DataArguments
from hfvit.recipe.starting import IMBALANCE
from hfvit.utils.environment import cores
from hfvit.utils.files import file_sha256
from hfvit.utils.formatting import counted, shortened
from hfvit.utils.hub_ids import is_local

CHUNK = 128  # images of one task
DRAFT = 64  # smallest side in pixels of a reduced JPEG; the hash needs 32
TINY_SIDE = 16  # pixels
TINY_FRACTION = 0.25  # of the median shorter side
LOW_CONTRAST = 32  # levels of 255 between the darkest and brightest pixel
FEW_IN_CLASS = 10


class Opened(NamedTuple):
    """Data set that `open_data` loaded, before images are decoded."""

    data: DataArguments
    splits: ImageSplits
    local: LocalData | None


def open_data(data: DataArguments, seed: int = 42) -> Opened:
    """Load the splits as for training.

    Raises:
        DataError: the data set cannot be used for training.
    """
    local = open_source(data)
    return Opened(data, load_whole_splits(data, seed, local), local)


def inspect_data(opened: Opened, label_check: LabelCheck | None = None, show_progress: bool = True) -> Inspection:
    """Decode all images once, and describe the data set.

    Args:
        opened: data set from `open_data`.
        label_check: suspicious labels from `evaluation.label_errors.find_label_errors`. Default: none.
        show_progress: show a progress bar on standard error.

    Returns:
        The description, still without a recipe.
    """
    splits = opened.splits
    roles = [role for role in ROLES if role in splits.sources]
    scans = {role: scan(splits[role], f"Reading {role}", show_progress) for role in roles}
    names = ImageNames(opened)
    inspection = Inspection(
        dataset_name=str(opened.data.dataset_name),
        layout=_layout(opened),
        image_column=splits.image_column,
        label_column=splits.label_column,
        splits={role: _describe_split(splits, role) for role in roles},
        unused_splits=_unused(opened),
        labels=splits.labels,
        imbalance=_imbalance(split_class_counts(splits, "train")),
        images=_sizes(scans),
        left_out=_left_out(opened.local),
        unreadable=[names(role, row, image.problem) for role, row, image in _each(scans) if image.problem],
        tiny=_tiny(scans, names),
        uniform=[names(role, row) for role, row, image in _each(scans) if image.is_uniform],
        duplicates=_duplicates(splits, scans, names),
        label_check=label_check,
    )
    inspection.notes += opened.local.notes if opened.local else []
    _warn_of_pixels(inspection, [image for _, _, image in _each(scans) if not image.problem])
    _add_warnings(inspection)
    return inspection


class ImageNames:
    """Create the `ImageName` of an image from its split and its position there."""

    def __init__(self, opened: Opened):
        self.splits = opened.splits
        self.root = data_root(opened.data.dataset_name) if opened.local else None

    def __call__(self, role: str, row: int, reason: str | None = None) -> ImageName:
        split = self.splits[role]
        example = split[int(row)]
        return ImageName(
            split=role,
            row=int(example["row"]),
            label=self.label(example["label"]),
            file=image_file(example["image"], self.root),
            reason=reason,
        )

    def label(self, value: int | Sequence[int]) -> str:
        """Return the class name, or the names of several labels, joined by +."""
        if isinstance(value, int):
            return self.splits.labels[value]
        return " + ".join(self.splits.labels[index] for index in np.flatnonzero(value)) or "none"


# Reading the images


class ImageProperties(NamedTuple):
    """Properties of an image; `hash` and `thumbnail` are None if it cannot be decoded.

    `contrast` is the difference between the brightest and the darkest level, 0 to 255.
    """

    width: int = 0
    height: int = 0
    mode: str = ""
    format: str = ""
    bytes: int = 0
    is_uniform: bool = False
    contrast: int = 255
    has_pages: bool = False
    hash: np.uint64 | None = None
    thumbnail: np.ndarray | None = None
    problem: str | None = None


def scan(split: Dataset, title: str, show_progress: bool = True) -> list[ImageProperties]:
    """Decode all images of a split.

    Args:
        split: column `image` (undecoded).
        title: title of the progress bar.
        show_progress: show a progress bar.

    Returns:
        The properties of each image.
    """
    starts = range(0, len(split), CHUNK)
    images = split.select_columns(["image"])

    def read(start: int) -> list[ImageProperties]:
        return _read_chunk(images[start : start + CHUNK]["image"])

    found: list[ImageProperties] = []
    bar = tqdm(total=len(split), desc=title, unit="image", disable=None if show_progress else True, leave=False)
    with bar, ThreadPoolExecutor(cores()) as pool:  # Pillow releases the GIL
        for chunk in pool.map(read, starts):
            found += chunk
            bar.update(len(chunk))
    return found


def _read_chunk(images: list[dict[str, Any] | None]) -> list[ImageProperties]:
    found: list[ImageProperties] = []
    reduced: list[np.ndarray] = []
    for encoded in images:
        try:
            one, pixels = _read_image(encoded)
        except MemoryError:
            raise
        except Exception as error:
            found.append(ImageProperties(problem=image_error_reason(error) if encoded else "there is no image"))
            continue
        found.append(one)
        reduced.append(pixels)
    if not reduced:
        return found
    pixels = np.stack(reduced)
    hashes = iter(perceptual_hashes(pixels))
    thumbs = iter(thumbnails(pixels))
    return [one if one.problem else one._replace(hash=next(hashes), thumbnail=next(thumbs)) for one in found]


def _read_image(encoded: dict[str, Any]) -> tuple[ImageProperties, np.ndarray]:
    content = encoded.get("bytes")
    source = encoded["path"] if content is None else content  # a path beside bytes was not checked
    with open_image(source) as image:
        height, width = upright_size(image)
        mode = image.mode
        kind = image.format
        has_pages = kind == "TIFF" and image.is_animated  # does not read the further pages
        image.draft("RGB", (DRAFT, DRAFT))  # decodes a large JPEG at reduced size
        was_reduced = image.size not in ((width, height), (height, width))
        image = to_rgb(image)
        reduced = reduce_image(image)
        is_uniform = _is_uniform(image)
        extrema = image.getextrema()
        contrast = max(high for _, high in extrema) - min(low for low, _ in extrema)
    if is_uniform and was_reduced:
        with open_image(source) as image:
            is_uniform = _is_uniform(to_rgb(image))
    size = os.path.getsize(source) if content is None else len(content)
    return ImageProperties(width, height, mode, kind or "", size, is_uniform, contrast, has_pages), reduced


def _is_uniform(image) -> bool:
    return all(low == high for low, high in image.getextrema())


def _each(scans: dict[str, list[ImageProperties]]) -> Iterator[tuple[str, int, ImageProperties]]:
    for role, images in scans.items():
        for row, image in enumerate(images):
            yield role, row, image


# Describe


def split_class_counts(splits: ImageSplits, role: str) -> np.ndarray:
    """Count the images of each class `(classes,)`, once for each of their labels."""
    return class_counts(targets_of(splits[role]), len(splits.labels))


def _describe_split(splits: ImageSplits, role: str) -> InspectedSplit:
    metadata = splits.metadata["splits"][role]
    counts = split_class_counts(splits, role)
    return InspectedSplit(
        source=metadata["source"],
        images=len(splits[role]),
        classes=dict(zip(splits.labels, counts.tolist(), strict=True)),
        held_out=metadata.get("held_out"),
    )


def _layout(opened: Opened) -> str:
    if opened.local:
        return opened.local.layout
    if opened.data.dataset_name == DIGITS:
        return "scikit-learn's digits"
    return "folder that `datasets` reads" if is_local(opened.data.dataset_name) else "data set on the Hub"


def _unused(opened: Opened) -> list[str]:
    splits = opened.splits
    available = split_names(splits.whole["train"], opened.data, opened.local)
    used = {part.split("[")[0] for name in splits.sources.values() for part in name.split("+")}
    return [name for name in available if name not in used]


def _left_out(local: LocalData | None) -> dict[str, list[str]]:
    if not local:
        return {}
    documents = {"not used": local.left_out.documents} if local.left_out.documents else {}
    return local.left_out.by_reason() | documents


def _imbalance(counts: np.ndarray) -> float:
    """Return the size of the largest class relative to the smallest nonempty one."""
    present = counts[counts > 0]
    return round(float(present.max() / present.min()), 2) if len(present) else 1.0


def _sizes(scans: dict[str, list[ImageProperties]]) -> ImageSizes | None:
    readable = [image for _, _, image in _each(scans) if not image.problem]
    if not readable:
        return None
    width, height = ([getattr(image, side) for image in readable] for side in ("width", "height"))
    sizes = Counter(f"{image.width}x{image.height}" for image in readable)
    return ImageSizes(
        width=[min(width), int(np.median(width)), max(width)],
        height=[min(height), int(np.median(height)), max(height)],
        sizes=dict(sizes.most_common(5)),
        modes=dict(Counter(image.mode for image in readable).most_common()),
        formats=dict(Counter(image.format for image in readable).most_common()),
    )


def _tiny(scans: dict[str, list[ImageProperties]], names: ImageNames) -> list[ImageName]:
    """Return the images that are much smaller than the others."""
    sides = [min(image.width, image.height) for _, _, image in _each(scans) if not image.problem]
    limit = TINY_FRACTION * float(np.median(sides)) if sides else 0.0
    return [
        names(role, row, f"{image.width}x{image.height} pixels")
        for role, row, image in _each(scans)
        if not image.problem and min(image.width, image.height) < limit
    ]


def _duplicates(splits: ImageSplits, scans: dict[str, list[ImageProperties]], names: ImageNames) -> list[Duplicates]:
    """Return groups of duplicates; images of one color only if their files are equal."""
    places = [(role, row) for role, row, image in _each(scans) if not image.problem]
    images = [scans[role][row] for role, row in places]
    if not images:
        return []
    hashes = np.array([image.hash for image in images], np.uint64)
    thumbs = np.stack([image.thumbnail for image in images])
    varied = np.flatnonzero([not image.is_uniform for image in images])
    near = varied[near_pairs(hashes[varied], thumbs[varied])]
    by_size: dict[tuple, list[int]] = defaultdict(list)
    for index, image in enumerate(images):
        by_size[image.hash, image.bytes].append(index)
    candidates = [members for members in by_size.values() if len(members) > 1]
    exact = [pair for members in candidates for pair in _same_content(splits, places, members)]
    equal = np.array(exact, np.int64).reshape(-1, 2)
    same_file = {int(index): number for number, group in enumerate(groups_of(equal, len(images))) for index in group}
    found = []
    for group in groups_of(np.concatenate([near.reshape(-1, 2), equal]), len(images)):
        files = {same_file.get(int(index)) for index in group}
        kind = "exact" if len(files) == 1 and None not in files else "near"
        found.append(Duplicates(kind=kind, images=[names(*places[index]) for index in group]))
    return found


def _same_content(splits: ImageSplits, places: list[tuple[str, int]], members: list[int]) -> list[tuple[int, int]]:
    """Return pairs of images with the same file content.

    Args:
        splits: splits of the data set.
        places: split and row of each image.
        members: indices of the images to compare, in order.
    """
    first: dict[str, int] = {}
    pairs = []
    for index in members:
        role, row = places[index]
        encoded = splits[role][row]["image"]
        content = encoded.get("bytes")
        digest = file_sha256(Path(encoded["path"])) if content is None else hashlib.sha256(content).hexdigest()
        before = first.setdefault(digest, index)
        if before != index:
            pairs.append((before, index))
    return pairs


# Warnings and notes


def _add_warnings(inspection: Inspection) -> None:
    if inspection.unreadable:
        inspection.warnings.append(
            f"{counted(len(inspection.unreadable), 'image')} cannot be decoded, such as"
            f" {inspection.unreadable[0].name}. Training stops at them. Remove them, or pass --on_bad_image skip."
        )
    _warn_of_duplicates(inspection)
    _warn_of_labels(inspection)
    _warn_of_sizes(inspection)
    _warn_of_classes(inspection)
    if inspection.unused_splits:
        inspection.notes.append(f"Splits that are not used: {', '.join(inspection.unused_splits)}.")


def _warn_of_pixels(inspection: Inspection, images: list[ImageProperties]) -> None:
    low = [image.contrast for image in images if image.contrast < LOW_CONTRAST]
    if len(low) > len(images) // 2:
        inspection.warnings.append(
            f"{counted(len(low), 'image')} with very little contrast: a median of {int(np.median(low))} of 255 levels."
            " 16-bit images are divided by 257: rescale values that use fewer bits, such as 12-bit scans."
        )
    pages = sum(image.has_pages for image in images)
    if pages:
        inspection.warnings.append(
            f"{counted(pages, 'TIFF file')} with several pages, of which the first one is read."
        )


def _warn_of_duplicates(inspection: Inspection) -> None:
    warnings = inspection.warnings
    for role in ("test", "validation"):
        leaked = [group for group in inspection.leaks if {"train", role} <= set(group.splits)]
        images = [image for group in leaked for image in group.images if image.split == role]
        if images:
            exact = sum(image.split == role for group in leaked if group.kind == "exact" for image in group.images)
            warnings.append(
                f"Leakage: {len(images):,} of {inspection.splits[role].images:,} {role} images have a copy in the"
                f" training split ({exact:,} exact, {len(images) - exact:,} near), such as {images[0].name}. The"
                f" {role} results are too good."
            )
    if inspection.conflicts:
        group = inspection.conflicts[0]
        warnings.append(
            f"{counted(len(inspection.conflicts), 'group')} of duplicates with different labels, such as"
            f" {group.images[0].name} ({', '.join(group.labels)})."
        )
    copies = sum(len(group.images) - 1 for group in inspection.duplicates if len(group.splits) == 1)
    if copies:
        inspection.notes.append(f"{counted(copies, 'copy', 'copies')} of images within their split.")


def _warn_of_labels(inspection: Inspection) -> None:
    check = inspection.label_check
    if check and check.agreement < WEAK_MODEL:
        inspection.warnings.append(
            f"--run: the model predicts only {check.agreement:.0%} of the labels. The suspicious labels of such a weak"
            " model mean little."
        )
    elif check and check.suspects:
        name = check.suspects[0].image.name
        inspection.warnings.append(f"{counted(len(check.suspects), 'suspicious label')}, such as that of {name}.")


def _warn_of_sizes(inspection: Inspection) -> None:
    warnings = inspection.warnings
    if inspection.uniform:
        name = inspection.uniform[0].name
        warnings.append(f"{counted(len(inspection.uniform), 'image')} of one color, such as {name}.")
    if inspection.tiny:
        warnings.append(
            f"{counted(len(inspection.tiny), 'image')} much smaller than the others, such as {inspection.tiny[0].name}"
            f" ({inspection.tiny[0].reason})."
        )
    sizes = inspection.images
    if sizes and max(sizes.width[1], sizes.height[1]) < TINY_SIDE:
        inspection.notes.append(
            f"Most images have {sizes.width[1]}x{sizes.height[1]} pixels, less than models are designed for."
        )


def _warn_of_classes(inspection: Inspection) -> None:
    warnings = inspection.warnings
    train = inspection.splits["train"].classes
    if similar := similar_names(inspection.labels):
        warnings.append("The classes {!r} and {!r} differ in case or spaces only.".format(*similar))
    if typos := likely_typos(train):
        pairs = [f"{rare!r} for {frequent!r}" for rare, frequent in typos]
        warnings.append(f"{counted(len(typos), 'class name')} may have a typo: {shortened(pairs, 3)}.")
    for role, split in inspection.splits.items():
        missing = [label for label, count in split.classes.items() if not count]
        if missing:
            warnings.append(f"{role}: {len(missing)} of {len(train)} classes have no images: {shortened(missing, 5)}.")
    few = [label for label, count in train.items() if 0 < count < FEW_IN_CLASS]
    if few:
        warnings.append(
            f"train: {len(few)} of {len(train)} classes have fewer than {FEW_IN_CLASS} images: {shortened(few, 5)}."
        )
    if inspection.imbalance >= IMBALANCE:
        warnings.append(
            f"The largest class has {inspection.imbalance:g} times the images of the smallest (see class_balance)."
        )
    count = inspection.splits["validation"].images
    if count < FEW_VALIDATION_IMAGES:
        warnings.append(
            f"validation: only {counted(count, 'image')} to select the checkpoint. With fewer than"
            f" {FEW_VALIDATION_IMAGES}, the selection is mostly random."
        )
