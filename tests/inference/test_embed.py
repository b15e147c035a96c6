"""`hfvit embed` and `hfvit.embed`: features against timm's."""

import numpy as np
import pytest
import torch
from helpers.images import LABELS, colored_image
from helpers.messages import assert_names, option_of
from helpers.models import build_model
from helpers.onnx_graphs import write_configs, write_graph
from helpers.recipes import ARCHITECTURE, MICRO
from pyarrow import parquet
from transformers import ResNetConfig, ResNetForImageClassification, ViTForImageClassification, ViTImageProcessor

import hfvit
from hfvit.cli import main
from hfvit.inference.classifier import load_classifier


@pytest.fixture
def checkpoint(tmp_path):
    build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO).save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def write_images(folder, count=3):
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = [colored_image(index % 3, rng, size=20) for index in range(count)]
    for index, image in enumerate(images):
        image.save(folder / f"{index}.png")
    return images


def command(*words):
    with pytest.raises(SystemExit) as stop:
        main(["embed", *map(str, words)])
    return stop.value.code


def test_embed_equals_timms_pooled_features(checkpoint, tmp_path):
    images = write_images(tmp_path / "images", 5)
    classifier = load_classifier(checkpoint, device="cpu")
    network = classifier.backend.model.timm_model
    pixels = torch.from_numpy(classifier.pixel_values(images))
    with torch.inference_mode():
        expected = network.forward_head(network.forward_features(pixels), pre_logits=True).numpy()
    np.testing.assert_allclose(hfvit.embed(classifier, images, batch_size=2), expected, rtol=1e-5, atol=1e-6)
    unit = hfvit.embed(checkpoint, images[0], normalize=True, device="cpu")
    np.testing.assert_allclose(unit, expected[0] / np.linalg.norm(expected[0]), rtol=1e-4, atol=1e-6)
    assert hfvit.embed(classifier, []).shape == (0, expected.shape[1])


OTHER_HEADS = {
    "crossvit_9_240": (240, {"embed_dim": (16, 32), "depth": [[1, 1, 0]], "num_heads": (2, 2)}),  # two heads
    "deit_tiny_distilled_patch16_224": (16, MICRO),  # two heads, of two tokens
    "levit_128s": (224, {"embed_dim": (16, 24, 32), "depth": (1, 1, 1), "key_dim": 8, "num_heads": (2, 2, 2)}),
    "repvit_m0_9": (32, {"embed_dim": (8, 8, 16, 16), "depth": (1, 1, 1, 1)}),  # batch norm before the linear layer
}


@pytest.mark.parametrize("architecture", OTHER_HEADS)
def test_embed_of_another_head_equals_timms_pooled_features(architecture, tmp_path):
    image_size, arguments = OTHER_HEADS[architecture]
    images = write_images(tmp_path / "images", 3)
    model = build_model(LABELS, architecture=architecture, image_size=image_size, timm_kwargs=arguments)
    model.save_pretrained(tmp_path / "run")
    classifier = load_classifier(tmp_path / "run", device="cpu")
    network = classifier.backend.model.timm_model
    pixels = torch.from_numpy(classifier.pixel_values(images))
    with torch.inference_mode():
        expected = network.forward_head(network.forward_features(pixels), pre_logits=True).numpy()
    logits = classifier.logits(images)
    np.testing.assert_allclose(hfvit.embed(classifier, images, batch_size=2), expected, rtol=1e-5, atol=1e-6)
    assert hfvit.embed(classifier, []).shape == (0, expected.shape[1])
    np.testing.assert_array_equal(classifier.logits(images), logits)  # the network is as before
    output = tmp_path / "features.parquet"
    assert command(tmp_path / "run", tmp_path / "images", "--output", output, "--device", "cpu") == 0
    np.testing.assert_allclose(np.stack(parquet.read_table(output)["features"].to_numpy()), expected, atol=1e-5)


