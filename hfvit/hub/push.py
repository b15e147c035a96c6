"""Push a run to the Hub in one commit and verify it."""

import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers, validate_repo_id

from hfvit.artifacts.export_record import ExportRecord
from hfvit.errors import HubError, PushArgumentError, one_line
from hfvit.hub.files import EXPORTS, PushedFile, files_to_push, left_out
from hfvit.utils.files import expand_user
from hfvit.utils.formatting import aligned, size

LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write (huggingface.co/settings/tokens)."
_CHECK_IMAGES = 4
_TOLERANCE = 1e-4  # of the largest logit; the same file on the same processor gives the same bits
_CONNECTION = (httpx2.TransportError, OfflineModeIsEnabled, ConnectionError, TimeoutError)
# What parsing raises for an answer that is not the Hub's: HTML of a login page, or JSON of another shape.
_NOT_THE_HUB = (ValueError, LookupError, TypeError, AttributeError)
# Busy, or failing for a moment. huggingface_hub repeats uploads, but neither commits nor other requests (2.4).
RETRIED = (429, 500, 502, 503, 504)
RETRY_SECONDS = 60.0
MAX_PAUSE = 16.0
Result = TypeVar("Result")


@dataclass(frozen=True)
class Destination:
    """Where to push: `repo_id` is `user/name`, or `name` alone for the user of the token."""

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    token: str | None = field(default=None, repr=False)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    include: Sequence[str] = (),
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Push the output folder of a run to a model repository on the Hub, in one commit, and load it back.

    Args:
        folder: `output_dir` of a run.
        repo_id: `user/name`, created if needed.
        private: make a new repository private.
        revision: branch to push to, created if needed; `main` by default.
        create_pr: open a pull request instead.
        include: exports to push, too: `onnx`, `tensorrt`.
        message: of the commit.
        token: of the Hub; the one that `hf auth login` saved by default.

    Returns:
        The URL of the commit or the pull request.

    Raises:
        HubError: nothing was pushed, or what the Hub returns is not this model.
    """
    return push_to(folder, Destination(repo_id, private, revision, create_pr, token), include, message)


def push_to(
    folder: str | Path, destination: Destination, include: Sequence[str] = (), message: str | None = None
) -> str:
    """Push `folder` and return the URL of the commit, or of the pull request.

    Everything that can be known to be wrong is told before anything is sent; the files then arrive in one commit or
    not at all. What the Hub answers when it is busy or failing is asked again for up to `RETRY_SECONDS`. Raises
    `HubError`, with what is on the Hub now and the command to repeat.
    """
    try:
        destination = check_destination(destination)
        files_to_push(folder, destination.repo_id, tuple(include))
        for name in include:
            _check_weights(folder, name)
        return _send(folder, destination, tuple(include), message)
    except HubError as error:
        if error.__cause__ is None:  # a mistake, which the same line would only repeat
            raise
        again = repeat_command(folder, destination, include, message)
        raise HubError(f"{error}\n{folder} is unchanged. To push it again: {again}") from error


def repeat_command(
    folder: str | Path, destination: Destination, include: Sequence[str] = (), message: str | None = None
) -> str:
    """The line that pushes again. A token is never part of it."""
    words = ["hfvit", "push", str(folder), destination.repo_id]
    words += ["--private"] if destination.private else []
    words += ["--revision", destination.revision] if destination.revision else []
    words += ["--create_pr"] if destination.create_pr else []
    words += ["--include", *include] if include else []
    words += ["--message", message] if message else []
    return shlex.join(words)


def check_name(repo_id: str) -> None:
    """Raise `HubError` for what cannot be the name of a model repository."""
    kind, _, rest = repo_id.partition("/")
    if repo_id.startswith(("http://", "https://")):
        raise PushArgumentError(f"repository: must be a repository name, user/name, got the address {repo_id}.")
    if kind in ("datasets", "spaces", "models") and "/" in rest:
        what = "" if kind == "models" else " hfvit pushes to model repositories only."
        raise PushArgumentError(f"repository: must be user/name, got {repo_id}.{what}")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushArgumentError(f"repository: must be user/name, got {repo_id}. {one_line(error)}") from None


def check_destination(destination: Destination) -> Destination:
    """Who may push there, asked of the Hub; returns the destination under its full name. Nothing is changed."""
    check_name(destination.repo_id)
    token = destination.token or get_token()
    if not token:
        raise HubError(f"There is no token for the Hub. {LOG_IN}")
    api = HfApi(token=token, library_name="hfvit")
    with _hub_errors(destination.repo_id):
        user = retry(api.whoami)
        name = user["name"]
        mine = [name, *(org.get("name") for org in user.get("orgs") or [])]
        role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    repo_id = destination.repo_id if "/" in destination.repo_id else f"{name}/{destination.repo_id}"
    owner, _, title = repo_id.partition("/")
    if role == "read":
        raise HubError(f"The token of {name} may only read. {LOG_IN}")
    if owner not in mine and not destination.create_pr:
        raise HubError(
            f"{repo_id}: the token is of {name}, who cannot write for {owner}. Push to {name}/{title}, or open a pull"
            " request with --create_pr."
        )
    with _hub_errors(destination.repo_id):
        if not retry(api.repo_exists, repo_id):
            _check_new(api, repo_id, destination.create_pr)
        elif destination.private and not retry(api.model_info, repo_id).private:
            raise PushArgumentError(f"--private: {repo_id} is public. Only a new repository can be made private.")
    return replace(destination, repo_id=repo_id, token=token)


def _check_weights(folder: str | Path, export: str) -> None:
    """Raise `HubError` where an export in `folder` is of other weights: those of an earlier training."""
    recorded = ExportRecord.load(expand_user(folder) / export).weights_sha256
    if recorded is None:
        return
    from hfvit.export.onnx import weights_sha256
    from hfvit.inference.classifier import load_classifier

    if weights_sha256(load_classifier(folder, device="cpu").backend.model.float()) != recorded:
        raise PushArgumentError(f"--include {export}: {folder}/{export} is of other weights. Export this model again.")


def _check_new(api: HfApi, repo_id: str, create_pr: bool) -> None:
    """Raise `HubError` where a model repository is not to be made under a name that no model has."""
    if create_pr:
        raise PushArgumentError(f"--create_pr: no repository {repo_id}. Leave the option out to create it.")
    for kind, name in (("dataset", "data set"), ("space", "space")):
        if retry(api.repo_exists, repo_id, repo_type=kind):
            raise PushArgumentError(f"repository: {repo_id} is a {name}. Choose another name for the model.")


def _send(folder: str | Path, destination: Destination, include: tuple[str, ...], message: str | None) -> str:
    repo_id = destination.repo_id
    api = HfApi(token=destination.token, library_name="hfvit")
    with _hub_errors(repo_id, "Nothing was committed."):
        if not destination.create_pr:
            if not retry(api.repo_exists, repo_id):  # a token for one repository may not make any
                retry(api.create_repo, repo_id, private=destination.private, exist_ok=True)
            if destination.revision:
                retry(api.create_branch, repo_id, branch=destination.revision, exist_ok=True)
        before = retry(api.model_info, repo_id, revision=destination.revision).sha
        there = retry(api.list_repo_files, repo_id, revision=destination.revision)
    files = files_to_push(folder, repo_id, include, _card_there(destination, there))
    print(f"pushing {len(files)} files, {size(sum(file.bytes for file in files))}, to {repo_id}", flush=True)
    try:
        commit = _commit(api, destination, files, include, message)
    except (HfHubHTTPError, RuntimeError, OSError, *_CONNECTION, *_NOT_THE_HUB) as error:
        raise HubError(f"{_why(error, repo_id)} {_state(api, destination, before)}") from error
    for name in left_out(folder, include):
        _say(f"{name}/ was not pushed; --include {name} does")
    for name in sorted({path.split("/")[0] for path in there} & (set(EXPORTS) - set(include))):
        _say(f"{repo_id} still has {name}/ of an earlier push; if the weights are new, push it with --include {name}")
    address = commit.pr_url or commit.commit_url
    compare(folder, repo_id, commit.oid, destination.token, address)
    return address


def _commit(
    api: HfApi, destination: Destination, files: list[PushedFile], include: tuple[str, ...], message: str | None
) -> CommitInfo:
    """Upload `files` and commit them.

    A commit whose answer was lost is found by the next attempt: huggingface_hub makes none of files that are unchanged
    and returns the last one.

    Args:
        api: with the token.
        destination: where to push.
        files: of `files_to_push`.
        include: names of the exports among them.
        message: of the commit.
    """

    def attempt() -> CommitInfo:
        operations = [CommitOperationAdd(file.path, file.source) for file in files]
        # What an earlier export left in its folder would pass for this model's.
        there = api.list_repo_files(destination.repo_id, revision=destination.revision)
        sent = {file.path for file in files}
        stale = [path for path in there if path.startswith(tuple(f"{name}/" for name in include)) and path not in sent]
        return api.create_commit(
            destination.repo_id,
            [*operations, *map(CommitOperationDelete, stale)],
            commit_message=message or "Push with hfvit",
            revision=destination.revision,
            create_pr=destination.create_pr,
        )

    if destination.create_pr:  # a second attempt might open a second one
        return attempt()
    return retry(attempt)


def _state(api: HfApi, destination: Destination, before: str) -> str:
    """What a failed commit has left on the Hub, in words.

    Args:
        api: with the token.
        destination: of the push.
        before: the revision's commit before it.
    """
    place = f"{constants.ENDPOINT}/{destination.repo_id}"
    if destination.create_pr:
        return f"Look for the pull request on {place}/discussions before you try again."
    try:
        now = api.model_info(destination.repo_id, revision=destination.revision).sha
    except (HfHubHTTPError, *_CONNECTION, *_NOT_THE_HUB):
        return f"Whether the commit was made is not known: see {place}/commits/{destination.revision or 'main'}."
    if now == before:
        return "Nothing was committed."
    return f"The commit is there: {place}/commit/{now}."


def retry(call: Callable[..., Result], *args, **kwargs) -> Result:
    """Call a function that asks the Hub, and again while the Hub is busy or the connection breaks.

    The pauses grow from one second to `MAX_PAUSE`, or are what the Hub asks for (Retry-After), and end after
    `RETRY_SECONDS`. An address that cannot be connected to is not tried again.

    Args:
        call: with no effect where it is repeated.
        args: of the call.
        kwargs: of the call.
    """
    began = time.monotonic()
    pause = 1.0
    waited = 0.0
    while True:
        try:
            return call(*args, **kwargs)
        except (HfHubHTTPError, httpx2.TransportError) as error:
            wait = _pause(error, pause)
            if wait is None or max(waited, time.monotonic() - began) + wait > RETRY_SECONDS:
                raise
            _say(f"the Hub fails ({_short(error)}); trying again in {wait:g} s")
        time.sleep(wait)
        waited += wait
        pause = min(2 * pause, MAX_PAUSE)


def _pause(error: Exception, pause: float) -> float | None:
    """Seconds until the next attempt: what the Hub asks for, or `pause`; None for what would fail again."""
    response = getattr(error, "response", None)
    if response is None:
        return None if isinstance(error, httpx2.ConnectError) else pause
    if response.status_code not in RETRIED:
        return None
    limit = parse_ratelimit_headers(response.headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    asked = response.headers.get("Retry-After", "").strip()
    return max(1.0, float(asked)) if asked.isdigit() else pause


def _short(error: Exception) -> str:
    response = getattr(error, "response", None)
    return type(error).__name__ if response is None else f"status {response.status_code}"


@contextmanager
def _hub_errors(repo_id: str, state: str = "") -> Iterator[None]:
    """Raise `HubError` for what asking the Hub raises; `state` says what has happened until then."""
    try:
        yield
    except HubError:
        raise
    except (HfHubHTTPError, RuntimeError, OSError, *_CONNECTION, *_NOT_THE_HUB) as error:
        raise HubError(f"{_why(error, repo_id)} {state}".strip()) from error


def _card_there(destination: Destination, there: list[str]) -> str:
    """The repository's README.md as it is now, with what users wrote into it."""
    if "README.md" not in there:
        return ""
    with tempfile.TemporaryDirectory(prefix="hfvit-") as cache, _hub_errors(destination.repo_id):
        path = retry(
            hf_hub_download,
            destination.repo_id,
            "README.md",
            revision=destination.revision,
            token=destination.token,
            cache_dir=cache,
        )
        return Path(path).read_text(encoding="utf-8")


