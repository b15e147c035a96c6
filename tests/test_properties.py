"""Properties of any recipe and any image."""

import io
import os

import datasets
import numpy as np
import pytest
import torch
import yaml
from helpers.images import LABELS
from helpers.models import build_model
from helpers.recipes import ARCHITECTURE, MICRO
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import resolve_data_config

from hfvit.data.dataset import DecodingReader, ImageDataset
from hfvit.errors import RecipeError
from hfvit.recipe.arguments import POLICIES
from hfvit.recipe.loader import _FIELDS, load_recipe
from hfvit.transforms.augmentation import Augmentation
from hfvit.transforms.preprocessing import Preprocessing

# Few and deterministic examples, as building arguments and decoding images is slow.
FEW = settings(
    max_examples=60, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
MINIMAL = {"architecture": ARCHITECTURE, "dataset_name": "digits", "output_dir": "out", "use_cpu": True}
NUMBERS = st.one_of(st.integers(), st.integers(0, 4), st.floats(), st.floats(0, 1))
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.dates(), st.binary(max_size=4))
ODD = st.one_of(PLAIN, st.lists(PLAIN, max_size=3), st.dictionaries(PLAIN, PLAIN, max_size=2))
KEYS = st.one_of(st.sampled_from(sorted(_FIELDS)), st.text(max_size=12))
SOUND = {
    "learning_rate": st.floats(0, 10), "weight_decay": st.floats(0, 1), "seed": st.integers(0, 2**32 - 1),
    "crop_scale": st.floats(0.1, 1).map(lambda low: [low, 1.0]), "policy": st.sampled_from(POLICIES),
    "test_split": st.one_of(st.none(), st.text(min_size=1, max_size=8)), "num_train_epochs": st.floats(0.1, 1e3),
    "model_args": st.dictionaries(st.text(max_size=6).filter(lambda key: key != "img_size"), NUMBERS, max_size=2),
    "global_batch_size": st.integers(1, 4096), "drop_path_rate": st.floats(0, 0.9), "run_name": st.text(max_size=8),
}  # fmt: skip


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Write and load a mapping in a separate environment, which TrainingArguments changes."""
    environment = dict(os.environ)

    def load(text: str):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            return load_recipe([str(path)])
        finally:
            os.environ.clear()
            os.environ.update(environment)

    return load


@FEW
@given(st.dictionaries(KEYS, ODD, max_size=3))
def test_load_recipe_of_any_mapping_raises_recipe_error_at_most(load, mapping):
    try:
        recipe = load(yaml.safe_dump({**MINIMAL, **mapping}, allow_unicode=True))
    except RecipeError:
        return
    assert recipe.training.per_device_train_batch_size >= 1


@FEW
@given(st.text(max_size=60))
def test_load_recipe_of_any_text_raises_recipe_error(load, text):
    with pytest.raises(RecipeError):  # no text of this length is a complete recipe
        load(text.encode("utf-8", "ignore").decode())


@FEW
@given(st.fixed_dictionaries({}, optional=SOUND))
def test_resolved_recipe_of_any_mapping_round_trips(load, mapping):
    first = load(yaml.safe_dump({**MINIMAL, **mapping}, allow_unicode=True))
    again = load(first.to_yaml())
    assert again.values == first.values
    assert (again.model, again.data, again.augmentation) == (first.model, first.data, first.augmentation)


@pytest.fixture(scope="module")
def data_config():
    return resolve_data_config(
        build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO).config.pretrained_cfg
    )


@FEW
@given(
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    mode=st.sampled_from(["L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "1"]),
    policy=st.sampled_from(POLICIES),
    seed=st.integers(0, 2**16),
)
def test_any_image_becomes_pixel_values(data_config, width, height, mode, policy, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., :2].copy().view(np.uint16)[..., 0])
    else:
        image = Image.fromarray(pixels if mode in ("RGBA", "CMYK") else pixels[..., :3].copy(), None).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    split = datasets.Dataset.from_dict({"image": [{"bytes": buffer.getvalue(), "path": None}], "row": [0]})
    reader = DecodingReader(split, "train", data_config)
    augmentation = Augmentation.from_config(data_config, policy=policy)
    training = ImageDataset([0], reader, augmentation, seed=seed).__getitems__([(0, 0)])
    for values in (augmentation(training, torch.float32), Preprocessing(data_config)(ImageDataset([0], reader)[0])):
        assert values.shape == (1, 3, 16, 16)
        assert torch.isfinite(values).all()