def test_embed_of_another_head_during_a_call_equals_that_alone(tmp_path):
    images = write_images(tmp_path / "images", 3)
    model = build_model(LABELS, architecture="deit_tiny_distilled_patch16_224", image_size=16, timm_kwargs=MICRO)
    model.save_pretrained(tmp_path / "run")
    classifier = load_classifier(tmp_path / "run", device="cpu")
    inner = []

    def embedded():
        for image in images:
            inner.append(hfvit.embed(classifier, image))
            yield image

    outer = hfvit.embed(classifier, embedded())
    np.testing.assert_allclose(outer, inner, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(outer, hfvit.embed(classifier, images))


def test_embed_of_a_stock_model_is_the_input_of_its_classifier(stock):
    image = colored_image(0, np.random.default_rng(0), size=16)
    model = ViTForImageClassification.from_pretrained(stock).eval()
    pixels = ViTImageProcessor.from_pretrained(stock)(image, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = model.vit(pixels).last_hidden_state[0, 0].numpy()
    np.testing.assert_allclose(hfvit.embed(stock, image, device="cpu"), expected, rtol=1e-4, atol=1e-5)


def test_embed_of_images_of_several_sizes_equals_that_of_each(tmp_path):
    """The image processor resizes the shorter side, and does not crop."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"shortest_edge": 24}).save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((30, 40), (40, 30), (30, 40))]
    classifier = load_classifier(tmp_path, device="cpu")
    wanted = np.stack([hfvit.embed(classifier, image) for image in images])
    np.testing.assert_allclose(hfvit.embed(classifier, images), wanted, atol=1e-5)


def test_embed_command_writes_names_and_features(checkpoint, tmp_path, capsys):
    images = write_images(tmp_path / "images")
    (tmp_path / "images" / "1b.png").write_bytes(b"no image")
    output = tmp_path / "features.parquet"
    assert command(checkpoint, tmp_path / "images", "--output", output, "--normalize", "--device", "cpu") == 1
    table = parquet.read_table(output)
    assert table["image"].to_pylist() == [str(tmp_path / "images" / f"{index}.png") for index in range(3)]
    found = np.stack(table["features"].to_numpy())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, hfvit.embed(checkpoint, images, normalize=True, device="cpu"), atol=1e-6)
    assert "1b.png" in capsys.readouterr().err


def test_embed_of_an_export_names_the_argument(tmp_path, capsys):
    write_graph(tmp_path / "onnx" / "model.onnx")
    write_configs(tmp_path / "onnx")
    write_images(tmp_path / "images")
    assert command(tmp_path / "onnx", tmp_path / "images", "--output", tmp_path / "features.parquet") == 2
    assert option_of(capsys.readouterr().err) == "ARTIFACT"
    assert command(tmp_path / "onnx", tmp_path / "images", "--output", tmp_path / "features.csv") == 2
    assert option_of(capsys.readouterr().err) == "output"


def test_embed_masks_credentials_in_the_file(checkpoint, tmp_path, monkeypatch):
    (image,) = write_images(tmp_path / "images", 1)
    monkeypatch.setattr("hfvit.inference.predict.read_image", lambda name: image)
    url = "https://user:secret@example.org/0.png"
    assert command(checkpoint, url, "--output", tmp_path / "features.parquet") == 0
    names = parquet.read_table(tmp_path / "features.parquet")["image"].to_pylist()
    assert names == ["https://***@example.org/0.png"]


def test_embed_writes_file_names_as_they_are(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("MYSQL_PASSWORD", "wordpress")
    write_images(tmp_path / "wordpress", 1)
    assert command(checkpoint, tmp_path / "wordpress", "--output", tmp_path / "features.parquet") == 0
    names = parquet.read_table(tmp_path / "features.parquet")["image"].to_pylist()
    assert names == [str(tmp_path / "wordpress" / "0.png")]


def test_features_that_are_not_finite_are_left_out_of_the_file(checkpoint, tmp_path, capsys):
    images = write_images(tmp_path / "images", 2)
    model = load_classifier(checkpoint, device="cpu").backend.model
    weight = model.timm_model.patch_embed.proj.weight
    with torch.no_grad():
        weight[:] = torch.inf
    model.save_pretrained(checkpoint)
    assert not np.isfinite(hfvit.embed(checkpoint, images, device="cpu")).any()
    output = tmp_path / "features.parquet"
    assert command(checkpoint, tmp_path / "images", "--output", output, "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert_names(error, "0.png", "1.png")
    assert option_of(error.splitlines()[-1]) == "IMAGE"
    assert parquet.read_table(output).num_rows == 0
