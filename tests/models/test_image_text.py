"""Image-text models, from the recipe to the exported graph."""

import argparse
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
import yaml
from helpers.commands import ROOT, run_command
from helpers.image_text import CLASSES, split, write_encoder, write_set
from helpers.images import colored_image
from helpers.messages import assert_names, option_of
from helpers.recipes import ARCHITECTURE, MICRO
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoTokenizer, TrainerCallback

import hfvit
from hfvit.cli import main as hfvit_command
from hfvit.cli.export_onnx import main as export_command
from hfvit.errors import ModelError, run
from hfvit.export.options import as_onnx_options
from hfvit.export.pipeline import Export
from hfvit.hub.files import files_to_push
from hfvit.pipeline import main
from hfvit.recipe.loader import load_recipe

RECIPE = f"""\
architecture: {ARCHITECTURE}
model_args: {json.dumps(MICRO)}
image_size: 16
crop_pct: 1.0
validation_split: validation
horizontal_flip: 0.0
global_batch_size: 32
num_train_epochs: 30
learning_rate: 3.0e-3
max_grad_norm: 1.0
eval_strategy: steps
eval_steps: 40
logging_steps: 20
seed: 3
disable_tqdm: true
plots: false
"""
TEXTS = ("--text_column", "caption", "--max_text_length", "8", "--text_encoder")


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Write the data set and the text encoder."""
    return write_set(tmp_path_factory.mktemp("captioned")), write_encoder(tmp_path_factory.mktemp("encoder"))


def train(out, data, *options):
    """Train the recipe with options and return run.json."""
    recipe = out.parent / f"{out.name}.yaml"
    recipe.write_text(RECIPE)
    assert (
        run(lambda: main([str(recipe), "--dataset_name", str(data), "--output_dir", str(out), *map(str, options)]))
        == 0
    )
    return json.loads((out / "run.json").read_text())


@pytest.fixture(scope="module")
def fused(captioned, tmp_path_factory):
    """Train an image-text model; returns output folder and run.json."""
    data, encoder = captioned
    out = tmp_path_factory.mktemp("fused") / "out"
    return out, train(out, data, *TEXTS, encoder)


@pytest.fixture(scope="module")
def exported(fused):
    with pytest.raises(SystemExit) as stop:
        export_command(["--model", str(fused[0]), str(fused[0] / "onnx")])
    assert stop.value.code == 0
    return fused[0] / "onnx"


def accuracy(record):
    return record["metrics"]["test"]["accuracy"]


def test_train_with_texts_learns_an_interaction_of_image_and_text(fused, captioned, tmp_path):
    """The class is the exclusive or of color and word, so that either alone is at chance."""
    data, encoder = captioned
    assert accuracy(fused[1]) > 0.95
    assert accuracy(train(tmp_path / "image", data)) < 0.65
    gray = tmp_path / "gray"
    for name, rows, seed in (("train", 128, 1), ("validation", 40, 2), ("test", 80, 3)):
        texts = split(rows, seed).map(lambda row: {"image": colored_image(1, np.random.default_rng(0))})
        texts.to_parquet(gray / "data" / f"{name}-00000-of-00001.parquet")
    assert accuracy(train(tmp_path / "text", gray, *TEXTS, encoder)) < 0.65


@pytest.mark.slow
def test_train_with_late_fusion_resumes_exactly(captioned, tmp_path):
    data, encoder = captioned
    options = (*TEXTS, encoder, "--fusion", "concatenation", "--keep_checkpoints", "true")
    record = train(tmp_path / "full", data, *options)
    assert accuracy(record) > 0.95
    shutil.copytree(tmp_path / "full" / "checkpoint-40", tmp_path / "resumed" / "checkpoint-40")
    resumed = train(tmp_path / "resumed", data, *options, "--resume_from_checkpoint", "auto")
    assert resumed["training"]["resumed_at_step"] == 40
    assert resumed["metrics"]["test"]["confusion_matrix"] == record["metrics"]["test"]["confusion_matrix"]
    losses = [{e["step"]: e["loss"] for e in run["history"] if "loss" in e} for run in (record, resumed)]
    assert losses[1][120] == losses[0][120]


def test_train_with_texts_and_patch_sizes_samples_them(captioned, tmp_path):
    sizes = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            sizes.append(model.timm_model.patch_embed.current_size)

    data, encoder = captioned
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    words = [str(tmp_path / "recipe.yaml"), "--dataset_name", str(data), "--output_dir", str(tmp_path / "out")]
    main([*words, *TEXTS, str(encoder), "--patch_sizes", "4", "8", "--max_steps", "8"], [Watch()])
    assert set(sizes) == {4, 8}


def test_train_with_texts_and_activation_checkpointing_raises(captioned, tmp_path, capsys):
    data, encoder = captioned
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    words = [str(tmp_path / "recipe.yaml"), "--dataset_name", str(data), "--output_dir", str(tmp_path / "out")]
    assert run(lambda: main([*words, *TEXTS, str(encoder), "--activation_checkpointing", "true"])) == 2
    error = capsys.readouterr().err
    message = error[error.index("hfvit: error: ") :]
    assert option_of(message) == "activation_checkpointing"
    assert_names(message, "VisionTransformer")


def test_train_with_texts_writes_record_card_and_tokenizer(fused, captioned, capsys):
    out, record = fused
    assert record["model"]["texts"]["model_type"] == "bert"
    assert record["data"]["text_column"] == "caption"
    assert record["data"]["splits"]["train"]["empty_texts"] == 0
    assert record["training"]["flops_per_image"] > 0
    assert record["examples"]["explanations_left_out"]
    card = (out / "README.md").read_text()
    assert "load_classifier(" in card
    assert "pipeline(" not in card
    assert "library_name: hfvit" in card
    assert str(captioned[1]) not in card
    assert yaml.safe_load((out / "recipe.yaml").read_text())["fusion"] == "cross_attention"
    pushed = {file.path: file.source for file in files_to_push(out, "user/model")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(pushed)
    assert str(captioned[1]).encode() not in b"".join(s for s in pushed.values() if isinstance(s, bytes))


def test_save_pretrained_of_fusion_model_round_trips(fused, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(fused[0])
    assert type(model) is hfvit.HFViTFusionForImageClassification
    assert [model.config.id2label[index] for index in range(2)] == CLASSES
    model.save_pretrained(tmp_path)
    loaded, info = hfvit.HFViTFusionForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    feed = AutoTokenizer.from_pretrained(fused[0])(["dawn in town", "dusk"], padding=True, return_tensors="pt")
    feed = {key: feed[key] for key in ("input_ids", "attention_mask")}
    images = [colored_image(0, np.random.default_rng(n)) for n in range(2)]
    feed |= AutoImageProcessor.from_pretrained(fused[0])(images, return_tensors="pt")
    torch.testing.assert_close(loaded.eval()(**feed).logits, model.eval()(**feed).logits, rtol=0, atol=0)
    classifier = hfvit.load_classifier(fused[0], device="cpu")
    logits = classifier.logits(list(zip(images, ["dawn in town", "dusk"], strict=True)))
    np.testing.assert_allclose(logits, model(**feed).logits.detach().numpy(), atol=1e-5)


def test_auto_config_without_hfvit_names_the_model_type(fused):
    code = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(fused[0])!r})"
    result = run_command("python", "-c", code, new_process=True)
    assert result.returncode == 1
    assert "hfvit_fusion" in result.stderr


def test_logits_do_not_depend_on_padding(fused):
    classifier = hfvit.load_classifier(fused[0], device="cpu")
    image = colored_image(2, np.random.default_rng(5))
    texts = ["dusk", "a picture taken at dawn in town", "", None]
    together = classifier.logits([(image, text) for text in texts])
    alone = np.concatenate([classifier.logits([(image, text)]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_array_equal(together[2], together[3])
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_export_onnx_with_texts_has_three_inputs_and_agrees(fused, exported, capsys):
    import onnxruntime

    session = onnxruntime.InferenceSession(exported / "model.onnx")
    assert [(value.name, value.shape) for value in session.get_inputs()] == [
        ("pixel_values", ["batch_size", 3, 16, 16]),
        ("input_ids", ["batch_size", "tokens"]),
        ("attention_mask", ["batch_size", "tokens"]),
    ]
    record = json.loads((exported / "export.json").read_text())["files"]["model.onnx"]
    assert record["parity"]["max_abs_difference"] < 1e-4
    assert record["text_inputs"][0] == {"name": "input_ids", "type": "int64", "shape": ["batch_size", "tokens"]}
    assert record["gate"]["agreement"] == 1.0
    rng = np.random.default_rng(8)
    images, texts = [colored_image(n % 3, rng) for n in range(5)], ["dawn", "dusk in town", "", "taken at dusk", "a"]
    answers = [hfvit.load_classifier(path, device="cpu").predict(images, texts=texts) for path in (fused[0], exported)]
    for one, other in zip(*answers, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    with pytest.raises(SystemExit) as stop:
        hfvit_command(["validate", str(fused[0]), str(exported), "--split", "test", "--threads", "1"])
    assert stop.value.code == 0
    assert_names(capsys.readouterr().out, "'test'")


@pytest.mark.parametrize("target", ["executorch", "openvino", "tensorrt"])
def test_export_with_texts_to_another_format_raises(fused, tmp_path, target):
    given = argparse.Namespace(model=str(fused[0]), revision=None, cache_dir=None, device="cpu")
    with pytest.raises(ModelError, match=f"^{target}: "):
        Export(as_onnx_options(given, target), tmp_path).load()


def test_predict_with_one_text_for_several_images_raises(fused):
    images = [colored_image(number, np.random.default_rng(number)) for number in range(2)]
    with pytest.raises(ModelError, match=r"^texts:"):
        hfvit.predict(fused[0], images, texts="ab", device="cpu")


def test_predict_with_text_option(fused, tmp_path, capsys):
    names = []
    for number in range(2):
        names.append(str(tmp_path / f"{number}.png"))
        colored_image(2 * number, np.random.default_rng(number)).save(names[-1])

    def predict(*words):
        with pytest.raises(SystemExit) as stop:
            hfvit_command(["predict", str(fused[0]), *names, "--top_k", "1", "--json", *words])
        printed = capsys.readouterr()
        labels = [json.loads(line)["predictions"][0]["label"] for line in printed.out.splitlines()]
        return stop.value.code, labels, printed.err

    assert predict("--text", "a picture taken at dawn")[:2] == (0, ["same", "other"])
    assert predict("--text", "a picture taken at dawn", "--text", "a picture taken at dusk")[:2] == (
        0,
        ["same", "same"],
    )
    code, _, message = predict()
    assert code == 2
    assert option_of(message) == "text"
    assert_names(message, fused[0], 2)


def test_report_and_verify_of_image_text_run(fused, capsys):
    for words in (
        ["report", str(fused[0]), "--html"],
        ["verify", str(fused[0]), "--eval_only", "--device", "cpu", "--allow_outside_paths"],
    ):
        with pytest.raises(SystemExit) as stop:
            hfvit_command(words)
        assert not stop.value.code, capsys.readouterr().err
    assert capsys.readouterr().out.count("+0.00 ") == 2
    assert fused[1]["examples"]["explanations_left_out"] in (fused[0] / "report.html").read_text()


def test_demo_of_image_text_model_raises(exported, tmp_path, capsys):
    for words in ([str(exported.parent)], [str(exported), "--static", str(tmp_path / "page")]):
        with pytest.raises(SystemExit) as stop:
            hfvit_command(["demo", *words])
        assert stop.value.code == 2
        assert_names(capsys.readouterr().err, words[0], "`hfvit predict`")
    assert not (tmp_path / "page").exists()


PAGE = (ROOT / "docs" / "image_text.md").read_text()


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_docs_recipe_loads(tmp_path):
    (tmp_path / "recipe.yaml").write_text(blocks("yaml")[0])
    recipe = load_recipe([str(tmp_path / "recipe.yaml"), "--use_cpu", "true"])
    assert recipe.model.fusion == "cross_attention"
    assert recipe.data.text_column == "title"


def test_docs_examples_run(exported, tmp_path, monkeypatch, capsys):
    for name in ("a.png", "b.png"):
        colored_image(0, np.random.default_rng(0)).save(tmp_path / name)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "products").symlink_to(exported.parent)
    monkeypatch.chdir(tmp_path)
    for code in blocks("py"):
        exec(compile(code, "image_text.md", "exec"), {})
    commands = blocks("console")[0].splitlines()
    assert commands[0].startswith("optimum-cli export onnx ")
    assert len(commands) > 1
    for command in commands[1:]:  # the first one made `exported`
        with pytest.raises(SystemExit) as stop:
            hfvit_command(shlex.split(command)[1:])
        assert stop.value.code == 0, (command, capsys.readouterr().err)