def compare(folder: str | Path, repo_id: str, commit: str, token: str | None, address: str) -> None:
    """Load `repo_id` at `commit` from the Hub into an empty cache and hold its logits to those of `folder`.

    Raises `HubError` where they differ, or where it cannot be loaded.
    """
    import numpy as np
    from huggingface_hub import snapshot_download

    from hfvit.errors import ModelError
    from hfvit.inference.classifier import load_classifier

    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (90 + 40 * n, 130, 3), dtype=np.uint8) for n in range(_CHECK_IMAGES)]
    with tempfile.TemporaryDirectory(prefix="hfvit-") as cache:
        there = {"revision": commit, "cache_dir": cache, "token": token}
        try:
            # A folder of this name here would be loaded in the repository's stead.
            source = snapshot_download(repo_id, **there) if Path(repo_id).exists() else repo_id
            pushed = load_classifier(source, device="cpu", **({} if source != repo_id else there))
        except (ModelError, HfHubHTTPError, *_CONNECTION) as error:
            raise HubError(f"Pushed to {address}, but it cannot be loaded from there: {one_line(error)}") from error
        local = load_classifier(folder, device="cpu")
        if local.text_reader:
            images = [(image, f"picture {number}") for number, image in enumerate(images)]
        expected, found = local.logits(images), pushed.logits(images)
    same = local.labels == pushed.labels and found.shape == expected.shape
    difference = float(np.abs(found - expected).max()) if same else float("inf")
    if not difference <= _TOLERANCE * max(1.0, float(np.abs(expected).max())):
        what = f"its logits differ by {difference:.2g}" if same else "its classes are others"
        raise HubError(f"Pushed to {address}, but what the Hub gives back is not this model: {what}.")
    print(f"loaded back from the Hub: the same logits on {_CHECK_IMAGES} images (difference {difference:.1g})")


