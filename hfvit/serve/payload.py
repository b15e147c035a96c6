"""Read the images of a request: raw bytes, multipart form or JSON with base64."""

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from hfvit.data.open_image import UPLOAD_LIMITS, ImageLimits
from hfvit.errors import one_line

JSON, MULTIPART = "application/json", "multipart/form-data"
BINARY = "application/octet-stream"
MAX_COMMAS = 16  # in a JSON body, beside those between the images
FRAMING_BYTES = 64 * 1024  # allowance for the framing of a form or of JSON
PART_BYTES = 64 * 1024  # of a form, parsed at a time

# The request body in the OpenAPI document, since the route reads it itself.
REQUEST_BODY = {
    "required": True,
    "content": {
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        BINARY: {"schema": {"type": "string", "format": "binary"}},
        MULTIPART: {
            "schema": {
                "type": "object",
                "required": ["images"],
                "properties": {
                    "images": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}
                },
            }
        },
        JSON: {
            "schema": {
                "type": "object",
                "required": ["inputs"],
                "additionalProperties": False,
                "properties": {
                    "inputs": {
                        "description": "base64 of an image file, or a list of them",
                        "anyOf": [
                            {"type": "string", "format": "byte"},
                            {"type": "array", "minItems": 1, "items": {"type": "string", "format": "byte"}},
                        ],
                    },
                    "parameters": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {"top_k": {"type": "integer", "minimum": 1}},
                    },
                },
            }
        },
    },
}


@dataclass(frozen=True)
class RequestLimits:
    """Limits of a request.

    Args:
        max_bytes: size of an image file and, with an allowance for the framing, of a request body, in bytes.
        max_images: images per request.
        image: limits of each image.
    """

    max_bytes: int = UPLOAD_LIMITS.max_bytes
    max_images: int = 32
    image: ImageLimits = UPLOAD_LIMITS

    @property
    def max_body(self) -> int:
        """Return the largest request body in bytes; base64 takes four bytes for three."""
        return self.max_bytes * 4 // 3 + FRAMING_BYTES


class RequestError(Exception):
    """Error of a request.

    Args:
        status: HTTP status.
        detail: message for the client.
        headers: further headers of the response.
    """

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None):
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers


@dataclass
class PredictRequest:
    """Hold the image files of a request.

    Attributes:
        files: content of each image file.
        is_one: whether the answer is that of one image instead of a list with one answer per image.
        top_k: number of classes, None for the server's default.
    """

    files: list[bytes]
    is_one: bool
    top_k: int | None = None


async def read_request(request, limits: RequestLimits) -> PredictRequest:
    """Read and check the body of a request.

    Args:
        request: Starlette request.
        limits: limits of the request.

    Raises:
        RequestError: the body is too large or malformed.
    """
    media_type = request.headers.get("content-type", BINARY).partition(";")[0].strip().lower()
    if media_type not in (JSON, MULTIPART, BINARY) and not media_type.startswith("image/"):
        raise RequestError(415, f"content-type: must be image/*, {BINARY}, {MULTIPART} or {JSON}.")
    body = await _read_body(request, limits.max_body)
    if media_type == JSON:
        found = await asyncio.to_thread(parse_json, body, limits.max_images)
    elif media_type == MULTIPART:
        found = await _parse_form(request.headers, body, limits)
    else:
        found = PredictRequest([body], is_one=True)
    if len(found.files) > limits.max_images:
        raise RequestError(413, f"must have at most {limits.max_images} images, got {len(found.files)}.")
    if not all(found.files):
        raise RequestError(422, "an image is empty.")
    return found


async def _read_body(request, limit: int) -> bytes:
    # The connection is closed, since the rest of the body is not read.
    too_large = RequestError(413, f"the body must have at most {limit:,} bytes.", {"Connection": "close"})
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise too_large
    from starlette.requests import ClientDisconnect

    parts = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise too_large
            parts.append(part)
    except ClientDisconnect:
        raise RequestError(400, "the client has disconnected.") from None
    return b"".join(parts)


async def _parse_form(headers, body: bytes, limits: RequestLimits) -> PredictRequest:
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    async def stream() -> AsyncIterator[bytes]:
        for start in range(0, len(body), PART_BYTES):
            yield body[start : start + PART_BYTES]
            await asyncio.sleep(0)  # a body full of boundaries takes seconds, in which other requests are answered

    parser = MultiPartParser(headers, stream(), max_files=limits.max_images, max_fields=0)
    parser.spool_max_size = limits.max_body  # in memory, as the body is; Starlette writes 1 MiB or more to a file
    try:
        form = await parser.parse()
    except MultiPartException as error:
        too_many = error.message.startswith("Too many files")
        raise RequestError(413 if too_many else 422, f"the form cannot be read: {error.message}") from None
    except UnicodeError as error:  # of a charset such as `undefined`
        raise RequestError(422, f"the form cannot be read: {one_line(error)}") from None
    files = [await value.read() for _, value in form.multi_items() if isinstance(value, UploadFile)]
    await form.close()
    if not files:
        raise RequestError(422, "images: the form must have at least one file.")
    return PredictRequest(files, is_one=False)


def parse_json(body: bytes, max_images: int) -> PredictRequest:
    """Parse a JSON request of Hugging Face's Inference API.

    `{"inputs": base64 or a list of it, "parameters": {"top_k": 3}}`

    Args:
        body: body of the request.
        max_images: largest number of images.

    Raises:
        RequestError: the body has another structure, or too many values.
    """
    # Millions of small values would take seconds, in which no other thread runs, and many times their size in memory.
    # base64 has no commas; a data URL, which is refused below, has one.
    if body.count(b",") > 2 * max_images + MAX_COMMAS:
        raise RequestError(413, f"inputs: must have at most {max_images} images.")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError(422, "the body is not valid JSON.") from None
    if not isinstance(content, dict) or not {"inputs"} <= set(content) <= {"inputs", "parameters"}:
        raise RequestError(422, "the body must be an object with inputs and, optionally, parameters.")
    inputs = content["inputs"]
    is_one = isinstance(inputs, str)
    images = [inputs] if is_one else inputs
    if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
        raise RequestError(422, "inputs: must be a base64 string, or a list of at least one.")
    return PredictRequest([_decode(image) for image in images], is_one, _top_k(content.get("parameters", {})))


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(422, "inputs: must be base64 of image files; URLs and paths are not opened.") from None


def _top_k(parameters: Any) -> int | None:
    if not isinstance(parameters, dict) or not set(parameters) <= {"top_k"}:
        raise RequestError(422, "parameters: must be an object with no other key than top_k.")
    top_k = parameters.get("top_k")
    if "top_k" in parameters and (type(top_k) is not int or top_k < 1):
        raise RequestError(422, "top_k: must be a positive integer.")
    return top_k
