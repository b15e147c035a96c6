"""Find images in local folders: splits, classes, and the files that are left out."""

import os
import stat
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from hfvit.data.decode import is_hidden
from hfvit.data.open_image import extensions
from hfvit.errors import DataError, nearest, printable
from hfvit.utils.formatting import shortened

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
NOT_UTF8 = "name is not UTF-8"
# Reasons that do not count against `MAX_LEFT_OUT`: no image is lost.
HARMLESS = (HIDDEN, LINK_LOOP)


class File(NamedTuple):
    """File of a data set.

    Attributes:
        parts: parts of the path relative to the data set.
        path: path of the file.
        size: size in bytes.
        changed: modification time in nanoseconds.
        key: device and inode, equal for links to the same file; None if unknown.
    """

    parts: tuple[str, ...]
    path: str
    size: int = 0
    changed: int = 0
    key: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """Return the path relative to the data set."""
        return "/".join(self.parts)


class LeftOut:
    """Files of a data set that are not used, by reason and split (or None)."""

    def __init__(self):
        self.files: dict[tuple[str, str | None], list[str]] = defaultdict(list)
        self.documents: list[str] = []

    def add(self, reason: str, name: str, split: str | None = None) -> None:
        """Add a file.

        Args:
            reason: why it is not used.
            name: path relative to the data set.
            split: split that it is in.
        """
        self.files[reason, split].append(printable(name))

    def counts(self, split: str | None = None) -> dict[str, int]:
        """Return the number of files by reason, of one split or without a split."""
        return {reason: len(names) for (reason, where), names in self.files.items() if where == split}

    def by_reason(self) -> dict[str, list[str]]:
        """Return the names of the files by reason, of all splits, without documents."""
        names = defaultdict(list)
        for (reason, _), files in self.files.items():
            names[reason] += files
        return dict(names)

    def describe(self) -> str | None:
        """Return a line with the number and examples of the files, None if there are none."""
        by_reason = self.by_reason()
        if self.documents:
            by_reason["not used"] = self.documents
        total = sum(map(len, by_reason.values()))
        if not total:
            return None
        parts = [f"{len(names):,} {reason} ({shortened(sorted(names), 3)})" for reason, names in by_reason.items()]
        return f"Left out {total:,} file{'s' if total > 1 else ''}: {', '.join(parts)}."

    def check(self, name: str, used: int) -> None:
        """Raise `DataError` if more than `MAX_LEFT_OUT` of the files are left out.

        Hidden files do not count.

        Args:
            name: name of the data set.
            used: number of images that are used.
        """
        lost = {reason: names for reason, names in self.by_reason().items() if reason not in HARMLESS}
        count = sum(map(len, lost.values()))
        if not count or count <= MAX_LEFT_OUT * (count + used):
            return
        parts = "; ".join(f"{len(names):,} {reason} ({shortened(sorted(names), 3)})" for reason, names in lost.items())
        advice = "Remove, convert or move them"
        if NOT_UTF8 in lost:
            advice = "Rename them, for example with convmv"
        elif NEEDS_HEIF in lost:
            advice = "Run `pip install 'hfvit[heif]'`"
        elif NO_SPLIT in lost:
            advice = "Rename these folders to train, validation or test, or pass one as --validation_split"
        elif OUTSIDE in lost:
            advice = "Move images to FOLDER/CLASS/ or FOLDER/SPLIT/CLASS/"
        raise DataError(
            f"dataset_name: {count:,} of {count + used:,} files in {name} cannot be used, but at most"
            f" {MAX_LEFT_OUT:.0%} may be left out: {parts}. {advice}."
        )


def extension(name: str) -> str:
    """Return the extension of a file name in lower case, such as `.jpg` or `.tar.gz`."""
    name = name.lower()
    compressed = next((end for end in ARCHIVE_EXTENSIONS if name.endswith(end) and end.count(".") > 1), None)
    return compressed or os.path.splitext(name)[1]


def canonical_split(name: str) -> str | None:
    """Return `train`, `validation` or `test` for a usual name of the split, else None."""
    return SPLIT_NAMES.get(name.lower())


