"""Invalid input: each error names the option and the value, exits quickly and leaves files unchanged."""

import argparse
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from helpers.bad_rows import ROWS
from helpers.images import LABELS, colored_image
from helpers.messages import assert_names, option_of
from helpers.onnx_graphs import write_configs, write_graph
from helpers.recipes import MICRO_RECIPE

from hfvit.cli import main as hfvit_command
from hfvit.cli.export_onnx import main as export_onnx
from hfvit.cli.export_tensorrt import add_arguments, export_tensorrt_command
from hfvit.errors import run

SECONDS = 20  # mostly the first import of the libraries


@dataclass
class Place:
    """Working folder of a case, and the valid files that it may copy."""

    tmp: Path
    canary: Path
    colors: Path
    run: Path
    graphs: Path
    recipe: Path
    tuning: Path
    image: Path


@pytest.fixture(scope="module")
def good(tmp_path_factory, colors):
    """Create valid input: a run of the micro recipe, an export, recipes and an image."""
    folder = tmp_path_factory.mktemp("good")
    recipe, tuning, image = folder / "recipe.yaml", folder / "tuning.yaml", folder / "image.png"
    text = MICRO_RECIPE + f"dataset_name: {colors}\noutput_dir: {folder / 'run'}\nuse_cpu: true\nmax_steps: 2\n"
    recipe.write_text(text)
    lines = [line for line in text.splitlines() if not line.startswith(("architecture", "model_args"))]
    tuning.write_text("\n".join(lines))
    colored_image(0, np.random.default_rng(0)).save(image)
    write_graph(folder / "graphs" / "model.onnx")
    write_configs(folder / "graphs", LABELS)
    assert run_in_process(f"hfvit train {recipe}") == 0
    files = {"run": folder / "run", "graphs": folder / "graphs", "recipe": recipe, "tuning": tuning}
    return {**files, "image": image, "colors": colors}


def run_in_process(line: str) -> int:
    """Return the exit code of `hfvit ...`, or of `optimum-cli export onnx ...` or `tensorrt ...`."""
    program, *words = shlex.split(line)
    try:
        if program == "hfvit":
            hfvit_command(words)
        elif program == "onnx":
            export_onnx(words)
        else:
            parser = argparse.ArgumentParser(prog="optimum-cli export tensorrt")
            add_arguments(parser)
            options = parser.parse_args(words)
            return run(lambda: export_tensorrt_command(options))
    except SystemExit as stop:
        return stop.code or 0
    raise AssertionError(f"{line} did not exit")


def contents(folder: Path) -> dict:
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}


def test_valid_input_is_accepted(good, capsys):
    assert run_in_process(f"hfvit predict {good['run']} {good['image']}") == 0
    assert run_in_process(f"hfvit predict {good['graphs']} {good['image']}") == 0
    assert len(ROWS) >= 60


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ROWS)
def test_bad_input(name, good, tmp_path, monkeypatch, capsys):
    make, line, named, *code = ROWS[name]
    (tmp_path / "work").mkdir()
    place = Place(tmp=tmp_path / "work", canary=tmp_path / "canary", **good)
    monkeypatch.chdir(place.tmp)
    if make:
        make(place)
    before, held = contents(tmp_path), contents(good["run"].parent)
    words = line.format(**{key: str(value) for key, value in vars(place).items()})
    if program_trains(words) and "--output_dir" not in words and "recipe.yaml" not in line:
        words += f" --output_dir {place.tmp / 'out'}"
    start = time.monotonic()
    found = run_in_process(words)
    seconds = time.monotonic() - start
    error = capsys.readouterr().err
    assert_refuses(error, [item.format(**vars(place)) for item in ([named] if isinstance(named, str) else named)])
    assert found == (code[0] if code else 2), error
    assert "Traceback" not in error
    assert not place.canary.exists(), "code was run, or a file left its folder"
    assert contents(tmp_path).keys() - before.keys() <= left_by_training(place.tmp)
    assert contents(good["run"].parent) == held
    assert seconds < SECONDS


def assert_refuses(error: str, named: list[str]) -> None:
    """Assert the option of the message, marked by a colon in `named`, and the values that it names."""
    ours = [line for line in error.splitlines() if line.startswith("hfvit")]
    message = error.partition(" error: ")[2] if error.startswith("usage: ") else "\n".join(ours)
    for item in named:
        if item.endswith(":"):
            assert option_of(error) == item[:-1], error
        else:
            assert_names(message, item)


def program_trains(words: str) -> bool:
    return words.startswith("hfvit train ")


def left_by_training(folder: Path) -> set[Path]:
    """Return the files that a run may leave if it fails after loading the data."""
    return {folder / "out" / "plots" / "training_images.png"}
