"""A Hub on a free port of this machine that answers the real clients: huggingface_hub, transformers, timm, datasets.

    with LoopbackHub() as hub:
        run_command("hfvit", "push", folder, "user/name", **hub.environment(home))

Repositories live in memory. A commit is a mapping of paths to blobs; a branch, tag or pull request names a commit.
Faults are asked for: `hub.fail(...)` answers with an error, `hub.cut(...)` drops the connection, each so many times.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants as constants

WRITE, READ, STRANGER = "hf_write_of_user", "hf_read_of_user", "hf_write_of_another"
TOKENS = {WRITE: ("user", "write"), READ: ("user", "read"), STRANGER: ("another", "write")}
LFS_KINDS = (".safetensors", ".onnx", ".png", ".parquet", ".bin", ".engine")
ID = r"(?P<type>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"


@dataclass
class Blob:
    """A file's content; `oid` as git (regular) or git-lfs (sha256) names it, of the content it was made with."""

    content: bytes
    is_lfs: bool = False
    oid: str = field(init=False)

    def __post_init__(self):
        if self.is_lfs:
            self.oid = hashlib.sha256(self.content).hexdigest()
        else:
            self.oid = hashlib.sha1(f"blob {len(self.content)}\0".encode() + self.content).hexdigest()


@dataclass
class Repository:
    """Commits by oid, and the names that point at them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, Blob], message: str, ref: str = "main") -> str:
        text = "".join(f"{path}{blob.oid}" for path, blob in sorted(files.items())) + f"{len(self.commits)}{message}"
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid], self.refs[ref] = files, oid
        self.messages.append(message)
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> content at a branch, tag, pull request or commit."""
        return {path: blob.content for path, blob in self.commits[self.resolve(revision)].items()}

    def resolve(self, revision: str) -> str | None:
        oid = self.refs.get(revision, revision)
        return oid if oid in self.commits else None


@dataclass
class Fault:
    method: str
    pattern: re.Pattern
    status: int | None  # None cuts the connection
    times: int


