"""Linear probes against scikit-learn and autograd, and runs of each fine-tuning method."""

import itertools
import json
import os
import re
import sys

import numpy as np
import pytest
import torch
from helpers.commands import run_command
from helpers.images import LABELS
from helpers.messages import assert_logged, assert_names, option_of
from helpers.micro_trainer import make_trainer
from helpers.models import build_model
from helpers.recipes import ARCHITECTURE, MICRO, MICRO_RECIPE
from helpers.runs import OUTPUT_FILES, lasting_files
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from transformers import AutoModelForImageClassification

from hfvit.artifacts.run_record import RunRecord
from hfvit.data.dataset import ArrayReader, ImageDataset
from hfvit.errors import ModelError, RecipeError
from hfvit.finetuning.linear_probe import (
    AugmentedPasses,
    FeatureExtractor,
    body_and_classifier,
    solve,
    solve_one_vs_rest,
)
from hfvit.hub.files import files_to_push
from hfvit.pipeline import main
from hfvit.recipe.loader import load_recipe
from hfvit.report.page import write_page

PIXELS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Save a checkpoint to start from."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(5)
    build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def write(tmp_path_factory, colors, start):
    """Write a micro recipe from `start` with additional lines; its output_dir is `out`."""

    def write(text):
        folder = tmp_path_factory.mktemp("run")
        lines = [line for line in MICRO_RECIPE.splitlines() if not line.startswith(("architecture", "model_args"))]
        own = [f"model_name_or_path: {start}", f"dataset_name: {colors}", f"output_dir: {folder / 'out'}", text]
        (folder / "recipe.yaml").write_text("\n".join([*lines, *own]) + "\n")
        return folder / "recipe.yaml", folder / "out"

    return write


def test_lora_run_writes_a_stock_checkpoint_and_the_adapter(write, start):
    path, out = write("finetuning: lora\nlora_rank: 2\nema_decay: 0.9\n")
    main([str(path), "--plots", "true"])
    assert lasting_files(out) == OUTPUT_FILES | {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    record = json.loads((out / "run.json").read_text())
    assert record["model"]["trained_parameters"] == 2 * 2 * (32 + 96 + 32 + 32) + 33 * 3
    base = load_file(start / "model.safetensors")
    assert record["model"]["parameters"] == sum(value.numel() for value in base.values())
    assert record["training"]["mfu"] > 0  # includes the adapters
    adapter, merged = load_file(out / "adapter" / "adapter_model.safetensors"), load_file(out / "model.safetensors")
    a, b = (adapter[f"base_model.model.blocks.1.attn.qkv.lora_{matrix}.weight"] for matrix in "AB")
    expected = base["blocks.1.attn.qkv.weight"] + 2.0 * b @ a
    torch.testing.assert_close(merged["blocks.1.attn.qkv.weight"], expected)
    assert torch.equal(merged["head.weight"], adapter["base_model.model.head.weight"])
    assert AutoModelForImageClassification.from_pretrained(out)(PIXELS).logits.shape == (4, 3)
    assert re.search(r"\bLoRA\W+rank 2\b", (out / "README.md").read_text())
    assert [file.path for file in files_to_push(out, "user/model")][1:3] == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    ]


def test_linear_probe_run_equals_scikit_learn_and_caches_features(write, start, caplog):
    path, out = write("finetuning: linear_probe\nprobe_c: [0.1, 0.01]\nvalidation_split: test\n")
    main([str(path), "--plots", "true"])
    assert lasting_files(out) == OUTPUT_FILES
    record = json.loads((out / "run.json").read_text())
    assert record["data"]["selected_by"] == "validation"
    assert record["model"]["trained_parameters"] == 33 * 3
    probe = record["training"]["probe"]
    assert probe["c"] == [0.01, 0.1]
    scores = [score["accuracy"] for score in probe["validation"]]
    assert probe["best_c"] == probe["c"][int(np.argmax(scores))]
    assert record["metrics"]["validation"]["accuracy"] == max(scores)
    assert "C = " in (out / "README.md").read_text()
    page = write_page(RunRecord.load(out), out, {}).read_text()
    assert_names(page, f"C = {probe['best_c']:g}")
    assert "0 steps" not in page

    old, new = load_file(start / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name for name, value in old.items() if not torch.equal(value, new[name])} == {"head.weight", "head.bias"}
    caplog.clear()
    with caplog.at_level("INFO"):
        main([str(path), "--output_dir", str(out.parent / "again"), "--probe_c", "0.01", "0.1"])
    assert sum("hfvit_features" in record.getMessage() for record in caplog.records) == 2  # both splits from the cache
    again = load_file(out.parent / "again" / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in new.items())


