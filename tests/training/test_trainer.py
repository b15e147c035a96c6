"""The Trainer against a plain Accelerate loop, with other batch splits, and failures."""

import errno
import inspect
import math
import os
import re

import pytest
import torch
from accelerate import Accelerator
from helpers.images import LABELS
from helpers.losses import set_training_loss, training_loss
from helpers.messages import assert_names
from helpers.micro_trainer import (
    CLIP,
    LAYER_DECAY,
    LR,
    SEED,
    SMOOTHING,
    WEIGHT_DECAY,
    Stop,
    losses,
    make_checkpoint,
    make_trainer,
    parts,
    weights,
)
from helpers.models import build_model
from helpers.recipes import MICRO
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, get_cosine_schedule_with_warmup

from hfvit.artifacts.checkpoint import check_same_model, newest_checkpoint
from hfvit.artifacts.output_dir import claim_output_dir
from hfvit.data.dataset import collate
from hfvit.data.samplers import EpochSampler
from hfvit.errors import DataError, ModelError, NonFiniteLossError, RecipeError
from hfvit.training.ema import fitted_ema_decay
from hfvit.training.trainer import OVERRIDDEN_PRIVATE_METHODS, PRIVATE_ATTRIBUTES, HFViTTrainer


def plain_loop(epochs=2, batch_size=8):
    """Fine-tune like accelerate's examples, with timm's optimizer factory.

    Returns the loss of every step, the gradient norms, and the validation accuracy after each epoch.
    """
    model, train, validation, preprocessing = parts()
    accelerator = Accelerator(cpu=True)
    sampler = EpochSampler(len(train), batch_size, SEED)
    loader = DataLoader(train, batch_size=batch_size, sampler=sampler, collate_fn=collate)
    optimizer = create_optimizer_v2(
        model.timm_model, opt="adamw", lr=LR, weight_decay=WEIGHT_DECAY, layer_decay=LAYER_DECAY, betas=(0.9, 0.999)
    )
    for group in optimizer.param_groups:
        group["lr"] = LR * group["lr_scale"]
    scheduler = get_cosine_schedule_with_warmup(optimizer, 2, epochs * len(loader))
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    history, norms, accuracies = [], [], []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        model.train()
        for batch in loader:
            loss = criterion(model(train.augmentation(batch)).logits, batch["labels"])
            accelerator.backward(loss)
            norms.append(accelerator.clip_grad_norm_(model.parameters(), CLIP).item())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            history.append(loss.item())
        model.eval()
        with torch.no_grad():
            items = [validation[row] for row in range(len(validation))]
            correct = [model(preprocessing(item)).logits.argmax().item() == item["labels"].item() for item in items]
        accuracies.append(sum(correct) / len(correct))
    return history, norms, accuracies


def test_trainer_equals_a_plain_accelerate_loop(tmp_path):
    expected, norms, accuracies = plain_loop()
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert losses(trainer) == pytest.approx(expected, rel=1e-4)
    assert [e["grad_norm"] for e in trainer.state.log_history if "loss" in e] == pytest.approx(norms, rel=1e-3)
    assert [e["eval_accuracy"] for e in trainer.state.log_history if "eval_loss" in e] == pytest.approx(accuracies)


def test_batch_8_equals_2_times_4_accumulated(tmp_path):
    full = make_trainer(tmp_path / "full", rows=45)
    full.train()
    split = make_trainer(tmp_path / "split", rows=45, per_device_train_batch_size=4)
    assert split.args.gradient_accumulation_steps == 2
    split.train()
    assert len(losses(full)) == len(losses(split)) == 10  # 45 rows: 5 full batches an epoch, either way
    assert losses(split) == pytest.approx(losses(full), rel=1e-4)


def test_data_workers_do_not_change_the_result(tmp_path):
    without = make_trainer(tmp_path / "0", num_train_epochs=1)
    without.train()
    with_workers = make_trainer(tmp_path / "2", num_train_epochs=1, dataloader_num_workers=2)
    with_workers.train()
    assert losses(with_workers) == losses(without)


