"""Batches of a split, cached or decoded on the fly, and samplers."""

import errno
import io
import itertools
import os
import pickle
import resource
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from helpers.images import LABELS, colored_image, colored_split
from helpers.layouts import archive_folder, image_bytes
from helpers.messages import assert_logged, assert_names
from helpers.splits import load_splits
from PIL import Image
from timm.data import resolve_data_config
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as tv
from transformers import TimmWrapperImageProcessor

import hfvit.data.pixel_cache
from hfvit.data.dataset import ArrayReader, DecodingReader, ImageDataset, collate, image_datasets
from hfvit.data.decode import decode
from hfvit.data.pixel_cache import NotCacheableError, cached_pixels, common_size
from hfvit.data.samplers import EpochSampler
from hfvit.errors import DataError
from hfvit.training.out_of_memory import micro_batches
from hfvit.transforms.augmentation import Augmentation
from hfvit.transforms.preprocessing import Preprocessing
from hfvit.utils.counter_rng import sample_seeds

CONFIG = resolve_data_config({"input_size": [3, 24, 24], "interpolation": "bicubic", "crop_pct": 0.9})


def undecoded(split: datasets.Dataset) -> datasets.Dataset:
    split = split.rename_column("img", "image").add_column("row", np.arange(len(split)))
    return split.cast_column("image", datasets.Image(decode=False))


def varied(rows=6):
    """Images of different sizes."""
    rng = np.random.default_rng(0)
    images = [colored_image(0, rng, 40).resize((40 + 3 * row, 30 + 2 * row)) for row in range(rows)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=LABELS)})
    return undecoded(datasets.Dataset.from_dict({"img": images, "label": [0] * rows}, features=features))


@pytest.fixture
def splits(colors):
    return load_splits(str(colors), validation_fraction=0.2, seed=5)


def readers_of(splits):
    opened = image_datasets(splits, CONFIG, Augmentation.from_config(CONFIG), show_progress=False)
    return {role: dataset.reader for role, dataset in opened.items()}


def array_of(split):
    return cached_pixels(split, "train", common_size(split, "train"), show_progress=False)


def decoded(splits, role, row):
    example = splits[role][row]
    return np.asarray(decode(example["image"], role, example["row"]))


def test_small_images_are_cached_in_one_array_per_split(splits, caplog):
    with caplog.at_level("INFO", logger="hfvit"):
        readers = readers_of(splits)
    assert all(isinstance(reader, ArrayReader) for reader in readers.values())
    assert readers["train"].pixels.path == readers["validation"].pixels.path  # one file for what was held out, too
    assert readers["train"].pixels.array.shape == (65, 16, 16, 3)
    assert_logged(caplog, "INFO", "train", "16x16", logger="hfvit.data")
    assert_names(splits.metadata["splits"]["test"]["input"], "16x16")
    for role in ("train", "validation", "test"):
        batch = ImageDataset(splits[role]["label"], readers[role]).__getitems__([0, 5, 11])
        assert batch["images"].dtype == torch.uint8
        for row, image, label in zip((0, 5, 11), batch["images"], batch["labels"], strict=True):
            assert np.array_equal(image.numpy(), decoded(splits, role, row))
            assert label == splits[role][row]["label"]


def test_cached_array_is_reused_and_complete(splits, monkeypatch):
    first = readers_of(splits)["train"].pixels
    folder = first.path.parent
    assert sorted(path.suffix for path in folder.iterdir()) == [".npy"] * len(list(folder.iterdir()))
    monkeypatch.setattr(hfvit.data.pixel_cache, "decode", None)  # nothing is decoded a second time
    again = load_splits(
        splits.metadata["dataset_name"], validation_fraction=0.2, seed=9
    )  # another draw, the same file
    assert readers_of(again)["train"].pixels.path == first.path


def test_pixels_of_two_folders_with_the_same_relative_name_are_their_own(tmp_path, monkeypatch):
    fingerprints = set()
    for project in (1, 2):
        for label, number in itertools.product("ab", range(10)):
            file = tmp_path / f"{project}/data/{label}/{number}.bmp"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image_bytes(number * project, "BMP"))
            os.utime(file, (10**9, 10**9))
        monkeypatch.chdir(tmp_path / str(project))
        split = load_splits("data").train
        images = [np.asarray(Image.open(image["path"])) for image in split["image"]]
        assert np.array_equal(array_of(split).array, images)
        fingerprints.add(split._fingerprint)
    assert len(fingerprints) == 1  # as of a project that was moved


def test_pixels_of_two_archives_with_the_same_relative_name_are_their_own(tmp_path, monkeypatch):
    for project in (1, 2):
        folder = tmp_path / str(project)
        for label, number in itertools.product("ab", range(10)):
            file = folder / f"photos/{label}/{number}.bmp"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image_bytes(number * project, "BMP"))
        archive = archive_folder(folder / "photos", folder / "photos.zip")
        os.utime(archive, (10**9, 10**9))
        monkeypatch.chdir(folder)
        split = load_splits("photos.zip").train
        images = [np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in split["image"]]
        assert np.array_equal(array_of(split).array, images)


