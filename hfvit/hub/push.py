"""Push a run to the Hub in one commit and verify it."""

import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import huggingface_hub
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
from packaging.version import Version

from hfvit.artifacts.constants import CARD_FILE, RUN_FILE
from hfvit.artifacts.engine_record import EngineRecord
from hfvit.artifacts.export_record import ExportRecord
from hfvit.errors import HubError, PushArgumentError, one_line, printable
from hfvit.hub.files import EXPORTS, PushedFile, Repository, exports_left_out, files_to_push, outdated_files
from hfvit.utils.checks import check_name as check_path
from hfvit.utils.files import expand_user
from hfvit.utils.formatting import aligned, size

# The HTTP client of huggingface_hub; its exceptions tell a lost connection.
if Version(huggingface_hub.__version__).major >= 2:
    import httpx2 as httpx
else:
    import httpx

LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN, with a token that can write (huggingface.co/settings/tokens)."
_CHECK_IMAGES = 4
_TOLERANCE = 1e-4  # relative to the largest logit
_CONNECTION = (httpx.TransportError, OfflineModeIsEnabled, ConnectionError, TimeoutError)
# Exceptions of parsing an answer that is not the Hub's, such as the HTML of a login page.
_NOT_THE_HUB = (ValueError, LookupError, TypeError, AttributeError)
# HTTP status of temporary failures. huggingface_hub repeats uploads, but no commits and other requests (2.4).
RETRIED = (429, 500, 502, 503, 504)
RETRY_SECONDS = 60.0
MAX_PAUSE = 16.0
Result = TypeVar("Result")


@dataclass(frozen=True)
class Destination:
    """Repository and options of a push.

    Attributes:
        repo_id: `user/name`, or `name` for the user of the token.
        private: make a new repository private. Default: the setting of its owner.
        revision: branch. Default: main.
        create_pr: open a pull request.
        token: token of the Hub. Default: the saved one.
    """

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
    """Push the output folder of a run to the Hub in one commit, and verify it.

    Args:
        folder: `output_dir` of a run.
        repo_id: `user/name`, created if missing.
        private: make a new repository private. Default: the setting of its owner.
        revision: branch to push to, created if missing. Default: `main`.
        create_pr: open a pull request instead of pushing to a branch.
        include: exports to push, of `onnx`, `openvino`, `executorch` and `tensorrt`.
        message: commit message. Default: "Push with hfvit".
        token: token of the Hub. Default: the one that `hf auth login` saved.

    Returns:
        The URL of the commit or the pull request.

    Raises:
        HubError: nothing was pushed, or the model loaded from the Hub has other logits.
        TypeError: an argument is of another type.
    """
    check_path("folder", folder)
    if not str(folder):  # would be the current folder
        raise PushArgumentError("folder: must be the output_dir of a run, got ''.")
    texts = {"repo_id": repo_id, "revision": revision, "message": message, "token": token}
    for option, value in texts.items():
        if not isinstance(value, str) and (value is not None or option == "repo_id"):
            raise TypeError(f"{option}: must be a string, got {'***' if option == 'token' else repr(value)}.")
    for option, value in {"private": private, "create_pr": create_pr}.items():
        if not isinstance(value, bool | None):
            raise TypeError(f"{option}: must be True or False, got {value!r}.")
    if isinstance(include, str) or not isinstance(include, Iterable):
        raise TypeError(f"include: must be a list of exports, got {include!r}.")
    include = tuple(include)
    if unknown := [name for name in include if name not in list(EXPORTS)]:
        raise PushArgumentError(f"include: must be of {', '.join(EXPORTS)}, got {unknown[0]!r}.")
    return push_to(folder, Destination(repo_id, private, revision, create_pr, token), include, message)


def push_to(
    folder: str | Path, destination: Destination, include: Sequence[str] = (), message: str | None = None
) -> str:
    """Push the output folder of a run to the Hub in one commit, and verify it.

    All checks are made before anything is sent. Requests that fail temporarily are repeated for up to `RETRY_SECONDS`.

    Args:
        folder: `output_dir` of a run.
        destination: repository, branch and token.
        include: exports to push, of `onnx`, `openvino`, `executorch` and `tensorrt`.
        message: commit message. Default: "Push with hfvit".

    Returns:
        The URL of the commit or the pull request.

    Raises:
        HubError: the push failed; after a failure of the connection or the Hub, the message has the state of the
            repository and the command to repeat.
    """
    try:
        destination = check_destination(destination)
        files_to_push(folder, destination.repo_id, tuple(include))
        for name in include:
            _check_weights(folder, name)
        return _send(folder, destination, tuple(include), message)
    except HubError as error:
        if error.__cause__ is None:  # an invalid argument, for which repeating does not help
            raise
        again = repeat_command(folder, destination, include, message)
        raise HubError(f"{error}\n{folder} is unchanged. Push it again with: {again}") from error


