"""Malicious requests to a running `hfvit demo`."""

import base64
import http.client
import io
import json
import os
import struct
import time
import zlib
from urllib.parse import quote

import numpy as np
import psutil
import pytest
from helpers.commands import ROOT, free_port, running_command
from helpers.images import LABELS, colored_image
from helpers.models import build_model
from helpers.raw_server import raw_server, response
from helpers.recipes import ARCHITECTURE, MICRO
from PIL import Image

import hfvit
from hfvit.data.open_image import UPLOAD_LIMITS
from hfvit.demo.uploads import MAX_JSON_BYTES, is_allowed_route, read_upload, rejection_status, upload_component

pytest.importorskip("gradio")
META = {"meta": {"_type": "gradio.FileData"}}
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"


class Visitor:
    """HTTP client that sends arbitrary requests to the app."""

    def __init__(self, port: int):
        self.port = port

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            fields = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, fields)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def send(self, path: str, value) -> tuple[int, bytes]:
        return self.ask("POST", path, json.dumps(value).encode(), Content_Type="application/json")

    def upload(self, content: bytes, name: str = "photo.png") -> str | None:
        """Upload a file and return its path on the server, None if it is rejected."""
        head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        status, body = self.ask(
            "POST",
            "/gradio_api/upload",
            head + content + b"\r\n--b--\r\n",
            Content_Type="multipart/form-data; boundary=b",
        )
        return json.loads(body)[0] if status == 200 else None

    def classify(self, payload) -> dict[str, float] | None:
        """Return the predicted probabilities, None if the payload is rejected."""
        status, body = self.send("/gradio_api/call/classify", {"data": [payload]})
        if status != 200:
            return None
        _, body = self.ask("GET", f"/gradio_api/call/classify/{json.loads(body)['event_id']}")
        return answer_of(body)

    def classify_directly(self, payload) -> dict[str, float] | None:
        status, body = self.send("/gradio_api/run/classify", {"data": [payload]})
        return probabilities(json.loads(body)["data"]) if status == 200 else None

    def classify_in_session(self, payload, session: str) -> dict[str, float] | None:
        _, body = self.ask("GET", "/config")
        functions = json.loads(body)["dependencies"]
        [number] = [function["id"] for function in functions if function["api_name"] == "classify"]
        self.send("/gradio_api/queue/join", {"data": [payload], "fn_index": number, "session_hash": session})
        _, body = self.ask("GET", f"/gradio_api/queue/data?session_hash={session}")
        for line in body.decode().splitlines():
            event = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if event.get("msg") == "process_completed":
                return probabilities(event["output"]["data"]) if event["success"] else None
        raise AssertionError(body)


def answer_of(events: bytes) -> dict[str, float] | None:
    kind, _, data = events.decode().partition("\ndata: ")
    return probabilities(json.loads(data.split("\n")[0])) if kind == "event: complete" else None


