"""Find images in local folders: splits, classes, and the files that are left out."""

import os
import stat
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from hfvit.data.decode import is_hidden
from hfvit.data.open_image import extensions
from hfvit.errors import DataError, nearest

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
HEIF_EXTENSIONS = (".heic", ".heif", ".hif")
TABLE_EXTENSIONS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
ARCHIVE_EXTENSIONS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_LEFT_OUT = 0.05

HIDDEN = "hidden or system file"
UNKNOWN_TYPE = "unknown type"
NEEDS_HEIF = "needs pillow-heif"
EMPTY = "empty file"
UNREADABLE = "cannot be read"
BROKEN_LINK = "broken link"
LINK_LOOP = "link to a folder above it"
OUTSIDE = "outside the class folders"
NO_SPLIT = "not in a split folder"
BAD_IMAGE = "damaged image"
# Reasons that do not count against `MAX_LEFT_OUT`: no image is lost.
HARMLESS = (HIDDEN, LINK_LOOP)


class File(NamedTuple):
    """A file of a data set: `parts` is its path below the data set, `key` tells links to one file."""

    parts: tuple[str, ...]
    path: str
    size: int = 0
    changed: int = 0
    key: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return "/".join(self.parts)


class LeftOut:
    """Files of a data set that are not used, by reason and split; the split is None for a file in none."""

    def __init__(self):
        self.files: dict[tuple[str, str | None], list[str]] = defaultdict(list)
        self.documents: list[str] = []

    def add(self, reason: str, name: str, split: str | None = None) -> None:
        self.files[reason, split].append(name)

    def counts(self, split: str | None = None) -> dict[str, int]:
        """Number of files by reason, of one split, or of no split."""
        return {reason: len(names) for (reason, where), names in self.files.items() if where == split}

    def by_reason(self) -> dict[str, list[str]]:
        """Names of the files by reason, of all splits, without documents."""
        names = defaultdict(list)
        for (reason, _), some in self.files.items():
            names[reason] += some
        return dict(names)

    def describe(self) -> str | None:
        """One line that counts and names the files; None when none was left out."""
        by_reason = self.by_reason()
        if self.documents:
            by_reason["not used"] = self.documents
        total = sum(map(len, by_reason.values()))
        if not total:
            return None
        parts = [f"{len(names):,} {reason} ({_some(names)})" for reason, names in by_reason.items()]
        return f"Left out {total:,} file{'s' if total > 1 else ''}: {', '.join(parts)}."

    def check(self, name: str, used: int) -> None:
        """Raise `DataError` when more than `MAX_LEFT_OUT` of the files are left out, hidden files aside.

        Args:
            name: of the data set.
            used: number of images that are used.
        """
        lost = {reason: names for reason, names in self.by_reason().items() if reason not in HARMLESS}
        count = sum(map(len, lost.values()))
        if not count or count <= MAX_LEFT_OUT * (count + used):
            return
        parts = "; ".join(f"{len(names):,} {reason} ({_some(names)})" for reason, names in lost.items())
        advice = "Remove, convert or move them"
        if NEEDS_HEIF in lost:
            advice = "Run `pip install 'hfvit[heif]'`"
        elif NO_SPLIT in lost:
            advice = "Rename these folders to train, validation or test, or name one with --validation_split"
        elif OUTSIDE in lost:
            advice = "Move images to FOLDER/CLASS/ or FOLDER/SPLIT/CLASS/"
        raise DataError(
            f"dataset_name: {count:,} of {count + used:,} files in {name} cannot be used: {parts}. {advice}; at most"
            f" {MAX_LEFT_OUT:.0%} of the files may be left out."
        )


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(sorted(names)[:most]) + (", ..." if len(names) > most else "")


def extension(name: str) -> str:
    """Lower-case extension of a file name; of a compressed tar both of its parts."""
    name = name.lower()
    compressed = next((end for end in ARCHIVE_EXTENSIONS if name.endswith(end) and end.count(".") > 1), None)
    return compressed or os.path.splitext(name)[1]


def canonical_split(name: str) -> str | None:
    """`train`, `validation` or `test` for a usual name of that split, in any case; else None."""
    return SPLIT_NAMES.get(name.lower())


def find_files(root: str | Path, left_out: LeftOut) -> tuple[list[File], list[tuple[str, ...]]]:
    """Files below `root` in the order of their paths, and its folders without files; links are followed.

    Args:
        root: a folder.
        left_out: gets what is hidden, empty or cannot be read.

    Raises:
        DataError: a folder cannot be read, or a pipe or device has the name of an image.
    """
    files: list[File] = []
    empty: list[tuple[str, ...]] = []
    _scan(str(root), (), (), files, empty, left_out)
    files.sort(key=lambda file: file.name)
    return files, empty


