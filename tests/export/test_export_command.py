"""`optimum-cli export onnx`: output folders, errors, the gate, and plain ONNX Runtime."""

import argparse
import json
import re
import shutil
from collections import Counter

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.commands import ROOT, run_command
from helpers.images import LABELS, colored_image
from helpers.layouts import write_images
from helpers.loopback_hub import LoopbackHub
from helpers.messages import assert_names, option_of
from helpers.onnx_graphs import BRIGHTEST, write_configs, write_graph
from helpers.recipes import write_micro_recipe
from helpers.splits import load_splits
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image
from timm.data import create_transform, resolve_data_config
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTImageProcessor, ViTModel

import hfvit
from hfvit.artifacts.export_folder import claim_folder
from hfvit.cli.export_executorch import ExecuTorchExportCommand
from hfvit.cli.export_onnx import OnnxExportCommand, add_arguments, export_onnx_command, main
from hfvit.cli.export_openvino import OpenVINOExportCommand
from hfvit.errors import ModelError, run
from hfvit.evaluation.split import evaluation_split
from hfvit.export import quantization
from hfvit.export.calibration_data import calibration_images
from hfvit.export.image_parity import PhotographLogits, photographs, rows_to_compare
from hfvit.export.pipeline import Export
from hfvit.models.modeling import HFViTForImageClassification
from hfvit.pipeline import main as train
from hfvit.utils.files import commit_file, file_sha256

FOLDER = {"config.json", "preprocessor_config.json", "export.json"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, colors):
    """Train a checkpoint that classifies colors, with its recipe."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_micro_recipe(folder, colors)
    assert run(lambda: train([str(recipe), "--num_train_epochs", "6"])) == 0
    return folder / "out"


@pytest.fixture
def checkpoint(trained, tmp_path):
    """Return a copy, as the gate's result is written to its run.json."""
    return shutil.copytree(trained, tmp_path / "checkpoint")


