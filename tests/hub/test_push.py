"""`hfvit push`: pushed files, errors before and during a push, and verification of the pushed model."""

import json
import re
import shutil

import pytest
import torch
import yaml
from helpers.commands import run_command
from helpers.engines import engine_of
from helpers.images import LABELS
from helpers.loopback_hub import LoopbackHub
from helpers.loopback_store import READ, STRANGER, Blob
from helpers.messages import assert_names, option_of
from helpers.models import build_model
from helpers.recipes import ARCHITECTURE, MICRO, write_micro_recipe
from helpers.runs import PUSHED
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import hfvit
from hfvit.artifacts.export_folder import find_exports
from hfvit.artifacts.extension_record import ExtensionRecord
from hfvit.artifacts.gate import EvaluationData
from hfvit.artifacts.run_record import RunRecord
from hfvit.artifacts.run_sections import Soup, SoupMember
from hfvit.artifacts.soup_record import SoupRecord
from hfvit.cli.export_onnx import main as export
from hfvit.errors import HubError, ModelError, PushArgumentError, run
from hfvit.hub.files import PushedFile, Repository, exports_left_out, files_to_push, outdated_files
from hfvit.hub.push import Destination, dry_run, push_to
from hfvit.pipeline import main
from hfvit.trt.triton import triton_config


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as running:
        yield running


@pytest.fixture(scope="module")
def trained(tmp_path_factory, colors):
    """A micro run on a local folder, with an export and with files that must not be pushed."""
    folder = tmp_path_factory.mktemp("push")
    recipe = write_micro_recipe(folder, colors, "max_steps: 4")
    assert run(lambda: main([str(recipe), "--keep_checkpoints", "--plots", "true"])) == 0
    out = folder / "out"
    assert list(out.glob("checkpoint-*/optimizer.pt"))
    assert (out / "plots" / "training_images.png").exists()
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "notes.txt",
        ".secret",
        "README.md.bak",
        "plots/.x.png",
        "a.png",
    ):
        (out / name).write_bytes(b"not for the Hub")
    return out


@pytest.fixture
def out(trained, tmp_path):
    """A copy of the run, which the test may change."""
    return shutil.copytree(trained, tmp_path / "out")


@pytest.fixture
def online(hub, monkeypatch, tmp_path):
    hub.take_over(monkeypatch, tmp_path / "cache")
    return lambda token: hub.take_over(monkeypatch, tmp_path / "cache", token)


def test_push_sends_only_allowed_files_and_no_local_paths(trained, hub, online, colors, capsys):
    url = push_to(trained, Destination("user/micro"), message="First")
    files = hub.model("user/micro").files()
    assert set(files) == PUSHED | {".gitattributes"}
    assert hub.model("user/micro").messages[-1] == "First"
    assert url == f"{hub.url}/user/micro/commit/{hub.model('user/micro').resolve('main')}"
    assert colors.name == yaml.safe_load(files["recipe.yaml"])["dataset_name"]
    for name, content in files.items():
        for path in (str(colors.parent), str(trained.parent)):
            assert path.encode() not in content, name
    assert json.loads(files["run.json"])["metrics"] == json.loads((trained / "run.json").read_text())["metrics"]
    assert 'model="user/micro"' in files["README.md"].decode()


def test_second_push_commits_only_changed_files(out, hub, online):
    push_to(out, Destination("user/again"))
    first = dict(hub.model("user/again").commits[hub.model("user/again").resolve("main")])
    before = len(hub.requests)
    push_to(out, Destination("again"))  # of the token's user
    assert len(hub.model("user/again").messages) == 2
    assert not [path for method, path in hub.requests[before:] if method == "PUT"]
    state = load_file(out / "model.safetensors")
    save_file({name: value + 0.5 for name, value in state.items()}, out / "model.safetensors", {"format": "pt"})
    push_to(out, Destination("user/again"))
    second = hub.model("user/again").commits[hub.model("user/again").resolve("main")]
    assert {path for path in second if first[path].oid != second[path].oid} == {"model.safetensors"}


