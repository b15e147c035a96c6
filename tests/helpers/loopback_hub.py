"""A Hub on a free port of this machine that answers the real clients: huggingface_hub, transformers, timm, datasets.

    with LoopbackHub() as hub:
        run_command("hfvit", "push", folder, "user/name", **hub.environment(home))

Repositories live in memory. A commit is a mapping of paths to blobs; a branch, tag or pull request names a commit.
Faults are asked for: within `hub.fault(...)` the next matching requests get an error, or are cut in the middle.
"""

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants as constants
from helpers.loopback_routes import LFS_KINDS, Handler
from helpers.loopback_store import WRITE, Blob, Fault, Repository


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """A client that goes away, or that was cut off, is no error."""
        if not isinstance(sys.exception(), OSError | ValueError):
            super().handle_error(*_)


class LoopbackHub:
    """Starts with the block and stops with it."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    def __enter__(self) -> "LoopbackHub":
        self.server = _Server(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
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
    def fault(self, method: str, pattern: str, status: int | None, times: int = 1, **more) -> Iterator[Fault]:
        """Answer the next `times` matching requests with `status`, or cut them where it is None; see `Fault`."""
        wrong = Fault(method, re.compile(pattern), status, times, start=len(self.requests), **more)
        self.faults.append(wrong)
        try:
            yield wrong
        finally:
            self.faults.remove(wrong)