def export(*words) -> int:
    """Run the command in this process and return its exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code


@pytest.fixture(scope="module")
def stock_export(stock, tmp_path_factory):
    """Export a stock checkpoint without options; tests copy it."""
    out = tmp_path_factory.mktemp("stock_export") / "onnx"
    assert export("--model", stock, out) == 0
    return out


@pytest.fixture(scope="module")
def trained_export(trained, tmp_path_factory):
    """Export the trained checkpoint without the gate; tests copy it."""
    out = tmp_path_factory.mktemp("trained_export") / "onnx"
    assert export("--model", trained, "--no_gate", out) == 0
    return out


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def read_record(folder) -> dict:
    return json.loads((folder / "export.json").read_text())


@pytest.mark.integration
def test_export_of_run_validates_and_records_each_file(checkpoint, tmp_path):
    out = checkpoint / "onnx"
    words = ["optimum-cli", "export", "onnx", "--model", checkpoint, "--optimize", out]
    result = run_command(*words, new_process=True, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert names(out) == {"model.onnx", "model_optimized.onnx", *FOLDER}
    lines = result.stdout.splitlines()
    assert len([line for line in lines if line.startswith("[")]) == 4  # load, export twice, validate
    assert_names(next(line for line in lines if line.startswith("model.onnx ")), "+0.00", "100.00%")
    assert str(tmp_path) not in (out / "export.json").read_text()
    known = read_record(out)
    assert known["source"] == "checkpoint"
    for name, entry in known["files"].items():
        assert entry["bytes"] == (out / name).stat().st_size
        assert entry["gate"]["passed"]
        assert entry["gate"]["data"]["images"] == 13
    assert json.loads((checkpoint / "run.json").read_text())["gate"]["passed"]
    images = [colored_image(label, np.random.default_rng(5)) for label in range(3)]
    ours = hfvit.load_classifier(out).logits(images)
    np.testing.assert_allclose(ours, hfvit.load_classifier(checkpoint).logits(images), atol=1e-4)


def test_export_of_variants_extends_the_folder(checkpoint, tmp_path, capsys):
    out = tmp_path / "onnx"
    assert export("--model", checkpoint, "--dtype", "bf16", out) == 0
    assert_names(capsys.readouterr().out, "bf16", "model_bf16.onnx")
    assert names(out) == {"model_bf16.onnx", *FOLDER}
    assert export("--model", checkpoint, "--quantize", "int8", "--with_preprocessing", "--dtype", "fp16", out) == 0
    raw = {"model_fp16_with_preprocessing.onnx", "model_quantized_with_preprocessing.onnx"}
    assert names(out) == {"model_bf16.onnx", *raw, *FOLDER}
    known = read_record(out)["files"]
    assert set(known) == {"model_bf16.onnx", *raw}
    assert known["model_bf16.onnx"]["gate"] is None
    quantized = known["model_quantized_with_preprocessing.onnx"]
    assert quantized["quantization"]["mode"] == "int8"
    assert_names(quantized["calibration"]["split"], "'train'")
    assert quantized["gate"]["passed"]
    image = colored_image(1, np.random.default_rng(5), size=50)
    session = onnxruntime.InferenceSession(out / "model_quantized_with_preprocessing.onnx")
    (logits,) = session.run(None, {"pixels": np.asarray(image)[None]})
    assert LABELS[logits.argmax()] == "green"


def test_export_that_fails_the_gate_leaves_the_folder_unchanged(checkpoint, trained_export, tmp_path, capsys):
    out = shutil.copytree(trained_export, tmp_path / "onnx")
    before = (out / "export.json").read_text()
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args(["--model", str(checkpoint), "--quantize", "int8-dynamic", str(out)])
    options.max_accuracy_drop = -101.0  # unreachable, and rejected by the command line
    assert run(lambda: export_onnx_command(options)) == 4
    message = capsys.readouterr().err
    assert_names(message, "model_quantized.onnx", -101, "--no_gate")
    assert names(out) == {"model.onnx", *FOLDER}
    assert (out / "export.json").read_text() == before


def test_export_of_hub_id_reads_no_data_that_its_recipe_names(checkpoint, monkeypatch, tmp_path):
    with LoopbackHub() as hub:
        hub.take_over(monkeypatch, tmp_path / "cache")
        names = ("config.json", "preprocessor_config.json", "model.safetensors", "recipe.yaml")
        files = {name: (checkpoint / name).read_bytes() for name in names if (checkpoint / name).exists()}
        hub.create("user/vit", files=files)
        words = ["--model", "user/vit", "--cache_dir", tmp_path / "cache"]
        assert export(*words, "--min_agreement", 0.9, tmp_path / "onnx") == 2
        assert export(*words, tmp_path / "onnx") == 0
    (entry,) = read_record(tmp_path / "onnx")["files"].values()
    assert entry["gate"] is None


class Killed(BaseException):
    """End of the process."""


@pytest.mark.parametrize("renames", [1, 3])
def test_export_after_a_kill_between_two_renames_completes_the_folder(stock, tmp_path, monkeypatch, renames):
    out = tmp_path / "onnx"
    committed = []

    def commit(finished, path):
        if len(committed) == renames:
            raise Killed
        committed.append(path)
        commit_file(finished, path)

    with monkeypatch.context() as patch:
        patch.setattr("hfvit.export.pipeline.commit_file", commit)
        with pytest.raises(Killed):
            main(["--model", str(stock), "--optimize", str(out)])
    assert names(out) == {path.name for path in committed} | {"export.json"}
    assert not read_record(out)["files"]
    assert export("--model", stock, "--optimize", out) == 0
    assert names(out) == {"model.onnx", "model_optimized.onnx", *FOLDER}
    for name, entry in read_record(out)["files"].items():
        assert entry["sha256"] == file_sha256(out / name)


class DamagedInt8(Export):
    """Export whose INT8 file predicts a wrong class for every image."""

    def check_images(self, staging):
        super().check_images(staging)
        write_graph(staging / "model_quantized.onnx", np.roll(BRIGHTEST, 1, axis=1))


def test_export_keeps_the_files_that_pass_the_gate(checkpoint, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    out = tmp_path / "onnx"
    options = parser.parse_args(["--model", str(checkpoint), "--quantize", "int8-dynamic", str(out)])
    assert run(lambda: DamagedInt8(options, claim_folder(out)).run()) == 4
    printed = capsys.readouterr()
    assert_names(printed.err, "model_quantized.onnx", "100.00 points", 0.5, "--no_gate")
    rows = {line.split()[0]: line for line in printed.out.splitlines() if ".onnx " in line and "[" not in line}
    assert rows["model.onnx"].rstrip().endswith("passed")
    assert rows["model_quantized.onnx"].rstrip().endswith("REFUSED")
    assert names(out) == {"model.onnx", *FOLDER}
    assert set(read_record(out)["files"]) == {"model.onnx"}
    gate = json.loads((checkpoint / "run.json").read_text())["gate"]
    assert gate["passed"]
    assert [row["artifact"] for row in gate["artifacts"]] == ["checkpoint", "onnx/model.onnx"]


def odd_photographs() -> list[Image.Image]:
    """Cut photographs of both orientations, with odd and even sizes of 90 to 500 pixels."""
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    cut = []
    for index in range(8):
        width, height = (int(size) for size in rng.integers(90, 428, 2))
        cut.append(photographs[index % 2].crop((20, 0, 20 + width, height)))
    return cut


def test_export_of_run_sees_what_the_checkpoint_sees_in_every_client(trained_export, checkpoint, tmp_path):
    """Compare timm's own transform and the checkpoint with each client of the export, on photographs."""
    out = shutil.copytree(trained_export, tmp_path / "onnx")
    assert export("--model", checkpoint, "--no_gate", "--with_preprocessing", out) == 0
    images = odd_photographs()
    model = HFViTForImageClassification.from_pretrained(checkpoint).eval()
    assert model.config.pretrained_cfg["crop_mode"] == "squash"
    transform = create_transform(**resolve_data_config(model.config.pretrained_cfg))
    with torch.inference_mode():
        wanted = model(torch.stack([transform(image) for image in images])).logits.numpy()
    allowed = 1e-3 * np.ptp(wanted)
    session = onnxruntime.InferenceSession(out / "model.onnx")
    raw = onnxruntime.InferenceSession(out / "model_with_preprocessing.onnx")
    stock = AutoImageProcessor.from_pretrained(out)
    of_checkpoint = AutoImageProcessor.from_pretrained(checkpoint)(images, return_tensors="pt")
    auto = AutoModelForImageClassification.from_pretrained(checkpoint).eval()
    found = {
        "load_classifier": hfvit.load_classifier(out / "model.onnx").logits(images),
        "with preprocessing": np.concatenate(
            [raw.run(None, {"pixels": np.asarray(image)[None]})[0] for image in images]
        ),
        "stock processor": session.run(None, dict(stock(images, return_tensors="np")))[0],
        "stock checkpoint": auto(**of_checkpoint).logits.detach().numpy(),
    }
    for client, logits in found.items():
        assert np.abs(logits - wanted).max() < allowed, client
        assert (logits.argmax(1) == wanted.argmax(1)).all(), client
    parity = read_record(out)["files"]["model.onnx"]["parity"]["images"]
    assert parity["same_class"] == 1.0
    assert parity["stock_max_abs_difference"] < 1e-3 * parity["spread"]


