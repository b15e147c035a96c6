"""What visitors of the app may send: bytes of a limited size, to the routes that the page needs."""

import os
import re
import stat
from abc import ABCMeta
from pathlib import Path

from hfvit.data.open_image import UPLOAD_LIMITS

API = "/gradio_api/"
# Gradio's other routes fetch URLs (proxy=), start ffmpeg (process_recording) or are for developers.
ROUTES = (
    "api", "app_id", "call", "cancel", "config", "file=", "heartbeat", "info", "login_check", "openapi.json", "queue",
    "reset", "run", "startup-events", "theme.css", "token", "upload", "upload_progress", "user",
)  # fmt: skip
UPLOAD_ROUTE = f"{API}upload"
FRAMING_BYTES = 64 * 1024  # of a multipart body, beside the file
MAX_JSON_BYTES = 256 * 1024
URL = re.compile(r"[a-zA-Z][\w+.-]+:")  # of two letters or more: not the drive of a Windows path


class RequestGuard:
    """ASGI middleware that passes on requests to `ROUTES` alone, with bodies of an announced, limited size."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        status = refusal(scope["path"], dict(scope["headers"])) if scope["type"] == "http" else None
        if status is None:
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


def refusal(path: str, headers: dict[bytes, bytes]) -> int | None:
    """The status to refuse a request with; None to pass it on."""
    if not is_allowed_route(path):
        return 404
    if b"transfer-encoding" in headers:
        return 411  # the server holds a body to its announced length
    limit = UPLOAD_LIMITS.max_bytes + FRAMING_BYTES if path.rstrip("/") == UPLOAD_ROUTE else MAX_JSON_BYTES
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or int(length) > limit:
        return 413
    return None


def is_allowed_route(path: str) -> bool:
    """Whether the page needs a route: below `/gradio_api/` those of `ROUTES`, without URLs in the place of files."""
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
        path: what a request names; anything at all.
        folder: of the uploads.

    Raises:
        ValueError: it is no regular file in the folder, or has more than `UPLOAD_LIMITS.max_bytes`.
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
    """`gradio.Image` whose value is the content of the uploaded file, undecoded, and which fetches no URL.

    A class, since Gradio makes another component of it for each session in which an example is clicked.
    """

    def refused() -> Exception:
        megabytes = UPLOAD_LIMITS.max_bytes // 2**20
        return gradio.Error(f"Upload an image file of at most {megabytes} MiB.", print_exception=False)

    def check_no_url(name) -> None:
        if name is not None and URL.match(str(name)):
            raise refused()

    def preprocess(self, payload) -> bytes | None:
        if payload is None:
            return None
        try:
            return read_upload(payload.path, self.GRADIO_CACHE)
        except ValueError:  # ImageLimitError too
            raise refused() from None

    def move_resource_to_block_cache(self, url_or_file_path):
        check_no_url(url_or_file_path)
        return gradio.Image.move_resource_to_block_cache(self, url_or_file_path)

    async def async_move_resource_to_block_cache(self, url_or_file_path):
        check_no_url(url_or_file_path)
        return await gradio.Image.async_move_resource_to_block_cache(self, url_or_file_path)

    attributes = {
        "__module__": __name__,
        "is_template": True,  # its front end is its parent's
        "preprocess": preprocess,
        "move_resource_to_block_cache": move_resource_to_block_cache,
        "async_move_resource_to_block_cache": async_move_resource_to_block_cache,
    }
    # No class statement: ComponentMeta.__new__ writes a .pyi file beside the file that the class is in (gradio 6.31).
    return ABCMeta.__new__(type(gradio.Image), "Upload", (gradio.Image,), attributes)
