"""Train a shipped recipe on a Hub data set, push, and load the result with stock libraries."""

import json
import sys

import datasets
import numpy as np
import pytest
import yaml
from helpers.commands import ROOT, command_environment, run_command
from helpers.forks import ForkServer
from helpers.images import colored_image
from helpers.loopback_hub import LoopbackHub
from helpers.loopback_store import WRITE
from helpers.runs import PUSHED
from huggingface_hub import ModelCard

import hfvit

SECRETS = {"WANDB_API_KEY": "planted-key-of-a-tracker", "HUGGING_FACE_HUB_TOKEN": "planted-token-of-the-hub"}


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as running:
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def run_online(hub, home):
    """Run commands as a user of this Hub, whose secrets are in the environment."""
    environment = command_environment(**hub.environment(home), **SECRETS)
    server = ForkServer(environment)
    yield lambda *words: server.run([str(word) for word in words], ROOT, environment, timeout=300)
    server.close()


STOCK = """
import gc, json, sys
gc.disable()  # imports are faster
sys.modules["hfvit"] = None  # an import of it fails
import numpy as np, timm, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
name, picture = sys.argv[1:]
image = Image.open(picture).convert("RGB")
processor = AutoImageProcessor.from_pretrained(name)
model = AutoModelForImageClassification.from_pretrained(name).eval()
with torch.inference_mode():
    logits = model(**processor(image, return_tensors="pt")).logits[0].tolist()
    backbone = timm.create_model(f"hf-hub:{name}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(backbone))
    theirs = backbone(transform(image)[None])[0].tolist()
best = pipeline("image-classification", model=name)(picture)[0]["label"]
print(json.dumps({"logits": logits, "timm": theirs, "best": best}))
"""


def cifar(rows: int, seed: int) -> datasets.Dataset:
    """Return a split in the format of CIFAR-10: columns `img` and `label`, ten classes."""
    rng = np.random.default_rng(seed)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    labels = [row % 10 for row in range(rows)]
    images = [colored_image(label % 3, rng, 32) for label in labels]
    return datasets.Dataset.from_dict({"img": images, "label": labels}, features=features)


@pytest.fixture(scope="module")
def published(hub, run_online, tmp_path_factory):
    """Two steps of the shipped CIFAR-10 recipe, with data from the Hub and pushed to the Hub."""
    folder = tmp_path_factory.mktemp("published")
    files = {}
    for split, rows in (("train", 640), ("test", 40)):
        file = folder / f"{split}.parquet"
        cifar(rows, rows).to_parquet(file)
        files[f"plain_text/{split}-00000-of-00001.parquet"] = file.read_bytes()
    card = "---\nconfigs:\n- config_name: plain_text\n  data_files:\n"
    card += "".join(f"  - split: {s}\n    path: plain_text/{s}-*\n" for s in ("train", "test"))
    files["README.md"] = f"{card}  default: true\n---\n".encode()
    hub.create("uoft-cs/cifar10", "dataset", files)
    words = ["hfvit", "train", "vit_tiny_cifar10", "--max_steps", "2", "--global_batch_size", "16"]
    words += ["--model_args", '{"patch_size": 4, "depth": 2}']  # two blocks export fast
    words += ["--output_dir", folder / "out"]
    words += ["--push_to_hub", "true", "--hub_model_id", "user/tiny", "--hub_private_repo", "true"]
    words += ["--hub_token", WRITE, "--keep_checkpoints", "true", "--report_to", "tensorboard"]
    words += ["--disable_tqdm", "true"]
    result = run_online(*words)
    assert result.returncode == 0, result.stderr
    return folder / "out", result


@pytest.mark.integration
def test_shipped_recipe_trains_on_hub_data_and_pushes(published, hub):
    out, result = published
    repository = hub.model("user/tiny")
    assert set(repository.files()) == PUSHED | {".gitattributes", ".eval_results/uoft-cs--cifar10.yaml"}
    assert repository.private
    assert repository.messages == ["initial commit", "Push with hfvit"]
    assert f"{hub.url}/user/tiny/commit/{repository.resolve('main')}" in result.stdout

    data = json.loads((out / "run.json").read_text())["data"]
    assert data["dataset_commit"] == hub.repositories["dataset", "uoft-cs/cifar10"].resolve("main")
    card = ModelCard(repository.files()["README.md"].decode())
    assert data["dataset_commit"] in card.text
    assert card.data.datasets == "uoft-cs/cifar10"
    assert "push_to_hub" not in (out / "recipe.yaml").read_text()
    assert yaml.safe_load((out / "recipe.yaml").read_text())["dataset_revision"] == data["dataset_commit"]
    (entry,) = yaml.safe_load(repository.files()[".eval_results/uoft-cs--cifar10.yaml"])
    assert entry["dataset"]["revision"] == data["dataset_commit"]


@pytest.mark.integration
def test_no_token_is_in_any_file_of_a_run_an_export_and_a_push_or_in_their_output(published, hub, home, run_online):
    out, trained = published
    exported = run_online("optimum-cli", "export", "onnx", "--model", out, out / "onnx")
    pushed = run_online("hfvit", "push", out, "user/exported", "--include", "onnx")
    assert (exported.returncode, pushed.returncode) == (0, 0), exported.stderr + pushed.stderr
    refused = run_online("hfvit", "push", out, f"https://user:{WRITE}@huggingface.co/user/x")
    assert refused.returncode == 2
    files = [path for folder in (out.parent, home) for path in folder.rglob("*") if path.is_file()]
    assert {"run.json", "recipe.yaml", "trainer_state.json", "checkpoint.json", "export.json"} <= {
        f.name for f in files
    }
    assert any(path.name.startswith("events.out.tfevents") for path in files)
    contents = {str(path): path.read_bytes() for path in files}
    for name in ("user/tiny", "user/exported"):
        contents |= {f"{name}: {path}": content for path, content in hub.model(name).files().items()}
    for result in (trained, exported, pushed, refused):
        contents |= {str(result.args): f"{result.stdout}{result.stderr}".encode()}
    secrets = [secret.encode() for secret in (WRITE, *SECRETS.values())]
    assert [name for name, content in contents.items() if any(secret in content for secret in secrets)] == []


@pytest.mark.integration
def test_stock_libraries_load_the_pushed_model_with_equal_predictions(published, hub, tmp_path):
    colored_image(1, np.random.default_rng(5), 50).resize((60, 50)).save(tmp_path / "picture.png")
    words = [sys.executable, "-c", STOCK, "user/tiny", tmp_path / "picture.png"]
    result = run_command(*words, new_process=True, **hub.environment(tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    stock = json.loads(result.stdout.splitlines()[-1])
    classifier = hfvit.load_classifier(published[0])
    expected = classifier.logits([tmp_path / "picture.png"])[0]
    assert stock["logits"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert stock["timm"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert stock["best"] == classifier.labels[expected.argmax()]