def test_export_is_pushed_to_the_folder_that_transformers_js_loads(out, hub, online, capsys):
    (out / "onnx").mkdir()
    with pytest.raises(SystemExit) as stop:
        export(["--model", str(out), str(out / "onnx"), "--no_gate"])
    assert stop.value.code == 0
    (out / "onnx" / ".export-1").mkdir()
    push_to(out, Destination("user/exported"), include=["onnx"])
    files = hub.model("user/exported").files()
    exported = {f"onnx/{name}" for name in ("model.onnx", "config.json", "preprocessor_config.json", "export.json")}
    assert set(files) == PUSHED | exported | {".gitattributes"}
    assert json.loads(files["config.json"])["model_type"] == "timm_wrapper"
    assert json.loads(files["onnx/config.json"])["id2label"] == {str(i): label for i, label in enumerate(LABELS)}
    card = files["README.md"].decode()
    assert "| `onnx/model.onnx` |" in card
    assert "onnxruntime" in card
    assert "transformers.js" in card

    # Another export in its place: nothing of the old one stays.
    (out / "onnx" / "model.onnx").rename(out / "onnx" / "model_optimized.onnx")
    push_to(out, Destination("user/exported"), include=["onnx"])
    assert {name for name in hub.model("user/exported").files() if name.endswith(".onnx")} == {
        "onnx/model_optimized.onnx"
    }
    assert "onnx/model.onnx" not in hub.model("user/exported").files()["README.md"].decode()
    capsys.readouterr()
    push_to(out, Destination("user/exported"))
    assert "--include onnx" in capsys.readouterr().err

    # An export at another patch size is this model's, too.
    shutil.rmtree(out / "onnx")
    with pytest.raises(SystemExit) as stop:
        export(["--model", str(out), str(out / "onnx"), "--no_gate", "--patch_size", "4"])
    assert stop.value.code == 0
    push_to(out, Destination("user/exported"), include=["onnx"])
    assert json.loads(hub.model("user/exported").files()["onnx/config.json"])["patch_size"] == 4

    # An export of an earlier training is not this model's.
    state = load_file(out / "model.safetensors")
    save_file({name: value + 0.5 for name, value in state.items()}, out / "model.safetensors", {"format": "pt"})
    message = refusal(out, Destination("user/exported"), include=["onnx"])
    assert option_of(message) == "include"
    assert_names(message, out / "onnx")


@pytest.mark.parametrize("place", ["tensorrt", "tensorrt/my_vit"])
def test_engine_of_other_weights_is_not_pushed(out, hub, online, tmp_path, place):
    record = engine_of(tmp_path, weights_sha256="f" * 64).record
    (out / place).mkdir(parents=True)
    (out / place / record.file).write_bytes(b"engine")
    record.save(out / place)
    message = refusal(out, Destination("user/engine"), include=["tensorrt"])
    assert option_of(message) == "include"
    assert_names(message, out / place)
    assert ("model", "user/engine") not in hub.repositories


def test_triton_repository_is_pushed_with_its_class_names(out, tmp_path):
    folder = out / "tensorrt" / "my_vit"
    record = engine_of(tmp_path, file="1/model.plan").record
    (folder / "1").mkdir(parents=True)
    contents = {"1/model.plan": "plan", "config.pbtxt": triton_config("my_vit", record), "labels.txt": "red\n"}
    for name, text in contents.items():
        (folder / name).write_text(text)
    record.save(folder)
    pushed = {file.path: file for file in files_to_push(out, "user/x", ("tensorrt",))}
    assert {path for path in pushed if path.startswith("tensorrt/")} == {
        f"tensorrt/my_vit/{name}" for name in (*contents, "engine.json")
    }
    assert "| `tensorrt/my_vit/1/model.plan` |" in pushed["README.md"].source.decode()
    assert [row.name for row in find_exports(out, RunRecord.load(out))[0]["tensorrt"]] == ["my_vit/1/model.plan"]
    (folder / "engine.json").unlink()
    (folder / "config.json").write_text(json.dumps({"id2label": {"0": "other"}}))
    with pytest.raises(HubError, match=r"^--include tensorrt:"):
        files_to_push(out, "user/x", ("tensorrt",))
    for name in ("1/model.plan", "config.json"):
        (folder / name).unlink()
    with pytest.raises(HubError, match=r"^--include tensorrt:"):  # no engine
        files_to_push(out, "user/x", ("tensorrt",))


