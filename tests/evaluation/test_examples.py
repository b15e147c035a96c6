"""Selection of example images, and attention rollout against its definition."""

import numpy as np
import pytest
import torch
from helpers.images import LABELS
from helpers.micro_trainer import parts
from helpers.models import build_model

from hfvit.artifacts.run_record import read_examples
from hfvit.errors import ModelError
from hfvit.evaluation.examples import (
    ClassAnswers,
    Examples,
    LabelAnswers,
    images_of_all_classes,
    most_confident_mistakes,
)
from hfvit.models.attention import attention_rollout


def test_most_confident_mistakes_are_sorted_by_confidence():
    logits = np.array([[9.0, 0, 0], [0, 1, 0], [0, 4, 0], [0, 0, 2]])
    assert most_confident_mistakes(logits, np.array([0, 0, 0, 0])).tolist() == [2, 3, 1]
    assert most_confident_mistakes(logits, np.array([0, 0, 0, 0]), count=1).tolist() == [2]
    assert most_confident_mistakes(logits, np.array([0, 1, 1, 2])).tolist() == []


def test_images_of_all_classes_covers_many_classes():
    labels = np.array([2, 2, 0, 0, 0, 1])
    assert images_of_all_classes(labels, count=4).tolist() == [2, 5, 0, 3]
    assert images_of_all_classes(labels, count=100).tolist() == [2, 5, 0, 3, 1, 4]
    many = np.repeat(np.arange(50), 3)
    assert many[images_of_all_classes(many, count=8)].tolist() == [0, 7, 14, 21, 28, 35, 42, 49]


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_rollout_equals_the_product_of_averaged_maps(prefix):
    torch.manual_seed(0)
    grid, tokens = (2, 3), 6 + prefix
    maps = [torch.rand(2, 4, tokens, tokens).softmax(dim=-1) for _ in range(3)]
    found = attention_rollout(tuple(maps), grid)
    product = np.eye(tokens)[None].repeat(2, 0)
    for layer in maps:
        with_residual = layer.double().numpy().mean(1) + np.eye(tokens)
        product = np.einsum("bij,bjk->bik", with_residual / with_residual.sum(-1, keepdims=True), product)
    row = product[:, 0] if prefix else product.mean(1)
    expected = row[:, prefix:] / row[:, prefix:].sum(-1, keepdims=True)
    assert found.shape == (2, 2, 3)
    assert found.numpy() == pytest.approx(expected.reshape(2, 2, 3), abs=1e-6)


def test_rollout_of_other_tokens_than_patches_is_an_error():
    maps = (torch.rand(1, 2, 7, 7), torch.rand(1, 2, 5, 5))
    with pytest.raises(ModelError):
        attention_rollout(maps, (2, 3))


def test_answers_of_several_labels_name_all_and_the_worst_mistake_first():
    logits = np.log([[0.9, 0.2, 0.1], [0.9, 0.8, 0.4], [0.1, 0.1, 0.1], [0.45, 0.1, 0.1]])
    logits -= np.log1p(-np.exp(logits))
    targets = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 0, 0]])
    answers = LabelAnswers(logits, targets, LABELS, [0.5, 0.5, 0.3])
    assert answers.mistakes.tolist() == [1, 3]
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
    return Examples("validation", dataset, 100 + np.arange(13), ClassAnswers(logits, dataset.labels, LABELS))


def test_examples_have_images_maps_and_predictions(validation, tmp_path):
    model, dataset, preprocessing, logits = validation
    model.train()
    examples = gathered(validation)
    examples.add_attention(model, preprocessing, torch.device("cpu"))
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
    assert kept["attention_maps"].shape == (8, 2, 2)
    assert kept["attention_maps"].sum(axis=(1, 2)) == pytest.approx(np.ones(8), abs=1e-5)


def test_sharded_weights_have_no_attention_maps(validation):
    examples = gathered(validation)
    examples.add_attention(validation[0], validation[2], torch.device("cpu"), is_sharded=True)
    assert examples.record.attention_left_out
    assert "attention" not in examples.arrays


def test_model_without_attention_maps_records_the_reason(validation):
    examples = gathered(validation)
    model = build_model(LABELS, architecture="test_resnet", image_size=32)
    examples.add_attention(model, validation[2], torch.device("cpu"))
    assert examples.record.attention_left_out
    assert examples.record.attention == []
    assert "attention" not in examples.arrays
