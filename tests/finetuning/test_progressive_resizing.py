"""Progressive resizing: schedule, exact resume, stock checkpoint, errors."""

import json
from pathlib import Path

import pytest
import timm
import torch
from helpers.images import LABELS
from helpers.messages import assert_names, option_of
from helpers.micro_trainer import make_trainer
from helpers.models import build_model
from helpers.recipes import ARCHITECTURE, MICRO, MICRO_RECIPE
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, TrainerCallback, TrainerState

from hfvit.errors import ModelError, RecipeError
from hfvit.estimate import skeleton, step_memory
from hfvit.finetuning.progressive_resizing import ProgressiveResizing
from hfvit.pipeline import main as train
from hfvit.recipe.loader import load_recipe
from hfvit.training.display import Display

STEPS, SIZES = 18, [8, 16]  # 6 steps per epoch, so that two checkpoints are within a part
SWIN = {
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (2, 1),
    "num_heads": (2, 2),
    "window_size": 4,
}  # one shifted window
HIERA = {
    "embed_dim": 16,
    "stages": (1, 1, 1, 1),
    "patch_stride": (2, 2),
    "patch_kernel": (3, 3),
    "patch_padding": (1, 1),
}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}


def micro(architecture=ARCHITECTURE, size=32, **args):
    torch.manual_seed(0)
    return build_model(LABELS, architecture=architecture, image_size=size, timm_kwargs=args or MICRO)


class Sizes(TrainerCallback):
    """Record the image sizes by optimizer step, and in evaluation."""

    def __init__(self):
        self.trained, self.evaluated = {}, set()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def note(network, inputs):
            sides = tuple(inputs[0].shape[-2:])
            if network.training:
                self.trained.setdefault(state.global_step, set()).add(sides)
            else:
                self.evaluated.add(sides)

        self.hook = model.timm_model.register_forward_pre_hook(note)
        self.network = model.timm_model


@pytest.fixture(scope="module")
def run(tmp_path_factory, colors):
    folder = tmp_path_factory.mktemp("progressive")
    recipe = folder / "growing.yaml"
    recipe.write_text(
        MICRO_RECIPE.replace("image_size: 16", "image_size: 32").replace("num_train_epochs: 2", "num_train_epochs: 3")
        + f"progressive_image_size: {SIZES}\nmixup_alpha: 0.2\nema_decay: 0.9\nper_device_train_batch_size: 4\n"
        f"dataset_name: {colors}\noutput_dir: {folder / 'out'}\nkeep_checkpoints: true\nsave_total_limit: 9\n"
        "save_strategy: steps\neval_strategy: steps\nsave_steps: 4\neval_steps: 4\n"
    )
    sizes = Sizes()
    train([str(recipe)], [sizes])
    return recipe, folder / "out", sizes


