"""`hfvit serve`: a real server on a free loopback port."""

import asyncio
import base64
import copy
import io
import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.commands import running_command
from helpers.images import LABELS, colored_image
from helpers.onnx_graphs import expected_logits, write_configs, write_graph
from PIL import Image, ImageOps
from scipy.special import expit, softmax

import hfvit
from hfvit.cli.serve import exit_on_sigterm_as_init
from hfvit.errors import HFViTError

httpx = pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")

from starlette.datastructures import Headers  # noqa: E402

from hfvit.serve.app import ServerOptions  # noqa: E402
from hfvit.serve.payload import RequestLimits, read_request  # noqa: E402
from hfvit.serve.server import listening_socket, serve, uvicorn_server  # noqa: E402

FORM = b'--x\r\nContent-Disposition: form-data; name="\xff"; filename="a"\r\n\r\nx\r\n--x--\r\n'
FORM_TYPE = "multipart/form-data; boundary=x"
SECRET = "hf_" + "a" * 30


@contextmanager
def running(classifier, **options):
    """Run the server in a thread, and yield an HTTP client and the batches as lists of sizes."""
    with listening_socket("127.0.0.1", 0) as bound:
        server = uvicorn_server(classifier, ServerOptions(**options))
        bound.listen()  # requests wait for the thread
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{bound.getsockname()[1]}", timeout=30) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = write_configs(tmp_path_factory.mktemp("served") / "secret_folder")
    write_graph(path / "model.onnx")
    return path


@pytest.fixture(scope="module")
def classifier(folder):
    return hfvit.load_classifier(folder, threads=1)


@pytest.fixture(scope="module")
def server(classifier):
    with running(classifier) as client:
        yield client


class SlowBackend:
    """Run another backend after a pause, and record the sizes of its batches."""

    takes_pixels = False
    device = "cpu"

    def __init__(self, backend, seconds: float = 0.05):
        self.backend = backend
        self.seconds = seconds
        self.sizes = []
        self.release = threading.Event()

    def __call__(self, batch, texts=None):
        self.sizes.append(len(batch))
        time.sleep(self.seconds)
        return self.backend(batch)


def slowed(classifier, seconds: float = 0.05):
    copy = hfvit.Classifier(classifier.backend, classifier.processor, classifier.labels, classifier.name)
    copy.backend = SlowBackend(classifier.backend, seconds)
    return copy


def photo(seed: int) -> Image.Image:
    return colored_image(seed % 3, np.random.default_rng(seed))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def expected(image: Image.Image, top_k: int = 3) -> list[dict]:
    probabilities = softmax(expected_logits(image))
    order = np.argsort(-probabilities)[:top_k]
    return [{"label": LABELS[index], "score": pytest.approx(probabilities[index], abs=1e-5)} for index in order]


def test_each_kind_of_body_gets_the_probabilities_of_its_images(server):
    one, two = photo(1), photo(2)
    raw = server.post("/predict", content=png(one), headers={"Content-Type": "image/png"})
    assert raw.json() == expected(one)
    assert server.post("/predict", content=png(one)).json() == expected(one)
    form = server.post("/predict?top_k=1", files=[("images", png(one)), ("images", png(two))])
    assert form.json() == [expected(one, 1), expected(two, 1)]
    encoded = [base64.b64encode(png(image)).decode() for image in (one, two)]
    assert server.post("/predict", json={"inputs": encoded[0]}).json() == expected(one)
    several = server.post("/predict", json={"inputs": encoded, "parameters": {"top_k": 2}})
    assert several.json() == [expected(one, 2), expected(two, 2)]


