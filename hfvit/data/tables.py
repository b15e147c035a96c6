"""Read tables of images and labels (CSV, TSV, JSON, Parquet)."""

import base64
import binascii
import csv
import glob
import io
import os
import re
import stat
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value

from hfvit.data.folders import File, canonical_split, extension, splits_of_paths
from hfvit.data.references import ALLOW, leads_outside
from hfvit.errors import DataError, HFViTError, one_line, printable
from hfvit.utils.files import expand_user
from hfvit.utils.formatting import counted, shortened

IMAGE_NAMES = (
    "image", "img", "images", "file_name", "filename", "filepath", "filepaths", "file", "path", "image_path",
    "image_file", "image_name",
)  # fmt: skip
LABEL_NAMES = ("label", "labels", "fine_label", "target", "class")
SPLIT_COLUMNS = ("split", "subset", "partition", "set", "data set")
READERS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
UNDECODED = Image(decode=False)
ENCODED_START = ("/9j/", "iVBO", "R0lG", "UklG", "Qk0", "SUkq", "TU0A")  # base64 of the first bytes of image formats


def root_cause(error: BaseException) -> BaseException:
    """Return the cause of a `DatasetGenerationError`, or the error itself."""
    while isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def read_tables(files: list[File], split: str, label_columns: Collection[str] = ()) -> list[tuple[str, Dataset]]:
    """Read table files.

    Args:
        files: one or more files of the same type.
        split: name of the split, for the progress bar.
        label_columns: label columns of CSV files besides those with a usual name.

    Returns:
        (folder, rows of its files) for each folder.

    Raises:
        DataError: a file cannot be read, or has other columns than the others.
    """
    groups: dict[str, list[File]] = {}
    for file in files:
        groups.setdefault(os.path.dirname(file.path) or ".", []).append(file)
    return [(folder, _read(group, split, label_columns)) for folder, group in groups.items()]


def _read(files: list[File], split: str, label_columns: Collection[str]) -> Dataset:
    kind = READERS.get(extension(files[0].path))
    try:
        if kind is None:
            return _concatenated([_read_csv(file, label_columns) for file in files], label_columns)
        check_class_names(files, label_columns)
        return datasets.load_dataset(kind, data_files=data_files(files, split), split=split)
    except HFViTError:
        raise
    except Exception as error:
        if "corresponds to no data" in str(error):  # message of datasets for an empty table
            raise DataError(f"dataset_name: split '{split}' ({files[0].path}) is empty.") from None
        raise DataError(unreadable(files, error)) from error


def _concatenated(tables: list[Dataset], label_columns: Collection[str]) -> Dataset:
    """Concatenate CSV files; labels are strings unless all files have integers."""
    for name in _label_names({name for table in tables for name in table.features}, label_columns):
        types = {table.features[name].dtype for table in tables if name in table.features}
        if len(types) > 1:
            tables = [
                table.cast_column(name, Value("string")) if name in table.features else table for table in tables
            ]
    return datasets.concatenate_datasets(tables)


def unreadable(files: list[File], error: BaseException) -> str:
    """Return the message for table files that cannot be read."""
    different = _different_columns(files)
    if different:
        return f"dataset_name: {different}."
    names = shortened([file.path for file in files], 3)
    cause = root_cause(error)
    return f"dataset_name: cannot read {names} ({type(cause).__name__}: {one_line(cause)})."


def _different_columns(files: list[File]) -> str | None:
    """Describe a difference between the columns of Parquet files, None without one."""
    first: list[str] | None = None
    for file in files if extension(files[0].path) == ".parquet" else ():
        try:
            columns = pyarrow.parquet.read_schema(file.path).names
        except (OSError, pa.ArrowException):
            return None
        first = first or columns
        if set(columns) != set(first):
            return f"{file.path} has the columns {', '.join(columns)}, and {files[0].path} has {', '.join(first)}"
    return None