def test_evaluation_loss_is_the_mean_without_smoothing(tmp_path):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=5)
    metrics = trainer.evaluate()
    items = [trainer.eval_dataset[row] for row in range(13)]
    logits = torch.cat([trainer.model.eval()(trainer.preprocessing(item)).logits for item in items]).detach()
    labels = torch.cat([item["labels"] for item in items])
    assert metrics["eval_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_ema_equals_its_definition(tmp_path):
    raw, averages = [], []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            raw.append(model.timm_model.head.weight.detach().clone())
            averages.append(trainer.weight_average.average.module.timm_model.head.weight.detach().clone())

    trainer = make_trainer(
        tmp_path, [Record()], ema_decay=0.999, num_train_epochs=6, load_best_model_at_end=False, save_strategy="no"
    )
    trainer.train()
    steps = len(raw)
    decay = fitted_ema_decay(0.999, steps)
    assert decay == pytest.approx(1 - 10 / steps)
    average = raw[0].clone()
    for step, value in enumerate(raw):
        warm = min(decay, 1 - (1 + step) ** -(2 / 3))
        average = warm * average + (1 - warm) * value
        torch.testing.assert_close(averages[step], average)
    assert torch.equal(trainer.model.timm_model.head.weight, averages[-1])


def test_evaluation_uses_ema_and_training_does_not(tmp_path):
    plain = make_trainer(tmp_path / "plain", num_train_epochs=4)
    plain.train()
    averaged = make_trainer(tmp_path / "averaged", num_train_epochs=4, ema_decay=0.9)
    averaged.train()
    assert losses(averaged) == losses(plain)
    assert [e.get("eval_loss") for e in averaged.state.log_history] != [
        e.get("eval_loss") for e in plain.state.log_history
    ]
    best = averaged.state.best_model_checkpoint
    assert torch.equal(
        averaged.model.timm_model.head.weight, load_file(f"{best}/ema.safetensors")["timm_model.head.weight"]
    )
    assert averaged.evaluate()["eval_accuracy"] == averaged.state.best_metric


def test_train_ends_with_the_best_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=4, learning_rate=0.05)
    trainer.train()
    history = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert trainer.evaluate()["eval_accuracy"] == max(history)


def test_early_stopping_stops_after_patience(tmp_path):
    trainer = make_trainer(
        tmp_path, num_train_epochs=50, learning_rate=1e-9, warmup_steps=0, early_stopping_patience=2
    )
    trainer.train()
    assert trainer.state.global_step == 3 * 5


class Breaks:
    """Return a loss that is NaN in training step `step`, or only its gradient."""

    def __init__(self, step, monkeypatch, gradient_only=False):
        self.step, self.gradient_only, self.calls = step, gradient_only, 0
        self.original = training_loss()
        set_training_loss(monkeypatch, self)

    def __call__(self, logits, labels, smoothing):
        loss = self.original(logits, labels, smoothing)
        if not torch.is_grad_enabled():
            return loss
        self.calls += 1
        if self.calls != self.step:
            return loss
        return loss + (logits.sum() * 0).sqrt() if self.gradient_only else loss * float("nan")


@pytest.mark.parametrize("gradient_only", [False, True])
def test_nan_loss_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch, gradient_only):
    uninterrupted = make_trainer(tmp_path / "uninterrupted")
    uninterrupted.train()
    entries = [entry for entry in uninterrupted.state.log_history if "loss" in entry]
    Breaks(8, monkeypatch, gradient_only)
    trainer = make_trainer(tmp_path / "broken", logging_steps=100)
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train()
    message = str(caught.value)
    last_good = entries[6]
    figures = (f"{last_good['loss']:.4g}", f"{last_good['learning_rate']:.3g}", f"{last_good['grad_norm']:.3g}")
    assert_names(message, 8, *figures)
    assert_names(message, "learning_rate", "max_grad_norm", "bf16", "checkpoint-5")
    assert newest_checkpoint(tmp_path / "broken").name == "checkpoint-5"
    kept = load_file(tmp_path / "broken" / "checkpoint-5" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in kept.values())