def test_push_of_a_checkpoint_without_a_run_says_that_it_has_no_card(out, hub, online, tmp_path, capsys):
    folder = tmp_path / "extended"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(out / name, folder / name)
    push_to(folder, Destination("user/extended"))
    assert set(hub.model("user/extended").files()) == {".gitattributes", "config.json", "model.safetensors"}
    assert_names(capsys.readouterr().err, folder, "README.md", "run.json")


def test_push_deletes_files_of_an_earlier_push_that_belong_to_other_weights(out, hub, online, capsys):
    push_to(out, Destination("user/replaced"))
    repository = hub.model("user/replaced")
    held = repository.commits[repository.resolve("main")]
    run = json.loads((out / "run.json").read_text())
    run["data"] |= {"dataset_name": "owner/set", "is_local": False}
    run["recipe"]["finetuning"] = "lora"
    kept = {"notes.txt", "plots/mine.png", "onnx/model.onnx", ".eval_results/other--set.yaml", "tokenizer.json"}
    outdated = {
        "model.safetensors.index.json", "model-00001-of-00002.safetensors", "preprocessor_config.json", "soup.json",
        "adapter/adapter_config.json", "plots/two_classes_dark.png", ".eval_results/owner--set.yaml",
    }  # fmt: skip
    added = {name: Blob(name.encode()) for name in kept | outdated}
    repository.commit({**held, **added, "run.json": Blob(json.dumps(run).encode())}, "earlier")
    capsys.readouterr()
    rows = [line.split() for line in dry_run(out, Destination("replaced")).splitlines()]
    assert {row[0] for row in rows if row[-1] == "deleted"} == outdated
    assert capsys.readouterr().err == ""
    push_to(out, Destination("user/replaced"))
    assert set(repository.files()) == PUSHED | kept | {".gitattributes"}
    assert_names(capsys.readouterr().err, *outdated)
    assert "deleted" not in dry_run(out, Destination("user/replaced"))


def test_push_into_a_repository_of_another_program_deletes_only_what_would_be_loaded(out, hub, online):
    theirs = {
        "README.md", "recipe.yaml", "tokenizer.json", "vocab.txt", "plots/learning_curves.png",
        "adapter/adapter_config.json", "pytorch_model.bin", "soup.json",
    }  # fmt: skip
    loaded = {
        "model.safetensors.index.json",
        "preprocessor_config.json",
        "processor_config.json",
        "adapter_config.json",
    }
    hub.create("user/clip", files=dict.fromkeys((*theirs, *loaded, "run.json", "config.json"), b"{}"))
    rows = [line.split() for line in dry_run(out, Destination("user/clip", revision="new")).splitlines()]
    assert {row[0] for row in rows if row[-1] == "deleted"} == loaded
    push_to(out, Destination("user/clip"))
    assert set(hub.model("user/clip").files()) == PUSHED | theirs | {".gitattributes"}


def test_tokenizer_of_an_earlier_image_text_run_is_deleted(out):
    run = json.loads((out / "run.json").read_text())
    there = ["tokenizer.json", "notes.txt"]
    encoder = {"text_encoder": "bert", "model_type": "bert", "parameters": 1, "max_text_length": 8}
    run["model"]["texts"] = {**encoder, "is_local": False, "fusion": "concat"}
    files = files_to_push(out, "user/x")
    assert outdated_files(Repository(there, run=json.dumps(run)), files, ()) == ["tokenizer.json"]
    files = [*files, PushedFile("vocab.txt", b"")]  # the tokenizer of the pushed model, which would read both
    assert outdated_files(Repository(there), files, ()) == ["tokenizer.json"]


