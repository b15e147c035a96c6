"""Read images from zip and tar archives: class folders, and WebDataset shards."""

import json
import logging
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

import datasets
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value

from hfvit.data.decode import is_hidden
from hfvit.data.folders import HIDDEN, NOT_UTF8, File, LeftOut, check_utf8, extension, is_utf8
from hfvit.data.open_image import DEFAULT_LIMITS, extensions
from hfvit.data.tables import LABEL_NAMES, UNDECODED, fingerprint, is_integer, root_cause
from hfvit.errors import DataError, HFViTError, one_line

LABEL_FIELDS = ("cls", "json")
TEXT = Value("string")
ARCHIVE_ERRORS = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, tarfile.TarError, zlib.error,
                  lzma.LZMAError, NotImplementedError)  # fmt: skip

logger = logging.getLogger(__name__)

# Headers that Python reads into memory, whatever their size: long names, and further fields of the next member.
EXTENDED_HEADERS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
)  # fmt: skip
MAX_HEADER_BYTES = 2**20
PADDING = 2**16  # bytes after the end mark of a tar that are searched for other data; tools write up to 10,240 zeros
# Compression of zip members that is undone at most up to the size of the member.
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class _Header(tarfile.TarInfo):
    """Header of a tar member.

    Extended headers have at most `MAX_HEADER_BYTES`, and a damaged header is an error, while `tarfile` takes it for
    the end of the archive (Python 3.14).
    """

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_Header":
        try:
            header = super().frombuf(buf, encoding, errors)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            raise tarfile.ReadError(one_line(error)) from None
        if header.type in EXTENDED_HEADERS and header.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header has {header.size:,} bytes, more than the limit of {MAX_HEADER_BYTES:,}")
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(archive)
        except tarfile.EmptyHeaderError:  # the file ends where a header could follow
            archive.has_end = False
            raise


class Member(NamedTuple):
    """Regular file in an archive."""

    name: str
    size: int
    content: bytes | None


def read_members(archive: str, wanted: set[str] | None = None) -> Iterator[Member]:
    """Iterate over the regular files of an archive, in its order.

    Nothing is extracted to the disk, and links are not followed. A member that is read has at most the bytes of
    `open_image.DEFAULT_LIMITS`.

    Args:
        archive: path of a zip or tar file.
        wanted: names of members whose content is read. Default: all.

    Raises:
        DataError: the archive cannot be read.
    """
    try:
        yield from (_zip_members if extension(archive) == ".zip" else _tar_members)(archive, wanted)
    except ARCHIVE_ERRORS as error:
        raise DataError(
            f"dataset_name: the archive {archive} cannot be read ({type(error).__name__}: {one_line(error)})."
        ) from error


def _zip_members(archive: str, wanted: set[str] | None) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if not info.is_dir() and kind in (0, stat.S_IFREG):
                is_read = wanted is None or info.filename in wanted
                yield Member(info.filename, info.file_size, _read_zipped(file, info) if is_read else None)


def _tar_members(archive: str, wanted: set[str] | None) -> Iterator[Member]:
    with tarfile.open(archive, "r|*", tarinfo=_Header) as file:
        for info in file:
            if not info.isreg():
                continue
            content = None
            if wanted is None or info.name in wanted:
                DEFAULT_LIMITS.check_bytes(info.size)
                content = file.extractfile(info).read()
            yield Member(info.name, info.size, content)
        if not getattr(file, "has_end", True):
            _warn_once("%s has no end mark. It may be incomplete, from an interrupted copy", archive)
        elif _has_more(file):
            _warn_once("%s has data after its end mark, which is not read, as in joined archives", archive)


@cache
def _warn_once(message: str, archive: str) -> None:  # an archive is read several times, in a stream once an epoch
    logger.warning(message, archive)


def _has_more(file: tarfile.TarFile) -> bool:
    """Return whether data other than zeros follow the end mark of an archive."""
    try:
        return bool(file.fileobj.read(PADDING).strip(b"\0"))
    except (EOFError, tarfile.ReadError):  # not compressed, or compressed by itself
        return True


