"""HTTP/1.1 on one connection: headers are bounded in size and time, connections in number."""

from __future__ import annotations

import asyncio
from asyncio.events import TimerHandle
from typing import Any

from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from service.api.room import EXTRA

MAX_HEADER_BYTES = 64 * 1024
"""Of the request line and all headers, or of anything else that is neither yet nor body."""

HEADERS_S = 10.0
"""How long the headers of a request may take to come, and the first of a connection."""

_TOO_LARGE = b"".join(
    [
        STATUS_LINE[431],
        b"content-length: 0\r\n",
        b"connection: close\r\n",
        b"\r\n",
    ]
)


class HeadersTooLarge(Exception):
    """The headers of a request are longer than they may be."""


class HttpProtocol(HttpToolsProtocol):
    """The server's protocol, which by itself reads headers of any size and waits for them for ever.

    What the parser keeps is not to be seen before it is complete, so the bytes are counted that it
    was fed since it last gave something out.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._most = self.limit_concurrency
        # Of its own limit the server would let everybody feel that it is reached.
        self.limit_concurrency = None
        self._is_extra = False
        self._unread = 0
        self._is_too_large = False
        self._patience: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._is_extra = self._most is not None and len(self.connections) > self._most
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is no more."""
        self._no_longer_wait()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes came."""
        self._unread += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._unread > MAX_HEADER_BYTES:
            self._is_too_large = True
            self.send_400_response("")
        elif self._patience is None and not self._is_answering():
            self._wait_for_headers()

    def on_headers_complete(self) -> None:
        """All headers of a request are there."""
        self._unread = 0
        self._no_longer_wait()
        if len(self.url) + sum(len(n) + len(v) + 4 for n, v in self.headers) > MAX_HEADER_BYTES:
            self._is_too_large = True
            raise HeadersTooLarge
        if self._is_extra:
            self.scope[EXTRA] = True  # type: ignore[literal-required]
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The whole request is there."""
        self._unread = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """The request is not understood: say so, and end the connection."""
        if self._is_too_large:
            self.transport.write(_TOO_LARGE)
            self.transport.close()
        else:
            super().send_400_response(msg)

    def _is_answering(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    def _wait_for_headers(self) -> None:
        self._patience = self.loop.call_later(HEADERS_S, self.transport.close)

    def _no_longer_wait(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