def test_nan_loss_without_logs_stops_the_run(tmp_path, monkeypatch):
    Breaks(9, monkeypatch)
    trainer = make_trainer(tmp_path, logging_strategy="no", eval_strategy="no", save_strategy="no")
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train()
    assert_names(caught.value, 9)
    assert "checkpoint-" not in str(caught.value)  # there is none


@pytest.mark.parametrize("strategy", ["eval_strategy", "save_strategy"])
def test_nan_loss_is_found_before_an_evaluation_or_a_checkpoint(tmp_path, monkeypatch, strategy):
    Breaks(4, monkeypatch)
    never = dict.fromkeys(("logging_strategy", "eval_strategy", "save_strategy"), "no")
    trainer = make_trainer(tmp_path, **{**never, strategy: "epoch"}, load_best_model_at_end=False)
    with pytest.raises(NonFiniteLossError):
        trainer.train()
    assert trainer.state.global_step == 5
    assert not [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert not list(tmp_path.glob("checkpoint-*"))


def test_bf16_on_cpu_is_close_to_fp32(tmp_path):
    full = make_trainer(tmp_path / "fp32", num_train_epochs=1)
    full.train()
    half = make_trainer(tmp_path / "bf16", num_train_epochs=1, bf16=True)
    half.train()
    assert losses(half) != losses(full)
    assert losses(half) == pytest.approx(losses(full), abs=0.05)


@pytest.mark.parametrize("bf16", [False, True])
def test_attention_on_cpu_is_fused_unless_in_bf16(tmp_path, bf16):
    trainer = make_trainer(tmp_path, bf16=bf16)
    attention = [layer for layer in trainer.model.modules() if hasattr(layer, "fused_attn")]
    assert [layer.fused_attn for layer in attention] == [not bf16] * MICRO["depth"]


def test_checkpoint_has_no_pickle_and_no_problem_type(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=1)
    trainer.train()
    assert not list(tmp_path.rglob("training_args.bin"))
    assert "problem_type" not in (tmp_path / "checkpoint-5" / "config.json").read_text()


def test_fewer_images_than_a_batch_raise(tmp_path):
    with pytest.raises(DataError) as caught:
        make_trainer(tmp_path, global_batch_size=64)
    assert_names(caught.value, 40, 64, "global_batch_size")


def test_resume_with_ema_from_checkpoint_without_it_raises(tmp_path):
    make_trainer(tmp_path, num_train_epochs=1).train()
    with pytest.raises(RecipeError) as caught:
        make_trainer(tmp_path, ema_decay=0.9).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_names(caught.value, tmp_path / "checkpoint-5", "ema_decay")


def test_resume_auto_of_finished_run_does_not_train(tmp_path):
    make_checkpoint(tmp_path)  # as with --keep_checkpoints
    (tmp_path / "run.json").write_text("{}")
    assert claim_output_dir(str(tmp_path), resume="auto", overwrite=False)  # killed before the model card was written
    (tmp_path / "README.md").write_text("a card")
    with pytest.raises(RecipeError, match=rf"^output_dir: {tmp_path} .*--overwrite_output_dir\b") as caught:
        claim_output_dir(str(tmp_path), resume="auto", overwrite=False)
    assert "--resume_from_checkpoint" not in str(caught.value)  # it is finished


def test_output_dir_with_other_files_raises(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(RecipeError, match=rf"^output_dir: {tmp_path} .*\bREADME\.md\b"):
        claim_output_dir(str(tmp_path), resume=None, overwrite=False)


def test_output_dir_is_claimed_once(tmp_path):
    make_trainer(tmp_path, num_train_epochs=1).train()
    unfinished = r"^output_dir: .*\bcheckpoint-5\b.*--resume_from_checkpoint auto\b"
    with pytest.raises(RecipeError, match=unfinished):
        claim_output_dir(str(tmp_path), resume=None, overwrite=False)
    assert claim_output_dir(str(tmp_path), resume=None, overwrite=True) is None
    (tmp_path / "checkpoint-9").mkdir()  # killed during a save
    assert claim_output_dir(str(tmp_path), resume="auto", overwrite=False).endswith("checkpoint-5")
    assert (tmp_path / "broken-checkpoint-9").exists()
    with pytest.raises(RecipeError, match=rf"^resume_from_checkpoint: .*{tmp_path}/checkpoint-9\b"):
        claim_output_dir(str(tmp_path), resume=str(tmp_path / "checkpoint-9"), overwrite=False)
    with pytest.raises(RecipeError, match=unfinished):  # another run's checkpoint does not claim this folder
        claim_output_dir(str(tmp_path), resume=str(make_checkpoint(tmp_path / "elsewhere")), overwrite=False)
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=rf"^output_dir: .*{tmp_path}/file/out\b.*{os.strerror(errno.ENOTDIR)}"):
        claim_output_dir(str(tmp_path / "file" / "out"), resume=None, overwrite=False)
    other = build_model([*LABELS, "white"], architecture="vit_tiny_patch16_224", image_size=16, timm_kwargs=MICRO)
    with pytest.raises(
        ModelError, match=rf"^resume_from_checkpoint: .*\blabel_names\b.*{tmp_path}/checkpoint-5\b.*'white'"
    ):
        check_same_model(str(tmp_path / "checkpoint-5"), other)
    larger = build_model(LABELS, architecture="vit_tiny_patch16_224", image_size=16, timm_kwargs=MICRO)
    larger.config.pretrained_cfg = {**larger.config.pretrained_cfg, "input_size": [3, 32, 32]}
    with pytest.raises(ModelError, match=r"^resume_from_checkpoint: image_size "):
        check_same_model(str(tmp_path / "checkpoint-5"), larger)
    (tmp_path / "checkpoint-5" / "model.safetensors").write_bytes(b"\x80\x04cos\nsystem\n.")
    same = build_model(LABELS, architecture="vit_tiny_patch16_224", image_size=16, timm_kwargs=MICRO)
    with pytest.raises(ModelError, match=r"^resume_from_checkpoint: .*model\.safetensors"):
        check_same_model(str(tmp_path / "checkpoint-5"), same)


def test_fitted_ema_decay_of_short_runs():
    assert fitted_ema_decay(0.9999, 10**7) == 0.9999
    assert fitted_ema_decay(0.9999, 1000) == pytest.approx(0.99)
    assert math.isclose(fitted_ema_decay(0.9999, 5), 0.0)


def test_overridden_private_methods_are_listed_and_have_upstream_parameters():
    """Notices changes in a new version of transformers."""
    overridden = {
        name: tuple(inspect.signature(getattr(Trainer, name)).parameters)[1:]
        for name, value in vars(HFViTTrainer).items()
        if name.startswith("_") and not name.startswith("__") and hasattr(Trainer, name) and callable(value)
    }
    assert overridden == OVERRIDDEN_PRIVATE_METHODS


def test_private_attributes_of_the_trainer_exist_upstream(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=1)
    trainer.train()
    assert all(hasattr(trainer, name) for name in PRIVATE_ATTRIBUTES)
    assigned = set(re.findall(r"self\.(_\w+) = ", inspect.getsource(Trainer)))
    assert set(PRIVATE_ATTRIBUTES) <= assigned


def test_resume_true_uses_the_newest_complete_checkpoint(tmp_path):
    uninterrupted = make_trainer(tmp_path / "uninterrupted")
    uninterrupted.train()
    with pytest.raises(RecipeError, match=r"^resume_from_checkpoint:"):
        make_trainer(tmp_path / "stopped").train(resume_from_checkpoint=True)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "stopped", [Stop()]).train()
    resumed = make_trainer(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.resumed_at_step == 5
    assert losses(resumed) == losses(uninterrupted)
    final = weights(uninterrupted)
    assert all(torch.equal(value, final[name]) for name, value in weights(resumed).items())
