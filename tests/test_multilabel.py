"""Multi-label classification, from a table to exports: each command on one small run."""

import json
from functools import partial

import datasets
import numpy as np
import pytest
import yaml
from helpers.multilabel import SHAPES, shapes_recipe, write_data
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score
from transformers import AutoModelForImageClassification, pipeline

import hfvit
from hfvit.artifacts.export_record import ExportRecord
from hfvit.artifacts.run_record import RunRecord
from hfvit.cli import main
from hfvit.cli.export_onnx import main as export
from hfvit.data.labels import targets_of
from hfvit.data.splits import load_whole_splits
from hfvit.errors import ModelError, RecipeError
from hfvit.evaluation.split import evaluation_split
from hfvit.hub.files import files_to_push
from hfvit.recipe.arguments import MULTI_LABEL, DataArguments
from hfvit.verify import evaluate_again

TRAIN, TEST = 240, 120
SCORE = 0.75  # mAP on the test images that a working run exceeds; chance gives 0.5
PLOTS = {"learning_curves", "precision_recall", "average_precision", "explanations"}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_data("shapes", tmp_path_factory.mktemp("shapes"), TRAIN, TEST)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, table):
    out = tmp_path_factory.mktemp("run") / "out"
    hfvit.train(shapes_recipe(table, out))
    return out


def images_and_targets(table):
    """Paths and targets of the test images."""
    data = load_whole_splits(DataArguments(str(table)))
    return [image["path"] for image in data.test["image"]], targets_of(data.test)


def command(*words) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code or 0


def test_run_learns_the_shapes_and_records_what_it_did(trained, table):
    record = RunRecord.load(trained)
    assert record.data.problem_type == MULTI_LABEL
    assert record.data.label_column == record.data.labels == SHAPES
    assert record.result.map > SCORE
    assert record.result.images == TEST
    assert record.training.best_metric_name == record.recipe["metric_for_best_model"] == "map"
    assert len(record.thresholds.values) == 3
    assert [entry.threshold for entry in record.result.per_class] == record.thresholds.values
    assert record.temperature.value is None
    paths, targets = images_and_targets(table)
    logits = hfvit.load_classifier(trained, device="cpu").logits(paths)
    assert record.result.map == pytest.approx(average_precision_score(targets, logits), abs=1e-3)
    predicted = 1 / (1 + np.exp(-logits)) >= record.thresholds.values
    assert record.result.micro_f1 == pytest.approx(f1_score(targets, predicted, average="micro"), abs=5e-3)
    low, high = record.result.micro_f1_interval
    assert low <= record.result.micro_f1 <= high


def test_run_writes_its_own_plots_and_no_others(trained):
    names = {path.stem.removesuffix("_dark") for path in (trained / "plots").iterdir()}
    assert PLOTS <= names <= PLOTS | {"training_images", "mistakes"}


def test_checkpoint_is_one_of_stock_transformers(trained, table):
    model = AutoModelForImageClassification.from_pretrained(trained)
    record = RunRecord.load(trained)
    assert not type(model).__module__.startswith("hfvit")
    assert model.config.problem_type == MULTI_LABEL
    assert model.config.thresholds == record.thresholds.values
    paths, _ = images_and_targets(table)
    pictures = [Image.open(path) for path in paths[:8]]
    classify = pipeline("image-classification", model=str(trained), device="cpu", function_to_apply="sigmoid")
    found = hfvit.load_classifier(trained, device="cpu").predict(paths[:8], top_k=3)
    for answer, entries in zip(found, classify(pictures), strict=True):
        assert answer == pytest.approx({entry["label"]: entry["score"] for entry in entries}, abs=1e-4)


def test_classifier_answers_with_the_classes_above_their_thresholds(trained, table):
    paths, _ = images_and_targets(table)
    classifier = hfvit.load_classifier(trained, device="cpu")
    answers = classifier.predict(paths)
    probabilities = 1 / (1 + np.exp(-classifier.logits(paths)))
    for answer, row in zip(answers, probabilities, strict=True):
        assert set(answer) == {SHAPES[index] for index in np.flatnonzero(row >= classifier.thresholds)}
        assert list(answer.values()) == sorted(answer.values(), reverse=True)
    assert {} in answers
    assert [len(answer) for answer in classifier.predict(paths, top_k=2)] == [2] * TEST
    assert classifier(paths[0]) == answers[0]


