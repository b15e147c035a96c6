"""All shipped recipes but for their score: estimate, an optimizer step, evaluation, export to ONNX."""

import datasets
import numpy as np
import onnxruntime
import pytest
import timm
import torch
from helpers.runs import read_record
from PIL import Image
from timm.models import save_for_hf

from hfvit.artifacts.run_record import RunRecord
from hfvit.cli import main as hfvit_command
from hfvit.cli.export_onnx import main as export_onnx
from hfvit.inference.classifier import load_classifier
from hfvit.recipe.files import shipped_recipes
from hfvit.recipe.loader import load_recipe

CLASSES = 10


@pytest.fixture(scope="module")
def ten_classes(tmp_path_factory):
    """Write random images with the columns of CIFAR-10 (img, label)."""
    folder = tmp_path_factory.mktemp("ten_classes")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(CLASSES)})
    rng = np.random.default_rng(0)
    for split, rows in (("train", 40), ("test", 10)):
        images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(rows)]
        values = {"img": images, "label": [row % CLASSES for row in range(rows)]}
        datasets.Dataset.from_dict(values, features=features).to_parquet(folder / "data" / f"{split}-0-of-1.parquet")
    return folder


def exits_with(command, words) -> int:
    with pytest.raises(SystemExit) as ended:
        command([str(word) for word in words])
    return ended.value.code or 0


def random_weights(name: str, folder) -> list:
    """Save random weights of the recipe's pretrained model as timm does, and return the option to use them."""
    pretrained = load_recipe([name]).model.model_name_or_path
    if pretrained is None:
        return []
    torch.manual_seed(0)
    save_for_hf(timm.create_model(pretrained.removeprefix("timm/")), folder, safe_serialization=True)
    return ["--model_name_or_path", folder]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_estimates_trains_a_step_and_exports(name, ten_classes, tmp_path, capsys):
    if load_recipe([name]).finetuning.finetuning == "lora":
        pytest.importorskip("peft")
    words = ["train", name, *random_weights(name, tmp_path / "weights"), "--output_dir", tmp_path / "out"]
    words += ["--use_cpu", "true"]
    if load_recipe([name]).data.dataset_name != "digits":
        words += ["--dataset_name", ten_classes]
    assert exits_with(hfvit_command, [*words, "--estimate"]) == 0
    assert "GB" in capsys.readouterr().out

    # The model has its own size; only the batch is smaller.
    words += ["--global_batch_size", "2", "--per_device_train_batch_size", "2", "--max_steps", "1"]
    assert exits_with(hfvit_command, [*words, "--max_eval_samples", "4", "--validation_fraction", "0.25"]) == 0
    record = RunRecord.load(tmp_path / "out")
    assert list(record.metrics) == ["validation", "test"]
    assert all(np.isfinite(split.loss) for split in record.metrics.values())
    for key, value in load_recipe([name]).values.items():
        if key in ("image_size", "learning_rate", "layer_decay", "weight_decay", "finetuning", "policy"):
            assert record.recipe[key] == value

    assert exits_with(export_onnx, ["--model", tmp_path / "out", tmp_path / "onnx"]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    side = read_record(tmp_path / "out")["model"]["image_size"][0]
    pixels = np.random.default_rng(1).normal(size=(2, 3, side, side)).astype(np.float32)
    [logits] = session.run(None, {session.get_inputs()[0].name: pixels})
    expected = load_classifier(tmp_path / "out", "cpu").run(pixels)
    assert logits == pytest.approx(expected, abs=1e-3 * float(np.ptp(expected)) + 1e-5)
