"""`hfvit extend`: new classes from a few images, as a loadable checkpoint."""

import json
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from helpers.images import colored_image
from helpers.loopback_hub import LoopbackHub
from helpers.messages import option_of
from helpers.recipes import write_micro_recipe
from PIL import Image
from safetensors.torch import load_file, save
from sklearn.neighbors import NearestCentroid
from transformers import AutoModelForImageClassification

import hfvit
from hfvit.artifacts.artifact import find_artifact
from hfvit.cli import main
from hfvit.demo.run_results import read_results
from hfvit.errors import DataError, ModelError
from hfvit.evaluation.extend import Rows, fit_prototypes, leave_one_out_scores, new_accuracy, prototype_scores
from hfvit.evaluation.split import evaluation_split
from hfvit.pipeline import main as train


def clusters(count, images, dimensions=8, seed=0, spread=0.1):
    """Return features and labels of well separated classes."""
    rng = np.random.default_rng(seed)
    centers = 5 + rng.normal(size=(count, dimensions))
    labels = np.arange(count * images) % count
    return (centers[labels] + spread * rng.normal(size=(len(labels), dimensions))).astype(np.float32), labels


def test_prototype_scores_order_classes_as_the_nearest_centroid():
    features, labels = clusters(6, 20, spread=1.0)
    means = np.stack([features[labels == label].mean(axis=0) for label in range(6)])
    scores = prototype_scores(features, means, features.mean(axis=0))
    expected = NearestCentroid().fit(features, labels).predict(features)
    assert scores.argmax(axis=1).tolist() == expected.tolist()


def test_leave_one_out_scores_equal_those_without_the_image():
    features, labels = clusters(3, 4, spread=1.0)
    new = [features[labels == label] for label in range(3)]
    center = features.mean(axis=0)
    scores, found = leave_one_out_scores(new, center)
    assert found.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    rest = [new[0][1:], new[1], new[2]]
    means = np.stack([some.mean(axis=0) for some in rest])
    np.testing.assert_allclose(scores[0], prototype_scores(new[0][:1], means, center)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_fit_prototypes_separates_old_and_new_classes(seed):
    features, labels = clusters(9, 20, seed=seed)
    is_old = labels < 5
    centers = np.stack([features[labels == label].mean(axis=0) for label in range(5)])
    weight, bias = 10 * centers, -5 * (centers**2).sum(axis=1)
    new = [features[labels == label][:5] for label in range(5, 9)]
    rows = fit_prototypes(weight, bias, features[is_old], labels[is_old], new)
    logits = np.concatenate([features @ weight.T + bias, features @ rows.weight.T + rows.bias], axis=1)
    assert (logits.argmax(axis=1) == labels).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory, colors):
    folder = tmp_path_factory.mktemp("extend")
    train([str(write_micro_recipe(folder, colors)), "--num_train_epochs", "4"])
    return folder / "out"


