"""Write the predictions of a run, and join those of cross-validation."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet
from scipy.special import softmax

from hfvit.artifacts.constants import LABEL_ERRORS_FILE, OUT_OF_FOLD_FILE, PREDICTIONS_FILE
from hfvit.data.labels import read_column
from hfvit.data.local import image_file
from hfvit.data.splits import ImageSplits
from hfvit.errors import DataError, ModelError, wrap_library_errors
from hfvit.evaluation.examples import likely_label_errors
from hfvit.metrics.multilabel import probabilities_of
from hfvit.utils.csv_files import write_csv
from hfvit.utils.files import temporary_file

BATCH = 1000  # images whose bytes are read at once
CLASSES = b"classes"  # key of the schema's metadata, with a JSON list


def write_predictions(
    output_dir: str | Path,
    splits: ImageSplits,
    results: Mapping[str, tuple[np.ndarray, np.ndarray]],
    root: str | None = None,
) -> None:
    """Write `predictions.parquet`: a row for each image of the evaluated splits.

    Columns: `split` (role), `row` (in the data set's split), `file` (if known), `label` (class, or list of classes)
    and `probabilities` of the classes, whose names are the metadata `classes` of the schema.

    Args:
        output_dir: output folder of the run.
        splits: splits of the run.
        results: logits and targets of each evaluated split.
        root: folder of a local data set.
    """
    tables = []
    for role, (logits, targets) in results.items():
        if targets.ndim == 1:
            probabilities = softmax(logits.astype(np.float64), axis=1)
            labels = pa.array(np.array(splits.labels, dtype=object)[targets], pa.string())
        else:
            probabilities = probabilities_of(logits)
            names = np.array(splits.labels, dtype=object)
            labels = pa.array([names[row.astype(bool)].tolist() for row in targets], pa.list_(pa.string()))
        flat = pa.array(probabilities.astype(np.float32).ravel())
        columns = {
            "split": pa.array([role] * len(targets), pa.string()),
            "row": read_column(splits[role], "row").combine_chunks(),
            "file": pa.array(_files(splits, role, root), pa.string()),
            "label": labels,
            "probabilities": pa.FixedSizeListArray.from_arrays(flat, len(splits.labels)),
        }
        tables.append(pa.table(columns))
    classes = json.dumps(splits.labels)
    _write(Path(output_dir) / PREDICTIONS_FILE, pa.concat_tables(tables).replace_schema_metadata({CLASSES: classes}))


def _files(splits: ImageSplits, role: str, root: str | None) -> list[str | None]:
    """Return the file of each image, without decoding the images.

    Args:
        splits: splits of the run.
        role: role of the split.
        root: folder of a local data set.

    Returns:
        Names as in `image_file`, None if unknown.
    """
    files = []
    for batch in splits[role].select_columns(["image"]).with_format("arrow").iter(BATCH):
        images = batch["image"]
        paths = pc.struct_field(images, "path").to_pylist()
        has_bytes = pc.is_valid(pc.struct_field(images, "bytes")).to_pylist()
        files += [
            image_file({"path": path, "bytes": b"" if inside else None}, root)
            for path, inside in zip(paths, has_bytes, strict=True)
        ]
    return files


def _write(path: Path, table: pa.Table) -> None:
    with temporary_file(path) as temporary:
        parquet.write_table(table, temporary)


class OutOfFold(NamedTuple):
    """Predictions of cross-validation, sorted by row.

    Attributes:
        rows: rows in the training split `(images,)`.
        files: names of the images, None if unknown.
        labels: class indices `(images,)`.
        probabilities: `(images, classes)`.
        classes: class names.
    """

    rows: np.ndarray
    files: list[str | None]
    labels: np.ndarray
    probabilities: np.ndarray
    classes: list[str]

    @classmethod
    def of(cls, table: pa.Table) -> Self:
        """Read the predictions of images with one class each."""
        classes = json.loads(table.schema.metadata[CLASSES])
        index_of = {name: index for index, name in enumerate(classes)}
        flat = table["probabilities"].combine_chunks().flatten().to_numpy()
        return cls(
            rows=table["row"].to_numpy(),
            files=table["file"].to_pylist(),
            labels=np.array([index_of[label] for label in table["label"].to_pylist()], np.int64),
            probabilities=flat.reshape(-1, len(classes)),
            classes=classes,
        )


def read_out_of_fold(folder: Path) -> OutOfFold:
    """Read `out_of_fold.parquet` of images with one class each.

    Raises:
        ModelError: the file is damaged, or images have several labels.
    """
    with wrap_library_errors(ModelError, f"{folder / OUT_OF_FOLD_FILE}: cannot be read"):
        return OutOfFold.of(parquet.read_table(folder / OUT_OF_FOLD_FILE))


def join_folds(folder: Path, names: Iterable[str]) -> str:
    """Write the predictions and likely label errors of all folds to one file each.

    Each image was predicted by the run that was not trained on it. `out_of_fold.parquet` has the columns of
    `predictions.parquet`, and `fold` instead of `split`. `label_errors.csv` is only written with one class per image.

    Args:
        folder: folder of the runs.
        names: names of their folders.

    Returns:
        A description of what was written.

    Raises:
        DataError: an image is in several folds.
    """
    tables = []
    for fold, name in enumerate(names):
        table = parquet.read_table(folder / name / PREDICTIONS_FILE)
        own = table.filter(pc.equal(table["split"], "validation")).drop_columns(["split"])
        tables.append(own.add_column(0, "fold", pa.array([fold] * len(own), pa.int32())))
    joined = pa.concat_tables(tables).sort_by("row")
    if pc.count_distinct(joined["row"]).as_py() < len(joined):
        raise DataError(
            f"folds: some images are in several folds of {folder}: the data set changed between the runs. Pass"
            " --overwrite_output_dir to start all runs again."
        )
    _write(folder / OUT_OF_FOLD_FILE, joined)
    text = f"predictions  {len(joined):,} images in {folder / OUT_OF_FOLD_FILE}"
    if not pa.types.is_string(joined.schema.field("label").type):
        return text
    rows, files, labels, probabilities, classes = OutOfFold.of(joined)
    predicted = probabilities.argmax(axis=1)
    own = probabilities[np.arange(len(labels)), labels]
    suspects = likely_label_errors(predicted, probabilities.max(axis=1), labels, own)
    write_csv(
        folder / LABEL_ERRORS_FILE,
        ("row", "file", "label", "predicted", "probability", "label_probability"),
        (
            (rows[i], files[i] or "", classes[labels[i]], classes[predicted[i]],
             f"{probabilities[i, predicted[i]]:.6f}", f"{own[i]:.6f}")
            for i in suspects
        ),
    )  # fmt: skip
    return f"{text}\nlabels       {len(suspects):,} likely errors in {folder / LABEL_ERRORS_FILE}"