def test_client_of_the_inference_api_is_answered(server, monkeypatch):
    from huggingface_hub import InferenceClient, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    client = InferenceClient(model=f"{server.base_url}/predict")
    wanted = expected(photo(4))
    for options in ({}, {"top_k": 2}):
        found = client.image_classification(png(photo(4)), **options)
        assert [{"label": each.label, "score": each.score} for each in found] == wanted[: options.get("top_k", 3)]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"content": b""}, 422),
        ({"content": b"no image"}, 422),
        ({"content": b"%!PS-Adobe-3.0"}, 422),
        ({"content": png(photo(1))[:60]}, 422),
        ({"content": b"x", "headers": {"Content-Type": "text/plain"}}, 415),
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 422),
        ({"content": b"[" * 200_000, "headers": {"Content-Type": "application/json"}}, 422),
        ({"json": {"inputs": "http://127.0.0.1/a.png"}}, 422),
        ({"json": {"inputs": "/etc/passwd"}}, 422),
        ({"json": {"inputs": []}}, 422),
        ({"json": {"inputs": "aaaa", "parameters": {"top_k": True}}}, 422),
        ({"json": {"inputs": "aaaa", "parameters": {"top_k": 0}}}, 422),
        ({"json": {"inputs": "aaaa", "other": 1}}, 422),
        ({"json": {"inputs": ["aaaa"] * 33}}, 413),
        ({"json": {"inputs": [[]] * 1000}}, 413),
        ({"json": {"inputs": "aaaa", "parameters": dict.fromkeys(map(str, range(1000)))}}, 413),
        ({"files": [("images", b"x")] * 33}, 413),
        ({"data": {"images": "x"}, "files": [("a", b"x")]}, 422),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 422),
        ({"content": FORM, "headers": {"Content-Type": f"{FORM_TYPE}; charset=undefined"}}, 422),
        ({"content": FORM, "headers": {"Content-Type": f"{FORM_TYPE}; charset=idna"}}, 422),
        ({"content": png(photo(1)), "params": {"top_k": 0}}, 422),
        ({"content": png(photo(1)), "params": {"top_k": "x"}}, 422),
    ],
)
def test_malformed_request_is_refused(server, folder, request_, status):
    response = server.post("/predict", **request_)
    assert response.status_code == status
    assert response.json()["detail"]
    assert folder.parent.name not in response.text


def test_image_above_a_limit_is_refused(classifier):
    limits = RequestLimits(max_bytes=3000, image=replace(RequestLimits().image, max_bytes=3000, max_pixels=400))
    with running(classifier, limits=limits) as client:
        assert client.post("/predict", content=png(photo(1))).status_code == 200
        assert client.post("/predict", content=png(Image.new("RGB", (21, 20)))).status_code == 422
        assert client.post("/predict", content=b"x" * 3001).status_code == 422
        assert client.post("/predict", content=b"x" * (limits.max_body + 1)).status_code == 413

        def chunked():
            yield from [b"x" * 60_000] * 3

        assert client.post("/predict", content=chunked()).status_code == 413


