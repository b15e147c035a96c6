"""A streamed training split: whose images are whose, the order, and that training on it is training all the same."""

import itertools
import logging
import shutil
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
import yaml
from conftest import LABELS, MICRO_RECIPE, ROOT, coloured_split, run_command
from killing import launched_until_a_checkpoint
from test_train import OUTPUT_FILES, assert_same_run, facts, fails, files
from torch.utils.data import DataLoader

from hfvit.augment import Augmentation
from hfvit.checkpoints import newest_checkpoint
from hfvit.errors import DataError, RecipeError, run
from hfvit.images import collate
from hfvit.stream import ImageStream
from hfvit.stream_source import stream_splits, with_bytes
from hfvit.train import main

ROWS = (16, 17, 18, 21)  # images of each shard of train
AUGMENTATION = {"image_size": (16, 16), "mean": [0.5] * 3, "std": [0.5] * 3}
WHOLE = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "horizontal_flip": 0.0, "interpolation": "nearest"}


@pytest.fixture(autouse=True)
def _no_sleep(monkeypatch):
    """datasets 5.2 sleeps five seconds at the end of each pass through several Parquet files."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Splits train (72 images in 4 shards), validation (13) and test (31)."""
    folder = tmp_path_factory.mktemp("sharded")
    write(folder, coloured_split(sum(ROWS), 1))
    return folder


def write(folder, train):
    ends = np.cumsum(ROWS)
    for shard, (end, rows) in enumerate(zip(ends, ROWS, strict=True)):
        part = train.select(range(end - rows, end))
        part.to_parquet(folder / "data" / f"train-{shard:05d}-of-00004.parquet")
    for split, rows, seed in (("validation", 13, 3), ("test", 31, 2)):
        coloured_split(rows, seed).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def stream_recipe(tmp_path_factory, sharded):
    path = tmp_path_factory.mktemp("recipe") / "micro.yaml"
    values = yaml.safe_load(MICRO_RECIPE)
    del values["validation_fraction"], values["num_train_epochs"]
    values |= {"dataset_name": str(sharded), "streaming": True, "validation_split": "validation"}
    values |= {"max_steps": 18, "eval_strategy": "steps", "eval_steps": 9, "shuffle_buffer_size": 20}
    path.write_text(yaml.safe_dump(values))
    return path


def stream_of(folder, limit=None, **options):
    splits = stream_splits(str(folder), max_train_samples=limit)
    options = {"augmentation": Augmentation(**AUGMENTATION, **WHOLE), "batch_size": 4, **options}
    return ImageStream(splits.train, "train", None, len(splits.labels), buffer_size=20, **options)


def draws(stream, count, worker=0, workers=1):
    """(picture, seed's parts) of the first `count` draws of one reader."""
    taken = itertools.islice(stream._draws(worker, workers), count)
    return [(example["image"]["bytes"], draw, place) for example, draw, place in taken]


def epochs_of(stream, worker=0, workers=1, epochs=1):
    """The pictures of each of a reader's first epochs, in order."""
    return [[e["image"]["bytes"] for e in stream._examples(epoch, workers)] for epoch in range(epochs)]


class FirstEpoch(torch.utils.data.IterableDataset):
    """(worker, picture) of one epoch of a stream, in a loader."""

    def __init__(self, stream):
        self.stream = stream

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        return ((info.id, e["image"]["bytes"]) for e in self.stream._examples(0, info.num_workers))


def all_pictures(folder, split="train"):
    files = (folder / "data").glob(f"{split}-*")
    return sorted(row["img"]["bytes"] for file in files for row in pyarrow.parquet.read_table(file).to_pylist())


def test_an_epoch_is_every_image_once_in_another_order_each_time(sharded):
    first, second = epochs_of(stream_of(sharded, order_seed=5), epochs=2)
    assert sorted(first) == sorted(second) == all_pictures(sharded)
    assert first != second
    assert epochs_of(stream_of(sharded, order_seed=5), epochs=2) == [first, second]
    assert epochs_of(stream_of(sharded, order_seed=6))[0] != first


@pytest.mark.parametrize(("processes", "by_shards"), [(2, True), (3, False)])
def test_processes_share_an_epoch(sharded, processes, by_shards):
    streams = [stream_of(sharded, process=rank, processes=processes) for rank in range(processes)]
    assert {stream.by_shards for stream in streams} == {by_shards}
    for epoch in (0, 1):
        shares = [epochs_of(stream, epochs=2)[epoch] for stream in streams]
        assert sorted(itertools.chain(*shares)) == all_pictures(sharded)
        assert min(map(len, shares)) > 0


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_workers_share_their_processs_epoch(sharded, processes):
    seen = []
    for rank in range(processes):
        stream = stream_of(sharded, process=rank, processes=processes)
        seen += DataLoader(FirstEpoch(stream), batch_size=None, collate_fn=collate, num_workers=2)
        assert {worker for worker, _ in seen} == {0, 1}
    assert sorted(picture for _, picture in seen) == all_pictures(sharded)


