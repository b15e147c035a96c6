"""HTTP servers on the loopback interface that answer with arbitrary bytes."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Answer = Callable[[socket.socket, str], None]


class RawServer:
    """Server that calls `answer(connection, path)` in a thread per request.

    Paths are recorded in `requests`.

    With the TLS certificate of `context` it is a server of https.
    """

    def __init__(self, answer: Answer, context: ssl.SSLContext | None = None):
        self.answer = answer
        self.context = context
        self.requests: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:  # the client has gone
            if self.context:
                connection = self.context.wrap_socket(connection, server_side=True)
            head = b""
            while b"\r\n\r\n" not in head:
                received = connection.recv(4096)
                if not received:
                    return
                head += received
            path = head.split(b" ")[1].decode()
            self.requests.append(path)
            self.answer(connection, path)
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)


@contextmanager
def raw_server(answer: Answer, context: ssl.SSLContext | None = None) -> Iterator[RawServer]:
    """Run a `RawServer` in the block."""
    server = RawServer(answer, context)
    try:
        yield server
    finally:
        server.listener.close()


def response(body: bytes = b"", status: str = "200 OK", **headers: str | int) -> bytes:
    """Return an HTTP response; underscores in header names become hyphens."""
    fields = {"Content-Length": len(body)} | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in fields.items() if value is not None)]
    return "\r\n".join([*lines, "", ""]).encode() + body