def answer_of(client, *parts: bytes) -> bytes:
    """Send parts of a request, 0.4 s apart, and return what the server sends until it closes the connection."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as connection:
        for number, part in enumerate(parts):
            time.sleep(0.4 if number else 0)
            with suppress(ConnectionError):
                connection.sendall(part)
        received = b""
        with suppress(ConnectionError):
            while part := connection.recv(65536):
                received += part
        return received


HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize(
    ("parts", "answers"),
    [
        ([], 0),
        ([HEALTH], 0),
        ([HEALTH, b"A: 1\r\n", b"B: 2\r\n", b"C: 3\r\n", b"\r\n"], 0),
        ([HEALTH, b"\r\n"], 1),
        ([HEALTH + b"\r\n", HEALTH], 1),
        ([HEALTH + b"\r\n", HEALTH, b"\r\n" + HEALTH], 2),
    ],
)
def test_connection_is_closed_when_a_request_head_takes_too_long(classifier, monkeypatch, parts, answers):
    monkeypatch.setattr("hfvit.serve.server.KEEP_ALIVE_SECONDS", 1)
    with running(classifier, timeout=1.0) as client:
        assert answer_of(client, *parts).count(b"HTTP/1.1 200") == answers


def test_request_head_of_many_bytes_is_refused(server):
    many = b"".join(b"A%d: %s\r\n" % (n, b"x" * 1000) for n in range(100))
    for parts in ((HEALTH, many, b"\r\n"), (HEALTH + b"A: ", b"x" * 100_000, b"\r\n\r\n")):
        assert answer_of(server, *parts) == b""


def test_body_that_follows_a_refusal_is_read(server):
    """The client would otherwise find a broken connection instead of the answer."""
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\nContent-Length: 500000\r\n\r\n"
    received = answer_of(server, head, b"x" * 200_000, b"x" * 300_000, HEALTH + b"Connection: close\r\n\r\n")
    assert b" 415 " in received
    assert b" 200 " in received


def test_body_that_does_not_arrive_is_refused_and_the_connection_closed(classifier):
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\n"
    with running(classifier, timeout=0.6, queue_size=1, limits=RequestLimits(max_images=1)) as client:
        received = answer_of(client, head + b"x", b"x")
        assert b"HTTP/1.1 408" in received
        assert client.post("/predict", content=png(photo(1))).status_code == 200  # its place is free again


def test_augmented_and_calibrated_scores_are_served(stock):
    plain = hfvit.load_classifier(stock, device="cpu")
    classifier = hfvit.load_classifier(stock, device="cpu", tta="flip")
    classifier.temperature = 0.2
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    [one], [mirrored] = plain.logits([image]), plain.logits([ImageOps.mirror(image)])
    assert np.abs(one - mirrored).max() > 0.01
    scores = dict(zip(LABELS, softmax((one + mirrored) / 2 / 0.2), strict=True))
    with running(classifier) as client:
        found = client.post("/predict", content=png(image)).json()
    assert {each["label"]: each["score"] for each in found} == pytest.approx(scores, abs=1e-5)


def test_metrics_count_each_request_once_and_images_that_were_classified(classifier):
    model = slowed(classifier, seconds=0)
    with running(model) as client:
        for content, status in ((png(photo(1)), 200), (b"no image", 422)):
            assert client.post("/predict", content=content).status_code == status
        assert client.post("/predict?top_k=x", content=png(photo(1))).status_code == 422
        files = [("images", png(photo(1))), ("images", b"no image"), ("images", png(photo(2)))]
        refused = client.post("/predict", files=files)
        assert refused.status_code == 422
        assert "image 2" in refused.json()["detail"]
        model.backend.backend = lambda batch: 1 / 0
        assert client.post("/predict", content=png(photo(1))).status_code == 500
        text = client.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    counts = {key: float(value) for key, value in lines.items() if key.startswith("hfvit_requests_total")}
    assert counts == {f'hfvit_requests_total{{status="{status}"}}': n for status, n in ((200, 1), (422, 3), (500, 1))}
    assert float(lines["hfvit_request_seconds_count"]) == 5
    assert float(lines["hfvit_images_total"]) == 1
    assert float(lines["hfvit_queue_images"]) == 0


def test_image_of_a_form_stays_in_memory(classifier, monkeypatch):
    """The file system of a container may be read-only."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8))
    content = png(image)
    assert len(content) > 2**20

    def fail(*_, **__):
        raise OSError("no usable temporary directory")

    monkeypatch.setattr("tempfile.TemporaryFile", fail)
    with running(classifier) as client:
        raw = client.post("/predict", content=content)
        form = client.post("/predict", files=[("images", content)])
    assert form.json() == [raw.json()]


def test_other_tasks_run_while_a_form_is_parsed():
    part = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
    content = b"\r\n--xy" * 150_000  # the beginning of a boundary, again and again
    body = part + content + b"\r\n--x--\r\n"
    ticks = []

    async def stream():
        yield body

    async def tick() -> None:
        while True:
            ticks.append(1)
            await asyncio.sleep(0)

    async def run():
        ticking = asyncio.create_task(tick())
        request = SimpleNamespace(headers=Headers({"content-type": FORM_TYPE}), stream=stream)
        found = await read_request(request, RequestLimits())
        ticking.cancel()
        return found

    assert asyncio.run(run()).files == [content]
    assert len(ticks) > len(body) / 100_000


def test_concurrent_requests_share_batches_and_keep_their_images(classifier):
    slow = slowed(classifier)
    with running(slow, max_batch_size=8) as client, ThreadPoolExecutor(24) as pool:
        seeds = range(48)
        answers = list(pool.map(lambda seed: client.post("/predict", content=png(photo(seed))).json(), seeds))
        text = client.get("/metrics").text
    assert answers == [expected(photo(seed)) for seed in seeds]
    sizes = slow.backend.sizes
    assert sum(sizes) == 48
    assert max(sizes) <= 8
    assert len(sizes) <= 16  # 48 / 8 = 6, and what arrives early or late
    assert "hfvit_images_total 48.0" in text
    assert 'hfvit_requests_total{status="200"} 48.0' in text
    assert f"hfvit_batch_images_count {len(sizes)}.0" in text


