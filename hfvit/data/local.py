"""Find the layout of a local folder or file, and load its splits."""

import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, IterableDataset, ReadInstruction, Value

from hfvit.data.archives import (
    archive_dataset,
    archive_stream,
    is_webdataset,
    list_archive,
    webdataset,
    webdataset_stream,
)
from hfvit.data.folders import (
    ARCHIVE_EXTENSIONS,
    TABLE_EXTENSIONS,
    ClassFolders,
    File,
    LeftOut,
    canonical_split,
    check_shared_files,
    check_utf8,
    class_folders,
    extension,
    find_files,
    no_split_error,
    select_images,
)
from hfvit.data.multilabel import flag_columns
from hfvit.data.open_image import formats
from hfvit.data.references import check_cards, check_saved
from hfvit.data.tables import (
    LABEL_NAMES,
    UNDECODED,
    PathResolver,
    as_images,
    check_class_names,
    data_files,
    fingerprint,
    image_column_of,
    read_tables,
    split_by_column,
    split_by_folder,
    split_columns,
    split_of_value,
    stream_images,
    unreadable,
    usual_columns,
)
from hfvit.errors import DataError, HFViTError, nearest, one_line
from hfvit.recipe.arguments import DataArguments
from hfvit.utils.files import expand_user
from hfvit.utils.formatting import shortened

logger = logging.getLogger(__name__)

METADATA = "metadata"
STREAM_SHARDS = 64


@dataclass
class LocalSplit:
    """Split that is loaded later, as a table or a stream.

    Attributes:
        load: function that returns the table.
        stream: function that returns the stream.
        files: files of the split.
        rows: number of rows, None if unknown before loading.
    """

    load: Callable[[], Dataset]
    stream: Callable[[], IterableDataset]
    files: Sequence[File] = ()
    rows: int | None = None


@dataclass
class LocalData:
    """Local data set.

    Attributes:
        name: `dataset_name` of the recipe.
        splits: splits by name.
        is_split: whether the files have splits; otherwise all images are in `train`.
        left_out: files that are left out.
        layout: short description of the files.
        notes: remarks for the log.
        images: paths of all image files in the folder of a table.
        links: path of the first link to a file by the path of each further link.
    """

    name: str
    splits: dict[str, LocalSplit]
    is_split: bool
    left_out: LeftOut
    layout: str
    notes: list[str] = field(default_factory=list)
    images: frozenset[str] = frozenset()
    links: dict[str, str] = field(default_factory=dict)
    _loaded: dict[str, Dataset] = field(default_factory=dict)

    def resolve(self, split: str) -> str:
        """Replace other names of a split by the usual one, such as `val` by `validation`."""
        parts = []
        for part in split.split("+"):
            base, bracket, slice_ = part.partition("[")
            usual = canonical_split(base)
            is_other = base not in self.splits and usual in self.splits
            parts.append((usual if is_other else base) + bracket + slice_)
        return "+".join(parts)

    def load(self, split: str, option: str = "split") -> Dataset:
        """Load a split, a slice such as `train[:80%]`, or a sum such as `train+test`.

        Args:
            split: split as in `datasets.load_dataset`.
            option: option with the split, for messages.

        Returns:
            The rows of the split.

        Raises:
            DataError: there is no such split, it is empty, or its files cannot be used.
        """
        parts = self.resolve(split).split("+")
        lengths = {}
        for part in parts:
            base = part.split("[")[0]
            if base not in self.splits:
                raise no_split_error(option, self.name, base, self.splits)
            if base not in self._loaded:
                self._loaded[base] = self.splits[base].load()
            lengths[base] = len(self._loaded[base])
        if parts == list(lengths) and len(parts) == 1:
            dataset = self._loaded[parts[0]]
        else:
            try:
                instructions = ReadInstruction.from_spec("+".join(parts)).to_absolute(lengths)
            except ValueError as error:
                raise DataError(f"{option}: '{split}' is not a split ({one_line(error)}).") from None
            slices = [self._loaded[i.splitname].select(range(i.from_, i.to)) for i in instructions]
            try:
                dataset = datasets.concatenate_datasets(slices)
            except ValueError as error:
                raise DataError(f"{option}: the splits of '{split}' differ ({one_line(error)}).") from None
        if len(dataset) == 0:
            raise DataError(f"{option}: split '{split}' of {self.name} is empty.")
        return dataset

    def lengths(self) -> dict[str, int]:
        """Return the number of rows of the loaded splits."""
        return {name: len(dataset) for name, dataset in self._loaded.items()}

    def log(self) -> None:
        """Log the files that are left out, and remarks about the layout."""
        for line in (self.left_out.describe(), *self.notes, self._unlisted()):
            if line:
                logger.info("%s: %s", self.name, line)

    def _unlisted(self) -> str | None:
        """Describe the images that are not in the table, None if all are."""
        if not self.images or set(self._loaded) != set(self.splits):
            return None
        used = set()
        for dataset in self._loaded.values():
            for name, feature in dataset.features.items():
                if feature == UNDECODED:
                    used |= {image["path"] for image in dataset[name] if image}
        rest = sorted(self.images - {os.path.normpath(path) for path in used if path})
        return f"{len(rest):,} images are not in the table, such as {rest[0]}." if rest else None