def test_logits_are_compared_of_photographs_with_other_pixel_values(checkpoint, monkeypatch):
    classifier = hfvit.load_classifier(checkpoint)
    reference = PhotographLogits(classifier)
    pixel_values = reference.pixel_values.copy()
    assert rows_to_compare(pixel_values, reference.pixel_values) == [0, 1]  # two are always compared
    pixel_values[[1, 4]] += 1e-3
    rows = rows_to_compare(pixel_values, reference.pixel_values)
    assert rows == [0, 1, 2, 4]
    expected = classifier.logits([photographs()[row] for row in rows])
    np.testing.assert_allclose(reference(rows), expected, atol=1e-5)
    monkeypatch.delattr(classifier, "backend")
    np.testing.assert_allclose(reference([4, 0]), expected[[3, 0]], atol=1e-5)  # computed once


def test_photographs_are_preprocessed_once_by_the_checkpoint_and_once_by_each_export(checkpoint, tmp_path):
    counts = Counter()

    class Counted(Export):
        def load(self):
            super().load()
            counted(self.classifier)

    def counted(classifier):
        process = classifier._process

        def count(image):
            counts[classifier.name] += 1
            return process(image)

        classifier._process = count
        return classifier

    def load(path, **options):
        return counted(hfvit.load_classifier(path, **options))

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["--model", str(checkpoint), "--no_gate", "--dtype", "fp16", str(tmp_path / "onnx")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hfvit.export.image_parity.load_classifier", load)
        Counted(parser.parse_args(words), claim_folder(tmp_path / "onnx")).run()
    assert sorted(counts.values()) == [8, 8]


def test_export_of_center_crop_names_what_stock_processors_see(checkpoint, tmp_path, capsys):
    """A checkpoint of an earlier version keeps timm's crop, which `load_classifier` follows."""
    config = json.loads((checkpoint / "config.json").read_text())
    config["pretrained_cfg"] |= {"crop_mode": "center", "crop_pct": 0.7}
    (checkpoint / "config.json").write_text(json.dumps(config))
    out = tmp_path / "onnx"
    assert export("--model", checkpoint, "--no_gate", out) == 0
    parity = read_record(out)["files"]["model.onnx"]["parity"]["images"]
    assert parity["max_abs_difference"] <= parity["atol"] < parity["stock_max_abs_difference"]
    assert_names(capsys.readouterr().out, f"{parity['stock_max_abs_difference']:.2g}")
    images = odd_photographs()
    np.testing.assert_allclose(
        hfvit.load_classifier(out).logits(images), hfvit.load_classifier(checkpoint).logits(images), atol=1e-4
    )


def test_export_with_another_preprocessing_than_the_checkpoints_is_refused(checkpoint, tmp_path, capsys):
    class OtherSize(Export):
        def check_images(self, staging):
            path = staging / "preprocessor_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.3, 0.3, 0.3]}))
            super().check_images(staging)

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args(["--model", str(checkpoint), "--no_gate", str(tmp_path / "onnx")])
    assert run(lambda: OtherSize(options, claim_folder(tmp_path / "onnx")).run()) == 2
    assert_names(capsys.readouterr().err, "model.onnx", "--atol")
    assert not names(tmp_path / "onnx")


def test_export_of_stock_checkpoint_with_fixed_batch_has_no_gate(stock, tmp_path, capsys):
    out = tmp_path / "onnx"
    words = ["--model", stock, "--no_dynamic_axes", "--batch_size", 2, "--quantize", "int8-dynamic", out]
    assert export(*words) == 0
    assert_names(capsys.readouterr().out, "model.onnx", "model_quantized.onnx")
    assert all(entry["gate"] is None for entry in read_record(out)["files"].values())
    assert names(out) == {"model.onnx", "model_quantized.onnx", *FOLDER}
    assert all(entry["input"]["shape"][0] == 2 for entry in read_record(out)["files"].values())
    assert isinstance(AutoImageProcessor.from_pretrained(out), type(ViTImageProcessor()))


def test_export_static_int8_with_fixed_batch_and_unlabeled_images(stock, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for number in range(7):
        (tmp_path / "images").mkdir(exist_ok=True)
        colored_image(number % 3, rng, size=40).save(tmp_path / "images" / f"{number}.png")
    out = tmp_path / "onnx"
    words = ["--model", stock, "--quantize", "int8", "--calibration_dataset", tmp_path / "images", out]
    assert export(*words, "--no_dynamic_axes", "--batch_size", 3, "--with_preprocessing", "--dtype", "fp16") == 0
    entry = read_record(out)["files"]["model_quantized_with_preprocessing.onnx"]
    assert entry["quantization"]["calibration_images"] == 6
    assert entry["calibration"] == {"dataset": "images", "split": "split 'train'", "images": 7, "seed": 42}
    assert entry["input"]["shape"][0] == 3
    pixels = np.stack([np.asarray(colored_image(0, rng, size=30))] * 3)
    session = onnxruntime.InferenceSession(out / "model_quantized_with_preprocessing.onnx")
    assert session.run(["logits"], {"pixels": pixels})[0].shape == (3, 3)
    assert export(*words, "--no_dynamic_axes", "--batch_size", 8) == 2
    error = capsys.readouterr().err
    assert option_of(error) == "calibration_samples"
    assert_names(error, 8, 7)
    assert export(*words, "--calibration_split", "validation") == 2
    error = capsys.readouterr().err
    assert option_of(error) == "calibration_split"
    assert_names(error, "'validation'", "images")


def test_calibration_images_exclude_held_out_rows(checkpoint):
    images, gate_split = calibration_images(checkpoint), evaluation_split(checkpoint)
    assert len(images) + len(gate_split) == 65
    rows = {example["row"] for example in images.examples}
    assert not rows & {example["row"] for example in gate_split.dataset}
    assert len(list(images.images())) == len(images)
    assert len(calibration_images(checkpoint, split="test", max_samples=5)) == 5


def test_calibration_images_of_class_folders_are_training_images_of_any_place(tmp_path):
    photos = write_images(tmp_path / "photos", {"cat": 20, "dog": 20})
    write_configs(write_graph(tmp_path / "run" / "model.onnx").parent)
    (tmp_path / "run" / "recipe.yaml").write_text(f"dataset_name: {photos}\nseed: 3\n")
    train = list(load_splits(str(photos), seed=3).train["row"])

    def rows(**options):
        return [example["row"] for example in calibration_images(tmp_path / "run", **options).examples]

    assert rows() == train  # without validation and test images
    assert len(rows(max_samples=9)) == 9
    assert rows(max_samples=9) == sorted({*rows(max_samples=9)} & {*train})
    assert train[:9] != rows(max_samples=9) != rows(max_samples=9, seed=1)


def test_export_int8_beyond_atol_raises_without_a_gate(stock, tmp_path, capsys):
    words = ["--model", stock, "--quantize", "int8-dynamic", tmp_path / "onnx"]
    assert export(*words, "--atol", 1e-9) == 2
    assert_names(capsys.readouterr().err, "model.onnx", "1e-09", "--atol")
    assert not (tmp_path / "onnx").exists()


def test_export_int8_of_a_network_without_products_names_the_model(stock, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quantization, "has_weight", lambda *_: False)
    assert export("--model", stock, "--quantize", "int8-dynamic", tmp_path / "onnx", "--no_gate") == 2
    message = capsys.readouterr().err
    assert_names(message, "--quantize", stock)
    assert str(tmp_path / "onnx") not in message


@pytest.mark.parametrize("command", [OnnxExportCommand, OpenVINOExportCommand, ExecuTorchExportCommand])
def test_failed_export_leaves_no_new_folder(command, stock, tmp_path, monkeypatch):
    def fail(_):
        raise ModelError("model: cannot be exported.")

    monkeypatch.setattr(Export, "load", fail)
    (tmp_path / "mine").mkdir()
    for output in ("new/folder", "mine"):
        with pytest.raises(SystemExit) as stop:
            command.main(["--model", str(stock), str(tmp_path / output)])
        assert stop.value.code == 2
    assert names(tmp_path) == {"mine"}


@pytest.mark.parametrize(("file", "text"), [("export.json", "{"), ("config.json", "{"), ("export.json", "[]")])
def test_export_into_damaged_folder_fails_before_the_work(file, text, stock, stock_export, tmp_path, capsys):
    out = shutil.copytree(stock_export, tmp_path / "onnx")
    (out / file).write_text(text)
    before = (out / "model.onnx").stat().st_mtime_ns
    assert export("--model", stock, out) == 2
    message = capsys.readouterr().err
    assert_names(message, out / file)
    assert "Traceback" not in message
    assert (out / "model.onnx").stat().st_mtime_ns == before


def test_docs_script_with_plain_onnxruntime_agrees_with_the_checkpoint(
    checkpoint, trained_export, tmp_path, monkeypatch
):
    """Run the script of docs/export.md."""
    shutil.copytree(trained_export, tmp_path / "outputs" / "quickstart" / "onnx")
    text = (ROOT / "docs" / "export.md").read_text()
    code = next(b for b in text.split("```python\n") if "import onnxruntime" in b).split("```")[0]
    monkeypatch.chdir(tmp_path)
    for label, size in ((0, 16), (1, 40), (2, 90)):
        image = colored_image(label, np.random.default_rng(8), size)
        image.crop((0, 0, size, size - size // 4)).save("digit.png")
        scope = {}
        exec(compile(code, "docs/export.md", "exec"), scope)
        expected = hfvit.load_classifier(checkpoint).logits([Image.open("digit.png")])
        np.testing.assert_allclose(scope["logits"], expected, atol=0.2)
        assert scope["logits"].argmax() == expected.argmax()


@pytest.fixture
def not_a_classifier(tmp_path):
    folder = tmp_path / "headless"
    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("words", "option", "data"),
    [
        (["--model", "{tmp}/nowhere", "{tmp}/out"], None, ["{tmp}/nowhere"]),
        (["--model", "{stock}", "{stock}/config.json"], "output", ["{stock}/config.json"]),
        (["--model", "{stock}", "{stock}/config.json/below"], "output", ["{stock}/config.json/below"]),
        (["--model", "{stock}", "{stock}"], "output", ["{stock}", "config.json"]),
        (["--model", "{stock}", "--quantize", "int8", "{tmp}/out"], "calibration_dataset", ["{stock}", "recipe.yaml"]),
        (["--model", "{stock}", "--quantize", "int4", "{tmp}/out"], "quantize", ["'int4'"]),
        (["--model", "{stock}", "--quantize", "int8-dynamic", "--target", "tensorrt", "{tmp}/out"],
         "target", ["tensorrt", "int8-dynamic"]),
        (["--model", "{stock}", "--task", "text-generation", "{tmp}/out"], "task", ["'text-generation'"]),
        (["--model", "{stock}", "--opset", "11", "{tmp}/out"], "opset", ["11", "18", "23"]),
        (["--model", "{stock}", "--quantize", "int8", "--target", "tensorrt", "--opset", "18", "{tmp}/out"],
         "opset", ["18", "19"]),
        (["--model", "{stock}", "--atol", "1e-12", "{tmp}/out"], None, ["model.onnx", "1e-12", "--atol"]),
        (["--model", "{headless}", "{tmp}/out"], None, ["{headless}", "2"]),
        (["--model", "{stock}", "{foreign}"], "output", ["{foreign}", "theirs.onnx"]),
        (["--model", "{checkpoint}", "--calibration_dataset", "{tmp}/no_set", "--quantize", "int8", "{tmp}/out"],
         "dataset_name", ["{tmp}/no_set"]),
        (["--model", "{stock}", "--min_agreement", "0.99", "{tmp}/out"], "min_agreement",
         ["0.99", "recipe.yaml", "{stock}"]),
        (["--model", "{stock}", "--max_accuracy_drop", "0", "{tmp}/out"], "max_accuracy_drop", ["0.0"]),
        (["--model", "{checkpoint}", "--no_gate", "--gate_samples", "9", "{tmp}/out"], "gate_samples",
         ["9", "--no_gate"]),
        (["--model", "{checkpoint}", "--dtype", "bf16", "--min_agreement", "1", "{tmp}/out"], "min_agreement",
         ["1.0", "--dtype bf16"]),
        (["--model", "{stock}", "--target", "onnxruntime", "{tmp}/out"], "target", ["onnxruntime", "--quantize"]),
        (["--model", "{stock}", "--batch_size", "1", "{tmp}/out"], "batch_size", ["1", "--no_dynamic_axes"]),
        (["--model", "{stock}", "--calibration_dataset", "digits", "{tmp}/out"], "calibration_dataset", ["digits"]),
        (["--model", "{stock}", "--revision", "v1", "{tmp}/out"], "revision", ["v1", "{stock}"]),
        (["--model", "{stock}", "--cache_dir", "{tmp}/cache", "{tmp}/out"], "cache_dir", ["{tmp}/cache", "{stock}"]),
        (["--model", "{headless}", "--opset", "24", "{tmp}/out"], "opset", ["24", "18", "23"]),
        (["--model", "{stock}", "--quantize", "int8-dynamic", "--calibration_samples", "128", "{tmp}/out"],
         "calibration_samples", ["128", "--quantize int8"]),
    ],
)  # fmt: skip
def test_export_with_a_wrong_value_names_option_and_data(
    words, option, data, stock, trained, not_a_classifier, tmp_path, capsys
):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "theirs.onnx").write_text("")
    places = {"tmp": tmp_path, "stock": stock, "headless": not_a_classifier, "checkpoint": trained}
    places["foreign"] = foreign
    before = names(stock)
    assert export(*(word.format(**places) for word in words)) == 2
    captured = capsys.readouterr()
    assert option_of(captured.err) == option
    assert_names(captured.err, *(item.format(**places) for item in data))
    assert "Traceback" not in captured.err
    assert len([line for line in captured.err.splitlines() if "error: " in line]) == 1
    assert names(stock) == before
    assert not (tmp_path / "out").exists() or not names(tmp_path / "out")


def test_export_with_invalid_recipe_names_file_and_position(checkpoint, tmp_path, capsys):
    (checkpoint / "recipe.yaml").write_text("a: [")
    assert export("--model", checkpoint, "--quantize", "int8", "--no_gate", tmp_path / "onnx") == 2
    assert_names(capsys.readouterr().err, checkpoint / "recipe.yaml", "line 1, column 5")


def test_export_without_gate_images_suggests_no_gate(checkpoint, tmp_path, capsys):
    recipe = checkpoint / "recipe.yaml"
    recipe.write_text(re.sub(r"dataset_name: .*", f"dataset_name: {tmp_path / 'moved'}", recipe.read_text()))
    assert export("--model", checkpoint, tmp_path / "onnx") == 2
    error = capsys.readouterr().err
    assert option_of(error) == "dataset_name"
    assert_names(error, tmp_path / "moved", "--no_gate")


def test_export_of_other_model_into_the_folder_raises(checkpoint, stock_export, tmp_path, capsys):
    out = shutil.copytree(stock_export, tmp_path / "onnx")
    assert export("--model", checkpoint, out) == 2
    error = capsys.readouterr().err
    assert option_of(error) == "output"
    assert_names(error, out, "config.json")


def test_export_of_other_weights_into_the_folder_raises(stock, stock_export, tmp_path, capsys):
    out, again = shutil.copytree(stock_export, tmp_path / "onnx"), shutil.copytree(stock, tmp_path / "again")
    weights = load_file(again / "model.safetensors")
    weights["classifier.bias"][0] += 1.0
    save_file(weights, again / "model.safetensors", metadata={"format": "pt"})
    assert export("--model", again, "--dtype", "fp16", out) == 2
    error = capsys.readouterr().err
    assert option_of(error) == "output"
    assert_names(error, out)
    assert "config.json" not in error
    assert export("--model", stock, "--dtype", "fp16", out) == 0
