"""Push a run to the Hub in one commit and verify it."""

import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from hfvit.artifacts.export_record import ExportRecord
from hfvit.errors import HubError, PushArgumentError, one_line
from hfvit.hub.files import EXPORTS, PushedFile, exports_left_out, files_to_push
from hfvit.utils.formatting import aligned, size

LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN, with a token that can write (huggingface.co/settings/tokens)."
_CHECK_IMAGES = 4
_TOLERANCE = 1e-4  # relative to the largest logit
_CONNECTION = (httpx2.TransportError, OfflineModeIsEnabled, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Destination:
    """Where and how to push.

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
        include: exports to push, of `onnx` and `tensorrt`.
        message: commit message. Default: "Push with hfvit".
        token: token of the Hub. Default: the one that `hf auth login` saved.

    Returns:
        The URL of the commit or the pull request.

    Raises:
        HubError: nothing was pushed, or the model loaded from the Hub has other logits.
    """
    return push_to(folder, Destination(repo_id, private, revision, create_pr, token), include, message)


def push_to(
    folder: str | Path, destination: Destination, include: Sequence[str] = (), message: str | None = None
) -> str:
    """Push the output folder of a run to the Hub in one commit, and verify it.

    All checks are made before anything is sent.

    Args:
        folder: `output_dir` of a run.
        destination: repository, branch and token.
        include: exports to push, of `onnx` and `tensorrt`.
        message: commit message. Default: "Push with hfvit".

    Returns:
        The URL of the commit or the pull request.

    Raises:
        HubError: the push failed; after a failure of the connection or the Hub, the message has the command to repeat.
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
        raise HubError(f"{error}\n{folder} is unchanged. Try again with: {again}") from error


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
    try:
        user = api.whoami()
        repo_id = destination.repo_id
        repo_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
        owner = repo_id.split("/")[0]
        role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
        if role == "read":
            raise HubError(f"The token of {user['name']} can only read. {LOG_IN}")
        namespaces = [user["name"], *(org.get("name") for org in user.get("orgs") or [])]
        if owner not in namespaces and not destination.create_pr:
            raise HubError(
                f"{repo_id}: the token belongs to {user['name']}, who cannot write to {owner}. Push to"
                f" {user['name']}/{repo_id.split('/')[1]}, or open a pull request with --create_pr."
            )
        if api.repo_exists(repo_id):
            if destination.private and not api.model_info(repo_id).private:
                raise PushArgumentError(f"--private: {repo_id} is public. Only a new repository can be made private.")
        else:
            _check_new(api, repo_id, destination.create_pr)
    except (HfHubHTTPError, *_CONNECTION) as error:
        raise HubError(_explain(error, destination.repo_id)) from error
    return replace(destination, repo_id=repo_id, token=token)


def _check_weights(folder: str | Path, export: str) -> None:
    """Raise `PushArgumentError` if an export has other weights than the checkpoint."""
    recorded = ExportRecord.load(Path(folder).expanduser() / export).weights_sha256
    if recorded is None:
        return
    from hfvit.export.onnx import weights_sha256
    from hfvit.inference.classifier import load_classifier

    if weights_sha256(load_classifier(folder, device="cpu").backend.model.float()) != recorded:
        raise PushArgumentError(
            f"--include {export}: the weights of {folder}/{export} differ from the checkpoint's. Export it again."
        )


def _check_new(api: HfApi, repo_id: str, create_pr: bool) -> None:
    """Raise `PushArgumentError` if the repository `repo_id` should not be created."""
    if create_pr:
        raise PushArgumentError(f"--create_pr: no repository {repo_id}. Push without --create_pr to create it.")
    for kind, name in (("dataset", "data set"), ("space", "space")):
        if api.repo_exists(repo_id, repo_type=kind):
            raise PushArgumentError(f"repository: {repo_id} is a {name}. Choose another name for the model.")


def _send(folder: str | Path, destination: Destination, include: tuple[str, ...], message: str | None) -> str:
    repo_id = destination.repo_id
    api = HfApi(token=destination.token, library_name="hfvit")
    try:
        if not destination.create_pr:
            if not api.repo_exists(repo_id):  # a fine-grained token may not be allowed to create repositories
                api.create_repo(repo_id, private=destination.private, exist_ok=True)
            if destination.revision:
                api.create_branch(repo_id, branch=destination.revision, exist_ok=True)
        hub_files = api.list_repo_files(repo_id, revision=destination.revision)
        files = files_to_push(folder, repo_id, include, _download_card(destination, hub_files))
        print(f"pushing {len(files)} files, {size(sum(file.bytes for file in files))}, to {repo_id}", flush=True)
        operations = [CommitOperationAdd(file.path, file.source) for file in files]
        # Files of an earlier export would be mistaken for exports of this model.
        sent = {file.path for file in files}
        folders = tuple(f"{name}/" for name in include)
        stale = [path for path in hub_files if path.startswith(folders) and path not in sent]
        operations += [CommitOperationDelete(path) for path in stale]
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=message or "Push with hfvit",
            revision=destination.revision,
            create_pr=destination.create_pr,
        )
    except (HfHubHTTPError, *_CONNECTION, RuntimeError, OSError, ValueError) as error:
        raise HubError(_explain(error, repo_id)) from error
    for name in exports_left_out(folder, include):
        _print_note(f"{name}/ was not pushed; push it with --include {name}")
    for name in sorted({path.split("/")[0] for path in hub_files} & (set(EXPORTS) - set(include))):
        _print_note(f"{repo_id} still has {name}/ of an earlier push; replace it with --include {name}")
    url = commit.pr_url or commit.commit_url
    verify_push(folder, repo_id, commit.oid, destination.token, url)
    return url


def _download_card(destination: Destination, hub_files: list[str]) -> str:
    """Return the repository's README.md, empty if it has none."""
    if "README.md" not in hub_files:
        return ""
    with tempfile.TemporaryDirectory(prefix="hfvit-") as cache:
        path = hf_hub_download(
            destination.repo_id, "README.md", revision=destination.revision, token=destination.token, cache_dir=cache
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


def listing(files: list[PushedFile]) -> str:
    """Format the files and their sizes as a table, for a dry run."""
    rows = [(file.path, size(file.bytes)) for file in files]
    return "\n".join(aligned([*rows, (f"{len(files)} files", size(sum(file.bytes for file in files)))]))


def _explain(error: Exception, repo_id: str) -> str:
    """Explain an exception of huggingface_hub, or its first cause that is one."""
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
    if status is not None and status >= 500:
        return f"The Hub failed repeatedly with status {status}. See status.huggingface.co."
    return f"The Hub rejected the request: {one_line(error)}"


def _print_note(text: str) -> None:
    print(f"hfvit: {text}", file=sys.stderr)
