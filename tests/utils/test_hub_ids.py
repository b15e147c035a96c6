"""Distinguish folders and Hub ids without network access."""

import socket
from pathlib import Path

import pytest
from helpers.messages import assert_names

from hfvit.errors import DataError, ModelError
from hfvit.utils.hub_ids import folder_or_hub_id


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Use a working directory with outputs/flowers; connections are errors."""

    def refuse(*_):
        raise AssertionError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "flowers").mkdir(parents=True)
    (tmp_path / "outputs" / "file").touch()
    return tmp_path


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "outputs/something-else", "digits"])
def test_folder_or_hub_id_keeps_a_hub_id(folder, name):
    assert folder_or_hub_id(name, ModelError) == name


def test_folder_or_hub_id_expands_a_folder(folder, monkeypatch):
    assert folder_or_hub_id("outputs/flowers", ModelError) == "outputs/flowers"
    monkeypatch.setenv("HOME", str(folder))
    assert folder_or_hub_id("~/outputs", ModelError) == str(folder / "outputs")


@pytest.mark.parametrize("name", ["outputs/flower", "./missing", "a/b/c", Path("missing"), "outputs/file"])
def test_folder_or_hub_id_of_missing_folder_raises(folder, name):
    with pytest.raises(DataError, match=r"^dataset_name: "):
        folder_or_hub_id(name, DataError, "dataset_name")


@pytest.mark.parametrize("revision", ["main", "refs/pr/1", "v1.0"])
def test_folder_or_hub_id_with_a_revision_names_both(folder, revision):
    with pytest.raises(ModelError, match=r"^model_name_or_path: ") as caught:
        folder_or_hub_id(f"user/flowers@{revision}", ModelError, "model_name_or_path")
    assert_names(caught.value, "user/flowers", revision)


def test_folder_or_hub_id_of_typo_suggests_the_folder(folder):
    with pytest.raises(ModelError, match="Did you mean 'outputs/flowers'"):
        folder_or_hub_id("outputs/flower", ModelError)