def test_seeds_are_unique_over_epochs_processes_workers_and_repeats(sharded):
    parts = []
    for rank, worker in itertools.product(range(2), range(2)):
        stream = stream_of(sharded, process=rank, processes=2, repeats=2)
        parts += [(draw, place) for _, draw, place in draws(stream, 150, worker, 2)]
    assert len(set(parts)) == len(parts)


def test_repeats_are_one_image_in_a_row_drawn_anew(sharded):
    stream = stream_of(sharded, repeats=2, augmentation=Augmentation(**AUGMENTATION, crop_scale=(0.2, 0.5)))
    pictures = [picture for picture, *_ in draws(stream, 2 * sum(ROWS))]
    assert pictures[::2] == pictures[1::2]
    assert len(set(pictures)) == sum(ROWS)
    batch = next(iter(stream))
    assert not torch.equal(batch["crops"][0], batch["crops"][1])


def test_batches_are_full_and_labelled_for_ever(sharded):
    for batch in itertools.islice(stream_of(sharded, batch_size=7), 30):
        assert batch["crops"].shape == (7, 16, 16, 3)
        assert batch["crops"].dtype == torch.uint8
        assert len(batch["plan"]["seeds"]) == 7
        brightest = batch["crops"].float().mean(dim=(1, 2)).argmax(dim=1)
        assert torch.equal(batch["labels"], brightest)


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_skipped_batches_leave_the_rest_as_it_was(sharded, workers):
    def batches(skipped):
        stream = stream_of(sharded)
        stream.skip(skipped)
        return list(itertools.islice(DataLoader(stream, batch_size=None, collate_fn=collate, num_workers=workers), 25))

    whole, rest = batches(0), batches(21)
    assert rest[:21] == [{}] * 21
    for one, other in zip(whole[21:], rest[21:], strict=True):
        assert torch.equal(one["crops"], other["crops"])
        assert np.array_equal(one["plan"]["seeds"], other["plan"]["seeds"])


def test_a_limit_takes_the_first_images(sharded):
    assert len(set(epochs_of(stream_of(sharded, limit=10))[0])) == 10
    shares = [epochs_of(stream_of(sharded, limit=10, process=rank, processes=2))[0] for rank in (0, 1)]
    assert len(set(itertools.chain(*shares))) == sum(map(len, shares)) == 10


def test_evaluation_splits_are_written_and_the_training_split_is_not(tmp_path, monkeypatch):
    folder, cache = tmp_path / "set", tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    write(folder, coloured_split(sum(ROWS), 1))
    splits = stream_splits(str(folder), max_eval_samples=5)
    assert (len(splits.validation), len(splits.whole["validation"]), len(splits.whole["test"])) == (5, 13, 31)
    assert splits.facts["splits"]["train"]["rows"] is None
    assert "train ?" in splits.describe()
    rows = sum(len(datasets.Dataset.from_file(str(file))) for file in cache.rglob("*.arrow"))
    assert rows == 13 + 31
    again = stream_splits(str(folder), max_eval_samples=5)
    assert again.validation._fingerprint == splits.validation._fingerprint
    coloured_split(14, 5).to_parquet(folder / "data" / "validation-00000-of-00001.parquet")
    assert len(stream_splits(str(folder)).validation) == 14  # files that changed are read again


