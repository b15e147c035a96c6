"""What the loopback Hub keeps: files, commits and the names that point at them; and who may do what."""

import hashlib
import re
from dataclasses import dataclass, field

WRITE, READ, STRANGER = "hf_write_of_user", "hf_read_of_user", "hf_write_of_another"
TOKENS = {WRITE: ("user", "write"), READ: ("user", "read"), STRANGER: ("another", "write")}


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
    """What happens to matching requests in place of an answer.

    `status` None cuts the connection in the middle of the request; `late` after the request was carried out. With
    `after`, only requests that follow one to a matching path are hit.
    """

    method: str
    pattern: re.Pattern
    status: int | None
    times: int
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    late: bool = False
    after: str | None = None
    start: int = 0  # number of requests before it was asked for

    def hits(self, method: str, path: str, requests: list[tuple[str, str]]) -> bool:
        """Whether a request, the last of `requests`, is to fail."""
        is_due = self.after is None or any(re.search(self.after, other) for _, other in requests[self.start : -1])
        return bool(self.times and is_due and self.method == method and self.pattern.search(path))
