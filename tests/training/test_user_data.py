"""`HFViTTrainer` with a user's own `datasets.Dataset`, transforms, metrics, loss and callbacks."""

import json
import signal
import time

import datasets
import numpy as np
import pytest
import torch
from accelerate.scheduler import AcceleratedScheduler
from helpers.images import LABELS, colored_split
from helpers.micro_trainer import losses, weights
from helpers.models import build_model
from helpers.recipes import ARCHITECTURE, MICRO
from torchvision.transforms import v2
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.optimization import GreedyLR

from hfvit import HFViTTrainer, HFViTTrainingArguments
from hfvit.errors import DataError, HFViTError, InterruptedRunError, ModelError, RecipeError

MEAN = STD = (0.5, 0.5, 0.5)


def trainer_for(folder, train=None, **options):
    names = ("train_transforms", "compute_metrics", "compute_loss_func", "callbacks", "optimizer_cls_and_kwargs",
             "objective", "eval_dataset", "optimizers")  # fmt: skip
    own = {"eval_dataset": colored_split(13, 2)} | {name: options.pop(name) for name in names if name in options}
    defaults = {
        "global_batch_size": 8, "num_train_epochs": 2, "learning_rate": 3e-3, "logging_steps": 1, "use_cpu": True,
        "disable_tqdm": True, "seed": 5,
    }  # fmt: skip
    args = HFViTTrainingArguments(output_dir=str(folder), **{**defaults, **options})
    set_seed(0)
    return HFViTTrainer(
        model=build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO),
        args=args,
        train_dataset=colored_split(40, 1) if train is None else train,
        **own,
    )


def test_trainer_with_plain_datasets_learns_and_evaluates(tmp_path):
    trainer = trainer_for(tmp_path, num_train_epochs=4)
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] == 1.0
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_trainer_matches_labels_to_classes_by_name(tmp_path):
    split = colored_split(40, 1)
    names = [LABELS[label] for label in split["label"]]
    order = ["green", "red", "blue"]
    feature = datasets.ClassLabel(names=order)
    other = split.remove_columns("label").add_column("label", [order.index(name) for name in names])
    other = other.cast_column("label", feature)
    texts = split.remove_columns("label").add_column("label", names)
    integers = split.remove_columns("label").add_column("label", list(split["label"]))
    for dataset in (other, texts, integers):
        assert trainer_for(tmp_path, dataset).train_dataset.labels.tolist() == list(split["label"])


def test_trainer_with_unknown_label_names_its_row(tmp_path):
    split = colored_split(40, 1)
    names = [LABELS[label] for label in split["label"]]
    names[17] = "violet"
    with pytest.raises(DataError, match=r"row 17\b.*violet"):
        trainer_for(tmp_path, split.remove_columns("label").add_column("label", names))


def normalized(image):
    return v2.functional.normalize(v2.functional.to_dtype(v2.functional.pil_to_tensor(image), scale=True), MEAN, STD)


@pytest.mark.parametrize(
    "transform",
    [
        normalized,
        v2.functional.pil_to_tensor,
        np.asarray,
        lambda image: image,
        v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]),
    ],
    ids=["float tensor", "uint8 tensor", "array", "PIL image", "torchvision v2"],
)
def test_train_transforms_return_the_training_input(tmp_path, transform):
    trainer = trainer_for(tmp_path, train_transforms=transform)
    batch = trainer.train_dataset.__getitems__([(0, row) for row in (3, 0, 39)])
    images = [colored_split(40, 1)[row]["img"] for row in (3, 0, 39)]
    mean = torch.tensor(trainer.model.config.pretrained_cfg["mean"]).view(3, 1, 1)
    std = torch.tensor(trainer.model.config.pretrained_cfg["std"]).view(3, 1, 1)
    expected = torch.stack([(v2.functional.pil_to_tensor(image) / 255 - mean) / std for image in images])
    torch.testing.assert_close(trainer.prepare_batch(batch)["pixel_values"], expected, atol=1e-5, rtol=1e-5)


def test_train_transforms_of_albumentations(tmp_path):
    albumentations = pytest.importorskip("albumentations")
    trainer = trainer_for(tmp_path, train_transforms=albumentations.HorizontalFlip(p=1.0))
    plain = trainer_for(tmp_path, train_transforms=lambda image: image)
    flipped, expected = (
        t.prepare_batch(t.train_dataset.__getitems__([(0, 0)]))["pixel_values"] for t in (trainer, plain)
    )
    torch.testing.assert_close(flipped, expected.flip(-1))


