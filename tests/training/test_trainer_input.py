"""Training input: policies, mixing, workers, resume, synchronization, throughput."""

import copy
import multiprocessing
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.images import LABELS
from helpers.losses import set_training_loss, training_loss
from helpers.micro_trainer import assert_resumes_exactly, losses, make_trainer, parts, weights
from helpers.models import build_model
from safetensors.torch import load_file
from timm.data import resolve_data_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import TrainerCallback

from hfvit.artifacts.checkpoint import newest_checkpoint
from hfvit.errors import RecipeError
from hfvit.finetuning.distillation import build_objective
from hfvit.finetuning.progressive_resizing import ProgressiveResizing
from hfvit.models.patch_size import train_patch_sizes
from hfvit.recipe.training_args import HFViTTrainingArguments
from hfvit.training.throughput import SpeedMeter, datasheet_rate, training_flops
from hfvit.training.trainer import check_determinism
from hfvit.transforms.augmentation import Augmentation
from hfvit.transforms.functional import FAMILIES
from hfvit.transforms.preprocessing import Preprocessing
from hfvit.utils.environment import cores_per_process, set_tf32

RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 24], "stem_width": 8}
MIXING = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "random_erasing": 0.5}


def test_batch_8_equals_2_times_4_accumulated_under_a_policy_and_erasing(tmp_path):
    options = {"policy": "trivial_augment", "mixing": {"random_erasing": 0.5}, "repeats": 2}
    full = make_trainer(tmp_path / "full", **options)
    full.train()
    split = make_trainer(tmp_path / "split", per_device_train_batch_size=4, **options)
    split.train()
    assert losses(split) == pytest.approx(losses(full), rel=1e-4)
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    assert losses(plain) != pytest.approx(losses(full), rel=1e-2)


def test_data_workers_do_not_change_mixing(tmp_path):
    runs = []
    for workers in (0, 2):
        trainer = make_trainer(
            tmp_path / str(workers), policy="rand_augment", mixing=MIXING, dataloader_num_workers=workers
        )
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]


def test_resumed_run_with_mixing_equals_uninterrupted(tmp_path):
    options = {
        "policy": "three_augment", "mixing": {**MIXING, "off_epochs": 1}, "repeats": 3,
        "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3, "save_total_limit": 5,
    }  # fmt: skip
    uninterrupted = make_trainer(tmp_path / "uninterrupted", **options)
    uninterrupted.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "killed", [Stop()], **options).train()
    resumed = make_trainer(tmp_path / "killed", **options)
    resumed.train(resume_from_checkpoint=str(newest_checkpoint(tmp_path / "killed")))
    assert losses(resumed) == losses(uninterrupted)
    expected = weights(uninterrupted)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())


def test_mix_off_epochs_stop_mixing(tmp_path, monkeypatch):
    targets = []
    original = training_loss()

    def record(logits, labels, smoothing):
        if torch.is_grad_enabled():
            targets.append(labels)
        return original(logits, labels, smoothing)

    set_training_loss(monkeypatch, record)
    mixing = {"mixup_alpha": 1.0, "off_epochs": 1}
    trainer = make_trainer(tmp_path, mixing=mixing, num_train_epochs=3)
    trainer.train()
    assert [labels.ndim for labels in targets] == [2] * 10 + [1] * 5
    assert "problem_type" not in (tmp_path / "checkpoint-15" / "config.json").read_text()


def test_training_images_equal_the_training_input(tmp_path):
    trainer = make_trainer(tmp_path, mixing={"cutmix_alpha": 1.0, "off_epochs": 1})
    images, targets = trainer.training_images(8)
    assert images.shape == (8, 16, 16, 3)
    assert targets.shape == (8, 3)
    assert 0 < targets.max(axis=1).min() < 1
    batch = trainer.train_dataset.__getitems__([(0, row) for row in (0, 5, 11, 16, 22, 27, 33, 39)])
    plain = make_trainer(tmp_path, policy="basic").training_images(8)[0]
    pixel_values = trainer._prepare_inputs(batch)["pixel_values"]
    shown = (pixel_values * trainer.augmentation.std + trainer.augmentation.mean).clamp(0, 255).round()
    assert np.array_equal(images, shown.byte().permute(0, 2, 3, 1).numpy())
    assert (images == plain).all(axis=-1).any()  # unchanged by CutMix
    assert (images != plain).any()