def test_a_picture_in_an_archive_is_fetched(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("red/0.png", b"a picture")
    (tmp_path / "plain.png").touch()
    path = f"zip://red/0.png::{tmp_path / 'set.zip'}"
    assert with_bytes({"path": path, "bytes": None}) == {"path": path, "bytes": b"a picture"}
    for untouched in (None, {"path": str(tmp_path / "plain.png"), "bytes": None}, {"path": path, "bytes": b"here"}):
        assert with_bytes(untouched) == untouched


# Training


def test_training_on_a_stream(stream_recipe, tmp_path, caplog):
    out = tmp_path / "out"
    words = [str(stream_recipe), "--output_dir", str(out), "--mixup_alpha", "0.2", "--policy", "trivial_augment"]
    with caplog.at_level(logging.INFO, "hfvit"):
        assert run(lambda: main([*words, "--max_steps", "45", "--dataloader_num_workers", "9"])) == 0
    assert "train: streamed, shuffle buffer of 20, 4 shards" in caplog.messages
    assert "train: 4 workers instead of 9: one needs a shard of its own" in caplog.messages
    assert files(out) == OUTPUT_FILES
    recorded = facts(out)
    assert recorded["metrics"]["test"]["images"] == 31
    assert recorded["metrics"]["validation"]["images"] == 13
    assert recorded["metrics"]["test"]["accuracy"] > 0.8
    assert recorded["training"]["steps"] == 45
    assert recorded["training"]["epochs"] is None
    assert "streamed, not counted" in (out / "README.md").read_text()
    assert yaml.safe_load((out / "recipe.yaml").read_text())["streaming"] is True


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_is_as_unbroken(stream_recipe, tmp_path, workers, monkeypatch, capsys):
    words = [str(stream_recipe), "--dataloader_num_workers", str(workers), "--random_erasing", "0.5", "--eval_steps"]
    words += ["5", "--per_device_train_batch_size", "4", "--save_total_limit", "9"]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert run(lambda: main([*words, "--output_dir", str(unbroken)])) == 0

    def dies(*_, **__):
        raise RuntimeError("a power cut")

    with monkeypatch.context() as patch:
        patch.setattr("hfvit.finetuning.HFViTTrainer.predict", dies)
        with pytest.raises(RuntimeError, match="power cut"):
            main([*words, "--output_dir", str(broken)])
    for checkpoint in broken.glob("checkpoint-*"):
        if checkpoint.name not in ("checkpoint-5", "checkpoint-10"):  # an older one may be the best
            shutil.rmtree(checkpoint)
    assert Path(newest_checkpoint(broken)).name == "checkpoint-10"
    words += ["--output_dir", str(broken), "--resume_from_checkpoint", "auto"]
    message = fails(capsys, *words, "--shuffle_buffer_size", "7")
    assert "read with shuffle_buffer_size 20, now it is 7; resume with the same" in message
    assert run(lambda: main(words)) == 0
    assert_same_run(broken, unbroken)


def with_card(folder, images):
    """Give the data set a card that counts its training images."""
    splits = [{"name": "train", "num_examples": images, "num_bytes": 1}]
    splits += [{"name": "validation", "num_examples": 13, "num_bytes": 1}]
    splits += [{"name": "test", "num_examples": 31, "num_bytes": 1}]
    label = {"name": "label", "dtype": {"class_label": {"names": dict(enumerate(LABELS))}}}
    card = {"dataset_info": {"features": [{"name": "img", "dtype": "image"}, label], "splits": splits}}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")


def test_a_counted_stream_knows_its_epochs(sharded, stream_recipe, tmp_path, capsys):
    folder, out = tmp_path / "counted", tmp_path / "out"
    shutil.copytree(sharded, folder)
    with_card(folder, sum(ROWS))
    words = [str(stream_recipe), "--dataset_name", str(folder), "--output_dir", str(out)]
    message = fails(capsys, *words, "--max_steps", "-1", "--num_train_epochs", "4")
    assert "set max_steps to 36: num_train_epochs 4 of its 72 images" in message
    assert "9 steps see as many" in fails(capsys, *words, "--eval_strategy", "epoch")
    assert run(lambda: main([*words, "--mixup_alpha", "0.2", "--mix_off_epochs", "1"])) == 0
    recorded = facts(out)
    assert recorded["training"]["epochs"] == 2.0
    assert recorded["data"]["splits"]["train"]["rows"] == 72
    assert [entry["epoch"] for entry in recorded["history"] if "eval_accuracy" in entry] == [1.0, 2.0]


# Mistakes


def test_mistakes_are_told_before_anything_is_read(stream_recipe, capsys, tmp_path, monkeypatch):
    def reads(*_, **__):
        raise AssertionError("a split was read")

    monkeypatch.setattr("hfvit.stream_source._written", reads)
    words = [stream_recipe, "--output_dir", tmp_path / "out"]
    assert "set max_steps to the number of optimiser steps" in fails(capsys, *words, "--max_steps", "-1")
    assert "eval_strategy: epoch never comes" in fails(capsys, *words, "--eval_strategy", "epoch")
    assert "save_strategy: epoch never comes" in fails(
        capsys, *words, "--save_strategy", "epoch", "--load_best_model_at_end", "false"
    )
    assert "has no split 'tost'" in fails(capsys, *words, "--test_split", "tost")
    assert "there is no folder" in fails(capsys, *words, "--dataset_name", "./missing")
    assert "'digits' comes with scikit-learn" in fails(capsys, *words, "--dataset_name", "digits")
    assert "max_train_samples" in fails(capsys, *words, "--train_split", "train[:100]")
    assert "max_eval_samples" in fails(capsys, *words, "--test_split", "test[:100]")
    assert "is the streamed training split" in fails(capsys, *words, "--validation_split", "train")
    unsplit = tmp_path / "unsplit.yaml"
    unsplit.write_text(stream_recipe.read_text().replace("validation_split: validation\n", ""))
    assert "name the validation_split" in fails(capsys, unsplit, *words[1:])


def test_no_length_no_last_epochs(stream_recipe, capsys, tmp_path):
    words = [stream_recipe, "--output_dir", tmp_path / "out", "--mixup_alpha", "0.2", "--mix_off_epochs", "1"]
    assert "mix_off_epochs: nobody has counted" in fails(capsys, *words)


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_labels_need_names(tmp_path, kind):
    write(tmp_path, coloured_split(sum(ROWS), 1).cast_column("label", datasets.Value(kind)))
    with pytest.raises(DataError, match=f"holds {kind} without the names of its classes.*declare it as a ClassLabel"):
        stream_splits(str(tmp_path))


@pytest.mark.parametrize(("label", "message"), [(None, "the label is missing"), (7, "label 7 is outside the 3")])
def test_a_wrong_label_in_mid_stream(tmp_path, label, message):
    split = coloured_split(sum(ROWS), 1).cast_column("label", datasets.Value("int64"))
    write(tmp_path, split.map(lambda row, i: {"label": label if i == 40 else row["label"]}, with_indices=True))
    with_card(tmp_path, sum(ROWS))
    with pytest.raises(DataError, match=rf"Split 'train', row \d+ of the stream in epoch 0.*{message}"):
        list(itertools.islice(stream_of(tmp_path), 18))


def test_a_corrupt_picture_in_mid_stream(stream_recipe, tmp_path, capsys):
    split = coloured_split(sum(ROWS), 1).cast_column("img", datasets.Image(decode=False))
    broken = {"bytes": b"not a picture", "path": "forty.png"}
    split = split.map(lambda row, i: {"img": broken if i == 40 else row["img"]}, with_indices=True)
    write(tmp_path / "set", split)
    words = ["--output_dir", tmp_path / "out", "--dataset_name", tmp_path / "set", "--dataloader_num_workers", "2"]
    message = fails(capsys, stream_recipe, *words)
    assert "of the stream in epoch 0 (reader " in message
    assert "(forty.png): not a readable picture" in message


def test_a_file_that_cannot_be_read_in_mid_stream(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "set")
    stream = stream_of(tmp_path / "set")
    for file in (tmp_path / "set" / "data").glob("train-00002*"):
        file.unlink()
    with pytest.raises(DataError, match=r"Split 'train': the stream breaks off after \d+ images of epoch 0"):
        list(itertools.islice(stream, 18))


def test_a_share_without_images(sharded):
    with pytest.raises(DataError, match="reader 2 of 2 finds no image"):
        next(iter(stream_of(sharded, limit=1, process=1, processes=2)))


def test_a_known_length_is_checked_before_the_splits_are_read(sharded):
    def refuses(images):
        raise RecipeError(f"{images} images")

    with pytest.raises(RecipeError, match="None images"):
        stream_splits(str(sharded), check_length=refuses)


# Processes


@pytest.mark.integration
@pytest.mark.slow
def test_two_processes_train_and_resume_on_one_stream(stream_recipe, tmp_path):
    """Slow through datasets' own sleep: 5 seconds for every shuffled pass over several shards."""
    options = ["--max_steps", "16", "--eval_steps", "4", "--dataloader_num_workers", "1"]
    config = ROOT / "accelerate_configs" / "multi_cpu.yaml"

    def words(out):
        launch = ["accelerate", "launch", "--config_file", str(config), "--main_process_port", "0"]
        return [*launch, "hfvit/train.py", str(stream_recipe), "--output_dir", str(out), *options]

    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    result = run_command(*words(unbroken))
    assert result.returncode == 0, result.stderr
    assert "train: streamed, shuffle buffer of 20, 4 shards over 2 processes" in result.stderr
    recorded = facts(unbroken)
    assert recorded["training"]["processes"] == 2
    assert recorded["training"]["steps"] == 16
    assert recorded["metrics"]["test"]["images"] == 31
    assert recorded["metrics"]["test"]["accuracy"] > 0.8
    with launched_until_a_checkpoint(words(broken), broken):
        pass
    resumed = run_command(*words(broken), "--resume_from_checkpoint", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(broken, unbroken)
