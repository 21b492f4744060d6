"""A service that is open to everybody says so, in its log and in every answer, and answers to its
own names alone.
"""

from __future__ import annotations

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.access.hosts import is_loopback, named_in
from service.api.problems import Problem

_logger = logging.getLogger(__name__)

HEADER = (b"x-llm4ehr-mode", b"open-demo")

_AGAIN_S = 60.0


class OpenDemo:
    """ASGI middleware: puts the header on every answer, and refuses requests to other names.

    A page on the internet may have its own name lead here, and would be of the same origin then:
    the browser of whoever looks at it would read everything for it.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        """`host` is where the service listens."""
        self._app = app
        self._host = host.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def declare(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), HEADER]}
            await send(message)

        app = self._app
        if scope["type"] == "http" and not self._is_ours(scope):
            app = Problem("misdirected").response(scope["path"])
        await app(scope, receive, declare)

    def _is_ours(self, scope: Scope) -> bool:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1:
            return False
        name = named_in(hosts[0].decode("latin-1"))
        return name == self._host or is_loopback(name)


async def warn(every_s: float = _AGAIN_S) -> None:
    """A line in the log now and every minute, until it is cancelled."""
    while True:
        _logger.warning("OPEN: everybody may read and change everything; for demonstrations alone")
        await asyncio.sleep(every_s)
