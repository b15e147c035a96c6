"""Streamed evaluation splits: division, order, metrics, limits and errors."""

import itertools
import os
import shutil

import datasets
import numpy as np
import pytest
import torch
from helpers.images import LABELS, colored_split
from helpers.layouts import image_bytes, write_shard
from helpers.messages import assert_logged, assert_names
from helpers.micro_trainer import make_trainer, weights
from helpers.shards import ROWS, with_card, write_shards
from helpers.splits import stream_splits
from timm.data import resolve_data_config
from torch.utils.data import DataLoader

from hfvit.data.dataset import collate
from hfvit.data.evaluation_stream import EvaluationStream, store_stream
from hfvit.errors import DataError

NORM = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
CONFIG = {"input_size": (3, 16, 16), "interpolation": "bicubic", "crop_pct": 1.0, **NORM}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Write a data set whose validation split has 4 shards of 72 images."""
    folder = tmp_path_factory.mktemp("shards")
    split = colored_split(sum(ROWS), 1)
    write_shards(folder, split)
    (folder / "data" / "validation-00000-of-00001.parquet").unlink()
    for file in (folder / "data").glob("train-*"):
        file.with_name(file.name.replace("train", "validation")).write_bytes(file.read_bytes())
    return folder, split


def stream_of(splits, role="validation", **options):
    options = {"images": None, "data_config": CONFIG, "batch_size": 4, **options}
    return EvaluationStream(splits[role], role, labels=splits.labels, **options)


def batches_of(stream, workers=0):
    return list(DataLoader(stream, batch_size=None, collate_fn=collate, num_workers=workers))


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 0), (3, 0), (7, 0), (2, 2)])
def test_processes_and_workers_share_the_images_without_repeating_one(shards, processes, workers):
    folder, split = shards
    splits = stream_splits(str(folder))
    batches = []
    for process in range(processes):
        own = batches_of(stream_of(splits, process=process, processes=processes), workers)
        assert own
        batches += own
    places = np.concatenate([batch["places"] for batch in batches])
    assert len(np.unique(places)) == len(places) == len(split)
    labels = torch.cat([batch["labels"] for batch in batches])[np.argsort(places).tolist()]
    assert labels.tolist() == split["label"]


def test_predictions_and_metrics_equal_those_of_the_loaded_split(shards, tmp_path, monkeypatch):
    folder, split = shards
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    trainer = make_trainer(tmp_path / "out", per_device_eval_batch_size=5, eval_accumulation_steps=3)
    config = resolve_data_config(trainer.model.config.pretrained_cfg)
    stream = stream_of(stream_splits(str(folder)), data_config=config, batch_size=5)
    streamed, loaded = trainer.predict(stream), trainer.predict(split.rename_column("img", "image"))
    assert np.array_equal(streamed.label_ids, loaded.label_ids)
    np.testing.assert_allclose(streamed.predictions, loaded.predictions, atol=1e-5)
    for key in ("test_accuracy", "test_macro_f1", "test_loss"):
        assert streamed.metrics[key] == pytest.approx(loaded.metrics[key], rel=1e-5)
    trainer.eval_dataset = stream
    assert trainer.evaluate()["eval_accuracy"] == streamed.metrics["test_accuracy"]
    assert stream.images == len(split)
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_max_eval_samples_uses_the_first_images_of_each_shard(shards):
    folder, _ = shards
    splits = stream_splits(str(folder), max_eval_samples=10)
    places = np.concatenate([batch["places"] for batch in batches_of(stream_of(splits, limit=10))])
    assert [(place >> 40, place % 2**40) for place in places.tolist()] == [
        (shard, row) for shard, rows in enumerate((2, 3, 2, 3)) for row in range(rows)
    ]
    shares = [batches_of(stream_of(splits, limit=10, process=rank, processes=3)) for rank in range(3)]
    shared = np.concatenate([batch["places"] for batch in itertools.chain(*shares)])
    assert np.array_equal(np.sort(shared), places)
    stored = store_stream(splits["validation"], "validation", splits.metadata, 10)
    assert stored["row"][:] == list(range(10))
    assert len(store_stream(splits["validation"], "validation", splits.metadata, None)) == sum(ROWS)


def test_first_images_equal_those_of_the_batches(shards):
    stream = stream_of(stream_splits(str(shards[0])))
    first = stream.first(6)
    assert len(first) == 6
    crops = torch.cat([batch["crops"] for batch in batches_of(stream)])
    assert torch.equal(first.__getitems__([5, 0])["crops"], crops[[5, 0]])


@pytest.mark.parametrize("class_names", [["3"], ["red", "green", "blue"]])
def test_integer_labels_are_evaluated_with_class_names(tmp_path, class_names):
    write_shards(tmp_path, colored_split(sum(ROWS), 1))
    for file in (tmp_path / "data").iterdir():
        datasets.Dataset.from_parquet(str(file)).cast_column("label", datasets.Value("int64")).to_parquet(file)
    splits = stream_splits(str(tmp_path), class_names=class_names)
    labels = torch.cat([batch["labels"] for batch in batches_of(stream_of(splits, "test"))])
    assert labels.tolist() == colored_split(31, 2)["label"]


def test_stored_labels_are_those_of_the_label_column_and_the_class_order(tmp_path):
    write_shards(tmp_path, colored_split(sum(ROWS), 1))
    for file in (tmp_path / "data").iterdir():
        split = datasets.Dataset.from_parquet(str(file))
        split.add_column("coarse", [label // 2 for label in split["label"]]).to_parquet(file)
    own = np.array(colored_split(31, 2)["label"])
    expected = [
        ({"label_column": "label"}, own),
        ({"label_column": "coarse", "class_names": ["2"]}, own // 2),
        ({"label_column": "label", "class_names": LABELS[::-1]}, 2 - own),
    ]
    for options, labels in expected:
        splits = stream_splits(str(tmp_path), **options)
        assert store_stream(splits.test, "test", splits.metadata, None)["label"][:] == labels.tolist()


def test_stored_rows_of_a_saved_data_set_are_those_of_its_last_version(tmp_path):
    split = colored_split(20, 1)
    fingerprints = set()
    for labels in (split["label"][:], [2 - label for label in split["label"]]):
        changed = split.remove_columns("label").add_column("label", labels, feature=split.features["label"])
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        datasets.DatasetDict({"train": changed, "validation": changed}).save_to_disk(tmp_path / "saved")
        splits = stream_splits(str(tmp_path / "saved"), test_split=None)
        stored = store_stream(splits.validation, "validation", splits.metadata, None)
        assert stored["label"][:] == labels
        fingerprints.add(splits.metadata["splits"]["train"]["fingerprint"])
    assert len(fingerprints) == 2


def test_stored_rows_of_two_folders_with_the_same_relative_name_are_their_own(tmp_path, monkeypatch):
    for project in (1, 2):
        folder = tmp_path / str(project)
        images = [image_bytes(number * project, "BMP") for number in range(6)]
        samples = [{"bmp": content, "cls": b"%d" % (number % 2)} for number, content in enumerate(images)]
        for name in ("train", "val"):
            os.utime(write_shard(folder / f"data/{name}-0.tar", samples), (10**9, 10**9))
        monkeypatch.chdir(folder)
        splits = stream_splits("data", "val", class_names=["a", "b"], test_split=None)
        stored = store_stream(splits.validation, "validation", splits.metadata, None)
        assert [image["bytes"] for image in stored["image"]] == images


def test_full_evaluation_in_bfloat16_equals_that_of_the_loaded_split(shards, tmp_path):
    folder, split = shards
    trainer = make_trainer(tmp_path / "out", bf16_full_eval=True)
    before = weights(trainer)
    used = set()
    trainer.model.register_forward_pre_hook(lambda model, inputs: used.update(p.dtype for p in model.parameters()))
    config = resolve_data_config(trainer.model.config.pretrained_cfg)
    streamed = trainer.predict(stream_of(stream_splits(str(folder)), data_config=config, batch_size=8))
    assert used == {torch.bfloat16}
    loaded = trainer.predict(split.rename_column("img", "image"))
    np.testing.assert_allclose(streamed.predictions, loaded.predictions, atol=1e-2)
    torch.testing.assert_close(weights(trainer), before, rtol=0, atol=0)


def test_number_of_images_is_that_of_the_card_or_counted(tmp_path, sharded, caplog):
    assert stream_splits(str(sharded)).metadata["splits"]["test"]["rows"] is None
    write_shards(tmp_path, colored_split(sum(ROWS), 1))
    with_card(tmp_path, sum(ROWS))
    splits = stream_splits(str(tmp_path))
    assert splits.metadata["splits"]["test"]["rows"] == 31
    stream = stream_of(splits, "test", images=32)
    stream.count(np.zeros(31, np.int64))
    assert stream.images == 31
    assert_logged(caplog, "WARNING", "test", 31, 32)
    assert_logged(caplog, "WARNING", "test", 2, 3, LABELS[1], LABELS[2])
    caplog.clear()
    stream_of(splits, "test", images=30, limit=30).count(np.arange(20) % 3)  # a shard has less than its share
    assert not caplog.records


# Mistakes


def test_default_test_split_without_labels_is_not_used(tmp_path, caplog):
    write_shards(tmp_path, colored_split(sum(ROWS), 1))
    file = str(tmp_path / "data" / "test-00000-of-00001.parquet")
    datasets.Dataset.from_parquet(file).map(lambda row: {"label": -1}).to_parquet(file)
    assert stream_splits(str(tmp_path)).test is None
    assert_logged(caplog, "WARNING", "test")


@pytest.mark.parametrize("label", [-1, 7])
def test_wrong_label_in_an_evaluation_split_names_the_row(tmp_path, label):
    write_shards(tmp_path, colored_split(sum(ROWS), 1))
    for file in (tmp_path / "data").iterdir():
        split = datasets.Dataset.from_parquet(str(file)).cast_column("label", datasets.Value("int64"))
        split.map(lambda row, i: {"label": label if i == 11 else row["label"]}, with_indices=True).to_parquet(file)
    splits = stream_splits(str(tmp_path), class_names=["3"])
    with pytest.raises(DataError, match=r"'test'.*\b11\b.*\b0\b") as caught:
        batches_of(stream_of(splits, "test"))
    assert_names(caught.value, label, 3)
    with pytest.raises(DataError, match=r"'test'.*\b11\b.*\b0\b"):
        store_stream(splits.test, "test", splits.metadata, None)


def test_unreadable_file_of_an_evaluation_split_raises_data_error(tmp_path):
    write_shards(tmp_path, colored_split(sum(ROWS), 1))
    splits = stream_splits(str(tmp_path))
    stream = stream_of(splits)
    (tmp_path / "data" / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"'validation'.*\bFileNotFoundError\b"):
        batches_of(stream)
    with pytest.raises(DataError, match=r"'validation'.*\bFileNotFoundError\b"):
        store_stream(splits.validation, "validation", splits.metadata, None)
    with pytest.raises(DataError, match=r"'validation'"):
        stream.count(np.empty(0, np.int64))
