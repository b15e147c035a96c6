"""SWA and soups of checkpoints, against torch's AveragedModel and plain means."""

import json
import os
import signal

import pytest
import torch
from helpers.micro_trainer import Stop, assert_resumes_exactly, make_trainer, weights
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch.optim.swa_utils import AveragedModel
from transformers import TrainerCallback

from hfvit.artifacts.run_record import RunRecord
from hfvit.errors import InterruptedRunError, RecipeError
from hfvit.pipeline import main
from hfvit.recipe.loader import load_recipe
from hfvit.training.ema import ListedAverage

SOUP = {"save_total_limit": None, "num_train_epochs": 4, "metric_for_best_model": "loss", "greater_is_better": False}


def test_swa_equals_torchs_averaged_model(tmp_path):
    class Average(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.model = AveragedModel(model)

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step + 1 > 5:  # half of the 10 steps
                self.model.update_parameters(model)

    expected = Average()
    options = {"swa_start": 0.5, "load_best_model_at_end": False, "save_strategy": "no"}
    trainer = make_trainer(tmp_path, [expected, Stop()], **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Stop)
    trainer.model.double().float()  # other tensors with the same values, as on another device
    for _ in range(2):  # a second training is averaged, too
        trainer.train()
        assert expected.model.n_averaged == 5
        for name, value in weights(trainer).items():
            torch.testing.assert_close(value, expected.model.module.state_dict()[name], atol=1e-6, rtol=1e-5)


def test_listed_average_equals_timms_for_batch_norm():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    ours, timms = ListedAverage(model, decay=0.7), ModelEmaV3(model, decay=0.7)
    for step in range(3):
        torch.nn.init.normal_(model[0].weight)
        model(torch.randn(2, 3, 4, 4))
        for average in (ours, timms):
            average.update(model, step=step)
    assert ours.module[1].num_batches_tracked == 3
    for name, value in timms.module.state_dict().items():
        torch.testing.assert_close(ours.module.state_dict()[name], value)


def test_resumed_run_with_swa_equals_uninterrupted(tmp_path):
    assert_resumes_exactly(lambda folder, callbacks=None: make_trainer(folder, callbacks, swa_start=0.3), tmp_path)
    with pytest.raises(RecipeError, match=r"^ema_decay: "):
        make_trainer(tmp_path / "killed", ema_decay=0.9).train(str(tmp_path / "killed" / "checkpoint-5"))


def states(folder, file) -> list[dict[str, torch.Tensor]]:
    """Read the weights of all checkpoints by the model's names."""
    found = [load_file(folder / f"checkpoint-{step}" / file) for step in (5, 10, 15, 20)]
    return [
        {f"timm_model.{name.removeprefix('timm_model.')}": value for name, value in each.items()} for each in found
    ]


def mean(members) -> dict[str, torch.Tensor]:
    return {name: torch.stack([state[name] for state in members]).mean(0) for name in members[0]}


@pytest.mark.parametrize("ema", [None, 0.6])
@pytest.mark.parametrize("kind", ["greedy", "uniform"])
def test_soup_equals_plain_means(tmp_path, kind, ema):
    trainer = make_trainer(tmp_path, soup=kind, ema_decay=ema, learning_rate=0.01, **SOUP)
    trainer.train()
    plain = make_trainer(tmp_path / "plain", **SOUP)

    def loss(state) -> float:
        plain.model.load_state_dict(state)
        return plain.evaluate()["eval_loss"]

    members = states(tmp_path, "ema.safetensors" if ema else "model.safetensors")
    scores = [loss(state) for state in members]
    used = list(range(4))
    if kind == "greedy":
        first, *rest = sorted(range(4), key=scores.__getitem__)
        used = [first]
        for index in rest:
            if loss(mean([members[i] for i in [*used, index]])) <= loss(mean([members[i] for i in used])):
                used.append(index)
    expected = mean([members[index] for index in used])
    soup = trainer.soup
    assert [member.score for member in soup.members] == pytest.approx(scores, rel=1e-5)
    assert soup.used == [f"checkpoint-{5 * index + 5}" for index in sorted(used)]
    assert soup.score == pytest.approx(loss(expected), rel=1e-4)
    assert soup.before == pytest.approx(min(scores), rel=1e-5)  # load_best_model_at_end
    assert soup.is_used == (soup.score <= soup.before)
    final = expected if soup.is_used else members[scores.index(min(scores))]
    for name, value in weights(trainer).items():
        torch.testing.assert_close(value, final[name], atol=1e-6, rtol=1e-5)


def test_resumed_run_with_soup_equals_uninterrupted(tmp_path):
    def prepared(folder, callbacks=None):
        return make_trainer(folder, callbacks, soup="uniform", load_best_model_at_end=False, save_total_limit=None)

    assert_resumes_exactly(prepared, tmp_path)


def test_soup_of_a_run_stopped_by_a_signal_has_the_members_of_one_that_was_not(tmp_path):
    class Terminate(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                os.kill(os.getpid(), signal.SIGTERM)

    options = {**SOUP, "soup": "uniform", "num_train_epochs": 3, "save_total_limit": 3}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(InterruptedRunError):
        make_trainer(tmp_path / "stopped", [Terminate()], **options).train()
    resumed = make_trainer(tmp_path / "stopped", **options)
    resumed.train(str(tmp_path / "stopped" / "checkpoint-7"))
    assert [member.name for member in whole.soup.members] == ["checkpoint-5", "checkpoint-10", "checkpoint-15"]
    assert resumed.soup == whole.soup


def test_soup_of_a_stopped_run_keeps_the_members_that_a_later_best_checkpoint_leaves(tmp_path):
    class Scripted(TrainerCallback):
        def __init__(self, stop=0):
            self.stop = stop

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = {5: 1.0, 10: 2.0, 15: 0.5}[state.global_step]

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == self.stop:
                os.kill(os.getpid(), signal.SIGTERM)

    options = {**SOUP, "soup": "uniform", "num_train_epochs": 3, "save_total_limit": 2}
    options |= {"metric_for_best_model": "loss", "greater_is_better": False}
    whole = make_trainer(tmp_path / "whole", [Scripted()], **options)
    whole.train()
    for stop in (11, 12):
        with pytest.raises(InterruptedRunError):
            make_trainer(tmp_path / "stopped", [Scripted(stop)], **options).train(stop == 12)
    resumed = make_trainer(tmp_path / "stopped", [Scripted()], **options)
    resumed.train(True)
    assert [member.name for member in whole.soup.members] == ["checkpoint-10", "checkpoint-15"]
    assert resumed.soup == whole.soup
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {"checkpoint-10", "checkpoint-15"}


def test_soup_has_no_untrained_checkpoint(tmp_path):
    options = {"nan_policy": "rewind", "load_best_model_at_end": False, "save_total_limit": None}
    trainer = make_trainer(tmp_path, soup="uniform", **options)
    trainer.train()
    assert (tmp_path / "checkpoint-0").is_dir()
    assert [member.name for member in trainer.soup.members] == ["checkpoint-5", "checkpoint-10"]


@pytest.mark.parametrize("option", [{"ema_decay": 0.9}, {"swa_start": 0.5}])
def test_averages_with_a_schedule_free_optimizer_raise(tmp_path, option):
    with pytest.raises(RecipeError, match=f"^{next(iter(option))}: "):
        make_trainer(tmp_path, optim="schedule_free_adamw", **option)


def test_run_records_its_soup(recipe, tmp_path):
    main([str(recipe), "--soup", "uniform", "--save_total_limit", "none", "--metric_for_best_model", "loss"])
    record = RunRecord.load(tmp_path / "out")
    soup = record.training.soup
    assert [member.name for member in soup.members] == ["checkpoint-6", "checkpoint-12"]
    score = soup.score if soup.is_used else soup.before
    assert record.metrics["validation"].loss == pytest.approx(score, abs=1e-6)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("uniform soup" in card) == soup.is_used
    assert json.loads((tmp_path / "out" / "run.json").read_text())["recipe"]["soup"] == "uniform"
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("--swa_start 1", "--swa_start"),
        ("--swa_start 0.5 --ema_decay 0.9", "--ema_decay, --swa_start"),
        ("--swa_start 0.5 --save_only_model true", "--save_only_model"),
        ("--soup mean", "--soup"),
        ("--soup greedy --save_total_limit 1", "--soup"),
        ("--soup greedy --save_strategy no --load_best_model_at_end false", "--soup"),
        ("--soup greedy --finetuning lora --model_name_or_path timm/x", "--soup"),
        ("--swa_start 0.5 --finetuning linear_probe --model_name_or_path timm/x", "--swa_start"),
    ],
)
def test_options_that_exclude_each_other_are_one_error(recipe, words, option):
    with pytest.raises(RecipeError, match=rf"^{option}: "):
        load_recipe([str(recipe), *words.split()])