def repeat_command(
    folder: str | Path, destination: Destination, include: Sequence[str] = (), message: str | None = None
) -> str:
    """Return the command line that repeats a push, without the token.

    Args:
        folder: `output_dir` of a run.
        destination: repository, branch and token.
        include: exports to push.
        message: commit message.
    """
    words = ["hfvit", "push", str(folder), destination.repo_id]
    words += ["--private"] if destination.private else []
    words += ["--revision", destination.revision] if destination.revision else []
    words += ["--create_pr"] if destination.create_pr else []
    words += ["--include", *include] if include else []
    words += ["--message", message] if message else []
    return shlex.join(words)


def check_name(repo_id: str) -> None:
    """Raise `PushArgumentError` unless `repo_id` can name a model repository."""
    kind, _, rest = repo_id.partition("/")
    if repo_id.startswith(("http://", "https://")):
        raise PushArgumentError(f"repository: must be user/name, got the URL {repo_id}.")
    if kind in ("datasets", "spaces", "models") and "/" in rest:
        hint = "" if kind == "models" else " hfvit pushes to model repositories only."
        raise PushArgumentError(f"repository: must be user/name, got {repo_id}.{hint}")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushArgumentError(f"repository: must be user/name, got {repo_id}. {one_line(error)}") from None


def check_destination(destination: Destination) -> Destination:
    """Ask the Hub whether the token can push to the destination.

    Returns:
        The destination with its full repository name and the token.

    Raises:
        HubError: the token is missing or cannot write there, or the Hub could not be reached.
        PushArgumentError: the repository or an option does not fit.
    """
    check_name(destination.repo_id)
    token = destination.token or get_token()
    if not token:
        raise HubError(f"No token for the Hub. {LOG_IN}")
    api = HfApi(token=token, library_name="hfvit")
    with _hub_errors(destination.repo_id):
        user = retry(api.whoami)
        name = user["name"]
        namespaces = [name, *(org.get("name") for org in user.get("orgs") or [])]
        role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    repo_id = destination.repo_id if "/" in destination.repo_id else f"{name}/{destination.repo_id}"
    owner, _, title = repo_id.partition("/")
    if role == "read":
        raise HubError(f"The token of {name} can only read. {LOG_IN}")
    if owner not in namespaces and not destination.create_pr:
        raise HubError(
            f"{repo_id}: the token belongs to {name}, who cannot write to {owner}. Push to {name}/{title}, or open a"
            " pull request with --create_pr."
        )
    with _hub_errors(destination.repo_id):
        if not retry(api.repo_exists, repo_id):
            _check_new(api, repo_id, destination.create_pr)
        elif destination.private and not retry(api.model_info, repo_id).private:
            raise PushArgumentError(f"--private: {repo_id} is public. Only a new repository can be made private.")
    return replace(destination, repo_id=repo_id, token=token)


def _check_weights(folder: str | Path, export: str) -> None:
    """Raise `PushArgumentError` if an export has other weights than the checkpoint."""
    recorded = {}  # folder of the export, which may be a Triton model -> digest of its weights
    for kind in (ExportRecord, EngineRecord):
        for file in (expand_user(folder) / export).rglob(kind.FILE):
            if digest := kind.load(file.parent).weights_sha256:
                recorded[file.parent] = digest
    if not recorded:
        return
    from hfvit.export.onnx import weights_sha256
    from hfvit.inference.classifier import load_classifier

    weights = weights_sha256(load_classifier(folder, device="cpu").backend.model.float())
    for place, digest in recorded.items():
        if digest != weights:
            raise PushArgumentError(
                f"--include {export}: the weights of {place} differ from the checkpoint's. Export it again."
            )