class Waits(TorchDispatchMode):
    """Record operations that synchronize with the device: reads, data-dependent sizes."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.WAITING:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_training_step_does_not_synchronize(tmp_path):
    """On a GPU each of these operations would wait for its queue.

    The first batch alone is looked at before it is learnt from.
    """
    options = {"logging_strategy": "no", "eval_strategy": "no", "save_strategy": "no", "ema_decay": 0.9}
    policy = {"policy": "rand_augment", "mixing": MIXING}
    trainer = make_trainer(tmp_path, bf16=True, per_device_train_batch_size=4, **options, **policy)
    waits, counts = Waits(), []

    class Count(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            if not counts:
                waits.__enter__()
            waits.found.clear()

        def on_step_end(self, args, state, control, **kwargs):
            counts.append(list(waits.found))
            if state.global_step == state.max_steps:
                waits.__exit__(None, None, None)

    trainer.add_callback(Count())
    trainer.train()
    assert len(counts) == 10
    assert counts[1:] == [[]] * 9


def test_training_step_on_fake_gpu_does_not_synchronize():
    """Trace all operations on a fake GPU: none may copy a value from or to the CPU."""

    class Crossings(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
            if len({tensor.device.type for tensor in tensors}) > 1:
                found.append(str(function))
            masked = "index" in function.overloadpacket.__name__ and any(t.dtype == torch.bool for t in tensors)
            if masked or function.overloadpacket.__name__ in Waits.WAITING:
                found.append(str(function))
            return function(*args, **(kwargs or {}))

    found = []
    with FakeTensorMode():
        mean = std = (0.5, 0.5, 0.5)
        augmentation = Augmentation((48, 48), mean, std).to("cuda")
        images = torch.zeros(4, 32, 32, 3, dtype=torch.uint8, device="cuda")
        levels, parameters = torch.zeros(4, 3, 32, 32, device="cuda"), torch.ones(4, 6, device="cuda")
        order = torch.arange(4, device="cuda")
        step = {"order": order, "parameters": parameters, "counts": {"affine": 3, "sharpness": 1}}
        boxes, flips = torch.ones(4, 4, device="cuda"), torch.zeros(4, 2, dtype=torch.bool, device="cuda")
        plan = {"boxes": boxes, "flips": flips, "operations": [step]}
        config = resolve_data_config({"input_size": (3, 48, 48), "crop_pct": 1.0})
        preprocessing = Preprocessing(config).to("cuda")
        with Crossings():
            augmentation({"images": images, "plan": plan}, torch.bfloat16)
            augmentation({"crops": images, "plan": plan})
            preprocessing({"images": images})
            preprocessing({"crops": images})
            for family in FAMILIES.values():
                family(levels, parameters, augmentation.constants)
    assert found == []


def test_augmentation_parameters_are_not_rounded_by_deepspeed(tmp_path, monkeypatch):
    """Under DeepSpeed the Trainer casts every floating-point tensor of a batch to the model's precision."""
    trainer = make_trainer(tmp_path, policy="trivial_augment")
    batch = trainer.train_dataset.__getitems__([(0, row) for row in range(8)])
    expected = trainer._prepare_inputs(batch)["pixel_values"]
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin)
    assert torch.equal(trainer._prepare_inputs(batch)["pixel_values"], expected)


NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None, reason="inductor needs a C++ compiler on the processor"
)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, NEEDS_COMPILER])])
def test_torch_compile_run_saves_plain_names(tmp_path, backend):
    options = {"num_train_epochs": 1, "ema_decay": 0.9}
    plain = make_trainer(tmp_path / "plain", **options)
    plain.train()
    compiled = make_trainer(tmp_path / "compiled", torch_compile=True, torch_compile_backend=backend, **options)
    compiled.train()
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)
    saved = load_file(tmp_path / "compiled" / "checkpoint-5" / "model.safetensors")
    assert saved.keys() == load_file(tmp_path / "plain" / "checkpoint-5" / "model.safetensors").keys()