class LoopbackHub:
    """Starts with the block and stops with it."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    def __enter__(self) -> "LoopbackHub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = WRITE) -> dict[str, str]:
        """What a client process needs to take this for the Hub; `home` is its cache."""
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": token or "", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_DATASETS_CACHE": str(home / "datasets"), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        }  # fmt: skip

    def take_over(self, monkeypatch, cache: Path, token: str | None = WRITE) -> None:
        """Make this the Hub of the running process, whose libraries read their settings when it was offline."""
        template = f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        values = {"ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
        values |= {"HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(cache), "HF_TOKEN_PATH": str(cache / "token")}
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", token or "")
        monkeypatch.setattr(time, "sleep", lambda _: None)  # between the clients' attempts

    def create(self, repo_id: str, kind: str = "model", files: dict[str, bytes] | None = None, **kwargs) -> Repository:
        """A repository made by somebody else, with one commit."""
        made = self.repositories[kind, repo_id] = Repository(**kwargs)
        blobs = {path: Blob(content, path.endswith(LFS_KINDS)) for path, content in (files or {}).items()}
        self.objects |= {blob.oid: blob.content for blob in blobs.values() if blob.is_lfs}
        made.commit({".gitattributes": Blob(b""), **blobs}, "initial commit")
        return made

    def model(self, repo_id: str) -> Repository:
        return self.repositories["model", repo_id]

    @contextmanager
    def fault(self, method: str, pattern: str, status: int | None, times: int = 1) -> Iterator[Fault]:
        """Answer the next `times` matching requests with `status`, or cut them in the middle where it is None."""
        wrong = Fault(method, re.compile(pattern), status, times)
        self.faults.append(wrong)
        yield wrong
        self.faults.remove(wrong)


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content: bytes | dict | list = b"", status: int = 200, **headers) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status: int, code: str | None = None, message: str = "") -> None:
        headers = {"X_Error_Code": code} if code else {}
        if message:
            headers["X_Error_Message"] = message
        self.answer({"error": message or code or str(status)}, status, **headers)

    def handle_any(self) -> None:
        split = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(split.query).items()}
        path = split.path.lstrip("/")
        self.hub.requests.append((self.command, unquote(path)))
        length = int(self.headers.get("Content-Length") or 0)
        for wrong in self.hub.faults:
            if wrong.times and wrong.method == self.command and wrong.pattern.search(unquote(path)):
                wrong.times -= 1
                if wrong.status is None:
                    self.rfile.read(length // 2)
                    self.close_connection = True
                    self.connection.close()
                    return
                self.rfile.read(length)
                return self.error(wrong.status)
        self.body = self.rfile.read(length) if length else self._chunks()
        with self.hub.lock:
            for method, pattern, action in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split():
                    values = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    return action(self, **values)
        self.error(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def _chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    # Who asks, and for what

    def user(self) -> tuple[str, str] | None:
        return TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def may_write(self, repo_id: str) -> bool:
        """Whether the token may change `repo_id`, or propose a change to it; answers where it may not."""
        user = self.user()
        if user is None:
            self.error(401, message="Invalid username or password.")
        elif self.query.get("create_pr") == "1" and user[1] == "write":
            return True
        elif user != (repo_id.split("/")[0], "write"):
            self.error(403, message="you must use a write token of the owner")
        else:
            return True
        return False

    def repository(self, kind: str, repo_id: str) -> Repository | None:
        """The repository, if it is there for whoever asks; answers where it is not."""
        found = self.hub.repositories.get((kind, repo_id))
        owner = self.user() is not None and self.user()[0] == repo_id.split("/")[0]
        if found is None or (found.private and not owner):
            self.error(404 if self.user() else 401, "RepoNotFound")
        elif found.gated and not owner:
            self.error(403 if self.user() else 401, "GatedRepo")
        else:
            return found
        return None

    def at(self, kind: str, repo_id: str, revision: str) -> tuple[Repository, str] | None:
        found = self.repository(kind, repo_id)
        oid = found and found.resolve(revision)
        if found and oid is None:
            self.error(404, "RevisionNotFound")
        return (found, oid) if found and oid else None

    # Accounts and repositories

    def whoami(self) -> None:
        if self.user() is None:
            return self.error(401, message="Invalid username or password.")
        name, role = self.user()
        self.answer(
            {"type": "user", "name": name, "orgs": [], "auth": {"type": "access_token", "accessToken": {"role": role}}}
        )

    def create(self) -> None:
        values = json.loads(self.body)
        user = self.user()
        repo_id = f"{values.get('organization') or (user or ('nobody',))[0]}/{values['name']}"
        if not self.may_write(repo_id):
            return
        kind = values.get("type", "model")
        prefix = "" if kind == "model" else f"{kind}s/"
        address = {"url": f"{self.hub.url}/{prefix}{repo_id}", "name": repo_id, "id": repo_id}
        if (kind, repo_id) in self.hub.repositories:
            return self.answer(address, 409)
        self.hub.create(repo_id, kind, private=values.get("visibility") == "private" or bool(values.get("private")))
        self.answer(address)

    def validate_yaml(self) -> None:
        self.answer({"errors": [], "warnings": []})

    def info(self, type: str, id: str, revision: str = "main") -> None:
        if (place := self.at(type[:-1], id, revision)) is None:
            return
        found, oid = place
        self.answer({
            "id": id, "modelId": id, "author": id.split("/")[0], "sha": oid, "private": found.private,
            "gated": "auto" if found.gated else False, "disabled": False, "downloads": 0, "likes": 0, "tags": [],
            "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": path} for path in sorted(found.commits[oid])],
        })  # fmt: skip

    def refs(self, type: str, id: str) -> None:
        if found := self.repository(type[:-1], id):
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
                for name, oid in found.refs.items()
                if not name.startswith("refs/")
            ]
            self.answer({"branches": branches, "tags": [], "converts": [], "pullRequests": []})

    def new_ref(self, type: str, id: str, name: str, revision: str = "main") -> None:
        """A branch, or a tag at `revision`."""
        if not self.may_write(id):
            return
        wanted = json.loads(self.body or b"{}")
        place = self.at(type[:-1], id, wanted.get("startingPoint") or revision)
        if place is None:
            return
        name = wanted.get("tag") or name
        if name in place[0].refs:
            return self.error(409, message=f"{name} exists")
        place[0].refs[name] = place[1]
        self.answer({})

    # Reading

    def tree(self, type: str, id: str, revision: str, path: str = "") -> None:
        if (place := self.at(type[:-1], id, revision)) is None:
            return
        entries = _entries(place[0].commits[place[1]])
        below = [entry for entry in entries if not path or entry["path"].startswith(f"{path}/")]
        if path and not below:
            return self.error(404, "EntryNotFound")
        if self.query.get("recursive", "").lower() not in ("true", "1"):
            depth = path.count("/") + 1 if path else 0
            below = [entry for entry in below if entry["path"].count("/") == depth]
        self.answer(below)

    def paths_info(self, type: str, id: str, revision: str) -> None:
        if (place := self.at(type[:-1], id, revision)) is None:
            return
        try:
            wanted = json.loads(self.body)["paths"]
        except ValueError:
            wanted = parse_qs(self.body.decode())["paths"]
        wanted = [wanted] if isinstance(wanted, str) else wanted
        self.answer([entry for entry in _entries(place[0].commits[place[1]]) if entry["path"] in wanted])

    def resolve(self, id: str, revision: str, path: str, type: str = "models/") -> None:
        if (place := self.at(type.strip("/")[:-1], id, revision)) is None:
            return
        blob = place[0].commits[place[1]].get(path)
        if blob is None:
            return self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=place[1])
        headers = {"ETag": f'"{blob.oid}"', "X_Repo_Commit": place[1], "Accept_Ranges": "bytes"}
        if blob.is_lfs:
            headers |= {"X_Linked_Etag": f'"{blob.oid}"', "X_Linked_Size": len(blob.content)}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            return self.answer(blob.content, **headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(blob.content)), len(blob.content) - 1)
        headers["Content_Range"] = f"bytes {first}-{last}/{len(blob.content)}"
        self.answer(blob.content[first : last + 1], 206, **headers)

    # Writing

    def preupload(self, type: str, id: str, revision: str) -> None:
        if not self.may_write(id) or (place := self.at(type[:-1], id, revision)) is None:
            return
        held = place[0].commits[place[1]]
        self.answer({
            "files": [
                {
                    "path": file["path"], "shouldIgnore": False,
                    "uploadMode": "lfs" if file["path"].endswith(LFS_KINDS) else "regular",
                    "oid": held[file["path"]].oid if file["path"] in held else None,
                }
                for file in json.loads(self.body)["files"]
            ]
        })  # fmt: skip

    def lfs_batch(self, id: str, type: str = "models/") -> None:
        if self.user() is None or self.user()[1] != "write":  # also for a pull request on another's repository
            return self.error(403, message="you must use a write token")
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}
            objects.append({**wanted, **({} if wanted["oid"] in self.hub.objects else upload)})
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.error(400, message="not the object that was announced")
        self.hub.objects[oid] = self.body
        self.answer()

    def commit(self, type: str, id: str, revision: str) -> None:
        if not self.may_write(id) or (place := self.at(type[:-1], id, revision)) is None:
            return
        found, parent = place
        files, message = dict(found.commits[parent]), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            kind, value = item["key"], item["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.error(400, message=f"{value['path']} was never uploaded")
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], True)
            elif kind == "deletedFile":
                del files[value["path"]]
        answer = {}
        ref = revision
        if self.query.get("create_pr") == "1":
            number = 1 + sum(name.startswith("refs/pr/") for name in found.refs)
            ref, answer["pullRequestUrl"] = f"refs/pr/{number}", f"{self.hub.url}/{id}/discussions/{number}"
        oid = found.commit(files, message, ref)
        self.answer({**answer, "commitOid": oid, "commitUrl": f"{self.hub.url}/{id}/commit/{oid}", "success": True})


def _entries(files: dict[str, Blob]) -> list[dict]:
    """A recursive tree: directories too."""
    entries = []
    for path, blob in files.items():
        lfs = {"lfs": {"oid": blob.oid, "size": len(blob.content), "pointerSize": 134}} if blob.is_lfs else {}
        entries.append({"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid[:40], **lfs})
    folders = {str(parent) for path in files for parent in Path(path).parents} - {"."}
    entries += [{"type": "directory", "path": folder, "size": 0, "oid": "0" * 40} for folder in folders]
    return sorted(entries, key=lambda entry: entry["path"])


REPO = r"(?P<type>datasets/|spaces/)?(?P<id>[^/]+/[^/]+)"
ROUTES = [
    ("GET", r"api/whoami-v2", _Handler.whoami),
    ("POST", r"api/repos/create", _Handler.create),
    ("POST", r"api/validate-yaml", _Handler.validate_yaml),
    ("GET", rf"api/{ID}", _Handler.info),
    ("GET", rf"api/{ID}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", rf"api/{ID}/refs", _Handler.refs),
    ("POST", rf"api/{ID}/branch/(?P<name>[^/]+)", _Handler.new_ref),
    ("POST", rf"api/{ID}/tag/(?P<revision>[^/]+)(?P<name>)", _Handler.new_ref),
    ("GET", rf"api/{ID}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", _Handler.tree),
    ("POST", rf"api/{ID}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("POST", rf"api/{ID}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"api/{ID}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", rf"{REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("GET HEAD", rf"{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