def plan(first=0):
    return {step: {(size, size)} for step in range(first, STEPS) for size in [[8, 16, 32][step // 6]]}


def test_progressive_resizing_follows_the_schedule(run):
    _, out, sizes = run
    assert sizes.trained == plan()
    assert sizes.evaluated == {(32, 32)}
    assert json.loads((out / "trainer_state.json").read_text())["max_steps"] == STEPS


def test_resumed_run_with_progressive_resizing_equals_uninterrupted(run, tmp_path):
    recipe, out, _ = run
    again = Sizes()
    train([str(recipe), "--output_dir", str(tmp_path), "--resume_from_checkpoint", str(out / "checkpoint-4")], [again])
    assert again.trained == plan(first=4)
    full, resumed = (load_file(folder / "model.safetensors") for folder in (out, tmp_path))
    assert full.keys() == resumed.keys()
    assert all(torch.equal(full[name], resumed[name]) for name in full)


def test_training_at_a_smaller_size_than_evaluation(run, tmp_path):
    recipe, _, _ = run
    sizes = Sizes()
    options = ["--train_image_size", "24", "--max_steps", "9", "--output_dir", str(tmp_path)]
    train([str(recipe), *options], [sizes])
    assert sizes.trained == {step: {(size, size)} for step in range(9) for size in [[8, 16, 24][step // 3]]}
    assert sizes.evaluated == {(32, 32)}
    stock = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert stock(torch.randn(1, 3, 32, 32)).logits.shape == (1, 3)
    alone = Sizes()
    train([str(recipe), *options, "--progressive_image_size", "none", "--overwrite_output_dir"], [alone])
    assert alone.trained == {step: {(24, 24)} for step in range(9)}


def test_estimate_is_for_the_largest_size_of_training(recipe):
    """Compare with the memory of a recipe whose image size is that of training."""
    text = recipe.read_text()
    recipe.write_text(text.replace("image_size: 16", "image_size: 24"))
    expected = step_memory(skeleton(load_recipe([str(recipe)])), 4)
    recipe.write_text(text.replace("image_size: 16", "image_size: 32"))
    words = [str(recipe), "--progressive_image_size", "8", "16"]
    assert step_memory(skeleton(load_recipe([*words, "--train_image_size", "24"])), 4) == expected
    assert step_memory(skeleton(load_recipe(words)), 4).activations > expected.activations


def test_memory_trial_uses_the_largest_size_of_training():
    pixel_values = torch.randn(2, 3, 32, 32)
    assert ProgressiveResizing(micro(), SIZES).largest(pixel_values) is pixel_values
    assert ProgressiveResizing(micro(), SIZES, 24).largest(pixel_values).shape == (2, 3, 24, 24)


def test_checkpoint_of_progressive_run_is_stock_at_the_full_size(run):
    _, out, sizes = run
    network, pixel_values = sizes.network.eval(), torch.randn(2, 3, 32, 32)
    assert not network.dynamic_img_size
    assert network.patch_embed.strict_img_size
    assert network.patch_embed.flatten
    assert json.loads((out / "config.json").read_text())["model_args"] == {**MICRO, "img_size": 32}
    with torch.inference_mode():
        for folder in (out, out / "checkpoint-4"):  # one saved during progressive resizing
            stock = AutoModelForImageClassification.from_pretrained(folder).eval()
            assert stock(pixel_values).logits.shape == (2, 3)
            with pytest.raises(AssertionError, match="doesn't match model"):
                stock(pixel_values[..., :16, :16])
        stock = AutoModelForImageClassification.from_pretrained(out).eval()
        torch.testing.assert_close(stock(pixel_values).logits, network(pixel_values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_progressive_resizing_equals_torch_within_a_run(dtype):
    progressive = ProgressiveResizing(micro(), SIZES)
    pixel_values = torch.randn(2, 3, 32, 32).to(dtype)
    assert progressive(pixel_values, TrainerState()) is pixel_values
    assert progressive(pixel_values, TrainerState(global_step=8, max_steps=9)) is pixel_values
    resized = progressive(pixel_values, TrainerState(global_step=3, max_steps=9))
    expected = F.interpolate(pixel_values.float(), (16, 16), mode="bilinear", antialias=True).to(dtype)
    assert resized.dtype == dtype
    assert torch.equal(resized, expected)
    assert [progressive.size(step, 10) for step in range(10)] == [8] * 3 + [16] * 3 + [None] * 4
    assert [progressive.size(step, 2) for step in range(2)] == [16, None]
    assert progressive.size(0, 1) is None


@pytest.mark.parametrize(
    ("architecture", "args"),
    [
        ("vit_small_patch14_reg4_dinov2", MICRO),
        ("eva02_tiny_patch14_224", MICRO),
        ("vit_small_patch16_dinov3", MICRO),
        ("deit_tiny_distilled_patch16_224", MICRO),
        ("swin_tiny_patch4_window7_224", SWIN),
        ("convnextv2_atto", CONVNEXT),
    ],
)
def test_progressive_resizing_equals_timms_dynamic_model(architecture, args):
    """Compare logits at a smaller size, and gradients of the position embeddings."""
    model, pixel_values = micro(architecture, 64, **args), torch.randn(2, 3, 32, 32)
    dynamic = {"img_size": 64, "dynamic_img_size": True} if hasattr(model.timm_model, "dynamic_img_size") else {}
    timms = timm.create_model(architecture, num_classes=3, **dynamic, **args)
    timms.load_state_dict(model.timm_model.state_dict())
    progressive = ProgressiveResizing(model, [32])
    progressive.on_train_begin(None, TrainerState(max_steps=2), None)
    logits = model.timm_model.eval()(pixel_values)
    torch.testing.assert_close(logits, timms.eval()(pixel_values))
    logits.square().sum().backward()
    positions = getattr(model.timm_model, "pos_embed", None)
    assert positions is None or positions.grad.abs().sum() > 0
    progressive.on_train_end(None, None, None)
    with torch.inference_mode():
        full = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(model.timm_model(full), timms(full))


@pytest.mark.parametrize(
    ("architecture", "args"),
    [
        ("beitv2_base_patch16_224", MICRO),
        ("hiera_tiny_224", HIERA),
    ],
)
def test_progressive_resizing_of_fixed_size_network_raises(architecture, args):
    with pytest.raises(ModelError, match=r"^progressive_image_size: .*\b16 px\b"):
        ProgressiveResizing(micro(architecture, 32, **args), [16])


@pytest.mark.parametrize(
    ("lines", "data"),
    [
        ("progressive_image_size: [16, 8]", ["[16, 8]"]),
        ("progressive_image_size: [12]", [12, 8]),
        ("progressive_image_size: [8, 32]", [32]),
        ("progressive_image_size: [8]\npatch_sizes: [4, 8]", ["patch_sizes"]),
        ("train_image_size: 12", [12, 8]),
        ("train_image_size: 32", [32]),
        ("train_image_size: -8", [-8]),
        ("progressive_image_size: [8, 24]\ntrain_image_size: 16", [16, 24]),
        ("train_image_size: 8\npatch_sizes: [4, 8]", ["patch_sizes"]),
    ],
)
def test_train_with_unsupported_sizes_names_option_and_data(recipe, lines, data):
    text = recipe.read_text().replace("image_size: 16", "image_size: 32")
    recipe.write_text(f"{text}{lines}\n")
    with pytest.raises(RecipeError) as caught:
        train([str(recipe)])
    assert option_of(caught.value) == ("train" if "train_" in lines else "progressive") + "_image_size"
    assert_names(caught.value, *data)
    assert not list(Path(recipe.parent / "out").glob("**/*.safetensors"))


@pytest.mark.parametrize(
    ("lines", "other"),
    [
        ("text_encoder: some/encoder\ntext_column: caption", "text_encoder"),
        ("model_name_or_path: some/model\nfinetuning: linear_probe", "finetuning=linear_probe"),
    ],
)
def test_progressive_resizing_with_incompatible_option_raises(recipe, lines, other):
    text = recipe.read_text()
    if "model_name_or_path" in lines:
        text = text.replace("architecture: vit_tiny_patch16_224\n", "").replace("model_args:", "# ")
    recipe.write_text(f"{text}{lines}\nprogressive_image_size: [8]\n")
    with pytest.raises(RecipeError, match=rf"progressive_image_size: .*\b{other}\b"):
        train([str(recipe)])


def test_time_left_is_that_of_the_pixels(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    trainer.progressive = ProgressiveResizing(micro(), SIZES)
    display = Display(trainer.args)
    display.attach(trainer)
    [progress] = display.callbacks
    clock = "hfvit.training.display.time.monotonic"
    monkeypatch.setattr(clock, lambda: 100.0)
    progress.on_train_begin(trainer.args, TrainerState(global_step=2, max_steps=STEPS, num_train_epochs=3), None)
    monkeypatch.setattr(clock, lambda: 110.0)
    progress.on_step_end(trainer.args, TrainerState(global_step=8, max_steps=STEPS), None)
    pixels = [trainer.progressive.size(step, STEPS) or 32 for step in range(STEPS)]
    done, left = (sum(size**2 for size in part) for part in (pixels[2:8], pixels[8:]))
    assert progress.seconds_left == pytest.approx(10 * left / done)
