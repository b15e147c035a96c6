"""LoRA: trained layers, resuming, saving and merging, against peft."""

import pytest
import torch
from helpers.images import LABELS
from helpers.micro_trainer import assert_resumes_exactly, make_trainer, weights
from helpers.models import build_model
from helpers.recipes import ARCHITECTURE, MICRO

import hfvit.finetuning.lora
from hfvit.artifacts.checkpoint import check_same_model, newest_checkpoint
from hfvit.errors import ModelError
from hfvit.finetuning.lora import add_lora, target_layers

PIXELS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model.eval()(PIXELS).logits


def test_lora_trains_adapters_and_head_and_merges(tmp_path):
    from peft import PeftModel

    trainer = make_trainer(tmp_path)
    before, base = weights(trainer), trainer.model.timm_model.state_dict()
    base = {name: value.clone() for name, value in base.items()}
    lora = add_lora(trainer.model, rank=2, alpha=4)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    layers = [f"timm_model.blocks.{block}.attn.{layer}" for block in (0, 1) for layer in ("qkv", "proj")]
    adapters = {f"{layer}.lora_{matrix}.default.weight" for layer in layers for matrix in "AB"}
    assert trained == adapters | {"timm_model.head.weight", "timm_model.head.bias"}
    trainer.train()
    assert trainer.trained_parameters == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    after = {name.replace(".base_layer", ""): value for name, value in weights(trainer).items()}
    assert after.keys() - before.keys() == adapters
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"timm_model.head.weight", "timm_model.head.bias"}
    assert all(after[name].any() for name in adapters)

    adapted, folder = logits(trainer.model), lora.save(tmp_path)
    lora.merge()
    assert weights(trainer).keys() == before.keys()
    torch.testing.assert_close(logits(trainer.model), adapted, atol=1e-5, rtol=1e-5)

    fresh = build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO).timm_model
    fresh.load_state_dict(base)
    torch.nn.init.normal_(fresh.head.weight)  # the adapter includes the head
    loaded = PeftModel.from_pretrained(fresh, str(folder)).eval()
    torch.testing.assert_close(loaded(PIXELS).detach(), adapted, atol=1e-6, rtol=1e-6)


def test_resumed_lora_run_equals_uninterrupted(tmp_path):
    def prepared(folder, callbacks=None):
        trainer = make_trainer(folder, callbacks)
        add_lora(trainer.model, rank=2, alpha=4, dropout=0.2)
        return trainer

    assert_resumes_exactly(prepared, tmp_path)


FAMILIES = {
    "beit_base_patch16_224": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    "eva02_tiny_patch14_224": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    "swinv2_tiny_window8_256": {
        "patch_size": 2,
        "embed_dim": 16,
        "depths": (1, 1),
        "num_heads": (1, 2),
        "window_size": 4,
    },
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_lora_in_other_architectures(architecture):
    model = build_model(LABELS, architecture=architecture, image_size=32, timm_kwargs=FAMILIES[architecture])
    pixels = torch.randn(2, 3, 32, 32)
    for parameter in model.parameters():  # several families initialize branches near zero
        torch.nn.init.normal_(parameter, std=0.2)
    plain = model.eval()(pixels).logits
    layers = target_layers(model.timm_model)
    assert layers
    lora = add_lora(model, rank=2, alpha=4)
    torch.testing.assert_close(model.eval()(pixels).logits, plain, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted = model(pixels).logits
    assert not torch.allclose(adapted, plain, atol=1e-3)
    lora.merge()
    torch.testing.assert_close(model(pixels).logits, adapted, atol=1e-4, rtol=1e-3)


def test_lora_of_uncalled_layer_raises(monkeypatch):
    monkeypatch.setattr(hfvit.finetuning.lora, "_set_separate_bias", lambda *_: None)
    name = "beit_base_patch16_224"
    model = build_model(LABELS, architecture=name, image_size=16, timm_kwargs=FAMILIES[name])
    with pytest.raises(ModelError, match=r"^lora_targets: .*\bblocks\.0\.attn\.qkv\b"):
        add_lora(model, rank=2, alpha=4)


def test_target_layers_by_name():
    model = build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO).timm_model
    assert target_layers(model, ["fc1", "fc2"]) == [f"blocks.{b}.mlp.fc{n}" for b in (0, 1) for n in (1, 2)]
    with pytest.raises(ModelError, match=r"^lora_targets: .*'qvk'.*'qkv'"):
        target_layers(model, ["qvk"])


def test_resume_from_checkpoint_of_other_method_raises(tmp_path):
    trainer = make_trainer(tmp_path / "full", num_train_epochs=1)
    trainer.train()
    full = newest_checkpoint(tmp_path / "full")
    check_same_model(full, trainer.model)
    trainer = make_trainer(tmp_path / "lora", num_train_epochs=1)
    add_lora(trainer.model, rank=2, alpha=4)
    with pytest.raises(ModelError, match=rf"^resume_from_checkpoint: {full} .*\bLoRA\b"):
        check_same_model(full, trainer.model)
    trainer.train()
    check_same_model(newest_checkpoint(tmp_path / "lora"), trainer.model)
    other = make_trainer(tmp_path / "other").model
    with pytest.raises(ModelError, match=r"^resume_from_checkpoint: (?=.*/lora/checkpoint-\d+ ).*\bLoRA\b"):
        check_same_model(newest_checkpoint(tmp_path / "lora"), other)
    add_lora(other, rank=4, alpha=4)
    with pytest.raises(ModelError, match=r"^resume_from_checkpoint: (?=.*/lora/checkpoint-\d+ ).*\bLoRA\b"):
        check_same_model(newest_checkpoint(tmp_path / "lora"), other)
