"""Commands, Python and links of README.md and docs/: run or parsed."""

import argparse
import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import ROOT, run_command
from helpers.images import colored_image
from helpers.layouts import image_bytes, write_images, write_shard
from helpers.loopback_hub import LoopbackHub

from hfvit.cli import build_parser
from hfvit.cli import main as hfvit_command
from hfvit.cli.export_executorch import main as export_executorch
from hfvit.cli.export_onnx import main as export_onnx
from hfvit.cli.export_openvino import main as export_openvino
from hfvit.cli.export_tensorrt import add_arguments, export_tensorrt_command
from hfvit.data.factory import load_splits
from hfvit.data.starting_recipe import find_and_load
from hfvit.errors import run
from hfvit.recipe.arguments import MULTI_LABEL, DataArguments
from hfvit.recipe.loader import load_recipe
from hfvit.trt.api import load_backend

README = (ROOT / "README.md").read_text()
TEXT = "\n".join([README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))])
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, flags=re.DOTALL)
BASH = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
COMMANDS = list(dict.fromkeys(line.split("  #")[0].strip() for line in BASH))  # each once
for library in ("openvino", "executorch"):
    if find_spec(library) is None:
        COMMANDS = [command for command in COMMANDS if library not in command]
PYTHON = [block for kind, block in BLOCKS if kind == "python"]

# These would install into the environment that runs the tests, ask for a token, or need a browser, server or Docker.
OF_OTHERS = ("curl ", "docker ", "pip install ", "npm install ", "hf ", "python -m http.server ", "tensorboard ")
EXPORTS = [c for c in COMMANDS if c.startswith("optimum-cli")]
CHECKS = [c for c in COMMANDS if c.startswith("hfvit verify ") or "--estimate" in c]
DATA_SETS = ("path/to/folder", "photos", "photos/labels.csv", "shards")  # in place of a recipe
ON_DATA_SETS = [
    c for c in COMMANDS if c.startswith(("hfvit inspect ", *(f"hfvit train {name}" for name in DATA_SETS)))
]
TRAINING = [
    c for c in COMMANDS if ("hfvit train " in c or "hfvit/train.py" in c) and c not in (*CHECKS, *ON_DATA_SETS)
]
SOUPS = [c for c in COMMANDS if c.startswith("hfvit soup ")]  # evaluation/test_soup.py runs one
SWEEPS = [c for c in COMMANDS if c.startswith("hfvit sweep ")]  # test_sweep.py runs one
SCRIPTS = [c for c in COMMANDS if c.startswith("python examples/")]
LISTINGS = ("hfvit recipes", "hfvit doctor")
PUSHES = [c for c in COMMANDS if c.startswith("hfvit push ")]

SERVING = [
    c
    for c in COMMANDS
    if c.startswith(tuple(f"hfvit {name} " for name in ("predict", "validate", "report", "embed", "extend")))
]
DEMOS = [c for c in COMMANDS if c.startswith("hfvit demo ")]
SERVERS = [c for c in COMMANDS if c.startswith("hfvit serve ")]  # serve/ runs them


def recipe_and_options(command: str) -> list[str]:
    words = shlex.split(command)
    options = words[words.index("hfvit/train.py" if "hfvit/train.py" in words else "train") + 1 :]
    return [word for word in options if word != "--find_lr"]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The folder that the README's first command leaves, cut short."""
    out = tmp_path_factory.mktemp("readme") / "quickstart"
    words = shlex.split(next(command for command in TRAINING if command.endswith("recipes/quickstart.yaml")))
    blocks = '{"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}'  # one block exports fast
    result = run_command(*words, "--max_steps", "3", "--output_dir", out, "--model_args", blocks, "--plots", "false")
    assert result.returncode == 0, result.stderr
    return out


def test_every_command_is_known_to_this_test():
    listings = {c for c in COMMANDS if c.startswith(LISTINGS)}
    run_here = {
        *listings, *TRAINING, *SOUPS, *SWEEPS, *EXPORTS, *SERVING, *PUSHES, *CHECKS, *DEMOS, *SERVERS, *SCRIPTS,
        *ON_DATA_SETS,
    }  # fmt: skip
    assert run_here
    assert not [c for c in COMMANDS if c not in run_here and not c.startswith(OF_OTHERS)]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(LISTINGS) or "--help" in c])