@pytest.mark.parametrize(("classes", "balance"), [(3, "none"), (2, "none"), (3, "weight")])
def test_solve_has_zero_gradient_of_the_penalized_loss(classes, balance):
    rng = np.random.default_rng(0)
    labels = rng.choice(classes, 90, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    features = (rng.normal(size=(90, 5)) + labels[:, None] * [1.0, 0, 0, 0.5, 0]).astype(np.float32)
    features *= [1, 10, 100, 1, 0.1]
    [(weight, bias)] = solve(features, labels, classes + 1, [0.3], balance)
    assert weight.shape == (classes + 1, 5)
    assert (features @ weight.T + bias).argmax(1).max() < classes  # a class without images is never predicted
    mean, std = features.mean(0), features.std(0)
    w = torch.tensor(weight[:classes] * std, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(bias[:classes] + weight[:classes] @ mean, dtype=torch.float64, requires_grad=True)
    x, y = torch.tensor((features - mean) / std, dtype=torch.float64), torch.tensor(labels)
    counts = np.bincount(labels)
    balanced = torch.tensor(len(labels) / (classes * counts)) if balance == "weight" else None
    loss = torch.nn.functional.cross_entropy(x @ w.T + b, y, weight=balanced, reduction="sum")
    # With two classes scikit-learn penalizes the difference of the weight vectors.
    penalty = (w[1] - w[0]).square().sum() / 2 if classes == 2 else w.square().sum() / 2
    (0.3 * loss + penalty).backward()
    assert b.grad.abs().max() < 0.02
    assert w.grad.abs().max() < 0.02
    reference = LogisticRegression(C=0.3, class_weight="balanced" if balanced is not None else None)
    expected = reference.fit(StandardScaler().fit_transform(features), labels).predict_proba((features - mean) / std)
    found = torch.softmax(torch.tensor(features @ weight.T + bias), 1).numpy()[:, :classes]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_augmented_passes_differ_and_are_reproducible(tmp_path):
    train = make_trainer(tmp_path).train_dataset
    passes = AugmentedPasses(train, 2)
    assert len(passes) == 2 * len(train)
    assert passes.labels.tolist() == [*train.labels, *train.labels]
    first, second = passes.__getitems__([3]), passes.__getitems__([3 + len(train)])
    assert torch.equal(first["images"], second["images"])
    assert first["plan"]["seeds"] != second["plan"]["seeds"]
    assert passes.__getitems__([3])["plan"]["seeds"] == first["plan"]["seeds"]


def test_features_of_other_images_seeds_augmentations_or_weights_are_not_those_of_the_cache(tmp_path):
    trainer = make_trainer(tmp_path)
    extractor, train = FeatureExtractor(trainer), trainer.train_dataset
    plain, passes = ImageDataset(train.labels, train.reader), AugmentedPasses(train, 1)
    found = [extractor.features(plain), extractor.features(passes)]
    assert np.array_equal(extractor.features(plain), found[0])
    turned = ImageDataset(train.labels[::-1], ArrayReader(train.reader.pixels, train.reader.rows[::-1].copy()))
    np.testing.assert_allclose(extractor.features(turned), found[0][::-1], atol=1e-5)
    train.seed += 1
    found.append(extractor.features(passes))
    train.augmentation.crop_scale = (0.1, 0.2)
    found.append(extractor.features(passes))
    with torch.no_grad():
        trainer.model.timm_model.blocks[0].attn.qkv.weight.mul_(-1)
    found.append(extractor.features(plain))
    assert min(np.abs(one - other).max() for one, other in itertools.combinations(found, 2)) > 1e-3


def test_linear_probe_run_with_augmented_passes(write):
    path, out = write("finetuning: linear_probe\nprobe_c: [0.1]\nprobe_passes: 2\nclass_balance: weight\n")
    main([str(path)])
    probe = json.loads((out / "run.json").read_text())["training"]["probe"]
    assert probe["rows"] == 2 * 52
    assert probe["features"] == 32


@pytest.mark.slow
def test_benchmark_has_a_row_for_each_method(tmp_path):
    rows = tmp_path / "rows.json"
    chosen = ("linear_probe", "soup", "half", "half_features", "imbalanced_sample")
    words = (
        "benchmarks/finetuning.py",
        "--quick",
        "--json",
        rows,
        "--runs",
        tmp_path / "runs.jsonl",
        "--only",
        *chosen,
    )
    result = run_command(sys.executable, *words, timeout=500)
    assert result.returncode == 0, result.stderr
    found = {row["method"]: row for row in json.loads(rows.read_text())["rows"]}
    assert found.keys() == {*chosen, "full"}  # the teacher
    assert all(f"| {name} " in result.stdout for name in found)
    assert all(0 < row["test accuracy"] < 1 and row["peak MiB"] > 100 for row in found.values())
    assert found["linear_probe"]["trained parameters"] == 49 * 10
    assert found["half"]["trained parameters"] == found["half_features"]["trained parameters"]
    assert found["half"]["trained parameters"] < found["full"]["trained parameters"]
    again = run_command(sys.executable, *words)  # reads the runs
    assert again.stdout == result.stdout
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 6


def test_linear_probe_out_of_memory_reduces_the_batch(write, monkeypatch, tmp_path, caplog):
    path, out = write("finetuning: linear_probe\nprobe_c: [0.1]\nprobe_passes: 2\n")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "one")
    main([str(path)])

    def limited(model):
        body, classifier = body_and_classifier(model)

        def few(pixel_values):
            if len(pixel_values) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
            return body(pixel_values)

        return few, classifier

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "other")
    monkeypatch.setattr("hfvit.finetuning.linear_probe.body_and_classifier", limited)
    abandoned = tmp_path / "other" / "hfvit_features" / ".of-a-killed-run.1.npy"
    abandoned.parent.mkdir(parents=True)
    abandoned.touch()
    os.utime(abandoned, (0, 0))
    main([str(path), "--output_dir", str(tmp_path / "out")])
    expected, found = (load_file(folder / "model.safetensors")["head.weight"] for folder in (out, tmp_path / "out"))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert not abandoned.exists()
    events = json.loads((tmp_path / "out" / "run.json").read_text())["events"]
    assert events[-1]["event"] == "out_of_memory_in_feature_extraction"
    assert events[-1]["then"] <= 4
    assert_logged(caplog, "WARNING", events[-1]["images"], events[-1]["then"], "per_device_eval_batch_size")