def test_random_train_transforms_are_reproducible(tmp_path):
    transform = v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter(brightness=0.3), v2.RandomCrop(16, padding=2)])
    plain = trainer_for(tmp_path / "plain", train_transforms=transform)
    plain.train()
    for options in ({"dataloader_num_workers": 2}, {"per_device_train_batch_size": 4}):
        other = trainer_for(tmp_path / next(iter(options)), train_transforms=transform, **options)
        other.train()
        assert losses(other) == pytest.approx(losses(plain), rel=1e-4)
    resumed = trainer_for(tmp_path / "plain", train_transforms=transform)
    resumed.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-5"))
    final = weights(plain)
    assert all(torch.equal(value, final[name]) for name, value in weights(resumed).items())
    first, second = (plain.train_dataset.__getitems__([(draw, 0)])["pixel_values"] for draw in (0, 1))
    assert not torch.equal(first, second)  # each epoch is different


def test_train_transforms_of_wrong_size_or_failing_name_the_option(tmp_path):
    gray = v2.Compose([v2.Grayscale(), np.asarray])
    as_dict = lambda image: {"pixel_values": np.asarray(image)}  # noqa: E731  what an image processor returns
    for transform in (v2.Resize(20), lambda image: image.no_such_method(), gray, as_dict, lambda image: None):
        trainer = trainer_for(tmp_path, train_transforms=transform)
        with pytest.raises(DataError, match=r"^train_transforms:"):
            trainer.train()


def test_trainer_uses_custom_metrics_loss_and_callbacks(tmp_path):
    seen = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    def share_of_red(prediction):
        return {"share_of_red": float((prediction.predictions.argmax(axis=1) == 0).mean())}

    def twice(outputs, labels, num_items_in_batch=None):
        return 2 * torch.nn.functional.cross_entropy(outputs.logits, labels)

    plain = trainer_for(tmp_path / "plain", num_train_epochs=1)
    plain.train()
    options = {"compute_metrics": share_of_red, "compute_loss_func": twice, "callbacks": [Record()]}
    trainer = trainer_for(tmp_path / "own", num_train_epochs=1, per_device_train_batch_size=4, **options)
    trainer.train()
    assert seen == [1, 2, 3, 4, 5]
    assert losses(trainer)[0] == pytest.approx(2 * losses(plain)[0], rel=1e-4)
    metrics = trainer.evaluate()
    predicted = trainer.predict(trainer.eval_dataset).predictions.argmax(axis=1)
    assert metrics["eval_share_of_red"] == pytest.approx((predicted == 0).mean())
    assert "eval_accuracy" in metrics


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("train_dataset", [{"image": None, "label": 0}]),
        ("train_dataset", datasets.DatasetDict()),
        ("eval_dataset", [{"image": None, "label": 0}]),
    ],
)
def test_trainer_with_other_data_sets_names_the_argument(key, wrong, tmp_path):
    args = HFViTTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    model = build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO)
    with pytest.raises(TypeError, match=f"^{key}:"):
        HFViTTrainer(model, args, **{key: wrong})


@pytest.mark.parametrize(
    "option",
    [
        {"data_collator": list},
        {"preprocess_logits_for_metrics": torch.softmax},
        {"model": None},
        {"model_init": list},
        {"args": TrainingArguments()},
        {"args": {"output_dir": "out"}},
        {"callbacks": TrainingArguments},
        {"optimizers": torch.optim.SGD},
        {"optimizers": (torch.optim.SGD, None)},
        {"augmentation": "rand_augment"},
        {"preprocessing": v2.Resize(16)},
        {"mixing": 0.2},
        {"objective": torch.nn.functional.cross_entropy},
        {"progressive": 16},
    ],
    ids=lambda option: next(iter(option)),
)
def test_trainer_with_unavailable_arguments_raises_a_type_error(option, tmp_path):
    args = HFViTTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    model = build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO)
    [key] = option
    with pytest.raises(TypeError, match=f"^{key.replace('model_init', 'model')}:"):
        HFViTTrainer(**{"model": model, "args": args, **option})


def test_optimizer_of_another_model_raises(tmp_path):
    other = build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO)
    with pytest.raises(ValueError, match=r"^optimizers:"):
        trainer_for(tmp_path, optimizers=(torch.optim.SGD(other.parameters(), lr=0.1), None))


def test_schedules_of_transformers_and_accelerate_are_accepted(tmp_path):
    args = HFViTTrainingArguments(output_dir=str(tmp_path), use_cpu=True, eval_strategy="no", save_strategy="no")
    model = build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer)
    for schedule in (constant, GreedyLR(optimizer), AcceleratedScheduler(constant, optimizer)):
        assert HFViTTrainer(model, args, optimizers=(optimizer, schedule)).lr_scheduler is schedule


