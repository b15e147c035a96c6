"""Out of memory: a run that splits its batches equals one with smaller batches."""

import json

import pytest
import torch
from helpers.messages import assert_logged, assert_names
from helpers.micro_trainer import limit, losses, make_trainer, weights
from transformers import TrainerCallback

from hfvit.data.dataset import ImageDataset
from hfvit.errors import OutOfMemoryError
from hfvit.training.out_of_memory import MicroBatchSize, is_out_of_memory, micro_batches

MIXED = {"mixup_alpha": 0.5, "random_erasing": 0.3}


@pytest.mark.parametrize("device_batch", [8, 4])  # 4: two accumulated batches, both fail
def test_out_of_memory_run_equals_a_run_with_smaller_batches(tmp_path, caplog, device_batch):
    options = {"mixing": MIXED, "policy": "rand_augment", "ema_decay": 0.9, "logging_steps": 2}
    expected = limit(make_trainer(tmp_path / "small", per_device_train_batch_size=2, **options), 2)
    expected.train()
    trainer = limit(make_trainer(tmp_path / "found", per_device_train_batch_size=device_batch, **options), 2)
    trainer.train()
    assert losses(trainer) == losses(expected)
    final = weights(expected)
    assert all(torch.equal(value, final[name]) for name, value in weights(trainer).items())
    tried = [(8, 4), (4, 2)] if device_batch == 8 else [(4, 2)]
    assert trainer.events == [{"event": "out_of_memory", "step": 1, "images": a, "then": b} for a, b in tried]
    assert_logged(caplog, "WARNING", 1, 4, 2, 8, "per_device_train_batch_size")


def test_out_of_memory_in_the_second_accumulated_batch(tmp_path):
    expected = make_trainer(tmp_path / "small", per_device_train_batch_size=2)
    expected.model.timm_model.blocks[0].drop_path1 = torch.nn.Dropout(0.1)
    expected.train()
    trainer = make_trainer(tmp_path / "found", per_device_train_batch_size=4)
    limit(trainer, 4)
    limited, calls = trainer.model.timm_model.forward_features, []

    def second(pixel_values, *args, **kwargs):
        if not pixel_values.is_meta:  # operations are counted without storage
            calls.append(len(pixel_values))
        if calls == [4, 4]:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: ...")
        return limited(pixel_values, *args, **kwargs)

    trainer.model.timm_model.forward_features = second
    trainer.train()
    assert calls[:6] == [4, 4, 2, 2, 2, 2]
    assert losses(trainer) == losses(expected)
    final = weights(expected)
    assert all(torch.equal(value, final[name]) for name, value in weights(trainer).items())


def test_the_size_is_remembered(tmp_path):
    trainer = limit(make_trainer(tmp_path, num_train_epochs=1, per_device_eval_batch_size=8), 4)
    trainer.train()
    progress = json.loads((tmp_path / "checkpoint-5" / "progress.json").read_text())
    assert (progress["device_batch"], progress["micro_batch"], progress["eval_batch"]) == (8, 4, 8)
    resumed = make_trainer(tmp_path, num_train_epochs=2)
    resumed.train(str(tmp_path / "checkpoint-5"))
    assert (
        resumed.out_of_memory.micro.size,
        resumed.out_of_memory.micro.count,
        resumed.out_of_memory.eval_batch_size,
    ) == (4, 2, 8)
    assert resumed.events == trainer.events
    other = make_trainer(tmp_path / "other", num_train_epochs=2, per_device_train_batch_size=2)
    other.train(str(tmp_path / "checkpoint-5"))  # somebody has chosen another size
    assert other.out_of_memory.micro.size == 2


def test_only_the_evaluation_batch_shrinks_in_evaluation(tmp_path, caplog):
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    trainer = limit(make_trainer(tmp_path / "limited"), 4, evaluation=True)
    trainer.model.timm_model.blocks[0].drop_path1 = torch.nn.Identity()
    trainer.train()
    assert losses(trainer) == losses(plain)
    for name in ("eval_loss", "eval_accuracy"):
        found, expected = ([e[name] for e in t.state.log_history if name in e] for t in (trainer, plain))
        assert found == pytest.approx(expected, rel=1e-6)
    assert (trainer.out_of_memory.micro.size, trainer.out_of_memory.eval_batch_size) == (8, 3)
    assert [event["then"] for event in trainer.events] == [6, 3]  # of 13 images, the full split
    assert_logged(caplog, "WARNING", 6, 3, "per_device_eval_batch_size")


def test_one_image_that_does_not_fit_is_one_message(tmp_path):
    trainer = limit(make_trainer(tmp_path), 0)
    with pytest.raises(OutOfMemoryError) as caught:
        trainer.train()
    assert caught.value.exit_code == 6
    assert_names(caught.value, 1, 8, "GiB", "image_size", "activation_checkpointing")
    assert [event["then"] for event in trainer.events] == [4, 2, 1]


def test_mixing_keeps_pairs(tmp_path):
    trainer = limit(make_trainer(tmp_path, mixing=MIXED), 1)
    with pytest.raises(OutOfMemoryError) as caught:
        trainer.train()
    assert_names(caught.value, 2, "image_size")
    assert trainer.events[-1]["then"] == 2  # mixing needs pairs


def test_other_errors_are_not_out_of_memory(tmp_path):
    trainer = make_trainer(tmp_path)

    def broken(*args, **kwargs):
        raise RuntimeError("shapes cannot be multiplied")

    trainer.model.timm_model.forward_features = broken
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trainer.train()


TEXTS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes",
)


@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_out_of_memory_errors_are_recognized(text):
    assert is_out_of_memory(RuntimeError(text))
    assert text.startswith(("CUDA out", "[")) or is_out_of_memory(torch.AcceleratorError(text, 2))
    assert not is_out_of_memory(ValueError(text))


def test_other_cuda_errors_are_not_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("any text"))
    for text in ("CUDA error: an illegal memory access was encountered", "CUDNN_STATUS_EXECUTION_FAILED"):
        assert not is_out_of_memory(RuntimeError(text))


def test_out_of_memory_in_the_optimizer_is_one_message(tmp_path):
    class Failing(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            def step(closure=None):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

            optimizer.optimizer.step = step

    trainer = make_trainer(tmp_path, [Failing()])
    with pytest.raises(OutOfMemoryError) as caught:
        trainer.train()
    assert caught.value.exit_code == 6
    assert_names(caught.value, "optimizer", "GiB")
    assert trainer.events == []  # a smaller batch would not help


@pytest.mark.parametrize(
    ("images", "even", "sizes"), [(8, False, [4, 2, 1]), (12, True, [6, 2]), (6, False, [3, 1]), (5, False, [1])]
)
def test_micro_batch_sizes_divide_the_batch(images, even, sizes):
    micro, found = MicroBatchSize(images, even), []
    while size := micro.next_size():
        micro.shrink(size)
        found.append(micro.size)
    assert found == sizes


def test_micro_batch_equals_the_smaller_batch(tmp_path):
    dataset: ImageDataset = make_trainer(tmp_path, policy="rand_augment").train_dataset
    rows = [(0, row) for row in range(7)]
    slices = micro_batches(dataset.__getitems__(rows), 3, dataset.augmentation)
    assert [len(part["labels"]) for part in slices] == [3, 3, 1]
    for part, start in zip(slices, (0, 3, 6), strict=True):
        expected = dataset.__getitems__(rows[start : start + 3])
        assert torch.equal(dataset.augmentation(part), dataset.augmentation(expected))
        assert part["plan"]["seeds"].tolist() == expected["plan"]["seeds"].tolist()
