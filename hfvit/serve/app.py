"""The HTTP interface: /predict, /health, /metrics and the OpenAPI page."""

import asyncio
import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np

import hfvit
from hfvit.data.decode import read_bytes
from hfvit.data.open_image import UPLOAD_LIMITS, open_image
from hfvit.errors import DataError, HFViTError, ModelError, mask_credentials, one_line, printable
from hfvit.inference.classifier import Classifier, PreparedImage
from hfvit.serve.batching import Budget, DynamicBatcher, QueueFullError, Reservation
from hfvit.serve.metrics import ServerMetrics
from hfvit.serve.payload import REQUEST_BODY, RequestError, RequestLimits, read_request
from hfvit.utils.environment import cores
from hfvit.utils.optional import import_optional

logger = logging.getLogger(__name__)

TOP_K = 5
DECODED_IMAGES = 16  # of `max_pixels`, in memory for a graph with preprocessing
DESCRIPTION = """\
`POST /predict` classifies one image (raw bytes, or `inputs` as a base64 string) or several (a multipart form, or
`inputs` as a list of base64 strings). The answer for an image is a list of `{"label", "score"}` by decreasing score,
as from Hugging Face's Inference API; for several images it is a list of such lists.
"""
CLASSES = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["label", "score"],
        "properties": {"label": {"type": "string"}, "score": {"type": "number"}},
    },
}
ANSWER = {"application/json": {"schema": {"anyOf": [CLASSES, {"type": "array", "items": CLASSES}]}}}
ERRORS = {
    408: "the body did not arrive in time",
    413: "the body is too large, or has too many images or pixels",
    415: "unsupported content type",
    422: "a malformed request, or an image that cannot be read or exceeds a limit",
    429: "the queue is full; retry after `Retry-After` seconds",
    500: "the model failed",
    504: "the images were not classified in time",
}


@dataclass(frozen=True)
class ServerOptions:
    """Options of the server.

    Args:
        max_batch_size: largest number of images per forward pass; None is 16 on a CPU and 128 on a GPU.
        max_delay: longest time that an image waits for others while the model is idle, in seconds.
        queue_size: largest number of images being read, waiting or running; further ones are rejected.
        timeout: longest time to receive a request, and to classify its images, in seconds.
        top_k: classes per image; None is 5, or those that reach their thresholds.
        limits: limits of a request.
    """

    max_batch_size: int | None = None
    max_delay: float = 0.005
    queue_size: int = 128
    timeout: float = 30.0
    top_k: int | None = None
    limits: RequestLimits = field(default_factory=RequestLimits)


def load_libraries():
    """Import the libraries of the extra `serve`; return `prometheus_client`.

    Raises:
        HFViTError: one of them is not installed.
    """
    for name in ("fastapi", "httptools", "python_multipart", "uvicorn"):
        import_optional(name, "serve", "The server")
    return import_optional("prometheus_client", "serve", "The server")


class Predictor:
    """Classify image files in batches.

    Files are decoded and preprocessed in one thread per core, while the model runs in a further thread.

    Args:
        classifier: classifier of images, without texts.
        options: options of the server.
        metrics: metrics to update.
    """

    def __init__(self, classifier: Classifier, options: ServerOptions, metrics: ServerMetrics):
        self.classifier = classifier
        self.options = options
        default = TOP_K if classifier.thresholds is None else None
        self.top_k = options.top_k or default
        self.batcher = DynamicBatcher(
            self.run,
            max_batch_size=options.max_batch_size or classifier.batch_size,
            max_delay=options.max_delay,
            queue_size=options.queue_size,
            on_batch=metrics.observe_batch,
        )
        metrics.follow_queue(self.batcher)
        self.max_pixels = options.limits.image.max_pixels or UPLOAD_LIMITS.max_pixels
        self.decoded = Budget(DECODED_IMAGES * self.max_pixels)
        self._readers = ThreadPoolExecutor(cores(), "images")

    def close(self) -> None:
        """End the threads that read images."""
        self._readers.shutdown(cancel_futures=True)

    def prepare(self, content: bytes, name: str) -> PreparedImage:
        """Decode and preprocess an image file.

        Args:
            content: content of the file.
            name: name of the image in messages.
        """
        return self.classifier.prepare_image(read_bytes(content, name, self.options.limits.image))

    def run(self, prepared: list[PreparedImage]) -> np.ndarray:
        """Compute the logits of prepared images."""
        parts = self._by_pixels(prepared) if self.classifier.backend.takes_pixels else [prepared]
        return np.concatenate([self.classifier.run(self.classifier.collate(part)) for part in parts])

    def _by_pixels(self, prepared: list[PreparedImage]) -> Iterator[list[PreparedImage]]:
        """Divide images of any size into parts of at most `max_pixels`, or one image.

        A graph with preprocessing takes about 35 bytes of memory for each pixel of a batch.
        """
        part: list[PreparedImage] = []
        pixels = 0
        for image in prepared:
            own = math.prod(image.values.shape[:2])
            if part and pixels + own > self.max_pixels:
                yield part
                part = []
                pixels = 0
            part.append(image)
            pixels += own
        yield part

    def pixels(self, content: bytes) -> int:
        """Return the number of pixels of an image file, 0 if it cannot be read."""
        try:
            with open_image(content, self.options.limits.image) as image:
                return image.width * image.height
        except MemoryError:
            raise
        except Exception:  # `prepare` raises it again
            return 0

    async def classify(self, files: list[bytes], places: Reservation, top_k: int | None) -> list[list[dict[str, Any]]]:
        """Classify image files.

        Args:
            files: content of each file.
            places: places in the queue, one for each file.
            top_k: number of classes, None for the server's default.

        Returns:
            `{"label", "score"}` by decreasing score, for each image.

        Raises:
            DataError: a file cannot be read as an image, or exceeds a limit.
            RequestError: the images have too many pixels together.
            ModelError: the model failed, or its logits are not finite.
        """
        loop = asyncio.get_running_loop()
        pixels = 0
        if self.classifier.backend.takes_pixels:  # its decoded images wait in memory as they are
            pixels = sum(await asyncio.gather(*(loop.run_in_executor(self._readers, self.pixels, f) for f in files)))
        if pixels > self.decoded.limit:
            raise RequestError(413, f"the images must have at most {self.decoded.limit:,} pixels, got {pixels:,}.")
        names = [f"image {number}" if len(files) > 1 else "image" for number in range(1, len(files) + 1)]
        async with self.decoded.take(pixels):
            readings = [
                loop.run_in_executor(self._readers, self.prepare, file, name)
                for file, name in zip(files, names, strict=True)
            ]
            try:
                prepared = await asyncio.gather(*readings)
            finally:
                for reading in readings:
                    reading.cancel()  # after an error, those that have not begun
            logits = np.stack(await asyncio.gather(*map(places.submit, prepared)))
        if not np.isfinite(logits).all():
            raise ModelError("the model's logits are NaN or infinite.")
        best = self.classifier.best(logits, top_k or self.top_k)
        return [[{"label": label, "score": score} for label, score in classes.items()] for classes in best]