def test_overload_answers_every_request_with_200_or_429(classifier):
    slow = slowed(classifier)
    with running(slow, max_batch_size=2, queue_size=4) as client, ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda seed: (seed, client.post("/predict", content=png(photo(seed)))), range(96)))
        assert client.post("/predict", content=png(photo(1))).status_code == 200  # all places are free again
    by_status = {status: [each for each in answers if each[1].status_code == status] for status in (200, 429)}
    assert len(by_status[200]) + len(by_status[429]) == 96
    assert len(by_status[200]) >= 4
    assert by_status[429]
    for seed, response in by_status[200]:
        assert response.json() == expected(photo(seed))
    assert all(int(response.headers["Retry-After"]) >= 1 for _, response in by_status[429])
    assert sum(slow.backend.sizes) == len(by_status[200]) + 1


def test_slow_model_answers_504_and_later_requests_again(classifier):
    slow = slowed(classifier, seconds=0.4)
    with running(slow, timeout=0.2) as client:
        assert client.post("/predict", content=png(photo(1))).status_code == 504
        slow.backend.seconds = 0
        time.sleep(0.4)
        assert client.post("/predict", content=png(photo(1))).json() == expected(photo(1))


def test_failing_model_answers_500_without_its_message(classifier, folder, caplog):
    broken = slowed(classifier)

    def fail(batch):
        raise RuntimeError(f"{folder} {SECRET}")

    broken.backend.backend = fail
    with running(broken) as client:
        response = client.post("/predict", content=png(photo(1)))
        assert response.status_code == 500
        assert str(folder) not in response.text
        assert SECRET not in response.text + caplog.text
        broken.backend.backend = lambda batch: np.full((len(batch), 3), np.nan, np.float32)
        assert client.post("/predict", content=png(photo(1))).status_code == 500
        assert client.get("/health").json() == {"status": "ok", "model": folder.name}


def test_openapi_document_describes_the_routes(server):
    document = server.get("/openapi.json").json()
    assert set(document["paths"]) == {"/predict", "/health", "/metrics"}
    assert set(document["paths"]["/predict"]["post"]["requestBody"]["content"]) >= {"image/*", "application/json"}
    assert server.get("/docs").status_code == 200


def test_folder_that_is_not_utf_8_is_named(classifier):
    other = copy.copy(classifier)
    other.name = "/runs/caf\udce9"
    with running(other) as client:
        names = (client.get("/health").json()["model"], client.get("/openapi.json").json()["info"]["title"])
        assert names == ("caf\\xe9",) * 2


def test_graph_with_preprocessing_batches_images_of_several_sizes(tmp_path):
    write_graph(write_configs(tmp_path, processor=False) / "model.onnx", pixels=True)
    images = [colored_image(seed % 3, np.random.default_rng(seed), size=16 + seed % 2) for seed in range(6)]
    with running(hfvit.load_classifier(tmp_path), max_delay=0.2) as client:
        answers = client.post("/predict", files=[("images", png(image)) for image in images]).json()
    assert answers == [expected(image) for image in images]


def test_batches_of_a_graph_with_preprocessing_have_limited_pixels(tmp_path):
    write_graph(write_configs(tmp_path, processor=False) / "model.onnx", pixels=True)
    slow = slowed(hfvit.load_classifier(tmp_path), seconds=0)
    slow.backend.takes_pixels = True
    image = replace(RequestLimits().image, max_pixels=800)
    images = [colored_image(seed % 3, np.random.default_rng(seed), size=16 + 12 * (seed == 3)) for seed in range(9)]
    with running(slow, limits=RequestLimits(image=image), max_delay=0.2) as client:
        answers = client.post("/predict", files=[("images", png(image)) for image in images]).json()
    assert answers == [expected(image) for image in images]
    assert slow.backend.sizes == [3, 1, 3, 2]  # 3 x 16 x 16 pixels and 28 x 28 pixels are below the limit


