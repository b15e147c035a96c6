"""Images with texts, from the recipe to the exported graph."""

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
from hfvit.errors import run
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
"""
TEXTS = ("--text_column", "caption", "--max_text_length", "8", "--text_encoder")


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Folders of the data set and of the text encoder."""
    return write_set(tmp_path_factory.mktemp("captioned")), write_encoder(tmp_path_factory.mktemp("encoder"))


def train(out, data, *options):
    """The recipe through main(); what run.json holds then."""
    recipe = out.parent / f"{out.name}.yaml"
    recipe.write_text(RECIPE)
    assert (
        run(lambda: main([str(recipe), "--dataset_name", str(data), "--output_dir", str(out), *map(str, options)]))
        == 0
    )
    return json.loads((out / "run.json").read_text())


@pytest.fixture(scope="module")
def fused(captioned, tmp_path_factory):
    """A run of images with texts, and its facts."""
    data, encoder = captioned
    out = tmp_path_factory.mktemp("fused") / "out"
    return out, train(out, data, *TEXTS, encoder)


@pytest.fixture(scope="module")
def exported(fused):
    with pytest.raises(SystemExit) as stop:
        export_command(["--model", str(fused[0]), str(fused[0] / "onnx")])
    assert stop.value.code == 0
    return fused[0] / "onnx"


def accuracy(facts):
    return facts["metrics"]["test"]["accuracy"]


def test_image_and_text_together_tell_what_neither_tells_alone(fused, captioned, tmp_path):
    """The class is the exclusive or of color and word: half of what either side sees alone is of each class."""
    data, encoder = captioned
    assert accuracy(fused[1]) > 0.95
    assert accuracy(train(tmp_path / "image", data)) < 0.65
    gray = tmp_path / "gray"
    for name, rows, seed in (("train", 128, 1), ("validation", 40, 2), ("test", 80, 3)):
        texts = split(rows, seed).map(lambda row: {"image": colored_image(1, np.random.default_rng(0))})
        texts.to_parquet(gray / "data" / f"{name}-00000-of-00001.parquet")
    assert accuracy(train(tmp_path / "text", gray, *TEXTS, encoder)) < 0.65


def test_late_fusion_learns_it_too_and_stops_where_it_was_resumed(captioned, tmp_path):
    data, encoder = captioned
    options = (*TEXTS, encoder, "--fusion", "concatenation", "--keep_checkpoints", "true")
    facts = train(tmp_path / "whole", data, *options)
    assert accuracy(facts) > 0.95
    shutil.copytree(tmp_path / "whole" / "checkpoint-40", tmp_path / "again" / "checkpoint-40")
    again = train(tmp_path / "again", data, *options, "--resume_from_checkpoint", "auto")
    assert again["training"]["resumed_at_step"] == 40
    assert again["metrics"]["test"]["confusion_matrix"] == facts["metrics"]["test"]["confusion_matrix"]
    losses = [{e["step"]: e["loss"] for e in run["history"] if "loss" in e} for run in (facts, again)]
    assert losses[1][120] == losses[0][120]


def test_the_image_tower_trains_at_several_patch_sizes(captioned, tmp_path):
    sizes = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            sizes.append(model.timm_model.patch_embed.drawn)

    data, encoder = captioned
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    words = [str(tmp_path / "recipe.yaml"), "--dataset_name", str(data), "--output_dir", str(tmp_path / "out")]
    main([*words, *TEXTS, str(encoder), "--patch_sizes", "4", "8", "--max_steps", "8"], [Watch()])
    assert set(sizes) == {4, 8}


def test_checkpointed_activations_are_refused_before_training(captioned, tmp_path, capsys):
    data, encoder = captioned
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    words = [str(tmp_path / "recipe.yaml"), "--dataset_name", str(data), "--output_dir", str(tmp_path / "out")]
    assert run(lambda: main([*words, *TEXTS, str(encoder), "--activation_checkpointing", "true"])) == 2
    error = capsys.readouterr().err
    message = error[error.index("hfvit: error: ") :]
    assert option_of(message) == "activation_checkpointing"
    assert_names(message, "VisionTransformer")


