"""`Inspection`: result of `hfvit inspect`, and its text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hfvit.artifacts.json_record import OPTIONAL, Record
from hfvit.errors import printable
from hfvit.metrics.label_errors import WEAK_MODEL
from hfvit.recipe.starting import yaml_line
from hfvit.utils.formatting import aligned, shortened

ROLES = ("train", "validation", "test")
CLASSES_IN_TEXT = 20
NAMES_IN_TEXT = 5


@dataclass(kw_only=True)
class ImageName(Record):
    """Image of the data set.

    Attributes:
        split: train, validation or test.
        row: row in the original split that is used as `split`.
        label: class name.
        file: path relative to the data set, or name in the archive; None for images in tables.
        reason: description of a problem.
    """

    split: str
    row: int
    label: str
    file: str | None = None
    reason: str | None = field(default=None, metadata=OPTIONAL)

    @property
    def name(self) -> str:
        """Return the file name, or split and row."""
        return self.file or f"{self.split}[{self.row}]"


@dataclass(kw_only=True)
class InspectedSplit(Record):
    """Split of the data set.

    Attributes:
        source: name of the original split.
        images: number of images.
        classes: number of images of each class.
        held_out: fraction of `source` that is held out, None if `source` is used completely.
    """

    source: str
    images: int
    classes: dict[str, int]
    held_out: float | None = None


@dataclass(kw_only=True)
class ImageSizes(Record):
    """Image sizes in pixels, and number of images by size, color mode and format."""

    width: list[int]
    height: list[int]
    sizes: dict[str, int]
    modes: dict[str, int]
    formats: dict[str, int]


@dataclass(kw_only=True)
class Duplicates(Record):
    """Images with the same file content (`exact`) or similar pixels (`near`)."""

    kind: str
    images: list[ImageName]

    @property
    def splits(self) -> list[str]:
        """Return the splits of the images."""
        return [role for role in ROLES if any(image.split == role for image in self.images)]

    @property
    def labels(self) -> list[str]:
        """Return the distinct class names of the images, sorted."""
        return sorted({image.label for image in self.images})


@dataclass(kw_only=True)
class Suspect(Record):
    """Image with a suspicious label: probabilities of the prediction and of the label."""

    image: ImageName
    predicted: str
    probability: float
    label_probability: float


@dataclass(kw_only=True)
class LabelCheck(Record):
    """Suspicious labels, how they were found, and the fraction of correct predictions."""

    source: str
    agreement: float
    suspects: list[Suspect]


@dataclass(kw_only=True)
class Inspection(Record):
    """Result of `hfvit inspect`.

    `width` and `height` are minimum, median and maximum. `warnings` are problems to check before training.
    """

    schema_version: int = 1
    dataset_name: str
    layout: str
    image_column: str
    label_column: str | list[str]
    splits: dict[str, InspectedSplit]
    unused_splits: list[str]
    labels: list[str]
    imbalance: float
    images: ImageSizes | None
    left_out: dict[str, list[str]]
    unreadable: list[ImageName]
    tiny: list[ImageName]
    uniform: list[ImageName]
    duplicates: list[Duplicates]
    label_check: LabelCheck | None = None
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    command: str = ""

    def __repr__(self) -> str:
        images = sum(split.images for split in self.splits.values())
        found = [f"{images:,} images", f"{len(self.labels):,} classes", f"{len(self.warnings)} warnings"]
        return f"Inspection({self.dataset_name}: {', '.join(found)})"

    def __str__(self) -> str:
        return describe(self)

    @property
    def label_columns(self) -> str:
        """Describe the label columns."""
        return self.label_column if isinstance(self.label_column, str) else ", ".join(self.label_column)

    @property
    def leaks(self) -> list[Duplicates]:
        """Return the duplicates in more than one split."""
        return [group for group in self.duplicates if len(group.splits) > 1]

    @property
    def conflicts(self) -> list[Duplicates]:
        """Return the duplicates with different labels."""
        return [group for group in self.duplicates if len(group.labels) > 1]


def describe(inspection: Inspection) -> str:
    """Format the result as plain text for a terminal."""
    parts = [_head(inspection), _class_table(inspection)]
    for title, lines in (("Warnings", inspection.warnings), ("Notes", inspection.notes)):
        if lines:
            parts.append("\n".join([f"{title}:", *(f"  - {printable(line)}" for line in lines)]))
    for title, names in (("Cannot be decoded", inspection.unreadable), ("Of one color", inspection.uniform)):
        if names:
            parts.append("\n".join([f"{title}:", *_listed(names)]))
    for title, groups in (
        ("In two splits", inspection.leaks), ("Duplicates with different labels", inspection.conflicts)
    ):  # fmt: skip
        if groups:
            parts.append("\n".join([f"{title}:", *_listed_groups(groups)]))
    if inspection.label_check:
        parts.append(_suspects(inspection.label_check))
    parts.append("\n".join(["Starting recipe:", *(f"  {yaml_line(*item)}" for item in inspection.recipe.items())]))
    parts.append(f"Next: {printable(inspection.command)}")
    return "\n\n".join(parts)


def _head(inspection: Inspection) -> str:
    rows = [
        ("data set", printable(inspection.dataset_name)),
        ("format", printable(inspection.layout)),
        ("columns", printable(f"images from {inspection.image_column}, classes from {inspection.label_columns}")),
    ]
    for role, split in inspection.splits.items():
        source = "" if split.source == role else f" ({printable(split.source)})"
        rows.append((role, f"{split.images:,} images{source}"))
    sizes = inspection.images
    if sizes:
        low, middle, high = zip(sizes.width, sizes.height, strict=True)
        shown = f"{middle[0]}x{middle[1]}"
        if low != high:
            shown = f"{low[0]} to {high[0]} wide, {low[1]} to {high[1]} high, median {shown}"
        rows.append(("pixels", shown))
        rows.append(("modes", _counts(sizes.modes)))
        rows.append(("formats", _counts(sizes.formats)))
    exact = sum(group.kind == "exact" for group in inspection.duplicates)
    near = len(inspection.duplicates) - exact
    rows.append(("duplicates", f"{exact:,} groups of the same file, {near:,} of near duplicates"))
    left_out = {reason: len(names) for reason, names in inspection.left_out.items()}
    if left_out:
        rows.append(("left out", _counts(left_out)))
        rows += [
            ("", printable(f"{reason}: {shortened(names, NAMES_IN_TEXT)}"))
            for reason, names in inspection.left_out.items()
        ]
    return "\n".join(aligned(rows))


def _counts(counts: Mapping[str, int]) -> str:
    return printable(", ".join(f"{name} {count:,}" for name, count in counts.items()))


def _class_table(inspection: Inspection) -> str:
    splits = inspection.splits
    total = {label: sum(split.classes[label] for split in splits.values()) for label in inspection.labels}
    labels = sorted(inspection.labels, key=lambda label: -total[label])
    skipped = max(0, len(labels) - CLASSES_IN_TEXT)
    if skipped:
        labels = [*labels[: CLASSES_IN_TEXT // 2], None, *labels[-CLASSES_IN_TEXT // 2 :]]
    rows = [("class", *splits)]
    for label in labels:
        if label is None:
            rows.append((f"... {skipped:,} more", *("" for _ in splits)))
        else:
            rows.append((printable(label), *(f"{split.classes[label]:,}" for split in splits.values())))
    ratio = f"; the largest has {inspection.imbalance:g} times the training images of the smallest"
    head = f"{len(inspection.labels):,} classes{ratio if inspection.imbalance > 1 else ''}:"
    return "\n".join([head, *(f"  {line}" for line in aligned(rows))])


def _listed(images: list[ImageName]) -> list[str]:
    reasons = [f": {image.reason}" if image.reason else "" for image in images]
    return _first([f"{image.name}{reason}" for image, reason in zip(images, reasons, strict=True)])


def _listed_groups(groups: list[Duplicates]) -> list[str]:
    return _first([f"{group.kind}: {', '.join(map(_with_label, group.images))}" for group in groups])


def _first(lines: list[str]) -> list[str]:
    more = [f"  ... {len(lines) - NAMES_IN_TEXT:,} more"] if len(lines) > NAMES_IN_TEXT else []
    return [*(f"  {printable(line)}" for line in lines[:NAMES_IN_TEXT]), *more]


def _with_label(image: ImageName) -> str:
    return f"{image.name} ({image.split}, {image.label})"


def _suspects(check: LabelCheck) -> str:
    weak = f"; below {WEAK_MODEL:.0%}, a model cannot judge them" if check.agreement < WEAK_MODEL else ""
    head = f"Suspicious labels ({printable(check.source)}; {check.agreement:.0%} of the labels predicted{weak}):"
    rows = [("image", "label", "predicted")]
    for suspect in check.suspects[: 2 * NAMES_IN_TEXT]:
        rows.append(
            (
                printable(suspect.image.name),
                f"{printable(suspect.image.label)} {suspect.label_probability:.2f}",
                f"{printable(suspect.predicted)} {suspect.probability:.2f}",
            )
        )
    if len(rows) == 1:
        return f"{head} none"
    more = len(check.suspects) - 2 * NAMES_IN_TEXT
    return "\n".join([head, *(f"  {line}" for line in aligned(rows)), *([f"  ... {more:,} more"] if more > 0 else [])])
