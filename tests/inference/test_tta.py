"""Test-time augmentation, against the logits of stock transformers."""

import json

import numpy as np
import onnx
import pytest
import torch
from helpers.images import LABELS, colored_split
from helpers.models import build_model
from helpers.onnx_graphs import MEAN, STD, write_configs, write_graph
from helpers.recipes import ARCHITECTURE, MICRO, write_micro_recipe
from helpers.records import exported_file
from onnx import TensorProto, helper, numpy_helper
from PIL import ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification

import hfvit
from hfvit.artifacts.export_record import ExportRecord
from hfvit.artifacts.run_record import RunRecord
from hfvit.errors import ModelError, RecipeError
from hfvit.evaluation.compare import compare
from hfvit.evaluation.split import evaluation_split
from hfvit.pipeline import main as train
from hfvit.recipe.loader import load_recipe
from hfvit.verify import evaluate_again

IMAGES = colored_split(31, 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory, colors):
    """A run of the micro recipe with eval_tta=flip, and an ONNX file."""
    folder = tmp_path_factory.mktemp("tta")
    recipe = write_micro_recipe(folder, colors, "use_cpu: true\neval_tta: flip\n")
    train([str(recipe), "--max_steps", "2"])  # so that there are mistakes to calibrate on
    export = write_configs(folder / "out" / "onnx")
    write_graph(export / "model.onnx")
    ExportRecord(source="out", files={}).enter(export, "model.onnx", exported_file())
    return folder / "out"


def mean_logits(folder, images) -> np.ndarray:
    """Compute the mean of the logits of images and their mirror images with stock transformers."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    with torch.no_grad():
        images = [image.convert("RGB") for image in images]
        views = images, [ImageOps.mirror(image) for image in images]
        logits = [model(**processor(view, return_tensors="pt")).logits.numpy() for view in views]
    return np.mean(logits, axis=0)


def test_metrics_of_a_run_equal_stock_transformers(run):
    record = RunRecord.load(run)
    logits, labels = mean_logits(run, IMAGES["img"]), torch.tensor(IMAGES["label"])
    assert record.eval_tta == "flip"
    assert record.result.accuracy == (logits.argmax(1) == labels.numpy()).mean()
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits), labels)
    assert record.result.loss == pytest.approx(loss.item(), abs=1e-5)
    plain = hfvit.load_classifier(run, "cpu").logits(IMAGES["img"])
    assert np.abs(plain - logits).max() > 1e-3
    assert "with flip test-time augmentation" in (run / "README.md").read_text()


def test_verify_repeats_the_augmentation(run):
    assert all(row.again == row.recorded for row in evaluate_again(run, device="cpu").rows)


def test_classifier_of_a_checkpoint_equals_stock_transformers(run):
    classifier = hfvit.load_classifier(run, "cpu", threads=2, tta="flip")
    expected = mean_logits(run, IMAGES["img"])
    np.testing.assert_allclose(classifier.logits(IMAGES["img"], batch_size=3), expected, atol=1e-5)
    record = RunRecord.load(run)
    calibrated = hfvit.load_classifier(run, "cpu", tta="flip", calibrated=True)
    answer = calibrated(IMAGES["img"][0])
    scaled = torch.from_numpy(expected[0] / record.temperature.value).softmax(0)
    assert [answer[label] for label in LABELS] == pytest.approx(scaled.tolist(), abs=1e-5)


def test_classifier_of_several_labels_equals_stock_transformers(tmp_path):
    model = build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO)
    torch.nn.init.normal_(model.timm_model.head.weight)
    model.config.set_preprocessing(crop_pct=1.0)  # timm and transformers crop by a different pixel
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(tmp_path)
    answer = hfvit.predict(tmp_path, IMAGES["img"][0], device="cpu", tta="flip")
    expected = torch.from_numpy(mean_logits(tmp_path, IMAGES["img"][:1])[0]).sigmoid()
    assert [answer[label] for label in LABELS] == pytest.approx(expected.tolist(), abs=1e-5)


def write_left_column(file, takes_pixels) -> None:
    """Write a graph whose logits are the mean of the left column of pixel values, or of uint8 images."""
    size = ["batch", 16, 16, 3] if takes_pixels else ["batch", 3, 16, 16]
    kind = TensorProto.UINT8 if takes_pixels else TensorProto.FLOAT
    height, width = (1, 2) if takes_pixels else (2, 3)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Gather", ["floats", "first"], ["column"], axis=width),
            helper.make_node("ReduceMean", ["column", "height"], ["logits"], keepdims=0),
        ],
        "left_column",
        [helper.make_tensor_value_info("image", kind, size)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(np.array(0), "first"), numpy_helper.from_array(np.array([height]), "height")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), file)


@pytest.mark.parametrize("takes_pixels", [False, True])
def test_classifier_of_an_onnx_file_equals_numpy(tmp_path, takes_pixels):
    write_left_column(write_configs(tmp_path) / "model.onnx", takes_pixels)
    images = IMAGES["img"][:5]
    found = hfvit.load_classifier(tmp_path, "cpu", tta="flip").logits(images)
    pixels = np.stack([np.asarray(image.convert("RGB"), dtype=np.float64) for image in images])
    pixels = pixels if takes_pixels else (pixels / 255 - MEAN) / STD
    expected = (pixels[:, :, 0].mean(axis=1) + pixels[:, :, -1].mean(axis=1)) / 2
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_validate_adds_a_row_for_each_artifact_and_the_gate_of_an_export_is_plain(run, colors):
    file = run / "onnx" / "model.onnx"
    comparison = hfvit.validate(
        run, [file], dataset_name=str(colors), split="test", tta="flip", max_accuracy_drop=100, device="cpu",
        show_progress=False,
    )  # fmt: skip
    assert [row.tta for row in comparison.rows] == [None, None, "flip", "flip"]
    assert comparison.rows[2].accuracy == RunRecord.load(run).result.accuracy
    assert comparison.rows[2].title.endswith(" tta=flip")
    gate = ExportRecord.load(run / "onnx").files["model.onnx"].gate
    assert (gate.tta, gate.accuracy) == (None, comparison.rows[1].accuracy)
    saved = json.loads((run / "run.json").read_text())["gate"]["artifacts"]
    assert [row.get("tta") for row in saved] == [None, None, "flip", "flip"]


def test_wrong_values_and_other_temperatures_are_one_error(run, colors, tmp_path, recipe):
    for load in (hfvit.load_classifier, hfvit.validate):
        with pytest.raises(ModelError, match=r"^tta: .*'mirror'"):
            load(run, tta="mirror")
    with pytest.raises(ModelError, match=r"^calibrated: .*tta=flip"):
        hfvit.load_classifier(run, calibrated=True)
    with pytest.raises(ModelError, match=r"^tta: "):
        hfvit.embed(run, IMAGES["img"][:1], device="cpu", tta="flip")
    with pytest.raises(RecipeError, match=r"^--eval_tta: .*'mirror'"):
        load_recipe([str(recipe), "--eval_tta", "mirror"])
    split = evaluation_split(run, dataset_name=str(colors), split="test", max_samples=2)
    with pytest.raises(ModelError, match=r"^tta: "):
        compare(run, [], split, tta="mirror", show_progress=False)