def open_local(data: DataArguments) -> LocalData | None:
    """Open a local data set without loading its images.

    Args:
        data: data options of the recipe.

    Returns:
        The data set, None if `datasets` loads it: one on the Hub, a folder with a configuration
        (`dataset_config_name`, or a card that describes tables), or a folder of loading scripts.

    Raises:
        DataError: the layout of the files is unknown.
    """
    root = expand_user(data.dataset_name)
    if os.path.isfile(root):  # False where `Path.is_file` raises: a name too long, no permission
        return _open_file(root, data)
    if not os.path.isdir(root) or data.dataset_config_name:
        return None
    left_out = LeftOut()
    if any((root / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _open_saved(root, data, left_out)
    files, empty = find_files(root, left_out)
    by_type: defaultdict[str | None, list[File]] = defaultdict(list)
    for file in files:
        by_type[_type(file)].append(file)
    tables = [file for file in by_type["tables"] if _is_data(file)]
    metadata = [file for file in tables if Path(file.path).stem == METADATA]
    images = select_images(files, LeftOut())
    if tables and not images and check_cards(str(root), data.allow_outside_paths):
        return None
    if not images and not tables and not by_type["archives"]:
        if by_type["arrow"] or by_type["scripts"]:
            return None
        there = f"found: {shortened([file.name for file in files], 3)}" if files else "the folder is empty"
        raise DataError(
            f"dataset_name: no images, tables or archives in {data.dataset_name} ({left_out.describe() or there})."
            f" Supported images: {', '.join(formats())}."
        )
    if metadata:
        return _open_metadata(data, files, metadata, left_out, empty)
    if images:
        return _open_folders(data, files, tables, left_out, empty)
    if tables:
        return _open_tables(data, tables, left_out)
    return _open_archives(data, by_type["archives"], left_out)


def _type(file: File) -> str | None:
    kind = extension(file.parts[-1])
    if kind in TABLE_EXTENSIONS:
        return "tables"
    if kind in ARCHIVE_EXTENSIONS:
        return "archives"
    return {".arrow": "arrow", ".py": "scripts"}.get(kind)


def _is_data(file: File) -> bool:
    """Return whether a table may list images, unlike `config.json` or `run.json`."""
    return file.parts[-1] not in (
        "dataset_info.json", "dataset_infos.json", "config.json", "run.json", "trainer_state.json", "package.json",
        "preprocessor_config.json",
    )  # fmt: skip


def _open_file(file: Path, data: DataArguments) -> LocalData | None:
    check_utf8(str(file), "a file")
    status = file.stat()
    found = File((file.name,), str(file), status.st_size, status.st_mtime_ns)
    kind = _type(found)
    if kind == "tables":
        return _open_tables(data, [found], LeftOut(), by_name=False)
    if kind == "archives":
        return _open_archives(data, [found], LeftOut())
    raise DataError(
        f"dataset_name: must be a folder, table or archive, got {file}. Supported files:"
        f" {', '.join((*TABLE_EXTENSIONS, *ARCHIVE_EXTENSIONS))}."
    )


def _open_saved(root: Path, data: DataArguments, left_out: LeftOut) -> LocalData:
    """Open a folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    check_saved(root, data.allow_outside_paths)
    try:
        loaded = datasets.load_from_disk(str(root))
    except Exception as error:
        raise DataError(f"dataset_name: cannot read {root} ({type(error).__name__}: {one_line(error)}).") from error
    tables = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}

    def images(split: str) -> Dataset:
        column = image_column_of(tables[split].features, data.image_column)
        if column is None:
            return tables[split]
        return as_images(tables[split], column, split, str(root), data.allow_outside_paths)

    splits = {name: _in_memory(partial(images, name), len(tables[name])) for name in tables}
    is_split = isinstance(loaded, datasets.DatasetDict)
    if not is_split:
        _warn_unused(data, loaded.column_names, "is not used, since the data set was saved without splits")
    return LocalData(data.dataset_name, splits, is_split, left_out, "folder of Dataset.save_to_disk")


def _in_memory(load: Callable[[], Dataset], rows: int, files: Sequence[File] = ()) -> LocalSplit:
    """Create a split whose stream reads a table in memory.

    Args:
        load: function that returns the table.
        rows: number of rows.
        files: files of the split.
    """

    def stream() -> IterableDataset:
        dataset = load()
        return dataset.to_iterable_dataset(min(STREAM_SHARDS, len(dataset)))

    return LocalSplit(load, stream, files, rows)


# Class folders


def _named_splits(data: DataArguments) -> set[str]:
    names = (data.train_split, data.validation_split, data.test_split)
    return {part.split("[")[0] for name in names if name for part in name.split("+")}


def _open_folders(
    data: DataArguments, files: list[File], tables: list[File], left_out: LeftOut, empty: Iterable[tuple]
) -> LocalData:
    """Open class folders, or without these a table with paths of images."""
    try:
        images = select_images(files, left_out)
        folders = class_folders(data.dataset_name, images, left_out, _named_splits(data), empty)
    except DataError as error:
        if not tables:
            raise
        return _open_listed(data, files, tables, error)
    if len(folders.labels) < 2 and tables:
        one_class = DataError(f"dataset_name: only one class folder in {data.dataset_name} ({folders.labels[0]}).")
        return _open_listed(data, files, tables, one_class)
    if tables:
        folders.notes.append(
            f"{tables[0].name} is not used, since the classes are the folders. Pass the file to use it."
        )
    return _folder_data(data, folders, left_out, {})


def _open_listed(data: DataArguments, files: list[File], tables: list[File], error: DataError) -> LocalData:
    """Open images that are listed in tables.

    Args:
        data: data options of the recipe.
        files: all files of the folder.
        tables: tables among `files`.
        error: error to raise if the tables have no image column.
    """
    try:
        local = _open_tables(data, tables, LeftOut())
    except DataError as other:
        if str(other).startswith("image_column"):
            raise error from None
        raise
    return _with_images(local, files)


def _with_images(local: LocalData, files: list[File]) -> LocalData:
    local.images = frozenset(os.path.normpath(file.path) for file in select_images(files, LeftOut()))
    return local


def _folder_data(
    data: DataArguments, folders: ClassFolders, left_out: LeftOut, columns: dict[str, dict[str, str | None]]
) -> LocalData:
    links = check_shared_files(data.dataset_name, folders.splits)
    labels = folders.labels
    splits = {}
    for split, rows in folders.splits.items():
        load = partial(_folder_dataset, rows, labels, columns)
        splits[split] = _in_memory(load, len(rows), [file for file, _ in rows])
    layout = "class folders in split folders" if folders.is_split else "class folders"
    found = _in_order(splits)
    return LocalData(data.dataset_name, found, folders.is_split, left_out, layout, folders.notes, links=links)


def _in_order(splits: dict[str, LocalSplit]) -> dict[str, LocalSplit]:
    usual = [name for name in ("train", "validation", "test") if name in splits]
    return {name: splits[name] for name in (*usual, *sorted(set(splits) - set(usual)))}


def _folder_dataset(
    rows: Sequence[tuple[File, str]], labels: list[str], columns: dict[str, dict[str, str | None]]
) -> Dataset:
    """Create a table with the columns `image` (undecoded), `label` and `columns`.

    Args:
        rows: (file, class name).
        labels: all class names, in the order of the logits.
        columns: additional texts: column -> normalized path -> text.
    """
    index_of = {label: index for index, label in enumerate(labels)}
    features = Features({"image": UNDECODED, "label": ClassLabel(names=labels)})
    paths = pa.array([file.path for file, _ in rows], pa.string())
    images = pa.StructArray.from_arrays([pa.nulls(len(rows), pa.binary()), paths], ["bytes", "path"])
    arrays = {"image": images, "label": pa.array([index_of[label] for _, label in rows], pa.int64())}
    texts = {name: [column.get(os.path.normpath(file.path)) for file, _ in rows] for name, column in columns.items()}
    for name, values in texts.items():
        features[name] = Value("string")
        arrays[name] = pa.array(values, pa.string())
    table = pa.table(arrays).cast(features.arrow_schema)
    known = fingerprint([file for file, _ in rows], [label for _, label in rows], labels, sorted(texts.items()))
    return Dataset(table, datasets.DatasetInfo(features=features), fingerprint=known)


def _open_metadata(
    data: DataArguments, files: list[File], metadata: list[File], left_out: LeftOut, empty: Iterable[tuple]
) -> LocalData:
    """Open `metadata.csv`, `.jsonl` or `.parquet` beside the images.

    Without a label column in it, the classes are the folders, and its other columns are added to the images.
    """
    table = read_tables(metadata[:1], "metadata")[0][1]
    columns = data.label_columns or usual_columns(table.features, LABEL_NAMES)[:1]
    if not columns:
        flags, are_labels = flag_columns(table, data, image_column_of(table.features, data.image_column))
        columns = flags if are_labels else []
    if columns and set(columns) <= set(table.features):
        return _with_images(_open_tables(data, metadata, left_out), files)
    images = select_images(files, left_out, ignored=TABLE_EXTENSIONS)
    folders = class_folders(data.dataset_name, images, left_out, _named_splits(data), empty)
    folders.notes.append(f"{metadata[0].name} has no label column; the classes are the folders.")
    _warn_unused(data, table.column_names, "is not used, since the folders are the classes")
    known = {os.path.normpath(file.path) for rows in folders.splits.values() for file, _ in rows}
    texts = _metadata_texts(data, metadata, known)
    unknown = sorted({path for column in texts.values() for path in column} - known)
    if unknown:
        folders.notes.append(f"{len(unknown):,} rows of {METADATA} match no image, such as {unknown[0]}.")
    return _folder_data(data, folders, left_out, texts)


def _metadata_texts(
    data: DataArguments, metadata: list[File], known: Collection[str]
) -> dict[str, dict[str, str | None]]:
    """Read the columns besides the paths of `metadata` files.

    Args:
        data: data options of the recipe.
        metadata: files of the same type.
        known: normalized paths of the images.

    Returns:
        The texts by column and normalized path.

    Raises:
        DataError: there is no column of paths, or a path is missing.
    """
    texts: dict[str, dict[str, str | None]] = {}
    for folder, table in read_tables(metadata, METADATA):
        resolver = PathResolver(folder)
        column = image_column_of(table.features, data.image_column)
        if column is None:
            raise DataError(
                f"image_column: {metadata[0].name} has no column file_name (found: {shortened([*table.features])})."
            )
        if column not in table.features:
            raise DataError(
                f"image_column: must be a column of {metadata[0].name} (found: {shortened([*table.features])}), got"
                f" '{column}'.{nearest(column, table.features)}"
            )
        paths = []
        for row, path in enumerate(table[column][:]):
            if not isinstance(path, str) or not path:
                raise DataError(
                    f"image_column: row {row} of {METADATA} in {folder}: '{column}' must be a path, got {path!r}."
                    " Correct or remove the row."
                )
            paths.append(_metadata_path(path, resolver, known))
        for name in table.column_names:
            if name != column:
                values = [None if value is None else str(value) for value in table[name][:]]
                texts.setdefault(name, {}).update(zip(paths, values, strict=True))
    return texts


def _metadata_path(path: str, resolver: PathResolver, known: Collection[str]) -> str:
    """Return the normalized path of a row, if it can, of one of the images `known`."""
    plain = os.path.normpath(os.path.join(resolver.folder, path))
    if plain in known:
        return plain
    try:
        return os.path.normpath(resolver.resolve(path)[0])
    except (FileNotFoundError, ValueError):
        return plain


# Tables


def split_of_file(parts: Sequence[str]) -> str | None:
    """Return the split in the path of a table or archive, None without one.

    `train.csv`, `test-00000-of-00001.parquet` and `val/0001.tar` mean a split, `train_labels.csv` does not.

    Args:
        parts: path of the file, relative to the data set.
    """
    for folder in parts[:-1]:
        if canonical_split(folder):
            return canonical_split(folder)
    return canonical_split(_without_number(parts[-1]))


def _without_number(name: str) -> str:
    """Return a file name without extension and shard number, such as `train`."""
    return re.sub(r"([-_]?\d+(-of-\d+)?)$", "", name.split(".")[0])


def _by_split(data: DataArguments, files: list[File], left_out: LeftOut) -> tuple[dict[str, list[File]], bool]:
    """Group files by the split in their names.

    Returns:
        (files by split, whether the names have splits; otherwise all files are in `train`).
    """
    named = _named_splits(data)
    groups: dict[str | None, list[File]] = {}
    for file in files:
        names = (_without_number(file.parts[-1]), *file.parts[:-1])
        split = split_of_file(file.parts) or next((name for name in names if name in named), None)
        groups.setdefault(split, []).append(file)
    rest = groups.pop(None, [])
    if groups:
        left_out.documents += [file.name for file in rest]
        return dict(groups), True
    stems = {re.sub(r"\d+", "", file.parts[-1]) for file in rest}
    if len(stems) > 1:
        raise DataError(
            f"dataset_name: unknown splits of the files {', '.join(file.name for file in rest[:5])} in"
            f" {data.dataset_name}. Rename them to train, validation and test, or pass one of them."
        )
    return {"train": rest}, False


def _open_tables(data: DataArguments, tables: list[File], left_out: LeftOut, by_name: bool = True) -> LocalData:
    is_metadata = all(Path(file.path).stem == METADATA for file in tables)
    if not by_name:
        groups, is_split = {"train": tables}, False
    elif is_metadata:
        groups: dict[str, list[File]] = {}
        for file in tables:
            groups.setdefault(split_of_file(file.parts) or "train", []).append(file)
        is_split = any(split_of_file(file.parts) for file in tables)
    else:
        groups, is_split = _by_split(data, tables, left_out)
    for split, files in groups.items():
        kinds = {extension(file.path) for file in files}
        if len(kinds) > 1:
            raise DataError(
                f"dataset_name: split '{split}' of {data.dataset_name} has tables of several types"
                f" ({', '.join(file.name for file in files[:5])}). Pass one of them."
            )
    if is_split:
        splits = {
            split: LocalSplit(
                partial(_split_table, data, files, split), partial(_table_stream, data, files, split), files
            )
            for split, files in groups.items()
        }
        return LocalData(data.dataset_name, _in_order(splits), True, left_out, _table_layout(tables, "by file"))
    return _unsplit_table(data, groups["train"], left_out)


def _unsplit_table(data: DataArguments, files: list[File], left_out: LeftOut) -> LocalData:
    """Open a table without splits in its name; a column may have them."""
    table = _table(data, files, "train")
    by_rows = _split_by_rows(data, table, files)
    if by_rows is None:
        split = LocalSplit(partial(_same, table), partial(_table_stream, data, files, "train"), files, len(table))
        return LocalData(data.dataset_name, {"train": split}, False, left_out, _table_layout(files))
    found, by = by_rows
    splits = {name: _in_memory(partial(_same, some), len(some), files) for name, some in found.items()}
    return LocalData(data.dataset_name, _in_order(splits), True, left_out, _table_layout(files, by))


def _split_by_rows(data: DataArguments, table: Dataset, files: list[File]) -> tuple[dict[str, Dataset], str] | None:
    """Split a table by a column, or else by the top folders of its paths.

    Args:
        data: data options of the recipe.
        table: rows of the files.
        files: files of the table.

    Returns:
        (splits by name, what they are split by), None if the rows have no splits.
    """
    for column in _split_columns(data, table.column_names):
        found = split_by_column(table, column)
        if found:
            others = [name for name in table.column_names if name != column]
            _warn_unused(data, others, f"is not used, since column '{column}' has the splits")
            return found, f"by column {column}"
    _warn_unused(data, table.column_names, "is not used, since its values are not train, validation or test")
    image_column = image_column_of(table.features, data.image_column)
    root = os.path.commonpath([os.path.dirname(file.path) for file in files])
    found = split_by_folder(table, image_column, root, _named_splits(data)) if image_column else None
    return (found, "by the folders of its images") if found else None


def _split_columns(data: DataArguments, columns: Iterable[str]) -> list[str]:
    """Return the columns that may have the split of each row."""
    others = {*data.label_columns, data.image_column, data.text_column}
    return [column for column in split_columns(columns) if column not in others]


def _warn_unused(data: DataArguments, columns: Iterable[str], reason: str) -> None:
    """Warn about columns with the usual name of a split column.

    Args:
        data: data options of the recipe.
        columns: columns of a table.
        reason: why they are not used.
    """
    for column in _split_columns(data, columns):
        logger.warning("dataset_name: column '%s' of %s %s", column, data.dataset_name, reason)


def _table_layout(files: Sequence[File], split: str | None = None) -> str:
    kind = extension(files[0].path).removeprefix(".")
    what = f"{kind} table" if len(files) == 1 else f"{len(files)} {kind} tables"
    return f"{what}, split {split}" if split else what


def _same(dataset: Dataset) -> Dataset:
    return dataset


def _table(data: DataArguments, files: list[File], split: str) -> Dataset:
    """Load the rows of table files, with undecoded images."""
    parts = []
    for folder, table in read_tables(files, split, data.label_columns):
        column = image_column_of(table.features, data.image_column)
        if column is None:
            raise DataError(
                f"image_column: cannot find the column of images or paths in {files[0].path}, which has"
                f" {shortened([*table.features])}. Pass --image_column."
            )
        parts.append(as_images(table, column, split, folder, data.allow_outside_paths))
    try:
        return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    except ValueError as error:
        raise DataError(unreadable(files, error)) from error


def _split_table(data: DataArguments, files: list[File], split: str) -> Dataset:
    """Load the table files of a split, and warn about a column with other splits.

    Args:
        data: data options of the recipe.
        files: files of the split.
        split: name of the split.
    """
    table = _table(data, files, split)
    for column in _split_columns(data, table.column_names):
        names = {split_of_value(value) for value in set(table[column][:])}
        if names != {split}:
            _warn_unused(data, [column], "is not used, since the files have the splits")
    return table


def _table_stream(data: DataArguments, files: list[File], split: str) -> IterableDataset:
    """Stream the rows of Parquet or JSON files; CSV files are read completely."""
    kind = {".parquet": "parquet"}.get(extension(files[0].path), "json")
    if extension(files[0].path) in (".csv", ".tsv"):
        table = _table(data, files, split)
        return table.to_iterable_dataset(min(STREAM_SHARDS, len(table)))
    try:
        check_class_names(files, data.label_columns)
        builder = datasets.load_dataset_builder(kind, data_files=data_files(files, split))
        stream = builder.as_streaming_dataset(split=split)
    except HFViTError:
        raise
    except Exception as error:
        raise DataError(unreadable(files, error)) from error
    if stream.features is None:
        return stream
    column = image_column_of(stream.features, data.image_column)
    if column is None:
        return stream
    folders = {os.path.dirname(file.path) or "." for file in files}
    folder = folders.pop() if len(folders) == 1 else None
    return stream_images(stream, column, split, folder, data.allow_outside_paths)


# Archives


def _open_archives(data: DataArguments, archives: list[File], left_out: LeftOut) -> LocalData:
    if (len(archives) == 1 and split_of_file(archives[0].parts) is None) or _is_one_archive(archives):
        groups, is_split = {"train": archives}, False
    else:
        groups, is_split = _by_split(data, archives, left_out)
    if is_webdataset(archives[0]):
        return _open_webdataset(data, archives, groups, is_split, left_out)
    found: dict[str, list[tuple[File, list[tuple[File, str]]]]] = {}
    notes: list[str] = []
    for split, files in groups.items():
        for archive in files:
            images = select_images(list_archive(archive, left_out), left_out)
            folders = class_folders(archive.path, images, left_out, _named_splits(data))
            notes += folders.notes
            if folders.is_split and not (is_split and set(folders.splits) != {split}):
                is_split = True
                for inner, rows in folders.splits.items():
                    found.setdefault(inner, []).append((archive, rows))
            elif folders.is_split:
                raise DataError(
                    f"dataset_name: the name of {archive.path} means split '{split}', but it contains the splits"
                    f" {', '.join(folders.splits)}. Rename it."
                )
            else:
                rows = [row for split_rows in folders.splits.values() for row in split_rows]
                found.setdefault(split, []).append((archive, rows))
    labels = sorted({label for parts in found.values() for _, rows in parts for _, label in rows})
    splits = {
        split: LocalSplit(
            partial(_archive_split, parts, labels, split),
            partial(_archive_stream, parts, labels),
            [archive for archive, _ in parts],
            sum(len(rows) for _, rows in parts),
        )
        for split, parts in found.items()
    }
    kind = extension(archives[0].path).removeprefix(".")
    layout = f"{kind} of class folders" if len(archives) == 1 else f"{len(archives)} {kind} files of class folders"
    return LocalData(data.dataset_name, _in_order(splits), is_split, left_out, layout, list(dict.fromkeys(notes)))


def _open_webdataset(
    data: DataArguments, archives: list[File], groups: dict[str, list[File]], is_split: bool, left_out: LeftOut
) -> LocalData:
    """Open WebDataset shards.

    Args:
        data: data options of the recipe.
        archives: all shards.
        groups: shards by split.
        is_split: whether the names of the shards have splits.
        left_out: files that are left out.
    """
    if len(data.label_columns) > 1:
        raise DataError("label_column: must be one key of the .json members of WebDataset shards. Name a list.")
    label_column = next(iter(data.label_columns), None)
    splits = {
        split: LocalSplit(
            partial(webdataset, shards, split, data.image_column, label_column),
            partial(webdataset_stream, shards, data.image_column, label_column),
            shards,
        )
        for split, shards in groups.items()
    }
    layout = f"WebDataset, {len(archives)} shard{'s' if len(archives) > 1 else ''}"
    return LocalData(data.dataset_name, _in_order(splits), is_split, left_out, layout)


def _is_one_archive(archives: Collection[File]) -> bool:
    return (
        len(archives) > 1
        and len({re.sub(r"\d+", "", file.parts[-1]) for file in archives}) == 1
        and not any(split_of_file(file.parts) for file in archives)
    )


def _archive_split(parts: Sequence[tuple[File, list[tuple[File, str]]]], labels: list[str], split: str) -> Dataset:
    return datasets.concatenate_datasets([archive_dataset(archive, rows, labels, split) for archive, rows in parts])


def _archive_stream(parts: Sequence[tuple[File, list[tuple[File, str]]]], labels: list[str]) -> IterableDataset:
    return datasets.concatenate_datasets([archive_stream(archive, rows, labels) for archive, rows in parts])


def data_root(dataset_name: str) -> str:
    """Return the absolute path of a local data set's folder or of its file's folder."""
    name = expand_user(dataset_name)
    return os.path.abspath(name if os.path.isdir(name) else name.parent)


def image_file(encoded: dict[str, Any] | None, root: str | None) -> str | None:
    """Return the file of an image relative to the data set, or its name in an archive.

    Args:
        encoded: `bytes` or `path` of the image, as in an undecoded column.
        root: folder of a local data set.
    """
    path = (encoded or {}).get("path")
    if not path:
        return None
    if root and (encoded.get("bytes") is None or os.path.isabs(path)):
        return os.path.relpath(os.path.abspath(path), root)
    return os.path.basename(path) if os.path.isabs(path) else path