def _scan(
    folder: str,
    parts: tuple[str, ...],
    above: tuple[tuple[int, int], ...],
    files: list[File],
    empty: list[tuple[str, ...]],
    left_out: LeftOut,
) -> None:
    try:
        status = os.stat(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"dataset_name: the folder {folder} cannot be read ({error.strerror}).") from None
    key = (status.st_dev, status.st_ino)
    if key in above:
        left_out.add(LINK_LOOP, "/".join(parts))
        return
    found = len(files)
    for entry in entries:
        inside = (*parts, entry.name)
        name = "/".join(inside)
        if is_hidden(entry.name):
            left_out.add(HIDDEN, name)
        elif entry.is_dir():
            _scan(entry.path, inside, (*above, key), files, empty, left_out)
        else:
            file = _regular(entry, inside, left_out)
            if file:
                files.append(file)
    if len(files) == found:
        empty.append(parts)


def _regular(entry: os.DirEntry, parts: tuple[str, ...], left_out: LeftOut) -> File | None:
    name = "/".join(parts)
    try:
        status = entry.stat()
    except OSError:
        left_out.add(BROKEN_LINK if entry.is_symlink() else UNREADABLE, name)
        return None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"dataset_name: {entry.path} is a pipe, socket or device, not a file. Remove it.")
    if not status.st_size:
        left_out.add(EMPTY, name)
        return None
    if not os.access(entry.path, os.R_OK):
        left_out.add(UNREADABLE, name)
        return None
    return File(parts, entry.path, status.st_size, status.st_mtime_ns, (status.st_dev, status.st_ino))


@dataclass
class ClassFolders:
    """Images by split with their class names, found by `class_folders`.

    `is_split` tells whether folders name the splits: otherwise all images are in `train`. `notes` are lines for the
    log.
    """

    splits: dict[str, list[tuple[File, str]]]
    is_split: bool
    notes: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """Class names of all splits, sorted."""
        return sorted({label for rows in self.splits.values() for _, label in rows})

    def __len__(self) -> int:
        return sum(map(len, self.splits.values()))


def select_images(files: Iterable[File], left_out: LeftOut, ignored: Collection[str] = ()) -> list[File]:
    """Those of `files` that are images by their extension; the others are left out.

    Args:
        files: of `find_files`, or members of an archive.
        left_out: gets the others; documents at the top and files with an extension in `ignored` apart.
        ignored: extensions that are not left out: another reader takes them.
    """
    known = extensions()
    images = []
    for file in files:
        kind = extension(file.parts[-1])
        if kind in known:
            images.append(file)
        elif kind in ignored:
            continue
        elif len(file.parts) == 1 or (len(file.parts) == 2 and canonical_split(file.parts[0])):
            left_out.documents.append(file.name)
        else:
            left_out.add(NEEDS_HEIF if kind in HEIF_EXTENSIONS else UNKNOWN_TYPE, file.name)
    return images


def class_folders(
    name: str, images: list[File], left_out: LeftOut, named: Collection[str] = (), empty: Iterable[tuple] = ()
) -> ClassFolders:
    """Assign images to splits and classes by their folders.

    A folder at the top whose name is a split's decides the split. The class is the outermost folder below it that
    holds images itself. Split names anywhere else in a path mean nothing.

    Args:
        name: of the data set, for messages.
        images: of `select_images`.
        left_out: gets the images that are in no class folder or no split folder.
        named: names of splits that the user gave, beside the usual ones.
        empty: folders without files, of `find_files`.

    Raises:
        DataError: the folders are no classes, or it is not clear which of them are.
    """
    depth = _wrapper_depth(images, named)
    tops = _split_folders(images, depth, named)
    direct = [file for file in images if len(file.parts) == depth + 1]
    for file in direct:
        left_out.add(OUTSIDE, file.name)
    rest = [file for file in images if len(file.parts) > depth + 1]
    if not rest:
        raise DataError(
            f"dataset_name: {name} has {len(images)} images and no class folders. Put the images of each class in a"
            " folder named after it: FOLDER/CLASS/image.jpg, or FOLDER/train/CLASS/image.jpg."
        )
    if not tops:
        _refuse_splits_without_classes(name, rest, depth)
        members = {"train": [(file, file.parts[depth:-1]) for file in rest]}
    else:
        members = defaultdict(list)
        for file in rest:
            split = tops.get(file.parts[depth])
            if split is None:
                left_out.add(NO_SPLIT, file.name)
            elif len(file.parts) == depth + 2:
                left_out.add(OUTSIDE, file.name, split)
            else:
                members[split].append((file, file.parts[depth + 1 : -1]))
    notes: list[str] = []
    if depth:
        notes.append(f"Classes and splits are the folders in {'/'.join(rest[0].parts[:depth])}.")
    splits = {split: _classes(name, split, rows, notes) for split, rows in members.items()}
    folders = ClassFolders(splits, bool(tops), list(dict.fromkeys(notes)))
    classes = {(file.parts[: len(file.parts) - 1]) for file in rest}
    depths = {len(parts) for parts in classes}
    unfilled = sorted("/".join(parts) for parts in empty if len(parts) in depths and parts not in classes)
    if unfilled:
        folders.notes.append(f"Folders without images: {_some(unfilled, 8)}.")
    left_out.check(name, len(folders))
    return folders


