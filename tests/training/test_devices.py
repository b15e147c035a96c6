"""Training, augmentation and inference on a GPU, and the same on the CPU: `pytest -m gpu -n 0` runs the GPU's part."""

import math

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.images import colored_split
from helpers.micro_trainer import assert_resumes_exactly, limit, losses, make_trainer, weights
from helpers.onnx_graphs import write_configs, write_graph
from timm.data import resolve_data_config

from hfvit.errors import ModelError
from hfvit.inference.classifier import load_classifier
from hfvit.recipe.arguments import POLICIES
from hfvit.transforms.augmentation import Augmentation
from hfvit.transforms.mixup import BatchMixing
from hfvit.transforms.preprocessing import Preprocessing
from hfvit.utils.counter_rng import sample_seeds

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
EVERYTHING = {"policy": "rand_augment", "mixing": {"mixup_alpha": 0.2, "random_erasing": 0.3}, "ema_decay": 0.9}


@pytest.fixture(params=["cpu", GPU])
def device(request):
    """Return a device; on the GPU, limits and deterministic algorithms of a test end with it."""
    yield request.param
    torch.use_deterministic_algorithms(False)
    if request.param == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def trainer_on(device, folder, callbacks=None, **options):
    return make_trainer(folder, callbacks, use_cpu=device == "cpu", **options)


def assert_learns(trainer):
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())
    assert trainer.evaluate()["eval_accuracy"] > 0.6


@pytest.mark.parametrize("bf16", [False, True])
def test_training_learns(device, tmp_path, bf16):
    assert_learns(trainer_on(device, tmp_path, bf16=bf16, num_train_epochs=4, **EVERYTHING))


@pytest.mark.gpu
def test_fp16_training_survives_overflows(tmp_path):
    trainer = trainer_on("cuda", tmp_path, fp16=True, num_train_epochs=6)
    trainer.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24)
    assert_learns(trainer)
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert not math.isfinite(norms[0])
    assert math.isfinite(norms[-1])
    assert trainer.accelerator.scaler.get_scale() < 2.0**24


@pytest.mark.slow
def test_compiled_training_equals_eager(device, tmp_path):
    eager = trainer_on(device, tmp_path / "eager")
    eager.train()
    compiled = trainer_on(device, tmp_path / "compiled", torch_compile=True)
    compiled.train()
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-2)


def test_resume_with_full_determinism_is_exact(device, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def prepared(folder, callbacks=None):
        return trainer_on(device, folder, callbacks, full_determinism=True, bf16=device == "cuda", **EVERYTHING)

    assert_resumes_exactly(prepared, tmp_path)


def test_out_of_memory_run_equals_a_run_with_smaller_batches(device, tmp_path):
    images = 4096 if device == "cuda" else 8
    options = {"rows": 2 * images, "global_batch_size": images, "num_train_epochs": 2, "warmup_steps": 0}
    trainer = trainer_on(device, tmp_path / "found", **options)
    if device == "cuda":
        free = torch.cuda.memory_reserved() + 64 * 2**20  # activations of 4,096 images take more
        torch.cuda.set_per_process_memory_fraction(free / torch.cuda.mem_get_info()[1])
    else:
        limit(trainer, 4)
        trainer.model.timm_model.blocks[0].drop_path1 = torch.nn.Identity()
    trainer.train()
    assert [event["event"] for event in trainer.events][:1] == ["out_of_memory"]
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
    size = trainer.out_of_memory.micro.size
    assert size < images
    expected = trainer_on(device, tmp_path / "small", per_device_train_batch_size=size, **options)
    expected.train()
    assert losses(trainer) == pytest.approx(losses(expected), rel=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_augmented_pixels_equal_those_of_the_cpu(device, policy):
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (64, 40, 40, 3), dtype=np.uint8))
    seeds = sample_seeds(0, 0, np.arange(64))
    augmentation = Augmentation((32, 32), (0.5,) * 3, (0.25,) * 3, policy=policy)
    plan = augmentation.sample(seeds, 40, 40)
    expected = augmentation({"images": images, "plan": plan})
    moved = {"images": images.to(device), "plan": _moved(plan, device)}
    pixels = augmentation.to(device)(moved)
    assert pixels.device.type == device
    difference = (pixels.cpu() - expected).abs()
    # Steps of equalize, posterize and solarize may fall on the other side.
    assert float((difference > 1e-3).float().mean()) < 1e-3
    mixing = {"mixup_alpha": 0.4, "random_erasing": 0.5}
    labels = torch.arange(64) % 3
    on_cpu, targets = BatchMixing(3, **mixing)(expected.clone(), labels, seeds)
    on_device, moved_targets = BatchMixing(3, **mixing)(expected.to(device), labels.to(device), seeds)
    torch.testing.assert_close(on_device.cpu(), on_cpu, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved_targets.cpu(), targets)


def _moved(plan, device):
    if isinstance(plan, torch.Tensor):
        return plan.to(device)
    if isinstance(plan, dict):
        return {key: _moved(value, device) for key, value in plan.items()}
    return [_moved(value, device) for value in plan] if isinstance(plan, list) else plan


def test_preprocessed_pixels_equal_those_of_the_cpu(device):
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (8, 50, 40, 3), dtype=np.uint8))
    config = resolve_data_config({"input_size": (3, 64, 64), "crop_pct": 0.9, "interpolation": "bicubic"})
    expected = Preprocessing(config)({"images": images})
    found = Preprocessing(config).to(torch.device(device))({"images": images.to(device)})
    torch.testing.assert_close(found.cpu(), expected, atol=1e-6, rtol=0)


def test_classifier_equals_the_trainer(device, tmp_path):
    trainer = trainer_on(device, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    expected = trainer.predict(trainer.eval_dataset).predictions
    images = [row["img"].convert("RGB") for row in colored_split(13, 1)]
    classifier = load_classifier(tmp_path / "model", device=device)
    probabilities = torch.softmax(torch.tensor(expected), dim=1).numpy()
    names = [trainer.model.config.id2label[index] for index in range(probabilities.shape[1])]
    for found, row in zip(classifier(images), probabilities, strict=True):
        assert [found[name] for name in names] == pytest.approx(row.tolist(), abs=1e-3)


@pytest.mark.parametrize("batch", ["batch_size", 4])
@pytest.mark.parametrize("pixels", [False, True])
def test_onnx_backend_computes_logits_of_tensors_in_its_memory(device, tmp_path, batch, pixels):
    if device == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    write_graph(tmp_path / "model.onnx", batch=batch, pixels=pixels)
    backend = load_classifier(write_configs(tmp_path), device=device).backend
    shape = (6, 16, 16, 3) if pixels else (6, 3, 16, 16)
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8))
    values = (values if pixels else values / 255).to(device)
    for images in (6, 4, 1, 0):
        found = backend(values[:images])
        assert found.device.type == device
        expected = backend(values[: max(images, 1)].cpu().numpy())[:images]
        np.testing.assert_allclose(found.cpu().numpy(), expected, atol=1e-5)
    with pytest.raises(ModelError, match=r"^pixels?_?\w*: .*\bmeta\b"):
        backend(values.to("meta"))
