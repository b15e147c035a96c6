"""Streams: division among processes and workers, order, resume, and errors."""

import copy
import io
import itertools
import json
import shutil
import tarfile
import zipfile
from collections import Counter
from fractions import Fraction

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from helpers.images import colored_split
from helpers.messages import assert_logged, assert_names
from helpers.shards import ROWS, with_card, write_shards
from helpers.splits import stream_splits
from torch.utils.data import DataLoader

from hfvit.data.dataset import collate
from hfvit.data.stream import ImageStream, class_index
from hfvit.data.stream_order import divide
from hfvit.data.stream_splits import with_bytes
from hfvit.errors import DataError, RecipeError
from hfvit.transforms.augmentation import Augmentation

AUGMENTATION = {"image_size": (16, 16), "mean": [0.5] * 3, "std": [0.5] * 3}
WHOLE = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "horizontal_flip": 0.0, "interpolation": "nearest"}


def stream_of(folder, limit=None, **options):
    splits = stream_splits(str(folder), max_train_samples=limit)
    options = {"augmentation": Augmentation(**AUGMENTATION, **WHOLE), "batch_size": 4, **options}
    options = {"buffer_size": 20, "divisible": limit is None, **options}
    return ImageStream(splits.train, "train", None, len(splits.labels), **options)


def draws(stream, count, worker=0, workers=1):
    """Return (image, parts of its seed) of the first `count` samples of one reader."""
    taken = itertools.islice(stream.samples(worker, workers), count)
    return [(sample.example["image"]["bytes"], sample.draw, sample.place) for sample in taken]


