"""Request handlers of the loopback Hub, and the table of its routes."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from helpers.loopback_store import TOKENS, Blob, Repository

LFS_KINDS = (".safetensors", ".onnx", ".png", ".parquet", ".bin", ".engine")
ID = r"(?P<type>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"


class Handler(BaseHTTPRequestHandler):
    hub = None  # set by LoopbackHub
    is_late = False  # whether the connection is closed instead of answering
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def cut(self) -> None:
        self.close_connection = True
        self.connection.close()

    def answer(self, content: bytes | dict | list = b"", status: int = 200, **headers) -> None:
        if self.is_late:
            return self.cut()
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
        for fault in self.hub.faults:
            if fault.hits(self.command, unquote(path), self.hub.requests):
                fault.times -= 1
                if fault.late:
                    self.is_late = True
                    break
                if fault.status is None:
                    self.rfile.read(length // 2)
                    return self.cut()
                self.rfile.read(length)
                return self.answer(fault.body, fault.status, **fault.headers)
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

    # Users and permissions

    def user(self) -> tuple[str, str] | None:
        return TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def may_write(self, repo_id: str) -> bool:
        """Return whether the token may write to `repo_id`; answer with an error if not."""
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
        """Return a repository that the user may read, or answer with an error."""
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
        """Create a branch, or a tag at `revision`."""
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
            return self.error(400, message="the content does not have this SHA-256")
        self.hub.objects[oid] = self.body
        self.answer()

    def commit(self, type: str, id: str, revision: str) -> None:
        if not self.may_write(id) or (place := self.at(type[:-1], id, revision)) is None:
            return
        found, parent = place
        files = dict(found.commits[parent])
        message = ""
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
    """List files and directories recursively."""
    entries = []
    for path, blob in files.items():
        lfs = {"lfs": {"oid": blob.oid, "size": len(blob.content), "pointerSize": 134}} if blob.is_lfs else {}
        entries.append({"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid[:40], **lfs})
    folders = {str(parent) for path in files for parent in Path(path).parents} - {"."}
    entries += [{"type": "directory", "path": folder, "size": 0, "oid": "0" * 40} for folder in folders]
    return sorted(entries, key=lambda entry: entry["path"])


REPO = r"(?P<type>datasets/|spaces/)?(?P<id>[^/]+/[^/]+)"
ROUTES = [
    ("GET", r"api/whoami-v2", Handler.whoami),
    ("POST", r"api/repos/create", Handler.create),
    ("POST", r"api/validate-yaml", Handler.validate_yaml),
    ("GET", rf"api/{ID}", Handler.info),
    ("GET", rf"api/{ID}/revision/(?P<revision>[^/]+)", Handler.info),
    ("GET", rf"api/{ID}/refs", Handler.refs),
    ("POST", rf"api/{ID}/branch/(?P<name>[^/]+)", Handler.new_ref),
    ("POST", rf"api/{ID}/tag/(?P<revision>[^/]+)(?P<name>)", Handler.new_ref),
    ("GET", rf"api/{ID}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", Handler.tree),
    ("POST", rf"api/{ID}/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    ("POST", rf"api/{ID}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", rf"api/{ID}/commit/(?P<revision>[^/]+)", Handler.commit),
    ("POST", rf"{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("GET HEAD", rf"{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]