def test_dry_run_of_an_impossible_push_raises_as_the_push(out, hub, online, capsys):
    hub.create("user/data", "dataset")
    with pytest.raises(PushArgumentError, match=r"^repository:"):
        dry_run(out, Destination("user/data"))
    with hub.fault("GET", "/tree/", 403, times=99):
        hub.create("user/closed")
        assert "README.md" in dry_run(out, Destination("user/closed"))
    assert_names(capsys.readouterr().err, "user/closed")


def soup_record(dataset: str = "owner/set") -> SoupRecord:
    members = [SoupMember(name="one", score=0.9, is_used=True), SoupMember(name="other", score=0.5, is_used=False)]
    data = EvaluationData(dataset=dataset, dataset_config_name=None, split="test", images=9, fingerprint="f")
    soup = Soup(kind="greedy", metric="accuracy", members=members, score=0.9125)
    return SoupRecord(hfvit_version="0", soup=soup, data=data)


def extension_record(*names: str) -> ExtensionRecord:
    shares = {"old_accuracy_before": 0.9, "old_accuracy": 0.875, "new_accuracy": None}
    return ExtensionRecord(hfvit_version="0", new_classes=[*names], images=[3] * len(names), old_images=7, **shares)


def test_card_of_a_derived_checkpoint_has_its_results_license_and_classes(out, tmp_path):
    folder = tmp_path / "derived"
    folder.mkdir()
    shutil.copyfile(out / "model.safetensors", folder / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    config["pretrained_cfg"]["license"] = "dinov3-license"
    (folder / "config.json").write_text(json.dumps(config))
    for record, numbers in (
        (soup_record(), {"91.25", "90.00", "50.00"}),
        (extension_record("new"), {"90.00", "87.50"}),
    ):
        record.save(folder)
        card = ModelCard({file.path: file for file in files_to_push(folder, "user/x")}["README.md"].source.decode())
        assert (card.data.license, card.data.license_name) == ("other", "dinov3-license")
        assert card.data.datasets == ("owner/set" if isinstance(record, SoupRecord) else None)
        assert numbers | {*LABELS} <= set(re.findall(r"\w+(?:\.\d+)?", card.text))
        assert 'model="user/x"' in card.text
    (folder / "README.md").write_text("Mine.\n")
    assert {file.path: file for file in files_to_push(folder, "user/x")}["README.md"].source == folder / "README.md"
    (folder / "README.md").unlink()
    (folder / "extension.json").write_text("{}")
    with pytest.raises(ModelError) as caught:
        files_to_push(folder, "user/x")
    assert_names(caught.value, folder / "extension.json")


def test_push_of_a_soup_leaves_no_results_of_an_earlier_run(out, hub, online, tmp_path):
    push_to(out, Destination("user/cooked"))
    repository = hub.model("user/cooked")
    card = repository.files()["README.md"].decode()
    assert "model-index" in card
    repository.commit(
        {
            **repository.commits[repository.resolve("main")],
            "README.md": Blob(
                f"{card.replace('library_name', 'language: en' + chr(10) + 'library_name')}\nMine.\n".encode()
            ),
        },
        "edited",
    )
    folder = tmp_path / "soup"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(out / name, folder / name)
    soup_record().save(folder)
    push_to(folder, Destination("user/cooked"))
    files = repository.files()
    assert set(files) == {".gitattributes", "README.md", "config.json", "model.safetensors", "soup.json"}
    left = ModelCard(files["README.md"].decode())
    assert left.text.strip().endswith("Mine.")
    assert {"one", "other", "91.25"} <= set(re.findall(r"\w+(?:\.\d+)?", left.text))
    assert "confusion_matrix" not in left.text
    assert left.data.language == "en"
    assert left.data.eval_results is None
    push_to(out, Destination("user/cooked"))
    assert "Mine." in repository.files()["README.md"].decode()
    assert "soup.json" not in repository.files()


def test_push_to_branch_or_pull_request_does_not_change_main(trained, hub, online):
    hub.create("another/theirs")
    assert push_to(trained, Destination("another/theirs", create_pr=True)) == f"{hub.url}/another/theirs/discussions/1"
    push_to(trained, Destination("user/branches", revision="next"))
    assert set(hub.model("another/theirs").files()) == set(hub.model("user/branches").files()) == {".gitattributes"}
    files = hub.model("user/branches").files("next")
    assert set(files) == PUSHED | {".gitattributes"}
    assert "user/branches/resolve/next/plots/" in files["README.md"].decode()


def test_edits_of_the_local_and_the_pushed_card_are_kept(out, hub, online):
    push_to(out, Destination("user/edited"))
    repository = hub.model("user/edited")
    there = repository.files()["README.md"].decode().replace("library_name: timm", "library_name: timm\nlicense: mit")
    there += "\n## Thanks\n\nTo my cat.\n"
    held = repository.commits[repository.resolve("main")]
    repository.commit({**held, "README.md": Blob(there.encode())}, "edited on the Hub")
    here = (out / "README.md").read_text()
    (out / "README.md").write_text(f"{here}\nThe figures hold for my images.\n")
    push_to(out, Destination("user/edited"))
    card = ModelCard(repository.files()["README.md"].decode())
    assert card.data.license == "mit"
    assert "To my cat." in card.text
    assert "The figures hold for my images." in card.text
    assert 'model="user/edited"' in card.text


def refusal(folder, destination, **kwargs) -> str:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(HubError) as caught:
        push_to(folder, destination, **kwargs)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    return str(caught.value)


def test_invalid_push_is_rejected_before_anything_is_sent(trained, hub, online, tmp_path):
    hub.create("user/pictures", "dataset")
    hub.create("user/open")
    before = set(hub.repositories)
    assert_names(refusal(trained, Destination("user/pictures")), "user/pictures")
    assert_names(refusal(trained, Destination("datasets/user/pictures")), "datasets/user/pictures", "user/name")
    address = "https://huggingface.co/user/x"
    assert_names(refusal(trained, Destination(address)), address, "user/name")
    assert_names(refusal(trained, Destination("user/wrong name")), "user/wrong name", "user/name")
    assert_names(refusal(trained, Destination("another/x")), "another/x", "user/x", "--create_pr")
    message = refusal(trained, Destination("another/x", create_pr=True))
    assert option_of(message) == "create_pr"
    assert_names(message, "another/x")
    message = refusal(trained, Destination("user/open", private=True))
    assert option_of(message) == "private"
    assert_names(message, "user/open")
    message = refusal(trained, Destination("user/x"), include=["onnx"])
    assert option_of(message) == "include"
    assert_names(message, trained / "onnx", "optimum-cli export onnx")
    (tmp_path / "empty").mkdir()
    assert_names(refusal(tmp_path / "empty", Destination("user/x")), tmp_path / "empty", "model.safetensors")
    online(READ)
    message = refusal(trained, Destination("user/x"))
    assert_names(message, "user", "HF_TOKEN")
    assert "hfvit push" not in message  # the same line would only repeat a mistake
    online("hf_unknown")
    assert_names(
        refusal(trained, Destination("user/x")), "HF_TOKEN", f"hfvit push {trained} user/x"
    )  # the Hub's answer
    online(None)
    message = refusal(trained, Destination("user/x"))
    assert_names(message, "HF_TOKEN")
    assert not {"user", "push"} & set(re.findall(r"\w+", message))
    online(STRANGER)
    assert_names(refusal(trained, Destination("user/x")), "user/x", "another", "another/x", "--create_pr")
    assert set(hub.repositories) == before


def test_failed_push_changes_nothing_and_shows_the_command_to_repeat(trained, hub, online):
    hub.objects.clear()
    with hub.fault("PUT", "^lfs/", None, times=99):
        message = refusal(trained, Destination("user/cut", private=True), message="Second try")
    assert re.search(r"\b(Read|Write|Connect|RemoteProtocol)Error\b", message)
    assert message.endswith(f"hfvit push {trained} user/cut --private --message 'Second try'")
    assert set(hub.model("user/cut").files()) == {".gitattributes"}
    with hub.fault("POST", "/commit/", 503, times=99):
        assert_names(refusal(trained, Destination("user/cut")), 503)
    assert set(hub.model("user/cut").files()) == {".gitattributes"}
    with hub.fault("PUT", "^lfs/", None), hub.fault("POST", "preupload", 500), hub.fault("POST", "/commit/", 502):
        hub.objects.clear()
        push_to(trained, Destination("user/cut"))
    assert set(hub.model("user/cut").files()) == PUSHED | {".gitattributes"}


# In the order of a push; the last is of the repository's state in the end.
REQUESTS = (
    ("GET", "whoami"), ("GET", "^api/models/user/[a-z]+$"), ("POST", "repos/create"), ("GET", "/tree/"),
    ("POST", "validate-yaml"), ("POST", "preupload"), ("POST", "info/lfs"), ("PUT", "^lfs/"), ("POST", "/commit/"),
)  # fmt: skip


HTML = b"<html>log in to the Wi-Fi</html>"
PORTALS = [(*request, HTML) for request in REQUESTS]
PORTALS += [(*REQUESTS[n], body) for n in (0, 1, 8) for body in (b"[]", b'{"login": "http://wifi/"}', b"")]


@pytest.mark.parametrize(("method", "pattern", "body"), PORTALS)
def test_answer_of_a_captive_portal_leaves_no_half_push(trained, hub, online, method, pattern, body):
    name = f"user/portal{'x' * len(hub.repositories)}"
    hub.objects.clear()
    message = ""
    with hub.fault(method, pattern, 200, times=99, body=body):
        try:
            push_to(trained, Destination(name))
        except HubError as error:
            message = str(error)
    found = set(hub.model(name).files()) - {".gitattributes"} if ("model", name) in hub.repositories else set()
    assert not message or message.endswith(f"hfvit push {trained} {name}")
    assert found == (set() if message else PUSHED)  # nobody reads some of the answers


HEALING = [(*request, 503) for request in REQUESTS]
HEALING += [(*REQUESTS[n], status) for n in (0, 2, 8) for status in (429, 500, 502, None)]


@pytest.mark.parametrize(("method", "pattern", "status"), HEALING)
def test_failure_that_heals_is_survived_at_each_request(trained, hub, online, method, pattern, status):
    name = f"user/heals{'x' * len(hub.repositories)}"
    hub.objects.clear()
    with hub.fault(method, pattern, status, headers={"Retry_After": "7"} if status == 429 else {}) as failure:
        push_to(trained, Destination(name))
    assert failure.times == 0
    assert set(hub.model(name).files()) == PUSHED | {".gitattributes"}
    assert hub.model(name).messages == ["initial commit", "Push with hfvit"]


def test_wait_that_the_hub_asks_for_is_kept_up_to_the_limit(trained, hub, online, monkeypatch):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    with hub.fault("POST", "/commit/", 429, times=2, headers={"Retry_After": "23"}):
        push_to(trained, Destination("user/busy"))
    assert [pause for pause in pauses if pause > 1] == [23, 23]
    with hub.fault("GET", "whoami", 429, times=99, headers={"Retry_After": "3600"}):
        assert_names(refusal(trained, Destination("user/busy")), 429, 3600, "60 seconds")
    pauses.clear()
    with hub.fault("GET", "whoami", 503, times=99):
        assert_names(refusal(trained, Destination("user/busy")), 503)
    assert pauses == [1, 2, 4, 8, 16, 16]


def test_commit_whose_answer_is_lost_is_found(trained, hub, online):
    with hub.fault("POST", "/commit/", None, late=True):
        url = push_to(trained, Destination("user/late"))
    repository = hub.model("user/late")
    assert repository.messages == ["initial commit", "Push with hfvit"]
    assert url.endswith(repository.resolve("main"))


def test_failed_push_reports_the_state_of_the_hub(trained, hub, online):
    for name in ("there", "unknown", "request"):
        hub.create(f"user/{name}")
    lost = {"status": None, "late": True}
    with hub.fault("POST", "/commit/", **lost), hub.fault("GET", "/tree/", 503, times=99, after="/commit/"):
        message = refusal(trained, Destination("user/there"))
    assert_names(message, f"{hub.url}/user/there/commit/{hub.model('user/there').resolve('main')}")
    with hub.fault("POST", "/commit/", **lost), hub.fault("GET", "user/unknown", 503, times=99, after="/commit/"):
        message = refusal(trained, Destination("user/unknown"))
    assert_names(message, f"{hub.url}/user/unknown/commits/main")
    with hub.fault("POST", "/commit/", **lost):
        message = refusal(trained, Destination("user/request", create_pr=True))
    assert_names(message, f"{hub.url}/user/request/discussions")
    assert list(hub.model("user/request").refs) == ["main", "refs/pr/1"]


@pytest.mark.parametrize(
    "name", ["vocab.txt", "config.json", "run.json", "README.md", "plots/x.png", "plots", "adapter"]
)
def test_link_in_the_folder_is_refused(out, tmp_path, name):
    secret = tmp_path / "secret"
    place = out / name
    if name in ("plots", "adapter"):
        secret.mkdir()
        (secret / "x.png").write_text("secret")
        shutil.rmtree(place, ignore_errors=True)
    else:
        secret.write_text((out / name).read_text() if (out / name).suffix in (".json", ".md") else "secret")
    place.unlink(missing_ok=True)
    if name == "adapter":
        record = json.loads((out / "run.json").read_text())
        record["recipe"]["finetuning"] = "lora"
        (out / "run.json").write_text(json.dumps(record))
    place.symlink_to(secret)
    with pytest.raises(HubError) as caught:
        files_to_push(out, "user/x")
    assert option_of(str(caught.value)) == "OUTPUT_DIR"
    assert_names(caught.value, place, secret)


@pytest.mark.parametrize("name", ["onnx", "onnx/model.onnx", "onnx/config.json"])
def test_link_in_an_export_is_refused(out, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    for file in ("model.onnx", "config.json"):
        (tmp_path / "elsewhere" / file).write_text("{}")
    shutil.rmtree(out / "onnx", ignore_errors=True)
    if name == "onnx":
        (out / "onnx").symlink_to(tmp_path / "elsewhere")
    else:
        shutil.copytree(tmp_path / "elsewhere", out / "onnx")
        (out / name).unlink()
        (out / name).symlink_to(tmp_path / "elsewhere" / name.partition("/")[2])
    with pytest.raises(HubError) as caught:
        files_to_push(out, "user/x", ("onnx",))
    assert_names(caught.value, out / name)


def test_links_that_would_not_be_pushed_are_left_out(out, tmp_path):
    (out / "notes").symlink_to(tmp_path)
    (out / "secret.txt").symlink_to("/etc/passwd")
    assert {file.path for file in files_to_push(out, "user/x")} == PUSHED


def test_push_fails_if_the_pushed_weights_differ(trained, hub, online):
    push_to(trained, Destination("user/changed"))
    stored = load_file(trained / "model.safetensors")
    damaged = trained.parent / "damaged.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in stored.items()}, damaged, {"format": "pt"})
    repository = hub.model("user/changed")
    # The Hub still vouches for the old bytes.
    repository.commits[repository.resolve("main")]["model.safetensors"].content = damaged.read_bytes()
    with pytest.raises(HubError, match=r"\d(\.\d+|e[+-]\d+)\b") as caught:  # by how much the logits differ
        push_to(trained, Destination("user/changed"))
    assert_names(caught.value, f"{hub.url}/user/changed/commit/{repository.resolve('main')}")


def test_verification_ignores_a_local_folder_with_the_repository_name(trained, hub, online, tmp_path, monkeypatch):
    (tmp_path / "user" / "shadow").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.url in push_to(trained, Destination("user/shadow"))


def test_push_to_hub_without_permission_fails_before_training(recipe, hub, online, capsys, tmp_path):
    words = [str(recipe), "--push_to_hub", "true", "--hub_model_id", "another/x"]
    assert run(lambda: main(words)) == 5
    assert_names(capsys.readouterr().err, "another/x", "user", "user/x", "--create_pr")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("status", [500, 200, None])
def test_failed_push_after_training_does_not_fail_the_run(recipe, hub, online, capsys, tmp_path, status):
    name = f"user/later{status}"
    words = [str(recipe), "--max_steps", "2", "--push_to_hub", "true", "--hub_model_id", name]
    with hub.fault("POST", "/commit/", status, times=99, body=HTML):
        assert run(lambda: main(words)) == 0
    printed = capsys.readouterr()
    assert re.search(r"^test +31 ", printed.out, re.MULTILINE)  # the table at a run's end
    assert "hfvit: error: " not in printed.err
    assert "Traceback" not in printed.err
    assert f"hfvit push {tmp_path / 'out'} {name}" in printed.err
    assert json.loads((tmp_path / "out" / "run.json").read_text())["training"]["steps"] == 2
    assert set(hub.model(name).files()) == {".gitattributes"}


def test_dry_run_lists_files_and_sizes_and_sends_nothing(trained):
    result = run_command("hfvit", "push", trained, "user/x", "--dry_run", HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert {row[0] for row in rows[:-1]} == PUSHED
    assert rows[-1][:2] == [str(len(PUSHED)), "files"]
    assert all(row[-1] in ("B", "kB", "MB") for row in rows)


def test_checkpoint_without_run_json_is_pushed_unchanged(tmp_path, hub, online):
    build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO).save_pretrained(tmp_path / "m")
    assert [file.path for file in files_to_push(tmp_path / "m", "user/m")] == ["config.json", "model.safetensors"]


def test_exports_left_out_are_folders_with_files(tmp_path):
    for name in ("onnx", "openvino", "tensorrt"):
        (tmp_path / name).mkdir()
    (tmp_path / "onnx" / "model.onnx").touch()
    (tmp_path / "tensorrt" / ".export").mkdir()
    assert exports_left_out(tmp_path, ()) == ["onnx"]
    assert exports_left_out(tmp_path, ("onnx",)) == []


def test_files_to_push_of_several_runs_names_their_folders(tmp_path):
    (tmp_path / "multirun.json").write_text("{}")
    with pytest.raises(PushArgumentError, match=r"^OUTPUT_DIR:") as caught:
        files_to_push(tmp_path, "user/name")
    assert_names(caught.value, f"{tmp_path}/seed_N", f"{tmp_path}/fold_N")


@pytest.mark.parametrize(
    "wrong",
    [
        {"folder": None}, {"repo_id": None}, {"repo_id": 3}, {"include": "onnx"}, {"include": 3}, {"private": "no"},
        {"create_pr": 1}, {"revision": 3}, {"message": 3}, {"token": 3},
    ],
    ids=str,
)  # fmt: skip
def test_push_with_an_argument_of_another_type_names_it(wrong, tmp_path):
    [option] = wrong
    with pytest.raises(TypeError, match=f"^{option}:"):
        hfvit.push(**{"folder": tmp_path, "repo_id": "user/name", **wrong})


def test_push_of_an_unknown_export_names_the_known_ones(tmp_path):
    with pytest.raises(PushArgumentError, match=r"^include:") as caught:
        hfvit.push(tmp_path, "user/name", include=["onx"])
    assert_names(caught.value, "'onx'", "onnx", "tensorrt")


def test_soup_or_extension_that_a_run_has_replaced_is_not_pushed(out):
    soup_record().save(out)
    extension_record("new").save(out)
    assert {file.path for file in files_to_push(out, "user/x")} == PUSHED


def test_classes_of_an_export_are_compared_by_their_index(tmp_path):
    """Other programs sort the indices as text."""
    names = {str(index): f"class {index}" for index in range(12)}
    (tmp_path / "onnx").mkdir()
    for name in ("model.safetensors", "onnx/model.onnx"):
        (tmp_path / name).touch()
    (tmp_path / "config.json").write_text(json.dumps({"id2label": names}, sort_keys=True))
    (tmp_path / "onnx" / "config.json").write_text(json.dumps({"id2label": names}))
    assert "onnx/model.onnx" in {file.path for file in files_to_push(tmp_path, "user/x", ("onnx",))}
    changed = {**names, "10": names["2"], "2": names["10"]}
    (tmp_path / "onnx" / "config.json").write_text(json.dumps({"id2label": changed}))
    with pytest.raises(PushArgumentError, match=r"^--include onnx:"):
        files_to_push(tmp_path, "user/x", ("onnx",))
