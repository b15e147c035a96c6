"""Local paths are redacted in pushed files."""

import json
import shlex

import pytest
import yaml
from helpers.records import make_record

from hfvit.artifacts.run_record import RunRecord
from hfvit.artifacts.run_sections import TextModel
from hfvit.hub.redaction import redact_paths, redact_record

CONTENT = {
    "command": "train.py /home/me/r.yaml --dataset_name data/cats --output_dir=/home/me/out --learning_rate 1e-3",
    "data": {"dataset_name": "data/cats", "is_local": True, "labels": ["/m/01abc", "~cat"]},
    "model": {"base_model": "models/vit", "is_local": True},
    "recipe": {"dataset_name": "data/cats", "output_dir": "a/b/out", "model_args": {"file": "C:\\x\\w.pt"}},
    "metrics": {"test": {"per_class": [{"label": "/m/01abc", "recall": 1.0}], "loss": float("nan")}},
}


def local_run(**recipe) -> RunRecord:
    """Return the record of a run whose data set and pretrained weights were local folders."""
    record = make_record(dataset_name="data/cats", base_model="models/vit")
    record.data.is_local = True
    record.model.is_local = True
    record.recipe |= {"output_dir": "a/b/out", **recipe}
    return record


def test_redact_paths_keeps_the_last_part():
    public = json.loads(redact_paths(json.dumps(CONTENT), "run.json", local_run()))
    assert public["command"] == "train.py r.yaml --dataset_name cats --output_dir=out --learning_rate 1e-3"
    assert public["data"] == {**CONTENT["data"], "dataset_name": "cats"}
    assert public["model"]["base_model"] == "vit"
    assert public["recipe"] == {"dataset_name": "cats", "output_dir": "out", "model_args": {"file": "w.pt"}}
    assert public["metrics"]["test"]["per_class"] == CONTENT["metrics"]["test"]["per_class"]


@pytest.mark.parametrize("path", ["/home/me/w.pt", "~/w.pt", "./w.pt", "..\\w.pt", "D:/x/w.pt", "\\\\host\\x\\w.pt"])
def test_redact_paths_knows_paths_of_any_system(path):
    content = {"recipe": {"model_args": {"file": path}, "label_separator": "/ ", "text": f"{path}\nis a text"}}
    public = json.loads(redact_paths(json.dumps(content), "run.json", None))
    assert public == {"recipe": {**content["recipe"], "model_args": {"file": "w.pt"}}}


def test_redact_paths_of_a_command_knows_paths_of_two_lines():
    content = {"command": shlex.join(["hfvit", "train", "/home/me/a\nb.yaml"])}
    public = json.loads(redact_paths(json.dumps(content), "run.json", None))
    assert shlex.split(public["command"]) == ["hfvit", "train", "a\nb.yaml"]


def test_redact_paths_of_a_local_text_encoder_that_is_gone():
    record = local_run()
    record.model.texts = TextModel(
        text_encoder="models/bert", is_local=True, model_type="bert", fusion="concatenation", max_text_length=8,
        parameters=1,
    )  # fmt: skip
    content = {"command": "hfvit train r.yaml --text_encoder models/bert", "recipe": {"text_encoder": "models/bert"}}
    public = json.loads(redact_paths(json.dumps(content), "run.json", record))
    assert public == {"command": "hfvit train r.yaml --text_encoder bert", "recipe": {"text_encoder": "bert"}}


def test_redact_record_removes_paths_and_keeps_class_names():
    record = local_run()
    record.command = CONTENT["command"]
    record.data.labels[0] = "/m/01abc"
    public = redact_record(record)
    assert (public.data.dataset_name, public.model.base_model) == ("cats", "vit")
    assert public.recipe["output_dir"] == "out"
    assert public.data.labels == record.data.labels
    assert public.metrics == record.metrics


def test_redact_paths_of_recipe_and_trainer_state():
    recipe = yaml.safe_dump({"dataset_name": "data/cats", "model_name_or_path": "models/vit", "seed": 1})
    assert yaml.safe_load(redact_paths(recipe, "recipe.yaml", local_run())) == {
        "dataset_name": "cats", "model_name_or_path": "vit", "seed": 1,
    }  # fmt: skip
    state = json.dumps({"best_model_checkpoint": "a/b/out/checkpoint-3", "global_step": 4})
    assert (
        json.loads(redact_paths(state, "trainer_state.json", local_run()))["best_model_checkpoint"] == "checkpoint-3"
    )


@pytest.mark.parametrize("known", [None, make_record()])
def test_redact_paths_without_local_paths_returns_the_same_text(known):
    text = '{"dataset_name":   "uoft-cs/cifar10", "base_model": "timm/vit.a", "url": "https://a/b/c"}'
    assert redact_paths(text, "run.json", known) == text


def test_redact_paths_checks_for_local_folders_that_run_json_lacks(tmp_path, monkeypatch):
    (tmp_path / "data" / "cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = '{"dataset_name": "data/cats"}'
    assert json.loads(redact_paths(text, "run.json", None)) == {"dataset_name": "cats"}
    for key in ("teacher", "head_from_text"):
        content = {"command": f"hfvit train r.yaml --{key} data/cats", "recipe": {key: "data/cats"}}
        record = make_record()
        record.recipe |= content["recipe"]
        public = json.loads(redact_paths(json.dumps(content), "run.json", record))
        assert public == {"command": f"hfvit train r.yaml --{key} cats", "recipe": {key: "cats"}}


def test_redact_paths_keeps_class_names_of_recipe_and_examples():
    content = {
        "recipe": {"class_names": ["/m/01abc", "/m/02def"], "label_separator": "/"},
        "examples": {"mistakes": [{"true": "/m/01abc, /m/02def", "predicted": "/m/02def"}]},
    }
    assert json.loads(redact_paths(json.dumps(content), "run.json", local_run())) == content
    content = {"recipe": {"class_names": ["/home/me/names.txt"]}}
    public = json.loads(redact_paths(json.dumps(content), "run.json", local_run()))
    assert public["recipe"]["class_names"] == ["names.txt"]


def test_file_names_of_example_images_are_removed():
    examples = {"split": "test", "mistakes": [{"row": 1, "true": "/m/01abc", "predicted": "b", "file": "a/Jane.png"}]}
    public = json.loads(redact_paths(json.dumps(CONTENT | {"examples": examples}), "run.json", local_run()))
    assert public["examples"]["mistakes"] == [{"row": 1, "true": "/m/01abc", "predicted": "b"}]
    assert "Jane" not in json.dumps(public)