def test_decoded_images_of_a_graph_with_preprocessing_have_limited_pixels(tmp_path):
    write_graph(write_configs(tmp_path, processor=False) / "model.onnx", pixels=True)
    image = replace(RequestLimits().image, max_pixels=256)  # 16 images of 16 x 16 pixels
    files = [("images", png(photo(seed))) for seed in range(17)]
    wanted = [expected(photo(seed)) for seed in range(16)]
    with running(hfvit.load_classifier(tmp_path), limits=RequestLimits(image=image)) as client:
        assert client.post("/predict", files=files).status_code == 413
        with ThreadPoolExecutor(3) as pool:  # the second and the third request wait for the first
            answers = list(pool.map(lambda _: client.post("/predict", files=files[:16]).json(), range(3)))
    assert answers == [wanted] * 3


def test_several_labels_are_those_that_reach_their_thresholds(tmp_path):
    write_graph(tmp_path / "model.onnx")
    config = json.loads((write_configs(tmp_path) / "config.json").read_text())
    config |= {"problem_type": "multi_label_classification", "thresholds": [0.0, 0.0, 1.0]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    scores = dict(zip(LABELS, expit(expected_logits(photo(1))), strict=True))
    with running(hfvit.load_classifier(tmp_path)) as client:
        found = client.post("/predict", content=png(photo(1))).json()
        assert {each["label"]: each["score"] for each in found} == {
            label: pytest.approx(scores[label], abs=1e-5) for label in ("green", "red")
        }
        assert len(client.post("/predict?top_k=3", content=png(photo(1))).json()) == 3


def test_address_in_use_raises_hfvit_error():
    with listening_socket("127.0.0.1", 0) as bound:
        bound.listen()
        with pytest.raises(HFViTError, match=r"^--host, --port:"):
            listening_socket("127.0.0.1", bound.getsockname()[1])


def test_address_that_another_server_took_during_loading_raises_hfvit_error(classifier):
    first = listening_socket("127.0.0.1", 0)
    with first, listening_socket("127.0.0.1", first.getsockname()[1]) as second:
        first.listen()
        with pytest.raises(HFViTError, match=r"^--host, --port:"):
            serve(classifier, second, ServerOptions())


def test_shutdown_waits_for_a_request_that_arrives_and_runs_slowly(classifier):
    def body():
        content = png(photo(1))
        yield content[:100]
        time.sleep(1.2)
        yield content[100:]

    with ThreadPoolExecutor(1) as pool:
        with running(slowed(classifier, seconds=1.2), timeout=1.9) as client:
            answer = pool.submit(httpx.post, f"{client.base_url}/predict", content=body(), timeout=20)
            time.sleep(0.5)
        assert answer.result().json() == expected(photo(1))


@pytest.mark.integration
def test_sigterm_after_the_address_line_exits_with_0(folder, tmp_path):
    words = ["hfvit", "serve", folder, "--port", 0, "--threads", 1]
    with running_command(*words, log=tmp_path / "log") as (process, output):
        assert output.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.integration
def test_sigterm_answers_the_request_in_progress_and_exits_with_0(folder, tmp_path):
    words = ["hfvit", "serve", folder, "--port", 0, "--threads", 1, "--timeout", 5]
    with running_command(*words, log=tmp_path / "log") as (process, output):
        address = output.readline().split()[1]
        assert address.endswith("/predict")

        def body():
            content = png(photo(1))
            yield content[:100]
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            yield content[100:]

        assert httpx.post(address, content=body(), timeout=20).json() == expected(photo(1))
        assert process.wait(20) == 0


def test_first_process_of_a_container_exits_on_sigterm_while_it_loads(monkeypatch):
    previous = signal.getsignal(signal.SIGTERM)
    exit_on_sigterm_as_init()
    assert signal.getsignal(signal.SIGTERM) is previous
    monkeypatch.setattr(os, "getpid", lambda: 1)
    try:
        exit_on_sigterm_as_init()
        with pytest.raises(SystemExit) as stop:
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert stop.value.code == 143


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_before_the_server_runs_stops_it(classifier, monkeypatch, number):
    def run(sockets) -> None:
        signal.raise_signal(number)
        assert fake.should_exit

    fake = SimpleNamespace(run=run, started=True, should_exit=False)
    monkeypatch.setattr("hfvit.serve.server.uvicorn_server", lambda *_: fake)
    before = signal.getsignal(number)
    with listening_socket("127.0.0.1", 0) as bound:
        serve(classifier, bound, ServerOptions())
    assert fake.should_exit
    assert signal.getsignal(number) is before
