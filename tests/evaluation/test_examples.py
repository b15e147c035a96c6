"""Selection of example images and mistakes, and explanation maps."""

import csv

import numpy as np
import pytest
import torch
from helpers.images import LABELS
from helpers.micro_trainer import parts
from helpers.models import build_model

from hfvit.artifacts.run_record import read_examples
from hfvit.artifacts.run_sections import ExampleImages
from hfvit.evaluation.examples import (
    ClassAnswers,
    Examples,
    LabelAnswers,
    images_of_all_classes,
)
from hfvit.models.explain import GRADIENT_ATTENTION
from hfvit.report.figures import source_of


def test_mistakes_are_sorted_by_confidence():
    logits = np.array([[9.0, 0, 0], [0, 1, 0], [0, 4, 0], [0, 0, 2]])
    assert ClassAnswers(logits, np.array([0, 0, 0, 0]), LABELS).wrong.tolist() == [2, 3, 1]
    assert ClassAnswers(logits, np.array([0, 1, 1, 2]), LABELS).wrong.tolist() == []


def test_likely_label_errors_are_the_confident_disagreements_of_a_good_model():
    labels = np.arange(60) % 3
    logits = 5.0 * np.eye(3)[labels]
    logits[:30] *= 0.5  # below the mean confidence
    labels[[3, 40]] = (labels[[3, 40]] + 1) % 3
    answers = ClassAnswers(logits, labels, LABELS)
    assert answers.wrong.tolist() == [40, 3]
    assert answers.label_errors.tolist() == [40]
    assert ClassAnswers(logits, np.roll(labels, 1), LABELS).label_errors.tolist() == []  # a model that is often wrong


def test_images_of_all_classes_covers_many_classes():
    labels = np.array([2, 2, 0, 0, 0, 1])
    assert images_of_all_classes(labels, count=4).tolist() == [2, 5, 0, 3]
    assert images_of_all_classes(labels, count=100).tolist() == [2, 5, 0, 3, 1, 4]
    many = np.repeat(np.arange(50), 3)
    assert many[images_of_all_classes(many, count=8)].tolist() == [0, 7, 14, 21, 28, 35, 42, 49]


def test_answers_of_several_labels_name_all_and_the_worst_mistake_first():
    logits = np.log([[0.9, 0.2, 0.1], [0.9, 0.8, 0.4], [0.1, 0.1, 0.1], [0.45, 0.1, 0.1]])
    logits -= np.log1p(-np.exp(logits))
    targets = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 0, 0]])
    answers = LabelAnswers(logits, targets, LABELS, [0.5, 0.5, 0.3])
    assert answers.wrong.tolist() == [1, 3]
    assert answers.describe(1) == {
        "true": "green, blue",
        "predicted": "red, green, blue",
        "confidence": pytest.approx(0.9),
    }
    assert answers.describe(3) == {"true": "red", "predicted": "none", "confidence": pytest.approx(0.55)}
    assert answers.describe(2) == {"true": "none", "predicted": "none", "confidence": pytest.approx(0.9)}
    assert answers.of_all_classes.tolist() == [0, 1, 3]


@pytest.fixture(scope="module")
def validation():
    model, _, dataset, preprocessing = parts()
    rng = np.random.default_rng(0)
    return model, dataset, preprocessing, rng.normal(size=(13, 3)).astype(np.float32)


def gathered(validation) -> Examples:
    _, dataset, _, logits = validation
    answers = ClassAnswers(logits, dataset.labels, LABELS)
    return Examples("validation", dataset, 100 + np.arange(13), answers, lambda place: f"cat,=1/{place}.png")


def test_examples_have_images_maps_and_predictions(validation, tmp_path):
    model, dataset, preprocessing, logits = validation
    model.train()
    examples = gathered(validation)
    examples.add_explanations(model, preprocessing, torch.device("cpu"))
    assert model.training
    examples.write(tmp_path)
    kept = read_examples(tmp_path, examples.record)
    wrong = np.flatnonzero(logits.argmax(1) != dataset.labels)
    assert examples.record.split == "validation"
    assert {entry.row for entry in examples.record.mistakes} == set(100 + wrong)
    for entry, picture in zip(examples.record.mistakes, kept["mistakes"], strict=True):
        place = entry.row - 100
        assert (picture == dataset.reader.for_evaluation(np.array([place]))["images"][0].numpy()).all()
        assert (entry.true, entry.predicted) == (LABELS[dataset.labels[place]], LABELS[logits[place].argmax()])
        assert entry.file == f"cat,=1/{place}.png"
    assert examples.record.explanation_method == GRADIENT_ATTENTION
    assert kept["explanation_maps"].shape == (8, 2, 2)
    assert kept["explanation_maps"].max(axis=(1, 2)) == pytest.approx(np.ones(8), abs=1e-5)
    with (tmp_path / "mistakes.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert examples.record.wrong == len(rows) == len(wrong)
    assert {int(row["row"]) for row in rows} == set(100 + wrong)
    confidences = [float(row["confidence"]) for row in rows]
    assert confidences == sorted(confidences, reverse=True)
    assert (rows[0]["true"], rows[0]["file"]) == (examples.record.mistakes[0].true, examples.record.mistakes[0].file)


def test_unknown_rows_are_left_out(validation, tmp_path):
    _, dataset, _, logits = validation
    examples = Examples("validation", dataset, None, ClassAnswers(logits, dataset.labels, LABELS))
    examples.write(tmp_path)
    assert {entry.row for entry in ExampleImages.from_json(examples.record.to_json()).mistakes} == {None}
    assert {source_of(entry) for entry in examples.record.mistakes} == {""}
    with (tmp_path / "mistakes.csv").open(encoding="utf-8", newline="") as file:
        assert {row["row"] for row in csv.DictReader(file)} == {""}


def test_sharded_weights_have_no_explanation_maps(validation):
    examples = gathered(validation)
    examples.add_explanations(validation[0], validation[2], torch.device("cpu"), is_sharded=True)
    assert examples.record.explanations_left_out
    assert "explanations" not in examples.arrays


def test_model_without_explanation_maps_records_the_reason(validation):
    examples = gathered(validation)
    model = build_model(LABELS, architecture="test_resnet", image_size=32)
    model.timm_model.forward = lambda pixels: pixels.mean(dim=(2, 3))
    examples.add_explanations(model, validation[2], torch.device("cpu"))
    assert examples.record.explanations_left_out
    assert examples.record.explanations == []
    assert "explanations" not in examples.arrays
