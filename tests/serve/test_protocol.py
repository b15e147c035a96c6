"""Limits of a connection, with the protocol and a transport that records."""

import asyncio

import pytest

pytest.importorskip("httptools")
uvicorn = pytest.importorskip("uvicorn")

from uvicorn.server import ServerState  # noqa: E402

from hfvit.serve.protocol import MAX_HEAD_BYTES, limited_protocol  # noqa: E402

GET = b"GET / HTTP/1.1\r\nHost: a\r\n"
HEADER = b"A: " + b"x" * 1000 + b"\r\n"


class Transport(asyncio.Transport):
    """Transport that keeps what is written."""

    def __init__(self):
        super().__init__()
        self.sent = b""
        self.is_closed = False

    def write(self, data) -> None:
        self.sent += data

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def connect(answered: asyncio.Event):
    """Return a connection to an app that answers without reading, and its transport."""

    async def app(scope, receive, send) -> None:
        await answered.wait()
        await send({"type": "http.response.start", "status": 429, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    config = uvicorn.Config(app, http=limited_protocol(60), lifespan="off", log_config=None)
    config.load()
    protocol = config.http_protocol_class(config=config, server_state=ServerState(), app_state={})
    transport = Transport()
    protocol.connection_made(transport)
    return protocol, transport


async def answers(transport: Transport, count: int) -> None:
    """Wait for a number of answers."""
    async with asyncio.timeout(5):
        while transport.sent.count(b" 429 ") < count:
            await asyncio.sleep(0)


def test_connection_stays_open_after_a_large_body_of_a_refused_request():
    async def run() -> None:
        answered = asyncio.Event()
        answered.set()
        protocol, transport = await connect(answered)
        protocol.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\n" + bytes(100))
        await answers(transport, 1)
        protocol.data_received(bytes(150_000))
        protocol.data_received(bytes(149_900))
        assert not transport.is_closed
        protocol.data_received(GET + b"\r\n")
        await answers(transport, 2)
        assert not transport.is_closed

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["first request", "request behind a pending one", "trailers of a body"])
def test_head_of_many_bytes_closes_the_connection(kind):
    async def run() -> None:
        answered = asyncio.Event()
        protocol, transport = await connect(answered)
        if kind == "trailers of a body":
            head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"
            protocol.data_received(head)
            start = b"0\r\n"
        else:
            protocol.data_received(GET + b"\r\n" if kind == "request behind a pending one" else b"")
            start = GET
        protocol.data_received(start)
        received = len(start)
        while received + len(HEADER) <= MAX_HEAD_BYTES:
            protocol.data_received(HEADER)
            received += len(HEADER)
        assert not transport.is_closed
        protocol.data_received(HEADER)
        assert transport.is_closed
        answered.set()
        await asyncio.sleep(0)

    asyncio.run(run())


def test_heads_are_counted_one_by_one():
    async def run() -> None:
        answered = asyncio.Event()
        answered.set()
        protocol, transport = await connect(answered)
        for number in range(1, 4):
            for part in (GET, HEADER * 40, b"\r\n"):
                protocol.data_received(part)
            await answers(transport, number)
        assert not transport.is_closed

    asyncio.run(run())
