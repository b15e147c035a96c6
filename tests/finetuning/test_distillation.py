"""Class imbalance and distillation: sampling, weights and losses, and complete runs."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.images import LABELS
from helpers.micro_trainer import assert_resumes_exactly, make_trainer, parts
from helpers.models import build_model
from helpers.recipes import ARCHITECTURE, MICRO
from safetensors.torch import load_file
from sklearn.utils.class_weight import compute_class_weight
from transformers import AutoModelForImageClassification

from hfvit.data.samplers import BalancedSampler, occurrences
from hfvit.errors import ModelError, RecipeError
from hfvit.finetuning.distillation import Objective, Teacher, build_objective
from hfvit.finetuning.factory import class_weights
from hfvit.pipeline import main
from hfvit.recipe.loader import load_recipe
from hfvit.training.losses import cross_entropy, hard_distillation, soft_distillation

UNEQUAL = np.array([0] * 50 + [1] * 8 + [2] * 3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Save a teacher with reordered classes, larger images and another normalization."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(8)
    names = [LABELS[2], "white", LABELS[0], LABELS[1]]
    model = build_model(names, architecture=ARCHITECTURE, image_size=24, timm_kwargs=MICRO)
    model.config.set_preprocessing(mean=[0.2, 0.3, 0.4], std=[0.5, 0.25, 0.1])
    torch.nn.init.normal_(model.timm_model.head.weight)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("repeats", [1, 3])
def test_balanced_sampler_samples_classes_and_their_images_equally(repeats):
    sampler = BalancedSampler(UNEQUAL, global_batch_size=12, seed=4, repeats=repeats)
    sampler.set_epoch(1)
    pairs = list(sampler)
    assert len(pairs) == len(sampler) == 60
    assert len(set(pairs)) == 60  # no image is augmented twice in the same way
    assert pairs == list(sampler)
    counts_of_rows = Counter(row for _, row in pairs)
    counts_of_classes = Counter(UNEQUAL[row] for _, row in pairs)
    assert max(counts_of_classes.values()) - min(counts_of_classes.values()) <= repeats
    for label in range(3):
        counts = [counts_of_rows[row] for row in np.flatnonzero(label == UNEQUAL)]
        assert max(counts) - min(counts) <= repeats
    sampler.set_epoch(2)
    assert not set(pairs) & set(sampler)


def test_balanced_sampler_samples_other_images_in_each_epoch():
    labels = np.repeat(np.arange(5), [4, 4, 4, 4, 44])
    sampler = BalancedSampler(labels, global_batch_size=8, seed=0)
    larger, seen = set(), set()
    for epoch in range(8):
        sampler.set_epoch(epoch)
        rows = np.array([row for _, row in sampler])
        counts = np.bincount(labels[rows])
        assert sorted(counts) == [11, 11, 11, 11, 12]
        assert len(set(labels[rows[:11]])) > 1  # classes are mixed
        larger.add(counts.argmax())
        seen.update(rows[labels[rows] == 4])
    assert len(larger) > 2
    assert len(seen) > 30
    assert list(BalancedSampler(labels, global_batch_size=8, seed=1)) != list(BalancedSampler(labels, 8, seed=0))


def test_class_weights_of_several_labels_are_negatives_over_positives():
    targets = np.zeros((1000, 5))
    targets[:500, 0] = targets[:100, 1] = targets[:1, 2] = 1
    targets[:, 4] = 1  # a weight of 0 would leave the class untrained
    assert class_weights(targets, 5).tolist() == [1.0, 9.0, 100.0, 1.0, 0.01]


def test_occurrences_count_repeated_values():
    assert occurrences(np.array([5, 2, 5, 5, 2, 9])).tolist() == [0, 0, 1, 2, 1, 0]


def test_class_weights_equal_scikit_learns():
    expected = compute_class_weight("balanced", classes=np.arange(3), y=UNEQUAL)
    np.testing.assert_allclose(class_weights(UNEQUAL, 3), expected)
    np.testing.assert_allclose(class_weights(UNEQUAL, 4), [*expected, 0.0])


def test_cross_entropy_with_class_weights_is_a_mean_over_images():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 0, 1])
    weights = torch.tensor([0.5, 2.0, 4.0])
    each = -torch.log_softmax(logits, 1)[torch.arange(6), labels] * weights[labels]
    torch.testing.assert_close(cross_entropy(logits, labels, class_weights=weights), each.mean())
    soft = torch.nn.functional.one_hot(labels, 3).float()
    torch.testing.assert_close(cross_entropy(logits, soft, class_weights=weights), each.mean())


def test_distillation_losses_equal_their_formulas():
    student, teacher = torch.randn(5, 3), torch.randn(5, 3)
    p, q = torch.softmax(teacher / 3, 1), torch.softmax(student / 3, 1)
    torch.testing.assert_close(soft_distillation(student, teacher, 3.0), 9 * (p * (p / q).log()).sum(1).mean())
    hard = -torch.log_softmax(student, 1)[torch.arange(5), teacher.argmax(1)].mean()
    torch.testing.assert_close(hard_distillation(student, teacher), hard)


def test_teacher_renormalizes_and_resizes_the_student_images(teacher):
    student, *_ = parts()
    asked = Teacher(str(teacher), LABELS, student)
    image = torch.rand(3, 3, 24, 24)
    view = {key: torch.tensor(student.config.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std")}
    teacher_logits = asked((image - view["mean"]) / view["std"])
    own = torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1), torch.tensor([0.5, 0.25, 0.1]).view(3, 1, 1)
    direct = AutoModelForImageClassification.from_pretrained(teacher).eval()((image - own[0]) / own[1]).logits
    torch.testing.assert_close(teacher_logits, direct[:, [2, 3, 0]].detach(), atol=1e-5, rtol=1e-4)
    assert asked(torch.rand(2, 3, 16, 16)).shape == (2, 3)
    assert not asked.train().model.training
    with pytest.raises(ModelError, match=r"^teacher: .*'violet'"):
        Teacher(str(teacher), ["red", "violet"], student)
    with pytest.raises(ModelError, match=r"^teacher: .*\./nothing\b"):
        Teacher("./nothing", LABELS, student)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_objective_is_the_weighted_sum(teacher, kind):
    model, *_ = parts()
    objective = build_objective(model, [1.0, 2.0, 0.5], str(teacher), kind, alpha=0.3, temperature=2.0)
    pixels, labels, logits = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 2]), torch.randn(4, 3)
    teacher_logits = objective.teacher(pixels)
    distillation = (
        hard_distillation(logits, teacher_logits) if kind == "hard" else soft_distillation(logits, teacher_logits, 2.0)
    )
    own = cross_entropy(logits, labels, 0.1, torch.tensor([1.0, 2.0, 0.5]))
    torch.testing.assert_close(objective(logits, labels, pixels, 0.1), 0.7 * own + 0.3 * distillation)
    other = torch.randn(4, 3)
    distillation = (
        hard_distillation(other, teacher_logits) if kind == "hard" else soft_distillation(other, teacher_logits, 2.0)
    )
    torch.testing.assert_close(objective((logits, other), labels, pixels, 0.1), 0.7 * own + 0.3 * distillation)
    assert build_objective(model) is None


def test_resumed_run_with_balanced_sampler_and_teacher_equals_uninterrupted(tmp_path, teacher):
    def prepared(folder, callbacks=None):
        trainer = make_trainer(folder, callbacks, per_device_train_batch_size=4)
        taught_by = Teacher(str(teacher), LABELS, trainer.model)
        trainer.objective, trainer.balanced = Objective([1.0, 2.0, 0.5], taught_by), True
        return trainer

    assert_resumes_exactly(prepared, tmp_path)


def test_train_of_distilled_deit_trains_both_tokens(recipe, teacher, tmp_path):
    text = recipe.read_text().replace(ARCHITECTURE, "deit_tiny_distilled_patch16_224")
    text = text.replace("num_train_epochs: 2", "num_train_epochs: 1")
    recipe.write_text(f"{text}teacher: {teacher}\ndistillation: hard\nclass_balance: sample\n")
    main([str(recipe)])
    out = tmp_path / "out"
    record = json.loads((out / "run.json").read_text())
    assert record["recipe"]["distillation"] == "hard"
    saved = load_file(out / "model.safetensors")
    assert not torch.equal(saved["head.weight"], saved["head_dist.weight"])
    assert saved["head_dist.bias"].any()
    teacher_logits = AutoModelForImageClassification.from_pretrained(out).eval()(torch.zeros(1, 3, 16, 16)).logits
    assert teacher_logits.shape == (1, 3)


def test_class_balance_with_streaming_raises(recipe):
    options = ("--streaming", "true", "--validation_split", "test", "--test_split", "other")
    with pytest.raises(RecipeError, match=r"^--class_balance: .*'weight'"):
        load_recipe([str(recipe), "--class_balance", "weight", *options])