def check_class_names(files: list[File], label_columns: Collection[str]) -> None:
    """Check that Parquet files have the same class names.

    `datasets` reads the class indices of all files as those of the first one (5.2). Files without class names, as
    written by pandas, have the same indices.

    Args:
        files: files of one split.
        label_columns: columns to check, all if empty.

    Raises:
        DataError: two files have different class names.
    """
    known: dict[str, tuple[Any, File]] = {}
    for file in files if extension(files[0].path) == ".parquet" else ():
        features = Features.from_arrow_schema(pyarrow.parquet.read_schema(file.path))
        for name in label_columns or features:
            feature = features.get(name)
            if not isinstance(getattr(feature, "feature", feature), ClassLabel):
                continue
            first, first_file = known.setdefault(name, (feature, file))
            if feature != first:
                raise DataError(
                    f"dataset_name: column '{name}' of {file.path} has other class names than in {first_file.path}."
                    " Write the files of a split from one data set, or set label_column if it is no label."
                )


def data_files(files: list[File], split: str) -> dict[str, list[str]]:
    """Escape paths for `data_files` of `datasets.load_dataset`, which reads patterns."""
    return {split: [glob.escape(file.path) for file in files]}


def _read_csv(file: File, label_columns: Collection[str]) -> Dataset:
    """Read a CSV file: integers in label columns with only integers, else strings."""
    try:
        text = Path(file.path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"dataset_name: {file.path} is not UTF-8 text ({one_line(error)}). Save it as UTF-8, in Excel as 'CSV"
            " UTF-8'."
        ) from None
    try:
        text, delimiter = _delimiter(text, "\t" if extension(file.path) == ".tsv" else ",\t;")
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise DataError(f"dataset_name: cannot read {file.path} ({one_line(error)}).") from None
    rows = _without_empty_cells(rows)
    if len(rows) < 2:
        raise DataError(f"dataset_name: {file.path} must have a header and at least one row, got {len(rows)} lines.")
    header, *rows = rows
    names = [name.strip() for name in header]
    if len(set(names)) != len(names):
        raise DataError(f"dataset_name: {file.path} has two columns with the same name ({', '.join(names)}).")
    for number, row in enumerate(rows):
        if len(row) != len(names):
            raise DataError(
                f"dataset_name: {file.path}, row {number}: {len(row)} values for {len(names)} columns"
                f" ({', '.join(names)})."
            )
    columns = {name: [row[index] for row in rows] for index, name in enumerate(names)}
    with_labels = _label_names(names, label_columns)
    table = pa.table(
        {
            name: _labels(values) if name in with_labels else pa.array(values, pa.string())
            for name, values in columns.items()
        }
    )
    return Dataset(table, fingerprint=fingerprint([file]))


def _delimiter(text: str, marks: str) -> tuple[str, str]:
    """Return the text of a CSV file without Excel's line `sep=;`, and its delimiter.

    Args:
        text: content of the file.
        marks: possible delimiters. The one that divides the header into the most columns is chosen.
    """
    declared = re.match(r'sep=([^"\r\n])\r?\n', text)
    if declared:
        return text[declared.end() :], declared[1]
    return text, max(marks, key=lambda mark: len(next(csv.reader(io.StringIO(text, newline=""), delimiter=mark), ())))


def _without_empty_cells(rows: list[list[str]]) -> list[list[str]]:
    """Remove rows without any value, and the last columns if they have none.

    Spreadsheets write them for cells that were cleared.
    """
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    if rows and all(len(row) == len(rows[0]) for row in rows):
        while not any(row[-1].strip() for row in rows):
            rows = [row[:-1] for row in rows]
    return rows


def _label_names(columns: Iterable[str], label_columns: Collection[str]) -> set[str]:
    columns = set(columns)
    return {*usual_columns(columns, LABEL_NAMES), *columns.intersection(label_columns)}


def _labels(values: list[str]) -> pa.Array:
    """Convert the cells of a label column to integers or strings.

    Spaces around labels are removed. An empty cell is null among integers, and an empty string among strings.
    """
    values = [value.strip() for value in values]
    if all(not value or is_integer(value) for value in values):
        return pa.array([int(value) if value else None for value in values], pa.int64())
    return pa.array(values, pa.string())


def is_integer(text: str) -> bool:
    """Return whether a text is a 64-bit integer as Python writes it ("7", not "007")."""
    digits = text.removeprefix("-")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 19:
        return False
    return str(int(text)) == text and -(2**63) <= int(text) < 2**63


