"""HTTP connections with limits on the size and the time of a request's head."""

import asyncio
from collections.abc import Callable


def limited_protocol(head_seconds: float) -> Callable[..., asyncio.Protocol]:
    """Return uvicorn's protocol with limits on the request line and headers.

    uvicorn 0.54 waits for them without a limit. h11 refuses a head of more than 64 KiB; httptools takes any.

    Args:
        head_seconds: longest time to the end of the head, from the connection or from the first byte after a response.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class LimitedProtocol(H11Protocol):
        """Close a connection whose request head does not arrive in time."""

        def __init__(self, **options):
            super().__init__(**options)
            self._timer: asyncio.TimerHandle | None = None

        @property
        def _awaits_head(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._set_timer()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._set_timer()

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
            self._timer = None
            if self._awaits_head and not self.transport.is_closing():
                self.transport.close()

    return LimitedProtocol