def test_a_run_leaves_what_its_model_needs(fused, captioned, capsys):
    out, facts = fused
    assert facts["model"]["texts"]["model_type"] == "bert"
    assert facts["data"]["text_column"] == "caption"
    assert facts["data"]["splits"]["train"]["empty_texts"] == 0
    assert facts["training"]["flops_per_image"] > 0
    assert facts["examples"]["attention_left_out"]
    card = (out / "README.md").read_text()
    assert "load_classifier(" in card
    assert "pipeline(" not in card
    assert "library_name: hfvit" in card
    assert str(captioned[1]) not in card
    assert yaml.safe_load((out / "recipe.yaml").read_text())["fusion"] == "cross_attention"
    pushed = {file.path: file.source for file in files_to_push(out, "user/model")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(pushed)
    assert str(captioned[1]).encode() not in b"".join(s for s in pushed.values() if isinstance(s, bytes))


def test_what_is_saved_loads_equal(fused, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(fused[0])
    assert type(model) is hfvit.HFViTFusionForImageClassification
    assert [model.config.id2label[index] for index in range(2)] == CLASSES
    model.save_pretrained(tmp_path)
    again, info = hfvit.HFViTFusionForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    feed = AutoTokenizer.from_pretrained(fused[0])(["dawn in town", "dusk"], padding=True, return_tensors="pt")
    feed = {key: feed[key] for key in ("input_ids", "attention_mask")}
    images = [colored_image(0, np.random.default_rng(n)) for n in range(2)]
    feed |= AutoImageProcessor.from_pretrained(fused[0])(images, return_tensors="pt")
    torch.testing.assert_close(again.eval()(**feed).logits, model.eval()(**feed).logits, rtol=0, atol=0)
    classifier = hfvit.load_classifier(fused[0], device="cpu")
    logits = classifier.logits(list(zip(images, ["dawn in town", "dusk"], strict=True)))
    np.testing.assert_allclose(logits, model(**feed).logits.detach().numpy(), atol=1e-5)


def test_stock_transformers_says_that_it_does_not_know_the_model(fused):
    code = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(fused[0])!r})"
    result = run_command("python", "-c", code)
    assert result.returncode == 1
    assert "hfvit_fusion" in result.stderr


def test_padding_changes_nothing(fused):
    classifier = hfvit.load_classifier(fused[0], device="cpu")
    image = colored_image(2, np.random.default_rng(5))
    texts = ["dusk", "a picture taken at dawn in town", "", None]
    together = classifier.logits([(image, text) for text in texts])
    alone = np.concatenate([classifier.logits([(image, text)]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_array_equal(together[2], together[3])
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_the_export_takes_three_inputs_and_agrees(fused, exported, capsys):
    import onnxruntime

    session = onnxruntime.InferenceSession(exported / "model.onnx")
    assert [(value.name, value.shape) for value in session.get_inputs()] == [
        ("pixel_values", ["batch_size", 3, 16, 16]),
        ("input_ids", ["batch_size", "tokens"]),
        ("attention_mask", ["batch_size", "tokens"]),
    ]
    facts = json.loads((exported / "export.json").read_text())["files"]["model.onnx"]
    assert facts["parity"]["max_abs_difference"] < 1e-4
    assert facts["text_inputs"][0] == {"name": "input_ids", "type": "int64", "shape": ["batch_size", "tokens"]}
    assert facts["gate"]["agreement"] == 1.0
    rng = np.random.default_rng(8)
    images, texts = [colored_image(n % 3, rng) for n in range(5)], ["dawn", "dusk in town", "", "taken at dusk", "a"]
    answers = [hfvit.load_classifier(path, device="cpu").predict(images, texts=texts) for path in (fused[0], exported)]
    for one, other in zip(*answers, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    with pytest.raises(SystemExit) as stop:
        hfvit_command(["validate", str(fused[0]), str(exported), "--split", "test", "--threads", "1"])
    assert stop.value.code == 0
    assert_names(capsys.readouterr().out, "'test'")


def test_the_command_predicts_pictures_with_a_text(fused, tmp_path, capsys):
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


def test_a_run_is_reported_and_verified(fused, capsys):
    for words in (
        ["report", str(fused[0]), "--html"],
        ["verify", str(fused[0]), "--eval_only", "--device", "cpu", "--allow_outside_paths"],
    ):
        with pytest.raises(SystemExit) as stop:
            hfvit_command(words)
        assert not stop.value.code, capsys.readouterr().err
    assert capsys.readouterr().out.count("+0.00 ") == 2
    assert fused[1]["examples"]["attention_left_out"] in (fused[0] / "report.html").read_text()


def test_no_demo_has_a_field_for_texts(exported, tmp_path, capsys):
    for words in ([str(exported.parent)], [str(exported), "--static", str(tmp_path / "page")]):
        with pytest.raises(SystemExit) as stop:
            hfvit_command(["demo", *words])
        assert stop.value.code == 2
        assert_names(capsys.readouterr().err, words[0], "`hfvit predict`")
    assert not (tmp_path / "page").exists()


PAGE = (ROOT / "docs" / "image_text.md").read_text()


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_pages_recipe_is_one(tmp_path):
    (tmp_path / "recipe.yaml").write_text(blocks("yaml")[0])
    recipe = load_recipe([str(tmp_path / "recipe.yaml"), "--use_cpu", "true"])
    assert recipe.model.fusion == "cross_attention"
    assert recipe.data.text_column == "title"


def test_the_pages_examples_run(exported, tmp_path, monkeypatch, capsys):
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
    for command in commands[1:]:  # `exported` is what the first one makes
        with pytest.raises(SystemExit) as stop:
            hfvit_command(shlex.split(command)[1:])
        assert stop.value.code == 0, (command, capsys.readouterr().err)
