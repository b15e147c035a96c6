"""`hfvit train --estimate`: memory against a real step, and the report."""

import re

import pytest
import torch
from helpers.images import LABELS
from helpers.messages import assert_names, option_of
from helpers.models import build_model
from helpers.recipes import ARCHITECTURE, MICRO

from hfvit.cli import main as hfvit_command
from hfvit.estimate import LiveBytes, skeleton, step_memory
from hfvit.recipe.loader import load_recipe
from hfvit.recipe.optimizers import has_fallback, optimizer_factory
from hfvit.recipe.training_args import HFViTTrainingArguments
from hfvit.training.losses import cross_entropy
from hfvit.training.param_groups import build_param_groups
from hfvit.utils.formatting import size


def micro(device: str):
    with torch.device(device):
        return build_model(LABELS, architecture=ARCHITECTURE, image_size=32, timm_kwargs=MICRO)


def saved_for_backward(model, batch: int) -> int:
    """Return the bytes that autograd saves in a real forward pass, without weights."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(torch.zeros(batch, 3, 32, 32)).logits
        cross_entropy(logits, torch.zeros(batch, dtype=torch.long), 0.0)
    return sum(count for _, count in kept.values())


def test_step_memory_equals_a_real_step():
    memory = step_memory(micro("meta"), 16)
    real = micro("cpu").train()
    parameters = sum(p.numel() * 4 for p in real.parameters())
    assert memory.weights == parameters + sum(b.numel() * b.element_size() for b in real.buffers())
    assert memory.gradients == parameters
    assert memory.optimizer == pytest.approx(2 * parameters, rel=0.02)  # and a step count for each weight
    assert memory.activations == pytest.approx(saved_for_backward(real, 16), rel=0.1)
    live = LiveBytes()
    live.ignore([*real.parameters(), *real.buffers()])
    with live:
        loss = cross_entropy(real(torch.zeros(16, 3, 32, 32)).logits, torch.zeros(16, dtype=torch.long), 0.0)
        loss.backward()
    assert memory.peak == pytest.approx(live.peak, rel=0.02)


@pytest.mark.parametrize("optim", ["timm/muon", "timm/adamp", "timm/adafactorbv", "timm/lookahead_adamw"])
def test_optimizer_memory_equals_a_real_step(optim):
    args = HFViTTrainingArguments(output_dir="unused", use_cpu=True, optim=optim)
    model = micro("cpu").train()
    create, options = optimizer_factory(args)
    groups = build_param_groups(model.timm_model, 1e-3, 0.0, with_fallback=has_fallback(optim))
    optimizer = create(groups, **options)
    model(torch.zeros(2, 3, 32, 32)).logits.sum().backward()
    for _ in range(6):  # Lookahead creates its slow weights in the sixth step
        optimizer.step()
    values = (value for state in optimizer.state_dict()["state"].values() for value in state.values())
    expected = sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))
    assert step_memory(micro("meta"), 2, args=args).optimizer == expected


def test_step_memory_decreases_with_memory_options():
    plain = step_memory(micro("meta"), 64)
    assert step_memory(micro("meta"), 64, "bf16").activations < 0.8 * plain.activations
    assert step_memory(micro("meta"), 64, "no", True).activations < 0.5 * plain.activations
    assert step_memory(micro("meta"), 32).activations == pytest.approx(plain.activations / 2, rel=0.05)
    model = micro("meta")
    model.freeze("backbone")
    frozen = step_memory(model, 64)
    assert frozen.activations < 0.2 * plain.activations
    assert frozen.gradients < 0.1 * plain.gradients


def test_skeleton_of_timm_checkpoint_needs_no_download(recipe):
    loaded = load_recipe(["vit_base", "--use_cpu", "true"])
    assert sum(p.numel() for p in skeleton(loaded).parameters()) == 86_567_656  # timm's number for ViT-B/16
    assert all(p.is_meta for p in skeleton(loaded).parameters())


def test_estimate_prints_a_report_without_training(recipe, capsys, tmp_path):
    before = set(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        hfvit_command(["train", str(recipe), "--estimate", "--use_cpu", "true", "--ema_decay", "0.9"])
    printed = capsys.readouterr().out
    assert not stop.value.code
    loaded = load_recipe([str(recipe), "--use_cpu", "true", "--ema_decay", "0.9"])
    own = step_memory(skeleton(loaded), 8, "no", False, loaded.training)
    assert own.average
    for part in (own.weights, own.gradients, own.optimizer, own.average, own.activations, own.total):
        assert_names(printed, size(part))
    assert [int(line.split()[0]) for line in printed.splitlines() if re.match(r"\d+ ", line)] == [2, 4, 8, 16]
    assert "*" not in printed  # it fits
    assert "--activation_checkpointing" not in printed
    assert set(tmp_path.iterdir()) == before


def test_estimate_of_too_large_model_suggests_options(recipe, capsys):
    words = ["train", str(recipe), "--estimate", "--use_cpu", "true", "--global_batch_size", "1000000000"]
    with pytest.raises(SystemExit) as stop:
        hfvit_command(words)
    printed = capsys.readouterr().out
    assert not stop.value.code
    assert "--activation_checkpointing true" in printed
    assert re.search(r"^1000000000 .* \*", printed, re.MULTILINE)


def test_estimate_counts_the_trained_weights_of_the_method(recipe, capsys):
    words = ["vit_small", "--use_cpu", "true", "--finetuning"]
    full, lora, probe = (
        step_memory(skeleton(load_recipe([*words, way])), 4) for way in ("full", "lora", "linear_probe")
    )
    assert lora.gradients < 0.2 * full.gradients
    assert lora.weights > full.weights
    assert probe.activations < lora.activations < full.activations
    with pytest.raises(SystemExit) as stop:
        hfvit_command(
            ["train", str(recipe), "--estimate", "--use_cpu", "true", "--text_encoder", "a/b", "--text_column", "c"]
        )
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert option_of(error) == "estimate"
    assert_names(error, "text_encoder")
