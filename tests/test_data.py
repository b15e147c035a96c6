"""Data: what is found, what is refused, how splits are made, and what an item is."""

import io

import datasets
import numpy as np
import pytest
import torch
from conftest import LABELS, coloured_image, coloured_split
from PIL import Image
from torchvision.transforms import v2
from transformers.image_utils import load_image

from hfvit.data import find_image_column, find_label_column, load_splits
from hfvit.errors import DataError
from hfvit.images import EpochSampler, ImageDataset, to_rgb


def save(folder, **splits):
    for name, split in splits.items():
        split.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return str(folder)


def make_split(labels, features=None, **columns):
    rng = np.random.default_rng(0)
    values = {"image": [coloured_image(0, rng) for _ in labels], "label": labels, **columns}
    default = {"image": datasets.Image(), "label": datasets.ClassLabel(names=LABELS)}
    return datasets.Dataset.from_dict(values, features=datasets.Features({**default, **(features or {})}))


def test_columns_and_labels_of_a_hub_layout(colours):
    splits = load_splits(str(colours), validation_fraction=0.2, seed=5)
    assert (splits.image_column, splits.label_column, splits.labels) == ("img", "label", LABELS)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (52, 13, 31)
    assert splits.facts["splits"]["validation"]["source"] == "train, 0.2 held out"
    assert splits.sources == {"train": "train", "validation": "train", "test": "test"}
    assert "images from column 'img', 3 classes from column 'label'" in splits.describe()


def test_held_out_rows_are_stratified_seeded_and_disjoint(colours):
    def rows(seed):
        splits = load_splits(str(colours), validation_fraction=0.2, seed=seed)
        return [{row["image"]["bytes"] for row in part} for part in (splits.train, splits.validation)]

    (train, validation), (_, again), (_, other) = rows(5), rows(5), rows(6)
    assert not train & validation
    assert len(train | validation) == 65
    assert validation == again
    assert validation != other
    counts = np.bincount(load_splits(str(colours), validation_fraction=0.2).validation["label"])
    assert counts.max() - counts.min() <= 1


def test_a_validation_split_is_used_as_it_is(tmp_path):
    name = save(tmp_path, train=coloured_split(30, 0), validation=coloured_split(9, 1), test=coloured_split(12, 2))
    splits = load_splits(name, validation_split="validation")
    assert (len(splits.train), len(splits.validation)) == (30, 9)


def test_split_slices_and_limits(colours):
    splits = load_splits(
        str(colours), train_split="train[:60]", test_split="train[60:]", max_train_samples=20, max_eval_samples=4
    )
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (20, 4, 4)


def test_a_set_without_a_test_split(colours):
    assert load_splits(str(colours), test_split=None).test is None


def test_imagefolder(tmp_path):
    rng = np.random.default_rng(0)
    for split, rows in (("train", 12), ("test", 6)):
        for row in range(rows):
            folder = tmp_path / split / LABELS[row % 3]
            folder.mkdir(parents=True, exist_ok=True)
            coloured_image(row % 3, rng).save(folder / f"{row}.png")
    splits = load_splits(str(tmp_path), validation_fraction=0.25)
    assert splits.labels == sorted(LABELS)
    item = ImageDataset(splits.test, v2.functional.pil_to_tensor, "test")[0]
    assert item["pixel_values"].shape == (3, 16, 16)


def test_digits_are_all_there():
    splits = load_splits("digits", validation_fraction=0.1)
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 1797
    assert splits.labels == list("0123456789")
    assert np.bincount(splits.test["label"]).min() >= 34


def test_string_and_integer_labels_become_classes(tmp_path):
    for kind, values in (("string", ["cat", "dog", "cat", "dog"]), ("int64", [7, 3, 7, 3])):
        split = make_split(values, {"label": datasets.Value(kind)})
        splits = load_splits(save(tmp_path / kind, train=split, test=split), validation_fraction=0.5)
        assert splits.labels == sorted({str(value) for value in values})
        assert splits.test["label"] == [splits.labels.index(str(value)) for value in values]