def _check_new(api: HfApi, repo_id: str, create_pr: bool) -> None:
    """Raise `PushArgumentError` if the repository `repo_id` should not be created."""
    if create_pr:
        raise PushArgumentError(f"--create_pr: no repository {repo_id}. Push without --create_pr to create it.")
    for kind, name in (("dataset", "data set"), ("space", "space")):
        if retry(api.repo_exists, repo_id, repo_type=kind):
            raise PushArgumentError(f"repository: {repo_id} is a {name}. Choose another name for the model.")


def _send(folder: str | Path, destination: Destination, include: tuple[str, ...], message: str | None) -> str:
    repo_id = destination.repo_id
    api = HfApi(token=destination.token, library_name="hfvit")
    with _hub_errors(repo_id, "Nothing was committed."):
        if not destination.create_pr:
            if not retry(api.repo_exists, repo_id):  # a fine-grained token may not be allowed to create repositories
                retry(api.create_repo, repo_id, private=destination.private, exist_ok=True)
            if destination.revision:
                retry(api.create_branch, repo_id, branch=destination.revision, exist_ok=True)
        before = retry(api.model_info, repo_id, revision=destination.revision).sha
        repository = _read_repository(api, destination)
    files = files_to_push(folder, repo_id, include, repository.card, destination.revision)
    outdated = outdated_files(repository, files, include)
    if not any(file.path == CARD_FILE for file in files):
        _print_note(f"no model card is pushed, since {folder} has no {RUN_FILE} and no {CARD_FILE}")
    print(f"pushing {len(files)} files, {size(sum(file.bytes for file in files))}, to {repo_id}", flush=True)
    try:
        commit = _commit(api, destination, files, outdated, message)
    except (HfHubHTTPError, RuntimeError, OSError, *_CONNECTION, *_NOT_THE_HUB) as error:
        raise HubError(f"{_explain(error, repo_id)} {_repository_state(api, destination, before)}") from error
    if outdated:
        _print_note(f"deleted {', '.join(outdated)} of other weights from {repo_id}")
    for name in exports_left_out(folder, include):
        _print_note(f"{name}/ was not pushed; push it with --include {name}")
    for name in sorted({path.split("/")[0] for path in repository.files} & (set(EXPORTS) - set(include))):
        _print_note(f"{repo_id} still has {name}/ of an earlier push; replace it with --include {name}")
    url = commit.pr_url or commit.commit_url
    verify_push(folder, repo_id, commit.oid, destination.token, url)
    return url


def _commit(
    api: HfApi,
    destination: Destination,
    files: list[PushedFile],
    outdated: list[str],
    message: str | None,
) -> CommitInfo:
    """Upload files and commit them.

    If the answer of a commit is lost, the next attempt returns that commit, since huggingface_hub creates none for
    unchanged files.

    Args:
        api: client with the token.
        destination: repository and branch.
        files: files from `files_to_push`.
        outdated: paths in the repository to delete.
        message: commit message.
    """

    def attempt() -> CommitInfo:
        # A lost attempt may have deleted them.
        left = {*outdated} & {*api.list_repo_files(destination.repo_id, revision=destination.revision)}
        return api.create_commit(
            destination.repo_id,
            [
                *(CommitOperationAdd(file.path, file.source) for file in files),
                *(CommitOperationDelete(path) for path in sorted(left)),
            ],
            commit_message=message or "Push with hfvit",
            revision=destination.revision,
            create_pr=destination.create_pr,
        )

    if destination.create_pr:  # a second attempt could open a second pull request
        return attempt()
    return retry(attempt)


def _repository_state(api: HfApi, destination: Destination, before: str) -> str:
    """Describe whether a failed commit has changed the repository.

    Args:
        api: client with the token.
        destination: repository and branch.
        before: commit of the branch before the push.
    """
    url = f"{constants.ENDPOINT}/{destination.repo_id}"
    if destination.create_pr:
        return f"Check {url}/discussions for the pull request before you try again."
    try:
        now = api.model_info(destination.repo_id, revision=destination.revision).sha
    except (HfHubHTTPError, *_CONNECTION, *_NOT_THE_HUB):
        return f"It is unknown whether the commit was made. See {url}/commits/{destination.revision or 'main'}."
    if now == before:
        return "Nothing was committed."
    return f"The commit was made: {url}/commit/{now}."