def test_activation_checkpointing_does_not_change_the_result(tmp_path):
    plain = make_trainer(tmp_path / "plain", num_train_epochs=1)
    plain.train()
    saving = make_trainer(tmp_path / "saving", num_train_epochs=1, activation_checkpointing=True)
    saving.train()
    assert losses(saving) == pytest.approx(losses(plain), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"ema_decay": 0.6}, marks=pytest.mark.slow, id="EMA"),
        pytest.param({"swa_start": 0.3, "optim": "timm/nadamuon"}, id="SWA, nadamuon"),
    ],
)
def test_channels_last_trains_and_resumes_as_the_default_format(tmp_path, options):
    options["network"] = ("resnet10t", RESNET)

    def prepared(folder, callbacks=None):
        return make_trainer(folder, callbacks, channels_last=True, **options)

    plain = make_trainer(tmp_path / "plain", **options)
    plain.train()
    assert_resumes_exactly(prepared, tmp_path)
    resumed = prepared(tmp_path / "again")
    resumed.train(str(tmp_path / "plain" / "checkpoint-5"))  # of the other format
    assert losses(resumed) == pytest.approx(losses(plain), rel=1e-3)
    convolution = resumed.model.timm_model.layer1[0].conv1.weight
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    assert not convolution.is_contiguous()
    state = filter(torch.is_tensor, resumed.optimizer.state[convolution].values())
    moments = [value for value in state if value.shape == convolution.shape]
    assert moments
    assert all(value.stride() == convolution.stride() for value in moments)
    resumed.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(saved[name.removeprefix("timm_model.")], value) for name, value in weights(resumed).items())


