"""Explanation maps of small trained models, by deletion, insertion and random weights."""

import numpy as np
import pytest
import torch
from helpers.models import build_model
from scipy.stats import spearmanr
from transformers import ConvNextConfig, ConvNextForImageClassification, SwinConfig, SwinForImageClassification

from hfvit.errors import ModelError
from hfvit.models import explain as explain_module
from hfvit.models.explain import GRAD_CAM, GRADIENT_ATTENTION, explain

LABELS = ["red", "green", "blue"]
SIZE, SQUARE = 32, 12
MODELS = {
    "class token": ("vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}),
    "mean of tokens": (
        "vit_tiny_patch16_224",
        {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "global_pool": "avg", "class_token": False},
    ),
    "convolutions": ("test_resnet", {}),
}
METHODS = {"class token": GRADIENT_ATTENTION, "mean of tokens": GRAD_CAM, "convolutions": GRAD_CAM}


def squares(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Draw noise with a square in the color of the class: pixels, classes, mask of the squares."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(0, 0.3, (count, 3, SIZE, SIZE)).astype(np.float32)
    labels = rng.integers(0, 3, count)
    masks = np.zeros((count, SIZE, SIZE), bool)
    for image, mask, label in zip(pixels, masks, labels, strict=True):
        top, left = rng.integers(0, SIZE - SQUARE, 2)
        mask[top : top + SQUARE, left : left + SQUARE] = True
        image[label, mask] += 2
    return torch.from_numpy(pixels), torch.from_numpy(labels), masks


@pytest.fixture(scope="module", params=MODELS)
def trained(request):
    name, arguments = MODELS[request.param]
    torch.manual_seed(0)
    model = build_model(LABELS, architecture=name, image_size=SIZE, timm_kwargs=arguments).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pixels, labels, _ = squares(960, 0)
    for step in range(60):
        rows = slice(step % 30 * 32, (step % 30 + 1) * 32)
        loss = model(pixels[rows], labels=labels[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return request.param, model.eval()


def enlarged(maps: np.ndarray) -> np.ndarray:
    tensor = torch.from_numpy(maps)[:, None]
    return torch.nn.functional.interpolate(tensor, (SIZE, SIZE), mode="bilinear")[:, 0].numpy()


@torch.no_grad()
def curves(model, pixels, labels, order) -> tuple[float, float]:
    """Return the mean probability of the class while pixels are deleted, and while they are inserted."""
    deleted, inserted = [], []
    for fraction in np.linspace(0.05, 0.5, 6):
        chosen = torch.from_numpy(order < fraction * SIZE * SIZE)[:, None]
        for images, kept in ((deleted, ~chosen), (inserted, chosen)):
            probabilities = model(pixels * kept).logits.softmax(dim=1)
            images.append(probabilities.gather(1, labels[:, None]).mean().item())
    return np.mean(deleted), np.mean(inserted)


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each pixel of its image, 0 for the largest value."""
    flat = -values.reshape(len(values), -1)
    return flat.argsort(axis=1).argsort(axis=1).reshape(values.shape)


def test_relevant_pixels_matter_more_than_random_ones(trained):
    kind, model = trained
    pixels, labels, masks = squares(24, 1)
    found = explain(model, pixels, labels)
    assert found.method == METHODS[kind]
    with torch.no_grad():
        expected = model(pixels).logits.numpy()
    assert found.logits == pytest.approx(expected, abs=1e-4)
    assert (found.logits.argmax(1) == labels.numpy()).mean() > 0.95
    assert found.maps.min() >= 0
    assert found.maps.max() == pytest.approx(1)
    maps = enlarged(found.maps)
    deletion, insertion = curves(model, pixels, labels, ranks(maps))
    noise = np.random.default_rng(0).random(maps.shape)
    random_deletion, random_insertion = curves(model, pixels, labels, ranks(noise))
    assert deletion < random_deletion - 0.1
    assert insertion > random_insertion + 0.03
    inside = np.array([image[mask].mean() / image.mean() for image, mask in zip(maps, masks, strict=True)])
    assert np.median(inside) > 2


def test_map_depends_on_the_weights(trained):
    kind, model = trained
    pixels, labels, _ = squares(8, 2)
    name, arguments = MODELS[kind]
    torch.manual_seed(1)
    untrained = build_model(LABELS, architecture=name, image_size=SIZE, timm_kwargs=arguments).eval()
    maps = [explain(each, pixels, labels).maps for each in (model, untrained)]
    correlation = [spearmanr(one.ravel(), other.ravel()).statistic for one, other in zip(*maps, strict=True)]
    assert np.nanmean(np.abs(correlation)) < 0.6


def test_map_depends_on_the_class(trained):
    _, model = trained
    pixels, _, _ = squares(16, 3)
    two = pixels.clone()
    two[:, :, :, : SIZE // 2] = 0
    two[:, 0, 8:20, 2:14] += 2
    two[:, :, :, SIZE // 2 :] = 0
    two[:, 2, 8:20, 18:30] += 2
    left, right = (enlarged(explain(model, two, torch.full((16,), label)).maps)[0] for label in (0, 2))
    half = SIZE // 2
    assert left[:, :half].sum() / left.sum() > right[:, :half].sum() / right.sum() + 0.2


def test_outliers_of_the_norm_are_replaced_by_their_neighbors():
    maps = torch.full((1, 5, 5), 0.1)
    maps[0, 0, 0] = 9.0  # a corner that the model uses as a register
    norms = torch.ones(1, 25)
    norms[0, 0] = 50
    outliers = explain_module._outliers([norms], maps.flatten(1)).view(1, 5, 5)
    assert outliers.sum() == 1
    assert explain_module._fill(maps, outliers)[0, 0, 0] == pytest.approx(0.1)
    norms[0, :5] = 50  # an object
    assert not explain_module._outliers([norms], maps.flatten(1)).any()


@pytest.mark.parametrize(
    ("architecture", "image_size", "arguments"),
    [
        ("vit_base_patch14_reg4_dinov2", 56, {"embed_dim": 32, "depth": 2, "num_heads": 2}),
        ("swin_tiny_patch4_window7_224", 64, {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}),
        ("hiera_tiny_224", 128, {"embed_dim": 16, "stages": [1, 1, 1, 1]}),
        ("test_convnext", 64, {}),
    ],
)
def test_maps_of_other_architectures(architecture, image_size, arguments):
    torch.manual_seed(0)
    model = build_model(LABELS, architecture=architecture, image_size=image_size, timm_kwargs=arguments).train()
    model.requires_grad_(False)
    for parameter in model.timm_model.get_classifier().parameters():
        torch.nn.init.normal_(parameter)  # Hiera's is zero
    found = explain(model, torch.randn(2, 3, image_size, image_size))
    assert found.maps.shape[0] == 2
    assert min(found.maps.shape[1:]) >= 4
    assert found.maps.reshape(2, -1).max(axis=1) == pytest.approx([1, 1])
    assert model.training


def test_maps_of_stock_transformers_models(stock):
    from transformers import AutoModelForImageClassification

    vit = AutoModelForImageClassification.from_pretrained(stock)
    found = explain(vit, torch.randn(2, 3, 16, 16))
    assert (found.maps.shape, found.method) == ((2, 2, 2), GRADIENT_ATTENTION)
    swin = SwinForImageClassification(SwinConfig(image_size=64, embed_dim=16, depths=[1, 1], num_heads=[1, 2]))
    convnext = ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2))
    for model in (swin, convnext):
        found = explain(model, torch.randn(2, 3, 64, 64))
        assert (found.maps.shape, found.method) == ((2, 8, 8), GRAD_CAM)


def test_model_without_a_feature_map_raises():
    model = build_model(LABELS, architecture="test_resnet", image_size=SIZE)
    model.timm_model.forward = lambda pixels: pixels.mean(dim=(2, 3))
    with pytest.raises(ModelError):
        explain(model, torch.randn(1, 3, SIZE, SIZE))