def fingerprint(files: Iterable[File], *more: Any) -> str:
    """Compute the fingerprint of a data set from paths, sizes and times of its files.

    Args:
        files: files in the order of the rows.
        *more: other values that the rows depend on.
    """
    known = [(file.path, file.size, file.changed) for file in files]
    return datasets.fingerprint.Hasher.hash(repr((known, more)))


def split_by_column(dataset: Dataset, column: str) -> dict[str, Dataset] | None:
    """Split a data set by a column with split names.

    Args:
        dataset: data set to split.
        column: column with the names.

    Returns:
        The splits by name, None if the values are not names of splits.

    Raises:
        DataError: the column is called `split`, in any case, and has other values.
    """
    values = dataset[column][:]
    names = {value: split_of_value(value) for value in set(values)}
    if not all(names.values()):
        if column.lower() == "split":
            unknown = sorted(str(value) for value, name in names.items() if not name)
            raise DataError(
                f"dataset_name: the values of column '{column}' must be train, validation or test, got"
                f" {', '.join(unknown[:5])}."
            )
        return None
    return _split_rows(dataset, [names[value] for value in values])


def split_of_value(value: Any) -> str | None:
    """Return the split that a value of a split column names, None for other values."""
    return canonical_split(value.strip()) if isinstance(value, str) else None


def split_by_folder(dataset: Dataset, column: str, root: str, named: Collection[str]) -> dict[str, Dataset] | None:
    """Split a data set by the top folders of its image files, such as `test/1.jpg`.

    Args:
        dataset: data set from `as_images`.
        column: name of the image column.
        root: folder that paths are relative to.
        named: split names in the recipe, in addition to the usual ones.

    Returns:
        The splits by name, None if the images are not in the folders of two or more splits.
    """
    if dataset.features.get(column) != UNDECODED:
        return None
    chunks = dataset.with_format("arrow")[:].column(column).chunks
    if any(chunk.field("bytes").null_count < len(chunk) for chunk in chunks):
        return None
    paths = pa.chunked_array([chunk.field("path") for chunk in chunks], pa.string())
    folders = pa.compute.replace_substring_regex(paths, r"[^/\\]*$", "").combine_chunks().dictionary_encode()
    prefix = "" if root in ("", ".") else os.path.join(os.path.normpath(root), "")
    parts = [
        os.path.normpath(f"{name}x").removeprefix(prefix).split(os.sep) for name in folders.dictionary.to_pylist()
    ]
    splits = splits_of_paths(parts, named)
    return _split_rows(dataset, np.array(splits)[folders.indices.to_numpy()]) if splits else None


def _split_rows(dataset: Dataset, splits: Sequence[str]) -> dict[str, Dataset]:
    splits = np.asarray(splits)
    names = dict.fromkeys(splits.tolist())  # in the order of the rows
    return {name: dataset.select(np.flatnonzero(splits == name)) for name in names}


def split_columns(columns: Iterable[str]) -> list[str]:
    """Return the columns with a usual name of a split column, in any case."""
    return [name for name in columns if name.lower() in SPLIT_COLUMNS]


def usual_columns(columns: Iterable[str], names: Sequence[str]) -> list[str]:
    """Return the columns with one of the names, in upper or lower case.

    Args:
        columns: names of columns.
        names: names in lower case, in the order of the result. Of columns that differ in case only, the one in lower
            case is the first.
    """
    found = [name for name in columns if name.lower() in names]
    return sorted(found, key=lambda name: (names.index(name.lower()), name != name.lower(), name))


# Image columns


def image_column_of(features: Features, named: str | None) -> str | None:
    """Find the column with images, their bytes or their paths.

    Args:
        features: columns of a table.
        named: `image_column` of the recipe, which is returned unchanged, or None.

    Returns:
        The name of the column, None if there is none or it is unclear which.
    """
    if named:
        return named
    for kind in ("image", "bytes", "string"):
        found = [name for name, feature in features.items() if image_kind(feature) == kind]
        usual = usual_columns(found, IMAGE_NAMES)
        if kind != "string" and len(found) == 1:
            return found[0]
        if usual:
            return usual[0]
        if found:
            return None
    return None


