"""Storage of the loopback Hub: files, commits, references, tokens and faults."""

import hashlib
import re
from dataclasses import dataclass, field

WRITE = "hf_write_of_user"
READ = "hf_read_of_user"
STRANGER = "hf_write_of_another"
TOKENS = {WRITE: ("user", "write"), READ: ("user", "read"), STRANGER: ("another", "write")}


@dataclass
class Blob:
    """Content of a file, with the object id of git (SHA-1) or git-lfs (SHA-256)."""

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
    """Commits by object id, and the references to them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, Blob], message: str, ref: str = "main") -> str:
        text = "".join(f"{path}{blob.oid}" for path, blob in sorted(files.items())) + f"{len(self.commits)}{message}"
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        self.messages.append(message)
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Return the content of each path at a branch, tag, pull request or commit."""
        return {path: blob.content for path, blob in self.commits[self.resolve(revision)].items()}

    def resolve(self, revision: str) -> str | None:
        oid = self.refs.get(revision, revision)
        return oid if oid in self.commits else None


@dataclass
class Fault:
    """Failure of matching requests.

    With `status` None, the connection is closed in the middle of the request; with `late`, after the request was
    carried out. With `after`, only requests after one to a matching path fail.
    """

    method: str
    pattern: re.Pattern
    status: int | None
    times: int
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    late: bool = False
    after: str | None = None
    start: int = 0  # number of requests before the fault was added

    def hits(self, method: str, path: str, requests: list[tuple[str, str]]) -> bool:
        """Return whether the last of `requests` fails."""
        is_due = self.after is None or any(re.search(self.after, other) for _, other in requests[self.start : -1])
        return bool(self.times and is_due and self.method == method and self.pattern.search(path))
