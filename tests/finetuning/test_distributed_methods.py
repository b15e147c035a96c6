"""LoRA, linear probe and distillation on two processes (gloo, CPU) equal one process.

Two processes sum a batch's gradients in another order, and nothing else differs: losses and features are held to
float32's rounding. Adam divides by a gradient's own size, so that a weight whose gradient is near zero can follow its
rounding; weights are therefore held to a thousandth of how far the run has moved them, all together.
"""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from helpers.images import LABELS
from helpers.killing import Killer
from helpers.models import build_model
from helpers.recipes import ARCHITECTURE, MICRO, MICRO_RECIPE
from safetensors.torch import load_file

ROUNDING = 1e-5  # relative; float32 has 6e-8, and losses differed by up to three times that


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ways")


@pytest.fixture(scope="module")
def start(folder):
    """Save a checkpoint to start from and to distill."""
    torch.manual_seed(5)
    model = build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO)
    torch.nn.init.normal_(model.timm_model.head.weight)  # a new head is nearly zero
    model.save_pretrained(folder / "start")
    return folder / "start"


@pytest.fixture
def train(folder, colors):
    """Train the micro recipe with other lines instead of its architecture; returns the output folder."""

    def train(text, processes, **job):
        out = folder / f"out{processes}"
        shutil.rmtree(out, ignore_errors=True)
        lines = [line for line in MICRO_RECIPE.splitlines() if not line.startswith("architecture")]
        own = [f"dataset_name: {colors}", f"output_dir: {out}", "use_cpu: true"]
        (folder / "recipe.yaml").write_text("\n".join([*lines, *own, text]) + "\n")
        codes = Killer().run(out, argv=[str(folder / "recipe.yaml")], processes=processes, **job)
        assert set(codes) == {0}, out.with_name(f"{out.name}.0.log").read_text()
        return out

    return train


def read_record(out):
    return json.loads((out / "run.json").read_text())


def assert_same_result(several, single):
    one, two = read_record(single), read_record(several)
    assert (one["training"]["processes"], two["training"]["processes"]) == (1, 2)
    first, second = ([entry["loss"] for entry in run["history"] if "loss" in entry] for run in (one, two))
    assert second == pytest.approx(first, rel=ROUNDING)
    for role, images in (("validation", 13), ("test", 31)):  # odd: one process gets a padding image
        assert two["metrics"][role]["images"] == images
        assert two["metrics"][role]["confusion_matrix"] == one["metrics"][role]["confusion_matrix"]
        assert two["metrics"][role]["loss"] == pytest.approx(one["metrics"][role]["loss"], rel=ROUNDING)
    assert {str(path.relative_to(several)) for path in several.rglob("*")} == {
        str(path.relative_to(single)) for path in single.rglob("*")
    }


def assert_same_weights(several, single, start=None):
    """Assert equal differences from `start`, or from zero."""
    before = load_file(start / "model.safetensors") if start else {}
    one, two = (load_file(folder / "model.safetensors") for folder in (single, several))
    assert one.keys() == two.keys()
    way = torch.cat([(value - before.get(name, 0)).flatten() for name, value in one.items()])
    apart = torch.cat([(two[name] - value).flatten() for name, value in one.items()])
    assert way.norm() > 0.1
    assert apart.norm() < 1e-3 * way.norm()


@pytest.mark.slow
def test_lora_on_two_processes_equals_one(train, start):
    text = f"model_name_or_path: {start}\nfinetuning: lora\nlora_rank: 2\nlora_alpha: 4"
    single, several = train(text, processes=1), train(text, processes=2)
    assert_same_result(several, single)
    assert_same_weights(several, single, start)
    adapter, expected = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (several, single))
    assert adapter.keys() == expected.keys()
    for name, value in expected.items():
        assert value.any()  # B is initialized with zeros
        assert (adapter[name] - value).norm() < 1e-3 * value.norm()
    base, merged = load_file(start / "model.safetensors"), load_file(several / "model.safetensors")
    for name in ("blocks.0.attn.qkv", "blocks.1.attn.proj"):
        a, b = (adapter[f"base_model.model.{name}.lora_{matrix}.weight"] for matrix in "AB")
        torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + 4 / 2 * b @ a)
    assert torch.equal(merged["head.weight"], adapter["base_model.model.head.weight"])


def test_linear_probe_on_two_processes_equals_one(train, start):
    """Compare the cached features too, which have the same names."""
    text = f"model_name_or_path: {start}\nfinetuning: linear_probe\nprobe_passes: 2"
    cache, kept, runs = datasets.config.HF_DATASETS_CACHE / "hfvit_features", [], []
    for processes in (1, 2):
        shutil.rmtree(cache, ignore_errors=True)
        runs.append(train(text, processes))
        kept.append({path.name: np.load(path) for path in cache.iterdir()})
    assert_same_result(runs[1], runs[0])
    assert {len(features) for features in kept[0].values()} == {13, 2 * 52}
    assert kept[0].keys() == kept[1].keys()
    for name, features in kept[0].items():
        np.testing.assert_allclose(kept[1][name], features, rtol=ROUNDING, atol=ROUNDING)
    probes = [read_record(out)["training"]["probe"] for out in runs]
    assert probes[0]["best_c"] == probes[1]["best_c"]
    assert_same_weights(runs[1], runs[0], start)


def test_linear_probe_with_a_cache_per_machine_extracts_on_all_or_none(train, start, tmp_path):
    text = f"model_name_or_path: {start}\nfinetuning: linear_probe\nddp_timeout: 60"
    job = {"machines": [[], []], "caches": [str(tmp_path / name) for name in "ab"]}
    first, second = (tmp_path / name / "hfvit_features" for name in "ab")
    train(text, 2, **job)
    kept = {path.name: np.load(path) for path in second.iterdir()}
    assert len(list(first.iterdir())) == len(kept) == 2
    next(second.iterdir()).unlink()
    train(text, 2, **job)
    assert {path.name for path in second.iterdir()} == kept.keys()
    for name, features in kept.items():
        np.testing.assert_allclose(np.load(second / name), features, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.slow
def test_averaged_weights_of_two_processes_equal_those_of_one(train):
    text = f"architecture: {ARCHITECTURE}\nema_decay: 0.9"
    single, several = train(text, processes=1), train(text, processes=2)
    assert_same_result(several, single)
    assert_same_weights(several, single)


@pytest.mark.slow
def test_distillation_on_two_processes_equals_one(train, start):
    """Use a student with a distillation token."""
    text = f"architecture: deit_tiny_distilled_patch16_224\nteacher: {start}\ndistillation_alpha: 0.7"
    single, several = train(text, processes=1), train(text, processes=2)
    assert_same_result(several, single)
    assert_same_weights(several, single)