def image_kind(feature: Any) -> str | None:
    """Return the kind of an image column.

    Returns:
        `image` for `datasets.Image`, `bytes` for encoded images, `string` for paths or base64, else None.
    """
    if isinstance(feature, Image):
        return "image"
    if isinstance(feature, Value):
        kinds = {"binary": "bytes", "large_binary": "bytes", "string": "string", "large_string": "string"}
        return kinds.get(feature.dtype)
    if isinstance(feature, dict) and feature and set(feature) <= {"bytes", "path"}:
        return "bytes"
    return None


def as_images(
    dataset: Dataset, column: str, split: str, folder: str | None = None, allow_outside: bool = False
) -> Dataset:
    """Convert a column to undecoded images.

    Args:
        dataset: data set whose column has images, encoded images, `{bytes, path}`, paths or base64.
        column: name of the image column.
        split: name of the split, for messages.
        folder: folder that paths are relative to and must stay in. Default: paths are not allowed.
        allow_outside: allow paths outside the folder.

    Raises:
        DataError: a path is outside the folder, or is not a file; a row of a table in a folder has no image.
    """
    kind = image_kind(dataset.features.get(column))
    if kind is None:
        return dataset
    if folder is not None:
        _check_no_nulls(dataset, column, split)
    if kind == "string":
        values = dataset[column][:]
        if any(map(is_base64, values[:5])):
            return dataset.map(
                decode_base64, batched=True, fn_kwargs={"column": column, "split": split}, with_indices=True,
                features=Features({**dataset.features, column: UNDECODED}), desc=f"Decoding {split}",
            )  # fmt: skip
        return _with_paths(dataset, column, values, split, folder, allow_outside)
    undecoded = dataset.cast_column(column, UNDECODED)
    paths = paths_to_read(undecoded.with_format("arrow")[:].column(column))
    if not any(path is not None for path in paths):
        return undecoded
    return _with_paths(undecoded, column, paths, split, folder, allow_outside)


def paths_to_read(images: pa.ChunkedArray) -> list[str | None]:
    """Return the path of each image without bytes, None for other images.

    Args:
        images: structs of bytes and path.
    """
    paths: list[str | None] = []
    for chunk in images.chunks:
        without_bytes = np.asarray(chunk.field("bytes").is_null()) & np.asarray(chunk.field("path").is_valid())
        if without_bytes.any():
            chunk_paths = chunk.field("path").to_pylist()
            paths += [path if missing else None for path, missing in zip(chunk_paths, without_bytes, strict=True)]
        else:
            paths += [None] * len(chunk)
    return paths


def _check_no_nulls(dataset: Dataset, column: str, split: str) -> None:
    """Check that all rows have the bytes or the path of an image.

    Args:
        dataset: data set with the column.
        column: name of the image column.
        split: name of the split, for messages.

    Raises:
        DataError: a row has no image.
    """
    chunks = dataset.with_format("arrow")[:].column(column).chunks
    rows = np.flatnonzero(np.concatenate([_is_null(chunk) for chunk in chunks])) if chunks else ()
    if len(rows):
        raise DataError(
            f"Split '{split}', row {rows[0]}: {column} is missing ({counted(len(rows), 'such row')}). Remove these"
            " rows."
        )


def _is_null(images: pa.Array) -> np.ndarray:
    nulls = np.asarray(images.is_null())
    if pa.types.is_string(images.type) or pa.types.is_large_string(images.type):
        return nulls | np.asarray(pa.compute.equal(pa.compute.utf8_trim_whitespace(images.fill_null("")), ""))
    if not pa.types.is_struct(images.type):
        return nulls
    parts = [images.field(index).is_null() for index in range(images.type.num_fields)]  # `bytes`, `path` or both
    return nulls | np.logical_and.reduce(parts)


