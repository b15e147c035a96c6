"""Feature distillation, against timm's FeatureDistillationTask."""

import json

import pytest
import torch
from helpers.images import LABELS
from helpers.micro_trainer import assert_resumes_exactly, make_trainer, parts
from helpers.models import build_model
from helpers.recipes import ARCHITECTURE
from safetensors.torch import load_file
from timm.task import FeatureDistillationTask
from transformers import AutoModelForImageClassification

from hfvit.artifacts.run_record import RunRecord
from hfvit.errors import ModelError, RecipeError
from hfvit.finetuning.distillation import FeatureTeacher, build_objective
from hfvit.models.modeling import HFViTForImageClassification
from hfvit.pipeline import main

RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 24], "stem_width": 8}


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """Save a ResNet with other classes, the student's image size and another normalization."""
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(8)
    model = build_model(["cat", "dog"], architecture="resnet10t", image_size=16, timm_kwargs=RESNET)
    model.config.set_preprocessing(mean=[0.2, 0.3, 0.4], std=[0.5, 0.25, 0.1])
    model.save_pretrained(folder)
    return folder


def test_loss_equals_timms_task(resnet):
    model, *_ = parts()
    objective = build_objective(model, teacher=str(resnet), distillation="feature", alpha=0.3)
    teacher = HFViTForImageClassification.from_pretrained(resnet)
    teacher.timm_model.pretrained_cfg = {**teacher.timm_model.pretrained_cfg, **teacher.config.pretrained_cfg}
    model.timm_model.pretrained_cfg = {**model.timm_model.pretrained_cfg, **model.config.pretrained_cfg}
    student = model.timm_model
    projection = student.feature_projection
    assert projection.weight.shape == (24, 32)
    pixels, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 2])
    loss = objective(model.train()(pixels).logits, labels, pixels)
    task = FeatureDistillationTask(
        student, teacher.timm_model, torch.nn.CrossEntropyLoss(), distill_loss_weight=0.3, task_loss_weight=0.7,
        verbose=False,
    )  # fmt: skip
    task.trainable_module.projection = projection
    expected = task(pixels, labels)["loss"]
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, projection.weight)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)
    assert model.eval()(pixels).logits.shape == (4, 3)
    assert model.remove_feature_projection() == 24 * 33
    assert model.train()(pixels).logits.shape == (4, 3)


def test_teacher_resizes_images_and_needs_no_head(resnet, tmp_path):
    student, *_ = parts()
    backbone = build_model(LABELS, architecture=ARCHITECTURE, image_size=24, timm_kwargs={"patch_size": 8, "depth": 1})
    backbone.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_classes": 0, "label_names": []}))
    assert FeatureTeacher(str(tmp_path), student)(torch.randn(2, 3, 16, 16)).shape == (2, 192)
    assert FeatureTeacher(str(resnet), student)(torch.randn(2, 3, 40, 40)).shape == (2, 24)
    with pytest.raises(ModelError, match=r"^teacher: .*\./nothing\b"):
        FeatureTeacher("./nothing", student)


def test_resumed_run_equals_uninterrupted(tmp_path, resnet):
    def prepared(folder, callbacks=None):
        trainer = make_trainer(folder, callbacks, per_device_train_batch_size=4)
        trainer.objective = build_objective(trainer.model, teacher=str(resnet), distillation="feature")
        return trainer

    assert_resumes_exactly(prepared, tmp_path)


def test_run_with_a_trained_resnet_as_teacher_saves_no_projection(recipe, tmp_path):
    text = recipe.read_text().replace("num_train_epochs: 2", "num_train_epochs: 1")
    recipe.write_text(text)
    (tmp_path / "teacher.yaml").write_text(
        text.replace(ARCHITECTURE, "resnet10t")
        .replace("{patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}", str(RESNET))
        .replace("image_size: 16", "image_size: 32")
    )
    main([str(tmp_path / "teacher.yaml"), "--output_dir", str(tmp_path / "teacher")])
    main([str(recipe), "--teacher", str(tmp_path / "teacher"), "--distillation", "feature", "--ema_decay", "0.9"])
    out = tmp_path / "out"
    record = RunRecord.load(out)
    assert record.model.trained_parameters == record.model.parameters
    assert not [name for name in load_file(out / "model.safetensors") if "projection" in name]
    assert AutoModelForImageClassification.from_pretrained(out)(torch.zeros(1, 3, 16, 16)).logits.shape == (1, 3)


def test_sharded_weights_are_one_error(resnet, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match=r"^distillation: "):
        build_objective(parts()[0], teacher=str(resnet), distillation="feature")