def test_commands_that_only_print(command):
    result = run_command(*shlex.split(command.split(">")[0]), PYTHONPATH=str(ROOT))
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) > 3


@pytest.mark.parametrize("command", SCRIPTS)
def test_scripts_write_a_table_that_loads(command, tmp_path):
    *words, folder = shlex.split(command)
    result = run_command(*words, tmp_path / folder, "--train", 40, "--test", 10)
    assert result.returncode == 0
    splits = load_splits(DataArguments(result.stdout.strip(), problem_type=MULTI_LABEL))
    assert len(splits.train) + len(splits.validation) == 40
    assert len(splits.test) == 10


@pytest.mark.parametrize("command", [c for c in TRAINING if "--help" not in c])
def test_training_commands_parse(command):
    load_recipe([*recipe_and_options(command), "--use_cpu", "true"])


def test_commands_on_data_sets_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "path/to/folder"):
        write_images(
            tmp_path / folder, {f"{split}/{label}": 8 for split in ("train", "val") for label in ("cat", "dog")}
        )
    rows = [f"train/{label}/{number}.png,{label}" for label in ("cat", "dog") for number in range(8)]
    (tmp_path / "photos/labels.csv").write_text("\n".join(["image,label", *rows]))
    write_shard(tmp_path / "shards/train-0.tar", [{"png": image_bytes(n), "cls": b"%d" % (n % 2)} for n in range(20)])
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    assert ON_DATA_SETS
    for command in ON_DATA_SETS:
        words = shlex.split(command)[1:]
        if words[0] == "train":
            assert find_and_load([*words[1:], "--from_scratch"]).data.dataset_name == words[1]
            continue
        with pytest.raises(SystemExit) as stop:
            hfvit_command(words)
        assert not stop.value.code, (command, capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.integration
def test_the_command_for_two_processes_runs(tmp_path):
    words = shlex.split(next(command for command in TRAINING if "multi_cpu.yaml" in command))
    words[words.index("--output_dir") + 1] = str(tmp_path / "two")
    words.insert(words.index("hfvit/train.py"), "--main_process_port=0")
    result = run_command(*words, "--max_steps", "2")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "two" / "run.json").read_text())["training"]["processes"] == 2


def export(words: list[str]) -> int:
    """An export command in this process (test_export_command.py launches optimum-cli), without the gate."""
    commands = {"onnx": export_onnx, "openvino": export_openvino, "executorch": export_executorch}
    if words[2] in commands:
        with pytest.raises(SystemExit) as stop:
            commands[words[2]]([*words[3:], "--no_gate"])
        return stop.value.code
    if isinstance(load_backend("tensorrt_rtx"), str):
        return 0  # test_tensorrt.py says why it is skipped
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(lambda: export_tensorrt_command(parser.parse_args([*words[3:], "--no_gate"])))


@pytest.fixture(scope="module")
def exported(quickstart):
    """The quickstart's folder with all that the README exports from it; three steps are no model to judge."""
    for command in EXPORTS:
        words = shlex.split(command.replace("outputs/quickstart", str(quickstart)))
        if "--help" not in words:
            assert export(words) == 0
    return quickstart


@pytest.mark.integration
def test_export_commands_leave_files(exported):
    folders = {shlex.split(command)[-1] for command in EXPORTS if " onnx " in command and "--help" not in command}
    assert folders
    for folder in folders:
        assert list((exported / folder.removeprefix("outputs/quickstart/")).glob("*.onnx")), folder


@pytest.mark.integration
@pytest.mark.tensorrt
@pytest.mark.skipif(isinstance(load_backend("tensorrt_rtx"), str), reason="tensorrt_rtx cannot be imported")
def test_tensorrt_commands_leave_engines(exported):
    engines = {path.parent.name: json.loads(path.read_text())["dtype"] for path in exported.glob("*/engine.json")}
    assert engines == {"tensorrt": "fp16", "tensorrt_int8": "int8"}