def test_linear_probe_of_nonlinear_classifier_raises():
    name, size = "deit_tiny_distilled_patch16_224", {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = build_model(LABELS, architecture=name, image_size=16, timm_kwargs=size)
    with pytest.raises(ModelError, match=rf"^finetuning: linear_probe\b.*\b{name}\b"):
        body_and_classifier(model)


@pytest.mark.parametrize(
    ("line", "option", "data"),
    [
        ("finetuning: adapter", "finetuning", ["'adapter'", "full, lora, linear_probe"]),
        ("finetuning: lora\nfreeze: 1", "freeze", ["finetuning=lora"]),
        ("finetuning: lora\nlora_rank: 0", "lora_rank", [0]),
        ("finetuning: linear_probe\nmixup_alpha: 0.2", "mixup_alpha", ["finetuning=linear_probe"]),
        ("finetuning: linear_probe\nclass_balance: sample", "class_balance", ["finetuning=linear_probe"]),
        ("finetuning: linear_probe\nprobe_c: [0.0]", "probe_c", ["[0.0]"]),
        ("distillation_alpha: 2", "distillation_alpha", [2.0]),
    ],
)
def test_load_recipe_of_a_method_with_a_wrong_value_names_option_and_data(write, line, option, data):
    path, _ = write(line)
    with pytest.raises(RecipeError) as caught:
        load_recipe([str(path)])
    assert option_of(caught.value) == option
    assert_names(caught.value, *data)


def test_probe_and_lora_without_checkpoint_raise(recipe):
    with pytest.raises(RecipeError, match=r"^architecture: .*finetuning=lora"):
        load_recipe([str(recipe), "--finetuning", "lora"])


@pytest.mark.parametrize("balance", ["none", "weight"])
def test_solve_one_vs_rest_is_sklearns_for_each_label(balance):
    rng = np.random.default_rng(3)
    features = rng.normal(size=(60, 5)).astype(np.float32) * [1, 2, 3, 4, 5] + 1
    targets = np.column_stack([features[:, 0] > 1, features[:, 1] + features[:, 2] > 2, np.zeros(60), np.ones(60)])
    solutions = solve_one_vs_rest(features, targets.astype(np.float32), 4, [0.01, 1.0], balance)
    standardized = StandardScaler().fit_transform(features)
    class_weight = "balanced" if balance == "weight" else None
    for value, (weight, bias) in zip((0.01, 1.0), solutions, strict=True):
        logits = features @ weight.T + bias
        for index in range(2):
            model = LogisticRegression(C=value, max_iter=2000, class_weight=class_weight)
            expected = model.fit(standardized, targets[:, index]).decision_function(standardized)
            assert logits[:, index] == pytest.approx(expected, abs=1e-3)
        assert (logits[:, 2] < -100).all()
        assert (logits[:, 3] > 100).all()