def _wrapper_depth(images: list[File], named: Collection[str]) -> int:
    """Number of folders at the top that hold nothing but another folder, down to the splits or classes.

    Archives often have one.
    """
    depth = 0
    while images and all(len(file.parts) > depth + 2 for file in images):
        tops = {file.parts[depth] for file in images}
        if len(tops) > 1 or any(canonical_split(top) or top in named for top in tops):
            return depth
        depth += 1
    return depth if len({file.parts[depth] for file in images}) > 1 else 0


def _split_folders(images: list[File], depth: int, named: Collection[str]) -> dict[str, str]:
    """Folders at the top that are splits, with the splits' names: they hold class folders."""
    found: dict[str, str] = {}
    for file in images:
        if len(file.parts) > depth + 2:
            top = file.parts[depth]
            split = top if top in named and not canonical_split(top) else canonical_split(top)
            if split:
                found[top] = split
    direct = {file.parts[depth] for file in images if len(file.parts) == depth + 2}
    # A class may be called "train": beside other classes, it holds images itself.
    is_class = len(found) == 1 and bool(direct & found.keys()) and bool(direct - found.keys())
    splits = {} if is_class else found
    for split in set(splits.values()):
        same = sorted(top for top, other in splits.items() if other == split)
        if len(same) > 1:
            raise DataError(
                f"dataset_name: the folders {' and '.join(same)} are both the {split} split. Merge or rename one."
            )
    return splits


def _refuse_splits_without_classes(name: str, images: list[File], depth: int) -> None:
    tops = {file.parts[depth] for file in images}
    if tops and all(canonical_split(top) for top in tops):
        raise DataError(
            f"dataset_name: the folders {', '.join(sorted(tops))} of {name} are splits, and hold no class folders. Put"
            " the images of each class in a folder named after it, such as train/CLASS/image.jpg."
        )


def _classes(
    name: str, split: str, rows: list[tuple[File, tuple[str, ...]]], notes: list[str]
) -> list[tuple[File, str]]:
    """Images with their class names, from the folders below the split."""
    holders = {folders for _, folders in rows}
    classes: dict[tuple[str, ...], tuple[str, ...]] = {}
    for folders in holders:
        ends = (folders[:end] for end in range(1, len(folders) + 1))
        classes[folders] = next(above for above in ends if above in holders)
    depths: dict[int, str] = {}
    for file, folders in rows:
        depths.setdefault(len(classes[folders]), file.name)
    if len(depths) > 1:
        examples = " and ".join(depths[depth] for depth in sorted(depths)[:2])
        raise DataError(
            f"dataset_name: class folders of {name} are at different depths ({examples}), so the classes are not"
            " clear. Move all class folders to one depth, and other folders out of it."
        )
    by_label: dict[str, tuple[str, ...]] = {}
    for found in sorted(set(classes.values())):
        label = unicodedata.normalize("NFC", found[-1])
        other = by_label.setdefault(label, found)
        if other != found:
            raise DataError(
                f"dataset_name: the class folders {'/'.join(other)} and {'/'.join(found)} of split '{split}' have one"
                " name. Rename one, or move their images to FOLDER/CLASS/."
            )
    depth = next(iter(depths))
    if depth > 1:
        example = min(set(classes.values()))
        notes.append(
            f"Classes are the folders that hold the images: {'/'.join(example)} is class '{example[-1]}', not"
            f" '{example[0]}'."
        )
    deeper = sorted(folders for folders, found in classes.items() if folders != found)
    if deeper:
        example = deeper[0]
        notes.append(
            f"Images of folders inside class folders belong to these: {'/'.join(example)} to class"
            f" '{classes[example][-1]}'."
        )
    return [(file, unicodedata.normalize("NFC", classes[folders][-1])) for file, folders in rows]


def check_shared_files(name: str, splits: dict[str, list[tuple[File, str]]]) -> None:
    """Raise `DataError` when a file is in two splits, through links."""
    owner: dict[tuple[int, int], tuple[str, File]] = {}
    shared: list[tuple[File, File]] = []
    for split, rows in splits.items():
        for file, _ in rows:
            if file.key is None:
                continue
            before = owner.setdefault(file.key, (split, file))
            if before[0] != split:
                shared.append((before[1], file))
    if shared:
        first, second = shared[0]
        raise DataError(
            f"dataset_name: {len(shared):,} files of {name} are in two splits through links, such as {first.name} and"
            f" {second.name}. Link each file in one split only."
        )


def no_split_error(option: str, name: str, split: str, available: Iterable[str]) -> DataError:
    """The error for a split that a data set does not have.

    Args:
        option: that names the split: `train_split`, `validation_split`, `test_split` or `split`.
        name: of the data set.
        split: that is missing.
        available: splits that are there.
    """
    known = list(available)
    advice = " Pass --test_split none to train without a test set." if option == "test_split" else ""
    return DataError(
        f"{option}: no split '{split}' in {name} (found: {', '.join(known)}).{nearest(split, known)}{advice}"
    )
