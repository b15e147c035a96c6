"""HTTP connections with limits on the size and the time of a request's head."""

import asyncio
from collections.abc import Callable

MAX_HEAD_BYTES = 64 * 1024


def limited_protocol(head_seconds: float) -> Callable[..., asyncio.Protocol]:
    """Return uvicorn's protocol with limits on the request line and headers.

    uvicorn 0.54 waits for them without a limit, and its parser `httptools` takes any number of bytes.

    Args:
        head_seconds: longest time to the end of the head, from the connection or from the first byte after a response.
    """
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class LimitedProtocol(HttpToolsProtocol):
        """Close a connection whose request head is too long or does not arrive in time."""

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self._timer: asyncio.TimerHandle | None = None
            self._head_bytes = 0
            self._progress = 0  # parts of bodies, and ends of heads and of bodies

        @property
        def _awaits_head(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._set_timer()

        def data_received(self, data: bytes) -> None:
            before = self._progress
            super().data_received(data)
            # Without progress, all of it is a part of a head, perhaps while the answer to an earlier request is
            # pending, or of the trailers of a body.
            self._head_bytes = self._head_bytes + len(data) if self._progress == before else 0
            if self._head_bytes > MAX_HEAD_BYTES:
                self._cancel_timer()
                self.transport.close()
            else:
                self._set_timer()

        def on_headers_complete(self) -> None:
            self._progress += 1
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._progress += 1
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._progress += 1
            super().on_message_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._cancel_timer()

        def _set_timer(self) -> None:
            if not self._awaits_head:
                self._cancel_timer()
            elif self._timer is None:
                self._timer = self.loop.call_later(head_seconds, self._close)

        def _cancel_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _close(self) -> None:
            self._cancel_timer()
            if self._awaits_head and not self.transport.is_closing():
                self.transport.close()

    return LimitedProtocol