def is_utf8(name: str) -> bool:
    """Return whether a name is UTF-8; other bytes of names are lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_utf8(path: str, what: str) -> None:
    """Raise `DataError` if a path is not UTF-8, which Arrow requires.

    Args:
        path: path to check.
        what: description of the file or folder.
    """
    if not is_utf8(path):
        raise DataError(f"dataset_name: the name of {what} must be UTF-8, got {printable(path)}. Rename it.")


def find_files(root: str | Path, left_out: LeftOut) -> tuple[list[File], list[tuple[str, ...]]]:
    """Find all files below a folder; links are followed.

    Args:
        root: folder to search.
        left_out: collects hidden, empty and unreadable files, and those whose name is not UTF-8.

    Returns:
        (files sorted by path, folders without files).

    Raises:
        DataError: a folder cannot be read or its name is not UTF-8, or a file is a pipe or a device.
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
    check_utf8(folder, "a folder")
    try:
        status = os.stat(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"dataset_name: cannot read the folder {folder} ({error.strerror}).") from None
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
        elif _is_folder(entry):
            _scan(entry.path, inside, (*above, key), files, empty, left_out)
        else:
            file = _regular(entry, inside, left_out)
            if file:
                files.append(file)
    if len(files) == found:
        empty.append(parts)


def _is_folder(entry: os.DirEntry) -> bool:
    """Return whether an entry is a folder or a link to one, False for broken links."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder without permission
        return False


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
    if not is_utf8(name):
        left_out.add(NOT_UTF8, name)
        return None
    if not os.access(entry.path, os.R_OK):
        left_out.add(UNREADABLE, name)
        return None
    key = (status.st_dev, status.st_ino) if status.st_ino else None  # 0 for all files on Windows
    return File(parts, entry.path, status.st_size, status.st_mtime_ns, key)


@dataclass
class ClassFolders:
    """Images with class names by split, from `class_folders`.

    Attributes:
        splits: split -> (file, class name) of each image.
        is_split: whether folders name the splits; otherwise all images are in `train`.
        notes: lines for the log.
    """

    splits: dict[str, list[tuple[File, str]]]
    is_split: bool
    notes: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """Return the class names of all splits, sorted."""
        return sorted({label for rows in self.splits.values() for _, label in rows})

    def __len__(self) -> int:
        return sum(map(len, self.splits.values()))


def select_images(files: Iterable[File], left_out: LeftOut, ignored: Collection[str] = ()) -> list[File]:
    """Return the files with the extension of an image.

    Args:
        files: files from `find_files`, or members of an archive.
        left_out: collects the other files; documents in the top folder are listed apart.
        ignored: extensions that are neither returned nor left out.
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
    name: str, images: list[File], left_out: LeftOut, named: Collection[str], empty: Iterable[tuple] = ()
) -> ClassFolders:
    """Assign images to splits and classes by their folders.

    A top folder with the name of a split selects the split. The class is the outermost folder below it that contains
    images itself. Split names elsewhere in a path have no meaning.

    Args:
        name: name of the data set, for messages.
        images: images from `select_images`.
        left_out: collects images outside of class folders or split folders.
        named: split names in the recipe, in addition to the usual ones.
        empty: folders without files, from `find_files`.

    Raises:
        DataError: there are no class folders, or it is unclear which folders are the classes.
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
        _check_class_folders_in_splits(name, rest, depth)
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
        folders.notes.append(f"Folders without images: {shortened(unfilled)}.")
    left_out.check(name, len(folders))
    return folders


def _wrapper_depth(images: list[File], named: Collection[str]) -> int:
    """Return the number of top folders that contain only one other folder.

    Archives often have such a folder around the splits or classes.
    """
    depth = 0
    while images and all(len(file.parts) > depth + 2 for file in images):
        tops = {file.parts[depth] for file in images}
        if len(tops) > 1 or any(canonical_split(top) or top in named for top in tops):
            return depth
        depth += 1
    return depth if len({file.parts[depth] for file in images}) > 1 else 0


def _split_folders(images: list[File], depth: int, named: Collection[str]) -> dict[str, str]:
    """Return the top folders that are splits with class folders: folder -> split."""
    found: dict[str, str] = {}
    for file in images:
        if len(file.parts) > depth + 2:
            top = file.parts[depth]
            split = _split_of_folder(top, named)
            if split:
                found[top] = split
    direct = {file.parts[depth] for file in images if len(file.parts) == depth + 2}
    # A folder "train" with images of its own, next to other classes, is a class.
    is_class = len(found) == 1 and bool(direct & found.keys()) and bool(direct - found.keys())
    splits = {} if is_class else found
    for split in set(splits.values()):
        same = sorted(top for top, other in splits.items() if other == split)
        if len(same) > 1:
            raise DataError(
                f"dataset_name: the folders {' and '.join(same)} are both the {split} split. Merge or rename one."
            )
    return splits


def splits_of_paths(paths: Sequence[Sequence[str]], named: Collection[str]) -> list[str] | None:
    """Return the split of each path by its top folder, such as `test/1.jpg`.

    Top folders that contain only one other folder are skipped.

    Args:
        paths: parts of paths, relative to their table.
        named: split names in the recipe, in addition to the usual ones.

    Returns:
        The splits, None if a top folder is not a split, or all are the same split.
    """
    depth = 0
    while len({parts[depth] for parts in paths}) == 1 and all(len(parts) > depth + 2 for parts in paths):
        depth += 1
    splits = [_split_of_folder(parts[depth], named) if len(parts) > depth + 1 else None for parts in paths]
    return splits if all(splits) and len(set(splits)) > 1 else None


def _split_of_folder(name: str, named: Collection[str]) -> str | None:
    return canonical_split(name) or (name if name in named else None)


def _check_class_folders_in_splits(name: str, images: list[File], depth: int) -> None:
    """Raise `DataError` if split folders have images but no class folders."""
    tops = {file.parts[depth] for file in images}
    if tops and all(canonical_split(top) for top in tops):
        raise DataError(
            f"dataset_name: the splits {', '.join(sorted(tops))} of {name} have no class folders. Put the images of"
            " each class in a folder named after it, such as train/CLASS/image.jpg."
        )


def _classes(
    name: str, split: str, rows: list[tuple[File, tuple[str, ...]]], notes: list[str]
) -> list[tuple[File, str]]:
    """Assign class names to the images of a split.

    Args:
        name: name of the data set, for messages.
        split: name of the split.
        rows: images and the parts of their path below the split.
        notes: collects lines for the log.

    Raises:
        DataError: class folders have different depths or the same name.
    """
    with_images = {folders for _, folders in rows}
    classes: dict[tuple[str, ...], tuple[str, ...]] = {}
    for folders in with_images:
        ends = (folders[:end] for end in range(1, len(folders) + 1))
        classes[folders] = next(above for above in ends if above in with_images)
    depths: dict[int, str] = {}
    for file, folders in rows:
        depths.setdefault(len(classes[folders]), file.name)
    if len(depths) > 1:
        examples = " and ".join(depths[depth] for depth in sorted(depths)[:2])
        raise DataError(
            f"dataset_name: class folders of {name} have different depths ({examples}), so the classes are unclear."
            " Move all class folders to the same depth, and other folders elsewhere."
        )
    by_label: dict[str, tuple[str, ...]] = {}
    for found in sorted(set(classes.values())):
        label = unicodedata.normalize("NFC", found[-1])
        other = by_label.setdefault(label, found)
        if other != found:
            raise DataError(
                f"dataset_name: the class folders {'/'.join(other)} and {'/'.join(found)} of split '{split}' have the"
                " same name. Rename one, or move their images to FOLDER/CLASS/."
            )
    depth = next(iter(depths))
    if depth > 1:
        example = min(set(classes.values()))
        notes.append(
            f"Classes are the innermost folders: {'/'.join(example)} is class '{example[-1]}', not '{example[0]}'."
        )
    deeper = sorted(folders for folders, found in classes.items() if folders != found)
    if deeper:
        example = deeper[0]
        notes.append(
            f"Images in subfolders of class folders have the class of that folder: {'/'.join(example)} is class"
            f" '{classes[example][-1]}'."
        )
    return [(file, unicodedata.normalize("NFC", classes[folders][-1])) for file, folders in rows]


def check_shared_files(name: str, splits: dict[str, list[tuple[File, str]]]) -> dict[str, str]:
    """Find links to the same file, and check that they are in one split.

    Args:
        name: name of the data set, for messages.
        splits: split -> (file, class name) of each image.

    Returns:
        The path of the first link by the path of each further link.

    Raises:
        DataError: a file is in two splits through links.
    """
    links: dict[str, str] = {}
    owner: dict[tuple[int, int], tuple[str, File]] = {}
    shared: list[tuple[File, File]] = []
    for split, rows in splits.items():
        for file, _ in rows:
            if file.key is None:
                continue
            before = owner.setdefault(file.key, (split, file))
            if before[0] != split:
                shared.append((before[1], file))
            elif before[1] is not file:
                links[file.path] = before[1].path
    if shared:
        first, second = shared[0]
        raise DataError(
            f"dataset_name: {len(shared):,} files of {name} are in two splits through links, such as {first.name} and"
            f" {second.name}. Link each file in one split only."
        )
    return links


def no_split_error(option: str, name: str, split: str, available: Iterable[str]) -> DataError:
    """Create the error for a split that a data set does not have.

    Args:
        option: option with the split: `train_split`, `validation_split`, `test_split` or `split`.
        name: name of the data set.
        split: the missing split.
        available: splits of the data set.
    """
    known = list(available)
    advice = {
        "train_split": " Pass --train_split with one of them.",
        "test_split": " Pass --test_split none to train without a test set.",
    }.get(option, "")
    return DataError(
        f"{option}: no split '{split}' in {name} (found: {', '.join(known)}).{nearest(split, known)}{advice}"
    )
