"""LoRA and linear probe: what trains, what is left, and what comes out, against peft, scikit-learn and autograd."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURE, LABELS, MICRO, MICRO_RECIPE, run_command
from micro import assert_resumes_exactly, make_trainer, weights
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from test_train import OUTPUT_FILES, files
from transformers import AutoModelForImageClassification

import hfvit.lora
from hfvit.building import build_model
from hfvit.checkpoints import check_same_model, newest_checkpoint
from hfvit.errors import ModelError, RecipeError
from hfvit.hub_files import files_to_push
from hfvit.linear_probe import AugmentedPasses, body_and_classifier, solve
from hfvit.lora import add_lora, target_layers
from hfvit.recipe import load_recipe
from hfvit.report_page import write_page
from hfvit.train import main

PIXELS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def lasting(folder):
    """The files of a run, without the plots that it has only where it has mistakes to show."""
    return {name for name in files(folder) if "mistakes" not in name}


def logits(model):
    with torch.no_grad():
        return model.eval()(PIXELS).logits


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint to start from."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(5)
    build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def write(tmp_path_factory, colours, start):
    """A micro recipe that starts from `start`, with further lines; its output_dir is `out` beside it."""

    def write(text):
        folder = tmp_path_factory.mktemp("run")
        lines = [line for line in MICRO_RECIPE.splitlines() if not line.startswith(("architecture", "model_args"))]
        own = [f"model_name_or_path: {start}", f"dataset_name: {colours}", f"output_dir: {folder / 'out'}", text]
        (folder / "recipe.yaml").write_text("\n".join([*lines, *own]) + "\n")
        return folder / "recipe.yaml", folder / "out"

    return write


def test_lora_trains_the_adapters_and_the_head_alone_and_is_merged(tmp_path):
    from peft import PeftModel

    trainer = make_trainer(tmp_path)
    before, base = weights(trainer), trainer.model.timm_model.state_dict()
    base = {name: value.clone() for name, value in base.items()}
    lora = add_lora(trainer.model, rank=2, alpha=4)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    layers = [f"timm_model.blocks.{block}.attn.{layer}" for block in (0, 1) for layer in ("qkv", "proj")]
    adapters = {f"{layer}.lora_{matrix}.default.weight" for layer in layers for matrix in "AB"}
    assert trained == adapters | {"timm_model.head.weight", "timm_model.head.bias"}
    trainer.train()
    assert trainer.trained_parameters == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    after = {name.replace(".base_layer", ""): value for name, value in weights(trainer).items()}
    assert after.keys() - before.keys() == adapters
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"timm_model.head.weight", "timm_model.head.bias"}
    assert all(after[name].any() for name in adapters)

    adapted, folder = logits(trainer.model), lora.save(tmp_path)
    lora.merge()
    assert weights(trainer).keys() == before.keys()
    torch.testing.assert_close(logits(trainer.model), adapted, atol=1e-5, rtol=1e-5)

    fresh = build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO).timm_model
    fresh.load_state_dict(base)
    torch.nn.init.normal_(fresh.head.weight)  # the adapter brings its own head
    loaded = PeftModel.from_pretrained(fresh, str(folder)).eval()
    torch.testing.assert_close(loaded(PIXELS).detach(), adapted, atol=1e-6, rtol=1e-6)


def test_a_resumed_lora_run_ends_where_an_unbroken_one_does(tmp_path):
    def prepared(folder, callbacks=None):
        trainer = make_trainer(folder, callbacks)
        add_lora(trainer.model, rank=2, alpha=4, dropout=0.2)
        return trainer

    assert_resumes_exactly(prepared, tmp_path)


FAMILIES = {
    "beit_base_patch16_224": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    "eva02_tiny_patch14_224": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    "swinv2_tiny_window8_256": {
        "patch_size": 2,
        "embed_dim": 16,
        "depths": (1, 1),
        "num_heads": (1, 2),
        "window_size": 4,
    },
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_lora_in_other_families(architecture):
    model = build_model(LABELS, architecture=architecture, image_size=32, timm_kwargs=FAMILIES[architecture])
    pixels = torch.randn(2, 3, 32, 32)
    for parameter in model.parameters():  # several families begin with branches that are nearly off
        torch.nn.init.normal_(parameter, std=0.2)
    plain = model.eval()(pixels).logits
    layers = target_layers(model.timm_model)
    assert layers
    lora = add_lora(model, rank=2, alpha=4)
    torch.testing.assert_close(model.eval()(pixels).logits, plain, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted = model(pixels).logits
    assert not torch.allclose(adapted, plain, atol=1e-3)
    lora.merge()
    torch.testing.assert_close(model(pixels).logits, adapted, atol=1e-4, rtol=1e-3)


def test_a_layer_that_the_network_does_not_call_gets_no_lora(monkeypatch):
    monkeypatch.setattr(hfvit.lora, "_set_separate_bias", lambda *_: None)
    name = "beit_base_patch16_224"
    model = build_model(LABELS, architecture=name, image_size=16, timm_kwargs=FAMILIES[name])
    with pytest.raises(ModelError, match=r"does not call blocks\.0\.attn\.qkv, so a LoRA there would learn nothing"):
        add_lora(model, rank=2, alpha=4)


def test_lora_targets_by_name():
    model = build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO).timm_model
    assert target_layers(model, ["fc1", "fc2"]) == [f"blocks.{b}.mlp.fc{n}" for b in (0, 1) for n in (1, 2)]
    with pytest.raises(ModelError, match=r"no layer of the model is named 'qvk'; its layers are .*Did you mean 'qkv'"):
        target_layers(model, ["qvk"])


def test_a_lora_run_leaves_a_stock_checkpoint_and_the_adapter(write, start):
    path, out = write("finetuning: lora\nlora_rank: 2\nema_decay: 0.9\n")
    main([str(path)])
    assert lasting(out) == OUTPUT_FILES | {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    facts = json.loads((out / "run.json").read_text())
    assert facts["model"]["trained_parameters"] == 2 * 2 * (32 + 96 + 32 + 32) + 33 * 3
    base = load_file(start / "model.safetensors")
    assert facts["model"]["parameters"] == sum(value.numel() for value in base.values())
    assert facts["training"]["mfu"] > 0  # the operations of adapters are counted, too
    adapter, merged = load_file(out / "adapter" / "adapter_model.safetensors"), load_file(out / "model.safetensors")
    a, b = (adapter[f"base_model.model.blocks.1.attn.qkv.lora_{matrix}.weight"] for matrix in "AB")
    expected = base["blocks.1.attn.qkv.weight"] + 2.0 * b @ a
    torch.testing.assert_close(merged["blocks.1.attn.qkv.weight"], expected)
    assert torch.equal(merged["head.weight"], adapter["base_model.model.head.weight"])
    assert AutoModelForImageClassification.from_pretrained(out)(PIXELS).logits.shape == (4, 3)
    assert "of LoRA (rank 2), merged into the weights" in (out / "README.md").read_text()
    assert [file.path for file in files_to_push(out, "user/model")][1:3] == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    ]


def test_a_linear_probe_equals_scikit_learns_and_is_kept(write, start, caplog):
    path, out = write("finetuning: linear_probe\nprobe_c: [0.1, 0.01]\nvalidation_split: test\n")
    main([str(path)])
    assert lasting(out) == OUTPUT_FILES
    facts = json.loads((out / "run.json").read_text())
    assert facts["data"]["selected_by"] == "validation"
    assert facts["model"]["trained_parameters"] == 33 * 3
    probe = facts["training"]["probe"]
    assert probe["c"] == [0.01, 0.1]
    scores = [score["accuracy"] for score in probe["validation"]]
    assert probe["best_c"] == probe["c"][int(np.argmax(scores))]
    assert facts["metrics"]["validation"]["accuracy"] == max(scores)
    assert "C = " in (out / "README.md").read_text()
    page = write_page(facts, out, {}).read_text()
    assert f"C = {probe['best_c']:g} of 2 by validation accuracy" in page
    assert "0 steps" not in page

    old, new = load_file(start / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name for name, value in old.items() if not torch.equal(value, new[name])} == {"head.weight", "head.bias"}
    caplog.clear()
    with caplog.at_level("INFO"):
        main([str(path), "--output_dir", str(out.parent / "again"), "--probe_c", "0.01", "0.1"])
    assert sum("features of images, from" in record.message for record in caplog.records) == 2
    again = load_file(out.parent / "again" / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in new.items())


@pytest.mark.parametrize(("classes", "balance"), [(3, "none"), (2, "none"), (3, "weight")])
def test_the_solution_is_where_the_penalised_loss_is_flat(classes, balance):
    rng = np.random.default_rng(0)
    labels = rng.choice(classes, 90, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    features = (rng.normal(size=(90, 5)) + labels[:, None] * [1.0, 0, 0, 0.5, 0]).astype(np.float32)
    features *= [1, 10, 100, 1, 0.1]
    [(weight, bias)] = solve(features, labels, classes + 1, [0.3], balance)
    assert weight.shape == (classes + 1, 5)
    assert (features @ weight.T + bias).argmax(1).max() < classes  # a class without images is never the answer
    mean, std = features.mean(0), features.std(0)
    w = torch.tensor(weight[:classes] * std, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(bias[:classes] + weight[:classes] @ mean, dtype=torch.float64, requires_grad=True)
    x, y = torch.tensor((features - mean) / std, dtype=torch.float64), torch.tensor(labels)
    counts = np.bincount(labels)
    balanced = torch.tensor(len(labels) / (classes * counts)) if balance == "weight" else None
    loss = torch.nn.functional.cross_entropy(x @ w.T + b, y, weight=balanced, reduction="sum")
    # With two classes scikit-learn penalises the one weight vector that tells them apart.
    penalty = (w[1] - w[0]).square().sum() / 2 if classes == 2 else w.square().sum() / 2
    (0.3 * loss + penalty).backward()
    assert b.grad.abs().max() < 0.02
    assert w.grad.abs().max() < 0.02
    reference = LogisticRegression(C=0.3, class_weight="balanced" if balanced is not None else None)
    expected = reference.fit(StandardScaler().fit_transform(features), labels).predict_proba((features - mean) / std)
    found = torch.softmax(torch.tensor(features @ weight.T + bias), 1).numpy()[:, :classes]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_augmented_passes_are_drawn_anew_and_alike_each_time(tmp_path):
    train = make_trainer(tmp_path).train_dataset
    passes = AugmentedPasses(train, 2)
    assert len(passes) == 2 * len(train)
    assert passes.labels.tolist() == [*train.labels, *train.labels]
    first, second = passes.__getitems__([3]), passes.__getitems__([3 + len(train)])
    assert torch.equal(first["images"], second["images"])
    assert first["plan"]["seeds"] != second["plan"]["seeds"]
    assert passes.__getitems__([3])["plan"]["seeds"] == first["plan"]["seeds"]


def test_a_probe_of_augmented_copies(write):
    path, out = write("finetuning: linear_probe\nprobe_c: [0.1]\nprobe_passes: 2\nclass_balance: weight\n")
    main([str(path)])
    probe = json.loads((out / "run.json").read_text())["training"]["probe"]
    assert probe["rows"] == 2 * 52
    assert probe["features"] == 32


@pytest.mark.slow
def test_the_benchmark_gives_a_row_for_each_way(tmp_path):
    rows = tmp_path / "rows.json"
    words = ("benchmarks/finetuning.py", "--quick", "--only", "linear_probe", "--json", rows)
    result = run_command(sys.executable, *words)
    assert result.returncode == 0, result.stderr
    assert "| linear_probe |" in result.stdout
    [row] = json.loads(rows.read_text())["rows"]
    assert row["trained weights"] == 49 * 10
    assert row["peak MiB"] > 100


def test_a_probe_whose_images_do_not_fit_goes_on_with_fewer(write, monkeypatch, tmp_path):
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
    monkeypatch.setattr("hfvit.linear_probe.body_and_classifier", limited)
    main([str(path), "--output_dir", str(tmp_path / "out")])
    expected, found = (load_file(folder / "model.safetensors")["head.weight"] for folder in (out, tmp_path / "out"))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    events = json.loads((tmp_path / "out" / "run.json").read_text())["events"]
    assert events[-1]["event"] == "out_of_memory_in_evaluation"
    assert events[-1]["then"] <= 4


def test_a_checkpoint_of_another_way_is_not_gone_on_from(tmp_path):
    trainer = make_trainer(tmp_path / "full", num_train_epochs=1)
    trainer.train()
    full = newest_checkpoint(tmp_path / "full")
    check_same_model(full, trainer.model)
    trainer = make_trainer(tmp_path / "lora", num_train_epochs=1)
    add_lora(trainer.model, rank=2, alpha=4)
    with pytest.raises(ModelError, match="it has no LoRA, and the recipe has one"):
        check_same_model(full, trainer.model)
    trainer.train()
    check_same_model(newest_checkpoint(tmp_path / "lora"), trainer.model)
    other = make_trainer(tmp_path / "other").model
    with pytest.raises(ModelError, match="it has a LoRA, and the recipe has none"):
        check_same_model(newest_checkpoint(tmp_path / "lora"), other)
    add_lora(other, rank=4, alpha=4)
    with pytest.raises(ModelError, match="its LoRA has another rank or other targets"):
        check_same_model(newest_checkpoint(tmp_path / "lora"), other)


def test_no_probe_where_the_classifier_is_not_one_layer():
    name, size = "deit_tiny_distilled_patch16_224", {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = build_model(LABELS, architecture=name, image_size=16, timm_kwargs=size)
    with pytest.raises(ModelError, match="linear_probe is not for deit_tiny_distilled"):
        body_and_classifier(model)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("finetuning: adapter", "finetuning: 'adapter' is not allowed; it takes one of full, lora, linear_probe"),
        ("finetuning: lora\nfreeze: 1", "freeze: not with finetuning: lora, which says itself"),
        ("finetuning: lora\nlora_rank: 0", "lora_rank: 0 is not allowed"),
        ("finetuning: linear_probe\nmixup_alpha: 0.2", "mixup_alpha, cutmix_alpha, random_erasing: not with"),
        ("finetuning: linear_probe\nclass_balance: sample", "class_balance: not with finetuning: linear_probe"),
        ("finetuning: linear_probe\nprobe_c: [0.0]", "probe_c: [0.0] is not allowed; it takes numbers above 0"),
        ("distillation_alpha: 2", "distillation_alpha: 2.0 is not allowed; it takes 0 to 1"),
    ],
)
def test_what_a_recipe_cannot_ask_for(write, line, message):
    path, _ = write(line)
    with pytest.raises(RecipeError) as caught:
        load_recipe([str(path)])
    assert message in str(caught.value)


def test_probe_and_lora_start_from_a_checkpoint(recipe):
    with pytest.raises(RecipeError, match="architecture: not with finetuning: lora"):
        load_recipe([str(recipe), "--finetuning", "lora"])