def test_column_finding_prefers_usual_names_and_asks_when_unsure():
    image, fine = datasets.Image(), datasets.ClassLabel(names=["a", "b"])
    assert (
        find_label_column(datasets.Features({"img": image, "fine_label": fine, "coarse_label": fine})) == "fine_label"
    )
    with pytest.raises(DataError, match=r"several label columns \(colour, shape\)"):
        find_label_column(datasets.Features({"colour": fine, "shape": fine}))
    with pytest.raises(DataError, match="no label column among img"):
        find_label_column(datasets.Features({"img": image}))
    with pytest.raises(DataError, match=r"several image columns \(left, right\)"):
        find_image_column(datasets.Features({"left": image, "right": image}))
    with pytest.raises(DataError, match="no image column among label"):
        find_image_column(datasets.Features({"label": fine}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"test_split": "tset"}, "has no split 'tset'; it has train, test. Did you mean 'test'?"),
        ({"image_column": "imgs"}, "has no column 'imgs'; it has img, label. Did you mean 'img'?"),
        ({"label_column": "labels"}, "has no column 'labels'"),
        ({"image_column": "label"}, "does not hold images"),
        ({"train_split": "train[:0]"}, "is empty"),
        ({"validation_fraction": 0.01}, "cannot be held out by class"),
    ],
)
def test_what_cannot_be_used_is_named(colours, arguments, message):
    with pytest.raises(DataError) as caught:
        load_splits(str(colours), **arguments)
    assert message in str(caught.value)


def test_an_empty_split_is_named(tmp_path):
    train, empty = coloured_split(12, 0), coloured_split(0, 1)
    with pytest.raises(DataError, match="split 'test' is empty"):
        load_splits(save(tmp_path, train=train, test=empty))


def test_missing_folders_and_empty_folders(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        load_splits("./no/such/folder")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_splits(str(tmp_path))
    with pytest.raises(DataError, match="'digits' has no split 'validation'"):
        load_splits("digits", validation_split="validation")


def test_bad_labels_are_named_with_their_row(tmp_path):
    good = make_split([0, 1, 2] * 4)
    unlabelled = make_split([0, 1, -1, -1])
    with pytest.raises(DataError, match=r"Split 'test', row 2: label .*-1.* outside the 3 classes \(2 such rows\)"):
        load_splits(save(tmp_path / "a", train=good, test=unlabelled))
    one_class = make_split([1] * 12)
    with pytest.raises(DataError, match="holds one class only"):
        load_splits(save(tmp_path / "b", train=one_class, test=good))
    unseen = make_split(["cat", "emu"], {"label": datasets.Value("string")})
    seen = make_split(["cat", "dog"] * 4, {"label": datasets.Value("string")})
    with pytest.raises(DataError, match=r"row 1: label .*emu.* is outside the 2 classes"):
        load_splits(save(tmp_path / "c", train=seen, test=unseen))


@pytest.mark.parametrize(
    ("label_type", "values", "message"),
    [
        ("string", ["a", None, "b", "a"], "Split 'train', row 1: the label is missing"),
        ("int64", [0, 1, None, 1], "Split 'train', row 2: the label is missing"),
        ("float32", [0.1, 0.2, 0.3, 0.4], "not classes"),
    ],
)
def test_labels_that_are_no_classes_are_named(tmp_path, label_type, values, message):
    split = make_split(values, {"label": datasets.Value(label_type)})
    with pytest.raises(DataError, match=message):
        load_splits(save(tmp_path, train=split, test=split), label_column="label")


def test_a_column_that_holds_no_labels_is_named(colours):
    with pytest.raises(DataError, match="label_column: column 'img' of split 'train' holds Image"):
        load_splits(str(colours), label_column="img")


def test_a_corrupt_image_names_its_split_and_row_as_the_data_set_has_them(tmp_path):
    """Whichever part of the training split the row went to, and whatever its place there."""
    for bad in (5, 17, 38):
        split = coloured_split(40, 0).cast_column("img", datasets.Image(decode=False))
        rows = split.to_list()
        rows[bad]["img"]["bytes"] = rows[bad]["img"]["bytes"][:60]
        broken = datasets.Dataset.from_list(rows, features=split.features)
        splits = load_splits(save(tmp_path / str(bad), train=broken, test=split), max_train_samples=33)
        found = []
        for role in ("train", "validation"):
            dataset = ImageDataset(getattr(splits, role), v2.functional.pil_to_tensor, splits.sources[role])
            for index in range(len(dataset)):
                try:
                    dataset[index]
                except DataError as error:
                    found.append(str(error))
        assert all(f"Split 'train', row {bad}: not a readable picture" in message for message in found)
        assert len(found) == 1 or bad not in [*splits.train["row"], *splits.validation["row"]]


def undecoded(rows: int):
    split = coloured_split(rows, 0).rename_column("img", "image").add_column("row", np.arange(rows))
    return split.cast_column("image", datasets.Image(decode=False))


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"row 0: not a readable picture .*DecompressionBomb"):
        ImageDataset(undecoded(2), v2.functional.pil_to_tensor, "train")[0]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_becomes_rgb_as_serving_does_it(mode):
    image = coloured_image(1, np.random.default_rng(0)).convert("P" if mode == "PA" else "RGB").convert(mode)
    converted = to_rgb(image)
    assert converted.mode == "RGB"
    assert np.array_equal(np.asarray(converted), np.asarray(load_image(image)))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_16_bit_greys_keep_their_gradation(mode):
    ramp = np.linspace(0, 65535, 256).astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]).reshape(16, 16)
    image = Image.frombytes(mode, (16, 16), ramp.tobytes())
    pixels = np.asarray(to_rgb(image))[..., 0].ravel()
    assert np.abs(pixels.astype(int) - np.arange(256)).max() <= 1


