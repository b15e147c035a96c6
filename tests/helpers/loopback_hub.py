"""In-memory Hub on a loopback port for the Hugging Face libraries and timm.

    with LoopbackHub() as hub:
        run_command("hfvit", "push", folder, "user/name", **hub.environment(home))

A commit is a mapping of paths to blobs; a branch, tag or pull request points to a commit. Within `hub.fault(...)`, the
next matching requests get an error, or the connection is closed in the middle.
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
        """Ignore connections that the client, or a fault, has closed."""
        if not isinstance(sys.exception(), OSError | ValueError):
            super().handle_error(*_)


class LoopbackHub:
    """Hub server that runs within the context."""

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
        """Return environment variables for a client process with the cache `home`."""
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": token or "", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_DATASETS_CACHE": str(home / "datasets"), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        }  # fmt: skip

    def take_over(self, monkeypatch, cache: Path, token: str | None = WRITE) -> None:
        """Patch the imported libraries of this process to use this Hub.

        They were set to offline.
        """
        template = f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        values = {"ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
        values |= {"HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(cache), "HF_TOKEN_PATH": str(cache / "token")}
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", token or "")
        monkeypatch.setattr(time, "sleep", lambda _: None)  # between attempts of the clients

    def create(self, repo_id: str, kind: str = "model", files: dict[str, bytes] | None = None, **kwargs) -> Repository:
        """Create a repository with one commit."""
        repository = self.repositories[kind, repo_id] = Repository(**kwargs)
        blobs = {path: Blob(content, path.endswith(LFS_KINDS)) for path, content in (files or {}).items()}
        self.objects |= {blob.oid: blob.content for blob in blobs.values() if blob.is_lfs}
        repository.commit({".gitattributes": Blob(b""), **blobs}, "initial commit")
        return repository

    def model(self, repo_id: str) -> Repository:
        return self.repositories["model", repo_id]

    @contextmanager
    def fault(self, method: str, pattern: str, status: int | None, times: int = 1, **more) -> Iterator[Fault]:
        """Fail the next `times` matching requests with `status`; see `Fault`."""
        fault = Fault(method, re.compile(pattern), status, times, start=len(self.requests), **more)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)
