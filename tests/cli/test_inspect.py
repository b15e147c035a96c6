"""`hfvit inspect` as a user runs it."""

import json

import pytest
from helpers.layouts import write_images

from hfvit.cli import main
from hfvit.data.inspection import Inspection


def hfvit(*words) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


def test_inspect_prints_one_json_object(tmp_path, capsys):
    root = write_images(tmp_path / "set", {"cat": 20, "dog": 20})
    assert hfvit("inspect", root, "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    found = Inspection.from_json(json.loads(lines[0]))
    assert found.labels == ["cat", "dog"]
    assert found.recipe["dataset_name"] == str(root)


def test_inspect_ends_with_the_next_command(tmp_path, capsys):
    root = write_images(tmp_path / "my photos", {"cat": 20, "dog": 20})
    assert hfvit("inspect", root) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"hfvit train '{root}'")


def test_inspect_with_unreadable_images_exits_with_1(tmp_path, capsys):
    root = write_images(tmp_path / "set", {"cat": 20, "dog": 20})
    (root / "cat/0.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    assert hfvit("inspect", root, "--html", tmp_path / "page.html") == 1
    assert "cat/0.png" in capsys.readouterr().out
    assert (tmp_path / "page.html").is_file()


@pytest.mark.parametrize(
    "words", [["none"], ["{}", "--label_column", "x"], ["{}", "--run", "none"], ["{}", "--html", "{}/a/b.html"]]
)
def test_inspect_with_unusable_data_exits_with_2(tmp_path, capsys, words, monkeypatch):
    root = write_images(tmp_path / "set", {"cat": 20, "dog": 20})
    monkeypatch.chdir(tmp_path)
    assert hfvit("inspect", *(word.format(root) for word in words)) == 2
    assert capsys.readouterr().out == ""


def test_inspect_of_a_table_shows_no_bars_of_datasets(tmp_path, capsys):
    root = write_images(tmp_path / "set", {"images": 40})
    rows = [f"images/{n}.png,{'cat' if n % 2 else 'dog'},{'test' if n > 30 else 'train'}" for n in range(40)]
    (root / "labels.csv").write_text("\n".join(["image,label,split", *rows]))
    assert hfvit("inspect", root / "labels.csv") == 0
    assert capsys.readouterr().err == ""