def epochs_of(stream, worker=0, workers=1, epochs=1):
    """Return the images of a reader's first epochs, in order."""
    found = [[] for _ in range(epochs)]
    for sample in stream.samples(worker, workers):
        if sample.draw >= epochs * stream.repeats:
            break
        found[sample.draw // stream.repeats].append(sample.example["image"]["bytes"])
    return found


class FirstEpoch(torch.utils.data.IterableDataset):
    """Return (worker, image) of one epoch of a stream, from a loader."""

    def __init__(self, stream):
        self.stream = stream

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        return ((info.id, image) for image in epochs_of(self.stream, info.id, info.num_workers)[0])


def all_images(folder, split="train"):
    files = (folder / "data").glob(f"{split}-*")
    return sorted(row["img"]["bytes"] for file in files for row in pyarrow.parquet.read_table(file).to_pylist())


def test_epoch_has_every_image_once_in_a_new_order(sharded):
    first, second = epochs_of(stream_of(sharded, order_seed=5), epochs=2)
    assert sorted(first) == sorted(second) == all_images(sharded)
    assert first != second
    assert epochs_of(stream_of(sharded, order_seed=5), epochs=2) == [first, second]
    assert epochs_of(stream_of(sharded, order_seed=6))[0] != first


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_processes_share_an_epoch(sharded, processes):
    streams = [stream_of(sharded, process=rank, processes=processes) for rank in range(processes)]
    for epoch in (0, 1):
        shares = [epochs_of(stream, epochs=2)[epoch] for stream in streams]
        assert sorted(itertools.chain(*shares)) == all_images(sharded)
        assert min(map(len, shares)) > 0


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_workers_share_the_epoch_of_their_process(sharded, processes):
    seen = []
    for rank in range(processes):
        stream = stream_of(sharded, process=rank, processes=processes)
        seen += DataLoader(FirstEpoch(stream), batch_size=None, collate_fn=collate, num_workers=2)
        assert {worker for worker, _ in seen} == {0, 1}
    assert sorted(image for _, image in seen) == all_images(sharded)


def test_seeds_are_unique_over_epochs_processes_workers_and_repeats(sharded):
    parts = []
    for rank, worker in itertools.product(range(2), range(2)):
        stream = stream_of(sharded, process=rank, processes=2, repeats=2)
        parts += [(draw, place) for _, draw, place in draws(stream, 150, worker, 2)]
    assert len(set(parts)) == len(parts)


def test_repeats_are_copies_of_an_image_in_a_row(sharded):
    stream = stream_of(sharded, repeats=2, augmentation=Augmentation(**AUGMENTATION, crop_scale=(0.2, 0.5)))
    images = [image for image, *_ in draws(stream, 2 * sum(ROWS))]
    assert images[::2] == images[1::2]
    assert len(set(images)) == sum(ROWS)
    batch = next(iter(stream))
    assert not torch.equal(batch["crops"][0], batch["crops"][1])


def test_batches_are_full_and_labeled_over_epochs(sharded):
    for batch in itertools.islice(stream_of(sharded, batch_size=7), 30):
        assert batch["crops"].shape == (7, 16, 16, 3)
        assert batch["crops"].dtype == torch.uint8
        assert len(batch["plan"]["seeds"]) == 7
        brightest = batch["crops"].float().mean(dim=(1, 2)).argmax(dim=1)
        assert torch.equal(batch["labels"], brightest)


def loader(stream, workers):
    return DataLoader(stream, batch_size=None, collate_fn=collate, num_workers=workers)


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_resumed_stream_continues_exactly(sharded, tmp_path, workers, repeats):
    stream = stream_of(sharded, repeats=repeats)
    batches = list(itertools.islice(loader(stream_of(sharded, repeats=repeats), workers), 30))
    for batch in batches[:21]:
        stream.take_position(dict(batch))
    stream.save_state(tmp_path, workers, [stream.state()])
    resumed = stream_of(sharded, repeats=repeats)
    resumed.load_state(tmp_path, workers)
    for one, other in zip(batches[21:], itertools.islice(loader(resumed, workers), 9), strict=True):
        assert torch.equal(one["crops"], other["crops"])
        assert np.array_equal(one["plan"]["seeds"], other["plan"]["seeds"])


def images_of_epoch(stream, epoch, workers=1):
    """Return the images of an epoch that all workers of a process still have."""
    found = []
    for worker in range(workers):
        for sample in stream.samples(worker, workers):
            if sample.draw > epoch:
                break
            found += [sample.example["image"]["bytes"]] * (sample.draw == epoch)
    return found


def train_on(streams, workers, batches, folder):
    """Take batches from each process, save, and return the images by epoch."""
    seen = {}
    for stream in streams:
        readers = [stream.samples(worker, workers) for worker in range(workers)]
        for number in range(stream.batches, stream.batches + batches):
            samples = list(itertools.islice(readers[number % workers], stream.batch_size))
            for sample in samples:
                seen.setdefault(sample.draw, []).append(sample.example["image"]["bytes"])
            stream.take_position({"position": json.dumps(samples[-1].position)})
    streams[0].save_state(folder, workers, [stream.state() for stream in streams])
    return seen


@pytest.mark.parametrize("limit", [None, 60])
@pytest.mark.parametrize("readers", [((2, 1, 3), (3, 2, 2), (1, 1, 0)), ((2, 1, 3), (1, 1, 4), (1, 1, 0))])
def test_resume_with_other_processes_and_workers_repeats_and_loses_nothing(sharded, tmp_path, caplog, readers, limit):
    """An epoch of 72 images whose (processes, workers, batches) change."""
    expected = sorted(images_of_epoch(stream_of(sharded, limit), 0))
    assert len(expected) == (limit or 72)
    seen = {}
    before = 0
    for processes, workers, batches in readers:
        streams = [stream_of(sharded, limit, process=rank, processes=processes) for rank in range(processes)]
        for stream in streams:
            stream.max_workers = 2
            if seen:
                stream.load_state(tmp_path, workers)
                if processes != before:
                    assert_logged(caplog, "WARNING", processes)
        before = processes
        for epoch, images in train_on(streams, workers, batches, tmp_path).items():
            seen.setdefault(epoch, []).extend(images)
    first = seen[0] + images_of_epoch(streams[0], 0)
    assert 24 <= len(seen[0]) < len(expected)
    assert sorted(first) == expected
    assert sorted(seen.get(1, []) + images_of_epoch(streams[0], 1)) == expected


def test_resume_of_readers_in_different_epochs_loses_nothing(sharded, tmp_path):
    streams = [stream_of(sharded, process=rank, processes=2, batch_size=1) for rank in (0, 1)]
    seen = train_on(streams[:1], 1, 50, tmp_path)  # in its second epoch
    for epoch, images in train_on(streams[1:], 1, 10, tmp_path).items():
        seen.setdefault(epoch, []).extend(images)
    streams[0].save_state(tmp_path, 1, [stream.state() for stream in streams])
    alone = stream_of(sharded)
    alone.load_state(tmp_path, 1)
    for epoch in (0, 1, 2):
        alone_again = copy.copy(alone)
        assert sorted(seen.get(epoch, []) + images_of_epoch(alone_again, epoch)) == all_images(sharded)


@pytest.mark.parametrize(("shards", "readers"), [(8, 4), (5, 4), (100, 64), (3, 7), (1, 5), (1000, 64)])
def test_divide_gives_every_row_to_one_reader(shards, readers):
    order = np.random.default_rng(0).permutation(shards)
    units = [divide(shards, reader, readers, order) for reader in range(readers)]
    rows = Counter()
    for unit in itertools.chain(*units):
        rows[unit["shard"]] += Fraction(1, unit["count"])
    assert set(rows.values()) == {1}
    assert len(rows) == shards
    keys = [(unit["shard"], unit["index"]) for unit in itertools.chain(*units)]
    assert len(set(keys)) == len(keys)
    shares = [sum(1 / unit["count"] for unit in of_reader) for of_reader in units]
    assert max(shares) <= 1.2 * shards / readers


def test_checkpoint_of_other_shards_or_version_raises(sharded, tmp_path):
    stream = stream_of(sharded)
    with pytest.raises(RecipeError, match=r"^resume_from_checkpoint: .*--streaming false"):
        stream.load_state(tmp_path, 0)
    stream.save_state(tmp_path, 0, [stream.state()])
    content = json.loads((tmp_path / "stream.json").read_text())
    (tmp_path / "stream.json").write_text(json.dumps({**content, "shards": 5}))
    with pytest.raises(RecipeError, match=r"^resume_from_checkpoint: .*\b5 shards\b.*\b4\b"):
        stream.load_state(tmp_path, 0)
    (tmp_path / "stream.json").write_text(json.dumps({"number of processes": 1}))
    with pytest.raises(RecipeError, match=r"^resume_from_checkpoint: .*earlier version"):
        stream.load_state(tmp_path, 0)


def test_max_train_samples_uses_the_first_images(sharded):
    assert len(set(epochs_of(stream_of(sharded, limit=10))[0])) == 10
    shares = [epochs_of(stream_of(sharded, limit=10, process=rank, processes=2))[0] for rank in (0, 1)]
    assert len(set(itertools.chain(*shares))) == sum(map(len, shares)) == 10


def test_evaluation_splits_without_stream_evaluation_are_cached(tmp_path, monkeypatch):
    folder, cache = tmp_path / "set", tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    write_shards(folder, colored_split(sum(ROWS), 1))
    splits = stream_splits(str(folder), max_eval_samples=5, stream_evaluation=False)
    assert (len(splits.validation), len(splits.whole["validation"]), len(splits.whole["test"])) == (5, 13, 31)
    assert splits.metadata["splits"]["train"]["rows"] is None
    assert_names(splits.describe(), folder, "train ?", "validation 5", "test 5")
    rows = sum(len(datasets.Dataset.from_file(str(file))) for file in cache.rglob("*.arrow"))
    assert rows == 13 + 31
    again = stream_splits(str(folder), max_eval_samples=5, stream_evaluation=False)
    assert again.validation._fingerprint == splits.validation._fingerprint
    colored_split(14, 5).to_parquet(folder / "data" / "validation-00000-of-00001.parquet")
    changed = stream_splits(str(folder), stream_evaluation=False)
    assert len(changed.validation) == 14  # files that changed are read again


def test_with_bytes_reads_an_image_in_an_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("red/0.png", b"a image")
    (tmp_path / "plain.png").touch()
    path = f"zip://red/0.png::{tmp_path / 'set.zip'}"
    assert with_bytes({"path": path, "bytes": None}) == {"path": path, "bytes": b"a image"}
    for untouched in (None, {"path": str(tmp_path / "plain.png"), "bytes": None}, {"path": path, "bytes": b"here"}):
        assert with_bytes(untouched) == untouched


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_stream_without_class_names_raises(tmp_path, kind):
    write_shards(tmp_path, colored_split(sum(ROWS), 1).cast_column("label", datasets.Value(kind)))
    with pytest.raises(DataError, match=rf"^label_column: .*'train'.*\b{kind}\b.*\bClassLabel\b"):
        stream_splits(str(tmp_path))


@pytest.mark.parametrize("class_names", [["3"], ["red", "green", "blue"]])
def test_integer_labels_stream_with_class_names(tmp_path, class_names):
    write_shards(tmp_path, colored_split(sum(ROWS), 1).cast_column("label", datasets.Value("int64")))
    splits = stream_splits(str(tmp_path), class_names=class_names)
    assert splits.labels == (["0", "1", "2"] if class_names == ["3"] else class_names)
    labels = Counter(row["label"] for row in splits.train)
    assert labels == Counter(colored_split(sum(ROWS), 1)["label"])


def test_webdataset_shards_stream_with_integer_labels(tmp_path):
    split = colored_split(24, 1).cast_column("img", datasets.Image(decode=False))
    for name, rows in {"train-0": range(10), "train-1": range(10, 20), "validation-0": range(20, 24)}.items():
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            for row in rows:
                for extension, content in (
                    ("png", split[row]["img"]["bytes"]),
                    ("cls", str(split[row]["label"]).encode()),
                ):
                    info = tarfile.TarInfo(f"{row:04d}.{extension}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    splits = stream_splits(str(tmp_path), class_names=["3"])
    rows = list(splits.train)
    assert [row["label"] for row in rows] == split["label"][:20]
    stream = ImageStream(splits.train, "train", 20, 3, Augmentation(**AUGMENTATION, **WHOLE), 4, buffer_size=8)
    batches = list(itertools.islice(stream, 5))
    assert sorted(torch.cat([batch["labels"] for batch in batches]).tolist()) == sorted(split["label"][:20])


def test_lance_tables_stream_with_integer_labels(tmp_path):
    lance = pytest.importorskip("lance")
    split = colored_split(24, 1).cast_column("img", datasets.Image(decode=False))
    for name, rows in (("train", range(20)), ("validation", range(20, 24))):
        images = [split[row]["img"]["bytes"] for row in rows]
        table = pyarrow.table({"image": images, "label": [split[row]["label"] for row in rows]})
        lance.write_dataset(table, tmp_path / f"{name}.lance", max_rows_per_file=5)
    splits = stream_splits(str(tmp_path), class_names=["3"])
    assert splits.train.num_shards == 4
    assert len(list(splits.validation)) == 4
    stream = ImageStream(splits.train, "train", 20, 3, Augmentation(**AUGMENTATION, **WHOLE), 4, buffer_size=8)
    labels = torch.cat([batch["labels"] for batch in itertools.islice(stream, 5)]).tolist()
    assert sorted(labels) == sorted(split["label"][:20])


@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_booleans_and_whole_numbers_stream_as_classes(tmp_path, kind):
    for name, rows in (("train", 12), ("validation", 4)):
        split = colored_split(rows, 1).remove_columns("label")
        split = split.add_column("label", [row % 2 for row in range(rows)]).cast_column("label", datasets.Value(kind))
        split.to_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    stream = ImageStream(
        stream_splits(str(tmp_path), class_names=["no", "yes"]).train, "train", 12, 2,
        Augmentation(**AUGMENTATION, **WHOLE), 4, buffer_size=8,
    )  # fmt: skip
    labels = torch.cat([batch["labels"] for batch in itertools.islice(stream, 3)])
    assert labels.dtype == torch.int64
    assert sorted(labels.tolist()) == [0] * 6 + [1] * 6


def test_class_index_of_a_fraction_raises():
    with pytest.raises(DataError) as caught:
        class_index({"label": 0.5, "image": None, "row": 3}, "train", 2)
    assert_names(caught.value, "'train'", 3, 0.5)


@pytest.mark.parametrize(("label", "data"), [(None, ()), (7, (7, 3))])
def test_wrong_label_in_the_stream_names_the_row(tmp_path, label, data):
    split = colored_split(sum(ROWS), 1).cast_column("label", datasets.Value("int64"))
    write_shards(tmp_path, split.map(lambda row, i: {"label": label if i == 40 else row["label"]}, with_indices=True))
    with_card(tmp_path, sum(ROWS))
    with pytest.raises(DataError, match=r"'train'.*\b\d+\b.*\b0\b.*\blabel_column\b") as caught:
        list(itertools.islice(stream_of(tmp_path), 18))
    assert_names(caught.value, *data)


@pytest.mark.parametrize("missing", [None, " "])
def test_missing_name_in_the_stream_is_a_missing_label(tmp_path, missing):
    split = colored_split(12, 1).remove_columns("label").add_column("label", ["a", "b", missing] * 4)
    for name in ("train", "validation"):
        split.to_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    splits = stream_splits(str(tmp_path), class_names=["a", "b"], test_split=None)
    augmentation = Augmentation(**AUGMENTATION, **WHOLE)
    with pytest.raises(DataError, match=r"'train'.*\bmissing\b.*\blabel_column\b"):
        next(iter(ImageStream(splits.train, "train", 12, 2, augmentation, 12, buffer_size=1)))


def test_unreadable_file_in_the_stream_raises_data_error(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "set")
    stream = stream_of(tmp_path / "set")
    for file in (tmp_path / "set" / "data").glob("train-00002*"):
        file.unlink()
    with pytest.raises(DataError, match=r"'train'.*\b\d+\b.*\b0\b.*\bFileNotFoundError\b"):
        list(itertools.islice(stream, 18))


def test_reader_without_images_raises_data_error(sharded):
    with pytest.raises(DataError, match=r"\b2 of 2\b") as caught:
        next(iter(stream_of(sharded, limit=1, process=1, processes=2)))
    assert_names(caught.value, "'train'", "dataloader_num_workers", "max_train_samples")


def test_known_length_is_checked_before_the_splits_are_read(sharded):
    def refuses(images):
        raise RecipeError(f"{images} images")

    with pytest.raises(RecipeError, match="None images"):
        stream_splits(str(sharded), check_length=refuses)
