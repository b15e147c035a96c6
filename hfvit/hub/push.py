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
from hfvit.hub.files import EXPORTS, PushedFile, files_to_push, left_out
from hfvit.utils.formatting import aligned, size

LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write (huggingface.co/settings/tokens)."
_CHECK_IMAGES = 4
_TOLERANCE = 1e-4  # of the largest logit; the same file on the same processor gives the same bits
_CONNECTION = (httpx2.TransportError, OfflineModeIsEnabled, ConnectionError, TimeoutError)


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
    not at all. Raises `HubError`, with the command to repeat.
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
        raise HubError(f"{error}\n{folder} is as it was; to try again: {again}") from error


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
    try:
        user = api.whoami()
        repo_id = destination.repo_id
        repo_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
        owner = repo_id.split("/")[0]
        role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
        if role == "read":
            raise HubError(f"The token of {user['name']} may only read. {LOG_IN}")
        mine = [user["name"], *(org.get("name") for org in user.get("orgs") or [])]
        if owner not in mine and not destination.create_pr:
            raise HubError(
                f"{repo_id}: the token is of {user['name']}, who cannot write for {owner}. Push to"
                f" {user['name']}/{repo_id.split('/')[1]}, or open a pull request with --create_pr."
            )
        if api.repo_exists(repo_id):
            if destination.private and not api.model_info(repo_id).private:
                raise PushArgumentError(f"--private: {repo_id} is public. Only a new repository can be made private.")
        else:
            _check_new(api, repo_id, destination.create_pr)
    except (HfHubHTTPError, *_CONNECTION) as error:
        raise HubError(_why(error, destination.repo_id)) from error
    return replace(destination, repo_id=repo_id, token=token)


def _check_weights(folder: str | Path, export: str) -> None:
    """Raise `HubError` where an export in `folder` is of other weights: those of an earlier training."""
    recorded = ExportRecord.load(Path(folder).expanduser() / export).weights_sha256
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
        if api.repo_exists(repo_id, repo_type=kind):
            raise PushArgumentError(f"repository: {repo_id} is a {name}. Choose another name for the model.")


def _send(folder: str | Path, destination: Destination, include: tuple[str, ...], message: str | None) -> str:
    repo_id = destination.repo_id
    api = HfApi(token=destination.token, library_name="hfvit")
    try:
        if not destination.create_pr:
            if not api.repo_exists(repo_id):  # a token for one repository may not make any
                api.create_repo(repo_id, private=destination.private, exist_ok=True)
            if destination.revision:
                api.create_branch(repo_id, branch=destination.revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=destination.revision)
        files = files_to_push(folder, repo_id, include, _card_there(destination, there))
        print(f"pushing {len(files)} files, {size(sum(file.bytes for file in files))}, to {repo_id}", flush=True)
        operations = [CommitOperationAdd(file.path, file.source) for file in files]
        # What an earlier export left in its folder would pass for this model's.
        sent = {file.path for file in files}
        stale = [path for path in there if path.startswith(tuple(f"{name}/" for name in include)) and path not in sent]
        operations += [CommitOperationDelete(path) for path in stale]
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=message or "Push with hfvit",
            revision=destination.revision,
            create_pr=destination.create_pr,
        )
    except (HfHubHTTPError, *_CONNECTION, RuntimeError, OSError, ValueError) as error:
        raise HubError(_why(error, repo_id)) from error
    for name in left_out(folder, include):
        _say(f"{name}/ was not pushed; --include {name} does")
    for name in sorted({path.split("/")[0] for path in there} & (set(EXPORTS) - set(include))):
        _say(f"{repo_id} still has {name}/ of an earlier push; if the weights are new, push it with --include {name}")
    address = commit.pr_url or commit.commit_url
    compare(folder, repo_id, commit.oid, destination.token, address)
    return address


def _card_there(destination: Destination, there: list[str]) -> str:
    """The repository's README.md as it is now, with what users wrote into it."""
    if "README.md" not in there:
        return ""
    with tempfile.TemporaryDirectory(prefix="hfvit-") as cache:
        path = hf_hub_download(
            destination.repo_id, "README.md", revision=destination.revision, token=destination.token, cache_dir=cache
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
    if status is not None and status >= 500:
        return f"The Hub failed with status {status} and went on failing; its state is on status.huggingface.co."
    return f"The Hub refused: {one_line(error)}"


def _say(sentence: str) -> None:
    print(f"hfvit: {sentence}", file=sys.stderr)