def write_classes(folder, names=("black", "white"), images=4):
    rng = np.random.default_rng(1)
    for name, level in zip(names, (0, 255), strict=False):
        (folder / name).mkdir(parents=True)
        for index in range(images):
            noise = rng.integers(0, 20, (20, 20, 3))
            Image.fromarray(np.abs(level - noise).astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


def command(*words):
    with pytest.raises(SystemExit) as stop:
        main(["extend", *map(str, words)])
    return stop.value.code


def test_extended_checkpoint_has_old_logits_and_new_classes(run, tmp_path, capsys):
    new = write_classes(tmp_path / "new")
    (new / "black" / "bad.png").write_bytes(b"no image")
    target = tmp_path / "extended"
    assert command(run, new, "--output_dir", target, "--device", "cpu") in (None, 0)
    record = json.loads((target / "extension.json").read_text())
    assert record["new_classes"] == ["black", "white"]
    assert record["images"] == [4, 4]
    assert record["new_accuracy"] >= 0.75
    assert record["old_accuracy"] >= record["old_accuracy_before"] - 0.1
    images = [colored_image(index, np.random.default_rng(2)) for index in range(3)]
    before = hfvit.load_classifier(run, device="cpu")
    after = hfvit.load_classifier(target, device="cpu")
    assert after.labels == [*before.labels, "black", "white"]
    np.testing.assert_allclose(after.logits(images)[:, :3], before.logits(images), rtol=1e-5, atol=1e-6)
    stock = AutoModelForImageClassification.from_pretrained(target).eval()
    pixels = torch.from_numpy(after.pixel_values(images))
    with torch.inference_mode():
        np.testing.assert_allclose(stock(pixels).logits.numpy(), after.logits(images), rtol=1e-5, atol=1e-6)
    assert next(iter(after(Image.new("RGB", (20, 20), "black")))) == "black"
    assert next(iter(after(Image.new("RGB", (20, 20), "white")))) == "white"
    assert [path.name for path in target.iterdir() if path.name.startswith(".")] == []


def test_accuracies_of_old_classes_are_of_images_that_fitted_nothing(run, tmp_path):
    target = tmp_path / "extended"
    record = hfvit.extend(run, write_classes(tmp_path / "new"), target, split="test", device="cpu")
    split = evaluation_split(run, split="test")
    images, labels = list(split.images())[1::2], split.labels[1::2]
    assert record.old_images == len(labels) == 15
    for folder, accuracy in ((run, record.old_accuracy_before), (target, record.old_accuracy)):
        predicted = hfvit.load_classifier(folder, device="cpu").logits(images).argmax(axis=1)
        assert accuracy == (predicted == labels).mean()


def test_new_accuracy_leaves_out_classes_of_one_image():
    weight, bias = np.eye(2, 8), np.zeros(2)
    rows = Rows(weight, bias, scale=1.0, offset=-10.0, center=np.zeros(8))
    many = np.tile(10 * np.eye(8)[2], (4, 1)) + np.eye(4, 8)
    one = np.eye(8)[:1]  # its old class has the larger logit
    assert new_accuracy(weight, bias, rows, [many, one]) == 1.0
    assert new_accuracy(weight, bias, rows, [many[:1], one]) is None


def test_extend_of_a_hub_id_reads_its_revision(run, colors, tmp_path, monkeypatch):
    """The main branch has other weights."""
    files = {name: (run / name).read_bytes() for name in ("config.json", "model.safetensors")}
    zeros = {name: torch.zeros_like(value) for name, value in load_file(run / "model.safetensors").items()}
    new, options = write_classes(tmp_path / "new"), {"dataset_name": str(colors), "split": "test", "device": "cpu"}
    with LoopbackHub() as hub:
        hub.take_over(monkeypatch, tmp_path / "cache")
        repository = hub.create("user/vit", files=files | {"model.safetensors": save(zeros, {"format": "pt"})})
        hub.create("user/other", files=files)  # stores the weights
        other = hub.model("user/other")
        repository.commit(other.commits[other.resolve("main")], "trained", "v1")
        found = hfvit.extend("user/vit", new, tmp_path / "out", revision="v1", **options)
    assert found == hfvit.extend(run, new, tmp_path / "local", **options)
    extended, local = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "local"))
    assert extended.keys() == local.keys()
    for name, value in extended.items():
        torch.testing.assert_close(value, local[name])
    with pytest.raises(ModelError, match=r"^--revision: "):
        hfvit.extend(run, new, tmp_path / "none", revision="v1", **options)
    assert command(run, new, "--output_dir", tmp_path / "none", "--revision", "v1") == 2
    assert not (tmp_path / "none").exists()


def test_extend_joins_folders_whose_names_are_one_class_in_unicode(run, tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    new = write_classes(tmp_path / "new", (composed, decomposed))
    first = hfvit.extend(run, new, tmp_path / "first", device="cpu")
    assert (first.new_classes, first.images) == ([composed], [8])
    shutil.rmtree(new / composed)
    with pytest.raises(DataError, match=r"^FOLDER:"):  # already a class
        hfvit.extend(tmp_path / "first", new, tmp_path / "second", dataset_name=str(new), split="train")


def test_checkpoint_in_the_folder_of_a_run_has_its_recipe_but_not_its_temperature(run, tmp_path, capsys):
    out = shutil.copytree(run, tmp_path / "out")
    content = json.loads((out / "run.json").read_text())
    content["temperature"] = {**content["temperature"], "value": 3.5}
    (out / "run.json").write_text(json.dumps(content))
    extended = out / "extended"
    hfvit.extend(out, write_classes(tmp_path / "new"), extended, device="cpu")
    artifact = find_artifact(extended)
    assert artifact.beside("recipe.yaml") == (out / "recipe.yaml").resolve()
    assert read_results(artifact).score is None
    with pytest.raises(ModelError, match=r"^calibrated:"):
        hfvit.load_classifier(extended, calibrated=True)


def test_extend_with_wrong_arguments_names_them(run, tmp_path, capsys):
    known = write_classes(tmp_path / "known", ("red", "white"))
    empty = tmp_path / "empty"
    (empty / "class").mkdir(parents=True)
    for folder, target, option in (
        (known, tmp_path / "out", "FOLDER"),
        (empty, tmp_path / "out", "FOLDER"),
        (tmp_path / "missing", tmp_path / "out", "FOLDER"),
        (known, run, "output_dir"),
    ):
        assert command(run, folder, "--output_dir", target) == 2
        assert option_of(capsys.readouterr().err) == option
    assert not (tmp_path / "out").exists()