def test_predict_prints_the_labels_of_each_image(trained, table, capsys):
    paths, _ = images_and_targets(table)
    assert command("predict", trained, *paths[:20], "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    answers = hfvit.load_classifier(trained).predict(paths[:20])
    assert [[entry["label"] for entry in line["predictions"]] for line in lines] == [list(one) for one in answers]
    assert command("predict", trained, *paths[:20], "--top_k", 1, "--json") == 0
    assert all(len(json.loads(line)["predictions"]) == 1 for line in capsys.readouterr().out.splitlines())
    assert command("predict", trained, *paths[:20]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 20 + sum(max(1, len(answer)) for answer in answers)


def test_card_states_the_metrics_and_how_to_use_the_thresholds(trained):
    text = (trained / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---")[1])
    record = RunRecord.load(trained)
    results = [entry for part in metadata["model-index"][0]["results"] for entry in part["metrics"]]
    expected = {"mAP": record.result.map, "Micro F1": record.result.micro_f1, "Macro F1": record.result.macro_f1}
    assert {entry["name"]: entry["value"] for entry in results} == pytest.approx(expected, abs=1e-4)
    assert metadata["metrics"] == ["map", "f1"]
    assert 'function_to_apply="sigmoid"' in text
    assert "confusion_matrix" not in text
    assert all(f"| {name} |" in text for name in SHAPES)


def test_report_page_holds_the_figures_of_the_run(trained):
    hfvit.write_report(trained, html=True)
    page = (trained / "report.html").read_text()
    record = RunRecord.load(trained)
    assert f"{record.result.map:.4f}" in page
    assert f"{record.result.per_class[0].average_precision:.4f}" in page
    assert page.count("<svg ") == len(PLOTS - {"explanations"})
    assert page.count("data:image/webp") >= 2


def test_pushed_files_hold_the_record_and_the_plots(trained):
    names = {file.path for file in files_to_push(trained, "user/name")}
    assert {"config.json", "model.safetensors", "run.json", "README.md", "plots/precision_recall.png"} <= names
    assert not any("mistakes" in name for name in names)


def test_evaluation_again_gives_the_recorded_score(trained):
    found = evaluate_again(trained, device="cpu")
    assert not found.failures
    for row in found.rows:
        assert row.metric == "mAP"
        assert row.again == pytest.approx(row.recorded, abs=1e-3)


def test_evaluation_split_has_the_targets_of_the_recipe(trained, table):
    split = evaluation_split(trained, split="test")
    assert np.array_equal(split.labels, images_and_targets(table)[1])
    held_out = evaluation_split(trained)
    assert held_out.labels.shape == (24, 3)
    other = evaluation_split(trained, dataset_name=str(table), split="test", label_column=SHAPES[::-1])
    assert np.array_equal(other.labels, split.labels)


def test_validate_has_the_metrics_of_the_run(trained):
    comparison = hfvit.validate(trained, split="test", device="cpu", show_progress=False)
    recorded = RunRecord.load(trained).metrics["test"]
    assert comparison.metrics.map == pytest.approx(recorded.map, abs=1e-3)
    assert comparison.metrics.micro_f1 == comparison.rows[0].micro_f1
    found = {each.label: (each.images, each.threshold) for each in comparison.metrics.per_class}
    assert found == {each.label: (each.images, each.threshold) for each in recorded.per_class}
    assert len(comparison.class_table().splitlines()) == 1 + len(recorded.per_class)


def test_exports_pass_the_gate_and_keep_thresholds(trained, table):
    folder = trained / "onnx"
    words = ["--model", trained, "--quantize", "int8", "--calibration_samples", 32, "--max_accuracy_drop", 5, folder]
    with pytest.raises(SystemExit) as stop:
        export([str(word) for word in words])
    assert not stop.value.code
    record = ExportRecord.load(folder)
    for name in ("model.onnx", "model_quantized.onnx"):
        gate = record.files[name].gate
        assert gate.passed
        assert gate.accuracy is None
        assert gate.score.name == "micro F1"
        assert 0 <= gate.map <= 1
    assert record.files["model.onnx"].gate.agreement == 1.0
    graph = hfvit.load_classifier(folder)
    checkpoint = hfvit.load_classifier(trained, device="cpu")
    assert graph.thresholds.tolist() == checkpoint.thresholds.tolist()
    paths, _ = images_and_targets(table)
    assert [set(answer) for answer in graph.predict(paths)] == [set(answer) for answer in checkpoint.predict(paths)]
    comparison = hfvit.validate(trained, [folder], split="test", show_progress=False)
    assert comparison.passed
    assert "micro F1" in comparison.table()
    assert RunRecord.load(trained).gate.artifacts[0].micro_f1 == comparison.rows[0].micro_f1
    hfvit.write_report(trained, html=True)
    assert "model_quantized.onnx" in (trained / "README.md").read_text()


OPTIONS = {
    "asymmetric loss": {
        "multi_label_loss": "asymmetric", "class_balance": "weight", "label_smoothing_factor": 0.1, "ema_decay": 0.9,
        "metric_for_best_model": "micro_f1",
    },
    "mixing and a soft teacher": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "teacher": None, "distillation": "soft"},
    "weights and a hard teacher": {"class_balance": "weight", "teacher": None, "distillation": "hard"},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_train_takes_the_options_of_the_loss(trained, table, tmp_path, options):
    if "teacher" in options:
        options = options | {"teacher": str(trained)}
    record = hfvit.train(shapes_recipe(table, tmp_path / "out", max_steps=2, **options))
    losses = [entry["eval_loss"] for entry in record.history if "eval_loss" in entry]
    assert losses
    assert np.isfinite(losses).all()
    assert record.recipe["metric_for_best_model"] == options.get("metric_for_best_model", "map")


def test_linear_probe_solves_each_label(trained, table, tmp_path):
    recipe = shapes_recipe(table, tmp_path / "out", finetuning="linear_probe", model_name_or_path=str(trained))
    for key in ("architecture", "model_args", "num_train_epochs", "learning_rate"):
        del recipe[key]
    record = hfvit.train(recipe)
    assert record.training.probe.selected_by == "map"
    assert record.result.map > SCORE


def test_single_label_run_from_a_multi_label_checkpoint_forgets_its_kind(trained, colors, tmp_path):
    recipe = shapes_recipe(colors, tmp_path / "out", model_name_or_path=str(trained), max_steps=2)
    for key in ("architecture", "model_args"):
        del recipe[key]
    hfvit.train(recipe)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("problem_type") is None
    assert "thresholds" not in config


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("class_balance", "sample"),
        ("metric_for_best_model", "top5_accuracy"),
        ("head_from_text", "openai/clip-vit-base-patch32"),
    ],
)
def test_train_refuses_what_labels_rule_out(table, trained, tmp_path, option, value):
    recipe = shapes_recipe(table, tmp_path / "out", model_name_or_path=str(trained), **{option: value})
    del recipe["architecture"], recipe["model_args"]
    with pytest.raises(RecipeError, match=rf"^{option}: "):
        hfvit.train(recipe)


def test_trainer_takes_a_data_set_of_lists(table, tmp_path):
    data = load_whole_splits(DataArguments(str(table)))
    lists = [[SHAPES[index] for index in np.flatnonzero(row)] for row in targets_of(data.test)]
    columns = {"image": datasets.Image(decode=False), "labels": datasets.List(datasets.Value("string"))}
    split = datasets.Dataset.from_dict(
        {"image": data.test["image"][:], "labels": lists}, features=datasets.Features(columns)
    )
    args = partial(hfvit.HFViTTrainingArguments, str(tmp_path), global_batch_size=8, max_steps=2, use_cpu=True)
    for problem_type in (MULTI_LABEL, None):
        config = hfvit.HFViTConfig.from_architecture(
            "vit_tiny_patch16_224", SHAPES, img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=2
        )
        config.pretrained_cfg["input_size"] = [3, 32, 32]
        config.problem_type = problem_type
        build = partial(
            hfvit.HFViTTrainer, hfvit.HFViTForImageClassification(config), args(),
            train_dataset=split, eval_dataset=split,
        )  # fmt: skip
        if problem_type is None:
            with pytest.raises(ModelError, match=r"^problem_type: "):
                build()
        else:
            trainer = build()
            trainer.train()
            assert 0 < trainer.evaluate()["eval_map"] <= 1


@pytest.mark.integration
def test_run_finds_digits_that_no_training_image_had(tmp_path):
    table = write_data("digits", tmp_path / "pairs", 1000, 200)
    recipe = shapes_recipe(table, tmp_path / "out", problem_type=MULTI_LABEL, image_size=16, num_train_epochs=12)
    recipe |= {"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0], "horizontal_flip": 0.0, "global_batch_size": 32}
    record = hfvit.train(recipe)
    assert record.data.labels == [str(digit) for digit in range(10)]
    assert record.result.map > 0.5  # chance gives 0.2