def _with_paths(
    dataset: Dataset, column: str, paths: list[str | None], split: str, folder: str | None, allow_outside: bool
) -> Dataset:
    """Resolve the paths of an image column; a row without path keeps its bytes.

    Args:
        dataset: data set with the column.
        column: name of the image column.
        paths: path of each row, or None.
        split: name of the split, for messages.
        folder: folder that paths are relative to.
        allow_outside: allow paths outside the folder.
    """
    resolver = PathResolver(folder, allow_outside)
    resolved: list[str | None] = []
    state: list[tuple[int, int]] = []
    missing: list[tuple[int, str]] = []
    for row, path in enumerate(paths):
        resolved.append(None)
        if path is None:
            continue
        try:
            resolved[-1], status = resolver.resolve(path)
            state.append((status.st_size, status.st_mtime_ns))
        except FileNotFoundError:
            missing.append((row, path))
        except ValueError as error:
            raise DataError(f"Split '{split}', row {row}: {column} {path!r} {error}") from None
    if missing:
        row, path = missing[0]
        similar = _similar_path(path, folder)
        hint = f"; use {printable(similar)}" if similar else ""
        raise DataError(
            f"Split '{split}', row {row}: no file {path!r} in {folder} ({counted(len(missing), 'such row')}). Paths in"
            f" column '{column}' must be relative to the file of the table{hint}."
        )
    table = dataset.with_format("arrow")[:]
    chunks = []
    start = 0
    for chunk in table.column(column).chunks:
        new = pa.array(resolved[start : start + len(chunk)], pa.string())
        start += len(chunk)
        content = pa.nulls(len(chunk), pa.binary())
        if pa.types.is_struct(chunk.type):
            content = chunk.field("bytes")
            new = pa.compute.coalesce(new, chunk.field("path"))
        mask = pa.compute.and_(new.is_null(), content.is_null())
        chunks.append(pa.StructArray.from_arrays([content, new], ["bytes", "path"], mask=mask))
    features = Features({**dataset.features, column: UNDECODED})
    table = table.set_column(table.schema.get_field_index(column), column, pa.chunked_array(chunks))
    known = datasets.fingerprint.Hasher.hash(repr((dataset._fingerprint, resolved, state)))
    return Dataset(table.cast(features.arrow_schema), datasets.DatasetInfo(features=features), fingerprint=known)


def _similar_path(path: str, folder: str | None) -> str | None:
    """Return the path of a file that a wrong path may mean, None without one.

    The file is in a subfolder of `folder`, or its name differs in case or in the extension only.
    """
    path = path.strip().replace("\\", "/")
    if folder is None or leads_outside(path):
        return None
    parent, name = os.path.split(path)
    name = name.lower()
    stem = os.path.splitext(name)[0]
    with suppress(OSError, ValueError):
        below = (entry.name for entry in os.scandir(folder) if entry.is_dir())
        found = next((entry for entry in sorted(below) if os.path.isfile(os.path.join(folder, entry, path))), None)
        if found:
            return f"{found}/{path}"
        there = sorted(entry.name for entry in os.scandir(os.path.join(folder, parent)) if entry.is_file())
        same = [entry for entry in there if entry.lower() == name]
        same = same or [entry for entry in there if os.path.splitext(entry.lower())[0] in (name, stem)]
        if same:
            return os.path.join(parent, same[0])
    return None


class PathResolver:
    """Resolve the paths of a table's rows to regular files.

    Args:
        folder: folder that paths are relative to, None to allow no paths.
        allow_outside: allow absolute paths, `..` and links to files outside the folder.
    """

    def __init__(self, folder: str | None, allow_outside: bool = False):
        self.folder = folder
        self.allow_outside = allow_outside
        self._inside: dict[str, bool] = {}
        self._root = os.path.realpath(folder) if folder else None

    def resolve(self, path: str) -> tuple[str, os.stat_result]:
        """Return the path and the status of a regular file.

        If there is no such file, spaces around the path are removed, `\\` is read as `/`, and letters with accents are
        compared in both Unicode forms, as archives of macOS have names in NFD.

        Raises:
            ValueError: the path is not allowed; the message is a predicate, such as "is a URL".
            FileNotFoundError: the file does not exist.
        """
        try:
            return self._resolve(path)
        except FileNotFoundError:
            posix = path.strip().replace("\\", "/")
            forms = (posix, *(unicodedata.normalize(form, posix) for form in ("NFC", "NFD")))
            for other in dict.fromkeys(forms):
                if other not in ("", path):
                    with suppress(FileNotFoundError):
                        return self._resolve(other)
            raise

    def _resolve(self, path: str) -> tuple[str, os.stat_result]:
        if "://" in path or path.startswith("data:"):
            raise ValueError(f"is a URL, but images must be files in {self.folder}.")
        if self.folder is None and not (self.allow_outside and os.path.isabs(path)):
            raise ValueError("is a path, but the data set has no local folder.")
        if leads_outside(path) and not self.allow_outside:
            raise ValueError(
                f"must be relative to the table's folder {self.folder}, without '..', '~' and ':'. {ALLOW}"
            )
        full = os.path.join(self.folder or "", expand_user(path))
        try:
            status = os.stat(full)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(path) from None
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot be read ({one_line(error)}).") from None
        if not self.allow_outside and not self._is_inside(full):
            raise ValueError(f"is a link to a file outside the table's folder {self.folder}. {ALLOW}")
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is not a regular file.")
        return full, status

    def _is_inside(self, full: str) -> bool:
        folder = os.path.dirname(full)
        if folder not in self._inside:
            real = os.path.realpath(folder)
            self._inside[folder] = os.path.commonpath([real, self._root]) == self._root
        if not os.path.islink(full):
            return self._inside[folder]
        return os.path.commonpath([os.path.realpath(full), self._root]) == self._root


