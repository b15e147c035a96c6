"""Flexible patch sizes: sampling, gradients, resampling as in timm."""

import json

import numpy as np
import pytest
import timm
import torch
from helpers.images import LABELS, colored_image
from helpers.messages import assert_names
from helpers.micro_trainer import SEED, make_trainer
from helpers.models import build_model
from helpers.recipes import ARCHITECTURE, MICRO
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from transformers import AutoModelForImageClassification

from hfvit.cli import main as hfvit
from hfvit.cli.export_onnx import main as export_onnx
from hfvit.errors import ModelError, RecipeError
from hfvit.inference.classifier import load_classifier
from hfvit.models.patch_size import patch_size_callbacks, set_patch_size, train_patch_sizes
from hfvit.pipeline import main as train
from hfvit.recipe.loader import load_recipe

SIZES = [4, 8, 16]


def micro(architecture="flexivit_small", **kwargs):
    torch.manual_seed(0)
    return build_model(LABELS, architecture=architecture, image_size=32, timm_kwargs={**MICRO, **kwargs})


@pytest.mark.parametrize(
    "architecture", ["flexivit_small", ARCHITECTURE, "vit_small_patch16_dinov3", "eva02_tiny_patch14_224"]
)
@pytest.mark.parametrize("size", SIZES)
def test_flexible_patch_embed_equals_timms_resampled_model(architecture, size):
    """Compare logits, and gradients of the shared embedding, with timm's resampling."""
    flexible, plain = micro(architecture).train(), micro(architecture).train()
    train_patch_sizes(flexible, SIZES)
    flexible.timm_model.patch_embed.current_size = size
    pixel_values = torch.randn(2, 3, 32, 32)
    logits = flexible(pixel_values).logits

    network, embed = plain.timm_model, plain.timm_model.patch_embed.proj.weight
    weight = resample_patch_embed(embed, [size, size])
    replaced = {"patch_embed.proj.weight": weight}
    if network.pos_embed is not None:
        prefix = 0 if network.no_embed_class else network.num_prefix_tokens
        replaced["pos_embed"] = resample_abs_pos_embed(network.pos_embed, [32 // size] * 2, num_prefix_tokens=prefix)
    own = dict(network.named_parameters())
    network.set_input_size(patch_size=(size, size))  # sets grid and stride; the weights come from `replaced`
    expected = torch.func.functional_call(network, {**own, **replaced}, (pixel_values,))
    torch.testing.assert_close(logits, expected)
    logits.square().sum().backward()
    (gradient,) = torch.autograd.grad(expected.square().sum(), [embed])
    torch.testing.assert_close(flexible.timm_model.patch_embed.proj.weight.grad, gradient, atol=1e-4, rtol=1e-3)


def test_sampled_patch_size_depends_on_seed_and_step_and_is_uniform():
    embeds = []
    for _ in range(2):
        model = micro()
        train_patch_sizes(model, SIZES)
        embeds.append(model.timm_model.patch_embed)

    def sampled(embed, seed, steps):
        sizes = []
        for step in steps:
            embed.sample(seed, step)
            sizes.append(embed.current_size)
        return sizes

    full = sampled(embeds[0], 3, range(600))
    assert sampled(embeds[1], 3, range(300, 600)) == full[300:]
    assert sampled(embeds[1], 4, range(600)) != full
    assert all(150 < full.count(size) < 250 for size in SIZES)


def test_out_of_memory_trial_uses_the_smallest_patches(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=1)
    train_patch_sizes(trainer.model, SIZES)
    [callback] = patch_size_callbacks(trainer.model)
    trainer.add_callback(callback)
    trainer.out_of_memory.is_fitted = False  # as with several processes
    forward, seen = trainer.model.timm_model.forward_features, []

    def limited(pixel_values, *args, **kwargs):
        if torch.is_grad_enabled() and not pixel_values.is_meta:
            seen.append((callback.embed.current_size, len(pixel_values)))
            if seen[-1] == (4, 8):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
        return forward(pixel_values, *args, **kwargs)

    trainer.model.timm_model.forward_features = limited
    trainer.train()
    callback.embed.sample(SEED, 0)
    assert callback.embed.current_size != 4
    assert seen[:5] == [(4, 8), (4, 4), (4, 4), (callback.embed.current_size, 4), (callback.embed.current_size, 4)]
    assert trainer.events == [{"event": "out_of_memory", "step": 1, "images": 8, "then": 4}]


def test_eval_and_checkpoint_keep_the_models_patch_size(tmp_path):
    model, plain = micro(), micro()
    train_patch_sizes(model, SIZES)
    model.timm_model.patch_embed.current_size = 16
    pixel_values = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(pixel_values).logits, plain.eval()(pixel_values).logits)
    model.save_pretrained(tmp_path)
    stock = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(stock(pixel_values).logits, plain(pixel_values).logits)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"] == {**MICRO, "img_size": 32}


@pytest.fixture(scope="module")
def run(tmp_path_factory, colors):
    """Train one model at three patch sizes; returns recipe and output folder."""
    folder = tmp_path_factory.mktemp("patch_sizes")
    recipe = folder / "flexi.yaml"
    recipe.write_text(
        "architecture: vit_tiny_patch16_224\nmodel_args: {patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}\n"
        f"image_size: 16\npatch_sizes: [4, 8, 16]\ndataset_name: {colors}\noutput_dir: {folder / 'out'}\n"
        "validation_fraction: 0.2\ncrop_pct: 1.0\nglobal_batch_size: 8\nnum_train_epochs: 10\nlearning_rate: 3.0e-3\n"
        "logging_steps: 1\nseed: 3\ndisable_tqdm: true\nplots: false\nkeep_checkpoints: true\nsave_total_limit: 20\n"
    )
    train([str(recipe)])
    return recipe, folder / "out"


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def test_resumed_run_samples_the_same_patch_sizes(run, tmp_path):
    recipe, out = run
    checkpoint = next(path for path in out.glob("checkpoint-*") if path.name == "checkpoint-30")
    train([str(recipe), "--output_dir", str(tmp_path), "--resume_from_checkpoint", str(checkpoint)])
    resumed, full = losses(tmp_path), losses(out)
    assert len(full) == 60
    assert {step: resumed[step] for step in full} == full


def test_validate_compares_patch_sizes_and_token_merging(run, tmp_path, capsys):
    _, out = run
    output = tmp_path / "speeds.json"
    command = f"validate {out} --split test --patch_size 4 16 --merge_tokens 1 --max_accuracy_drop 100"
    with pytest.raises(SystemExit) as caught:
        hfvit([*command.split(), "--output", str(output)])
    assert caught.value.code == 0
    rows = json.loads(output.read_text())["artifacts"]
    changes = [{}, {"patch_size": 4}, {"patch_size": 16}, {"merge_tokens": 1}]
    keys = ("artifact", "patch_size", "merge_tokens")
    assert [{key: row[key] for key in keys if key in row} for row in rows] == [
        {"artifact": str(out), **change} for change in changes
    ]
    assert all(row["accuracy"] > 0.8 for row in rows)
    recorded = json.loads((out / "run.json").read_text())["gate"]["artifacts"]
    assert [{key: row[key] for key in keys if key in row} for row in recorded] == [
        {"artifact": "out", **change} for change in changes
    ]
    assert f"{out} patch_size=16" in capsys.readouterr().out


def test_export_with_patch_size_writes_the_resampled_model(run, tmp_path):
    _, out = run
    with pytest.raises(SystemExit) as caught:
        export_onnx(["--model", str(out), "--patch_size", "4", str(tmp_path / "onnx")])
    assert caught.value.code == 0
    images = [colored_image(label, np.random.default_rng(label)) for label in range(3)]
    exported = load_classifier(tmp_path / "onnx", device="cpu")
    expected = load_classifier(out, device="cpu", patch_size=4).logits(images)
    np.testing.assert_allclose(exported.logits(images), expected, atol=1e-4)
    assert json.loads((tmp_path / "onnx" / "config.json").read_text())["patch_size"] == 4
    with pytest.raises(ModelError, match=r"^patch_size: .*\bmodel\.onnx\b"):
        load_classifier(tmp_path / "onnx", patch_size=8)


def test_set_patch_size_equals_timms_loader(run):
    _, out = run
    resampled = load_classifier(out, device="cpu", patch_size=4).backend.model
    reference = timm.create_model(f"local-dir:{out}", pretrained=True, patch_size=4).eval()
    pixel_values = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(resampled(pixel_values).logits, reference(pixel_values))
    assert resampled.config.model_args["patch_size"] == 4


def test_unsupported_patch_size_raises(tmp_path):
    swin = {"patch_size": 2, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
    other = build_model(LABELS, architecture="swin_tiny_patch4_window7_224", image_size=32, timm_kwargs=swin)
    for change in (lambda: set_patch_size(other, 4), lambda: train_patch_sizes(other, SIZES)):
        with pytest.raises(ModelError, match=r"^patch_sizes?: .*\bSwinTransformer\b"):
            change()
    with pytest.raises(ModelError, match=r"^patch_size: ") as caught:
        set_patch_size(micro(), 5)
    assert_names(caught.value, 5, 32, "4, 8, 16, 32")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("architecture: flexivit_small\ndataset_name: digits\noutput_dir: out\npatch_sizes: [8]\n")
    with pytest.raises(RecipeError, match=r"^\S+: patch_sizes: .*\[8\]"):
        load_recipe([str(recipe)])