def test_model_without_trainable_parameters_raises(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.model.requires_grad_(False)
    with pytest.raises(ModelError, match=r"^model:"):
        trainer.train()


@pytest.mark.parametrize("splits", [{}, {"a": None}, {"a": colored_split(3, 0).select([])}])
def test_trainer_without_evaluation_images_raises(tmp_path, splits):
    with pytest.raises((DataError, TypeError), match=r"eval_dataset|'a'"):
        trainer_for(tmp_path, eval_dataset=splits)


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
def test_format_of_the_data_set_does_not_change_the_input(tmp_path, kind):
    plain, other = (
        trainer_for(tmp_path, split) for split in (colored_split(40, 1), colored_split(40, 1).with_format(kind))
    )
    assert torch.equal(*(torch.from_numpy(trainer.training_images(8)[0]) for trainer in (plain, other)))


def test_data_set_with_a_transform_raises(tmp_path):
    split = colored_split(40, 1).with_transform(lambda batch: batch)
    with pytest.raises(DataError, match=r"'train'.*train_transforms"):
        trainer_for(tmp_path, split)


def test_evaluate_and_predict_of_a_subset_use_its_images(tmp_path):
    trainer = trainer_for(tmp_path)
    rows = [7, 2, 5]
    subset = torch.utils.data.Subset(trainer.eval_dataset, rows)
    everything = trainer.predict(trainer.eval_dataset)
    found = trainer.predict(subset)
    np.testing.assert_allclose(found.predictions, everything.predictions[rows], atol=1e-5)
    assert trainer.evaluate(subset)["eval_accuracy"] == found.metrics["test_accuracy"]


@pytest.mark.parametrize("wrong", [None, 3, [{"image": None}]])
def test_evaluate_and_predict_of_other_objects_raise_a_type_error(tmp_path, wrong):
    trainer = trainer_for(tmp_path, eval_dataset=None, eval_strategy="no", save_strategy="epoch",
                          load_best_model_at_end=False)  # fmt: skip
    with pytest.raises(TypeError, match=r"^eval_dataset:"):
        trainer.evaluate(wrong)
    with pytest.raises(TypeError, match=r"^test_dataset:"):
        trainer.predict(wrong)


def test_single_callback_is_called(tmp_path):
    steps = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    trainer_for(tmp_path, callbacks=Record(), max_steps=1).train()
    assert steps == [1]


def test_trainer_without_torch_distributed_trains(tmp_path, monkeypatch):
    # As in builds for Jetson, which lack all that `torch.distributed` takes from its submodules.
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_torchelastic_launched")
    trainer = trainer_for(tmp_path, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_compiled_model_raises_a_type_error(tmp_path):
    trainer = trainer_for(tmp_path)
    with pytest.raises(TypeError, match=r"^model:"):
        HFViTTrainer(torch.compile(trainer.model), trainer.args)


def test_arrays_of_compute_metrics_are_lists_in_the_checkpoint(tmp_path):
    def own(prediction):
        by_class = {"cat": np.float32(0.5), "counts": [np.int64(3)]}
        arrays = {"matrix": np.eye(2), "vector": torch.ones(3), "number": np.float32(0.5)}
        return {**arrays, "by_class": by_class, "text": "a"}

    trainer_for(tmp_path, compute_metrics=own, max_steps=1).train()
    [state] = tmp_path.glob("checkpoint-1/trainer_state.json")
    [metrics] = [log for log in json.loads(state.read_text())["log_history"] if "eval_loss" in log]
    found = {key: metrics[f"eval_{key}"] for key in ("matrix", "vector", "number", "by_class", "text")}
    numbers = {"matrix": [[1.0, 0.0], [0.0, 1.0]], "vector": [1.0] * 3, "number": 0.5}
    assert found == {**numbers, "by_class": {"cat": 0.5, "counts": [3]}, "text": "a"}


@pytest.mark.parametrize("wrong", [None, 0.5, {"a": object()}, {1: 0.5}])
def test_compute_metrics_without_json_values_raises_a_type_error(tmp_path, wrong):
    with pytest.raises(TypeError, match=r"^compute_metrics:"):
        trainer_for(tmp_path, compute_metrics=lambda prediction: wrong).evaluate()


def test_evaluation_of_several_sets_is_excluded_from_the_speed_once(tmp_path):
    class Evaluate(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            time.sleep(0.2)

    sets = {"a": colored_split(13, 2), "b": colored_split(9, 3)}
    trainer = trainer_for(tmp_path, eval_dataset=sets, callbacks=[Evaluate()], eval_strategy="steps", eval_steps=1,
                          max_steps=3)  # fmt: skip
    started = time.perf_counter()
    trainer.train()
    assert trainer.speed.paused_for < time.perf_counter() - started


@pytest.mark.parametrize("option", ["compute_metrics", "train_transforms", "compute_loss_func"])
def test_trainer_with_an_argument_that_is_no_function_raises(option, tmp_path):
    args = HFViTTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    model = build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO)
    with pytest.raises(TypeError, match=f"^{option}:"):
        HFViTTrainer(model, args, **{option: "accuracy"})


def test_trainer_evaluates_and_predicts_plain_datasets(tmp_path):
    trainer = trainer_for(tmp_path)
    split = colored_split(13, 2)
    assert trainer.evaluate(split)["eval_loss"] == trainer.evaluate()["eval_loss"]
    assert trainer.predict(split).label_ids.tolist() == list(split["label"])


@pytest.mark.parametrize("metric", ["accuracy", "b_accuracy"])
def test_trainer_with_several_evaluation_sets_selects_by_one(tmp_path, metric):
    trainer = trainer_for(tmp_path, eval_dataset={"a": colored_split(13, 2), "b": colored_split(9, 3)},
                          metric_for_best_model=metric, eval_strategy="epoch")  # fmt: skip
    trainer.train()
    name = "eval_b_accuracy" if metric == "b_accuracy" else "eval_a_accuracy"
    assert trainer.state.best_metric == max(log[name] for log in trainer.state.log_history if name in log)


def test_metric_of_no_evaluation_set_raises(tmp_path):
    with pytest.raises(RecipeError, match=r"^metric_for_best_model: "):
        trainer_for(tmp_path, eval_dataset={"a": colored_split(13, 2)}, metric_for_best_model="b_accuracy")
    with pytest.raises(RecipeError, match=r"^metric_for_best_model: "):
        trainer_for(tmp_path, metric_for_best_model="b_accuracy")


@pytest.mark.parametrize("option", [{"label_smoothing_factor": 0.1}, {"objective": torch.nn.Identity()}])
def test_loss_that_would_replace_an_option_raises(tmp_path, option):
    with pytest.raises(RecipeError, match=r"^compute_loss_func: "):
        trainer_for(tmp_path, compute_loss_func=lambda *args, **kwargs: None, **option)


def test_trainer_uses_optimizer_class_and_options(tmp_path):
    options = {"lr": 0.5, "momentum": 0.25, "weight_decay": 0.125}
    optimizer = trainer_for(tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, options)).create_optimizer()
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.25}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.125}
    assert max(group["lr"] for group in optimizer.param_groups) == 0.5