def test_deep_greys_scale_by_their_mode_not_by_their_content():
    dark = Image.frombytes("I;16", (2, 1), np.array([0, 252], "<u2").tobytes())
    assert np.asarray(to_rgb(dark)).max() <= 1
    unit = Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16))
    assert np.abs(np.asarray(to_rgb(unit))[..., 0].ravel().astype(int) - np.arange(256)).max() <= 1
    flat = Image.fromarray(np.full((4, 4), 0.5, np.float32))
    assert np.unique(np.asarray(to_rgb(flat))).size == 1


def test_exif_orientation_is_applied():
    image = coloured_image(0, np.random.default_rng(0)).resize((8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", exif=exif)
    assert to_rgb(Image.open(buffer)).size == (4, 8)


def test_sampler_is_a_shuffle_of_whole_global_batches():
    sampler = EpochSampler(rows=21, global_batch_size=8, seed=3)
    first = list(sampler)
    assert len(first) == len(sampler) == 16
    assert {epoch for epoch, _ in first} == {0}
    assert len({row for _, row in first}) == 16
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert [row for _, row in second] != [row for _, row in first]
    assert {epoch for epoch, _ in second} == {1}


def test_augmentation_depends_on_seed_epoch_and_row_alone():
    split = undecoded(4)
    crop = v2.Compose([v2.RandomCrop(8), v2.ToImage()])
    dataset = ImageDataset(split, crop, "train", seed=1)
    torch.manual_seed(0)
    first = dataset[(2, 3)]["pixel_values"]
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(dataset[(2, 3)]["pixel_values"], first)
    assert not torch.equal(dataset[(3, 3)]["pixel_values"], first)
    assert not torch.equal(ImageDataset(split, crop, "train", seed=2)[(2, 3)]["pixel_values"], first)
    torch.manual_seed(0)
    dataset[(2, 3)]
    assert torch.equal(torch.get_rng_state(), state)  # the model's own randomness is left alone
