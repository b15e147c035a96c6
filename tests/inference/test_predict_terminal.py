"""Hostile names of files and classes in the output of `hfvit predict`."""

import io
import json
import os
import re
import sys

import numpy as np
import pytest
from helpers.commands import run_command
from helpers.hostile_text import HOSTILE
from helpers.images import colored_image
from helpers.onnx_graphs import write_configs, write_graph
from PIL import Image

from hfvit.cli import main
from hfvit.errors import is_unprintable

ENCODINGS = ["utf-8", "latin-1", "ascii"]


@pytest.fixture
def model(tmp_path):
    """Write a graph with a class for each hostile name."""
    weights = np.zeros((3, len(HOSTILE)), np.float32)
    weights[np.arange(len(HOSTILE)) % 3, np.arange(len(HOSTILE))] = 1
    write_graph(tmp_path / "onnx" / "model.onnx", weights)
    return write_configs(tmp_path / "onnx", HOSTILE)


@pytest.fixture
def photos(tmp_path):
    """Write images with hostile names, an invalid one, and one whose name is not UTF-8."""
    folder = tmp_path / "photos"
    folder.mkdir()
    image = colored_image(0, np.random.default_rng(0))
    content = io.BytesIO()
    image.save(content, "PNG")
    for name in [name for name in HOSTILE if not set(name) & {"\0", "\ud800"}]:
        (folder / f"{name}.png").write_bytes(content.getvalue())
    (folder / "broken\x1b[2J\n.png").write_bytes(b"none")
    return folder


def command(encoding: str, monkeypatch, *words) -> tuple[int, str, str]:
    """Run `hfvit predict` on strict streams; returns exit code, stdout and stderr."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    with pytest.raises(SystemExit) as stop:
        main(["predict", *map(str, words)])
    for stream in streams:
        stream.flush()
    return stop.value.code, *(stream.buffer.getvalue().decode(encoding) for stream in streams)


def assert_no_control_characters(text: str) -> None:
    assert not [character for character in text if is_unprintable(character) and character != "\n"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_predict_text_of_hostile_names_has_a_line_each(encoding, model, photos, monkeypatch):
    code, out, err = command(encoding, monkeypatch, model, photos, "--top_k", len(HOSTILE))
    images = len(list(photos.iterdir())) - 1
    assert code == 1
    assert_no_control_characters(out)
    assert_no_control_characters(err)
    lines = out.splitlines()
    assert len(lines) == images * (1 + len(HOSTILE))
    assert len([line for line in lines if re.match(r" +\d", line)]) == images * len(HOSTILE)
    assert len(err.splitlines()) == 2
    assert r"broken\x1b[2J\n.png" in err
    assert r"\x1b]0;owned\x07\x1b[2Jcat" in out
    assert (r"\U0001f600" in out) == (encoding != "utf-8")
    assert ("été" in out) == (encoding != "ascii")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_predict_json_of_hostile_names_round_trips(encoding, model, photos, monkeypatch):
    code, out, err = command(encoding, monkeypatch, model, photos, "--top_k", len(HOSTILE), "--json")
    assert code == 1
    assert_no_control_characters(out)
    assert_no_control_characters(err)
    found = [json.loads(line) for line in out.splitlines()]
    assert {line["image"] for line in found} == {str(path) for path in photos.iterdir()}
    encodable = {name.encode("utf-8", "backslashreplace").decode() for name in HOSTILE}  # no lone surrogates
    for line in found:
        assert "error" in line or {entry["label"] for entry in line["predictions"]} == encodable


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_predict_grid_of_hostile_names_succeeds(kind, model, photos, tmp_path, monkeypatch):
    grid = tmp_path / f"grid\x1b[2J.{kind}"
    code, _, err = command("utf-8", monkeypatch, model, photos, "--save-grid", grid)
    assert code == 1
    assert grid.stat().st_size > 0
    assert_no_control_characters(err)
    if kind == "png":
        with Image.open(grid) as loaded:
            loaded.load()


@pytest.mark.parametrize(
    "word",
    [
        "x" * 300,
        "~nobody-of-this-name/a.png",
        "\x1b[2J*.png",
        "\udcff.png",
        "a\nb",
        "\u202e/gnp.a",
        "~nobody-of-this-name",
    ],
)
@pytest.mark.parametrize("place", ["image", "artifact", "grid", "option"])
def test_predict_of_wrong_names_prints_one_error(word, place, model, photos, monkeypatch):
    monkeypatch.delenv("HOME")
    words = {
        "image": [model, word],
        "artifact": [word, photos],
        "grid": [model, photos, "--save-grid", f"{word}/grid.png"],
        "option": [model, photos, f"--{word}"],
    }
    code, out, err = command("ascii", monkeypatch, *words[place])
    assert (code, out) == (2, "")
    assert_no_control_characters(err)
    if place != "option":  # argparse prints its usage too
        assert err.count("hfvit: error: ") == 1
    if place == "image" or (place != "option" and "\n" not in word):
        assert len(err.splitlines()) == 1


@pytest.mark.integration
@pytest.mark.parametrize(
    ("redirection", "code"),
    [
        pytest.param(">&-", 1, marks=pytest.mark.slow),
        pytest.param("2>&-", 1, marks=pytest.mark.slow),
        pytest.param(">&- 2>&-", 1, marks=pytest.mark.slow),
        pytest.param("<&- >&- 2>&-", 1, marks=pytest.mark.slow),
        ("> /dev/full", 7),
    ],
)
def test_predict_with_closed_or_full_stream_exits_with_code(redirection, code, model, photos):
    script = f'hfvit predict "$0" "$1" {redirection}'
    result = run_command("bash", "-c", script, model, photos, PYTHONIOENCODING="utf-8:strict")
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr
    assert result.returncode == code


@pytest.mark.integration
@pytest.mark.parametrize("locale", ["C", pytest.param("C.UTF-8", marks=pytest.mark.slow)])
def test_predict_of_non_utf_8_names_in_other_locales(locale, model, photos):
    script = 'hfvit predict "$0" "$1"/*.png'
    result = run_command("bash", "-c", script, model, photos, LC_ALL=locale, LANG=locale)
    assert result.returncode == 1
    assert_no_control_characters(result.stdout)
    assert "Traceback" not in result.stderr
    assert os.fsencode("\udcff") not in result.stdout.encode(errors="surrogateescape")
