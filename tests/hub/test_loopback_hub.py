"""The loopback Hub of the tests works with huggingface_hub's client."""

from urllib.request import Request, urlopen

import pytest
from helpers.loopback_hub import LoopbackHub
from helpers.loopback_store import READ, STRANGER, WRITE
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as running:
        yield running


@pytest.fixture
def api(hub, monkeypatch, tmp_path):
    hub.take_over(monkeypatch, tmp_path)

    def make(token=WRITE):
        return HfApi(endpoint=hub.url, token=token)

    return make


WEIGHTS = bytes(range(256)) * 4000


def commit(api, repo_id, **kwargs):
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS}
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(repo_id, operations, commit_message="m", **kwargs)


def test_commit_can_be_read_back(hub, api, tmp_path):
    client = api()
    assert client.create_repo("user/a").repo_id == "user/a"
    client.create_repo("user/a", exist_ok=True)
    oid = commit(client, "user/a").oid
    assert hub.model("user/a").files()["model.safetensors"] == WEIGHTS
    folder = snapshot_download("user/a", endpoint=hub.url, cache_dir=tmp_path / "cache")
    assert (tmp_path / "cache" / "models--user--a" / "snapshots" / oid / "model.safetensors").read_bytes() == WEIGHTS
    assert folder.endswith(oid)
    request = Request(f"{hub.url}/user/a/resolve/main/model.safetensors", headers={"Range": "bytes=10-13"})
    with urlopen(request) as answer:
        assert (answer.status, answer.read()) == (206, WEIGHTS[10:14])
    assert [(entry.path, entry.size) for entry in client.list_repo_tree("user/a", recursive=True)] == [
        (".gitattributes", 0), ("config.json", 2), ("model.safetensors", len(WEIGHTS)),
    ]  # fmt: skip


def test_unchanged_files_create_no_commit(hub, api):
    client = api()
    client.create_repo("user/b")
    first, before = commit(client, "user/b").oid, len(hub.requests)
    assert commit(client, "user/b").oid == first
    assert not [path for method, path in hub.requests[before:] if method == "PUT" or "/commit/" in path]


def test_branches_tags_and_pull_requests(hub, api):
    client = api()
    client.create_repo("user/c")
    client.create_branch("user/c", branch="next")
    commit(client, "user/c", revision="next")
    client.create_tag("user/c", tag="v1", revision="next")
    request = commit(client, "user/c", create_pr=True)
    files = {ref: set(hub.model("user/c").files(ref)) for ref in ("main", "next", "v1", "refs/pr/1")}
    assert files["main"] == {".gitattributes"}
    assert files["next"] == files["v1"] == files["refs/pr/1"] > files["main"]
    assert request.pr_url == f"{hub.url}/user/c/discussions/1"
    with pytest.raises(RevisionNotFoundError):
        client.model_info("user/c", revision="no")


def test_permissions_of_tokens(hub, api):
    hub.create("user/secret", private=True)
    hub.create("user/gated", gated=True, files={"config.json": b"{}"})
    with pytest.raises(RepositoryNotFoundError):
        api(STRANGER).model_info("user/secret")
    with pytest.raises(GatedRepoError):
        hf_hub_download("user/gated", "config.json", endpoint=hub.url, token=STRANGER)
    with pytest.raises(RepositoryNotFoundError):
        api().model_info("user/none")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("user/gated", "other.json", endpoint=hub.url, token=WRITE)
    for token in (READ, STRANGER):
        with pytest.raises(HfHubHTTPError, match="403"):
            commit(api(token), "user/secret")
    assert api(READ).model_info("user/secret").private


def test_temporary_failure_is_retried_and_permanent_failure_changes_nothing(hub, api):
    client = api()
    client.create_repo("user/d")
    with hub.fault("POST", "preupload", 500) as failure, hub.fault("PUT", "^lfs/", None) as cut:
        hub.objects.clear()
        commit(client, "user/d")
        assert failure.times == cut.times == 0
    assert hub.model("user/d").files()["model.safetensors"] == WEIGHTS
    client.create_repo("user/e")
    hub.objects.clear()
    with hub.fault("PUT", "^lfs/", None, times=99), pytest.raises(RuntimeError, match=r"model\.safetensors"):
        commit(client, "user/e")
    assert set(hub.model("user/e").files()) == {".gitattributes"}