def retry(call: Callable[..., Result], *args, **kwargs) -> Result:
    """Call a function of the Hub, and repeat it after temporary failures.

    Pauses increase from one second to `MAX_PAUSE`, or follow the Hub's Retry-After, for at most `RETRY_SECONDS`. A
    failure to connect is not repeated.

    Args:
        call: function that is safe to repeat.
        *args: its arguments.
        **kwargs: its keyword arguments.
    """
    began = time.monotonic()
    pause = 1.0
    waited = 0.0
    while True:
        try:
            return call(*args, **kwargs)
        except (HfHubHTTPError, httpx.TransportError) as error:
            wait = _pause(error, pause)
            if wait is None or max(waited, time.monotonic() - began) + wait > RETRY_SECONDS:
                raise
            _print_note(f"the Hub failed ({_short(error)}); trying again in {wait:g} s")
        time.sleep(wait)
        waited += wait
        pause = min(2 * pause, MAX_PAUSE)


def _pause(error: Exception, pause: float) -> float | None:
    """Return the seconds until the next attempt, None for a permanent failure."""
    response = getattr(error, "response", None)
    if response is None:
        return None if isinstance(error, httpx.ConnectError) else pause
    if response.status_code not in RETRIED:
        return None
    limit = parse_ratelimit_headers(response.headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    retry_after = response.headers.get("Retry-After", "").strip()
    return max(1.0, float(retry_after)) if retry_after.isdigit() else pause


def _short(error: Exception) -> str:
    response = getattr(error, "response", None)
    return type(error).__name__ if response is None else f"status {response.status_code}"


@contextmanager
def _hub_errors(repo_id: str, state: str = "") -> Iterator[None]:
    """Convert exceptions of the Hub's client to `HubError`, with `state` added."""
    try:
        yield
    except HubError:
        raise
    except (HfHubHTTPError, RuntimeError, OSError, *_CONNECTION, *_NOT_THE_HUB) as error:
        raise HubError(f"{_explain(error, repo_id)} {state}".strip()) from error


def _read_repository(api: HfApi, destination: Destination) -> Repository:
    """Read what a push needs to know of the repository."""
    files = retry(api.list_repo_files, destination.repo_id, revision=destination.revision)
    card = _download(destination, files, CARD_FILE)
    return Repository(files, card, _download(destination, files, RUN_FILE))


def _download(destination: Destination, hub_files: list[str], name: str) -> str:
    """Return a text file of the repository, an empty string if it has none.

    Args:
        destination: repository, branch and token.
        hub_files: paths in the repository.
        name: path of the file.
    """
    if name not in hub_files:
        return ""
    with tempfile.TemporaryDirectory(prefix="hfvit-") as cache, _hub_errors(destination.repo_id):
        path = retry(
            hf_hub_download,
            destination.repo_id,
            name,
            revision=destination.revision,
            token=destination.token,
            cache_dir=cache,
        )
        return Path(path).read_text(encoding="utf-8")


def verify_push(folder: str | Path, repo_id: str, commit: str, token: str | None, url: str) -> None:
    """Load the pushed model from the Hub and compare its logits with the local ones.

    Args:
        folder: `output_dir` of the run.
        repo_id: repository on the Hub.
        commit: commit to load, into an empty cache.
        token: token of the Hub.
        url: URL of the commit or pull request, for messages.

    Raises:
        HubError: the model cannot be loaded, or its logits or classes differ.
    """
    import numpy as np
    from huggingface_hub import snapshot_download

    from hfvit.errors import ModelError
    from hfvit.inference.classifier import load_classifier

    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (90 + 40 * n, 130, 3), dtype=np.uint8) for n in range(_CHECK_IMAGES)]
    with tempfile.TemporaryDirectory(prefix="hfvit-") as cache:
        hub_arguments = {"revision": commit, "cache_dir": cache, "token": token}
        try:
            # A local folder of the same name would be loaded instead of the repository.
            source = snapshot_download(repo_id, **hub_arguments) if Path(repo_id).exists() else repo_id
            pushed = load_classifier(source, device="cpu", **({} if source != repo_id else hub_arguments))
        except (ModelError, HfHubHTTPError, *_CONNECTION) as error:
            raise HubError(f"Pushed to {url}, but the model cannot be loaded from there: {one_line(error)}") from error
        local = load_classifier(folder, device="cpu")
        if local.text_reader:
            images = [(image, f"picture {number}") for number, image in enumerate(images)]
        expected = local.logits(images)
        found = pushed.logits(images)
    is_comparable = local.labels == pushed.labels and found.shape == expected.shape
    difference = float(np.abs(found - expected).max()) if is_comparable else float("inf")
    if not difference <= _TOLERANCE * max(1.0, float(np.abs(expected).max())):
        problem = f"the logits differ by {difference:.2g}" if is_comparable else "the classes differ"
        raise HubError(f"Pushed to {url}, but the model loaded from the Hub is not the same: {problem}.")
    print(f"verified: the model loaded from the Hub has the same logits (difference {difference:.1g})")


