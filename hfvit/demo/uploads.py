"""Limits on requests to the Gradio app: upload size, routes, no paths and URLs."""

import os
import re
import stat
from abc import ABCMeta
from pathlib import Path

from hfvit.data.open_image import UPLOAD_LIMITS

API = "/gradio_api/"
# The other routes of Gradio fetch URLs (proxy=), start ffmpeg (process_recording) or are for developers.
ROUTES = (
    "api", "app_id", "call", "cancel", "config", "file=", "heartbeat", "info", "login_check", "openapi.json", "queue",
    "reset", "run", "startup-events", "theme.css", "token", "upload", "upload_progress", "user",
)  # fmt: skip
UPLOAD_ROUTE = f"{API}upload"
FRAMING_BYTES = 64 * 1024  # allowance for the multipart framing of a file
MAX_JSON_BYTES = 256 * 1024
URL = re.compile(r"[a-zA-Z][\w+.-]+:")  # a scheme has two letters or more, a Windows drive has one


class RequestGuard:
    """ASGI middleware that rejects other routes than `ROUTES` and large bodies.

    A body needs a Content-Length header.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        status = rejection_status(scope["path"], dict(scope["headers"])) if scope["type"] == "http" else None
        if status is None:
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


def rejection_status(path: str, headers: dict[bytes, bytes]) -> int | None:
    """Return the HTTP status to reject a request with, None to accept it."""
    if not is_allowed_route(path):
        return 404
    if b"transfer-encoding" in headers:
        return 411  # the server enforces Content-Length only
    limit = UPLOAD_LIMITS.max_bytes + FRAMING_BYTES if path.rstrip("/") == UPLOAD_ROUTE else MAX_JSON_BYTES
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or int(length) > limit:
        return 413
    return None


def is_allowed_route(path: str) -> bool:
    """Return whether the app serves a route.

    Below `/gradio_api/`, only `ROUTES` are served, and `file=` only with a path, not a URL.
    """
    if not path.startswith(API):
        return not re.match(r"/+(gradio_api|monitoring|dev|file|proxy)\b", path)
    route = path.removeprefix(API)
    first = re.match(r"[\w.-]*=?", route)[0]
    if first == "file=" and re.match(rf"{URL.pattern}|[/\\]{{2}}", route.removeprefix(first)):
        return False
    return first in ROUTES


def read_upload(path: str | None, folder: str | Path) -> bytes:
    """Read a file that a visitor has uploaded.

    Args:
        path: path in the request, not trusted.
        folder: upload folder.

    Raises:
        ValueError: the path is not a regular file in the folder, or larger than `UPLOAD_LIMITS.max_bytes`.
    """
    root = os.path.realpath(folder)
    try:
        file = os.path.realpath(path or "")
        is_inside = os.path.commonpath([root, file]) == root
        is_file = is_inside and stat.S_ISREG(os.stat(file).st_mode)
    except (OSError, ValueError, TypeError):
        is_file = False
    if not is_file:
        raise ValueError("not an uploaded file")
    with open(file, "rb") as opened:
        content = opened.read(UPLOAD_LIMITS.max_bytes + 1)
    UPLOAD_LIMITS.check_bytes(len(content))
    return content


def upload_component(gradio) -> type:
    """Create a subclass of `gradio.Image` whose value is the bytes of the upload.

    It rejects URLs. A class and not an instance, since Gradio creates a new component per session when an example is
    clicked.
    """

    def upload_error() -> Exception:
        megabytes = UPLOAD_LIMITS.max_bytes // 2**20
        return gradio.Error(f"Upload an image file of at most {megabytes} MiB.", print_exception=False)

    def check_no_url(name) -> None:
        if name is not None and URL.match(str(name)):
            raise upload_error()

    def preprocess(self, payload) -> bytes | None:
        if payload is None:
            return None
        try:
            return read_upload(payload.path, self.GRADIO_CACHE)
        except ValueError:  # includes ImageLimitError
            raise upload_error() from None

    def move_resource_to_block_cache(self, url_or_file_path):
        check_no_url(url_or_file_path)
        return gradio.Image.move_resource_to_block_cache(self, url_or_file_path)

    async def async_move_resource_to_block_cache(self, url_or_file_path):
        check_no_url(url_or_file_path)
        return await gradio.Image.async_move_resource_to_block_cache(self, url_or_file_path)

    attributes = {
        "__module__": __name__,
        "is_template": True,  # use the front end of gradio.Image
        "preprocess": preprocess,
        "move_resource_to_block_cache": move_resource_to_block_cache,
        "async_move_resource_to_block_cache": async_move_resource_to_block_cache,
    }
    # No class statement: ComponentMeta.__new__ would write a .pyi file next to this module (gradio 6.31).
    return ABCMeta.__new__(type(gradio.Image), "Upload", (gradio.Image,), attributes)