@pytest.mark.integration
def test_python_examples_run(exported, tmp_path, monkeypatch):
    for name in ("digit.png", "a.png", "b.png"):
        colored_image(0, np.random.default_rng(0)).save(tmp_path / name)
    (tmp_path / "outputs").symlink_to(exported.parent)
    monkeypatch.chdir(tmp_path)
    assert PYTHON
    for code in PYTHON:
        exec(compile(code, "README.md", "exec"), {"pixel_values": torch.zeros(1, 3, 64, 64)})


@pytest.mark.integration
def test_serving_commands_run(exported, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    names = ("digit.png", "new.jpg", "photos/a.png", "photos/more/b.png", "new_classes/x/a.png", "new_classes/x/b.png")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        colored_image(0, rng).save(tmp_path / name)
    (tmp_path / "outputs").mkdir()
    for folder in (*exported.parent.iterdir(), tmp_path / "outputs" / "photos"):
        (tmp_path / "outputs" / folder.name).symlink_to(exported if folder.name == "photos" else folder)
    monkeypatch.chdir(tmp_path)
    facts = json.loads((exported / "run.json").read_text())
    split = {"loss": 1.0, "ece": 0.1, "calibration": facts["metrics"]["test"]["calibration"]}
    # Three steps are no model that a temperature fits.
    facts["temperature"] |= {"value": 1.5, "splits": dict.fromkeys(facts["metrics"], split)}
    (exported / "run.json").write_text(json.dumps(facts))
    for command in SERVING:
        words, _, target = command.partition(" > ")
        with pytest.raises(SystemExit) as stop:
            hfvit_command(shlex.split(words)[1:])
        printed = capsys.readouterr()
        assert stop.value.code == 0, (command, printed.err)
        if target:
            (tmp_path / target).write_text(printed.out)
    assert (tmp_path / "grid.png").stat().st_size > 0
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "gate.json").read_text())["passed"]


@pytest.mark.integration
def test_checking_commands_run(quickstart, tmp_path, monkeypatch, capsys):
    (tmp_path / "outputs").symlink_to(quickstart.parent)
    monkeypatch.chdir(tmp_path)
    assert CHECKS
    for command in CHECKS:
        with pytest.raises(SystemExit) as stop:
            hfvit_command(shlex.split(command)[1:])
        assert not stop.value.code, (command, capsys.readouterr().err)


@pytest.mark.integration
def test_demo_commands_run_or_parse(exported, tmp_path, monkeypatch, capsys):
    """test_demo_app.py serves an app, test_clients.py looks at pages with npm's files in them."""
    (tmp_path / "outputs").symlink_to(exported.parent)
    monkeypatch.chdir(tmp_path)
    for command in DEMOS:
        words = shlex.split(command)[1:]
        assert build_parser().parse_args(words).artifact
        if "--static" in words and "--vendor" not in words:
            with pytest.raises(SystemExit) as stop:
                hfvit_command(words)
            assert stop.value.code == 0, (command, capsys.readouterr().err)
    assert (tmp_path / "page" / "index.html").exists()


@pytest.mark.parametrize("command", SERVERS)
def test_serve_commands_parse(command):
    assert build_parser().parse_args(shlex.split(command)[1:]).artifact


@pytest.mark.integration
def test_push_commands_run(exported, tmp_path, monkeypatch, capsys):
    (tmp_path / "outputs").symlink_to(exported.parent)
    monkeypatch.chdir(tmp_path)
    with LoopbackHub() as hub:
        hub.take_over(monkeypatch, tmp_path / "cache")
        for command in PUSHES:
            with pytest.raises(SystemExit) as stop:
                hfvit_command(shlex.split(command)[1:])
            assert stop.value.code == 0, (command, capsys.readouterr().err)
        repository = hub.model("user/digits")
    assert repository.private
    assert len(repository.messages) > 1
    assert "model.safetensors" in repository.files()


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "benchmarks" / "README.md", ROOT / "recipes" / "README.md"]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of `page`."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_resolve(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", page.read_text()):
        if target.startswith("http"):
            continue
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}#{anchor}"