def listing(files: list[PushedFile]) -> str:
    """What a dry run prints."""
    rows = [(file.path, size(file.bytes)) for file in files]
    return "\n".join(aligned([*rows, (f"{len(files)} files", size(sum(file.bytes for file in files)))]))


def _why(error: Exception, repo_id: str) -> str:
    """What went wrong, and what to do, from huggingface_hub's exceptions; of several causes the first."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (HfHubHTTPError, *_CONNECTION)):
        cause = cause.__cause__
    error = cause if isinstance(cause, Exception) else error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return "The Hub is switched off (HF_HUB_OFFLINE); unset it to push."
    if isinstance(error, _CONNECTION):
        return f"The connection to the Hub was lost or never made ({type(error).__name__}: {one_line(error)})."
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated, and this token has no access; ask for it on the repository's page."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such revision; name a branch, with --revision."
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id}: there is no such repository, or this token may not see it."
    if isinstance(error, EntryNotFoundError):
        return f"{repo_id}: the Hub does not know {getattr(error.response, 'url', 'what was asked for')}."
    if status == 401:
        return f"The Hub does not know this token. {LOG_IN}"
    if status == 403:
        return f"The token may not write to {repo_id}. {LOG_IN}"
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        asked = f", for {wait} seconds" if wait else ""
        return f"The Hub asks to wait (status 429{asked}), longer than hfvit tries ({RETRY_SECONDS:g} seconds)."
    if status is not None and status >= 500:
        return f"The Hub failed with status {status} and went on failing; its state is on status.huggingface.co."
    if status is None and isinstance(error, OSError):
        return f"{error.filename or 'A file'} cannot be read: {error.strerror or one_line(error)}."
    if status is None and isinstance(error, _NOT_THE_HUB):
        return (
            f"{constants.ENDPOINT} does not answer as the Hub does ({type(error).__name__}: {one_line(error)[:200]})."
            " A proxy or the login page of a network may answer in its place; check the connection and HF_ENDPOINT."
        )
    return f"The Hub refused: {one_line(error)}"


def _say(sentence: str) -> None:
    print(f"hfvit: {sentence}", file=sys.stderr)
