"""Near duplicates: perceptual hashes of changed and of different images, against a comparison of all pairs."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dct

from hfvit.data.duplicates import groups_of, near_pairs, perceptual_hashes, reduce_image, thumbnails


def scene(seed: int, size: int = 96) -> Image.Image:
    """A smooth colored picture, as photographs are: a few low frequencies."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def compressed(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=50)
    return Image.open(buffer).convert("RGB")


CHANGES = {
    "compressed": compressed,
    "enlarged": lambda image: image.resize((200, 200), Image.Resampling.BICUBIC),
    "reduced": lambda image: image.resize((48, 48), Image.Resampling.LANCZOS),
    "brighter": lambda image: Image.fromarray((np.asarray(image).astype(int) * 0.8 + 40).clip(0, 255).astype("uint8")),
}


def reduced(images: list[Image.Image]) -> np.ndarray:
    return np.stack([reduce_image(image) for image in images])


@pytest.mark.parametrize("change", CHANGES)
def test_near_pairs_finds_changed_images_and_no_others(change):
    originals = [scene(seed) for seed in range(60)]
    pixels = reduced([*originals, *map(CHANGES[change], originals[:20])])
    pairs = near_pairs(perceptual_hashes(pixels), thumbnails(pixels))
    assert pairs.tolist() == [[index, 60 + index] for index in range(20)]


def test_perceptual_hashes_are_signs_of_low_frequencies_about_their_median():
    pixels = reduced([scene(seed) for seed in range(5)])
    hashes = perceptual_hashes(pixels)
    for image, value in zip(pixels, hashes, strict=True):
        gray = image @ np.array([0.299, 0.587, 0.114])
        low = dct(dct(gray, axis=0), axis=1)[:8, :8]  # as imagehash.phash computes it
        bits = (low > np.median(low)).flatten()
        assert int(value) == int("".join(str(int(bit)) for bit in bits), 2)


def test_near_pairs_equals_a_comparison_of_all_pairs():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 400, dtype=np.uint64)
    for index in range(200, 400):  # a copy with 0 to 6 other bits
        bits = rng.choice(64, index % 7, replace=False)
        hashes[index] = hashes[index - 200] ^ np.bitwise_or.reduce(np.uint64(1) << bits.astype(np.uint64), initial=0)
    thumbs = np.tile(np.arange(192, dtype=np.uint8), (400, 1))
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = np.argwhere(np.triu(distance <= 4, 1))
    assert len(expected) > 100
    assert near_pairs(hashes, thumbs).tolist() == expected.tolist()


def test_near_pairs_of_equal_hashes_and_other_colors_is_empty():
    pixels = reduced([scene(1), Image.fromarray(np.asarray(scene(1))[..., ::-1].copy())])
    assert not len(near_pairs(np.zeros(2, np.uint64), thumbnails(pixels)))


def test_groups_of_connects_pairs():
    pairs = np.array([[1, 2], [2, 5], [7, 8]])
    assert [group.tolist() for group in groups_of(pairs, 9)] == [[1, 2, 5], [7, 8]]
    assert groups_of(np.empty((0, 2), np.int64), 3) == []
