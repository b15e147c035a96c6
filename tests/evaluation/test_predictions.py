"""Files of predictions: probabilities, names and files of one or several labels, joined folds."""

import json

import numpy as np
import pytest
from helpers.images import LABELS, colored_image
from helpers.layouts import write_images
from helpers.splits import load_splits
from pyarrow import parquet
from scipy.special import expit, softmax

from hfvit.errors import DataError, ModelError
from hfvit.evaluation.predictions import join_folds, read_out_of_fold, write_predictions


def test_predictions_of_a_folder_have_file_label_and_probabilities(tmp_path):
    folder = write_images(tmp_path / "photos", dict.fromkeys(LABELS, 10))
    splits = load_splits(str(folder))
    rng = np.random.default_rng(0)
    results = {
        role: (rng.normal(size=(len(splits[role]), 3)).astype(np.float32), np.array(splits[role]["label"]))
        for role in ("validation", "test")
    }
    write_predictions(tmp_path, splits, results, str(folder))
    frame = parquet.read_table(tmp_path / "predictions.parquet").to_pandas()
    assert frame["split"].tolist() == ["validation"] * len(splits.validation) + ["test"] * len(splits.test)
    logits = np.concatenate([results[role][0] for role in ("validation", "test")])
    assert np.stack(frame["probabilities"]) == pytest.approx(softmax(logits, axis=1), abs=1e-6)
    for file, label in zip(frame["file"], frame["label"], strict=True):
        assert (folder / file).is_file()
        assert file.startswith(f"{label}/")


def test_out_of_fold_predictions_of_several_labels(tmp_path):
    table = tmp_path / "set"
    table.mkdir()
    rng = np.random.default_rng(0)
    rows = ["file_name,labels"]
    for number in range(24):
        colored_image(number % 3, rng).save(table / f"{number}.png")
        rows.append(f"{number}.png,{'|'.join(LABELS[: 1 + number % 3])}")
    (table / "labels.csv").write_text("\n".join(rows))
    name = str(table / "labels.csv")
    options = {"label_column": "labels", "label_separator": "|", "test_split": None}
    for fold in range(2):
        splits = load_splits(name, folds=2, fold=fold, **options)
        targets = np.array(splits.validation["label"])
        logits = rng.normal(size=targets.shape).astype(np.float32)
        write_predictions(tmp_path / f"fold_{fold}", splits, {"validation": (logits, targets)})
        frame = parquet.read_table(tmp_path / f"fold_{fold}" / "predictions.parquet").to_pandas()
        assert np.stack(frame["probabilities"]) == pytest.approx(expit(logits), abs=1e-6)
    join_folds(tmp_path, ["fold_0", "fold_1"])
    with pytest.raises(DataError, match=r"^folds: "):
        join_folds(tmp_path, ["fold_0", "fold_0"])
    joined = parquet.read_table(tmp_path / "out_of_fold.parquet")
    assert joined["row"].to_pylist() == list(range(24))
    classes = json.loads(joined.schema.metadata[b"classes"])
    expected = [[label for label in classes if label in LABELS[: 1 + row % 3]] for row in range(24)]
    assert joined["label"].to_pylist() == expected
    assert not (tmp_path / "label_errors.csv").exists()


def test_damaged_out_of_fold_predictions_are_one_error(tmp_path):
    (tmp_path / "out_of_fold.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(ModelError, match=r"out_of_fold\.parquet: "):
        read_out_of_fold(tmp_path)
