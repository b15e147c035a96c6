"""Atomic writes, digests and writability checks."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfvit.errors import HFViTError, ModelError
from hfvit.utils.files import (
    check_writable,
    file_sha256,
    json_text,
    output_file,
    read_object,
    removing_empty_folders,
    sweep_temporary,
    temporary_file,
    write_text,
)


def test_temporary_file_syncs_file_rename_folder_in_order(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd)))
    monkeypatch.setattr(Path, "replace", lambda old, new: (done.append("rename"), replace(old, new)))
    with temporary_file(tmp_path / "run.json") as temporary:
        temporary.write_text("{}")
    assert done == [str(temporary), "rename", str(tmp_path)]
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_temporary_file_error_keeps_the_old_content(tmp_path):
    path = tmp_path / "run.json"
    write_text(path, "old")

    def write_and_fail():
        with temporary_file(path) as temporary:
            temporary.write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_temporary_file_names_of_two_writers_differ_and_are_swept(tmp_path):
    path = tmp_path / "run.json"
    with temporary_file(path) as first, temporary_file(path) as second:
        assert first != second
        for file in (first, second):
            file.write_text("{}")
        sweep_temporary(path)
        assert not list(tmp_path.iterdir())
        for file in (first, second):
            file.write_text("{}")


def test_file_sha256_equals_hashlib(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_check_writable_creates_the_folder_and_rejects_a_file(tmp_path):
    check_writable(tmp_path / "a" / "b", "output")
    assert not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ModelError, match=r"^output: "):
            check_writable(place, "output", ModelError)


def test_output_file_in_missing_folder_raises(tmp_path):
    assert output_file(None, "--output") is None
    assert output_file(tmp_path / "result.json", "--output") == tmp_path / "result.json"
    for place in (tmp_path, tmp_path / "missing" / "result.json"):
        with pytest.raises(HFViTError, match=r"^--output: "):
            output_file(place, "--output")


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(st.recursive(PLAIN, lambda item: st.lists(item) | st.dictionaries(st.text(), item), max_leaves=30))
def test_json_text_stands_for_the_same_value(content):
    assert json.loads(json_text(content)) == content


def test_json_text_has_a_row_of_plain_values_on_one_line():
    rows = [{"label": "a", "images": 3}, {"label": "b", "images": 4}]
    lines = json_text({"rows": rows, "counts": [1, 2, 3], "empty": [], "nested": [[1], [2]]}).splitlines()
    assert '    {"label": "a", "images": 3},' in [line.rstrip(",") + "," for line in lines]
    assert '  "counts": [1,2,3],' in lines
    assert len(lines) == 12


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [lambda v: {"a": v}, lambda v: [v], lambda v: [{"a": v}]])
def test_json_text_refuses_what_json_does_not_have(value, place):
    with pytest.raises(ValueError, match="JSON compliant"):
        json_text(place(value))


def test_an_object_that_is_nested_too_deeply_is_refused(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"a":' * 90_000)
    with pytest.raises(ModelError, match="nested too deeply"):
        read_object(path)


def test_removing_empty_folders_keeps_files_and_folders_that_were_there(tmp_path):
    def fail(name, file=None):
        with removing_empty_folders(tmp_path / name):
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            if file:
                (tmp_path / file).touch()
            raise KeyboardInterrupt

    (tmp_path / "there").mkdir()
    for names in (("new/below",), ("there",), ("there/new",), ("full/below", "full/file")):
        with pytest.raises(KeyboardInterrupt):
            fail(*names)
    with removing_empty_folders(tmp_path / "done"):
        (tmp_path / "done").mkdir()
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left == {"there", "full", "full/file", "done"}