def is_base64(value: Any) -> bool:
    """Return whether a value is a base64 image or a data URI, not a path."""
    if not isinstance(value, str):
        return False
    if value.startswith("data:"):
        return True
    return len(value) > 64 and value.startswith(ENCODED_START)


def decode_base64(batch: dict[str, list], rows: list[int], column: str, split: str) -> dict[str, list]:
    """Decode a column of base64 strings, for `Dataset.map`.

    Args:
        batch: batch of columns.
        rows: rows of the batch in the data set.
        column: name of the column.
        split: name of the split, for messages.
    """
    images = []
    for row, text in zip(rows, batch[column], strict=True):
        try:
            content = text.rpartition(",")[2] if text.startswith("data:") else text
            images.append({"bytes": base64.b64decode(content, validate=True), "path": None})
        except (AttributeError, binascii.Error, ValueError) as error:
            raise DataError(f"Split '{split}', row {row}: {column} is not base64 ({one_line(error)}).") from None
    return {column: images}  # map keeps the other columns


def stream_images(
    stream: IterableDataset, column: str, split: str, folder: str | None, allow_outside: bool
) -> IterableDataset:
    """Convert a column of a stream to undecoded images.

    Args:
        stream: stream whose column has images, encoded images, `{bytes, path}`, paths or base64.
        column: name of the image column.
        split: name of the split, for messages.
        folder: folder that paths are relative to and must stay in, None if paths are not allowed.
        allow_outside: allow paths outside the folder.
    """
    kind = image_kind(stream.features.get(column))
    if kind is None:
        return stream
    stream = stream.decode(False)  # otherwise, map decodes the images of other columns
    features = Features({**stream.features, column: UNDECODED})
    resolver = PathResolver(folder, allow_outside)
    return stream.map(
        stream_image, fn_kwargs={"column": column, "split": split, "resolver": resolver}, features=features
    )


def stream_image(example: dict[str, Any], column: str, split: str, resolver: PathResolver) -> dict[str, Any]:
    """Convert the image of an example to `bytes` or a resolved `path`.

    Args:
        example: example of the stream.
        column: name of the image column.
        split: name of the split, for messages.
        resolver: resolver of paths.
    """
    value = example[column]
    if isinstance(value, bytes):
        image = {"bytes": value, "path": None}
    elif is_base64(value):
        image = decode_base64({column: [value]}, [0], column, split)[column][0]
    else:
        image = value if isinstance(value, dict) else {"bytes": None, "path": value}
    path = image and image.get("path")
    if image and image.get("bytes") is not None:
        if path and os.path.isfile(path):  # `datasets` would read it in place of the bytes (5.2)
            image = {**image, "path": None}
    elif path:
        try:
            image = {"bytes": None, "path": resolver.resolve(path)[0]}
        except FileNotFoundError:
            raise DataError(f"Split '{split}': no file {path!r}.") from None
        except ValueError as error:
            raise DataError(f"Split '{split}': {column} {path!r} {error}") from None
    return {**example, column: image}