def test_channels_last_converts_the_teacher(tmp_path):
    teacher = build_model(LABELS, architecture="resnet10t", image_size=16, timm_kwargs=RESNET)
    teacher.save_pretrained(tmp_path / "teacher")

    def prepared(folder, **options):
        objective = build_objective(parts()[0], teacher=str(tmp_path / "teacher"))
        return make_trainer(tmp_path / folder, num_train_epochs=1, objective=objective, **options)

    plain, trainer = prepared("plain"), prepared("channels_last", channels_last=True)
    for each in (plain, trainer):
        each.train()
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-3)
    weight = trainer.objective.teacher.model.timm_model.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_log_has_throughput(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in entries:
        assert entry["images_per_second"] > 0
        assert 0 <= entry["data_wait"] < 1
        assert 0 < entry["mfu"] < 1.5
    overall = trainer.speed.overall()
    assert trainer.speed.images == 80
    assert min(e["images_per_second"] for e in entries) <= overall["images_per_second"]
    trainer.predict(trainer.eval_dataset)
    assert trainer.speed.overall() == overall  # unchanged after training
    assert trainer.state.total_flos == 80 * int(trainer.speed.flops_per_image)


def test_speed_meter_excludes_evaluation(monkeypatch):
    clock = iter([0.0, 0.0, 10.0, 11.0, 12.0, 18.0, 20.0, 20.0])
    monkeypatch.setattr("hfvit.training.throughput.time.perf_counter", lambda: next(clock))
    meter = SpeedMeter(torch.device("cpu"))  # 0
    meter.start()  # 0
    meter.flops_per_image, meter.peak_flops = 100.0, 1000.0
    with meter.waiting():  # 10 to 11
        pass
    with meter.paused():  # 12 to 18
        pass
    meter.images = 28
    assert meter.since_last() == {"images_per_second": 2.0, "data_wait": 1 / 14, "mfu": 0.2}  # 20
    meter.stop()  # 20
    assert meter.overall()["images_per_second"] == 2.0


def test_training_flops_equal_the_published_ones():
    """timm lists 17.58 GMACs for ViT-B/16 at 224 px; the backward pass takes twice the forward pass."""
    model = build_model(LABELS, architecture="vit_base_patch16_224")
    assert training_flops(model) == pytest.approx(3 * 2 * 17.58e9, rel=0.01)
    model.freeze("backbone")
    assert training_flops(model) == pytest.approx(2 * 17.58e9, rel=0.01)


@pytest.mark.parametrize(
    ("device", "decoding", "processes", "expected"),
    [("cuda", True, 1, 15), ("cuda", True, 4, 3), ("cuda", False, 1, 1), ("cpu", True, 1, 8), ("cpu", False, 1, 0)],
)
def test_choose_workers_by_decoding_and_cores(monkeypatch, device, decoding, processes, expected):
    monkeypatch.setattr("hfvit.utils.environment.cores", lambda: 16)
    args = SimpleNamespace(
        chooses_workers=True,
        chooses_persistence=True,
        device=torch.device(device),
        world_size=processes,
        dataloader_num_workers=None,
    )
    HFViTTrainingArguments.choose_workers(args, decoding)
    assert args.dataloader_num_workers == expected
    assert args.dataloader_persistent_workers == (expected > 0)


def test_choose_workers_keeps_explicit_workers(tmp_path):
    args = HFViTTrainingArguments(output_dir=str(tmp_path), use_cpu=True, dataloader_num_workers=3)
    args.choose_workers(decoding=False)
    assert args.dataloader_num_workers == 3
    assert args.dataloader_persistent_workers


def test_workers_are_kept_between_epochs_and_stopped_after_training(tmp_path):
    class Count(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            pids.append({child.pid for child in multiprocessing.active_children()})

    pids = []
    trainer = make_trainer(tmp_path, [Count()], num_train_epochs=3, dataloader_num_workers=1)
    trainer.train()
    assert len(pids[0]) == 1
    assert len(pids[2]) == 2  # training and evaluation
    assert pids[0] <= pids[1] == pids[2]
    assert not multiprocessing.active_children()
    trainer.predict(trainer.eval_dataset)
    assert not multiprocessing.active_children()


def test_evaluation_of_another_data_set_with_workers(tmp_path):
    trainer = make_trainer(tmp_path, dataloader_num_workers=1, logging_steps=5)
    trainer.train()
    own = trainer.evaluate()
    other = copy.copy(trainer.eval_dataset)
    other.labels = (other.labels + 1) % len(LABELS)
    assert trainer.evaluate(other)["eval_loss"] != own["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == own["eval_loss"]


@pytest.mark.parametrize("enabled", [True, False])
def test_set_tf32_leaves_every_reading_valid(enabled):
    before = torch.backends.fp32_precision
    try:
        set_tf32(enabled)
        assert torch.get_float32_matmul_precision() == ("high" if enabled else "highest")
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == enabled
        assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if enabled else "ieee")
    finally:
        set_tf32(False)
        torch.backends.fp32_precision = before


def test_full_determinism_needs_deterministic_kernels(tmp_path):
    model = make_trainer(tmp_path).model
    args = SimpleNamespace(full_determinism=True, device=torch.device("cuda"))
    check_determinism(args, model, None)
    progressive, smaller = ProgressiveResizing(model, [8]), ProgressiveResizing(model, [], 8)
    conflicts = ((progressive, "progressive_image_size"), (smaller, "train_image_size"), (None, "patch_sizes"))
    for progressive, option in conflicts:
        if option == "patch_sizes":
            train_patch_sizes(model, [4, 8])
        with pytest.raises(RecipeError, match=rf"^full_determinism: .*\b{option}\b"):
            check_determinism(args, model, progressive)
        check_determinism(SimpleNamespace(full_determinism=True, device=torch.device("cpu")), model, progressive)


def test_mfu_relates_to_the_datasheet_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert datasheet_rate(torch.device("cuda"), torch.bfloat16) == 989e12
    assert datasheet_rate(torch.device("cuda"), torch.float32) is None
    assert datasheet_rate(torch.device("cpu"), torch.bfloat16) is None
    meter = SpeedMeter(torch.device("cpu"))
    meter.flops_per_image, meter.peak_flops, meter.datasheet_flops = 100.0, 800.0, 1000.0
    figures = meter.overall()
    assert figures["mfu"] == pytest.approx(1.25 * figures["mfu_datasheet"])


def test_cores_per_process_counts_local_processes(monkeypatch):
    monkeypatch.setattr("hfvit.utils.environment.cores", lambda: 96)
    assert cores_per_process(16) == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert cores_per_process(16) == 12
