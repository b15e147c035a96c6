"""`hfvit soup`: means of runs, against plain means and stock transformers."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.images import LABELS, colored_split
from helpers.messages import assert_names
from helpers.models import build_model
from helpers.recipes import ARCHITECTURE, MICRO, MICRO_RECIPE
from safetensors.torch import load_file, save_file
from scipy.special import expit
from transformers import AutoImageProcessor, AutoModelForImageClassification

import hfvit
from hfvit.cli import main as hfvit_command
from hfvit.errors import DataError, HFViTError, ModelError, NonFiniteLossError
from hfvit.evaluation.soup import check_same_networks, check_same_validation_images
from hfvit.metrics.multilabel import fit_thresholds
from hfvit.models.configuration import load_config
from hfvit.models.soup import cook_soup
from hfvit.pipeline import main as train

TEST = colored_split(31, 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, colors):
    """Train a short run, and copy it with other weights, or with other validation images."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = folder / "micro.yaml"
    more = f"dataset_name: {colors}\nuse_cpu: true\nmax_steps: 3\noutput_dir: {folder / 'a'}\n"
    recipe.write_text(MICRO_RECIPE + more)
    train([str(recipe)])
    weights = load_file(folder / "a" / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    for name, noise in {"b": 0.1, "c": 0.3}.items():
        shutil.copytree(folder / "a", folder / name)
        noisy = {key: value + noise * torch.randn(value.shape, generator=generator) for key, value in weights.items()}
        save_file(noisy, folder / name / "model.safetensors", metadata={"format": "pt"})
    record = json.loads((shutil.copytree(folder / "a", folder / "seed") / "run.json").read_text())
    record["data"]["splits"]["validation"]["fingerprint"] = "other"
    (folder / "seed" / "run.json").write_text(json.dumps(record))
    return folder


def changed_record(runs, folder, change):
    """Copy run `a`, and change the description of its data."""
    record = json.loads((shutil.copytree(runs / "a", folder) / "run.json").read_text())
    change(record["data"])
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def accuracy(folder, state=None) -> float:
    """Compute the accuracy on the test split with stock transformers."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    if state:
        model.load_state_dict({f"timm_model.{name}": value for name, value in state.items()})
    images = [image.convert("RGB") for image in TEST["img"]]
    inputs = AutoImageProcessor.from_pretrained(folder, backend="pil")(images, return_tensors="pt")
    with torch.no_grad():
        predicted = model(**inputs).logits.argmax(1).numpy()
    return (predicted == np.array(TEST["label"])).mean()


def mean(states) -> dict[str, torch.Tensor]:
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


@pytest.mark.parametrize("kind", ["uniform", "greedy"])
def test_soup_of_runs_equals_plain_means(runs, tmp_path, kind):
    names = ["a", "b", "c"]
    states = {name: load_file(runs / name / "model.safetensors") for name in names}
    scores = {name: accuracy(runs / name) for name in names}
    used = names
    if kind == "greedy":
        first, *rest = sorted(names, key=scores.get, reverse=True)
        used = [first]
        for name in rest:
            candidate = mean([states[each] for each in [*used, name]])
            if accuracy(runs / "a", candidate) >= accuracy(runs / "a", mean([states[each] for each in used])):
                used.append(name)
    record = hfvit.soup([runs / name for name in names], tmp_path / "soup", kind=kind, split="test", device="cpu")
    assert {member.name: member.score for member in record.soup.members} == scores
    assert sorted(record.soup.used) == sorted(used)
    saved = load_file(tmp_path / "soup" / "model.safetensors")
    for name, value in mean([states[each] for each in used]).items():
        torch.testing.assert_close(saved[name], value, atol=1e-6, rtol=1e-5)
    assert record.soup.score == accuracy(tmp_path / "soup")
    assert hfvit.validate(tmp_path / "soup", split="test", device="cpu", show_progress=False).rows[0].accuracy == (
        record.soup.score
    )


def test_run_that_is_passed_twice_counts_once(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(runs))
    members = ["~/a", runs / "b", runs / "a", f"{runs}/b/"]
    record = hfvit.soup(members, tmp_path / "soup", kind="uniform", split="test", device="cpu")
    assert [member.name for member in record.soup.members] == ["a", "b"]
    saved = load_file(tmp_path / "soup" / "model.safetensors")
    for name, value in mean([load_file(runs / name / "model.safetensors") for name in "ab"]).items():
        torch.testing.assert_close(saved[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("names", [("a", "half"), ("half", "a")])
def test_soup_of_runs_with_different_dtypes_is_their_mean(runs, tmp_path, names):
    model = hfvit.HFViTForImageClassification.from_pretrained(runs / "b").to(torch.bfloat16)
    model.save_pretrained(shutil.copytree(runs / "b", tmp_path / "half"))
    members = [runs / "a" if name == "a" else tmp_path / "half" for name in names]
    hfvit.soup(members, tmp_path / "soup", kind="uniform", split="test", device="cpu")
    states = [load_file(member / "model.safetensors") for member in members]
    for name, value in load_file(tmp_path / "soup" / "model.safetensors").items():
        assert value.dtype == states[0][name].dtype
        torch.testing.assert_close(value, (states[0][name].float() + states[1][name].float()).div(2).to(value.dtype))


def test_greedy_soup_takes_a_model_that_leaves_the_score_as_it_is():
    weights = {name: {"w": torch.tensor([value])} for name, value in {"a": 1.0, "b": 3.0}.items()}
    soup, mean_weights = cook_soup("greedy", ["a", "b"], weights.get, lambda each, name: 0.5, metric="accuracy")
    assert soup.used == ["a", "b"]
    assert mean_weights["w"].item() == 2.0


def test_soup_command_prints_and_saves_the_scores(runs, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        hfvit_command(["soup", str(runs / "a"), str(runs / "b"), "--output_dir", str(tmp_path / "out")])
    assert not stop.value.code
    saved = json.loads((tmp_path / "out" / "soup.json").read_text())
    printed = capsys.readouterr().out
    assert f"{saved['soup']['score']:.2%}" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "recipe.yaml", "soup.json",
    }  # fmt: skip
    assert set(hfvit.predict(tmp_path / "out", TEST["img"][0], device="cpu")) == set(LABELS)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(dataset_config_name="other"),
        lambda data: data["splits"]["validation"].update(source="other"),
        lambda data: data["splits"]["validation"].update(rows=1),
    ],
)
def test_other_validation_images_with_the_same_fingerprint_raise(runs, tmp_path, change):
    other = changed_record(runs, tmp_path / "other", change)
    with pytest.raises(DataError, match=r"^RUN: "):
        check_same_validation_images([str(runs / "a"), str(other)])
    check_same_validation_images([str(runs / "a"), str(runs / "b")])


def test_runs_with_unknown_validation_images_raise(runs, tmp_path):
    unknown = [
        changed_record(runs, tmp_path / name, lambda data: data["splits"]["validation"].update(fingerprint=""))
        for name in "ab"
    ]
    with pytest.raises(DataError, match=r"^RUN: "):
        check_same_validation_images([str(folder) for folder in unknown])


def test_soup_of_several_labels_fits_the_thresholds_of_its_weights(tmp_path):
    model = build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO)
    model.config.problem_type = "multi_label_classification"
    torch.nn.init.normal_(model.timm_model.head.weight)
    for name in "ab":
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            model.timm_model.head.weight.neg_()  # the mean of both, whose logits are constant, is not used
    targets = np.array(
        [[label == index or row % 5 == index for index in range(3)] for row, label in enumerate(TEST["label"])]
    )
    labels = [[LABELS[index] for index in np.flatnonzero(row)] for row in targets]
    TEST.remove_columns("label").add_column("label", labels).to_parquet(tmp_path / "set" / "test.parquet")
    options = {"dataset_name": str(tmp_path / "set"), "split": "test", "device": "cpu"}
    record = hfvit.soup([tmp_path / "a", tmp_path / "b"], tmp_path / "out", **options)
    assert len(record.soup.used) == 1
    probabilities = expit(hfvit.load_classifier(tmp_path / "out", "cpu").logits(TEST["img"]))
    expected = fit_thresholds(probabilities, targets)
    assert load_config(tmp_path / "out").thresholds == pytest.approx(expected, abs=1e-5)
    assert max(abs(expected - 0.5)) > 0.01


def test_runs_may_differ_in_their_drop_rates(runs, tmp_path):
    other = shutil.copytree(runs / "a", tmp_path / "other")
    config = load_config(runs / "a")
    for name, value, allowed in (("drop_path_rate", 0.1, True), ("patch_drop_rate", 0.2, True), ("depth", 7, False)):
        config.model_args = {**config.model_args, name: value}
        config.save_pretrained(other)
        if allowed:
            assert check_same_networks([str(runs / "a"), str(other)]).model_args == load_config(runs / "a").model_args
        else:
            with pytest.raises(HFViTError, match=r"^RUN: model_args "):
                check_same_networks([str(runs / "a"), str(other)])


def test_runs_that_cannot_be_averaged_are_one_error(runs, tmp_path, stock):
    wrong = {
        r"^RUN: .*two or more": ([runs / "a", f"{runs}/a/"], tmp_path / "out", {}),
        r"^RUN: .*other validation images": ([runs / "a", runs / "seed"], tmp_path / "out", {}),
        r"^kind: .*'mean'": ([runs / "a", runs / "b"], tmp_path / "out", {"kind": "mean"}),
        r"^--output_dir: ": ([runs / "a", runs / "b"], runs / "a", {}),
        r"^RUN: label_names of ": ([runs / "a", tmp_path / "other"], tmp_path / "out", {}),
        r"^RUN: .*'vit'": ([runs / "a", stock], tmp_path / "out", {}),
    }
    model = hfvit.HFViTForImageClassification.from_pretrained(runs / "a", labels=["red", "blue"])
    model.save_pretrained(tmp_path / "other")
    for message, (members, output_dir, options) in wrong.items():
        with pytest.raises(HFViTError, match=message):
            hfvit.soup(members, output_dir, device="cpu", **options)
    assert not (tmp_path / "out").exists()


def test_soup_of_a_run_with_nan_logits_names_it(runs, tmp_path):
    bad = shutil.copytree(runs / "b", tmp_path / "bad")
    weights = load_file(bad / "model.safetensors")
    save_file(
        {name: value * torch.nan for name, value in weights.items()}, bad / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(NonFiniteLossError, match=r"^RUN: ") as caught:
        hfvit.soup([runs / "a", bad], tmp_path / "out", device="cpu")
    assert_names(caught.value, bad)


def test_soup_of_one_path_is_of_one_run():
    with pytest.raises(ModelError, match=r"^RUN:") as caught:
        hfvit.soup("outputs/a", "outputs/b")
    assert_names(caught.value, 1)