def dry_run(folder: str | Path, destination: Destination, include: tuple[str, ...] = ()) -> str:
    """List the files of a push with their sizes, and those that it would delete.

    If the repository cannot be read, a note says that the files to delete are not listed.

    Args:
        folder: `output_dir` of a run.
        destination: repository and branch.
        include: exports to push, of `onnx`, `openvino`, `executorch` and `tensorrt`.

    Raises:
        PushArgumentError: the push would fail for the same reason.
    """
    files = files_to_push(folder, destination.repo_id, include)
    outdated = []
    try:
        destination = check_destination(destination)
        with _hub_errors(destination.repo_id):
            repository = _existing_repository(destination)
        files = files_to_push(folder, destination.repo_id, include, repository.card, destination.revision)
        outdated = outdated_files(repository, files, include)
    except PushArgumentError:
        raise
    except HubError as error:
        _print_note(f"files to delete in {destination.repo_id} are not listed: {one_line(error)}")
    rows = [(file.path, size(file.bytes)) for file in files]
    rows.append((f"{len(files)} files", size(sum(file.bytes for file in files))))
    return "\n".join(aligned([*rows, *((path, "deleted") for path in outdated)]))


def _existing_repository(destination: Destination) -> Repository:
    """Read a repository as it is before a push, empty if the push would create it."""
    api = HfApi(token=destination.token, library_name="hfvit")
    if not retry(api.repo_exists, destination.repo_id):
        return Repository()
    try:
        return _read_repository(api, destination)
    except RevisionNotFoundError:  # the push would create the branch from main
        return _read_repository(api, replace(destination, revision=None))


def _explain(error: Exception, repo_id: str) -> str:
    """Explain the first error of huggingface_hub in the causes of `error`."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (HfHubHTTPError, *_CONNECTION)):
        cause = cause.__cause__
    error = cause if isinstance(cause, Exception) else error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return "The Hub is disabled by HF_HUB_OFFLINE. Unset it to push."
    if isinstance(error, _CONNECTION):
        return f"No connection to the Hub ({type(error).__name__}: {one_line(error)})."
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated, and the token has no access. Request access on the repository's page."
    if isinstance(error, RevisionNotFoundError):
        return f"--revision: no such branch in {repo_id}."
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id}: the repository does not exist, or the token has no access to it."
    if isinstance(error, EntryNotFoundError):
        return f"{repo_id}: not found: {getattr(error.response, 'url', one_line(error))}."
    if status == 401:
        return f"The Hub does not accept the token. {LOG_IN}"
    if status == 403:
        return f"The token cannot write to {repo_id}. {LOG_IN}"
    if status == 429:
        retry_after = error.response.headers.get("Retry-After")
        requested = f" with Retry-After {retry_after} seconds" if retry_after else ""
        return f"The Hub is busy (status 429{requested}), longer than hfvit waits ({RETRY_SECONDS:g} seconds)."
    if status is not None and status >= 500:
        return f"The Hub failed repeatedly with status {status}. See status.huggingface.co."
    if status is None and isinstance(error, OSError):
        return f"{error.filename or 'A file'}: cannot be read ({error.strerror or one_line(error)})."
    if status is None and isinstance(error, _NOT_THE_HUB):
        return (
            f"{constants.ENDPOINT}: not an answer of the Hub ({type(error).__name__}: {one_line(error)[:200]}). Check"
            " HF_ENDPOINT, and whether a proxy or the login page of a network answers instead."
        )
    return f"The Hub rejected the request: {one_line(error)}"


def _print_note(text: str) -> None:
    print(f"hfvit: {printable(text)}", file=sys.stderr)
