"""No path of this machine leaves it."""

import json

import pytest
import yaml

from hfvit.hub.redaction import public_text

FACTS = {
    "command": "train.py /home/me/r.yaml --dataset_name data/cats --output_dir=/home/me/out --learning_rate 1e-3",
    "data": {"dataset_name": "data/cats", "is_local": True, "labels": ["/m/01abc", "~cat"]},
    "model": {"base_model": "models/vit", "is_local": True},
    "recipe": {"dataset_name": "data/cats", "output_dir": "a/b/out", "model_args": {"file": "C:\\x\\w.pt"}},
    "metrics": {"test": {"per_class": [{"label": "/m/01abc", "recall": 1.0}], "loss": float("nan")}},
}


def test_paths_are_reduced_to_their_last_part():
    public = json.loads(public_text(json.dumps(FACTS), "run.json", FACTS))
    assert public["command"] == "train.py r.yaml --dataset_name cats --output_dir=out --learning_rate 1e-3"
    assert public["data"] == {**FACTS["data"], "dataset_name": "cats"}
    assert public["model"]["base_model"] == "vit"
    assert public["recipe"] == {"dataset_name": "cats", "output_dir": "out", "model_args": {"file": "w.pt"}}
    assert public["metrics"]["test"]["per_class"] == FACTS["metrics"]["test"]["per_class"]


def test_a_recipe_and_a_trainers_state():
    recipe = yaml.safe_dump({"dataset_name": "data/cats", "model_name_or_path": "models/vit", "seed": 1})
    assert yaml.safe_load(public_text(recipe, "recipe.yaml", FACTS)) == {
        "dataset_name": "cats", "model_name_or_path": "vit", "seed": 1,
    }  # fmt: skip
    state = json.dumps({"best_model_checkpoint": "a/b/out/checkpoint-3", "global_step": 4})
    assert json.loads(public_text(state, "trainer_state.json", FACTS))["best_model_checkpoint"] == "checkpoint-3"


@pytest.mark.parametrize("known", [{}, {"data": {"dataset_name": "uoft-cs/cifar10", "is_local": False}}])
def test_what_is_public_already_is_left_byte_for_byte(known):
    text = '{"dataset_name":   "uoft-cs/cifar10", "base_model": "timm/vit.a", "url": "https://a/b/c"}'
    assert public_text(text, "run.json", known) == text


def test_a_run_that_did_not_record_it_is_looked_up_here(tmp_path, monkeypatch):
    (tmp_path / "data" / "cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = '{"dataset_name": "data/cats"}'
    assert json.loads(public_text(text, "run.json", {})) == {"dataset_name": "cats"}
    for key in ("teacher", "head_from_text"):
        facts = {"command": f"hfvit train r.yaml --{key} data/cats", "recipe": {key: "data/cats"}}
        public = json.loads(public_text(json.dumps(facts), "run.json", facts))
        assert public == {"command": f"hfvit train r.yaml --{key} cats", "recipe": {key: "cats"}}
