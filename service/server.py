"""The HTTP server of one process: how it starts, how it stops, and with which status it ends."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from socket import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.http_protocol import HttpProtocol
from service.lifecycle import Lifecycle
from service.settings import Settings

FATAL_STATUS = 70
"""Exit status when the engine or its device failed and only a new process can help."""

TIMEOUT_STATUS = 75
"""Exit status when the service did not stop in time."""

_logger = logging.getLogger(__name__)

# A connection that was accepted just before the door closed has this long to bring its request.
_SETTLE_S = 0.1

# How long the last line may take to be written.
_SAY_S = 1.0

# The share of the time for running requests; the rest is for the engine and the log.
_REQUESTS = 0.75


class Server(uvicorn.Server):
    """Told to stop, it says so in its health for a while, then closes the door, then drains.

    Whatever happens, the process has ended `drain_timeout_seconds` after the signal. A second
    signal ends it at once; what was acknowledged is in the log either way. `fatal`, which any
    thread may set, ends it without the grace; `failed` says so afterwards.
    """

    def __init__(self, app: FastAPI, settings: Settings, fatal: threading.Event) -> None:
        self._grace_s = settings.drain_grace_seconds
        self._timeout_s = settings.drain_timeout_seconds
        self._lifecycle: Lifecycle = app.state.context.lifecycle
        self._fatal = fatal
        self._stop_at: float | None = None
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            # Its request lines name episodes; ours name the route.
            access_log=False,
            # The lines of the server go where ours go.
            log_config=None,
            # The peer is who connects; what a gateway says of its client is for `service.access`.
            proxy_headers=False,
            server_header=False,
            http=HttpProtocol,
            ws="none",
            limit_concurrency=settings.max_connections,
            timeout_graceful_shutdown=max(int(_REQUESTS * (self._timeout_s - self._grace_s)), 1),
        )
        super().__init__(config)

    @property
    def failed(self) -> bool:
        """Whether it ended because the engine or its device failed."""
        return self._fatal.is_set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to stop."""
        if self._captured_signals:
            os._exit(128 + sig)
        self._captured_signals.append(sig)
        self._drain(self._grace_s)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True to stop."""
        if self.failed and self._stop_at is None:
            self._drain(0)
        stop = await super().on_tick(counter)
        return stop or (self._stop_at is not None and time.monotonic() >= self._stop_at)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Take no new connection, let requests finish, stop the application."""
        for server in self.servers:
            server.close()
        await asyncio.sleep(_SETTLE_S)
        await super().shutdown(sockets)

    def _drain(self, grace_s: float) -> None:
        self._lifecycle.draining = True
        self._stop_at = time.monotonic() + grace_s
        limit = threading.Timer(self._timeout_s, self._give_up)
        limit.daemon = True
        limit.start()

    def _give_up(self) -> None:
        message = "the service did not stop in time"
        saying = threading.Thread(target=_logger.critical, args=(message,), daemon=True)
        saying.start()
        saying.join(_SAY_S)  # nobody may read what we write to
        os._exit(FATAL_STATUS if self.failed else TIMEOUT_STATUS)