def probabilities(data: list) -> dict[str, float]:
    return {entry["label"]: entry["confidence"] for entry in data[0]["confidences"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, an example image, and a private image."""
    folder = tmp_path_factory.mktemp("uploads")
    build_model(LABELS, architecture=ARCHITECTURE, image_size=16, timm_kwargs=MICRO).save_pretrained(folder / "model")
    colored_image(1, np.random.default_rng(0), size=40).save(folder / "example.png")
    (folder / "private").mkdir()
    colored_image(2, np.random.default_rng(0), size=40).save(folder / "private" / "photo.png")
    program = folder / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {folder / 'started'}\n")
    program.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def app(place):
    """The running command, started in the folder with the private image."""
    port = free_port()
    words = ["demo", place / "model", "--port", port, "--threads", 1, "--examples", place / "example.png"]
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    options = {"cwd": place / "private", "log": place / "log", "PATH": path, "TMPDIR": str(place)}
    with running_command("hfvit", *words, **options) as (process, output):
        assert output.readline()
        yield process, Visitor(port)
        process.terminate()
        assert process.wait(30) == 0
    assert not list(place.glob("hfvit-demo-*"))  # the uploads are deleted
    assert not list((ROOT / "hfvit").rglob("*.pyi"))  # gradio writes one for each class of a component


def png_head(width: int, height: int) -> bytes:
    """Return a PNG with this size in its header and no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.integration
@pytest.mark.parametrize("way", ["classify", "classify_directly"])
@pytest.mark.parametrize("more", [{}, META], ids=["plain", "meta"])
def test_uploaded_images_are_classified(app, place, way, more):
    _, visitor = app
    path = visitor.upload((place / "private" / "photo.png").read_bytes())
    (wanted,) = hfvit.load_classifier(place / "model").predict([place / "private" / "photo.png"])
    assert getattr(visitor, way)({"path": path, **more}) == pytest.approx(wanted, abs=1e-6)


PLACES = [
    "{private}/photo.png",
    "photo.png",
    "./photo.png",
    "../private/photo.png",
    "{uploads}/../private/photo.png",
    "file://{private}/photo.png",
    "file:{private}/photo.png",
    "/etc/hostname",
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/environ",
    "{uploads}",
    "{canary}/secret.png",
    "{upper}/secret.png",
    "http:{canary_host}/secret.png",
    "//{canary_host}/secret.png",
    "https://{canary_host}/secret.png",
    "ftp://{canary_host}/secret.png",
    "data:image/png;base64,{base64}",
    "hf://datasets/a/b/c.png",
    "~/photo.png",
    "",
    "a\0b",
    "x" * 5000,
    "\ud800",
    5,
    ["{private}/photo.png"],
    {"path": "{private}/photo.png"},
]


@pytest.mark.integration
@pytest.mark.parametrize("more", [{}, META, {"is_stream": True}, META | {"is_stream": True}], ids=str)
def test_paths_and_urls_in_requests_are_rejected(app, place, more):
    _, visitor = app
    private = place / "private"
    picture = (private / "photo.png").read_bytes()
    [uploads] = place.glob("hfvit-demo-*")
    with raw_server(lambda connection, path: connection.sendall(response(picture))) as canary:
        values = {
            "private": str(private),
            "uploads": str(uploads),
            "canary": canary.url,
            "upper": canary.url.replace("http", "HTTP"),
            "canary_host": canary.url.removeprefix("http://"),
            "base64": base64.b64encode(picture).decode(),
        }

        def filled(value):
            if isinstance(value, str):
                return value.format(**values)
            return json.loads(json.dumps(value).replace("{private}", str(private)))

        for place_named in map(filled, PLACES):
            for payload in (
                {"path": place_named, **more},
                {"path": None, "url": place_named, **more},
                {"url": place_named, **more},
                {"path": str(uploads), "url": place_named, "orig_name": place_named, **more},
                {"path": {"path": place_named, **more}, **more},
                place_named,
                [place_named],
            ):
                assert visitor.classify(payload) is None, payload
            assert visitor.classify_directly({"path": place_named, **more}) is None, place_named
        for route in ("file=", "file/", "proxy=", "file=/", "file=%2F", "stream/", "upload?url="):
            for url in (canary.url, quote(canary.url, safe=""), f"/{canary.url}"):
                status, body = visitor.ask("GET", f"/gradio_api/{route}{url}")
                assert status >= 400
                assert picture not in body
                status, body = visitor.ask("GET", f"/{route}{url}")
                assert picture not in body
        assert canary.requests == []


@pytest.mark.integration
def test_files_of_the_server_are_not_served(app, place):
    _, visitor = app
    private = place / "private" / "photo.png"
    for path in (
        private,
        "photo.png",
        "/etc/hostname",
        f"{place}/hfvit-demo-x/../private/photo.png",
        f"file://{private}",
    ):
        status, body = visitor.ask("GET", f"/gradio_api/file={path}")
        assert status in (403, 404)
        assert private.read_bytes() not in body
    status, body = visitor.ask("GET", f"/gradio_api/file={place / 'example.png'}")
    assert (status, body) == (200, (place / "example.png").read_bytes())


@pytest.mark.integration
def test_bytes_are_checked_before_they_are_decoded(app, place):
    process, visitor = app
    memory = psutil.Process(process.pid).memory_info
    before = memory().rss
    frame = io.BytesIO()
    Image.new("P", (1, 1)).save(frame, "GIF")
    gif = frame.getvalue()
    start = gif.index(b",")
    frames = gif[:6] + struct.pack("<HH", 5000, 5000) + gif[10:start] + gif[start:-1] * 300_000 + b";"
    refused = {
        "PostScript": POSTSCRIPT,
        "bomb": png_head(30_000, 30_000),
        "large": png_head(6000, 6000),
        "strip": png_head(30_000, 1),
        "text": b"not a picture",
        "empty": b"",
    }
    for name, content in refused.items():
        for file in ("photo.png", "photo.eps", "photo"):
            path = visitor.upload(content, file)
            begin = time.monotonic()
            assert path is None or visitor.classify({"path": path, **META}) is None, name
            assert time.monotonic() - begin < 10
    assert visitor.classify({"path": visitor.upload(frames), **META}) is not None
    assert visitor.upload(bytes(UPLOAD_LIMITS.max_bytes + 1)) is None
    assert visitor.send("/gradio_api/call/classify", {"data": ["x" * MAX_JSON_BYTES]})[0] == 413
    assert visitor.ask("POST", "/gradio_api/upload", iter([b"x"]))[0] == 411
    assert memory().rss - before < 400 * 2**20
    assert not (place / "started").exists()


@pytest.mark.integration
def test_requests_after_a_click_on_an_example_are_limited_too(app, place):
    """A click on an example makes Gradio create a new component for the session."""
    _, visitor = app
    session = "a-session"
    status, body = visitor.send("/gradio_api/run/load_example", {"data": [0], "session_hash": session})
    assert status == 200, body
    private = place / "private" / "photo.png"
    assert visitor.classify_in_session({"path": str(private), **META}, session) is None
    assert visitor.classify_in_session({"path": str(private)}, session) is None
    assert visitor.classify_in_session({"path": visitor.upload(POSTSCRIPT), **META}, session) is None
    with raw_server(lambda connection, path: connection.sendall(response(private.read_bytes()))) as canary:
        assert visitor.classify_in_session({"path": f"{canary.url}/a.png", **META}, session) is None
        assert canary.requests == []
    assert visitor.classify_in_session({"path": visitor.upload(private.read_bytes()), **META}, session)
    assert not (place / "started").exists()


def test_new_instance_of_the_upload_component_has_the_limits():
    """`gradio.Examples` returns updates, for which Gradio creates an instance of the component's class."""
    gradio = pytest.importorskip("gradio")
    upload = upload_component(gradio)
    again = upload().__class__(label="Picture")
    assert again.preprocess(None) is None
    assert again.get_block_name() == "image"
    with pytest.raises(gradio.Error):
        again.preprocess(gradio.data_classes.ImageData(path=__file__))
    with pytest.raises(gradio.Error):
        again.move_resource_to_block_cache("http://127.0.0.1:1/a.png")


@pytest.mark.parametrize(
    ("path", "is_allowed"),
    [
        ("/", True), ("/config", True), ("/assets/index.js", True), ("/theme.css", True), ("/gradio_api/info", True),
        ("/gradio_api/call/classify", True), ("/gradio_api/queue/join", True), ("/gradio_api/upload", True),
        ("/gradio_api/file=/tmp/a/b.webp", True), ("/gradio_api/file=C:\\a.webp", True),
        ("/gradio_api/file=http://127.0.0.1/", False), ("/gradio_api/file=HTTPS://x", False),
        ("/gradio_api/file=//host/share", False), ("/gradio_api/proxy=http://x", False),
        ("/gradio_api/process_recording", False), ("/gradio_api/component_server", False),
        ("/gradio_api/vibe-edit/", False), ("/gradio_api/custom_component/x", False), ("/gradio_api/", False),
        ("//gradio_api/proxy=http://x", False), ("/monitoring", False), ("/dev/reload", False),
    ],
)  # fmt: skip
def test_is_allowed_route(path, is_allowed):
    assert is_allowed_route(path) == is_allowed


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {}, None),
        ("/gradio_api/upload", {b"content-length": b"20000000"}, None),
        ("/gradio_api/upload", {b"content-length": b"30000000"}, 413),
        ("/gradio_api/upload", {b"transfer-encoding": b"chunked"}, 411),
        ("/gradio_api/queue/join", {b"content-length": b"1000"}, None),
        ("/gradio_api/queue/join", {b"content-length": b"1000000"}, 413),
        ("/gradio_api/queue/join", {b"content-length": b"-1"}, 413),
        ("/login", {b"content-length": b"1000000"}, 413),
    ],
)
def test_rejection_status_limits_bodies(path, headers, status):
    assert rejection_status(path, headers) == status


def test_read_upload_rejects_files_outside_its_folder(tmp_path):
    folder = tmp_path / "uploads"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "photo.png").write_bytes(b"photo")
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "large").touch()
    os.truncate(folder / "large", UPLOAD_LIMITS.max_bytes + 1)
    os.mkfifo(folder / "pipe")
    (tmp_path / "uploads-of-another").write_bytes(b"secret")
    assert read_upload(str(folder / "a" / "photo.png"), folder) == b"photo"
    for path in (
        tmp_path / "secret", folder / "link", folder / "large", folder / "pipe", folder, folder / "a", folder / "b",
        folder / ".." / "secret", tmp_path / "uploads-of-another", "secret", "", None, "a\0", "x" * 5000,
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"not an uploaded file|limit of"):
            read_upload(path if path is None else str(path), folder)