def test_hyperparameter_search_names_the_sweep(tmp_path):
    with pytest.raises(RecipeError, match=r"^hyperparameter_search:"):
        trainer_for(tmp_path).hyperparameter_search(n_trials=1)


def test_run_with_own_early_stopping_resumes(tmp_path):
    options = {"eval_strategy": "epoch", "metric_for_best_model": "loss", "num_train_epochs": 1}
    trainer_for(tmp_path, callbacks=[EarlyStoppingCallback(2)], **options).train()
    resumed = trainer_for(tmp_path, callbacks=[EarlyStoppingCallback(2)], **options | {"num_train_epochs": 2})
    resumed.train(resume_from_checkpoint=True)
    assert resumed.resumed_at_step == 5
    assert resumed.state.global_step == 10


def test_resume_from_a_stock_checkpoint_raises(tmp_path):
    trainer_for(tmp_path, num_train_epochs=1, save_only_model=True).train()
    with pytest.raises(HFViTError, match=r"^resume_from_checkpoint:"):
        trainer_for(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(HFViTError, match=r"^resume_from_checkpoint:"):
        trainer_for(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


class Interrupt(TrainerCallback):
    """Send SIGINT in the second step of a process."""

    def __init__(self, times=1):
        self.times = times

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            times, self.times = self.times, 0
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)


def test_interrupted_trainer_continues(tmp_path):
    trainer = trainer_for(tmp_path, num_train_epochs=1, callbacks=[Interrupt()])
    with pytest.raises(InterruptedRunError):
        trainer.train()
    assert "zero_grad" not in vars(trainer.model)
    trainer.train(resume_from_checkpoint=True)
    assert (trainer.resumed_at_step, trainer.state.global_step) == (2, 5)


def test_second_interrupt_in_a_notebook_raises(tmp_path, monkeypatch):
    monkeypatch.setattr("hfvit.training.checkpointing.is_in_notebook", lambda: True)
    trainer = trainer_for(tmp_path, num_train_epochs=1, callbacks=[Interrupt(times=2)])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is before
    trainer.train()
    assert trainer.state.global_step == 5