def build_app(classifier: Classifier, options: ServerOptions | None = None):
    """Build the FastAPI application.

    Args:
        classifier: classifier of images, without texts.
        options: options of the server.

    Raises:
        HFViTError: a library is not installed, or the model needs texts.
    """
    prometheus = load_libraries()
    from fastapi import FastAPI, Query, Request, Response
    from fastapi.exception_handlers import request_validation_exception_handler
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse

    if classifier.text_reader:
        raise HFViTError(f"ARTIFACT: image and text models cannot be served, got {classifier.name}.")
    options = options or ServerOptions()
    metrics = ServerMetrics(prometheus)
    predictor = Predictor(classifier, options, metrics)
    name = printable(Path(classifier.name).name or classifier.name)  # without local folders

    @asynccontextmanager
    async def lifespan(_):
        async with predictor.batcher:
            yield
        predictor.close()

    app = FastAPI(title=name, description=DESCRIPTION, version=hfvit.__version__, lifespan=lifespan)
    app.state.predictor = predictor

    async def answer(request: Request, top_k: int | None) -> list:
        with predictor.batcher.reservation() as places:
            places.add(1)  # before the body is read, which bounds the memory of all bodies
            try:
                async with asyncio.timeout(options.timeout):
                    asked = await read_request(request, options.limits)
            except TimeoutError:
                raise RequestError(408, "the body did not arrive in time.", {"Connection": "close"}) from None
            places.add(len(asked.files) - 1)
            try:
                async with asyncio.timeout(options.timeout):
                    classes = await predictor.classify(asked.files, places, top_k or asked.top_k)
            except TimeoutError:
                raise RequestError(504, "the images were not classified in time.") from None
            return classes[0] if asked.is_one else classes

    @app.post(
        "/predict",
        summary="Classify images",
        responses={200: {"content": ANSWER}} | {status: {"description": text} for status, text in ERRORS.items()},
        openapi_extra={"requestBody": REQUEST_BODY},
    )
    async def predict(
        request: Request,
        top_k: Annotated[int | None, Query(ge=1, description="classes per image [the server's --top_k]")] = None,
    ):
        started = time.perf_counter()
        headers = None
        try:
            status, content = 200, await answer(request, top_k)
        except Exception as error:
            status, detail, headers = describe(error)
            content = {"detail": detail}
        metrics.observe_request(status, time.perf_counter() - started)
        return JSONResponse(content, status, headers)

    @app.exception_handler(RequestValidationError)  # of top_k, before `predict` is called
    async def refuse(request: Request, error: RequestValidationError):
        metrics.observe_request(422, 0.0)
        return await request_validation_exception_handler(request, error)

    @app.get("/health", summary="Whether the server can classify")
    def health():
        is_running = predictor.batcher.is_running
        return JSONResponse({"status": "ok" if is_running else "failed", "model": name}, 200 if is_running else 503)

    @app.get("/metrics", summary="Metrics in Prometheus' text format", response_class=PlainTextResponse)
    def prometheus_metrics():
        text, media_type = metrics.text()
        return Response(text, media_type=media_type)

    return app


def describe(error: Exception) -> tuple[int, str, dict[str, str] | None]:
    """Return HTTP status, message and headers for an exception.

    The message of a server error stays in the log.
    """
    if isinstance(error, RequestError):
        return error.status, error.detail, error.headers
    if isinstance(error, DataError):
        return 422, mask_credentials(str(error)), None
    if isinstance(error, QueueFullError):
        return 429, ERRORS[429], {"Retry-After": str(error.retry_after)}
    logger.error("%s: %s", type(error).__name__, mask_credentials(one_line(error)))
    return 500, ERRORS[500], None