def test_pixels_of_a_data_set_of_paths_are_those_of_changed_files(tmp_path):
    """The fingerprint of `Dataset.from_dict` has the paths only."""
    files = [tmp_path / f"{number}.bmp" for number in range(6)]
    fingerprints = set()
    for version in (1, 2):
        for number, file in enumerate(files):
            file.write_bytes(image_bytes(number + version, "BMP"))
            os.utime(file, (10**9, 10**9 + version * (number == 5)))
        split = datasets.Dataset.from_dict({"image": list(map(str, files)), "row": range(6)})
        split = split.cast_column("image", datasets.Image(decode=False))
        assert np.array_equal(array_of(split).array[5], np.asarray(Image.open(files[5])))
        fingerprints.add(split._fingerprint)
    assert len(fingerprints) == 1


def test_killed_writer_leaves_no_cache_file(monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    split = undecoded(colored_split(4, 79))
    monkeypatch.setattr(hfvit.data.pixel_cache, "decode", dies)
    with pytest.raises(KeyboardInterrupt):
        array_of(split)
    assert not list((datasets.config.HF_DATASETS_CACHE / "hfvit_pixels").glob(f"*{split._fingerprint}*"))


def test_small_part_of_a_large_split_gets_its_own_array(colors):
    splits = load_splits(str(colors), validation_fraction=0.2, max_train_samples=9, max_eval_samples=3)
    reader = readers_of(splits)["train"]
    assert len(reader.pixels.array) == 9
    image = ImageDataset(splits.train["label"], reader).__getitems__([4])["images"][0]
    assert np.array_equal(image.numpy(), decoded(splits, "train", 4))


def test_pickled_array_has_the_path_only(splits):
    reader = readers_of(splits)["train"]
    assert len(reader.pixels.array) == 65
    assert len(pickle.dumps(reader.pixels)) < 1000


def test_images_that_cannot_be_cached_raise_with_the_reason(monkeypatch):
    with pytest.raises(NotCacheableError, match=r"\b40x30\b.*\b43x32\b.*\b1\b"):
        array_of(varied())
    large = datasets.Dataset.from_dict(
        {"img": [Image.new("RGB", (200, 150))] * 2}, features=datasets.Features({"img": datasets.Image()})
    )
    with pytest.raises(NotCacheableError, match=r"\b200x150\b"):
        array_of(undecoded(large))
    small = undecoded(colored_split(4, 77))
    monkeypatch.setattr(hfvit.data.pixel_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(NotCacheableError, match=r"\bMiB\b.*\bhfvit_pixels\b"):
        array_of(small)


def test_different_size_outside_the_sample_is_noticed_while_decoding(monkeypatch):
    monkeypatch.setattr(hfvit.data.pixel_cache, "SAMPLE", 1)
    with pytest.raises(NotCacheableError, match=r"\b40x30\b.*\b43x32\b.*\b1\b"):
        array_of(varied())


def test_full_disk_is_a_reason_and_leaves_no_file():
    """The limit of the system on the file size simulates a full disk."""
    split = undecoded(colored_split(4, 78))
    size = common_size(split, "train")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(NotCacheableError, match=rf"\bhfvit_pixels\b.*{os.strerror(errno.EFBIG)}"):
            cached_pixels(split, "train", size, show_progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder = datasets.config.HF_DATASETS_CACHE / "hfvit_pixels"
    assert not [*folder.glob(".*"), *folder.glob(f"{split._fingerprint}*")]


def test_truncated_cache_file_is_rewritten():
    split = undecoded(colored_split(4, 80))
    path = array_of(split).path
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert array_of(split).path.read_bytes() == whole


def test_temporary_cache_files_are_deleted_after_a_day():
    folder = array_of(undecoded(colored_split(4, 81))).path.parent
    old, new = folder / ".old.1.npy", folder / ".new.1.npy"
    for file in (old, new):
        file.write_bytes(b"")
    os.utime(old, (0, 0))
    array_of(undecoded(colored_split(4, 82)))
    assert not old.exists()
    assert new.exists()
    new.unlink()


def test_corrupt_image_is_named_while_the_cache_is_written():
    rows = undecoded(colored_split(70, 3)).to_list()
    rows[33]["image"]["bytes"] = rows[33]["image"]["bytes"][:80]
    broken = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))
    with pytest.raises(DataError) as caught:
        array_of(broken)
    assert_names(caught.value, "'train'", 33)


def test_crops_of_images_of_different_sizes_equal_torchvision():
    split = varied()
    augmentation = Augmentation.from_config(CONFIG, crop_scale=(0.3, 1.0), vertical_flip=0.5)
    dataset = ImageDataset(split["label"], DecodingReader(split, "train", CONFIG), augmentation, seed=4)
    batch = dataset.__getitems__([(2, row) for row in range(6)])
    assert batch["crops"].shape == (6, 24, 24, 3)
    seeds = sample_seeds(4, 2, np.arange(6))
    flipped = np.zeros(2, int)
    for row in range(6):
        image = decode(split[row]["image"], "train", row)
        boxes, flips = augmentation.sample_crops(seeds[[row]], image.height, image.width)
        box = boxes[0].astype(int).tolist()
        expected = tv.resized_crop(tv.pil_to_tensor(image), *box, [24, 24], tv.InterpolationMode.BICUBIC)
        horizontal, vertical = flips[0]
        expected = tv.hflip(expected) if horizontal else expected
        expected = (tv.vflip(expected) if vertical else expected).permute(1, 2, 0).numpy()
        assert np.array_equal(batch["crops"][row].numpy(), expected)
        flipped += flips[0]
    assert all((flipped > 0) & (flipped < 6))
    assert augmentation(batch).shape == (6, 3, 24, 24)


def test_padded_crops_of_images_of_different_sizes_are_resized_first():
    split = varied()
    augmentation = Augmentation.from_config(CONFIG, crop_padding=3, horizontal_flip=0.0)
    dataset = ImageDataset(split["label"], DecodingReader(split, "train", CONFIG), augmentation, seed=4)
    batch = dataset.__getitems__([(2, row) for row in range(6)])
    pixels = augmentation(batch)
    parts = micro_batches(batch, 4, augmentation)
    assert torch.equal(torch.cat([augmentation(part) for part in parts]), pixels)
    for row, (top, left) in enumerate(batch["plan"]["offsets"].tolist()):
        image = tv.pil_to_tensor(decode(split[row]["image"], "train", row))
        resized = tv.resize(image, [24, 24], tv.InterpolationMode.BICUBIC)
        expected = tv.crop(tv.pad(resized, [3] * 4), top, left, 24, 24).float()
        assert torch.equal(pixels[row], expected.mul_(augmentation.scale).add_(augmentation.shift))


def test_evaluation_of_images_of_different_sizes_equals_the_image_processor():
    split = varied()
    batch = ImageDataset(split["label"], DecodingReader(split, "test", CONFIG)).__getitems__([1, 4])
    processor = TimmWrapperImageProcessor(pretrained_cfg=CONFIG)
    expected = [processor(decode(split[row]["image"], "test", row))["pixel_values"][0] for row in (1, 4)]
    assert torch.equal(Preprocessing(CONFIG)(batch), torch.stack(expected))


@pytest.mark.parametrize("kind", ["array", "decoding"])
def test_augmentation_depends_only_on_seed_draw_and_row(kind, splits):
    reader = readers_of(splits)["train"] if kind == "array" else DecodingReader(splits.train, "train", CONFIG)
    augmentation = Augmentation.from_config(CONFIG, crop_scale=(0.3, 1.0), policy="trivial_augment")

    def pixels(seed, *keys):
        dataset = ImageDataset(splits.train["label"], reader, augmentation, seed)
        return augmentation(dataset.__getitems__(list(keys)))

    torch.manual_seed(0)
    first = pixels(1, (2, 3))
    torch.testing.assert_close(pixels(1, (0, 8), (2, 3), (5, 5))[1:2], first, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(pixels(1, (3, 3)), first, atol=1e-2)
    assert not torch.allclose(pixels(2, (2, 3)), first, atol=1e-2)
    state = torch.get_rng_state()
    pixels(1, (2, 3))
    assert torch.equal(torch.get_rng_state(), state)  # the model's own randomness is left alone


def test_loader_yields_batches_with_and_without_workers(splits):
    reader = readers_of(splits)["train"]
    dataset = ImageDataset(splits.train["label"], reader, Augmentation.from_config(CONFIG), seed=1)
    sampler = EpochSampler(len(dataset), 16, seed=1)
    loaders = [DataLoader(dataset, 16, sampler=sampler, collate_fn=collate, num_workers=n) for n in (0, 2)]
    for alone, from_worker in zip(*loaders, strict=True):
        assert torch.equal(alone["images"], from_worker["images"])
        assert torch.equal(alone["plan"]["boxes"], from_worker["plan"]["boxes"])
        assert np.array_equal(alone["plan"]["seeds"], from_worker["plan"]["seeds"])


def test_epoch_sampler_shuffles_full_global_batches():
    sampler = EpochSampler(rows=21, global_batch_size=8, seed=3)
    first = list(sampler)
    assert len(first) == len(sampler) == 16
    assert {draw for draw, _ in first} == {0}
    assert len({row for _, row in first}) == 16
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert [row for _, row in second] != [row for _, row in first]
    assert {draw for draw, _ in second} == {1}
    assert list(EpochSampler(rows=21, global_batch_size=8, seed=4)) != first


def test_repeated_augmentation_augments_each_copy_differently():
    sampler = EpochSampler(rows=20, global_batch_size=6, seed=3, repeats=3)
    first = list(sampler)
    assert len(first) == 18
    for place in range(0, 18, 3):
        triple = first[place : place + 3]
        assert len({row for _, row in triple}) == 1
        assert len({draw for draw, _ in triple}) == 3
    assert len({row for _, row in first}) == 6
    sampler.set_epoch(1)
    assert not set(first) & set(sampler)