def _read_zipped(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Read a member of a zip file, and no more than its announced size.

    `ZipFile.read` decompresses up to 2 GiB of any member (Python 3.14).
    """
    DEFAULT_LIMITS.check_bytes(info.file_size)
    if info.compress_type not in ZIP_METHODS:
        method = zipfile.compressor_names.get(info.compress_type, info.compress_type)
        raise NotImplementedError(f"{info.filename} is compressed with {method}; pack it with deflate")
    with file.open(info) as member:
        return member.read(info.file_size)


def list_archive(archive: File, left_out: LeftOut) -> list[File]:
    """List the members of an archive as files, sorted by name.

    Args:
        archive: archive found by `folders.find_files`.
        left_out: collects hidden, empty and misplaced members, and those whose name is not UTF-8.
    """
    found = []
    for member in read_members(archive.path, set()):
        parts = tuple(part for part in member.name.replace("\\", "/").split("/") if part not in ("", "."))
        if not parts:
            continue
        if any(map(is_hidden, parts)) and ".." not in parts:
            left_out.add(HIDDEN, "/".join(parts))
        elif ".." in parts or os.path.isabs(member.name):
            left_out.add("path outside the archive", member.name)
        elif not member.size:
            left_out.add("empty file", "/".join(parts))
        elif not is_utf8(parts[-1]):
            left_out.add(NOT_UTF8, "/".join(parts))
        else:
            check_utf8(member.name, f"a folder in {archive.path}")
            found.append(File(parts, member.name, member.size, archive.changed))
    return sorted(found, key=lambda file: file.name)


def archive_dataset(archive: File, rows: Sequence[tuple[File, str]], labels: Sequence[str], split: str) -> Dataset:
    """Load one split of an archive with class folders.

    The first call copies the images to the cache of `datasets`.

    Args:
        archive: archive with the images.
        rows: members and their class names, from `folders.class_folders`.
        labels: all class names, in the order of the logits.
        split: name of the split, for the progress bar.
    """
    features = Features({"image": UNDECODED, "label": ClassLabel(names=list(labels))})
    return _generated(
        generate_members,
        [archive],
        {"archives": [archive.path], "labels": {file.path: label for file, label in rows}},
        features,
        split,
        fingerprint([archive], split, [(file.path, label) for file, label in rows], list(labels)),
    )


def archive_stream(archive: File, rows: Sequence[tuple[File, str]], labels: Sequence[str]) -> IterableDataset:
    """Stream the images of an archive with class folders, in the order of the archive.

    Args:
        archive: archive with the images.
        rows: members and their class names.
        labels: all class names, in the order of the logits.
    """
    features = Features({"image": UNDECODED, "label": ClassLabel(names=list(labels))})
    known = {"archives": [archive.path], "labels": {file.path: label for file, label in rows}}
    return IterableDataset.from_generator(generate_members, features, known)


def generate_members(archives: list[str], labels: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yield images and class names of the members of archives."""
    for archive in archives:
        for member in read_members(archive, set(labels)):
            if member.content is not None:
                yield {"image": _image(archive, member), "label": labels[member.name]}


def _image(archive: str, member: Member) -> dict[str, Any]:
    """Return an undecoded image, with a path that no file can have.

    `datasets` drops the bytes of an image whose path is that of a file, here or in the working folder, and reads the
    file instead (5.2).
    """
    return {"bytes": member.content, "path": f"{archive}/{member.name}"}


def _generated(
    generator: Callable, archives: Sequence[File], arguments: dict, features: Features, split: str, known: str
) -> Dataset:
    """Copy the images of archives to the cache of `datasets`, or open the copy.

    Args:
        generator: function that yields the rows.
        archives: files that it reads.
        arguments: arguments of `generator`.
        features: columns of the rows.
        split: name of the split.
        known: fingerprint of the rows. The cache also depends on the folder of the archives, which can be moved.
    """
    places = [os.path.abspath(archive.path) for archive in archives]
    try:
        dataset = Dataset.from_generator(
            generator,
            features=features,
            gen_kwargs=arguments,
            split=datasets.NamedSplit(split),
            fingerprint=datasets.fingerprint.Hasher.hash([known, places]),
        )
    except Exception as error:
        cause = root_cause(error)
        if isinstance(cause, HFViTError):
            raise cause from None
        raise DataError(
            f"dataset_name: split '{split}' cannot be read ({type(cause).__name__}: {one_line(cause)})."
        ) from error
    dataset._fingerprint = known
    return dataset


# WebDataset: members with the same name up to the first dot are a sample


def is_webdataset(archive: File) -> bool:
    """Return whether a tar archive has samples with `cls` or `json` labels."""
    if extension(archive.path) == ".zip":
        return False
    known = extensions()
    images: set[str] = set()
    labels: set[str] = set()
    for member in read_members(archive.path, set()):
        key, kind = _sample_key(member.name)
        if f".{kind}" in known:
            images.add(key)
        elif kind in LABEL_FIELDS:
            labels.add(key)
        if images & labels:
            return True
        if len(images) > 1000:
            return False
    return False


def _sample_key(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return f"{folder}/{stem}", kind.lower()


def webdataset(shards: Sequence[File], split: str, image_column: str | None, label_column: str | None) -> Dataset:
    """Load images, labels and texts of WebDataset shards.

    The first call copies them to the cache of `datasets`.

    Args:
        shards: tar files, in the order of the rows.
        split: name of the split, for the progress bar.
        image_column: name for the image column, None for `image`.
        label_column: name for the label column, and key of the label in `json` members. None for `label`, and any of
            `LABEL_NAMES` as the key.
    """
    features, arguments = _sample_source(shards, image_column, label_column)
    return _generated(
        generate_samples, shards, arguments, features, split, fingerprint(shards, split, image_column, label_column)
    )


def webdataset_stream(shards: Sequence[File], image_column: str | None, label_column: str | None) -> IterableDataset:
    """Stream the samples of WebDataset shards.

    Args:
        shards: tar files, each of which is a shard of the stream.
        image_column: name for the image column, see `webdataset`.
        label_column: name for the label column, see `webdataset`.
    """
    features, arguments = _sample_source(shards, image_column, label_column)
    return IterableDataset.from_generator(generate_samples, features, arguments)


def _sample_source(
    shards: Sequence[File], image_column: str | None, label_column: str | None
) -> tuple[Features, dict[str, Any]]:
    """Return the columns of the first sample and the arguments of `generate_samples`."""
    first = next(_samples(shards[0].path, label_column), None)
    if first is None:
        raise DataError(f"dataset_name: no images in the archive {shards[0].path}.")
    columns = {"image": image_column or "image", "label": label_column or "label"}
    columns |= {name: name for name in first if name not in columns}
    label: Any = _label_type(first["label"])
    if isinstance(first["label"], list):
        # The first list may be empty.
        labels = (sample["label"] for sample in _samples(shards[0].path, label_column))
        items = (item for label in labels if isinstance(label, list) for item in label)
        label = List(_label_type(next(items, "")))
    features = Features({new: {"image": UNDECODED, "label": label}.get(name, TEXT) for name, new in columns.items()})
    return features, {
        "shards": [shard.path for shard in shards],
        "label_column": label_column,
        "columns": tuple(columns.items()),
    }


def _label_type(value: Any) -> Value:
    return Value("int64" if isinstance(value, int) else "string")


def generate_samples(
    shards: list[str], label_column: str | None, columns: tuple[tuple[str, str], ...]
) -> Iterator[dict[str, Any]]:
    """Yield the samples of WebDataset shards.

    Args:
        shards: paths of tar files.
        label_column: key of the label in `json` members. Default: any of `LABEL_NAMES`.
        columns: (field of a sample, name of the column).
    """
    for shard in shards:
        for sample in _samples(shard, label_column):
            yield {new: sample.get(name) for name, new in columns}


def _samples(shard: str, label_column: str | None) -> Iterator[dict[str, Any]]:
    known = extensions()
    members = (member for member in read_members(shard) if not is_hidden(member.name.rpartition("/")[2]))
    for key, group in groupby(members, lambda member: _sample_key(member.name)[0]):
        sample: dict[str, Any] = {}
        for member in group:
            check_utf8(member.name, f"a member of {shard}")
            kind = _sample_key(member.name)[1]
            if f".{kind}" in known:
                field, value = "image", _image(shard, member)
            elif kind == "cls":
                text = _text(shard, member)
                field, value = "label", int(text) if is_integer(text) else text
            elif kind == "json":
                field, value = "json", member
            elif kind == "txt":
                field, value = "txt", _text(shard, member)
            else:
                continue
            if field in sample:
                raise DataError(f"dataset_name: {shard}: sample {key.lstrip('/')} has two members for its {field}.")
            sample[field] = value
        if "json" in sample:  # beside the label of .cls, it often has metadata only, as in the ImageNet shards of timm
            member = sample.pop("json")
            if "label" not in sample or label_column not in (None, "label", "cls"):
                sample["label"] = _json_label(shard, member, label_column)
        if sample:
            yield _checked(shard, key, sample)


def _checked(shard: str, key: str, sample: dict[str, Any]) -> dict[str, Any]:
    for field, missing in (("image", "image"), ("label", "label (.cls or .json)")):
        if field not in sample:
            raise DataError(f"dataset_name: {shard}: sample {key.lstrip('/')} has no {missing}.")
    return sample


def _text(shard: str, member: Member) -> str:
    try:
        return member.content.decode().strip()
    except UnicodeDecodeError as error:
        raise DataError(f"dataset_name: {shard}: {member.name} is not UTF-8 text ({one_line(error)}).") from None


def _json_label(shard: str, member: Member, label_column: str | None) -> Any:
    try:
        values = json.loads(member.content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"dataset_name: {shard}: {member.name} is not JSON ({one_line(error)}).") from None
    if not isinstance(values, dict):
        return values
    names = [label_column] if label_column and label_column != "label" else [*LABEL_NAMES, "cls"]
    found = [values[name] for name in names if name in values]
    if not found:
        raise DataError(
            f"label_column: none of the keys {', '.join(names)} in {member.name} of {shard} (found:"
            f" {', '.join(values)}). Set label_column to the key of the label."
        )
    return found[0]
